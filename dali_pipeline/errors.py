"""The exception for mistakes and conditions that a user can correct."""

from __future__ import annotations

import os
from pathlib import Path

from dali_pipeline.words import printable, shortened


class UserError(Exception):
    """Something that a user can correct. The message says what and how; a command prints it and ends with `exit_code`.

    Each argument is a line of the message; line breaks and other control characters inside one, as of a file's name, are
    shown as their escapes.
    """

    exit_code = 2

    def __str__(self) -> str:
        return "\n".join(shortened(printable(str(line))) for line in self.args)


def at_home(path: str | os.PathLike[str], name: str, kind: type[UserError] = UserError) -> Path:
    """The path with ~ and ~user as the folders that they stand for; `name` is what an error, of this kind, calls it."""
    if problem := path_problem(os.fspath(path)):
        raise kind(f"{name}: {path}: {problem}")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or none with a home
        raise kind(f"{name}: {path}: no home is known for its ~; write the folder out") from None


def path_problem(path: str) -> str | None:
    """Why no file can have this name; None where one can."""
    if "\0" in path:
        return "a name cannot hold the character NUL"
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        return f"no file can bear this name, its character {error.start + 1} is none of the file system's"
    return None


def cache_folder() -> Path | None:
    """This project's folder in the user's folder for caches; None for a user without a home, as in some containers."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            return None
    return folder / "cifar-throughput"

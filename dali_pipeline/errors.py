"""The exception for mistakes and conditions that a user can correct."""

from __future__ import annotations

import os
from pathlib import Path


class UserError(Exception):
    """Something that a user can correct. The message says what and how; a command prints it and ends with `exit_code`."""

    exit_code = 2


def at_home(path: str | os.PathLike[str], name: str, kind: type[UserError] = UserError) -> Path:
    """The path with ~ and ~user as the folders that they stand for; `name` is what an error, of this kind, calls it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or none with a home
        raise kind(f"{name}: {path}: no home is known for its ~; write the folder out") from None

"""Files that are whole at every moment: the old content or the new one, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from train.failpoints import failpoint


class WriteError(OSError):
    """A file that cannot be written; the one before it is intact. `filename` names it."""


def fsync_folder(folder: Path) -> None:
    """Make a rename in the folder durable (a no-op where folders cannot be opened, as on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes, keep_previous: Path | None = None) -> None:
    """Replace `path` by `content` so that at every moment it is whole: the old file or the new one.

    With `keep_previous`, what `path` held before stays under that name. Raises WriteError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            failpoint("write")
            os.fsync(file.fileno())
        if keep_previous is not None and path.exists():
            _keep(path, keep_previous)
            failpoint("previous written")
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def _keep(path: Path, keep_previous: Path) -> None:
    """Give `path` a second name, so that it is never missing itself."""
    link = keep_previous.with_name(f".{keep_previous.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        link.replace(keep_previous)
    except BaseException:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
        raise


def remove_stale(folder: Path) -> None:
    """Remove temporary files that a killed process left behind."""
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)

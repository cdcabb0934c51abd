"""Atomic writes: whatever ends the process, a file holds either its old content or the whole new one."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from dali_pipeline.regular import kind_in_the_way
from train.failpoints import failpoint


class WriteError(OSError):
    """The file `filename` could not be written; its previous content is intact."""


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


def open_new(path: Path) -> BinaryIO:
    """Create a new file and open it for writing. A file or link of that name is removed first, and no link is followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")  # O_EXCL, which refuses a link too


def write_atomic(path: Path, content: bytes, keep_previous: Path | None = None) -> None:
    """Write `content` to `path` so that at every moment the file there is complete: the old one or the new one.

    A symbolic link at `path` is itself replaced, and its target stays. With `keep_previous` the old file is kept under that
    name. Raises WriteError, also where `path` is a folder, a device or a pipe.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if kind := kind_in_the_way(path):
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
        with open_new(temporary) as file:
            file.write(content)
            file.flush()
            failpoint("write")
            os.fsync(file.fileno())
        if keep_previous is not None and path.is_file():
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
    """Keep the file under a second name, `keep_previous`, without ever removing it from `path`."""
    link = keep_previous.with_name(f".{keep_previous.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            with path.open("rb") as source, open_new(link) as copy:
                shutil.copyfileobj(source, copy)
        link.replace(keep_previous)
    except BaseException:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
        raise


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a table as CSV, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_atomic(path, text.getvalue().encode())


def is_temporary(name: str, of: Sequence[str]) -> bool:
    """Whether `name` is a temporary name under which `write_atomic` writes one of the files `of`."""
    match = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return match is not None and match[1] in of


def remove_stale(folder: Path, names: Sequence[str]) -> None:
    """Remove temporary files of these names that a killed process left behind; a folder or a pipe is none."""
    for stale in folder.glob(".*.tmp"):
        if is_temporary(stale.name, names) and kind_in_the_way(stale) is None:
            stale.unlink(missing_ok=True)

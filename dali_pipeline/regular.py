"""Opens files that must be regular ones: a named pipe would be waited for without end, a device read without one."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotARegularFile(OSError):
    """The path of a file is something else; `strerror` says what."""


class TooLarge(OSError):
    """A file of more bytes than are wanted; `strerror` says how many."""


def kind_in_the_way(path: Path) -> str | None:
    """What lies at `path` where a file is to be written: "a folder", "a symbolic link to a device" ...; None where nothing or a
    regular file does, or a link to either, which is replaced."""
    for look, words in ((Path.lstat, ""), (Path.stat, "a symbolic link to ")):
        try:
            mode = look(path).st_mode
        except OSError:
            return None
        if not stat.S_ISLNK(mode):
            return None if stat.S_ISREG(mode) else words + _kind(mode)
    return None


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading and writing; it is created where there is none, and existing content stays.

    Raises NotARegularFile, without waiting, for a link, a folder, a pipe, a socket or a device.
    """
    return _open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), "r+", follow=False)


def open_to_read(path: Path) -> FileIO:
    """Open a regular file, or a link to one, for reading. Raises NotARegularFile, without waiting, for anything else; OSError as
    usual."""
    return _open(path, os.O_RDONLY, "r", follow=True)


def read_regular(path: Path, at_most: int | None = None) -> bytes:
    """The content of a regular file, or of a link to one. Raises NotARegularFile; TooLarge where it has more than `at_most`
    bytes, of which none is kept; OSError as usual."""
    with open_to_read(path) as file:
        if at_most is None:
            return file.readall()
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > at_most else _up_to(file, at_most + 1)  # it may grow while it is read
        if size > at_most or len(content) > at_most:
            said = f"is of {max(size, len(content)):,} bytes, expected at most {at_most:,}"
            raise TooLarge(errno.EFBIG, said, str(path))
        return content


def _up_to(file: FileIO, count: int) -> bytes:
    parts = []
    while count and (part := file.read(min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _open(path: Path, flags: int, mode: str, *, follow: bool) -> FileIO:
    _check_path(path, follow)
    for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):  # not every system has each of them
        flags |= getattr(os, name, 0)
    try:
        file = FileIO(os.open(path, flags, 0o666), mode)
    except OSError:
        _check_path(path, follow)  # the path may have been replaced since the first check
        raise
    try:
        _check_mode(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def _check_path(path: Path, follow: bool) -> None:
    try:
        mode = path.stat().st_mode if follow else path.lstat().st_mode
    except OSError:  # no such path, or one that cannot be looked at: opening it gives the error
        return
    _check_mode(mode, path)


def _check_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise NotARegularFile(errno.EINVAL, f"is {_kind(mode)}, not a regular file", str(path))


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")

"""The operating system's locks on files, through filelock. A lock ends with the process that holds it.

filelock is given a file that is already open (`lock_descriptor`). So it cannot follow a link, empty a file, or fall back to a
"soft" lock, where the existence of a file is the lock: that would remain when the process is killed.
"""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

# NFS without its lock service, some file systems mounted into containers, a Python without fcntl
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotARegularFile(OSError):
    """The path of a file to be locked is something else; `strerror` says what."""


class NoLocks(OSError):
    """The file system has no locks, or Python was built without them: `strerror` says which."""


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading and writing; it is created where there is none, and existing content stays.

    Raises NotARegularFile, without waiting, for a link, a folder, a pipe, a socket or a device.
    """
    _check_regular(path)
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # not every system has each of them
        flags |= getattr(os, name, 0)
    try:
        file = FileIO(os.open(path, flags, 0o666), "r+")
    except OSError:
        _check_regular(path)  # the path may have been replaced since the first check
        raise
    try:
        _check_mode(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def try_lock(file: FileIO) -> bool:
    """Lock an open file until it is closed; False where another process, or another opening, has it locked.

    Does not wait. Raises NoLocks where nothing can be locked, OSError for any other failure.
    """
    from filelock import lock_descriptor  # here because its import takes 40 ms

    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            raise NoLocks(error.errno, error.strerror) from error
        raise


def is_still_at(file: FileIO, path: Path) -> bool:
    """Whether an open file still has this name: its owner may have removed or renamed it between our opening and locking it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _check_regular(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:  # no such path, or one that cannot be looked at: opening it gives the error
        return
    _check_mode(mode, path)


def _check_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise NotARegularFile(errno.EINVAL, f"is {kind}, not a regular file", str(path))

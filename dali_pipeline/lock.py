"""Locks on files, the operating system's, by filelock: a lock dies with the process that holds it.

filelock locks a file that is open already (`lock_descriptor`), so that it neither follows a link nor empties a file nor falls
back to a "soft" lock, a file whose presence counts: such a lock outlives a process that is killed.
"""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

# NFS without its lock service and some mounts of containers; a Python without fcntl
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
    """Where a file to be locked should be lies something else: `strerror` says what."""


class NoLocks(OSError):
    """The file system has no locks, or Python was built without them: `strerror` says which."""


def open_regular(path: Path) -> FileIO:
    """A regular file, made where there is none, opened to be read and written; its content stays.

    Raises NotARegularFile for a link, a folder, a pipe, a socket or a device, and does not wait for any of them.
    """
    _check_regular(path)
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # each where the system has it
        flags |= getattr(os, name, 0)
    try:
        file = FileIO(os.open(path, flags, 0o666), "r+")
    except OSError:
        _check_regular(path)  # something else has come there since the first look
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
    from filelock import lock_descriptor  # 40 ms, of no use to most that import this

    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            raise NoLocks(error.errno, error.strerror) from error
        raise


def is_still_at(file: FileIO, path: Path) -> bool:
    """Whether an open file is the one of this name: between opening and locking, its owner may have removed or renamed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _check_regular(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there, or opening it will say what is wrong
        return
    _check_mode(mode, path)


def _check_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise NotARegularFile(errno.EINVAL, f"is {kind}, not a regular file", str(path))

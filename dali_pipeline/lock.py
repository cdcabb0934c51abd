"""The operating system's locks on files, through filelock. A lock ends with the process that holds it.

filelock is given a file that is already open (`lock_descriptor`). So it cannot follow a link, empty a file, or fall back to a
"soft" lock, where the existence of a file is the lock: that would remain when the process is killed.
"""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

# NFS without its lock service, some file systems mounted into containers, a Python without fcntl
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class NoLocks(OSError):
    """The file system has no locks, or Python was built without them: `strerror` says which."""


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

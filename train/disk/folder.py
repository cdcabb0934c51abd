"""The run folder: who may write it, and config.yaml, environment.json, metrics.jsonl in it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from dali_pipeline.errors import UserError
from train.disk.atomic import remove_stale, write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# the files of a run, beside the folders analysis/ and tensorboard/
WRITTEN = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
    "lr_finder.csv",
    "lr_finder.png",
    "last.pt",
    "previous.pt",
    "best.pt",
)


class RunFolderError(UserError):
    """A run folder that cannot be used: one line with the path, the cause and the remedy."""


def default_run_dir(name: str, resume: bool, root: Path = Path("runs")) -> Path:
    """runs/NAME; where that exists runs/NAME-2, -3 ...; with `resume` the newest that exists."""
    taken = 0
    while (root / (name if taken == 0 else f"{name}-{taken + 1}")).exists():
        taken += 1
    number = max(taken, 1) if resume else taken + 1
    return root / (name if number == 1 else f"{name}-{number}")


class RunFolder:
    """Exclusive writer of one run folder.

    Raises RunFolderError where the folder holds a run already (unless `resume` or `overwrite`), another process is
    writing it, or it cannot be written; with `range_test`, which is for one alone, a range test counts as a run. The
    lock is the operating system's: it dies with its process. What `overwrite` replaces is removed by `start_over`, once
    the new run is about to begin.
    """

    def __init__(
        self, path: str | Path, *, resume: bool = False, overwrite: bool = False, range_test: bool = False
    ) -> None:
        self.path = Path(path)
        # where it found no rates a run goes no further, and may begin again; a range test alone counts to itself
        self._marks = WRITTEN if range_test else tuple(name for name in WRITTEN if not name.startswith("lr_finder"))
        self._lock: TextIO | None = None
        self._check(resume, overwrite)
        try:
            self._acquire()
            self._check(resume, overwrite)  # another run may have ended between the first look and the lock
            remove_stale(self.path)
            probe = self.path / ".writable.tmp"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            self.close()
            raise RunFolderError(f"{self.path}: cannot be written: {error.strerror}; choose another run.dir=") from None
        except RunFolderError:
            self.close()
            raise

    def _check(self, resume: bool, overwrite: bool) -> None:
        held = self.holds_run()
        if resume and not any(self._has(name) for name in ("last.pt", "previous.pt")):
            raise RunFolderError(
                f"{self.path}: nothing to resume, there is no last.pt; start the run without --resume"
                + (" (with --overwrite)" if held else "")
            )
        if held and not (resume or overwrite):
            raise RunFolderError(
                f"{self.path} already holds a run; continue it with --resume, replace it with --overwrite, "
                "or choose another run.dir="
            )

    def _has(self, name: str) -> bool:
        # not Path.exists: it raises where a parent is a file or must not be entered, on some versions of Python
        return os.path.lexists(self.path / name)

    def holds_run(self) -> bool:
        return any(self._has(name) for name in self._marks)

    def _acquire(self) -> None:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", encoding="ascii")
            self._lock_file(self._lock)
            try:
                if os.path.samestat(os.fstat(self._lock.fileno()), (self.path / ".lock").stat()):
                    break
            except FileNotFoundError:
                pass
            self._lock.close()  # its owner removed the file between our opening and locking it
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _lock_file(self, lock: TextIO) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            self._lock = None  # not ours to clean up after
            raise RunFolderError(
                f"{self.path}: another run (process {owner or 'unknown'}) is writing here; wait for it or choose "
                "another run.dir="
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise  # else a file system without locks, which is no reason not to train

    def start_over(self) -> None:
        """Remove what a run writes, and nothing else that may lie in the folder."""
        for name in WRITTEN:
            (self.path / name).unlink(missing_ok=True)
        for folder in ("analysis", "tensorboard"):
            if (self.path / folder).is_dir():
                shutil.rmtree(self.path / folder)

    def close(self) -> None:
        """Give up the lock; a folder in which nothing was written goes too."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()
        self._lock.close()
        self._lock = None

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """metrics.jsonl, whole: one line an epoch. A resumed run writes the epochs that its checkpoint knows."""
        self.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs of a run folder's metrics.jsonl, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

"""The run folder: its lock, what --overwrite removes, and config.yaml, environment.json and metrics.jsonl in it."""

from __future__ import annotations

import contextlib
import json
import os
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path
from typing import Any

from dali_pipeline.errors import UserError
from dali_pipeline.lock import NoLocks, is_still_at, try_lock
from dali_pipeline.regular import NotARegularFile, kind_in_the_way, open_regular, read_regular
from train.disk.atomic import is_temporary, open_new, remove_stale, write_atomic
from train.disk.checkpoint import CHECKPOINTS, carries_seal
from train.failpoints import failpoint
from train.step.range_test import CURVE_COLUMNS

# The files of a run. --overwrite removes them in this order. Those that prove that a run lies here are removed last, so that
# after a kill in between the rest can still be removed.
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "lr_finder.png",
    "best.pt",
    "previous.pt",
    "last.pt",
    "lr_finder.csv",
    "environment.json",
)
# the folders of a run, and the files that are written in each
FOLDERS = {
    "analysis": (
        "report.html",
        "curves.png",
        "learning_rate.png",
        "lr_finder.png",
        "samples.png",
        "misclassified.png",
        "grad_cam.png",
        "layer_cam.png",
        "confusion_matrix.png",
        "confusion_matrix.csv",
        "per_class.png",
        "per_class.csv",
        "calibration.png",
        "predictions.csv",
        "predict.png",
    ),
    "export": ("model.safetensors", "model.pt2", "model.onnx", ".model.*.tmp.*"),
    "tensorboard": ("events.out.tfevents.*",),
}
_LOCK = ".lock"  # the file that is locked; empty, because on Windows no other process could read it
_OWNER = ".lock.pid"  # the process id of the run that holds the lock
_PROBE = "writable"  # the temporary file of this name is written and removed, to see whether the folder can be written
MOST_BYTES = 200_000_000  # of a text file of a run: metrics of 100,000 epochs take a fifth of it
_ENVIRONMENT_KEYS = {"versions", "device", "precision", "compile", "backend", "data_source"}


class RunFolderError(UserError):
    """A run folder that cannot be used. The message is one line: the path, the cause and the remedy."""


def own_folder(run: Path, name: str) -> Path:
    """The path of a folder inside a run folder. RunFolderError where it is a symbolic link, which leads out of the run folder."""
    path = run / name
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: is a symbolic link, and what is written in it would land in another folder; remove the link or "
            "choose another folder"
        )
    return path


def default_run_dir(name: str, resume: bool, root: Path = Path("runs")) -> Path:
    """runs/NAME; where that exists runs/NAME-2, -3 ...; with `resume` the newest that exists."""
    taken = 0
    while (root / (name if taken == 0 else f"{name}-{taken + 1}")).exists():
        taken += 1
    number = max(taken, 1) if resume else taken + 1
    return root / (name if number == 1 else f"{name}-{number}")


class RunFolder:
    """One run folder, which no other process may write at the same time.

    Raises RunFolderError where the folder already holds a run (unless `resume` or `overwrite`), another process is writing
    it, or it cannot be written. `range_test` is for a range test without a training; an earlier range test then counts as a
    run. The lock is the operating system's and ends with its process. Where the file system has no locks, `unlocked` is a
    sentence that says so, and two runs may write here at once. With `overwrite`, `start_over` removes the old run once the
    new one is about to begin; RunFolderError where files have the names of a run's but no run wrote them.
    """

    def __init__(
        self, path: str | Path, *, resume: bool = False, overwrite: bool = False, range_test: bool = False
    ) -> None:
        self.path = Path(path)
        # a training whose range test failed left only its curve, and may be started again; for a range test the curve is a run
        self._marks = WRITTEN if range_test else tuple(name for name in WRITTEN if not name.startswith("lr_finder"))
        self.unlocked: str | None = None
        self._lock: FileIO | None = None
        try:
            self._check(resume, overwrite)
            self._acquire()
            self._check(resume, overwrite)  # again, as another run may have ended between the first check and the lock
            remove_stale(self.path, (*WRITTEN, _PROBE))
            probe = self.path / f".{_PROBE}.{os.getpid()}.tmp"
            with open_new(probe) as file:
                file.write(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            self.close()
            inside = f" ({error.filename})" if error.filename and Path(error.filename) != self.path else ""
            raise RunFolderError(
                f"{self.path}: cannot be written: {error.strerror}{inside}; choose another run.dir="
            ) from None
        except RunFolderError:
            self.close()
            raise

    def _check(self, resume: bool, overwrite: bool) -> None:
        for name in FOLDERS:
            if os.path.lexists(own_folder(self.path, name)) and not (self.path / name).is_dir():
                raise RunFolderError(
                    f"{self.path / name}: is no folder, and a run writes into a folder of that name; move it away or choose "
                    "another run.dir="
                )
        for name in (*WRITTEN, _OWNER):
            if kind := kind_in_the_way(self.path / name):
                raise RunFolderError(
                    f"{self.path / name}: is {kind}, not a regular file, and a run writes a file of that name; move it away "
                    "or choose another run.dir="
                )
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
        if overwrite and not self._proves_run() and (found := self._namesakes()):
            raise RunFolderError(
                f"{self.path}: --overwrite replaces a run, and none lies here: {', '.join(found)} "
                f"{'have' if len(found) > 1 else 'has'} a name that a run uses, and no checkpoint, environment.json or "
                "lr_finder.csv of a run lies beside; move it away or choose another run.dir="
            )

    def _has(self, name: str) -> bool:
        # not Path.exists: it raises where a parent is a file or must not be entered, on some versions of Python
        return os.path.lexists(self.path / name)

    def holds_run(self) -> bool:
        return any(self._has(name) for name in self._marks)

    def _proves_run(self) -> bool:
        """Whether there is a file that only a run writes, known by its content."""
        if any(carries_seal(self.path / name) for name in CHECKPOINTS):
            return True
        if _environment(self.path).keys() >= _ENVIRONMENT_KEYS:
            return True
        with contextlib.suppress(OSError, ValueError):
            table = read_regular(self.path / "lr_finder.csv", MOST_BYTES).decode("utf-8")
            return table.partition("\n")[0].strip() == ",".join(CURVE_COLUMNS)
        return False

    def _namesakes(self) -> list[str]:
        """The files and folders here that have a run's names. Folders end in /; empty ones do not count."""
        files = [name for name in WRITTEN if self._has(name)]
        return files + [f"{name}/" for name in FOLDERS if _names_in(self.path / name)]

    def _acquire(self) -> None:
        while self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        with open_new(self.path / _OWNER) as file:
            file.write(str(os.getpid()).encode())

    def _take_lock(self) -> FileIO | None:
        """The lock file, locked by this process; None where its owner removed it between our opening and locking it."""
        path = self.path / _LOCK
        try:
            file = open_regular(path)
        except NotARegularFile as error:
            raise RunFolderError(f"{path}: {error.strerror}; remove it or choose another run.dir=") from None
        try:
            failpoint("lock")
            if not self._locks(file):
                raise RunFolderError(
                    f"{self.path}: another run (process {self._owner()}) is writing here; wait for it or choose "
                    "another run.dir="
                )
            if is_still_at(file, path):
                # versions before this one wrote the process id into it, and a power cut can leave zeros
                content = file.read(64).strip(b"\0 \r\n")
                if content and not content.isdigit():
                    raise RunFolderError(f"{path}: no run wrote this file; move it away or choose another run.dir=")
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _locks(self, file: FileIO) -> bool:
        """False where another process has it locked; True also where the file system has no locks, with a note of it."""
        try:
            return try_lock(file)
        except NoLocks as error:  # training without a lock is better than not training
            self.unlocked = (
                f"{self.path}: nothing can be locked on this file system ({error.strerror}), and a second run into this "
                "folder would not be refused"
            )
            return True

    def _owner(self) -> str:
        """The process id that the lock's owner has written into the file beside it."""
        with contextlib.suppress(OSError, ValueError):
            owner = read_regular(self.path / _OWNER, 64).decode("ascii")
            if owner.isdecimal():
                return owner
        return "unknown"

    def start_over(self) -> list[str]:
        """Remove, by name, what a run, its analysis and its exports write, and return the names of everything else here.

        An export goes too: it is the network of the run that is replaced.
        """
        stays = [f"{name}/{kept}" for name, files in FOLDERS.items() for kept in _clear(self.path / name, files)]
        for name in WRITTEN:
            _remove_file(self.path / name)
        named = {kept.partition("/")[0] for kept in stays}
        return [name for name in _names_in(self.path) if name not in (_LOCK, _OWNER, *named)] + stays

    def close(self) -> None:
        """Release the lock, and remove the folder if nothing was written into it."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            (self.path / _OWNER).unlink(missing_ok=True)
            if [entry.name for entry in self.path.iterdir()] == [_LOCK]:
                (self.path / _LOCK).unlink()
                self.path.rmdir()
        self._lock.close()
        self._lock = None

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_metrics(self, entries: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl anew, one line for each epoch. A resumed run begins with the epochs in its checkpoint."""
        self.write_text("metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def goes_on_from(path: Path, job: str | None) -> bool:
    """Whether this folder holds a checkpoint of a run that this start of torchrun (`place.torchrun_job`) began or resumed, and
    not that of an earlier one."""
    return job is not None and os.path.lexists(path / "last.pt") and _environment(path).get("torchrun") == job


def _environment(path: Path) -> dict[str, Any]:
    """The content of a run folder's environment.json; empty where there is none that can be read."""
    try:
        found = json.loads(read_regular(path / "environment.json", MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_folder(path: Path) -> bool:
    """Whether this is a folder; a link to one is not."""
    return path.is_dir() and not path.is_symlink()


def _names_in(folder: Path) -> list[str]:
    """Sorted; none where there is no such folder."""
    return sorted(path.name for path in folder.iterdir()) if _is_folder(folder) else []


def _remove_file(path: Path) -> bool:
    """Remove a file. A folder of that name stays, as no run wrote it, and the answer is False."""
    if _is_folder(path):
        return False
    path.unlink(missing_ok=True)
    return True


def _clear(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Remove the files with these names or patterns, and the folder if it is then empty. Returns the names of what stays."""
    stays = [
        name
        for name in _names_in(folder)
        if not (any(fnmatchcase(name, known) for known in files) or is_temporary(name, files))
        or not _remove_file(folder / name)
    ]
    if not stays and _is_folder(folder):
        with contextlib.suppress(OSError):  # a file may have been added meanwhile
            folder.rmdir()
    return stays


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs of a run folder's metrics.jsonl, oldest first."""
    lines = read_regular(path, MOST_BYTES).decode("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]

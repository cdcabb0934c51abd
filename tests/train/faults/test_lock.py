"""The lock of a run folder: one run writes, the lock dies with its process, and no file by itself is trusted."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Arm, held, one_line
from zygote import Zygote

from train.disk.folder import RunFolder, RunFolderError


def test_the_second_run_into_one_folder_is_refused_and_a_dead_owner_replaced(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    first = runs.start(*words, before=held("build"))
    first.until("now")
    for option in ([], ["--overwrite"]):
        code, _, err = runs.run(*words, *option)
        assert code == 2 and f"process {first.pid}" in one_line(err)
    first.kill(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / ".lock.pid").read_text() == str(first.pid)
    code, _, err = runs.run(*words)
    assert code == 0, err
    # nobody holds it now
    assert (tmp_path / "run" / ".lock").read_bytes() == b"" and not (tmp_path / "run" / ".lock.pid").exists()


def test_an_owner_that_has_not_written_its_process_id_yet_is_unknown(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    for content in (None, b"", b"\0" * 8, b"\xff"):
        (tmp_path / "run" / ".lock.pid").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "run" / ".lock.pid").write_bytes(content)
        with pytest.raises(RunFolderError, match=r"another run \(process unknown\) is writing here"):
            RunFolder(tmp_path / "run")
    first.close()


@pytest.mark.parametrize("content", [b"", b"4711", b"\0\0\0\0"])
def test_the_lock_file_of_a_dead_run_is_no_obstacle_and_keeps_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    (tmp_path / ".lock.pid").write_text("4711")
    (tmp_path / "notes.txt").touch()
    folder = RunFolder(tmp_path)
    assert (tmp_path / ".lock.pid").read_text() == str(os.getpid())
    assert (tmp_path / ".lock").read_bytes() == content
    assert folder.start_over() == ["notes.txt"]
    folder.close()


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a device"])
def test_only_a_regular_file_is_a_lock(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    if kind == "a folder":
        lock.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(lock)
    else:  # a device cannot be made by everybody: what is looked at is the null device in its place
        device, look = Path(os.devnull).stat(), Path.lstat
        monkeypatch.setattr(Path, "lstat", lambda self: device if self.name == ".lock" else look(self))
    with pytest.raises(RunFolderError, match=rf"run/\.lock: is {kind}, not a regular file; remove it") as refused:
        RunFolder(tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert [path.name for path in lock.parent.iterdir()] == ([] if kind == "a device" else [".lock"])


def test_a_run_that_ended_between_the_look_and_the_lock_is_not_overwritten(tmp_path: Path, arm: Arm) -> None:
    last = tmp_path / "run" / "last.pt"
    arm("lock", lambda count: last.write_bytes(b"another run's"))
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder(tmp_path / "run")
    assert last.read_bytes() == b"another run's"


def test_a_lock_file_that_its_owner_removes_meanwhile_is_not_trusted(tmp_path: Path, arm: Arm) -> None:
    lock, passes = tmp_path / "run" / ".lock", []

    def remove(count: int) -> None:
        passes.append(count)
        if count == 1:
            lock.unlink()

    arm("lock", remove)
    folder = RunFolder(tmp_path / "run")
    assert passes == [1, 2] and lock.read_bytes() == b""
    assert lock.with_name(".lock.pid").read_text() == str(os.getpid())
    with pytest.raises(RunFolderError, match="is writing here"):  # the file that is there now is the one that is locked
        RunFolder(tmp_path / "run")
    folder.close()


def flock_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_obstacle_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    flock_fails(monkeypatch, number)
    folder = RunFolder(tmp_path / "run")
    assert folder.unlocked is not None and os.strerror(number) in folder.unlocked and "\n" not in folder.unlocked
    folder.close()
    assert not (tmp_path / "run").exists()


def test_a_lock_that_fails_for_another_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock_fails(monkeypatch, errno.EIO)
    with pytest.raises(RunFolderError, match=f"run: cannot be written: {os.strerror(errno.EIO)}"):
        RunFolder(tmp_path / "run")


def test_a_run_says_once_that_its_folder_is_not_locked_and_records_it(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    no_locks = (
        "import errno, fcntl\ndef refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.flock = refuse"
    )
    code, out, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", before=no_locks)
    assert code == 0, err
    line = f"{tmp_path / 'run'}: nothing can be locked on this file system (No locks available)"
    assert (out + err).count(line) == 1
    notes = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert sum(note.startswith(line) for note in notes) == 1

"""The lock of a run folder: one run writes, the lock dies with its process, and no file by itself is trusted."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Arm, held, one_line
from zygote import Zygote

import train.disk.folder
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
    assert (tmp_path / "run" / ".lock").read_text() == str(first.pid)
    code, _, err = runs.run(*words)
    assert code == 0, err


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
    assert passes == [1, 2] and lock.read_text() == str(os.getpid())
    folder.close()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.disk.folder.fcntl, "flock", refuse)
    RunFolder(tmp_path / "run").close()


@pytest.mark.parametrize("left", [b"", b"123", b"123\n", b"\0" * 5])
def test_what_a_dead_run_can_leave_in_its_lock_is_no_obstacle(tmp_path: Path, left: bytes) -> None:
    (tmp_path / ".lock").write_bytes(left)
    folder = RunFolder(tmp_path)
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    folder.close()

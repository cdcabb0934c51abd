"""Disks that are full, limited, read-only or gone: the old checkpoint stays, and one line says what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_runs import one_line, temporary
from zygote import Zygote

from train.disk.atomic import WriteError, write_atomic
from train.disk.checkpoint import load_checkpoint, save_checkpoint


def mounted(folder: Path, *options: str) -> None:
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root on Linux")
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    mounted(folder, "-o", "size=640k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so_in_one_line(
    runs: Zygote, recipe: Path, small_disk: Path
) -> None:
    fill = f"""
from train.failpoints import arm

def fill(count):
    if count == 5:
        with open({str(small_disk / "filler")!r}, "wb", buffering=0) as file:
            try:
                while True: file.write(bytes(4096))
            except OSError: pass

arm("saved", fill)
"""
    words = ["--config", recipe, f"run.dir={small_disk / 'run'}"]
    code, _, err = runs.run(*words, before=fill)
    assert code == 1
    line = one_line(err)
    assert "No space left on device" in line and "last.pt" in line and "--resume" in line
    assert load_checkpoint(small_disk / "run" / "last.pt")["step"] == 4
    assert temporary(small_disk / "run") == []
    (small_disk / "filler").unlink()
    assert runs.run(*words, "--resume")[0] == 0


def test_a_disk_too_small_for_a_checkpoint_is_noticed_before_the_first_step(
    runs: Zygote, recipe: Path, small_disk: Path
) -> None:
    code, out, err = runs.run("--config", recipe, "net.width=16", f"run.dir={small_disk / 'run'}")
    assert code == 1 and "No space left on device" in one_line(err)
    assert "epoch 1" not in out


def test_a_quota_leaves_the_old_checkpoint(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a quota: no file may grow beyond the size of the first checkpoint."""
    limit = """
import resource
from train.failpoints import arm
arm("saved", lambda count: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)) if count == 3 else None)
"""
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    code, _, err = runs.run(*words, before=limit)
    assert code == 1
    assert "File too large" in one_line(err)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    assert runs.run(*words, "--resume")[0] == 0


def test_a_folder_that_cannot_be_written_is_refused_before_training(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file" / "run", tmp_path / "file", Path("/proc/run")]
    for folder in folders:
        code, out, err = runs.run("--config", recipe, f"run.dir={folder}")
        assert code == 2, out
        assert f"{folder}: cannot be written" in one_line(err)
        assert "data:" not in out


def test_a_read_only_run_folder_is_refused_for_resuming_too(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    mounted(folder)
    try:
        words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={folder / 'run'}"]
        assert runs.run(*words)[0] == 0
        before = (folder / "run" / "last.pt").read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for option in ("--resume", "--overwrite"):
            code, _, err = runs.run(*words, option)
            assert code == 2 and "Read-only file system" in one_line(err)
        assert (folder / "run" / "last.pt").read_bytes() == before
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_without_hard_links_keeps_the_previous_checkpoint_as_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        save_checkpoint(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "previous.pt")["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_previous_checkpoint_that_cannot_be_kept_leaves_both_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in range(2):
        save_checkpoint(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=tmp_path / "previous.pt")
    original = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target.name == "previous.pt":
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(WriteError, match="Input/output error"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 2}, keep_previous=tmp_path / "previous.pt")
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in ("last.pt", "previous.pt")] == [1, 0]
    assert temporary(tmp_path) == []


def test_a_write_into_a_folder_that_is_gone_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / "gone" / "last.pt", b"x")
    assert caught.value.filename == str(tmp_path / "gone" / "last.pt")


def test_overwrite_removes_nothing_when_the_new_run_cannot_begin(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    assert runs.run(*words, "train.epochs=1", "schedule.peak_epoch=0.5")[0] == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    missing = ["data.name=cifar10", "data.download=false", f"data.root={tmp_path / 'none'}"]
    assert runs.run(*words, *missing, "--overwrite")[0] == 2
    assert (tmp_path / "run" / "last.pt").read_bytes() == before

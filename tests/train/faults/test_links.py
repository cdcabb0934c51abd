"""Symbolic links in a run folder: nothing is written through one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from whole_runs import contents, one_line
from zygote import Zygote

from train.disk.folder import FOLDERS, WRITTEN, RunFolder, RunFolderError


def test_no_file_of_a_run_is_written_through_a_link(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", recipe, "--find-lr", "schedule.find_steps=40", f"run.dir={run}", "--overwrite"]
    assert runs.run(*words)[0] == 0  # a folder that can be overwritten, and resumed
    again = [word for word in words if word != "--find-lr"]
    again += ["schedule.lr_max=find", "schedule.lr_min=find", "train.epochs=1", "schedule.peak_epoch=0.5"]
    for command in (words, again, [*(word for word in again if word != "--overwrite"), "--resume"]):
        links = [name for name in WRITTEN if "--overwrite" in command or not name.endswith(".pt")]
        for name in links:
            if name not in ("lr_finder.csv", "environment.json"):  # which show that a run lies here
                (tmp_path / f"target of {name}").write_text("mine")
                (run / name).unlink(missing_ok=True)
                (run / name).symlink_to(tmp_path / f"target of {name}")
        probe = tmp_path / "target of the file that is written to see whether one can be"
        probe.write_text("mine")
        link = f"import os; os.symlink({str(probe)!r}, f{str(run / '.writable.{os.getpid()}.tmp')!r})"
        code, _, err = runs.run(*command, before=link)
        assert code == 0, err
        assert {path.read_text() for path in tmp_path.glob("target of *")} == {"mine"}
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        assert not (run / name).is_symlink() and (run / name).stat().st_size > 10


@pytest.mark.parametrize("nofollow", [True, False])
@pytest.mark.parametrize("target", ["a file", "nothing"])
def test_a_link_as_the_lock_is_refused_by_name_and_its_target_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, nofollow: bool
) -> None:
    if not nofollow:
        monkeypatch.delattr(os, "O_NOFOLLOW")
    mine = tmp_path / "mine"
    if target == "a file":
        mine.write_text("123")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    with pytest.raises(RunFolderError, match=r"run/\.lock: is a symbolic link.*choose another run\.dir="):
        RunFolder(tmp_path / "run")
    assert contents(tmp_path) == ({"mine": b"123", "run/.lock": b"123"} if target == "a file" else {})
    assert (tmp_path / "run" / ".lock").is_symlink()


def test_a_link_that_takes_the_place_of_the_lock_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("123")
    original, looks = Path.lstat, 0

    def late(self: Path) -> os.stat_result:
        nonlocal looks
        looks += self.name == ".lock"
        if self.name == ".lock" and looks == 1:
            self.symlink_to(tmp_path / "mine")
            raise FileNotFoundError
        return original(self)

    monkeypatch.setattr(Path, "lstat", late)
    with pytest.raises(RunFolderError, match="is a symbolic link"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "123"


def test_a_lock_that_no_run_wrote_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("another program's\n")
    with pytest.raises(RunFolderError, match=r"\.lock: no run wrote this file"):
        RunFolder(tmp_path)
    assert contents(tmp_path) == {".lock": b"another program's\n"}


@pytest.mark.parametrize("name", [*FOLDERS, ".lock"])
def test_a_link_to_a_folder_elsewhere_is_refused_before_anything_is_written(
    runs: Zygote, recipe: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.html").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    for option in ([], ["--overwrite"], ["--find-lr"]):
        code, out, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", *option)
        assert code == 2 and f"run/{name}: is a symbolic link" in one_line(err) and "data:" not in out
    assert contents(tmp_path / "elsewhere") == {"report.html": b"mine"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_run_folder_that_is_itself_a_link_is_used(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "run")
    folder.write_text("config.yaml", "x")
    folder.close()
    assert (tmp_path / "disk" / "config.yaml").read_text() == "x" and (tmp_path / "run").is_symlink()

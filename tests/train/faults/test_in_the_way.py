"""What lies where a run writes its files and folders and is neither: it is named before anything is done, and stays."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import CONFIGS

from train.__main__ import main
from train.config import Config, changed
from train.disk.checkpoint import save_checkpoint
from train.disk.folder import FOLDERS, WRITTEN, RunFolder, RunFolderError
from train.run import fit
from train.screen.log import Log

HOW: list[dict[str, bool]] = [{}, {"overwrite": True}, {"range_test": True}, {"resume": True}]


def lay(kind: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(os.devnull)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a symbolic link to a device"])
@pytest.mark.parametrize("name", [*WRITTEN, ".lock.pid"])
def test_what_is_no_file_in_the_place_of_one_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "run" / name
    lay(kind, path)
    for how in HOW:
        if how == {"resume": True} and name != "last.pt":
            save_checkpoint(tmp_path / "run" / "last.pt", {})
        with pytest.raises(RunFolderError, match=rf"run/{name}: is {kind}, not a regular file.*another run\.dir="):
            RunFolder(tmp_path / "run", **how)
    assert {"a folder": path.is_dir(), "a named pipe": path.is_fifo()}.get(kind, path.is_char_device())


@pytest.mark.parametrize("kind", ["a file", "a named pipe"])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_folder_in_the_place_of_one_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "run" / name
    if kind == "a file":
        path.parent.mkdir()
        path.write_text("mine")
    else:
        lay(kind, path)
    for how in HOW[:3]:
        with pytest.raises(RunFolderError, match=rf"run/{name}: is no folder.*another run\.dir="):
            RunFolder(tmp_path / "run", **how)


def test_a_folder_with_a_temporary_files_name_is_passed_over(tmp_path: Path) -> None:
    for name in (".last.pt.17.tmp", ".writable.17.tmp"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / ".best.pt.17.tmp")
    (tmp_path / ".config.yaml.17.tmp").touch()
    folder = RunFolder(tmp_path)
    folder.close()
    assert sorted(p.name for p in tmp_path.glob(".*.tmp")) == [".best.pt.17.tmp", ".last.pt.17.tmp", ".writable.17.tmp"]


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "file/run", "\udcff/../\ud800"])
def test_a_run_folder_that_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["--config", str(CONFIGS / "quickstart.yaml"), f"run.dir={name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_tensorboard_folder_that_cannot_be_written_is_named(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: str, purge_step: int) -> None:
        raise PermissionError(13, "Permission denied", f"{folder}/events.out.tfevents.1")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=refuse))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config = changed(quick_config, {"run.tensorboard": True, "data.backend": "torch"})
    with pytest.raises(
        RunFolderError, match=r"run/tensorboard: cannot be written: Permission denied; .*run\.tensorboard"
    ):
        fit(config, tmp_path / "run", log=Log(quiet=True))

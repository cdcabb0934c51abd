"""What --overwrite removes: what a run wrote, by name, where a run lies; and nothing else."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from places import ROOT
from whole_runs import contents, one_line
from zygote import Zygote

import train.export
from analysis.report import PICTURES
from train.disk.atomic import write_csv
from train.disk.checkpoint import save_checkpoint
from train.disk.folder import FOLDERS, WRITTEN, RunFolder, RunFolderError
from train.step.range_test import RangeTest


@pytest.mark.parametrize("option", ["--overwrite", "--find-lr --overwrite"])
def test_overwrite_in_a_source_checkout_is_refused_and_removes_nothing(
    runs: Zygote, recipe: Path, tmp_path: Path, option: str
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("analysis", "train", "docs"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "notes.txt").write_text("mine")
    before = contents(checkout)
    code, out, err = runs.run("--config", recipe, f"run.dir={checkout}", *option.split())
    assert code == 2, out
    line = one_line(err)
    assert "analysis/" in line and "choose another run.dir=" in line and "data:" not in out
    assert contents(checkout) == before


@pytest.mark.parametrize("name", [*WRITTEN, *(f"{folder}/mine.txt" for folder in FOLDERS)])
def test_a_file_that_has_only_its_name_from_a_run_is_refused_by_overwrite_and_stays(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("{}\n")
    with pytest.raises(RunFolderError, match=rf"{name.partition('mine')[0]}.*choose another run\.dir="):
        RunFolder(run, overwrite=True, range_test=True)
    assert contents(run) == {name: b"{}\n"}


def whole_run(folder: Path, proof: str) -> None:
    """Files of all names that a run, its analysis and its exports write, of which `proof` alone shows a run."""
    for name in WRITTEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("damaged")
    for place, files in FOLDERS.items():
        (folder / place).mkdir()
        for name in files:
            (folder / place / name.replace("*", "1700000000.host.17.0")).write_text("old")
    (folder / "analysis" / ".report.html.17.tmp").write_text("half")
    if proof == "environment.json":
        keys = ("versions", "device", "precision", "compile", "backend", "data_source")
        (folder / proof).write_text(json.dumps(dict.fromkeys(keys, "x")))
    elif proof == "lr_finder.csv":
        write_csv(folder / proof, RangeTest((0.1, 0.2), (2.0, 1.0), diverged=False).rows())
    else:
        save_checkpoint(folder / proof, {"epoch": 1})


@pytest.mark.parametrize("proof", ["last.pt", "previous.pt", "best.pt", "environment.json", "lr_finder.csv"])
def test_overwrite_removes_what_runs_write_and_names_what_stays(tmp_path: Path, proof: str) -> None:
    whole_run(tmp_path / "run", proof)
    mine = ["notes.txt", ".notes.tmp", "src/analysis/report.html", "analysis/report.py", "analysis/report.html.bak"]
    mine += ["analysis/samples.png.d/x", "tensorboard/events.txt", "export/other.onnx", "export/model.pt2/x"]
    (tmp_path / "run" / "export" / "model.pt2").unlink()
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    folder = RunFolder(tmp_path / "run", overwrite=True)
    stays = folder.start_over()
    folder.close()
    assert set(contents(tmp_path / "run")) - {".lock"} == set(mine)
    assert set(stays) == {
        *("notes.txt", ".notes.tmp", "src", "analysis/report.py", "analysis/report.html.bak"),
        *("analysis/samples.png.d", "tensorboard/events.txt", "export/other.onnx", "export/model.pt2"),
    }


def test_overwrite_of_a_run_with_nothing_else_in_it_leaves_an_empty_folder(tmp_path: Path) -> None:
    whole_run(tmp_path / "run", "last.pt")
    folder = RunFolder(tmp_path / "run", overwrite=True)
    assert folder.start_over() == []
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock.pid"}
    folder.close()
    assert not (tmp_path / "run").exists()


def test_a_kill_while_overwrite_removes_the_old_run_leaves_one_that_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    whole_run(tmp_path / "whole", "environment.json")
    count, original = len(contents(tmp_path / "whole")), Path.unlink
    for removed in range(count):
        run = tmp_path / f"run-{removed}"
        shutil.copytree(tmp_path / "whole", run)
        folder, left = RunFolder(run, overwrite=True), removed

        def unlink(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            original(self, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", unlink)
            folder.start_over()
        folder.close()
        folder = RunFolder(run, overwrite=True)
        assert folder.start_over() == []
        folder.close()


def test_the_names_that_overwrite_removes_are_those_that_analysis_and_export_write() -> None:
    written = set()  # every name of a file that the code of the analysis holds
    for path in (ROOT / "analysis").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.endswith((".png", ".csv", ".html")) and " " not in text:
                written.add(text)
    # compare.png is of several runs and lies in none, the tables of analysis.data are of a data set, which has a folder of its
    # own, and lr_finder.csv is the run's, which the analysis reads
    written -= {"compare.png", "broken.csv", "classes.csv", "duplicates.csv", "lr_finder.csv"}
    assert set(FOLDERS["analysis"]) == written >= set(PICTURES)
    assert {name for name in FOLDERS["export"] if not name.startswith(".")} == set(train.export.MAKERS)


def test_a_run_that_is_overwritten_says_what_it_left(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "--overwrite")
    assert code == 0 and "--overwrite" not in out, err
    (tmp_path / "run" / "analysis").mkdir()
    (tmp_path / "run" / "analysis" / "own.py").write_text("mine")
    (tmp_path / "run" / "analysis" / "report.html").write_text("old")
    for number in range(12):
        (tmp_path / "run" / f"note{number:02}.txt").write_text("mine")
    code, out, err = runs.run(*words, "--overwrite")
    assert code == 0, err
    said = [line for line in out.splitlines() if line.startswith("--overwrite: left in ")]
    assert len(said) == 1 and "note00.txt, note01.txt" in said[0] and said[0].endswith(" and 3 more")
    assert (tmp_path / "run" / "analysis" / "own.py").read_text() == "mine"
    assert not (tmp_path / "run" / "analysis" / "report.html").exists()
    assert len(list((tmp_path / "run").glob("note*.txt"))) == 12

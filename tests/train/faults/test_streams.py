"""Standard streams that are closed, full or without a character, and a terminal that goes away: the run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from zygote import Zygote

from train.disk.checkpoint import load_checkpoint
from train.screen.log import Log
from train.screen.progress import EpochDisplay, EvaluationDisplay
from train.step.meter import StepMeter


def command(recipe: Path, *words: str) -> str:
    return " ".join([sys.executable, "-m", "train", "--config", str(recipe), *words])


SHORT = ("train.epochs=1", "schedule.peak_epoch=0.5")
# as at the start of a process: the number is free, and Python has no stream there
NO_STDOUT = "import os, sys; os.close(1); sys.stdout = None"
NO_STDERR = "import os, sys; os.close(2); sys.stderr = None"
# a pipe whose reader has ended
UNREAD = """
import os, sys
read, write = os.pipe()
os.dup2(write, 1)
os.close(read)
sys.stdout = os.fdopen(1, "w", closefd=False)
"""


def assert_went_on(run: Path, code: int, err: str, analyse: bool = False) -> None:
    assert code == 0 and "Traceback" not in err, err
    assert load_checkpoint(run / "last.pt")["epoch"] == 1
    assert (run / ".lock").read_bytes() == b""  # nothing that was printed
    assert (run / "analysis" / "report.html").exists() == analyse


@pytest.mark.slow
def test_a_run_without_standard_streams_goes_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = f"{command(recipe, *SHORT, f'run.dir={run}')} >&- 2>&- <&-"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert_went_on(run, done.returncode, done.stderr)


@pytest.mark.parametrize("before", [NO_STDOUT, NO_STDERR, UNREAD], ids=[">&-", "2>&-", "| true"])
def test_a_run_goes_on_when_nobody_reads_it(runs: Zygote, recipe: Path, tmp_path: Path, before: str) -> None:
    analyse = before == UNREAD
    words = (*SHORT, f"run.dir={tmp_path / 'run'}", f"run.analyse={analyse}".lower())
    code, _, err = runs.run("--config", recipe, *words, before=before)
    assert_went_on(tmp_path / "run", code, err, analyse)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_run_prints_every_line_where_its_characters_cannot_be_encoded(
    runs: Zygote, recipe: Path, tmp_path: Path, encoding: str
) -> None:
    """The pictures' captions hold a middle dot, the folder's name what cp1252 lacks."""
    folder = tmp_path / "läuft 走"
    words = ["--config", recipe, *SHORT, "run.analyse=true", f"run.dir={folder}"]
    before = f"import sys; sys.stdout.reconfigure(encoding={encoding!r}, errors='strict')"
    job = runs.start(*words, before=before)
    assert job.wait() == 0, job.stderr
    lines = job.out.read_bytes().decode(encoding).splitlines()
    assert lines[-1].startswith("next ") and "\\u8d70" in lines[-1]
    assert any("best.pt" in line and ("·" if encoding == "cp1252" else "\\xb7") in line for line in lines)
    assert (folder / "analysis" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "end", "code", "said"),
    [
        ("--print-config", ">/dev/full", 1, "error: standard output: cannot be written: No space left on device"),
        ("--print-config", ">&-", 1, "error: standard output: cannot be written"),
        ("--print-config", "| head -n 1", 0, ""),
        ("--help", ">/dev/full", 1, "error: standard output: cannot be written: No space left on device"),
        ("train.epochs=none", "2>/dev/full", 2, ""),
        ("train.epochs=none", "2>&-", 2, ""),
        ("--nonsense", "2>/dev/full", 2, ""),
    ],
)
def test_a_stream_that_takes_nothing_changes_no_other_exit_code(
    recipe: Path, words: str, end: str, code: int, said: str
) -> None:
    script = f"{command(recipe, words)} {end}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == bool(said)


def test_a_terminal_that_goes_away_stops_the_bar_and_not_the_run() -> None:
    class Gone:
        n = 0

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def update(self, _: int = 1) -> None:
            raise OSError(5, "Input/output error")

    display = EpochDisplay(Log(quiet=True), "epoch", 3, 0, 10)
    display.bar = Gone()  # type: ignore[assignment]
    meter = StepMeter(0, 3, torch.device("cpu"))
    display.update(1, meter)
    display.update(2, meter)
    display.close()
    evaluation = EvaluationDisplay(Log(quiet=True), "test", 3)
    evaluation.bar = Gone()
    evaluation.advance()
    evaluation.advance()
    evaluation.close()

"""Standard streams that are closed, and a terminal that goes away: the run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from train.disk.checkpoint import load_checkpoint
from train.screen.log import Log
from train.screen.progress import EpochDisplay
from train.step.meter import StepMeter


def command(recipe: Path, *words: str) -> str:
    return " ".join([sys.executable, "-m", "train", "--config", str(recipe), *words])


@pytest.mark.slow
@pytest.mark.parametrize("end", ["| head -n 1", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_run_goes_on_when_nobody_reads_it(recipe: Path, tmp_path: Path, end: str) -> None:
    analyse = "head" in end
    words = [
        "train.epochs=1",
        "schedule.peak_epoch=0.5",
        f"run.dir={tmp_path / 'run'}",
        f"run.analyse={analyse}".lower(),
    ]
    line = command(recipe, *words)
    script = f"set -o pipefail; {line} {end}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert (tmp_path / "run" / ".lock").read_bytes() == b""  # nothing that was printed
    assert (tmp_path / "run" / "analysis" / "report.html").exists() == analyse


def test_a_terminal_that_goes_away_stops_the_bar_and_not_the_run() -> None:
    class Gone:
        n = 0

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def update(self, _: int) -> None:
            raise OSError(5, "Input/output error")

    display = EpochDisplay(Log(quiet=True), "epoch", 3, 0, 10)
    display.bar = Gone()  # type: ignore[assignment]
    meter = StepMeter(0, 3, torch.device("cpu"))
    display.update(1, meter)
    display.update(2, meter)
    display.close()

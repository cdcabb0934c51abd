"""What is missing on the machine: auto says so and goes on without, an explicit request is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from whole_runs import one_line
from zygote import Zygote

from train.disk.checkpoint import load_checkpoint

BROKEN_DALI = {
    "missing": ("import sys\nsys.modules['nvidia.dali'] = None", "nvidia"),
    "import broken": (
        "import dali_pipeline.backend as b\n"
        "def broken(): raise ImportError('libcufft.so.11: cannot open shared object file')\n"
        "b.import_dali = broken",
        "libcufft.so.11",
    ),
    "no driver": (
        "import dali_pipeline.backend as b\n"
        "def probe(device): raise RuntimeError('Unable to load libcuda.so')\n"
        "b.probe = probe",
        "libcuda.so",
    ),
}


@pytest.mark.parametrize("how", BROKEN_DALI)
def test_without_dali_auto_says_so_and_trains_and_an_explicit_request_fails(
    runs: Zygote, recipe: Path, tmp_path: Path, how: str
) -> None:
    before, word = BROKEN_DALI[how]
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "data.backend=auto", before=before)
    assert code == 0, err
    warning = next(line for line in out.splitlines() if "pipeline: torch" in line)
    assert warning.startswith("WARNING") and word in warning
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["backend"] == "torch" and word in environment["backend_reason"]
    code, _, err = runs.run(*words, "data.backend=dali", "--overwrite", before=before)
    assert code == 2 and "data.backend=dali cannot run" in one_line(err)


def test_without_a_compiler_auto_says_so_and_trains_and_an_explicit_request_fails(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    env = {"PATH": str(tmp_path), "CXX": ""}
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "train.compile=auto", env=env)
    assert code == 0, err
    assert "WARNING: compile: off (no C++ compiler on the PATH" in out
    code, _, err = runs.run(*words, "train.compile=default", "--overwrite", env=env)
    assert code == 2 and "no C++ compiler" in one_line(err)


def test_a_compiler_that_fails_is_gone_without_loudly_under_auto_and_an_error_when_asked_for(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    fail = """
import torch, train.machine.runtime as r, torch._dynamo.exc as e, train.machine.weighing as w
w.COLD_SECONDS = 0.0  # it pays, for so few steps too
r.find_compiler = lambda device: (True, "g++ found")
def compile(self, **_):
    def fail(*_): raise e.BackendCompilerFailed(lambda: None, RuntimeError("g++ crashed"), None)
    self.register_forward_pre_hook(fail)
torch.nn.Module.compile = compile
"""
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    code, out, err = runs.run(*words, "train.compile=auto", before=fail, env=env)
    assert code == 0, err
    assert "WARNING: compile: off (torch.compile failed" in out
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["compile"] == "off" and any("torch.compile failed" in note for note in environment["notes"])
    assert load_checkpoint(tmp_path / "run" / "last.pt")["machine"]["compile"] == "off"
    code, _, err = runs.run(*words, "train.compile=default", "--overwrite", before=fail)
    assert code == 2 and "train.compile=default: torch.compile failed" in one_line(err) and "g++ crashed" in err


def test_without_anything_to_draw_with_a_run_says_so_and_ends_well(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = [
        "net.width=4",
        "schedule.find_steps=40",
        "schedule.lr_max=find",
        "train.epochs=1",
        "schedule.peak_epoch=0.5",
    ]
    broken = "import sys\nsys.modules['matplotlib'] = None"
    code, out, err = runs.run(
        "--config", recipe, *words, "run.analyse=true", f"run.dir={tmp_path / 'run'}", before=broken
    )
    assert code == 0, err
    assert "WARNING: " in out and "lr_finder.png is not drawn: " in out and "its analysis is not: " in out
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "lr_finder.png").exists()

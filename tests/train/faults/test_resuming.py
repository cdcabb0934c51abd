"""Resuming under another recipe, other data or another machine, from the very start, and with a gradient scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import Arm, Stop, Trained, equal, one_line, stop_before
from zygote import Zygote

from train.config import Config, changed
from train.disk.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from train.failpoints import disarm
from train.run import fit
from train.screen.log import Log


def test_resuming_on_other_data_is_refused(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    assert runs.run(*words, "train.epochs=1", "schedule.peak_epoch=0.5")[0] == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["mean"] = [1.0, 2.0, 3.0]
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    code, _, err = runs.run(*words, "train.epochs=1", "schedule.peak_epoch=0.5", "--resume")
    assert code == 2 and "not what the run was trained on" in one_line(err)


def test_resuming_under_other_conditions_is_said(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}", "train.epochs=1", "schedule.peak_epoch=0.5"]
    assert runs.run(*words)[0] == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["machine"]["processes"] = 4
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    code, out, _ = runs.run(*words, "--resume", before="import torch; torch.set_num_threads(2)")
    assert code == 0 and "WARNING: resumed under other conditions" in out
    assert "processes 4 -> 1" in out and "threads 1 -> 2" in out


@pytest.mark.parametrize("words", [["--fallback"], ["--extend"], ["--find-lr", "--resume"]])
def test_options_without_the_one_they_go_with_are_refused(runs: Zygote, recipe: Path, words: list[str]) -> None:
    code, _, err = runs.run("--config", recipe, *words)
    assert code == 2 and words[0] in one_line(err)


def test_the_first_checkpoint_is_there_before_the_first_step(
    quick_config: Config, trained: Trained, tmp_path: Path, arm: Arm
) -> None:
    arm("step", stop_before(1))
    with pytest.raises(Stop):
        fit(quick_config, tmp_path / "parts", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 0
    disarm()
    fit(quick_config, tmp_path / "parts", log=Log(quiet=True), resume=True)
    assert equal(load_checkpoint(tmp_path / "parts" / "last.pt"), load_checkpoint(trained(quick_config) / "last.pt"))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "parts" / "none.pt")


@pytest.mark.parametrize("steps", [3, 11, 22])
def test_resume_with_a_scaler_is_exact(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Arm, steps: int
) -> None:
    scaler = torch.amp.GradScaler

    def enabled(*_: Any, **__: Any) -> torch.amp.GradScaler:
        return scaler("cpu", init_scale=2.0**10, growth_interval=4)

    monkeypatch.setattr(torch.amp, "GradScaler", enabled)
    config = changed(quick_config, {"run.checkpoint_every": 1, "train.ema_decay": 0.9})
    fit(config, tmp_path / "whole", log=Log(quiet=True))
    arm("step", stop_before(steps + 1))
    try:
        fit(config, tmp_path / "parts", log=Log(quiet=True))
    except Stop:
        assert steps < 22
    disarm()
    fit(config, tmp_path / "parts", log=Log(quiet=True), resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert a["scaler"]["scale"] > 2.0**10
    assert equal(a, b)


def test_an_average_of_weights_goes_through_extending_and_resuming_to_the_same_bits(
    quick_config: Config, tmp_path: Path, arm: Arm
) -> None:
    average = {"train.ema_decay": 0.9, "train.ema_every": 3, "run.checkpoint_every": 1}
    short = changed(quick_config, {**average, "train.epochs": 1, "schedule.peak_epoch": 0.5})
    longer = changed(short, {"train.epochs": 3})
    for name in ("whole", "parts"):
        fit(short, tmp_path / name, log=Log(quiet=True))
    fit(longer, tmp_path / "whole", log=Log(quiet=True), resume=True, extend=True)
    arm("step", stop_before(14 + 1))  # in the second of the two epochs, between two updates of the average
    with pytest.raises(Stop):
        fit(longer, tmp_path / "parts", log=Log(quiet=True), resume=True, extend=True)
    disarm()
    fit(longer, tmp_path / "parts", log=Log(quiet=True), resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert a["epoch"] == 3 and a["ema"] is not None and not equal(a["ema"], a["model"])
    assert equal(a, b)

"""Saves in the background, as on a GPU: the same files, and a failure is not lost."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from training import Lines
from whole_runs import Arm, Trained, equal

import train.loop
from train.config import Config, changed
from train.disk.atomic import WriteError
from train.disk.checkpoint import load_checkpoint
from train.disk.folder import read_metrics
from train.failpoints import disarm
from train.machine.signals import Interrupted
from train.run import fit
from train.screen.log import Log
from train.step.meter import NonFiniteLoss
from train.step.trainer import Trainer


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch, arm: Arm) -> None:
    """As on a GPU, and slow: the training goes on meanwhile."""
    monkeypatch.setattr(train.loop, "saves_in_background", lambda device: True)
    arm("save", lambda count: time.sleep(0.1))


def test_saving_in_the_background_leaves_the_same_files(
    quick_config: Config, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = changed(quick_config, {"run.checkpoint_every": 3, "train.ema_decay": 0.9})
    fit(config, tmp_path / "front", log=Log(quiet=True))
    request.getfixturevalue("in_background")
    fit(config, tmp_path / "back", log=Log(quiet=True))
    for name in ("last.pt", "previous.pt", "best.pt"):
        assert equal(load_checkpoint(tmp_path / "front" / name), load_checkpoint(tmp_path / "back" / name))
    assert len(read_metrics(tmp_path / "back" / "metrics.jsonl")) == config.train.epochs


@pytest.mark.usefixtures("in_background")
def test_a_run_interrupted_during_a_save_in_the_background_is_resumed_exactly(
    quick_config: Config, trained: Trained, tmp_path: Path, arm: Arm
) -> None:
    config = changed(quick_config, {"run.checkpoint_every": 1})
    arm("step", lambda count: signal.raise_signal(signal.SIGINT) if count == 4 else None)
    with pytest.raises(Interrupted):
        fit(config, tmp_path / "parts", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 4
    disarm()
    fit(config, tmp_path / "parts", log=Log(quiet=True), resume=True)
    whole, parts = (load_checkpoint(run / "last.pt") for run in (trained(quick_config), tmp_path / "parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])


@pytest.mark.usefixtures("in_background")
def test_a_save_in_the_background_that_fails_ends_the_run_with_its_error(
    quick_config: Config, tmp_path: Path, arm: Arm
) -> None:
    def full(count: int) -> None:
        # environment.json, config.yaml, then last.pt and metrics.jsonl of each save: in last.pt of the third
        if count == 2 + 2 * 2 + 1:
            raise OSError(28, "No space left on device")

    arm("write", full)
    with pytest.raises(WriteError, match="No space left") as caught:
        fit(changed(quick_config, {"run.checkpoint_every": 2}), tmp_path / "run", log=Log(quiet=True))
    assert caught.value.filename == str(tmp_path / "run" / "last.pt")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.usefixtures("in_background")
@pytest.mark.parametrize(("ends_by", "failing_save"), [("signal", 3), ("loss", 2)])
def test_a_failed_save_in_the_background_is_not_hidden_by_how_the_run_ends(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Arm, ends_by: str, failing_save: int
) -> None:
    """The saves are before the first step, after the third, and that after the fourth which the signal asks for. The last
    fails, or the one that is under way when the loss becomes no number."""
    train_one, steps = Trainer.train_one, 0

    def refuse(count: int) -> None:
        if count == failing_save:
            raise WriteError(28, "No space left on device", "last.pt")
        time.sleep(0.1)

    def ended(self: Trainer, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4 and ends_by == "signal":
            signal.raise_signal(signal.SIGINT)
        elif steps == 4:
            self.net.classifier.bias.data.fill_(math.nan)
        return train_one(self, *arguments)

    arm("save", refuse)
    monkeypatch.setattr(Trainer, "train_one", ended)
    log = Lines()
    with pytest.raises(WriteError if ends_by == "signal" else NonFiniteLoss):
        fit(changed(quick_config, {"run.checkpoint_every": 3}), tmp_path / "run", log=log)
    assert ends_by == "signal" or "WARNING: the last save failed, the one before it is kept" in log.text

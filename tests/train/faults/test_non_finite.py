"""Losses and weights that are no numbers end a run with what it was that gave them; none is ever saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import one_line
from zygote import Zygote

from train.config import Config, changed
from train.disk.checkpoint import load_checkpoint
from train.run import fit
from train.screen.log import Log
from train.step.evaluation import Score
from train.step.measures import Measure
from train.step.meter import NonFiniteLoss
from train.step.trainer import Trainer


def test_a_rate_of_1e20_is_exit_code_3_with_step_and_images_and_the_checkpoint_stays_finite(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    for every in (1, "epoch"):
        run = tmp_path / f"run-{every}"
        words = ["--config", recipe, "schedule.lr_max=1e20", "schedule.lr_min=1e20", f"run.checkpoint_every={every}"]
        code, _, err = runs.run(*words, f"run.dir={run}")
        assert code == 3
        line = one_line(err)
        assert "epoch 1, step" in line and "schedule.lr_max" in line
        assert "training images" in line or "not finite" in line
        state = load_checkpoint(run / "last.pt")
        assert all(torch.isfinite(value).all() for value in state["model"].values())
        assert all(math.isfinite(loss) for loss in state["step_losses"])


def test_weights_that_are_not_finite_are_never_saved(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is that before its update: a bad update shows only in the weights."""
    original, steps = Trainer.train_one, 0

    def poisoned(self: Trainer, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        result = original(self, *arguments)
        if steps == 3:
            self.net.classifier.bias.data[1] = math.inf
        return result

    monkeypatch.setattr(Trainer, "train_one", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"not finite after epoch 1, step 3"):
        fit(changed(quick_config, {"run.checkpoint_every": 1}), tmp_path / "run", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_a_test_loss_that_is_no_number_is_not_saved(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: {Measure(): Score(math.nan, 0, 355)})
    with pytest.raises(NonFiniteLoss, match="test loss nan after epoch 1"):
        fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 0


@pytest.mark.parametrize("bad", [Measure(weights="ema"), Measure(views="tta"), Measure(weights="ema", views="shift")])
def test_no_measure_that_is_no_number_is_saved(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Measure
) -> None:
    original = Trainer.evaluate

    def spoiled(self: Trainer, *arguments: Any) -> Any:
        found = original(self, *arguments)
        return found | ({bad: Score(math.inf, 0, 355)} if bad in found else {})

    monkeypatch.setattr(Trainer, "evaluate", spoiled)
    config = changed(quick_config, {"train.ema_decay": 0.9, "train.tta": "shift"})
    with pytest.raises(NonFiniteLoss, match=f"^{bad.label} loss inf after epoch"):
        fit(config, tmp_path / "run", log=Log(quiet=True))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["epoch"] == (0 if bad.views == "plain" else config.train.epochs - 1)


def test_views_that_are_no_number_are_not_added_to_a_finished_run(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: {Measure(views="tta"): Score(math.nan, 0, 355)})
    with pytest.raises(NonFiniteLoss, match="flip TTA loss nan"):
        fit(changed(quick_config, {"train.tta": True}), tmp_path / "run", log=Log(quiet=True), resume=True)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before

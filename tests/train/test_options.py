"""Options of a recipe, one by one and together: what a training with them resumes from, starts over from and gives back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from training import assert_same, make_trainer

from train.config import Config, changed
from train.step.borrow import borrowed_state
from train.step.meter import StepMeter
from train.step.schedule import Rates, make_schedule
from train.step.trainer import Trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "alternating flip": {"augment.flip": True, "augment.flip_rule": "alternating"},
    "decoupled": {"optim.decoupled_weight_decay": True},
    "lookahead": {"optim.lookahead_every": 3},
    "norm bias rate": {"optim.norm_bias_rate": 8.0},
    "muon": {"optim.filters": "muon"},
    "whitening": {"net.whitening": True},
    "dirac": {"net.residual_init": "dirac"},
    "activation": {"net.activation": "gelu"},
    "views": {"train.tta": "shift", "train.ema_decay": 0.9},
    "trapezoid": {"schedule.shape": "trapezoid", "schedule.hold_epochs": 0.5},
    "norms": {"net.norm_scale": "frozen", "net.norm_momentum": 0.3, "net.norm_eps": 1e-3},
}
EVERYTHING = {key: value for options in OPTIONS.values() for key, value in options.items()}
SETS = {**OPTIONS, "everything": EVERYTHING}


def make(config: Config, options: dict[str, Any], seed: int = 0) -> Trainer:
    return make_trainer(changed(config, {"train.seed": seed, "data.backend": "torch", **options}))


def steps(trainer: Trainer, epoch: int, first: int, last: int) -> list[float]:
    """Train steps `first` up to `last` of an epoch; the losses."""
    meter = StepMeter(epoch, trainer.steps_per_epoch, trainer.runtime.device)
    config = trainer.config
    rates = Rates(0.1, 0.01)
    schedule = make_schedule(config.schedule, rates, config.train.epochs, trainer.steps_per_epoch)

    class Enough(Exception):
        pass

    def after_step(done: int) -> None:
        if done == last:
            raise Enough

    with pytest.raises(Enough):
        trainer.train_epoch(epoch, schedule, meter, first, after_step)
    return meter.losses[first:last].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
def test_a_training_goes_on_from_its_state_to_the_same_bits(quick_config: Config, options: dict[str, Any]) -> None:
    straight = make(quick_config, options)
    steps(straight, 1, 0, 4)
    begun = copy.deepcopy(straight.state())
    expected = steps(straight, 1, 4, 9)
    scores = straight.evaluate()
    resumed = make(quick_config, options, seed=0)
    resumed.load_state(copy.deepcopy(begun))
    resumed.net.steps = straight.net.steps - 5
    assert_same(resumed.state(), begun)
    assert steps(resumed, 1, 4, 9) == expected
    assert_same(resumed.state(), straight.state())
    assert resumed.evaluate() == scores
    resumed.close()
    straight.close()


@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
def test_a_training_starts_over_and_lends_its_state(quick_config: Config, options: dict[str, Any]) -> None:
    fresh = make(quick_config, options, seed=5)
    begun = copy.deepcopy(fresh.state())
    losses = steps(fresh, 0, 0, 5)
    fresh.close()
    trainer = make(quick_config, options)
    steps(trainer, 0, 0, 3)
    with borrowed_state(trainer.net, trainer.optimizers, trainer.scaler):
        before = copy.deepcopy(trainer.state())
        batch = next(trainer.train_loader.epoch(0))
        for _ in range(3):
            trainer.train_one(*batch, 0.1)
    assert_same(trainer.state(), before)
    trainer.start_over(5)
    assert_same(trainer.state(), begun)
    assert steps(trainer, 0, 0, 5) == losses
    trainer.close()

"""A trainer that starts over stands where a new one would; how many steps its state says it has had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from training import assert_same, make_trainer

from train.config import Config, changed
from train.machine.runtime import seed_everything
from train.step.meter import StepMeter
from train.step.schedule import OneCycle
from train.step.trainer import Trainer


def first_epoch(trainer: Trainer) -> list[float]:
    """Its losses."""
    meter = StepMeter(0, trainer.steps_per_epoch, trainer.runtime.device)
    trainer.train_epoch(0, OneCycle(0.1, 0.01, 5, trainer.total_steps), meter)
    meter.finish(trainer.steps_per_epoch)
    return meter.losses.tolist()  # type: ignore[no-any-return]


def state_of(trainer: Trainer) -> dict[str, Any]:
    return {**copy.deepcopy(trainer.state()), "random": torch.get_rng_state()}


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    averaged = {} if trainer.ema is None else {f"ema.{k}": v for k, v in trainer.ema.state_dict(keep_vars=True).items()}
    return {**trainer.net.state_dict(keep_vars=True), **averaged}


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_starting_over_gives_the_bits_of_a_new_trainer(quick_config: Config, backend: str, ema_decay: float) -> None:
    config = changed(
        quick_config,
        {"data.backend": backend, "train.ema_decay": ema_decay, "train.tail": "endless", "augment.flip": True},
    )
    fresh = make_trainer(changed(config, {"train.seed": 5}))
    begun = state_of(fresh)
    losses, scores = first_epoch(fresh), fresh.evaluate()
    ended = state_of(fresh)
    fresh.close()

    trainer = make_trainer(config)
    assert first_epoch(trainer) != losses
    trainer.evaluate()
    addresses = {name: tensor.data_ptr() for name, tensor in tensors_of(trainer).items()}
    trainer.start_over(5)
    assert_same(state_of(trainer), begun)
    assert first_epoch(trainer) == losses
    assert trainer.evaluate() == scores
    assert_same(state_of(trainer), ended)
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(trainer).items()} == addresses
    trainer.close()


def test_starting_over_with_the_same_seed_gives_the_same_training_again(quick_config: Config) -> None:
    trainer = make_trainer(quick_config)
    losses = first_epoch(trainer)
    trainer.start_over(quick_config.train.seed)
    assert first_epoch(trainer) == losses
    trainer.close()


def test_starting_over_is_deterministic_where_the_recipe_is(quick_config: Config) -> None:
    trainer = make_trainer(changed(quick_config, {"train.deterministic": True}))
    try:
        torch.use_deterministic_algorithms(False)
        trainer.start_over(1)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        trainer.close()
        torch.use_deterministic_algorithms(False)
        seed_everything(0)


def test_batch_norms_counters_are_the_steps_also_of_a_resumed_training_and_of_the_average(quick_config: Config) -> None:
    config = changed(quick_config, {"train.ema_decay": 0.9, "train.ema_every": 3})
    first = make_trainer(config)
    steps = first.steps_per_epoch
    assert steps % 3 and steps > 3
    first.warm_up()  # trains on borrowed state
    first_epoch(first)
    state = copy.deepcopy(first.state())
    first.close()
    assert counters_of(state) == {("model", steps), ("ema", steps - steps % 3)}

    second = make_trainer(config)
    second.load_state(state)
    first_epoch(second)
    # an average follows at the steps of an epoch: 3, 6, ... of the first one again
    assert counters_of(second.state()) == {("model", 2 * steps), ("ema", 2 * steps - steps % 3)}
    second.close()


def counters_of(state: dict[str, Any]) -> set[tuple[str, int]]:
    """The values of all counters, by weights and average."""
    return {
        (part, int(value))
        for part in ("model", "ema")
        for name, value in state[part].items()
        if name.endswith("num_batches_tracked")
    }

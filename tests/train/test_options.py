"""Options of a recipe, one by one and together: what a training with them resumes from, starts over from and gives back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from options import EVERYTHING, OPTIONS
from torch import Tensor
from training import assert_same, make_trainer, needs_compiler

import net as networks
from dali_pipeline import sources
from dali_pipeline.backend import BackendChoice
from net.resnet import CustomResNet
from train.config import Config, changed
from train.step.borrow import borrowed_state
from train.step.meter import StepMeter
from train.step.schedule import Rates, make_schedule
from train.step.trainer import Trainer, new_network

SETS = {**OPTIONS, "everything": EVERYTHING}


def make(config: Config, options: dict[str, Any], seed: int = 0) -> Trainer:
    few = {"data.name": "synthetic", "data.synthetic_count": 320, "train.batch_size": 32, "train.eval_batch_size": 32}
    return make_trainer(changed(config, {"train.seed": seed, "data.backend": "torch", **few, **options}))


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


def test_a_network_is_prepared_from_images_spread_over_the_training_split(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Prepared(CustomResNet):
        images_to_prepare = 50
        seen: Tensor

        def prepare(self, images: Tensor) -> None:
            self.seen = images

    monkeypatch.setattr(networks, "build", lambda options, classes: Prepared(classes, 2))
    options = {"data.name": "synthetic", "data.synthetic_count": 90, "data.validation": 20, "train.batch_size": 10}
    config = changed(quick_config, options)
    dataset = sources.load(config.data)
    assert len(dataset.train) == 70
    pixels = dataset.train.take(np.array([7 * i // 5 for i in range(50)])).images.transpose(0, 3, 1, 2)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (dataset.mean, dataset.std))
    found = new_network(config, dataset)
    assert isinstance(found, Prepared)
    np.testing.assert_allclose(found.seen.numpy(), (pixels - mean) / std, rtol=1e-4, atol=1e-5)


def noise(config: Config, **options: Any) -> Trainer:
    """All options together, on a few random images, on contiguous tensors."""
    few = {"data.name": "synthetic", "data.synthetic_count": 256, "train.batch_size": 128, "train.channels_last": "off"}
    return make_trainer(changed(config, {**few, **EVERYTHING, **options}), BackendChoice("torch", "test"))


def first_losses(trainer: Trainer, count: int = 3) -> list[float]:
    batch = next(trainer.train_loader.epoch(0))
    return [trainer.train_one(*batch, rate)[0].item() for rate in (0.02,) * count]


def test_in_bf16_the_options_together_follow_fp32(quick_config: Config) -> None:
    exact, rounded = (noise(quick_config, **{"train.precision": precision}) for precision in ("fp32", "bf16"))
    expected = first_losses(exact)
    assert expected[-1] < expected[0]
    assert first_losses(rounded) == pytest.approx(expected, rel=0.03)
    scores = [score.loss for trainer in (exact, rounded) for score in trainer.evaluate().values()]
    assert len(scores) == 2 * 6 and torch.isfinite(torch.tensor(scores)).all()
    exact.close()
    rounded.close()


@pytest.mark.slow
@pytest.mark.long
def test_compiled_the_options_together_follow_the_eager_ones(quick_config: Config) -> None:
    needs_compiler()
    eager, compiled = noise(quick_config), noise(quick_config, **{"train.compile": "default"})
    compiled.warm_up()
    expected, found = first_losses(eager), first_losses(compiled)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-2)  # Muon rounds its steps to bf16
    for one, other in zip(eager.evaluate().values(), compiled.evaluate().values(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-2)
    eager.close()
    compiled.close()

"""The range test borrows and gives back; its rule finds what a made-up curve was built to hold."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import nn
from training import assert_same

from dali_pipeline.backend import BackendChoice
from train.config import Config
from train.disk.atomic import write_csv
from train.step.borrow import borrowed_state
from train.step.range_test import RangeTest, RangeTestError, range_test, suggest
from train.step.trainer import Trainer


def make_trainer(config: Config) -> Trainer:
    return training.make_trainer(config, BackendChoice("torch", "test"))


def snapshot(trainer: Trainer) -> dict[str, Any]:
    (sgd,) = trainer.optimizers.by_kind.values()
    return {
        "model": {k: v.clone() for k, v in trainer.net.state_dict().items()},
        "momentum": [sgd.state[p]["momentum_buffer"].clone() for p in trainer.net.parameters()],
        "rates": [g["lr"] for g in sgd.param_groups],
        "grads": [p.grad for p in trainer.net.parameters()],
        "modes": [m.training for m in trainer.net.modules()],
        "rng": (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "scaler": trainer.scaler.state_dict(),
    }


def test_everything_borrowed_comes_back_bit_for_bit(quick_config: Config) -> None:
    trainer = make_trainer(quick_config)
    images, labels = next(trainer.train_loader.epoch(0))
    for _ in range(3):  # momentum exists, batch-norm buffers have moved
        trainer.train_one(images, labels, 0.05)
    before = snapshot(trainer)
    addresses = [p.data_ptr() for p in trainer.net.parameters()]
    result = range_test(trainer, start=1e-4, end=10, steps=30, log=lambda line: None)
    assert len(result.losses) >= 10
    assert_same(snapshot(trainer), before)
    assert [p.data_ptr() for p in trainer.net.parameters()] == addresses


def test_training_after_a_range_test_equals_training_without(quick_config: Config) -> None:
    weights = []
    for find in (False, True):
        trainer = make_trainer(quick_config)
        if find:
            range_test(trainer, start=1e-4, end=10, steps=25, log=lambda line: None)
        for images, labels in trainer.train_loader.epoch(0):
            trainer.train_one(images, labels, 0.05)
        weights.append(trainer.net.state_dict())
    assert_same(weights[0], weights[1])


def test_state_comes_back_when_the_block_raises() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), borrowed_state(net, optimizer):
        net(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        raise RuntimeError("inside")
    assert_same(dict(net.state_dict()), before)
    assert not optimizer.state and all(p.grad is None for p in net.parameters())


def test_the_scaler_comes_back() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    before = scaler.state_dict()
    with borrowed_state(net, optimizer, scaler):
        for _ in range(5):
            scaler.scale(net(torch.ones(1, 2)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.state_dict() != before
    assert scaler.state_dict() == before and scaler.get_scale() == 64.0


def curve(lowest: float, steps: int = 100, noise: float = 0.02, seed: int = 0, again: bool = False) -> RangeTest:
    """A loss of 2.5 that falls to 1.5 along a straight line over two decades up to `lowest`, and rises steeply from there
    to 4; with `again` it sinks to 1.45 at the end."""
    rng = np.random.default_rng(seed)
    rates = np.geomspace(1e-4, 10, steps)
    x = np.log10(rates / lowest)
    losses = np.where(x < 0, np.minimum(1.5 - x / 2, 2.5), np.minimum(1.5 + 4 * x**2, 4.0))
    if again:
        losses = np.where(rates > 4, 1.45, losses)
    losses = losses + noise * rng.standard_normal(steps)
    return RangeTest(tuple(rates.tolist()), tuple(losses.tolist()), diverged=False)


@pytest.mark.parametrize("lowest", [2e-2, 0.1, 0.4])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_suggestion_finds_the_rates_that_the_curve_was_made_with(lowest: float, again: bool, seed: int) -> None:
    found = suggest(curve(lowest, seed=seed, again=again))
    assert found.lowest == pytest.approx(lowest, rel=0.4)
    edge = lowest * 10 ** math.sqrt(0.05 * 1.5 / 4)  # where 1.5 + 4 x^2 reaches 1.05 * 1.5
    assert found.lr_max == pytest.approx(2 * edge, rel=0.3)
    assert found.lr_min == pytest.approx(lowest * 10**-1.8, rel=0.4)  # where a tenth of the fall is behind


def test_a_bump_on_the_way_down_is_no_valley() -> None:
    rates = tuple(np.geomspace(1e-4, 1, 100).tolist())
    losses = np.interp(np.arange(100), [0, 20, 30, 40, 80, 99], [3.0, 2.7, 2.3, 2.6, 1.0, 1.8])
    assert suggest(RangeTest(rates, tuple(losses.tolist()), False)).lowest == pytest.approx(rates[80], rel=0.1)


def test_edge_is_read_off_between_two_steps() -> None:
    rates = tuple(10.0 ** (i / 4 - 4) for i in range(20))
    losses = tuple([4.0 - 0.25 * i for i in range(12)] + [1.0 + 0.25 * i for i in range(8)])
    found = suggest(RangeTest(rates, losses, True))
    smoothed = RangeTest(rates, losses, True).smoothed()
    low = min(smoothed)
    right = smoothed.index(low)
    while smoothed[right + 1] <= 1.05 * low:
        right += 1
    share = (1.05 * low - smoothed[right]) / (smoothed[right + 1] - smoothed[right])
    assert math.log10(found.lr_max / 2) == pytest.approx(math.log10(rates[right]) + share / 4)


def test_suggestion_does_not_depend_on_the_number_of_steps() -> None:
    few, many = (suggest(curve(0.02, steps=steps, noise=0)) for steps in (60, 600))
    assert few.lr_max == pytest.approx(many.lr_max, rel=0.1)


def test_a_loss_that_never_falls_is_an_error_with_the_remedy() -> None:
    rates = tuple(np.geomspace(1e-4, 1, 50).tolist())
    with pytest.raises(RangeTestError, match=r"no falling loss.*set schedule\.lr_max"):
        suggest(RangeTest(rates, tuple(np.linspace(2, 4, 50).tolist()), True))
    with pytest.raises(RangeTestError, match="diverged after 4 steps"):
        suggest(RangeTest(rates[:4], (2.0, 2.0, 9.0, 90.0), True))


def test_divergence_and_non_finite_losses_stop_the_test(quick_config: Config) -> None:
    trainer = make_trainer(quick_config)
    result = range_test(trainer, start=1e-3, end=1e12, steps=60, log=lambda line: None)
    assert result.diverged
    assert len(result.losses) < 60
    assert all(math.isfinite(loss) for loss in result.losses)
    assert all(torch.isfinite(value).all() for value in trainer.net.state_dict().values())


def test_csv_round_trip(tmp_path: Path) -> None:
    test = curve(0.02)
    write_csv(tmp_path / "lr_finder.csv", test.rows())
    assert RangeTest.read_csv(tmp_path / "lr_finder.csv") == test
    header = (tmp_path / "lr_finder.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "step,lr,loss,smoothed_loss,diverged"


def test_smoothing_is_centred_so_that_a_symmetric_dip_stays_in_place() -> None:
    losses = [float(abs(i - 50)) for i in range(101)]
    smoothed = RangeTest(tuple(range(1, 102)), tuple(losses), False).smoothed()
    assert int(np.argmin(smoothed)) == 50
    np.testing.assert_allclose(smoothed, smoothed[::-1])

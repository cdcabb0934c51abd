"""The LR range test (arXiv:1506.01186), and the rule that reads lr_max and lr_min off its curve.

The test trains on borrowed state: afterwards the network and its optimizers are as they were before.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dali_pipeline.errors import UserError
from dali_pipeline.regular import read_regular
from train.step.borrow import borrowed_state
from train.step.schedule import Rates
from train.step.trainer import Trainer

CURVE_COLUMNS = ("step", "lr", "loss", "smoothed_loss", "diverged")  # of lr_finder.csv
# The test stops where the running mean of the loss (an exponential one, over about 1 / (1 - MEAN_DECAY) = 10 steps) exceeds
# DIVERGENCE_RATIO times its lowest value; from there the loss does not come back.
MEAN_DECAY = 0.9
DIVERGENCE_RATIO = 4.0
# The rest is about the smoothed loss. Its fall is the difference between its start and its lowest point.
LOW_LOSS_RATIO = 1.05  # up to this multiple of a valley's lowest loss, a loss belongs to the valley
VALLEY_DEPTH = 0.75  # a valley must reach this part of the fall; a shallower one is a bump on the way down
FALL_ONSET = 0.1  # the fall has begun once this part of it is done; less is noise
LR_MAX_FACTOR = 2.0  # lr_max over the rate at the valley's right edge: docs/range-test.md, benchmarks/lr_finder.py
# The test draws its images and augmentations from epochs that no training reaches, so that it uses none of a training's own.
FIRST_PLAN_EPOCH = 2**32


class RangeTestError(UserError):
    """The curve does not show a usable range: one line with the cause and the remedy."""


@dataclass(frozen=True)
class RangeTest:
    """The curve: the learning rate of each step, growing by a constant factor, and the loss of the step before its update.

    `diverged`: the test stopped after the last of these steps, before the highest rate that was asked for.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool

    @property
    def reach(self) -> int:
        """How many steps to either side the smoothing averages over."""
        return max(len(self.losses) // 20, 1)

    def smoothed(self) -> list[float]:
        """The losses by a centred moving average over a tenth of the steps, narrower at both ends. It does not lag behind."""
        values = np.asarray(self.losses)
        reach = [min(self.reach, i, len(values) - 1 - i) for i in range(len(values))]
        return [float(values[i - r : i + r + 1].mean()) for i, r in enumerate(reach)]

    def rows(self) -> list[list[object]]:
        """The content of lr_finder.csv: CURVE_COLUMNS, then a row for each step; `diverged` is 0 or 1, the same in all rows."""
        steps = enumerate(zip(self.rates, self.losses, self.smoothed(), strict=True))
        curve: list[list[object]] = [[step, *row, int(self.diverged)] for step, row in steps]
        return [list(CURVE_COLUMNS), *curve]

    @classmethod
    def read_csv(cls, path: Path) -> RangeTest:
        """Read a file that holds the table of `rows`."""
        rows = list(csv.DictReader(io.StringIO(read_regular(path).decode("utf-8"), newline="")))
        return cls(
            tuple(float(row["lr"]) for row in rows),
            tuple(float(row["loss"]) for row in rows),
            bool(rows) and rows[0]["diverged"] == "1",
        )


@dataclass(frozen=True)
class Suggestion(Rates):
    """The two rates that the curve suggests, and between them `lowest`, where the smoothed loss is lowest in its first valley; it
    may fall further at rates that are too high to be of use."""

    lowest: float

    def sentence(self) -> str:
        return (
            f"found lr_max {self.lr_max:.4g}, lr_min {self.lr_min:.4g} (the loss begins to fall there, and is in its "
            f"first valley lowest at {self.lowest:.4g})"
        )


def suggest(test: RangeTest) -> Suggestion:
    """Read both rates off the first deep valley of the smoothed loss:

    - lr_min is the highest rate, left of the valley's lowest point, at which at most FALL_ONSET of the fall is done. At lower
      rates the loss hardly changes.
    - lr_max is LR_MAX_FACTOR times the rate at the valley's right edge, where the loss has risen to LOW_LOSS_RATIO times its
      lowest, but at most the highest rate of the test. Beyond the edge the freshly initialised network of the test no longer
      learns; a training warms up to its peak and is stable at higher rates.

    It is the first valley and not the lowest point of the whole curve, because a network with batch norm can train on at rates
    that are far too high, and the loss may fall once more there. Raises RangeTestError where the loss did not fall, or the
    test ended too early to tell.
    """
    advice = "set schedule.lr_max and schedule.lr_min, or widen schedule.find_start and schedule.find_end"
    if len(test.losses) < 10:
        raise RangeTestError(f"the range test diverged after {len(test.losses)} steps; {advice}")
    smoothed = test.smoothed()
    start = float(np.mean(test.losses[: 2 * test.reach + 1]))
    place = _first_valley(smoothed, start)
    if smoothed[place] > 0.98 * start or place < 3:
        raise RangeTestError(
            f"the range test saw no falling loss (first {start:.3g}, lowest {smoothed[place]:.3g}); {advice}"
        )
    begin = place
    while begin > 0 and smoothed[begin] < start - FALL_ONSET * (start - smoothed[place]):
        begin -= 1
    edge = _edge(test.rates, smoothed, place)
    return Suggestion(min(LR_MAX_FACTOR * edge, test.rates[-1]), test.rates[begin], test.rates[place])


def _first_valley(smoothed: list[float], start: float) -> int:
    """The index of the first valley's lowest point: from where VALLEY_DEPTH of the fall is done, up to where the loss exceeds
    LOW_LOSS_RATIO times the lowest so far."""
    deep = start - VALLEY_DEPTH * (start - min(smoothed))
    place = next(i for i, loss in enumerate(smoothed) if loss <= max(deep, min(smoothed)))
    for i, loss in enumerate(smoothed[place:], place):
        if loss < smoothed[place]:
            place = i
        elif loss > LOW_LOSS_RATIO * smoothed[place]:
            break
    return place


def _edge(rates: tuple[float, ...], smoothed: list[float], place: int) -> float:
    """The rate at the valley's right edge: where the loss first crosses LOW_LOSS_RATIO times its lowest, interpolated between
    two steps (linearly in the logarithm of the rate)."""
    level = LOW_LOSS_RATIO * smoothed[place]
    right = place
    while right + 1 < len(smoothed) and smoothed[right + 1] <= level:
        right += 1
    if right + 1 == len(smoothed):
        return rates[right]
    part = (level - smoothed[right]) / (smoothed[right + 1] - smoothed[right])
    return math.exp((1 - part) * math.log(rates[right]) + part * math.log(rates[right + 1]))


def range_test(
    trainer: Trainer,
    *,
    start: float,
    end: float,
    steps: int,
    log: Callable[[str], None],
    bar: bool = False,
    after_step: Callable[[], None] = lambda: None,
) -> RangeTest:
    """Train for `steps` steps at rates growing geometrically from `start` to `end`, on borrowed state.

    Stops early where the running mean of the loss exceeds DIVERGENCE_RATIO times its lowest, or the loss is NaN or infinite.
    With several processes the loss is the mean of theirs, so that all of them stop at the same step.
    """
    rates = np.geomspace(start, end, steps).tolist()
    losses: list[float] = []
    diverged = False
    average, best = 0.0, math.inf
    log(f"searching the learning rate: {steps} steps from {start:g} to {end:g} ...")
    batches = _endless(trainer)
    with (
        borrowed_state(trainer.net, trainer.optimizers, trainer.scaler),
        tqdm(total=steps, desc="LR range test", unit="step", leave=False, disable=not bar) as shown,
    ):
        trainer.step.train()
        for step, rate in enumerate(rates, 1):
            images, labels = next(batches)
            loss = _mean_over_processes(trainer.train_one(images, labels, rate)[0])
            shown.update()
            after_step()
            if not math.isfinite(loss):
                diverged = True
                break
            losses.append(loss)
            average = MEAN_DECAY * average + (1 - MEAN_DECAY) * loss
            smooth = average / (1 - MEAN_DECAY**step)
            best = min(best, smooth)
            if smooth > DIVERGENCE_RATIO * best:
                diverged = True
                break
    return RangeTest(tuple(rates[: len(losses)]), tuple(losses), diverged)


def _endless(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = FIRST_PLAN_EPOCH
    while True:
        yield from trainer.train_loader.epoch(epoch)
        epoch += 1


def _mean_over_processes(loss: Tensor) -> float:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return float(loss)

"""The LR range test (arXiv:1506.01186) on borrowed state, and the rule that turns its curve into lr_max and lr_min."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dali_pipeline.errors import UserError
from train.step.borrow import borrowed_state
from train.step.schedule import Rates
from train.step.trainer import Trainer

CURVE_COLUMNS = ("step", "lr", "loss", "smoothed_loss", "diverged")  # of lr_finder.csv
SMOOTHING = 0.9  # of the running mean that decides on divergence: about ten steps
DIVERGED = 4.0  # a loss of four times the best one does not come back
NEAR = 1.05  # a loss within 5% of the lowest one counts as low
BOLD = 2.0  # times that rate for the peak of a schedule
DEEP = 0.75  # of the whole fall: a valley no deeper is a bump on the way down
BEGUN = 0.1  # of the whole fall: less is noise
FIRST_EPOCH = 2**32  # of the augmentation plan: far beyond any training, which so sees its own draws first


class RangeTestError(UserError):
    """The curve does not show a usable range: one line with the cause and the remedy."""


@dataclass(frozen=True)
class RangeTest:
    """The curve: rates in geometric steps, and the loss of each step before its update.

    `diverged` says that the test was stopped after the last of them, short of the highest rate asked for.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool

    @property
    def reach(self) -> int:
        """Steps to either side that the smoothing takes in."""
        return max(len(self.losses) // 20, 1)

    def smoothed(self) -> list[float]:
        """Centred moving average over a tenth of the steps, narrower at both ends: smooth, and without a lag."""
        values = np.asarray(self.losses)
        reach = [min(self.reach, i, len(values) - 1 - i) for i in range(len(values))]
        return [float(values[i - r : i + r + 1].mean()) for i, r in enumerate(reach)]

    def rows(self) -> list[list[object]]:
        """A table: CURVE_COLUMNS (`diverged` 0 or 1, in every row), then a row a step."""
        steps = enumerate(zip(self.rates, self.losses, self.smoothed(), strict=True))
        curve: list[list[object]] = [[step, *row, int(self.diverged)] for step, row in steps]
        return [list(CURVE_COLUMNS), *curve]

    @classmethod
    def read_csv(cls, path: Path) -> RangeTest:
        """The table of `rows` from a file."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return cls(
            tuple(float(row["lr"]) for row in rows),
            tuple(float(row["loss"]) for row in rows),
            bool(rows) and rows[0]["diverged"] == "1",
        )


@dataclass(frozen=True)
class Suggestion(Rates):
    """The two rates, and the one between them at which the smoothed loss is lowest."""

    lowest: float

    def sentence(self) -> str:
        return (
            f"found lr_max {self.lr_max:.4g}, lr_min {self.lr_min:.4g} (the loss begins to fall there, and is lowest at "
            f"{self.lowest:.4g})"
        )


def suggest(test: RangeTest) -> Suggestion:
    """The rule, on the smoothed loss and its first deep valley:

    - lr_max is BOLD times the highest rate, right of the lowest point, at which the loss is still within NEAR of it.
      Beyond that rate the raw network of the test no longer learns, but a schedule that warms up to its peak stands
      more. The factor is measured: see benchmarks/lr_finder.py.
    - lr_min is the highest rate, left of it, at which no more than BEGUN of the fall is behind: below, nothing happens.

    The first valley, not the lowest point of all: batch norm lets a test go on at rates far too high, and while it does
    the loss may sink again. Raises RangeTestError where the loss never fell, or the test ended before it could.
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
    while begin > 0 and smoothed[begin] < start - BEGUN * (start - smoothed[place]):
        begin -= 1
    edge = _edge(test.rates, smoothed, place)
    return Suggestion(min(BOLD * edge, test.rates[-1]), test.rates[begin], test.rates[place])


def _first_valley(smoothed: list[float], start: float) -> int:
    """The lowest point before the first rise by more than NEAR allows, once most of the whole fall is behind."""
    deep = start - DEEP * (start - min(smoothed))
    place = next(i for i, loss in enumerate(smoothed) if loss <= max(deep, min(smoothed)))
    for i, loss in enumerate(smoothed[place:], place):
        if loss < smoothed[place]:
            place = i
        elif loss > NEAR * smoothed[place]:
            break
    return place


def _edge(rates: tuple[float, ...], smoothed: list[float], place: int) -> float:
    """Where the curve, read from its lowest point to the right, crosses NEAR times its lowest: between two rates."""
    level = NEAR * smoothed[place]
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

    Stops where the running mean of the loss exceeds DIVERGED times its lowest, or the loss is no finite number. Over
    several processes the loss is their mean, so that all of them stop at the same step.
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
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            smooth = average / (1 - SMOOTHING**step)
            best = min(best, smooth)
            if smooth > DIVERGED * best:
                diverged = True
                break
    return RangeTest(tuple(rates[: len(losses)]), tuple(losses), diverged)


def _endless(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = FIRST_EPOCH
    while True:
        yield from trainer.train_loader.epoch(epoch)
        epoch += 1


def _mean_over_processes(loss: Tensor) -> float:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return float(loss)

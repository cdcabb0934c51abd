"""The LR range test (arXiv:1506.01186) on borrowed state, and the rule that turns its curve into lr_max and lr_min."""

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

from train.borrow import borrowed_state
from train.checkpoint import write_atomic
from train.trainer import Trainer

SMOOTHING = 0.9  # of the running mean that decides on divergence: about ten steps
DIVERGED = 4.0  # a loss of four times the best one does not come back
NEAR = 1.05  # a loss within 5% of the lowest one counts as low
SHARE = 1 / 3  # of the way from the edge to the limit
FIRST_EPOCH = 2**32  # of the augmentation plan: far beyond any training, which so sees its own draws first


class RangeTestError(Exception):
    """The curve does not show a usable range: one line with the cause and the remedy."""


@dataclass(frozen=True)
class RangeTest:
    """The curve: rates in geometric steps, and the loss of each step before its update.

    `diverged` says that the test was stopped after the last of them, short of the highest rate asked for.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool

    def smoothed(self) -> list[float]:
        """Centred moving average over a tenth of the steps, narrower at both ends: smooth, and without a lag."""
        half = max(len(self.losses) // 20, 1)
        values = np.asarray(self.losses)
        reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
        return [float(values[i - r : i + r + 1].mean()) for i, r in enumerate(reach)]

    def write_csv(self, path: Path) -> None:
        """Columns step, lr, loss, smoothed_loss, and diverged (0 or 1, in every row)."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["step", "lr", "loss", "smoothed_loss", "diverged"])
        for step, row in enumerate(zip(self.rates, self.losses, self.smoothed(), strict=True)):
            writer.writerow([step, *row, int(self.diverged)])
        write_atomic(path, text.getvalue().encode())

    @classmethod
    def read_csv(cls, path: Path) -> RangeTest:
        """What `write_csv` wrote."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return cls(
            tuple(float(row["lr"]) for row in rows),
            tuple(float(row["loss"]) for row in rows),
            bool(rows) and rows[0]["diverged"] == "1",
        )


@dataclass(frozen=True)
class Suggestion:
    """lr_max and lr_min, and the two rates of the curve that they come from."""

    lr_max: float
    lr_min: float
    edge: float  # the highest rate at which the smoothed loss is near its lowest
    limit: float  # the rate at which the test diverged, or the highest it tried

    def sentence(self) -> str:
        return (
            f"found lr_max {self.lr_max:.4g} (the loss stays low up to {self.edge:.4g}, the limit is {self.limit:.4g}), "
            f"lr_min {self.lr_min:.4g}"
        )


def suggest(test: RangeTest) -> Suggestion:
    """The rule. With `edge` the highest rate, right of the lowest smoothed loss, at which that loss is still within
    NEAR of its lowest, and `limit` the rate at which the test diverged:

    - lr_max lies between the two, SHARE of the way on the logarithmic axis. Beyond `edge` the raw network of the test no
      longer learns, but batch norm keeps it from blowing up until `limit`; a schedule that warms up to its peak stands
      more than the test's sudden rise. The share is measured: see benchmarks/lr_finder.py.
    - lr_min is a tenth of `edge`: safely below where the raw network learns fastest.

    The lowest point itself lies in a flat valley and moves by a factor of 1.8 between seeds, the edge by 1.25
    (CIFAR-10, width 16, n = 7). Raises RangeTestError where the loss never fell, or the test ended before it could.
    """
    advice = "set schedule.lr_max and schedule.lr_min, or widen schedule.find_start and schedule.find_end"
    if len(test.losses) < 10:
        raise RangeTestError(f"the range test diverged after {len(test.losses)} steps; {advice}")
    smoothed = test.smoothed()
    place = int(np.argmin(smoothed))
    if smoothed[place] > 0.98 * smoothed[0] or place < 3:
        raise RangeTestError(
            f"the range test saw no falling loss (first {smoothed[0]:.3g}, lowest {smoothed[place]:.3g}); {advice}"
        )
    edge, limit = _edge(test.rates, smoothed, place), test.rates[-1]
    return Suggestion(edge * (limit / edge) ** SHARE, edge / 10, edge, limit)


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
        borrowed_state(trainer.net, trainer.optimizer, trainer.scaler),
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

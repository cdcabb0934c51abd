"""Timing and statistics: work is timed in chunks, stages that will be compared take turns, and ratios are medians over rounds."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats


class CannotMeasure(Exception):
    """A stage cannot be measured, or not any longer. The message is one line with the reason."""


@dataclass(frozen=True)
class Rate:
    """The speed of a stage: one sample for each round, in units per second (images, or floating-point operations)."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the first and the third quartile; half of the samples lie within it."""
        first, third = np.quantile(self.samples, (0.25, 0.75))
        return float(third - first)

    def record(self) -> dict[str, Any]:
        samples = [float(f"{sample:.5g}") for sample in self.samples]
        return {"median": self.median, "spread": self.spread, "repeats": len(samples), "samples": samples}

    def over(self, other: Rate) -> float:
        """Median of the ratios of samples that were taken in the same round."""
        if len(self.samples) != len(other.samples):
            raise ValueError(f"{len(self.samples)} samples do not pair with {len(other.samples)}")
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


class Sampled(Protocol):
    """Something that can be timed in turn with others."""

    name: str

    def warm_up(self) -> None: ...
    def sample(self) -> float:
        """Units a second over one chunk."""
        ...


@dataclass
class Stage:
    """`run(n)` does n repetitions of the work and returns how many units (images) they were. A chunk is as many repetitions as
    take `seconds`; where that is not much more, a whole number of epochs (of `epoch` repetitions each), so that it has its share
    of the costs that an epoch has once.

    The time is the host's, between two synchronisations, so on a GPU it includes waiting for the host.
    """

    name: str
    run: Callable[[int], float]
    device: torch.device
    seconds: float
    epoch: int = 1
    steps: int = field(default=0, init=False)

    def warm_up(self) -> None:
        """Run it until its speed is known, and fix the length of a chunk."""
        self._timed(1)
        steps = 1
        while True:
            taken, _ = self._timed(steps)
            wanted = max(1, math.ceil(steps * self.seconds / max(taken, 1e-9)))
            if taken > self.seconds / 4 or steps >= wanted:
                self.steps = self.epoch * math.ceil(wanted / self.epoch) if 2 * wanted >= self.epoch else wanted
                return
            steps = min(wanted, 8 * steps)

    def sample(self) -> float:
        taken, units = self._timed(self.steps)
        return units / taken

    def _timed(self, steps: int) -> tuple[float, float]:
        synchronize(self.device)
        begun = time.perf_counter()
        units = self.run(steps)
        synchronize(self.device)
        return time.perf_counter() - begun, units


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_device_peak(device: torch.device) -> None:
    """Let `device_peak_gib` count from here on."""
    if device.type == "cuda":
        gc.collect()  # networks that are no longer used are in reference cycles
        torch.cuda.reset_peak_memory_stats(device)


def device_peak_gib(device: torch.device) -> float | None:
    """The peak GPU memory of torch's tensors in GiB; None without CUDA. DALI's memory and the CUDA context are not included."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)


def interleave(
    stages: Sequence[Sampled], repeats: int, left_out: Callable[[str, str], None] | None = None
) -> dict[str, Rate]:
    """Warm all stages up, then sample them in turn, every other round in reverse (A B B A), so that a machine that gets slower
    meanwhile affects all alike. With `left_out`, a stage that raises CannotMeasure is left out from then on, and
    `left_out(name, reason)` is called; the samples of the others still belong to the same rounds."""
    samples: dict[str, list[float]] = {stage.name: [] for stage in stages}
    if len(samples) != len(stages):
        raise ValueError(f"stages need different names: {[stage.name for stage in stages]}")

    def attempt(stage: Sampled, act: Callable[[], float | None]) -> float | None:
        try:
            return act()
        except CannotMeasure as error:
            if left_out is None:
                raise
            left_out(stage.name, str(error))
            del samples[stage.name]
            return None

    for stage in stages:
        attempt(stage, stage.warm_up)
    for repeat in range(repeats):
        for stage in stages if repeat % 2 == 0 else reversed(stages):
            if stage.name in samples and (rate := attempt(stage, stage.sample)) is not None:
                samples[stage.name].append(rate)
    return {name: Rate(tuple(values)) for name, values in samples.items()}


def matrix_stage(device: torch.device, precision: str, seconds: float) -> Stage:
    """A stage that multiplies large square matrices in the given precision; its unit is the floating-point operation."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run(steps: int) -> float:
        for _ in range(steps):
            torch.mm(a, b, out=out)
        return 2.0 * n**3 * steps

    return Stage("matrix", run, device, seconds)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, sample standard deviation, half-width of the 95% interval by Student's t); None where one value says nothing."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    deviation = statistics.stdev(values)
    half_width = stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, deviation, float(half_width)


def statistic(values: Sequence[float]) -> dict[str, Any]:
    """`mean_and_interval` as a report holds it."""
    mean, deviation, half_width = mean_and_interval(values)
    return {"mean": mean, "std": deviation, "interval95": half_width, "n": len(values)}

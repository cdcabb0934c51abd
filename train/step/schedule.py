"""The learning rate as a function of the step, with no state to save."""

from __future__ import annotations

from dataclasses import dataclass

from train.options import ScheduleOptions


@dataclass(frozen=True)
class Rates:
    """The two learning rates between which a schedule moves: given, or found by the range test."""

    lr_max: float
    lr_min: float

    @classmethod
    def given(cls, options: ScheduleOptions) -> Rates | None:
        """The rates that the recipe gives as numbers; None where it asks the range test for one of them."""
        if isinstance(options.lr_max, str) or isinstance(options.lr_min, str):
            return None
        return cls(options.lr_max, options.lr_min)


@dataclass(frozen=True)
class OneCycle:
    """Learning rate of a step: linear from lr_min up to lr_max at `peak_step`, linear down to lr_min at the last step.

    arXiv:1708.07120, without the annihilation phase: the last rate is lr_min, not a fraction of it. Equals torch's
    OneCycleLR(anneal_strategy="linear", div_factor=lr_max/lr_min, final_div_factor=1) with the same peak.
    """

    lr_max: float
    lr_min: float
    peak_step: float
    total_steps: int

    def __call__(self, step: int) -> float:
        """The rate of step 0 .. total_steps - 1; ValueError beyond."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} of a schedule of {self.total_steps} steps")
        last = self.total_steps - 1
        peak = min(self.peak_step, last)
        if step <= peak:
            done = step / peak if peak > 0 else 1.0
        else:
            done = (last - step) / (last - peak)
        return self.lr_min + (self.lr_max - self.lr_min) * done


@dataclass(frozen=True)
class Trapezoid(OneCycle):
    """Linear from lr_min up to lr_max at `peak_step`, constant for `hold_steps`, and linear down to zero, which the step after
    the last one would have. Without `hold_steps` a triangle."""

    hold_steps: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate of step 0 .. total_steps - 1; ValueError beyond."""
        fall = self.peak_step + self.hold_steps
        if step <= self.peak_step or not 0 <= step < self.total_steps:
            return super().__call__(step)
        if step <= fall:
            return self.lr_max
        return self.lr_max * (self.total_steps - step) / (self.total_steps - fall)


def make_schedule(options: ScheduleOptions, rates: Rates, epochs: int, steps_per_epoch: int) -> OneCycle:
    """The schedule of a training between these rates, in the shape of the recipe."""
    between = rates.lr_max, rates.lr_min, options.peak_epoch * steps_per_epoch, epochs * steps_per_epoch
    if options.shape == "onecycle":
        return OneCycle(*between)
    return Trapezoid(*between, hold_steps=options.hold_epochs * steps_per_epoch)

"""Tells the user after the first steps that a run will take hours, and which keys would shorten it."""

from __future__ import annotations

import time

from train.config import Config
from train.machine.runtime import Runtime
from train.screen.log import Log
from train.screen.progress import duration

LONG_RUN_SECONDS = 3600.0


class LongRunNotice:
    """`step` is called after every step. Prints one line, once, if the `steps_left` steps of this run, or of the rest of one that
    is resumed, will take more than LONG_RUN_SECONDS."""

    def __init__(self, steps_left: int, config: Config, runtime: Runtime, log: Log) -> None:
        self.steps_left, self.config, self.runtime, self.log = steps_left, config, runtime, log
        self.steps = 0
        self.begun = 0.0
        self.done = False

    def step(self) -> None:
        if self.done:
            return
        now = time.perf_counter()
        if self.steps == 0:
            self.begun = now  # the first step is not counted: it may still allocate and compile
        self.steps += 1
        if self.steps < 4 or now - self.begun < 2:
            return
        self.done = True
        per_step = (now - self.begun) / (self.steps - 1)
        if per_step * self.steps_left > LONG_RUN_SECONDS:
            self.log(long_run_advice(per_step * self.steps_left, per_step, self.config, self.runtime))


def long_run_advice(seconds: float, per_step: float, config: Config, runtime: Runtime) -> str:
    """The line that LongRunNotice prints: the estimated time, and which keys shorten it."""
    shorter = ["fewer epochs (train.epochs=)"]
    if config.net.width > 16:
        shorter.insert(
            0, f"a narrower network (net.width=16 costs about {(16 / config.net.width) ** 2:.0%} of the arithmetic)"
        )
    if runtime.device.type == "cpu":
        if any("bf16 is faster" in note for note in runtime.notes):
            shorter.insert(0, "train.precision=bf16 (this CPU has bf16 matrix units)")
        shorter.append("a machine with a GPU")
    return (
        f"note: this run will take about {duration(seconds)} at {per_step:.1f} s a step on {runtime.device.type}. It goes on; "
        f"shorter: {', '.join(shorter)}"
    )

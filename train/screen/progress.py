"""Shows how far an epoch or an evaluation has come, on a terminal and in a log file."""

from __future__ import annotations

import math
import time
from typing import Any

from tqdm import tqdm

from train.screen.log import Log
from train.step.meter import StepMeter


class EpochDisplay:
    """A progress bar on a terminal; elsewhere a plain line every `line_seconds`, so that a log file stays readable."""

    def __init__(
        self,
        log: Log,
        title: str,
        steps: int,
        start: int,
        batch_size: int,
        processes: int = 1,
        line_seconds: float = 30.0,
    ) -> None:
        self.log, self.title, self.steps, self.batch_size, self.processes = log, title, steps, batch_size, processes
        self.start, self.begun, self.line_seconds = start, time.perf_counter(), line_seconds
        self.next_line = self.begun + line_seconds
        self.bar = None
        if log.terminal and not log.quiet:
            self.bar = tqdm(total=steps, initial=start, desc=title, unit="batch", dynamic_ncols=True, leave=False)

    def update(self, done: int, meter: StepMeter) -> None:
        now = time.perf_counter()
        if self.bar is None and now < self.next_line:
            return
        loss, accuracy = meter.means(self.batch_size // self.processes)  # over the images of this process
        rate = (done - self.start) * self.batch_size / max(now - self.begun, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}%, {rate:,.0f} images/s", refresh=False)
            try:
                self.bar.update(done - self.bar.n)
            except (OSError, ValueError):  # the terminal is gone, the run goes on
                self.bar, self.next_line = None, math.inf
        else:
            left = (self.steps - done) * self.batch_size / max(rate, 1e-9)
            self.log(
                f"{self.title}: batch {done}/{self.steps}, loss {loss:.4f}, accuracy {accuracy:.2f}%, "
                f"{rate:,.0f} images/s, {duration(left)} to go"
            )
            self.next_line = now + self.line_seconds

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class EvaluationDisplay:
    """A progress bar on a terminal, for what takes more than a second; elsewhere a plain line every `line_seconds`."""

    def __init__(self, log: Log, title: str, batches: int, line_seconds: float = 30.0) -> None:
        self.log, self.title, self.batches, self.done = log, title, batches, 0
        self.begun, self.line_seconds = time.perf_counter(), line_seconds
        self.next_line = self.begun + line_seconds
        self.bar = None
        if log.terminal and not log.quiet:
            how: dict[str, Any] = {"desc": title, "unit": "batch", "dynamic_ncols": True, "leave": False, "delay": 1.0}
            self.bar = tqdm(total=batches, **how)

    def advance(self) -> None:
        """To be called after each batch."""
        self.done += 1
        if self.bar is not None:
            try:
                self.bar.update()
            except (OSError, ValueError):  # the terminal is gone, the run goes on
                self.bar, self.next_line = None, math.inf
            return
        now = time.perf_counter()
        if now >= self.next_line and self.done < self.batches:
            left = (now - self.begun) / self.done * (self.batches - self.done)
            self.log(f"{self.title}: batch {self.done}/{self.batches}, {duration(left)} to go")
            self.next_line = now + self.line_seconds

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """12.3 s, 4 min 10 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"

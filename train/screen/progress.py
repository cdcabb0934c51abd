"""Shows how far an epoch or an evaluation has come, on a terminal and in a log file."""

from __future__ import annotations

import math
import time
from typing import Any

from tqdm import tqdm

from train.screen.log import Log
from train.step.meter import StepMeter


class _Display:
    """A progress bar on a terminal; elsewhere a plain line every `line_seconds`, so that a log file stays readable."""

    def __init__(self, log: Log, title: str, batches: int, line_seconds: float, **of_bar: Any) -> None:
        self.log, self.title, self.batches = log, title, batches
        self.begun, self.line_seconds = time.perf_counter(), line_seconds
        self.next_line = self.begun + line_seconds
        self.bar = None
        if log.terminal and not log.quiet:
            self.bar = tqdm(total=batches, desc=title, unit="batch", dynamic_ncols=True, leave=False, **of_bar)

    def _move(self, done: int) -> None:
        """Have the bar show that so many batches are done."""
        assert self.bar is not None
        try:
            self.bar.update(done - self.bar.n)
        except (OSError, ValueError):  # the terminal is gone, the run goes on
            self.bar, self.next_line = None, math.inf

    def _say(self, done: int, left: float, *facts: str) -> None:
        """A line: so many batches are done, and the rest takes `left` seconds."""
        self.log(f"{self.title}: {', '.join([f'batch {done}/{self.batches}', *facts, f'{duration(left)} to go'])}")
        self.next_line = time.perf_counter() + self.line_seconds

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class EpochDisplay(_Display):
    """How far an epoch is, with loss, accuracy and images a second; `start` of its steps were done before."""

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
        super().__init__(log, title, steps, line_seconds, initial=start)
        self.start, self.batch_size, self.processes = start, batch_size, processes

    def update(self, done: int, meter: StepMeter) -> None:
        now = time.perf_counter()
        if self.bar is None and now < self.next_line:
            return
        loss, accuracy = meter.means(self.batch_size // self.processes)  # over the images of this process
        rate = (done - self.start) * self.batch_size / max(now - self.begun, 1e-9)
        facts = (f"loss {loss:.4f}", f"accuracy {accuracy:.2f}%", f"{rate:,.0f} images/s")
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(facts), refresh=False)
            self._move(done)
        else:
            self._say(done, (self.batches - done) * self.batch_size / max(rate, 1e-9), *facts)


class EvaluationDisplay(_Display):
    """How far an evaluation is; the bar comes only where that takes more than a second."""

    def __init__(self, log: Log, title: str, batches: int, line_seconds: float = 30.0) -> None:
        super().__init__(log, title, batches, line_seconds, delay=1.0)
        self.done = 0

    def advance(self) -> None:
        """To be called after each batch."""
        self.done += 1
        now = time.perf_counter()
        if self.bar is not None:
            self._move(self.done)
        elif now >= self.next_line and self.done < self.batches:
            self._say(self.done, (now - self.begun) / self.done * (self.batches - self.done))


def duration(seconds: float) -> str:
    """12.3 s, 4 min 10 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"

"""How far a long read is: a bar where stderr is a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]  # takes a line about the progress


class Meter:
    """Progress: a bar where stderr is a terminal, elsewhere a line to `say` every LINE_SECONDS; without `say` neither.

    `total` counts bytes or, with another `unit`, things of that name.
    """

    LINE_SECONDS = 10.0

    def __init__(self, name: str, total: int, say: Say | None, *, unit: str = "B") -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.tell = say
        self.terminal = say is not None and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
        self.bar: Any = None
        self.started: tuple[float, int] | None = None
        self.last_line = time.monotonic()

    def say(self, text: str) -> None:
        if self.tell is not None:
            self.close()
            self.tell(text)

    def show(self, position: int) -> None:
        """`position`: how many of the total there are."""
        if self.tell is None:
            return
        if self.terminal:
            if self.bar is None:
                from tqdm import tqdm

                unit = self.unit if self.unit == "B" else f" {self.unit}"
                self.bar = tqdm(desc=self.name, total=self.total, initial=position, unit=unit, unit_scale=unit == "B")
            self.bar.update(position - self.bar.n)
            return
        now = time.monotonic()
        if self.started is None or position < self.started[1]:
            self.started = now, position
        if now - self.last_line >= self.LINE_SECONDS:
            self.last_line = now
            rate = max(1.0, (position - self.started[1]) / max(1e-9, now - self.started[0]))
            left = f"about {(self.total - position) / rate / 60:.0f} min left"
            if self.unit == "B":
                done = f"{position / 1e6:.1f} of {self.total / 1e6:.1f} MB, {rate / 1e3:.0f} kB/s"
            else:
                done = f"{position:,} of {self.total:,} {self.unit}, {rate:,.0f}/s"
            self.say(f"{self.name}: {done}, {left}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

"""Measures what the time of a run goes into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch


@dataclass
class Times:
    """Seconds by what they were spent on. A block of `on` counts under one name; a block inside it stops that and counts under
    its own, so every second counts once."""

    set_up: float = 0.0
    compile: float = 0.0
    lr_search: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    saving: float = 0.0  # as far as the training waited for it

    def __post_init__(self) -> None:
        self._open: list[str] = []  # the names of the nested blocks, the innermost last; that one is counting
        self._counted_until = 0.0

    @contextmanager
    def on(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Count the block's time under `name`, without what it counts under other names."""
        self.count()
        self._open.append(name)
        try:
            yield
        finally:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            self.count()
            self._open.pop()

    def count(self) -> None:
        """Bring the numbers up to now."""
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            setattr(self, name, getattr(self, name) + now - self._counted_until)
        self._counted_until = now

    def seconds(self) -> dict[str, float]:
        """All of them by name, up to now."""
        self.count()
        return asdict(self)

    def add(self, seconds: dict[str, float]) -> None:
        """Count what an earlier part of the run has spent."""
        for name, value in seconds.items():
            setattr(self, name, getattr(self, name) + value)

"""What the time of a run goes into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Times:
    """Seconds by what they were spent on."""

    set_up: float = 0.0
    compile: float = 0.0
    lr_search: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    saving: float = 0.0  # as far as the training waited for it

    @contextmanager
    def on(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Count the block's time under `name`, without what it counts under other names."""
        begun, counted = time.perf_counter(), sum(vars(self).values())
        try:
            yield
        finally:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            inside = sum(vars(self).values()) - counted
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun - inside)

    def add(self, seconds: dict[str, float]) -> None:
        """Count what an earlier part of the run has spent."""
        for name, value in seconds.items():
            setattr(self, name, getattr(self, name) + value)

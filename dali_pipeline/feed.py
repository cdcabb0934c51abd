"""What the DALI and the torch graph have in common: their settings and their interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dali_pipeline.dataset import Split
from dali_pipeline.memory import Resident
from dali_pipeline.plan import Augment, Plan


@dataclass(frozen=True, kw_only=True)
class FeedOrder:
    """How the images of a split are to be fed: `batch_size` at a time, augmented, on `device`.

    fill: the colour (R, G, B) that cutout paints. compiled: fuse the torch graph's operations by torch.compile; DALI's graph
    has nothing to compile. resident: whether the graph keeps the images on the device, or ("never") gathers each batch from host
    memory; "auto" is settled by `memory.choose_residence` before a graph is made.
    """

    batch_size: int
    augment: Augment
    fill: tuple[int, int, int]
    device: torch.device
    compiled: bool = False
    resident: Resident = "auto"


class Graph(Protocol):
    """Applies plans to the images of one split, which it keeps on the device or gathers batch by batch."""

    def run(self) -> Tensor:
        """The images of the oldest plan that it has pulled and not yet delivered: (n, 3, H, W) uint8, channels-last, in
        memory that nothing else writes. It may pull further plans ahead."""

    def close(self) -> None:
        """Stops what runs in the background and frees the images; batches already delivered stay valid."""


MakeGraph = Callable[[Split, FeedOrder, Callable[[], Plan]], Graph]

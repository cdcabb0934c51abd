"""A plan applied in plain torch, on any device.

A crop is a window of the padded image, and a window is one strided view: gathering n of them is a single index_select.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.layout import resident_windows
from dali_pipeline.plan import Plan
from dali_pipeline.resident import resident_images, to_device


class TorchGraph:
    """Pulls a plan of any length from `source` and gives its images at once; see `feed.Graph`.

    `order.compiled` fuses gather and cutout into one kernel with torch.compile, and falls back to eager with a warning where
    no compiler is found.
    """

    def __init__(self, split: Split, order: FeedOrder, source: Callable[[], Plan]) -> None:
        augment = order.augment
        self._source = source
        self._device = order.device
        self._augment = augment
        self._num_images = len(split)
        self._border = augment.pad if augment.crop else 0
        images = resident_images(
            split,
            order.device,
            border=self._border,
            reflect=augment.padding_mode == "reflect",
            mirrored=augment.flip,
        )
        slots, self._rows, self._columns, _ = images.shape
        self._height, self._width = split.height, split.width
        starts = slots * self._rows * self._columns - (self._height - 1) * self._columns - self._width + 1
        self._windows: Tensor | None = images.view(-1).as_strided(
            (starts, self._height, self._width * 3), (3, self._columns * 3, 1)
        )
        self._fill = torch.tensor(order.fill, dtype=torch.uint8, device=self._device).repeat(self._width)
        self._row_hole = _holes(self._height, augment.cutout).to(self._device)
        self._column_hole = _holes(self._width, augment.cutout).repeat_interleave(3, 1).to(self._device)
        self._apply = _gather_and_cut if augment.cutout else _gather
        self._compiled = torch.compile(self._apply, dynamic=False) if order.compiled else None

    def run(self) -> Tensor:
        """The images of the next plan, (n, 3, H, W) uint8, channels-last."""
        if self._windows is None:
            raise RuntimeError("the graph is closed")
        plan = self._source()
        slot, window = resident_windows(plan, self._num_images, self._augment)
        window += self._border
        start = (slot * self._rows + window[:, 0]) * self._columns + window[:, 1]
        staged = to_device(np.stack([start, plan.cy, plan.cx]), self._device)
        arguments = (self._windows, staged, self._fill, self._row_hole, self._column_hole)
        with torch.no_grad():
            images = self._run(*arguments).view(-1, self._height, self._width, 3)
        return images.permute(0, 3, 1, 2)

    def close(self) -> None:
        """Frees the resident images."""
        self._windows = None

    def _run(self, *arguments: Tensor) -> Tensor:
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except (
                Exception
            ) as error:  # inductor looks for its compiler at the first call, and raises errors of many kinds
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"the torch input pipeline runs eagerly: {reason}", RuntimeWarning, stacklevel=5)
                self._compiled = None
        return self._apply(*arguments)


def _holes(size: int, cutout: int) -> Tensor:
    """(size, size) uint8: row c is 255 where a cutout centred at c paints, 0 elsewhere."""
    offset = torch.arange(size) - torch.arange(size)[:, None] + cutout // 2
    return ((offset >= 0) & (offset < cutout)).to(torch.uint8) * 255


def _gather(windows: Tensor, staged: Tensor, fill: Tensor, row_hole: Tensor, column_hole: Tensor) -> Tensor:
    return windows.index_select(0, staged[0])


def _gather_and_cut(windows: Tensor, staged: Tensor, fill: Tensor, row_hole: Tensor, column_hole: Tensor) -> Tensor:
    """`staged`, (3, n) int64: for each image the index of its window, and the row and column of its cutout's centre."""
    out = windows.index_select(0, staged[0])
    hole = row_hole[staged[1]][:, :, None] & column_hole[staged[2]][:, None, :]
    return out ^ ((out ^ fill) & hole)  # `fill` where the mask is 255; unlike where(), this vectorises

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
from dali_pipeline.streamed import Kept, Stream, left_to_apply


class TorchGraph:
    """Pulls a plan of any length from `source` and gives its images at once; see `feed.Graph`.

    `order.compiled` fuses gather and cutout into one kernel with torch.compile, and falls back to eager with a warning where
    no compiler is found.
    """

    def __init__(self, split: Split, order: FeedOrder, source: Callable[[], Plan]) -> None:
        augment = order.augment
        self._device = order.device
        self._num_images = len(split)
        self._height, self._width = split.height, split.width
        self._border = augment.pad if augment.crop else 0
        self._images: Stream | Kept | None
        if order.resident == "never":
            self._augment = left_to_apply(augment)
            self._images = Stream(split, augment, source, target=order.device, border=self._border)
        else:
            self._augment = augment
            images = resident_images(
                split,
                order.device,
                border=self._border,
                reflect=augment.padding_mode == "reflect",
                mirrored=augment.flip,
            )
            self._images = Kept(images, source)
        self._cutout = Cutout(order.fill, augment.cutout, self._height, self._width, order.device)
        self._apply = _gather_and_cut if augment.cutout else _gather
        self._compiled = torch.compile(self._apply, dynamic=False) if order.compiled else None

    def run(self) -> Tensor:
        """The images of the next plan, (n, 3, H, W) uint8, channels-last."""
        if self._images is None:
            raise RuntimeError("the graph is closed")
        with self._images.next() as staged, torch.no_grad():
            images = self._apply_plan(staged.images, staged.plan)
        return images.view(-1, self._height, self._width, 3).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Frees the resident images, or stops gathering."""
        if self._images is not None:
            self._images.close()
        self._images = None

    def _apply_plan(self, images: Tensor, plan: Plan) -> Tensor:
        slots, rows, columns, _ = images.shape
        starts = slots * rows * columns - (self._height - 1) * columns - self._width + 1
        windows = images.view(-1).as_strided((starts, self._height, self._width * 3), (3, columns * 3, 1))
        slot, window = resident_windows(plan, self._num_images, self._augment)
        window += self._border
        start = (slot * rows + window[:, 0]) * columns + window[:, 1]
        where = to_device(np.stack([start, plan.cy, plan.cx]), self._device)
        return self._run(windows, where, self._cutout.fill, self._cutout.row_hole, self._cutout.column_hole)

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
                warnings.warn(f"the torch input pipeline runs eagerly: {reason}", RuntimeWarning, stacklevel=6)
                self._compiled = None
        return self._apply(*arguments)


class Cutout:
    """Paints the square of a plan in the colour `fill` onto images (n, H, W * 3) uint8."""

    def __init__(self, fill: tuple[int, int, int], side: int, height: int, width: int, device: torch.device) -> None:
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device).repeat(width)
        self.row_hole = _holes(height, side).to(device)
        self.column_hole = _holes(width, side).repeat_interleave(3, 1).to(device)

    def __call__(self, images: Tensor, cy: Tensor, cx: Tensor) -> Tensor:
        """`cy`, `cx`: (n,) int64, the rows and columns of the squares' centres."""
        return _paint(images, self.fill, self.row_hole[cy], self.column_hole[cx])


def _holes(size: int, cutout: int) -> Tensor:
    """(size, size) uint8: row c is 255 where a cutout centred at c paints, 0 elsewhere."""
    offset = torch.arange(size) - torch.arange(size)[:, None] + cutout // 2
    return ((offset >= 0) & (offset < cutout)).to(torch.uint8) * 255


def _gather(windows: Tensor, staged: Tensor, fill: Tensor, row_hole: Tensor, column_hole: Tensor) -> Tensor:
    return windows.index_select(0, staged[0])


def _gather_and_cut(windows: Tensor, staged: Tensor, fill: Tensor, row_hole: Tensor, column_hole: Tensor) -> Tensor:
    """`staged`, (3, n) int64: for each image the index of its window, and the row and column of its cutout's centre."""
    out = windows.index_select(0, staged[0])
    return _paint(out, fill, row_hole[staged[1]], column_hole[staged[2]])


# What TorchGraph has torch compile, for whoever clears torch's record of that.
COMPILED = (_gather, _gather_and_cut)


def _paint(images: Tensor, fill: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    hole = rows[:, :, None] & columns[:, None, :]
    return images ^ ((images ^ fill) & hole)  # `fill` where the mask is 255; unlike where(), this vectorises

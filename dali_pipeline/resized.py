"""Random resized crops of a batch: the plan's rectangles scaled up to whole images, by torch on any device, to the same bits.

Bilinear interpolation between pixels of 8 bits with weights of 8 bits in each direction: 24 bits, which float32 holds exactly, so
no order of its operations rounds anything. DALI's resize takes weights that are no such fractions, and its CPU and GPU kernels
round differently.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dali_pipeline.feed import FeedOrder
from dali_pipeline.plan import BoolArray, IntArray, Plan
from dali_pipeline.resident import to_device
from dali_pipeline.torch_graph import Cutout

BITS = 8  # of a weight, and of a pixel; twice a weight's and once a pixel's are the 24 of float32
ONE = 1 << BITS
PIECE = 1 << 17  # pixels at a time on a CPU, so that what is computed of them stays in its caches


class ResizedCrop:
    """What `order.augment` does to gathered images (n, 3, H, W) where it resizes crops: resize, mirror, and cut out."""

    def __init__(self, order: FeedOrder, height: int, width: int) -> None:
        self._device, self._height, self._width = order.device, height, width
        augment = order.augment
        self._cutout = Cutout(order.fill, augment.cutout, height, width, order.device) if augment.cutout else None

    @torch.no_grad()
    def __call__(self, images: Tensor, plan: Plan) -> Tensor:
        """(n, 3, H, W) uint8, channels-last, in memory of its own."""
        n, size = len(plan), self._height * self._width
        step = n if self._device.type == "cuda" else max(1, PIECE // size)
        out = torch.empty((n, self._height, self._width, 3), dtype=torch.uint8, device=self._device)
        for first in range(0, n, step):
            part = slice(first, first + step)
            out[part] = self._resized(images[part], plan.take(part))
        return out.permute(0, 3, 1, 2)

    def _resized(self, images: Tensor, plan: Plan) -> Tensor:
        """(n, H, W, 3), for a part of a batch."""
        assert plan.rectangle is not None, "drawn with augment.scale below 1"
        n, height, width = len(plan), self._height, self._width
        top, left, rows, columns = plan.rectangle.astype(np.int64).T
        down = to_device(_between(top, rows, height, np.zeros(n, bool)), self._device)
        across = to_device(_between(left, columns, width, plan.flip), self._device)

        # of each line of pixels the weighted sum of two, then of each pixel in it
        lines = images.permute(0, 2, 3, 1).reshape(n * height, width * 3).float()
        start = torch.arange(n, device=self._device)[:, None] * height
        above, below = (lines.index_select(0, (start + line).flatten()) for line in down[:2])
        pixels = torch.lerp(above, below, (down[2].float() / ONE).view(-1, 1)).view(-1, 3)
        start = torch.arange(n * height, device=self._device).view(n, height, 1) * width
        before, after = (pixels.index_select(0, (start + column[:, None]).flatten()) for column in across[:2])
        weight = (across[2].float() / ONE).repeat_interleave(3, 1)[:, None]
        shape = (n, height, width * 3)
        out = torch.lerp(before.view(shape), after.view(shape), weight).add_(0.5).to(torch.uint8)

        if self._cutout is not None:
            out = self._cutout(out, *to_device(np.stack([plan.cy, plan.cx]), self._device))
        return out.view(n, height, width, 3)


def _between(start: IntArray, length: IntArray, size: int, reverse: BoolArray) -> IntArray:
    """int64 (3, n, size): for each of `size` lines that stand for `length` lines from `start` on, the two that it lies between
    and the weight of the second, 0..ONE. Centres of pixels are matched; beyond the outer centres the outer line stands alone."""
    line = np.arange(size)[None]
    line = np.where(reverse[:, None], size - 1 - line, line)
    place = ((2 * line + 1) * length[:, None] * ONE + size) // (2 * size) - ONE // 2  # rounded
    place = np.clip(place, 0, (length[:, None] - 1) * ONE)
    first, weight = start[:, None] + (place >> BITS), place & (ONE - 1)
    last = (start + length - 1)[:, None]
    return np.stack([first, np.minimum(first + 1, last), weight])

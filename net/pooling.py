"""Max-pooling over windows that do not overlap, whose gradient the compiler can fuse: torch's values and gradients, bit for bit.

torch.compile turns the backward of `nn.MaxPool2d` into a scatter: an array of zeros in float32, atomic additions into it,
a cast and, for channels-last, a transposition (pytorch/pytorch#195123). Windows that do not overlap need none of that: one
byte a window says where its maximum lies, and each pixel asks whether it is the one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WindowMax(torch.autograd.Function):
    """`apply(images, size)`: (N, C, H, W) to (N, C, H // size, W // size), as `max_pool2d(images, size)`; `size` up to 11.

    Of equal values the first in reading order gets the gradient, and of several NaN the last, as with torch.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, size: int) -> Tensor:
        height, width = (side - side % size for side in images.shape[2:])
        best, place = images[:, :, :height:size, :width:size], None
        for k in range(1, size * size):
            other = images[:, :, k // size : height : size, k % size : width : size]
            wins = (other > best) | other.isnan()
            best = torch.where(wins, other, best)
            place = torch.where(wins, k, 0 if place is None else place)
        assert place is not None  # a window of one pixel would pool nothing
        ctx.size, ctx.shape = size, images.shape
        place = place.to(torch.int8)
        # as_strided makes the compiler write the places here, with the maxima; it would do so at the end of the network,
        # and read all of the images once more for it
        ctx.save_for_backward(place.as_strided(place.shape, place.stride()))
        return best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        size, (n, channels, height, width) = ctx.size, ctx.shape
        rows, columns = gradient.shape[2:]
        own = torch.arange(size * size, dtype=torch.int8, device=place.device).view(size, 1, size)
        if place.is_contiguous(memory_format=torch.channels_last):
            # pixels with the channels last, so that what is computed is stored in that order
            place, gradient = (x.permute(0, 2, 3, 1)[:, :, None, :, None] for x in (place, gradient))
            pixels = torch.where(place == own[..., None], gradient, 0)
            pixels = pixels.view(n, rows * size, columns * size, channels).permute(0, 3, 1, 2)
        else:
            place, gradient = (x[:, :, :, None, :, None] for x in (place, gradient))
            pixels = torch.where(place == own, gradient, 0).view(n, channels, rows * size, columns * size)
        # what a last, incomplete window would have covered
        rest = height - rows * size, width - columns * size
        return (F.pad(pixels, (0, rest[1], 0, rest[0])) if any(rest) else pixels), None


def exporting() -> bool:
    """Whether torch.export or the ONNX exporter is tracing: both have an operator for max-pooling."""
    # the flag that is_exporting() returns: the call itself is True inside torch.compile in torch
    # 2.8 to 2.11 at least (pytorch/pytorch#176347)
    flag = getattr(torch.compiler, "_is_exporting_flag", torch.compiler.is_exporting())
    return torch.onnx.is_in_onnx_export() or bool(flag)


class MaxPool(nn.MaxPool2d):
    """`nn.MaxPool2d(size)` (stride the same, no padding) that uses WindowMax where that is the faster of the two.

    That is inside torch.compile, where a gradient is wanted. Uncompiled, torch's one kernel beats WindowMax's dozen.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and images.requires_grad
        if wanted and torch.compiler.is_compiling() and not exporting():
            return WindowMax.apply(images, self.size)  # type: ignore[no-any-return]
        return super().forward(images)  # type: ignore[no-any-return]

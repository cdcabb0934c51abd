"""The images of a split on the device, decoded, padded and mirrored once: what both graphs gather from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dali_pipeline.dataset import Split


def to_device(array: npt.NDArray[np.int64 | np.bool_ | np.uint8], device: torch.device) -> Tensor:
    """The array as a tensor on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload(array: npt.NDArray[np.uint8 | np.int64], device: torch.device) -> Tensor:
    """The array as a tensor on the device: on the CPU the same memory with the same strides, elsewhere a contiguous copy."""
    if not array.flags.writeable:  # torch has no read-only tensors and warns
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.contiguous().to(device)


def resident_images(
    split: Split,
    device: torch.device,
    *,
    border: int = 0,
    reflect: bool = False,
    mirrored: bool = False,
    slots: int | None = None,
) -> Tensor:
    """The images as (slots, H + 2*border, W + 2*border, 3) uint8 on the device.

    The border is black, or the image reflected without its edge. `mirrored` appends every image once more, flipped left
    to right, from slot N on. Slots beyond the images are black. This is torch rather than DALI because it happens once
    a run, as a few copies, where DALI would do its bookkeeping for each of 50,000 samples.
    """
    pixels = upload(split.pixels, device)
    num_images, height, width = len(split), split.height, split.width
    used = num_images * (2 if mirrored else 1)
    shape = (used if slots is None else slots, height + 2 * border, width + 2 * border, 3)
    out = torch.zeros(shape, dtype=torch.uint8, device=device)
    images = out[:num_images]
    images[:, border : border + height, border : border + width] = (
        pixels.permute(0, 2, 3, 1) if split.planar else pixels
    )
    if reflect:
        for axis, size in ((1, height), (2, width)):  # rows first, then columns with the corners
            first, last = border, border + size - 1
            for k in range(1, border + 1):
                images.select(axis, first - k).copy_(images.select(axis, first + k))
                images.select(axis, last + k).copy_(images.select(axis, last - k))
    if mirrored:
        for first in range(0, num_images, 4096):  # in pieces: flip() makes a copy
            piece = images[first : first + 4096]
            out[num_images + first :][: len(piece)] = piece.flip(2)
    return out

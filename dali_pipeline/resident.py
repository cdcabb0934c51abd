"""The images of a split on the device: decoded, padded and mirrored by torch, once before the training and not for every batch.

dali_pipeline/dali_decode.py does the same with DALI, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dali_pipeline.dataset import Split

PIECE = 4096  # images that are copied at once


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


def empty_slots(split: Split, device: torch.device, *, border: int, mirrored: bool, slots: int | None) -> Tensor:
    """Black images (slots, H + 2*border, W + 2*border, 3) uint8 on the device. A slot is the place of one image; by default
    there are as many as images, mirrored copies included."""
    used = len(split) * (2 if mirrored else 1)
    shape = (used if slots is None else slots, split.height + 2 * border, split.width + 2 * border, 3)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


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
    to right, from slot N on. Slots beyond the images are black.
    """
    num_images, height, width = len(split), split.height, split.width
    out = empty_slots(split, device, border=border, mirrored=mirrored, slots=slots)
    images = out[:num_images]
    inner = images[:, border : border + height, border : border + width]
    for start in range(0, num_images, PIECE):
        pixels = upload(split.gather(slice(start, start + PIECE)), device)
        inner[start : start + PIECE] = pixels.permute(0, 2, 3, 1) if split.planar else pixels
    if reflect:
        reflect_borders(images, border)
    if mirrored:
        for first in range(0, num_images, PIECE):  # in pieces: flip() makes a copy
            piece = images[first : first + PIECE]
            out[num_images + first :][: len(piece)] = piece.flip(2)
    return out


def reflect_borders(images: Tensor, border: int) -> None:
    """Fill the borders of images (N, H + 2*border, W + 2*border, 3) with the image reflected without its edge."""
    for axis in (1, 2):  # rows first, then columns with the corners
        first, last = border, images.shape[axis] - border - 1
        for k in range(1, border + 1):
            images.select(axis, first - k).copy_(images.select(axis, first + k))
            images.select(axis, last + k).copy_(images.select(axis, last - k))

"""A plan applied in plain torch, on any device, to images that stay resident there.

A crop is a window of the padded image, and a window is one strided view: gathering n of them is a single index_select.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .plan import Augment, Plan


class Records(Protocol):
    """What the graphs read of a `datasets.Split`: (N, label_bytes + 3*height*width) uint8, label, then planar RGB."""

    @property
    def records(self) -> npt.NDArray[np.uint8]: ...
    @property
    def label_bytes(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


def to_device(array: npt.NDArray[np.int64 | np.bool_ | np.uint8], device: torch.device) -> Tensor:
    """The array as a tensor on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload(split: Records, device: torch.device) -> Tensor:
    """The raw records on the device, as they are (on the CPU: the same memory)."""
    records = split.records
    if not records.flags.writeable:  # torch has no read-only tensors and warns
        records = records.copy()
    return torch.from_numpy(records).to(device)


def decode_labels(records: Tensor, split: Records) -> Tensor:
    """(N,) int64: the last label byte of each record."""
    return records[:, split.label_bytes - 1].long()


def decode_images(
    records: Tensor,
    split: Records,
    *,
    border: int = 0,
    reflect: bool = False,
    mirrored: bool = False,
    slots: int | None = None,
) -> Tensor:
    """Planar records to (slots, H + 2*border, W + 2*border, 3) uint8 on the device that they are on.

    The border is black, or the image reflected without its edge. `mirrored` appends every image once more, flipped left
    to right, from slot N on. Slots beyond the images are black. This is torch rather than DALI because it happens once
    a run, as a few copies, where DALI would keep books on each of 50,000 samples.
    """
    num_images, height, width = len(records), split.height, split.width
    used = num_images * (2 if mirrored else 1)
    shape = (used if slots is None else slots, height + 2 * border, width + 2 * border, 3)
    out = torch.zeros(shape, dtype=torch.uint8, device=records.device)
    images = out[:num_images]
    planar = records[:, split.label_bytes :].view(num_images, 3, height, width)
    images[:, border : border + height, border : border + width] = planar.permute(0, 2, 3, 1)
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


def resident_windows(
    plan: Plan, num_images: int, augment: Augment
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each image's slot (n,) among images and mirrored images, and the (row, column) (n, 2) at which its window starts,
    from the image's own corner. Mirroring the cropped image is cropping the mirrored one at the mirrored column."""
    slot = plan.indices + num_images * plan.flip
    if not augment.crop:
        return slot, np.zeros((len(plan), 2), np.int64)
    column = np.where(plan.flip, 2 * augment.pad - plan.dx, plan.dx)
    return slot, np.stack([plan.dy, column], 1) - augment.pad


class TorchGraph:
    """Applies plans to the images of `records`, which it keeps on their device, decoded, padded and mirrored.

    `compiled` fuses gather and cutout into one kernel with torch.compile, and falls back to eager with a warning where
    no compiler is found. Its figures stand with DALI's at the head of dali_graph.py.
    """

    def __init__(
        self, records: Tensor, split: Records, augment: Augment, fill: tuple[int, int, int], *, compiled: bool = False
    ) -> None:
        self._device = records.device
        self._augment = augment
        self._num_images = len(records)
        self._border = augment.pad if augment.crop else 0
        images = decode_images(
            records, split, border=self._border, reflect=augment.padding_mode == "reflect", mirrored=augment.flip
        )
        slots, self._rows, self._columns, _ = images.shape
        self._height, self._width = split.height, split.width
        starts = slots * self._rows * self._columns - (self._height - 1) * self._columns - self._width + 1
        self._windows = images.view(-1).as_strided((starts, self._height, self._width * 3), (3, self._columns * 3, 1))
        self._labels = decode_labels(records, split)
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=self._device).repeat(self._width)
        self._row_hole = _holes(self._height, augment.cutout).to(self._device)
        self._column_hole = _holes(self._width, augment.cutout).repeat_interleave(3, 1).to(self._device)
        self._apply = _gather_and_cut if augment.cutout else _gather
        self._compiled = torch.compile(self._apply, dynamic=False) if compiled else None

    def batch(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """(images, labels) of a plan of n images: (n, 3, H, W) uint8, channels-last, and (n,) int64."""
        slot, window = resident_windows(plan, self._num_images, self._augment)
        window += self._border
        start = (slot * self._rows + window[:, 0]) * self._columns + window[:, 1]
        staged = to_device(np.stack([plan.indices, start, plan.cy, plan.cx]), self._device)
        arguments = (self._windows, staged, self._fill, self._row_hole, self._column_hole)
        with torch.no_grad():
            images = self._run(*arguments).view(-1, self._height, self._width, 3)
            return images.permute(0, 3, 1, 2), self._labels[staged[0]]

    def _run(self, *arguments: Tensor) -> Tensor:
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # inductor looks for its compiler at the first call, and raises what it likes
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"the torch input pipeline runs eagerly: {reason}", RuntimeWarning, stacklevel=4)
                self._compiled = None
        return self._apply(*arguments)


def _holes(size: int, cutout: int) -> Tensor:
    """(size, size) uint8: row c is 255 where a cutout centred at c paints, 0 elsewhere."""
    offset = torch.arange(size) - torch.arange(size)[:, None] + cutout // 2
    return ((offset >= 0) & (offset < cutout)).to(torch.uint8) * 255


def _gather(windows: Tensor, staged: Tensor, fill: Tensor, row_hole: Tensor, column_hole: Tensor) -> Tensor:
    return windows.index_select(0, staged[1])


def _gather_and_cut(windows: Tensor, staged: Tensor, fill: Tensor, row_hole: Tensor, column_hole: Tensor) -> Tensor:
    out = windows.index_select(0, staged[1])
    hole = row_hole[staged[2]][:, :, None] & column_hole[staged[3]][:, None, :]
    return out ^ ((out ^ fill) & hole)  # the fill where the mask is 255, in whole bytes: vectorises, where() does not

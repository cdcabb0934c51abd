"""A plan applied in plain torch, on any device, to images that stay resident there."""

from __future__ import annotations

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


def upload(split: Records, device: torch.device) -> Tensor:
    """The raw records on the device, as they are."""
    records = split.records
    if not records.flags.writeable:  # torch has no read-only tensors and warns
        records = records.copy()
    return torch.from_numpy(records).to(device)


def decode(records: Tensor, split: Records, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Splits resident records into images (N, H, W, 3) uint8 and labels (N,) int64, on the device that they are on.

    `mirrored` appends every image once more, flipped left to right: (2N, H, W, 3). Done in torch: it happens once a
    run, as one copy, where DALI would keep books on each of 50,000 samples.
    """
    num_images, height, width = len(records), split.height, split.width
    planar = records[:, split.label_bytes :].unflatten(1, (3, height, width))
    images = torch.empty((2 if mirrored else 1, num_images, height, width, 3), dtype=torch.uint8, device=records.device)
    images[0] = planar.permute(0, 2, 3, 1)
    if mirrored:
        images[1] = images[0].flip(2)
    return images.flatten(0, 1), records[:, split.label_bytes - 1].long()


def stage(plan: Plan, device: torch.device) -> Tensor:
    """The plan as one (6, n) int64 tensor on the device: indices, dy, dx, flip, cy, cx. Does not wait for the copy."""
    packed = torch.from_numpy(np.stack([plan.indices, plan.dy, plan.dx, plan.flip.astype(np.int64), plan.cy, plan.cx]))
    if device.type == "cuda":
        packed = packed.pin_memory()
    return packed.to(device, non_blocking=True)


def apply_plan(images: Tensor, plan: Tensor, fill: Tensor, augment: Augment) -> Tensor:
    """(N, H, W, 3) uint8 resident images and a staged plan -> (n, H, W, 3) uint8."""
    _, height, width, _ = images.shape
    indices, dy, dx, flip, cy, cx = plan.unbind(0)
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    y = rows.expand(len(indices), -1)
    x = columns.expand(len(indices), -1)
    if augment.flip:
        x = torch.where(flip[:, None].bool(), width - 1 - x, x)
    inside = None
    if augment.crop:
        y = y + (dy - augment.pad)[:, None]
        x = x + (dx - augment.pad)[:, None]
        if augment.padding_mode == "reflect":
            y = height - 1 - (height - 1 - y.abs()).abs()
            x = width - 1 - (width - 1 - x.abs()).abs()
        else:
            inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
            y = y.clamp(0, height - 1)
            x = x.clamp(0, width - 1)
    pixel = ((indices * height)[:, None] + y)[:, :, None] * width + x[:, None, :]
    out = images.view(-1, 3)[pixel]
    if inside is not None:
        out = torch.where(inside[..., None], out, 0)
    if augment.cutout:
        top = rows - (cy - augment.cutout // 2)[:, None]
        left = columns - (cx - augment.cutout // 2)[:, None]
        hole = ((top >= 0) & (top < augment.cutout))[:, :, None] & ((left >= 0) & (left < augment.cutout))[:, None, :]
        out = torch.where(hole[..., None], fill, out)
    return out


class TorchGraph:
    """Applies plans to resident images; `compiled` fuses it into one kernel with torch.compile."""

    def __init__(self, images: Tensor, augment: Augment, fill: tuple[int, int, int], *, compiled: bool = False) -> None:
        self._images = images
        self._augment = augment
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=images.device)
        self._apply = torch.compile(apply_plan, dynamic=False) if compiled else apply_plan

    def __call__(self, plan: Tensor) -> Tensor:
        """A staged plan of n images -> (n, 3, H, W) uint8, channels-last."""
        with torch.no_grad():
            return self._apply(self._images, plan, self._fill, self._augment).permute(0, 3, 1, 2)

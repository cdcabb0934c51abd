"""A plan applied by NVIDIA DALI, on the GPU or on DALI's CPU backend; the only module that imports nvidia.dali."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plan import Augment, Plan


def probe(device: torch.device) -> str:
    """Runs a trivial pipeline for the device and returns DALI's version; whatever fails raises as it is."""
    import nvidia.dali as dali
    from nvidia.dali import fn

    pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=device_id(device))
    with pipe:
        pipe.set_outputs(fn.constant(idata=[1], device="gpu" if device.type == "cuda" else "cpu"))
    pipe.run()
    return str(dali.__version__)


def device_id(device: torch.device) -> int | None:
    """DALI's name for a torch device: the GPU's index, None for the CPU backend."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


class DaliGraph:
    """Pulls plans of `batch_size` images from `source` and returns their images, some batches ahead of the caller.

    `images` (N, H, W, 3) uint8 lie on the device, with each image mirrored behind them, (2N, ...), if `augment.flip`.
    """

    prefetch_depth = 2

    def __init__(
        self,
        images: Tensor,
        source: Callable[[], Plan],
        batch_size: int,
        augment: Augment,
        fill: tuple[int, int, int],
        *,
        num_threads: int = 2,
    ) -> None:
        self._cuda = images.device.type == "cuda"
        self._device = images.device
        self._pipe = _build(images, source, batch_size, augment, fill, num_threads, self.prefetch_depth)

    def run(self) -> Tensor:
        """The images of the oldest plan pulled, (n, 3, H, W) uint8, channels-last: DALI's memory, not copied. DALI
        reuses none of it while the tensor lives; on the GPU it is ordered on torch's current stream."""
        if self._cuda:
            (batch,) = self._pipe.run(torch.cuda.current_stream(self._device))
        else:
            (batch,) = self._pipe.run()
        return torch.from_dlpack(batch.as_tensor()).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._pipe = None


def _build(
    images: Tensor,
    source: Callable[[], Plan],
    batch_size: int,
    augment: Augment,
    fill: tuple[int, int, int],
    num_threads: int,
    prefetch_depth: int,
) -> Any:
    import nvidia.dali as dali
    from nvidia.dali import fn

    _, height, width, _ = images.shape
    device = "gpu" if images.device.type == "cuda" else "cpu"
    half = len(images) // 2
    resident = images if device == "gpu" else images.numpy()

    def pull() -> tuple[Any, ...]:
        plan = source()
        rows = plan.indices + half * plan.flip if augment.flip else plan.indices
        if device == "gpu":
            batch = images.index_select(0, torch.from_numpy(rows).pin_memory().to(images.device, non_blocking=True))
        else:
            batch = resident.take(rows, axis=0)
        dx = np.where(plan.flip, 2 * augment.pad - plan.dx, plan.dx)
        start = np.stack([plan.dy, dx], 1).astype(np.int32) - augment.pad
        anchor = np.stack([plan.cy, plan.cx], 1).astype(np.int32) - augment.cutout // 2
        values = [batch, start if augment.crop else None, anchor.astype(np.float32) if augment.cutout else None]
        return tuple(value for value in values if value is not None)

    pipe = dali.Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id(images.device),
        prefetch_queue_depth=prefetch_depth,
    )
    with pipe:
        inputs = fn.external_source(pull, num_outputs=1 + augment.crop + bool(augment.cutout), layout=["HWC"])
        out = inputs[0]
        if augment.crop:
            policy = "pad" if augment.padding_mode == "zero" else "reflect_101"
            out = fn.slice(out, start=inputs[1], shape=[height, width], axis_names="HW", out_of_bounds_policy=policy)
        if augment.cutout:
            out = fn.erase(
                out, anchor=inputs[-1], shape=[augment.cutout] * 2, axis_names="HW", fill_value=[float(v) for v in fill]
            )
        pipe.set_outputs(out)
    pipe.build()
    return pipe

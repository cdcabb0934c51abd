"""A plan applied by NVIDIA DALI, on the GPU or on DALI's CPU backend.

DALI's cost at 32 x 32 is bookkeeping for each sample, so an image is no sample here: the data set lies on the device as
a few tall pictures of images stacked on top of each other, decoded once (dali_pipeline/dali_decode.py), and `multi_paste`
builds a batch as a few tall pictures too, one pasted rectangle an image (dali_pipeline/layout.py draws them). That one operator
gathers, flips (every image lies there mirrored as well), pads, crops and cuts out. benchmarks/dali_candidates.py measures it
against other graphs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dali_pipeline.dali import backend_of, device_id, import_dali
from dali_pipeline.dali_decode import decode_images
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.layout import MAX_PICTURES, TallPictures
from dali_pipeline.plan import Plan

PREFETCH_DEPTH = 2
# DALI's GPU kernel copies a row in blocks of this many bytes, a byte a thread. Where a row's last block has fewer bytes than
# a warp has threads, it reads beyond its table of rectangles.
_BLOCK_BYTES, _WARP = 256, 32
MAX_PICTURE_BYTES = 2**31 - 1  # DALI's GPU kernel computes offsets within a picture in 32 bits


class Unsupported(ValueError):
    """Images or batches of a shape that DALI cannot take; one line with the remedy."""


class DaliGraph:
    """Pulls plans of `order.batch_size` images from `source`, PREFETCH_DEPTH ahead of what it delivers; see `feed.Graph`.

    The two choices below give the same pixels and differ in speed alone:

    `cutout_by`: "paste" pastes a patch of the fill colour over the image; "erase" is an operator of its own, slower on the
    CPU, which on the GPU waits for DALI's stream twice a batch, in DALI's own thread.
    `padded`: whether the images lie on the device with a black border; by default on the GPU, where multi_paste cuts its
    output into a grid along every rectangle's edges, on the host, and so finds fewer edges.

    Raises Unsupported where a picture would exceed what DALI can address, and on a GPU for image widths at which its
    kernel reads beyond its tables.
    """

    def __init__(
        self,
        split: Split,
        order: FeedOrder,
        source: Callable[[], Plan],
        *,
        cutout_by: Literal["paste", "erase"] = "paste",
        padded: bool | None = None,
    ) -> None:
        augment, self._device = order.augment, order.device
        on_gpu = self._device.type == "cuda"
        if on_gpu and 0 < 3 * split.width % _BLOCK_BYTES < _WARP:
            raise Unsupported(
                f"DALI's GPU multi_paste reads beyond its tables at image width {split.width}; use data.backend=torch"
            )
        tall = TallPictures(
            len(split),
            split.height,
            split.width,
            order.batch_size,
            augment,
            padded=on_gpu if padded is None else padded,
            patched=cutout_by == "paste",
        )
        _, _, width, _ = tall.resident_shape
        if math.prod(tall.resident_shape[1:]) > MAX_PICTURE_BYTES:
            count = len(split) * (2 if augment.flip else 1)
            raise Unsupported(
                f"{count} images of {tall.pitch} x {width} in {tall.pictures} pictures exceed DALI's 2 GiB a picture; "
                f"take a batch size divisible by {MAX_PICTURES}, or data.backend=torch"
            )
        images = decode_images(
            split,
            self._device,
            border=tall.border,
            reflect=tall.reflect,
            mirrored=augment.flip,
            slots=tall.slots,
        )
        if tall.patch is not None:
            images[tall.patch] = torch.tensor(order.fill, dtype=torch.uint8, device=self._device)
        self._resident = images.view(tall.resident_shape)
        self._shape = (order.batch_size, split.height, split.width, 3)
        self._pictures_shape = tall.batch_shape
        self._pipe: Any = _build(self._resident, tall, lambda: tall.rectangles(source()), order.fill)
        if on_gpu:
            self._copy = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray

    def run(self) -> Tensor:
        """The images of the oldest plan pulled, (n, 3, H, W) uint8, channels-last, in memory that nothing else writes.

        On the GPU a copy (1.5 MB at 512 images) that is ready in the order of torch's current stream; the host waits for
        nothing. Sharing DALI's memory by DLPack would save that copy, but DALI frees shared GPU memory behind a
        cudaDeviceSynchronize a batch, in a thread of its own, which also disturbs a capture of CUDA graphs. On the CPU it
        is shared: DALI reuses none of it while the tensor lives.
        """
        if self._pipe is None:
            raise RuntimeError("the graph is closed")
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            (pictures,) = self._pipe.run(stream)
            images = torch.empty(self._pictures_shape, dtype=torch.uint8, device=self._device)
            self._copy(pictures.as_tensor(), images, cuda_stream=stream)
        else:
            (pictures,) = self._pipe.run()
            images = torch.utils.dlpack.from_dlpack(pictures.as_tensor().__dlpack__())
        return images.view(self._shape).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Stops DALI's threads and frees its memory, except for batches still held."""
        if self._pipe is not None:
            self._pipe = None
            if self._device.type == "cuda":  # batches under way read the resident images, which torch owns
                torch.cuda.synchronize(self._device)


def _build(
    resident: Tensor,
    tall: TallPictures,
    pull: Callable[[], tuple[npt.NDArray[np.int32 | np.float32], ...]],
    fill: tuple[int, int, int],
) -> Any:
    """The pipeline: `resident` pictures and the rectangles of the next batch in, the pictures of that batch out."""
    dali, fn = import_dali()
    pipe = dali.Pipeline(
        batch_size=tall.pictures,
        num_threads=1,  # a second one gained nothing: the batch is a third of a millisecond of copying
        device_id=device_id(resident.device),
        prefetch_queue_depth=PREFETCH_DEPTH,
    )
    _, height, width, _ = tall.batch_shape
    with pipe:
        images = fn.external_source(
            name="resident", device=backend_of(resident.device), layout="HWC", no_copy=True, repeat_last=True
        )
        rectangles = fn.external_source(pull, num_outputs=6 if tall.erases else 4)
        ids, source, shape, target = rectangles[:4]
        out = fn.multi_paste(
            images, in_ids=ids, in_anchors=source, shapes=shape, out_anchors=target, output_size=[height, width]
        )
        if tall.erases:
            anchor, hole = rectangles[4:]
            out = fn.erase(out, anchor=anchor, shape=hole, axis_names="HW", fill_value=[float(v) for v in fill])
        pipe.set_outputs(out)
    pipe.build()
    if resident.device.type == "cuda":
        # Fed once, read by DALI's own streams ever after: it has to be written by then.
        torch.cuda.current_stream(resident.device).synchronize()
        pipe.feed_input("resident", resident, layout="HWC")
    else:
        pipe.feed_input("resident", resident.numpy(), layout="HWC")  # a CPU tensor makes DALI ask for a CUDA stream
    return pipe

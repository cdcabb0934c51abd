"""A plan applied by NVIDIA DALI, on the GPU or on DALI's CPU backend.

At 32 x 32 pixels most of DALI's time is bookkeeping for each sample. So a sample here is not an image but a strip: images
stacked on top of each other (dali_pipeline/layout.py has a drawing). The data set lies on the device as a few strips, decoded
once (dali_pipeline/dali_decode.py). The operator `multi_paste` builds a batch as a few strips too, by pasting one rectangle for
each image. It gathers, flips (every image is stored mirrored as well), pads, crops and cuts out. Where the data set does not lie
on the device (data.resident), the strips hold the images of one batch, gathered on the host.
benchmarks/dali_candidates.py compares its speed with other graphs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from dali_pipeline.dali import backend_of, device_id, import_dali
from dali_pipeline.dali_decode import decode_images
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.layout import StripLayout
from dali_pipeline.plan import Plan
from dali_pipeline.streamed import Stream, left_to_apply

PREFETCH_DEPTH = 2  # batches that DALI builds ahead of the one in use
# Strips of a batch, at most. On a GPU DALI cuts each strip into a grid along the edges of all its rectangles, on the host, and
# sends the cells to the device: for 512 images of the default augmentation some 36,000 cells with 16 strips, 17,000 with 64. On
# the CPU only the bookkeeping for each strip counts (benchmarks/throughput.py --ablate strips compares them).
MOST_STRIPS = {"cuda": 64, "cpu": 8}
# DALI's GPU kernel copies a row in blocks of this many bytes, one thread for each byte. Where the last block of a row has fewer
# bytes than a warp has threads, the kernel reads beyond its table of rectangles.
_BLOCK_BYTES, _WARP = 256, 32
MAX_STRIP_BYTES = 2**31 - 1  # DALI's GPU kernel computes offsets within a strip in 32 bits


class Unsupported(ValueError):
    """DALI cannot process images or batches of this shape; the message is one line with the remedy."""


class DaliGraph:
    """Pulls plans of `order.batch_size` images from `source`, PREFETCH_DEPTH ahead of what it delivers; see `feed.Graph`.

    The choices below give the same pixels and differ only in speed:

    `cutout_by`: "paste" pastes a patch of the fill colour over the image. "erase" uses DALI's erase operator, which is slower
    on the CPU, and on the GPU waits for DALI's stream twice for each batch (in DALI's own thread).
    `padded`: whether the resident images have a black border. The default is yes on a GPU and no on a CPU. On a GPU
    multi_paste cuts its output into a grid along the edges of all rectangles, on the host; with borders every rectangle has
    the size of an image, which leaves fewer edges.

    `most_strips`: the strips of a batch, at most; by default MOST_STRIPS of the device.

    Raises Unsupported where a strip would exceed what DALI can address, and on a GPU for image widths at which its
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
        most_strips: int | None = None,
    ) -> None:
        streamed = order.resident == "never"
        augment, self._device = left_to_apply(order.augment) if streamed else order.augment, order.device
        on_gpu = self._device.type == "cuda"
        if on_gpu and 0 < 3 * split.width % _BLOCK_BYTES < _WARP:
            raise Unsupported(
                f"DALI's GPU multi_paste reads beyond its tables at image width {split.width}; use data.backend=torch"
            )
        layout = StripLayout(
            order.batch_size if streamed else len(split),
            split.height,
            split.width,
            order.batch_size,
            augment,
            padded=on_gpu if padded is None else padded,
            patched=cutout_by == "paste",
            most_strips=most_strips or MOST_STRIPS[self._device.type],
        )
        _, _, width, _ = layout.resident_shape
        if math.prod(layout.resident_shape[1:]) > MAX_STRIP_BYTES:
            count, most = len(split) * (2 if augment.flip else 1), MOST_STRIPS[self._device.type]
            raise Unsupported(
                f"{count} images of {layout.pitch} x {width} in {layout.strips} strips exceed DALI's 2 GiB a strip; "
                f"take a batch size divisible by {most}, data.resident=never, or data.backend=torch"
            )
        self._shape = (order.batch_size, split.height, split.width, 3)
        self._strips_shape = layout.batch_shape
        self._resident: Tensor | None = None
        self._stream: Stream | None = None
        if streamed:
            self._stream = stream = Stream(
                split,
                order.augment,
                source,
                target=torch.device("cpu"),
                border=layout.border,
                slots=layout.slots,
                spare=order.fill,
            )

            def pull() -> tuple[npt.NDArray[Any], ...]:
                with stream.next() as staged:  # DALI copies what it is fed before it asks again
                    return staged.images.view(layout.resident_shape).numpy(), *layout.rectangles(staged.plan)

        else:

            def pull() -> tuple[npt.NDArray[Any], ...]:
                return layout.rectangles(source())

            images = decode_images(
                split,
                self._device,
                border=layout.border,
                reflect=layout.reflect,
                mirrored=augment.flip,
                slots=layout.slots,
            )
            if layout.patch is not None:
                images[layout.patch] = torch.tensor(order.fill, dtype=torch.uint8, device=self._device)
            self._resident = images.view(layout.resident_shape)
        self._pipe: Any = _build(self._device, layout, self._resident, pull, order.fill)
        if on_gpu:
            self._copy = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray

    def run(self) -> Tensor:
        """The images of the oldest plan pulled, (n, 3, H, W) uint8, channels-last, in memory that nothing else writes.

        On a GPU this is a copy (1.5 MB for 512 images), made on torch's current stream; the host does not wait for it. Sharing
        DALI's memory by DLPack would save the copy, but DALI then calls cudaDeviceSynchronize for every batch before it
        frees the shared memory, in a thread of its own, which also disturbs the capture of CUDA graphs. On the CPU the
        memory is shared: DALI does not reuse it as long as the tensor exists.
        """
        if self._pipe is None:
            raise RuntimeError("the graph is closed")
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            (strips,) = self._pipe.run(stream)
            images = torch.empty(self._strips_shape, dtype=torch.uint8, device=self._device)
            self._copy(strips.as_tensor(), images, cuda_stream=stream)
        else:
            (strips,) = self._pipe.run()
            images = torch.utils.dlpack.from_dlpack(strips.as_tensor().__dlpack__())
        return images.view(self._shape).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Stops DALI's threads and frees its memory, except for batches still held."""
        if self._pipe is not None:
            self._pipe = None
            if self._stream is not None:
                self._stream.close()
            if self._device.type == "cuda":  # batches under way read the resident images, which torch owns
                torch.cuda.synchronize(self._device)


def _build(
    device: torch.device,
    layout: StripLayout,
    resident: Tensor | None,
    pull: Callable[[], tuple[npt.NDArray[Any], ...]],
    fill: tuple[int, int, int],
) -> Any:
    """DALI's pipeline. Its inputs are strips of images and the rectangles of a batch, its output the strips of the batch. The
    images are the `resident` ones; where there are none, `pull` gives those of each batch, on the host."""
    dali, fn = import_dali()
    pipe = dali.Pipeline(
        batch_size=layout.strips,
        num_threads=1,  # a batch is well below a millisecond of copying, too little to share
        device_id=device_id(device),
        prefetch_queue_depth=PREFETCH_DEPTH,
    )
    _, height, width, _ = layout.batch_shape
    with pipe:
        count = 6 if layout.erases else 4
        if resident is None:
            images, *rectangles = fn.external_source(pull, num_outputs=1 + count, layout=["HWC"] + [""] * count)
            images = images.gpu() if device.type == "cuda" else images
        else:
            images = fn.external_source(
                name="resident", device=backend_of(device), layout="HWC", no_copy=True, repeat_last=True
            )
            rectangles = fn.external_source(pull, num_outputs=count)
        ids, source, shape, target = rectangles[:4]
        out = fn.multi_paste(
            images, in_ids=ids, in_anchors=source, shapes=shape, out_anchors=target, output_size=[height, width]
        )
        if layout.erases:
            anchor, hole = rectangles[4:]
            out = fn.erase(out, anchor=anchor, shape=hole, axis_names="HW", fill_value=[float(v) for v in fill])
        pipe.set_outputs(out)
    pipe.build()
    if resident is None:
        return pipe
    if device.type == "cuda":
        # The strips are fed once. DALI's own streams read them for every batch, so they must be complete before that.
        torch.cuda.current_stream(resident.device).synchronize()
        pipe.feed_input("resident", resident, layout="HWC")
    else:
        pipe.feed_input("resident", resident.numpy(), layout="HWC")  # a CPU tensor makes DALI ask for a CUDA stream
    return pipe

"""A plan applied by NVIDIA DALI, on the GPU or on DALI's CPU backend; the only module that imports nvidia.dali.

DALI's cost at 32 x 32 is bookkeeping for each sample, so an image is no sample here: the data set lies on the device as
a few tall pictures of images stacked on top of each other, and `multi_paste` builds a batch as a few tall pictures too,
one pasted rectangle an image. That one operator gathers, flips (every image lies there mirrored as well), pads, crops
and cuts out. Images per second of processor time at batch 512, uint8, all augmentations, on a busy 2-core
2.6 GHz Xeon (two runs of 5 rounds of benchmarks/dali_candidates.py --threads 1):

    this graph                                   349k, 376k; on a free core and a half, 460-630k a second
    the same with `erase` for the cutout         304k, 295k
    one sample an image: gather, slice, erase     91k,  91k
    torch_graph, eager and compiled              261k, 267k and 467k, 492k
    torchvision's DataLoader, PIL, 2 workers     3.0k, 3.7k a second, on the same busy cores
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .plan import Augment, Plan, draw_plan
from .torch_graph import Records, TorchGraph, decode_images, resident_windows, upload

PREFETCH_DEPTH = 2
MAX_PICTURES = 16  # tall pictures a batch; see DaliGraph
_BLOCK_BYTES, _WARP = 256, 32  # DALI's GPU kernel: a row's last block has a byte for each thread, or reads astray
_MAX_PICTURE_BYTES = 2**31 - 1  # DALI's GPU kernel computes offsets within a picture in 32 bits


class Unsupported(ValueError):
    """Images or batches of a shape that DALI cannot take; one line with the remedy."""


class WrongPixels(Exception):
    """DALI runs, and gives other pixels than the plan asks for."""


def probe(device: torch.device) -> str:
    """DALI's version, once its graph has given on the device, image by image, the pixels that torch gives on the CPU.

    Three batches of small random images, several to a picture, every augmentation on: as many as are prefetched and one
    more. Raises WrongPixels where they differ; whatever else fails raises as it is.
    """
    dali, _ = _import_dali()
    split = _RandomRecords()
    augment, fill = Augment(pad=2, cutout=4), (1, 2, 3)
    plan = draw_plan(0, 0, len(split.records), augment, (split.height, split.width))
    batches = [plan.take(slice(start, start + 24)) for start in range(0, len(plan), 24)]
    source = itertools.cycle(batches).__next__
    graph = DaliGraph(upload(split, device), split, source, 24, augment, fill)
    try:
        got = torch.cat([graph.run().cpu() for _ in batches])
    finally:
        graph.close()
    expected, _ = TorchGraph(upload(split, torch.device("cpu")), split, augment, fill).batch(plan)
    wrong = int((got != expected).flatten(1).any(1).sum())
    if wrong:
        raise WrongPixels(f"{wrong} of {len(plan)} images differ from the reference")
    return str(dali.__version__)


class _RandomRecords:
    """72 images of 8 x 16 in the records' form."""

    label_bytes, height, width = 1, 8, 16

    def __init__(self) -> None:
        shape = (72, self.label_bytes + 3 * self.height * self.width)
        self.records = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _import_dali() -> tuple[Any, Any]:
    return importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.fn")


class DaliGraph:
    """Pulls plans of `batch_size` images from `source` and returns their images, PREFETCH_DEPTH batches later.

    A batch is built as `pictures` (the largest divisor of the batch size up to MAX_PICTURES) of equal height: enough to
    spread over a GPU's blocks, whose threads also search the list of a picture's rectangles, and few enough to cost
    nothing. The two choices below differ in speed alone:

    `cutout_by`: "paste" pastes a patch of the fill colour over the image; "erase" is an operator of its own, slower on the
    CPU, which on the GPU waits for DALI's stream twice a batch, in DALI's own thread.
    `padded`: whether the images lie on the device with their border. Reflected borders always do. Black ones need not,
    as multi_paste leaves black what it does not paste; on the GPU they do, since it cuts its output into a grid along
    every rectangle's edges, on the host, and so finds fewer edges.

    Raises Unsupported where a picture would exceed what DALI can address, and on a GPU for image widths that its kernel
    does not stand.
    """

    def __init__(
        self,
        records: Tensor,
        split: Records,
        source: Callable[[], Plan],
        batch_size: int,
        augment: Augment,
        fill: tuple[int, int, int],
        *,
        cutout_by: Literal["paste", "erase"] = "paste",
        padded: bool | None = None,
    ) -> None:
        self._device = records.device
        self._shape = (batch_size, split.height, split.width, 3)
        reflect = augment.padding_mode == "reflect"
        if self._device.type == "cuda" and 0 < 3 * split.width % _BLOCK_BYTES < _WARP:
            raise Unsupported(
                f"DALI's GPU multi_paste reads beyond its tables at image width {split.width}; use data.backend=torch"
            )
        if padded is None:
            padded = self._device.type == "cuda"
        if augment.pad >= min(split.height, split.width):  # a window may lie wholly in the border: nothing to paste
            padded = True
        border = augment.pad if augment.crop and (padded or reflect) else 0
        patch = augment.cutout > 0 and cutout_by == "paste"
        used = len(records) * (2 if augment.flip else 1)
        pictures = next(n for n in range(min(MAX_PICTURES, batch_size), 0, -1) if batch_size % n == 0)
        stack = -(-(used + patch) // pictures)
        height, width = split.height + 2 * border, split.width + 2 * border
        if stack * height * width * 3 > _MAX_PICTURE_BYTES:
            raise Unsupported(
                f"{used} images of {height} x {width} in {pictures} pictures exceed DALI's 2 GiB a picture; "
                f"take a batch size divisible by {MAX_PICTURES}, or data.backend=torch"
            )
        images = decode_images(
            records, split, border=border, reflect=reflect, mirrored=augment.flip, slots=stack * pictures
        )
        if patch:
            images[used] = torch.tensor(fill, dtype=torch.uint8, device=self._device)
        self._resident = images.view(pictures, stack * height, width, 3)
        regions = _Regions(
            source=source,
            augment=augment,
            num_images=len(records),
            size=np.array([split.height, split.width]),
            border=border,
            pitch=height,
            stack=stack,
            base=np.arange(batch_size) % (batch_size // pictures) * split.height,
            pictures=pictures,
            patch=used if patch else None,
        )
        rows = batch_size // pictures * split.height
        self._pictures_shape = (pictures, rows, split.width, 3)
        self._pipe: Any = _build(self._resident, regions, rows, split.width, fill)
        if self._device.type == "cuda":
            self._copy = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray

    def run(self) -> Tensor:
        """The images of the oldest plan pulled, (n, 3, H, W) uint8, channels-last, in memory that nothing else writes.

        On the GPU a copy (1.5 MB at 512 images) that is ready in the order of torch's current stream; the host waits for
        nothing. Sharing DALI's memory by DLPack would save that copy, but DALI frees shared GPU memory behind a
        cudaDeviceSynchronize a batch, in a thread of its own, which also disturbs a capture of CUDA graphs. On the CPU it
        is shared: DALI reuses none of it while the tensor lives.
        """
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


class _Regions:
    """Plans as the rectangles of multi_paste: (pictures, rectangles of a picture, ...) arrays of (row, column) pairs."""

    def __init__(
        self,
        *,
        source: Callable[[], Plan],
        augment: Augment,
        num_images: int,
        size: npt.NDArray[np.int64],
        border: int,
        pitch: int,
        stack: int,
        base: npt.NDArray[np.int64],
        pictures: int,
        patch: int | None,
    ) -> None:
        self._source = source
        self._augment = augment
        self._num_images = num_images
        self._size = size  # (height, width)
        self._border = border  # what of the padding lies on the device
        self._pitch = pitch  # rows from one resident image to the next
        self._stack = stack  # images in a resident picture
        self._base = base  # (n,) first row of each image in its output picture
        self._pictures = pictures
        self._patch = patch  # slot of the resident image that is all fill colour
        self.erases = augment.cutout > 0 and patch is None

    def pull(self) -> tuple[npt.NDArray[np.int32 | np.float32], ...]:
        """in_ids, in_anchors, shapes, out_anchors of the next plan; with `erases` also anchors and shapes for erase."""
        plan = self._source()
        slot, window = resident_windows(plan, self._num_images, self._augment)
        layers = 1 if self._patch is None else 2  # what is pasted later lies on top
        ids = np.empty((len(plan), layers), np.int32)
        source, shape, target = (np.empty((len(plan), layers, 2), np.int32) for _ in range(3))

        picture, place = np.divmod(slot, self._stack)
        start = np.maximum(window, -self._border)
        ids[:, 0] = picture
        source[:, 0] = start + self._border
        source[:, 0, 0] += place * self._pitch
        shape[:, 0] = np.minimum(window + self._size, self._size + self._border) - start
        target[:, 0] = start - window
        target[:, 0, 0] += self._base

        if not self._augment.cutout:
            return self._split(ids, source, shape, target)
        window = np.stack([plan.cy, plan.cx], 1) - self._augment.cutout // 2
        start = np.maximum(window, 0)
        hole = np.minimum(window + self._augment.cutout, self._size) - start
        start[:, 0] += self._base
        if self._patch is None:
            erase = (pair.astype(np.float32).reshape(self._pictures, -1) for pair in (start, hole))
            return *self._split(ids, source, shape, target), *erase
        ids[:, 1] = self._patch // self._stack
        source[:, 1] = (self._patch % self._stack * self._pitch, 0)
        shape[:, 1] = hole
        target[:, 1] = start
        return self._split(ids, source, shape, target)

    def _split(
        self, ids: npt.NDArray[np.int32], *pairs: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32 | np.float32], ...]:
        return ids.reshape(self._pictures, -1), *(pair.reshape(self._pictures, -1, 2) for pair in pairs)


def _build(resident: Tensor, regions: _Regions, height: int, width: int, fill: tuple[int, int, int]) -> Any:
    """The pipeline: `resident` pictures in, as many pictures of height x width out."""
    dali, fn = _import_dali()
    pipe = dali.Pipeline(
        batch_size=len(resident),
        num_threads=1,  # a second one gained nothing: the batch is a third of a millisecond of copying
        device_id=_device_id(resident.device),
        prefetch_queue_depth=PREFETCH_DEPTH,
    )
    with pipe:
        images = fn.external_source(
            name="resident", device=_backend(resident.device), layout="HWC", no_copy=True, repeat_last=True
        )
        rectangles = fn.external_source(regions.pull, num_outputs=6 if regions.erases else 4)
        ids, source, shape, target = rectangles[:4]
        out = fn.multi_paste(
            images, in_ids=ids, in_anchors=source, shapes=shape, out_anchors=target, output_size=[height, width]
        )
        if regions.erases:
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


def _device_id(device: torch.device) -> int | None:
    """DALI's name for a torch device: the GPU's index, None for the CPU backend."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _backend(device: torch.device) -> Literal["gpu", "cpu"]:
    return "gpu" if device.type == "cuda" else "cpu"

"""The images of a split decoded by NVIDIA DALI on the device, once before the training instead of for every batch.

Decoding turns the colour planes of CIFAR's records into pixels (height, width, channel) and adds the border and the mirrored
copies. DALI's bookkeeping for each sample takes longer than the work on an image of this size, so one sample holds up to
10,000 images as the frames of a sequence. dali_pipeline/resident.py does the same in torch, bit for bit.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from dali_pipeline.dali import backend_of, device_id, import_dali
from dali_pipeline.dataset import Pixels, Split
from dali_pipeline.processors import usable_processors
from dali_pipeline.resident import empty_slots, upload

# A sample holds as many images as both limits allow: 10,000 of CIFAR's, fewer of larger ones. DALI's GPU flip launches a grid
# with one layer for each frame. CUDA allows 65,535 layers, and DALI does not check whether the launch succeeded.
SAMPLE_IMAGES, SAMPLE_BYTES = 10_000, 64 << 20


def decode_images(
    split: Split,
    device: torch.device,
    *,
    border: int = 0,
    reflect: bool = False,
    mirrored: bool = False,
    slots: int | None = None,
) -> Tensor:
    """The images as (slots, H + 2*border, W + 2*border, 3) uint8 on the device: what `resident_images` gives, by DALI.

    The pixels go to the device in chunks: one sample on a GPU, one for each thread on the CPU. When this returns the result is
    complete for every stream, and DALI's pipeline is freed.

    Peak memory of the device: the result and one chunk (its pixels as they came, decoded, padded and mirrored). For
    the 50,000 training images of CIFAR-10 with a border of 4 and mirrored copies, that is 480 MB of result (100,032 slots of
    40 x 40 x 3 bytes) and at most 157 MB of chunk (10,000 times 2 * 32 * 32 * 3 + 2 * 40 * 40 * 3 bytes), which DALI's memory
    pool may keep for the batches to come.
    """
    out = empty_slots(split, device, border=border, mirrored=mirrored, slots=slots)
    pipe = _build(split, device, border=border, reflect=reflect, mirrored=mirrored)
    size = max(1, min(SAMPLE_IMAGES, SAMPLE_BYTES // math.prod(out.shape[1:]))) * _threads(device)
    for first in range(0, len(split), size):
        chunk = split.gather(slice(first, first + size))
        starts = (first, len(split) + first) if mirrored else (first,)
        _run(pipe, chunk, [out[start : start + len(chunk)] for start in starts])
    return out


def _run(pipe: Any, chunk: Pixels, targets: list[Tensor]) -> None:
    """Decodes a chunk into `targets`: the slots of its images and, with mirrored copies, the slots of the copies.

    When it returns they are written, and the chunk's memory can be reused for the next one. On the CPU fresh pages would cost
    half as much time again as the decoding."""
    device = targets[0].device
    threads = _threads(device)
    batch = (threads if len(chunk) % threads == 0 else 1, -1)  # samples, images in each
    pixels = upload(chunk, device).contiguous().unflatten(0, batch)
    if device.type == "cuda":
        copy = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray
        stream = torch.cuda.current_stream(device)
        stream.synchronize()  # DALI reads the pixels by streams of its own
        pipe.feed_input("pixels", pixels)
        for target, images in zip(targets, pipe.run(stream), strict=True):
            copy(images.as_tensor(), target.unflatten(0, batch), cuda_stream=stream)
        stream.synchronize()  # before the memory of the pixels is used again, and other streams read the images
    else:
        pipe.feed_input("pixels", pixels.numpy())  # a CPU tensor makes DALI ask for a CUDA stream
        for target, images in zip(targets, pipe.run(), strict=True):
            target.unflatten(0, batch).copy_(torch.utils.dlpack.from_dlpack(images.as_tensor().__dlpack__()))


def _build(split: Split, device: torch.device, *, border: int, reflect: bool, mirrored: bool) -> Any:
    """DALI's pipeline: its input is a chunk of pixels, its outputs are the images and, with `mirrored`, the mirrored images."""
    dali, fn = import_dali()
    threads = _threads(device)
    pipe = dali.Pipeline(
        batch_size=threads,
        num_threads=threads,
        device_id=device_id(device),
        prefetch_queue_depth=1,  # nothing is fed ahead
    )
    with pipe:
        layout = "FCHW" if split.planar else "FHWC"
        images = fn.external_source(name="pixels", device=backend_of(device), layout=layout, no_copy=True)
        if split.planar:
            images = fn.transpose(images, perm=[0, 2, 3, 1], output_layout="FHWC")
        if border:
            images = fn.slice(
                images,
                start=[-border, -border],
                shape=[split.height + 2 * border, split.width + 2 * border],
                axis_names="HW",
                out_of_bounds_policy="reflect_101" if reflect else "pad",
            )
        pipe.set_outputs(*((images, fn.flip(images)) if mirrored else (images,)))
    pipe.build()
    return pipe


def _threads(device: torch.device) -> int:
    """How many threads DALI gets. Each works on one sample, and on a GPU there is only one at a time."""
    return 1 if device.type == "cuda" else min(2, usable_processors()[0])

"""For scripts on the stand-in: its counters, where the host waited, and convolutions that have a shape and no values."""

from __future__ import annotations

import ctypes
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
_library = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
_library.standin_counter_name.restype = ctypes.c_char_p
_library.standin_launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_NAMES: list[str] = []
while _name := _library.standin_counter_name(len(_NAMES)):
    _NAMES.append(_name.decode())
_COUNTS = (ctypes.c_long * len(_NAMES)).in_dll(_library, "standin_counts")

WAITS: list[str] = []  # "cudaStreamSynchronize at train/trainer.py:12 in f"
CONVOLUTIONS: list[dict[str, Any]] = []


def _place() -> str:
    """The innermost of our own lines on this thread's stack."""
    ours = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(ROOT)) and frame.filename != __file__
    ]
    if not ours:
        return f"no line of ours, in thread {threading.current_thread().name}"
    frame = ours[-1]
    return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} in {frame.name}"


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _listen(kind: bytes, name: bytes) -> None:
    if kind != b"kernel":
        WAITS.append(f"{kind.decode()}: {name.decode()} at {_place()}")


_library.standin_listen(_listen)


@contextmanager
def counted() -> Iterator[dict[str, Any]]:
    """What the block did: every counter of the stand-in, and `places` where the host waited or did what is forbidden."""
    before, waits, result = list(_COUNTS), len(WAITS), {}
    yield result
    result.update({name: now - was for name, now, was in zip(_NAMES, _COUNTS, before, strict=True)})
    result["places"] = WAITS[waits:]


def _launch(name: str) -> None:
    _library.standin_launch(name.encode(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """torch's rule for cuDNN: channels-last if either is."""
    last = torch.channels_last
    either = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return last if either else torch.contiguous_format


def _note(what: str, x: Tensor, weight: Tensor, layout: torch.memory_format) -> None:
    CONVOLUTIONS.append(
        {
            "what": what,
            "images": list(x.shape),
            "weight": list(weight.shape),
            "dtype": str(x.dtype).removeprefix("torch."),
            "channels_last": layout is torch.channels_last,
        }
    )
    _launch(f"convolution_{what}")


def _forward(
    x: Tensor, weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *settings: Any
) -> Tensor:
    layout = _layout(x, weight)
    for t in (x, weight):
        t.contiguous(memory_format=layout)  # a copy, and so a kernel, where the two differ
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    _note("forward", x, weight, layout)
    return torch.empty((x.shape[0], weight.shape[0], *sides), dtype=x.dtype, device=x.device, memory_format=layout)


def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    layout = _layout(x, weight)
    gradient.contiguous(memory_format=layout)
    results: list[Tensor | None] = []
    for wanted, what, like in ((mask[0], "data", x), (mask[1], "weight", weight)):
        if wanted:
            _note(what, x, weight, layout)
        results.append(torch.empty_like(like, memory_format=layout) if wanted else None)
    return results[0], results[1], gradient.sum((0, 2, 3)) if mask[2] else None


_operators = torch.library.Library("aten", "IMPL")  # lives as long as the module
_operators.impl("cudnn_convolution", _forward, "CUDA")
_operators.impl("convolution_backward", _backward, "CUDA")


def answer_evaluations() -> None:
    """Make the sums of every evaluation ones: what was not computed has a count of zero, and that has no mean."""
    from train.step import evaluation

    computed = evaluation._totals

    def answered(*arguments: Any) -> Any:
        totals, kept = computed(*arguments)
        return totals.copy_(torch.ones(totals.shape)), kept

    evaluation._totals = answered

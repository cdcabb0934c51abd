"""Restores what a training changes in the whole process, for a caller that goes on with something else."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch

GiveBack = Callable[[], object]


@contextmanager
def process_as_found() -> Iterator[None]:
    """Restores the state of the process at the end of the block, also after an error: the default generators (random, NumPy,
    torch on all devices), the number of threads, torch's flags for deterministic algorithms, precision and cuDNN, the current
    GPU and the default dtype.

    The block itself runs with gradients enabled and float32 as the default dtype.
    """
    with ExitStack() as stack:
        for give_back in _as_found():
            stack.callback(give_back)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _as_found() -> list[GiveBack]:
    """Functions that each restore one setting that train/machine/runtime.py changes; to be called in reverse order."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    found: list[GiveBack] = [
        partial(logger.setLevel, logger.level),
        partial(_set_variable, "CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG")),
        partial(torch.set_default_dtype, dtype),
        partial(torch.set_num_threads, threads),
        partial(torch.use_deterministic_algorithms, deterministic, warn_only=warns),
        *_precisions(),
        _attribute(torch.backends.cudnn, "deterministic"),
        _attribute(torch.backends.cudnn, "benchmark"),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():  # asking an untouched GPU for its generators would make a context on it
        found.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        found.append(partial(torch.cuda.set_device, torch.cuda.current_device()))
    if torch.backends.mps.is_available():
        found.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return found


def _precisions() -> list[GiveBack]:
    """Restore the precision of matrix products and convolutions (TF32 and so on). torch has an old and a new interface for
    them, and setting the old one changes the new one. The new one is first in this list, so it is restored last: only it
    distinguishes "unset" from "set to the default"."""
    backends = torch.backends
    owners: list[Any] = [backends, backends.cuda.matmul, backends.cudnn, backends.mkldnn]
    owners += [
        getattr(of, name, None) for of in (backends.cudnn, backends.mkldnn) for name in ("conv", "rnn", "matmul")
    ]
    found = [_attribute(owner, "fp32_precision") for owner in owners if hasattr(owner, "fp32_precision")]
    with suppress(RuntimeError):  # a caller has used the new interface: reading the old one then fails
        found.append(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    with suppress(RuntimeError):
        found.append(_attribute(backends.cudnn, "allow_tf32"))
    return found


def _attribute(owner: Any, name: str) -> GiveBack:
    value = getattr(owner, name)

    def give_back() -> None:
        if getattr(owner, name) != value:
            setattr(owner, name, value)

    return give_back


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value

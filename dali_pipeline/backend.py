"""Chooses the backend that feeds the training, DALI or torch. DALI is tried on the device before it is used."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from dali_pipeline.dali import import_dali
from dali_pipeline.dali_graph import DaliGraph
from dali_pipeline.dataset import Split
from dali_pipeline.errors import UserError
from dali_pipeline.feed import FeedOrder
from dali_pipeline.plan import Augment, draw_plan
from dali_pipeline.torch_graph import TorchGraph

Backend = Literal["dali", "torch"]


class BackendError(UserError):
    """A backend cannot run here, or not on this data; one line with the cause and the remedy."""


class WrongPixels(Exception):
    """DALI runs, and gives other pixels than the plan asks for."""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that will be used; `reason` says why, for the log and a run's environment.json."""

    name: Backend
    reason: str


def choose_backend(requested: str, device: torch.device) -> BackendChoice:
    """Resolves `data.backend` (auto, dali or torch) by running DALI's graphs on small images on the device.

    auto takes DALI where that gives the right pixels, torch elsewhere. Raises BackendError for `dali` where it does not,
    ValueError for another name.
    """
    if requested not in ("auto", "dali", "torch"):
        raise ValueError(f"data.backend is {requested!r}, expected 'auto', 'dali' or 'torch'")
    where = f"on {device}"
    if requested == "torch":
        return BackendChoice("torch", f"torch {torch.__version__} {where}: requested")
    if device.type not in ("cuda", "cpu"):
        problem = f"DALI has no {device.type} backend; use data.backend=torch"
    else:
        try:
            version = probe(device)
        except Exception as error:  # ImportError, RuntimeError, AttributeError: in each case DALI cannot be used
            problem = _explain(error)
        else:
            if device.type == "cpu":
                where = "on its CPU backend: " + (
                    "the device is the CPU" if torch.cuda.is_available() else "no CUDA device"
                )
            return BackendChoice("dali", f"dali {version} {where}")
    if requested == "dali":
        raise BackendError(f"data.backend=dali cannot run {where}: {problem}")
    return BackendChoice("torch", f"torch {torch.__version__} {where}: {problem}")


def probe(device: torch.device) -> str:
    """DALI's version, once its graphs have given on the device, image by image, the pixels that torch gives on the CPU.

    The small random images come in planes, so that DALI decodes them too, with a black border and with a reflected one; then
    three batches of them, several images to a strip, every augmentation on: as many as are prefetched and one more. Raises
    WrongPixels where they differ; whatever else fails raises as it is.
    """
    dali, _ = import_dali()
    pixels = np.random.default_rng(0).integers(0, 256, (72, 3, 8, 16), dtype=np.uint8)
    split = Split(pixels, np.zeros(len(pixels), np.int64), planar=True)
    for mode in ("zero", "reflect"):
        order = FeedOrder(
            batch_size=24, augment=Augment(pad=2, padding_mode=mode, cutout=4), fill=(1, 2, 3), device=device
        )
        plan = draw_plan(0, 0, len(split), order.augment, (split.height, split.width))
        batches = [plan.take(slice(start, start + 24)) for start in range(0, len(plan), 24)]
        graph = DaliGraph(split, order, itertools.cycle(batches).__next__)
        try:
            got = torch.cat([graph.run().cpu() for _ in batches])
        finally:
            graph.close()
        expected = TorchGraph(split, replace(order, device=torch.device("cpu")), itertools.repeat(plan).__next__).run()
        wrong = int((got != expected).flatten(1).any(1).sum())
        if wrong:
            raise WrongPixels(f"{wrong} of {len(plan)} images differ from the reference")
    return str(dali.__version__)


def _explain(error: Exception) -> str:
    """Why DALI cannot be used, and what helps, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # DALI tells where in the pipeline first, and then what
    first_line = lines[lines.index("encountered:") + 1] if "encountered:" in lines[:-1] else lines[0]
    if isinstance(error, ImportError) and getattr(error, "name", None) in ("nvidia", "nvidia.dali"):
        return "DALI is not installed; it runs on Linux: pip install nvidia-dali-cuda120, or data.backend=torch"
    if isinstance(error, (ImportError, AttributeError)):
        return f"nvidia.dali does not import ({first_line}); reinstall nvidia-dali-cuda120, or data.backend=torch"
    if isinstance(error, WrongPixels):
        return (
            f"its pixels are wrong ({first_line}); use data.backend=torch, and report it with this machine's versions"
        )
    return f"a small pipeline fails ({first_line}); check the driver with nvidia-smi, or data.backend=torch"

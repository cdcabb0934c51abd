"""NVIDIA DALI, imported when it is needed, and its names for torch's devices."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch


def import_dali() -> tuple[Any, Any]:
    """nvidia.dali and nvidia.dali.fn: they are large, and missing on some systems."""
    return importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.fn")


def device_id(device: torch.device) -> int | None:
    """DALI's name for a torch device: the GPU's index, None for the CPU backend."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def backend_of(device: torch.device) -> Literal["gpu", "cpu"]:
    """DALI's name for the kind of a torch device."""
    return "gpu" if device.type == "cuda" else "cpu"

"""What a result was measured on, without naming the host."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from train.record import system_record


def machine_record(device: torch.device) -> dict[str, Any]:
    record = system_record() | {"platform": f"{platform.system()} {platform.machine()}"}
    record["memory_gib"] = _memory_gib()
    record["load_average_before"] = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
    record["torch_threads"] = torch.get_num_threads()
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return record


def _memory_gib() -> float | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal"):
                return round(int(line.split()[1]) / 2**20, 1)
    except OSError:
        pass
    return None

"""Facts about the machine and the software, for environment.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dali_pipeline.processors import usable_processors


def versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on, for environment.json."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    found["cuda"] = torch.version.cuda
    for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this source tree, with "+changes" where files differ from it; None outside a checkout, also where this is
    installed below another project's."""
    file = Path(__file__).resolve()
    here = file.parent
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", file.name]
        subprocess.run(tracked, capture_output=True, check=True, timeout=5)
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if dirty else "")


def cpu_name() -> str:
    """The processor as /proc/cpuinfo or the platform names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def system_facts() -> dict[str, Any]:
    """Machine facts for environment.json."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": usable_processors()[0],
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: of this process on the host, and of torch's allocator on the GPU."""
    peak = {}
    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        peak["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
    except ImportError:  # Windows
        pass
    if device.type == "cuda":
        peak["device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak

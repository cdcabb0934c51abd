"""The machine that a result was measured on, and the command, without the names of the host or its folders."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.machine.environment import system_facts

ROOT = Path(__file__).resolve().parent.parent
OWN_GIB = 1.5  # what CUDA, its modules and DALI take beside torch; a context alone is some 0.5
FOLDERS = ("data.root", "run.dir", "--data-root", "--folder", "--work")


def command(script: str, arguments: Sequence[str]) -> str:
    """The command line as others can repeat it."""
    return shlex.join(["python", f"benchmarks/{script}.py", *shareable(arguments)])


def shareable(arguments: Sequence[str]) -> list[str]:
    """The arguments without this machine's folders: paths inside the repository are relative to its root, any other path becomes
    FILE or DIR (data.root=DIR, --json FILE)."""
    words, option = [], ""
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"{name}={_place(name, value)}" if equals else _place(option, word))
        option = word if word.startswith("--") and not equals else ""
    return words


def _place(name: str, value: str) -> str:
    """A path as `command` gives it; any other value is itself."""
    if not (Path(value).is_absolute() or value.startswith("~") or ".." in Path(value).parts):
        return value
    path = Path(os.path.expanduser(value)).resolve()  # noqa: PTH111 - pathlib's raises where there is no such user
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return "DIR" if name in FOLDERS else "FILE"


def machine_facts(device: torch.device) -> dict[str, Any]:
    facts = system_facts() | {"platform": f"{platform.system()} {platform.machine()}"}
    facts["memory_gib"] = _memory_gib()
    facts["load_average_before"] = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
    facts["torch_threads"] = torch.get_num_threads()
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        free, total = torch.cuda.mem_get_info(device)
        facts["gpu_memory_taken_gib"] = round((total - free - torch.cuda.memory_reserved(device)) / 2**30, 1)
    return facts


def crowded(facts: dict[str, Any]) -> str | None:
    """A warning where other programs use the GPU; `facts` are machine_facts."""
    taken = facts.get("gpu_memory_taken_gib", 0.0)
    if taken <= OWN_GIB:
        return None
    return (
        f"WARNING: {taken} GiB of the GPU's memory are not torch's in this program: where other programs compute on it too, "
        "rates and times are no measure of it (nvidia-smi lists them)"
    )


def _memory_gib() -> float | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal"):
                return round(int(line.split()[1]) / 2**20, 1)
    except OSError:
        pass
    return None

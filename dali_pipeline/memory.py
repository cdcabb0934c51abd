"""Whether the images of a split fit the memory of the device that trains; what is free there, within the limits of containers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dali_pipeline.dataset import Split
from dali_pipeline.plan import Augment

Resident = Literal["auto", "always", "never"]

# Resident images may take this part of what is free: the network, its activations and the batches under way need the rest.
SHARE = 0.5


@dataclass(frozen=True)
class Residence:
    """Whether the images of a split lie on the device, or each batch is sent there; `reason` says why, for the log."""

    resident: bool
    reason: str


def choose_residence(
    requested: Resident, split: Split, augment: Augment, device: torch.device, processes: int = 1
) -> Residence:
    """Resolves data.resident: auto keeps the images on the device where they take at most SHARE of what is free there.

    `processes`: how many of them share a host's memory, each with images of its own. Memory whose size no one tells counts as
    enough.
    """
    if requested not in ("auto", "always", "never"):
        raise ValueError(f"data.resident is {requested!r}, expected 'auto', 'always' or 'never'")
    if requested != "auto":
        return Residence(requested == "always", f"data.resident={requested}")
    needed, free = resident_bytes(split, augment), free_bytes(device)
    if free is None:
        return Residence(True, f"{size(needed)}; how much is free on {device} is unknown")
    if device.type != "cuda":
        free //= processes
    return Residence(
        needed <= SHARE * free, f"{size(needed)} as resident images, {size(free)} free on {device} for this process"
    )


def resident_bytes(split: Split, augment: Augment) -> int:
    """What the images of a split take on the device, with their borders and mirrored copies."""
    border = augment.pad if augment.crop else 0
    copies = 2 if augment.flip else 1
    return copies * len(split) * (split.height + 2 * border) * (split.width + 2 * border) * 3


def size(count: int) -> str:
    """A number of bytes as a person reads it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on the device: on a GPU what the driver and torch's cache have free, elsewhere that of the
    host. None where it is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_free_bytes()


def host_free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory of the host that is free or can be reclaimed, and at most what each control group of this process leaves.
    None where the system does not tell it (it does on Linux)."""
    known = [free for free in (_available(proc / "meminfo"), *_left_by_groups(proc, cgroups)) if free is not None]
    return min(known, default=None)


def _available(meminfo: Path) -> int | None:
    kilobytes = _table(meminfo).get("MemAvailable:")
    return None if kilobytes is None else 1024 * kilobytes


def _left_by_groups(proc: Path, cgroups: Path) -> Iterator[int | None]:
    """What is left to the control groups that this process is in, and to those around them, of version 2 and version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield _left(group, limit, usage)
            if group == root:
                break


def _left(group: Path, limit: str, usage: str) -> int | None:
    """The limit of a control group less its usage; cached files do not count, they give way."""
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return None
    facts = _table(group / "memory.stat")
    prefix = "total_" if "total_active_file" in facts else ""  # version 1 gives a group alone, and with those below it
    cached = facts.get(f"{prefix}active_file", 0) + facts.get(f"{prefix}inactive_file", 0)
    return max(most - max(used - cached, 0), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}

"""How many processors this process may use. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_processors(root: Path = Path("/")) -> tuple[int, str]:
    """How many threads this process can have running at once, and what limits them: "all processors of the machine", "the
    process's affinity", or "a cgroup's quota of 1.5 processors", which a container's limit is too.

    A fraction counts as a whole thread, as otherwise a part of the quota would stay unused. `root` is where proc/ and the
    cgroup file systems lie.
    """
    present = os.cpu_count() or 1
    allowed, why = present, "all processors of the machine"
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < present:
        allowed, why = len(os.sched_getaffinity(0)), "the process's affinity"
    quota = min(_quotas(root), default=math.inf)
    if quota <= allowed - 1:
        return max(1, math.ceil(quota)), f"a cgroup's quota of {quota:g} processors"
    return allowed, why


def _quotas(root: Path) -> Iterator[float]:
    """The quotas in processors of this process's cgroups and those above them, of version 1 and 2; nothing without Linux."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")  # version 2 names no controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        for kind, options, mounted, place in mounts:
            if kind == ("cgroup" if controllers else "cgroup2") and (not controllers or "cpu" in options):
                yield from _quotas_along(root / place.lstrip("/"), _below(group, mounted))


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """The mounted cgroup file systems: kind, options, the group that is mounted, and where."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = (part.split(" ") for part in line.partition(" - "))
        if after[0] in ("cgroup", "cgroup2"):
            mounted, place = before[3:5]
            yield after[0], after[-1].split(","), mounted, place


def _below(group: str, mounted: str) -> PurePosixPath:
    """The path of `group` below the mounted one. In a container the group may be named from the host's root, and lie outside of
    what is mounted: then it is the mounted one itself."""
    path = PurePosixPath(group)
    return path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()


def _quotas_along(top: Path, below: PurePosixPath) -> Iterator[float]:
    for group in (below, *below.parents):
        pairs = [line.split() for line in _lines(top / group / "cpu.max")]
        pairs.append([*_lines(top / group / "cpu.cfs_quota_us"), *_lines(top / group / "cpu.cfs_period_us")])
        for pair in pairs:
            # no quota is "max", in version 1 -1
            if len(pair) == 2 and pair[0].isdigit() and pair[1].isdigit() and int(pair[1]) > 0:
                yield int(pair[0]) / int(pair[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

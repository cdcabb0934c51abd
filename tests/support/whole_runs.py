"""What tests of whole runs share: what their folders hold, what they say, and how they are held at a named place."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zygote import Job

from train.config import Config

# what the fixture `trained` gives: the folder of the undisturbed run of a recipe
Trained = Callable[[Config], Path]
# train.failpoints.arm, as the fixture `arm` gives it
Arm = Callable[[str, Callable[[int], object]], None]


def equal(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same bits, times and places left out."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        passed = {"seconds", "times", "images_per_second", "eval_seconds", "run"}
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in passed)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def one_line(text: str) -> str:
    """The error, which must be one line and no traceback."""
    lines = text.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


def temporary(folder: Path) -> list[str]:
    """The names of temporary files in it."""
    return [path.name for path in folder.glob(".*.tmp")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in it and below, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def runs_on(job: Job) -> bool:
    """Whether the process has not ended (as a zombie it still has an id)."""
    try:
        return Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class Stop(Exception):
    """Ends a run within this process where a kill would."""


def stop_before(at: int) -> Callable[[int], None]:
    """For `arm`: raises Stop at the `at`-th pass of a place."""

    def stop(count: int) -> None:
        if count == at:
            raise Stop

    return stop


def held(place: str, at: int = 1, until: Path | str = "/nowhere/for ever", then: str = "None") -> str:
    """Code for before a run: its `at`-th pass of the place prints "now" and waits for the file, and ends the process
    with code 97 where that does not come in two minutes. Any later pass evaluates `then`."""
    return f"""
import os, time
from train.failpoints import arm

def hold(count):
    if count > {at}:
        {then}
    if count != {at}:
        return
    print("now", flush=True)
    end = time.monotonic() + 120
    while not os.path.exists({str(until)!r}):
        if time.monotonic() > end: os._exit(97)
        time.sleep(0.01)

arm({place!r}, hold)
"""


def dies(place: str, at: int = 1) -> str:
    """Code for before a run: its `at`-th pass of the place ends the process at once, with code 99."""
    return f"""
import os
from train.failpoints import arm
arm({place!r}, lambda count: os._exit(99) if count == {at} else None)
"""

"""Named places in the code at which a test can stop, delay or break a run. They do nothing unless a test has armed them.

The names and their places:

    machine              device, precision and pipeline are not chosen yet
    lock                 the run folder was looked at and its .lock opened, the lock is not taken yet
    load                 before the data are read, or downloaded
    build                the data are read, the network is not made yet
    step                 before a training step
    evaluate             before a batch of an evaluation
    save                 before a save writes anything; on a GPU, the training goes on meanwhile
    write                before a temporary file is synced to the disk
    best written         best.pt is on the disk, last.pt not yet
    previous written     the old last.pt has its second name, the new one is not in place yet
    last written         last.pt is on the disk, metrics.jsonl not yet
    saved                everything of a save is on the disk
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Armed:
    action: Callable[[int], object]
    passes: int = 0


_armed: dict[str, _Armed] = {}


def failpoint(name: str) -> None:
    """Mark a place in the code: runs the action that a test has armed for this name, if any."""
    if _armed and (found := _armed.get(name)) is not None:
        found.passes += 1
        found.action(found.passes)


def arm(name: str, action: Callable[[int], object]) -> None:
    """Call `action(n)` at the n-th pass of the place, counted from 1; it may raise, wait, or end the process."""
    _armed[name] = _Armed(action)


def disarm() -> None:
    """Remove all actions."""
    _armed.clear()

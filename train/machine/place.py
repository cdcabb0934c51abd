"""Which of the processes that train together this one is, by the variables that torchrun sets. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass

from dali_pipeline.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "torchrun sets it; where it was left over, unset it to train in one process"


class GroupError(UserError):
    """The processes cannot work together. The message is one line: cause and remedy."""


@dataclass(frozen=True)
class Place:
    """This process's place among those that train together; `local_rank` counts those of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0


def place_from_environment() -> Place:
    """The place that RANK, WORLD_SIZE and LOCAL_RANK name; that of a process alone where WORLD_SIZE is 1 or not set. A variable
    that is empty counts as not set. Raises GroupError, naming the variable, where they do not describe a group."""
    size = _number("WORLD_SIZE", 1)
    if size is None:
        if (text := _value("RANK")) is not None:
            raise GroupError(f"RANK={text[:40]}: is set without WORLD_SIZE, and names no process of a group; {_REMEDY}")
        return Place()
    rank = _number("RANK", 0, size - 1)
    if size == 1:
        return Place()
    for name in NEEDED:
        if _value(name) is None:
            raise GroupError(
                f"{name}: is not set, but WORLD_SIZE={size} asks for that many processes together, which need "
                f"{', '.join(NEEDED)}; start them with torchrun, or unset WORLD_SIZE to train in one process"
            )
    _number("MASTER_PORT", 0, 65535)
    local = _number("LOCAL_RANK", 0, size - 1)
    assert rank is not None, "it is set"
    return Place(rank, size, rank if local is None else local)


def speaks_for_machine() -> bool:
    """Whether this process tells what all processes of its machine would tell alike: errors of the recipe. Also where the
    variables are wrong, as then nobody else can be counted on."""
    try:
        return place_from_environment().local_rank == 0
    except GroupError:
        return True


def under_torchrun() -> bool:
    """Whether torchrun started this process, and passes on the signals that it gets."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_job() -> str | None:
    """The torchrun that started this process, in words that are the same for a command and its restarts, and others each time
    that somebody calls torchrun; None without one."""
    if not under_torchrun():
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}, process {os.getppid()} on {socket.gethostname()}"


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) has started the same command before, and a process of it failed."""
    return under_torchrun() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def end_with_torchrun() -> None:
    """Has SIGTERM sent to this process once torchrun, which started it, is gone without having ended it (kill -9): nobody else
    would. Does nothing in a process that torchrun has not started."""
    if not under_torchrun():
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        with contextlib.suppress(OSError):
            os.write(2, b"torchrun, which started this process, is gone: ending with it\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="torchrun", daemon=True).start()


def _value(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _number(name: str, least: int, most: int | None = None) -> int | None:
    text = _value(name)
    if text is None:
        return None
    if (
        text.isascii()
        and text.isdigit()
        and len(text) < 10
        and least <= int(text)
        and (most is None or int(text) <= most)
    ):
        return int(text)
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    raise GroupError(f"{name}={text[:40]}: expected {expected}; {_REMEDY}")

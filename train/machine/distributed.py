"""The process group that torchrun asks for: NCCL on GPUs, gloo on CPUs; one process alone needs none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from train.machine.place import GroupError, Place, place_from_environment

TIMEOUT_VARIABLE = "TRAIN_DISTRIBUTED_TIMEOUT"
TIMEOUT_SECONDS = 1800.0  # for one wait; the longest is for the first process's download of the data

T = TypeVar("T")


class OtherProcessFailed(Exception):
    """Another process failed and reports its error itself; this one only ends."""


@dataclass(frozen=True)
class Group(Place):
    """This process's place among the processes that train together, and what they exchange."""

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks. They are pickled, so this is for small plain values."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every process runs the block and waits for the others at its end. If the block raised on some processes, it raises
        on all: the one of lowest rank among them raises its own error, the others OtherProcessFailed."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world_size == 1:
                raise
            failure = error
        failed = self.gather(failure is not None)
        if not any(failed):
            return
        if failure is not None and failed.index(True) == self.rank:
            raise failure
        raise OtherProcessFailed(f"process {failed.index(True)} failed")

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on the first process, and return its result, or raise its error, on all of them."""
        value: list[Any] = [None]
        with self.together():
            if self.first:
                value[0] = make()
        if self.world_size > 1:
            dist.broadcast_object_list(value, 0)
        return value[0]  # type: ignore[no-any-return]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any process: all of them get the same answer."""
        if self.world_size == 1:
            return list(flags)
        total = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return [bool(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        return self.any_of([flag])[0]


def from_environment() -> Group:
    """The group of `place_from_environment`, not connected yet. Raises GroupError."""
    place = place_from_environment()
    return Group(place.rank, place.world_size, place.local_rank)


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_SECONDS))
    try:
        seconds = float(text)
        if not 0 < seconds < 1e8:
            raise ValueError
    except ValueError:
        raise GroupError(f"{TIMEOUT_VARIABLE}={text}: expected a number of seconds above 0") from None
    return timedelta(seconds=seconds)


@contextmanager
def process_group(group: Group, device: str) -> Iterator[None]:
    """Connects the group for as long as the block runs. `device` is train.device.

    Tensors on a GPU go over NCCL; flags and objects go over gloo from the host, and make no GPU wait.
    """
    if group.world_size == 1:
        yield
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_timeout())
    whole = False
    try:
        yield
        whole = True
    finally:
        # closing NCCL waits for operations that a lost process would never complete; the end of the process closes it too
        if whole or not cuda:
            dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether the error says that another process went away or does not answer."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "process group")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)

"""The process group that torchrun asks for: NCCL on GPUs, gloo on CPUs; one process alone needs none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=float(os.environ.get("TRAIN_DISTRIBUTED_TIMEOUT", "1800")))


@dataclass(frozen=True)
class Group:
    """This process among the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def first_does_it(self) -> Iterator[None]:
        """The first process runs the block (a download) while the others wait, then they run it on what it left."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process: all of them get the same answer."""
        if self.world_size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor([int(flag)], device=device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return bool(total.item())


def from_environment() -> Group:
    """What torchrun's RANK, WORLD_SIZE and LOCAL_RANK say; a group of one without them."""
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Group()
    return Group(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])))


@contextmanager
def process_group(group: Group, device_type: str) -> Iterator[None]:
    """The group's connection, for as long as the block runs."""
    if group.world_size == 1:
        yield
        return
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()

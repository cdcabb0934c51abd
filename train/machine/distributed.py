"""The process group that torchrun asks for: NCCL on GPUs, gloo on CPUs; one process alone needs none."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dali_pipeline.errors import UserError
from dali_pipeline.words import to_stderr
from train.machine.heartbeat import BEAT_SECONDS, LEAST_LIMIT, MISSED_BEATS, Heartbeat, end_process
from train.machine.place import GroupError, Place, place_from_environment

STEP_VARIABLE, STEP_SECONDS = "TRAIN_DISTRIBUTED_TIMEOUT", 60.0  # for one wait while steps run
SILENCE_RATIO = 0.5  # a process that is silent for this part of it is lost
# for one wait in a phase that the code enters by name: the first process's download, the slowest one's compilation
PHASE_VARIABLE, PHASE_SECONDS = "TRAIN_PHASE_TIMEOUT", 1800.0
SAY_WAITING_AFTER = 10.0  # seconds

T = TypeVar("T")


class OtherProcessFailed(Exception):
    """Another process failed and reports its error itself; this one only ends, with `exit_code`."""

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class PeerLost(UserError):
    """Another process of the group is gone, or has not answered within the time limit. The message is one line."""

    exit_code = 1


@dataclass
class _Links:
    """What connects a group's processes beside torch's default group, whose waits end after the time limit of steps."""

    patient: dist.ProcessGroup  # waits as long as the time limit of phases
    heart: Heartbeat
    phase: str | None = None


_KEPT: list[torch.Tensor] = []  # what went over the wire last


@dataclass(frozen=True)
class Group(Place):
    """This process's place among the processes that train together, and what they exchange."""

    links: _Links | None = field(default=None, compare=False, repr=False)  # where `process_group` has connected it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the block the processes wait for each other up to the time limit of phases: one of them downloads, or compiles,
        while the others have nothing to do. `name` ("loading the data") appears in messages. All processes enter it."""
        if self.links is None:
            yield
            return
        before, self.links.phase = self.links.phase, name
        self.links.heart.doing(name)
        yield  # where the block raises, the phase stays the one in which that happened
        self.links.phase = before
        self.links.heart.doing(before or "training")

    @property
    def _wire(self) -> dist.ProcessGroup | None:
        """What an exchange goes over; None is torch's default group."""
        return self.links.patient if self.links is not None and self.links.phase is not None else None

    def _all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce the tensor in place over all processes, and keep it beyond the end of the group.

        A thread of gloo lets go of it when it is done. If that is the last reference, it waits for the interpreter's lock, which
        the main thread may hold while it closes the group and waits for that thread. That happens with torch 2.8 where DDP is
        the last to let go of the group, which pytorch/pytorch#154976 left as it was.
        """
        _KEPT[:] = [tensor]
        dist.all_reduce(tensor, op=op, group=self._wire)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks. They are pickled, so this is for small plain values."""
        if self.world_size == 1:
            return [value]
        own = pickle.dumps(value)
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self._all_reduce(lengths, dist.ReduceOp.SUM)
        ends = [0, *lengths.cumsum(0).tolist()]
        together = torch.zeros(ends[-1], dtype=torch.uint8)  # the sum of parts that only one process each has filled
        together[ends[self.rank] : ends[self.rank + 1]] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        self._all_reduce(together, dist.ReduceOp.SUM)
        found = together.numpy().tobytes()
        return [pickle.loads(found[start:end]) for start, end in pairwise(ends)]

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
        value: Any = None
        with self.together():
            if self.first:
                value = make()
        return self.gather(value)[0]  # type: ignore[no-any-return]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any process: all of them get the same answer."""
        if self.world_size == 1:
            return list(flags)
        total = torch.tensor([int(flag) for flag in flags])
        self._all_reduce(total, dist.ReduceOp.MAX)
        return [bool(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        return self.any_of([flag])[0]


def from_environment() -> Group:
    """The group of `place_from_environment`, not connected yet. Raises GroupError."""
    place = place_from_environment()
    return Group(place.rank, place.world_size, place.local_rank)


def time_limit(variable: str, default: float, least: float = 0.0) -> timedelta:
    """The number of seconds that an environment variable holds; raises GroupError where it is none, or below `least`."""
    text = os.environ.get(variable, "").strip() or str(default)
    try:
        seconds = float(text)
        if not (0 < seconds < 1e8 and seconds >= least):
            raise ValueError
    except ValueError:
        what = f"of at least {least:g}" if least else "above 0"
        raise GroupError(f"{variable}={text[:40]}: expected a number of seconds {what}") from None
    return timedelta(seconds=seconds)


@contextmanager
def process_group(group: Group, device: str, *, owns_process: bool = True) -> Iterator[Group]:
    """Connects the group for as long as the block runs, and gives it with its links. `device` is train.device.

    Tensors on a GPU go over NCCL; flags and objects go over gloo from the host, and make no GPU wait. Raises GroupError where
    the processes do not come together, PeerLost where one of them is lost in the block. With `owns_process` the process ends
    where a peer is lost while it waits in a call that cannot be interrupted.
    """
    if group.world_size == 1:
        yield group
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    links = _connect(group, "cpu:gloo,cuda:nccl" if cuda else "gloo", owns_process)
    connected = replace(group, links=links)
    whole = False
    try:
        yield connected
        whole = True
        with connected.phase("ending"):  # nobody takes the store with it while others still beat
            links.heart.ending()
            connected.gather(None)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise PeerLost(_lost_line(group, links.heart, error)) from error
    finally:
        links.heart.stop()
        # closing NCCL waits for operations that a lost process would never complete; the end of the process closes it too
        if whole or not cuda:
            dist.destroy_process_group()


def _connect(group: Group, backend: str, owns_process: bool) -> _Links:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    steps = time_limit(STEP_VARIABLE, STEP_SECONDS, least=LEAST_LIMIT / SILENCE_RATIO)
    phases = time_limit(PHASE_VARIABLE, PHASE_SECONDS)
    own = name_of_process(group.rank)
    c10d: Any = dist  # its annotations leave out much of what it exports
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise GroupError(f"MASTER_ADDR={address[:100]}: {own} cannot resolve the name: {error}") from None
    place = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    waiting = threading.Timer(
        SAY_WAITING_AFTER,
        to_stderr,
        [
            f"{own} waits for the {group.world_size} processes of WORLD_SIZE at {place}, for up to {phases.total_seconds():g} s"
        ],
    )
    waiting.daemon = True
    waiting.start()

    def lost(who: str) -> None:
        if owns_process:
            end_process(f"{own} lost {who} while {heart.doing_now}; {_GO_ON}")

    try:
        store, _, _ = next(iter(c10d.rendezvous("env://", group.rank, group.world_size, timeout=phases)))
        here = [f"here/{rank}" for rank in range(group.world_size)]
        store.set(here[group.rank], "1")
        store.wait(here, phases)
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.world_size, timeout=steps)
        patient = c10d.new_group(backend="gloo", timeout=phases)
        names = replace(group, links=None).gather(own)
        token = replace(group, links=None).from_first(lambda: os.urandom(8).hex())
        # a connection of its own: another thread may wait for an answer on the first
        client = c10d.TCPStore(address, port, None, False, timeout=steps, wait_for_workers=False)
        heart = Heartbeat(
            c10d.PrefixStore(token, client),
            group.rank,
            names,
            f"the store at {address}:{port} (torchrun or the first process there)",
            limit=SILENCE_RATIO * steps.total_seconds(),
            lost=lost,
        )
        links = _Links(patient, heart)
        replace(group, links=links).gather(None)  # every process has its first beat in the store
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise GroupError(
            f"{place}: {own} has not come together with the others of WORLD_SIZE={group.world_size}: {first_line(error)}"
        ) from error
    finally:
        waiting.cancel()
    heart.start()
    return links


_GO_ON = "continue from last.pt with --resume"


def _lost_line(group: Group, heart: Heartbeat, error: RuntimeError) -> str:
    """Who was lost, as far as the beats tell within a few seconds; where nobody was, what the others do."""
    who = heart.who(wait=(MISSED_BEATS + 1) * BEAT_SECONDS)
    found = who or f"the connection to the others; there are still {heart.others() or 'none'}"
    return f"{name_of_process(group.rank)} lost {found} while {heart.doing_now} ({first_line(error)}); {_GO_ON}"


def name_of_process(rank: int) -> str:
    """ "process 3 on HOST" """
    return f"process {rank} on {socket.gethostname()}"


def first_line(error: BaseException) -> str:
    """The first line of its message that is not empty, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_lost(error: BaseException) -> bool:
    """Whether the error says that another process went away or does not answer."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "process group")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)

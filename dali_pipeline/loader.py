"""Device batches of images and labels by DALI or by torch: the same pixels from either, for any (seed, epoch, step)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import dali_graph
from .plan import NO_AUGMENT, Augment, Plan, Stream, Tail, check_shard, identity_plan
from .torch_graph import Records, TorchGraph, decode_labels, to_device, upload

Backend = Literal["dali", "torch"]


class BackendError(Exception):
    """A backend cannot run here, or not on this data; one line with the cause and the remedy."""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that will run, and why it was taken; `reason` is for the log and the run's record."""

    name: Backend
    reason: str


def choose_backend(requested: str, device: torch.device) -> BackendChoice:
    """Resolves `data.backend` (auto, dali or torch) by running DALI's graph on small images on the device.

    auto takes DALI where that gives the right pixels, torch elsewhere. Raises BackendError for `dali` where it does not,
    ValueError for another name.
    """
    if requested not in ("auto", "dali", "torch"):
        raise ValueError(f"data.backend is {requested!r}, expected 'auto', 'dali' or 'torch'")
    where = f"on {device}"
    if requested == "torch":
        return BackendChoice("torch", f"torch {torch.__version__} {where}: requested")
    if device.type not in ("cuda", "cpu"):
        problem = f"DALI has no {device.type} backend; use data.backend=torch"
    else:
        try:
            version = dali_graph.probe(device)
        except Exception as error:  # ImportError, RuntimeError, AttributeError: all answer one question
            problem = _explain(error, device)
        else:
            if device.type == "cpu":
                where = "on its CPU backend: " + (
                    "the device is the CPU" if torch.cuda.is_available() else "no CUDA device"
                )
            return BackendChoice("dali", f"dali {version} {where}")
    if requested == "dali":
        raise BackendError(f"data.backend=dali cannot run {where}: {problem}")
    return BackendChoice("torch", f"torch {torch.__version__} {where}: {problem}")


def _explain(error: Exception, device: torch.device) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # DALI tells where in the pipeline first, and then what
    first_line = lines[lines.index("encountered:") + 1] if "encountered:" in lines[:-1] else lines[0]
    if isinstance(error, ImportError) and getattr(error, "name", None) in ("nvidia", "nvidia.dali"):
        return "DALI is not installed; it runs on Linux: pip install nvidia-dali-cuda120, or data.backend=torch"
    if isinstance(error, (ImportError, AttributeError)):
        return f"nvidia.dali does not import ({first_line}); reinstall nvidia-dali-cuda120, or data.backend=torch"
    if isinstance(error, dali_graph.WrongPixels):
        return (
            f"its pixels are wrong ({first_line}); use data.backend=torch, and report it with this machine's versions"
        )
    return f"a small pipeline fails ({first_line}); check the driver with nvidia-smi, or data.backend=torch"


class _Pump:
    """Turns requests for (plan of) key k into images: keeps DALI's prefetched batches in step with what is asked for.

    DALI pulls ahead of what is delivered, so the plans run on in natural order (`follow`); a request out of that order
    moves the cursor and throws away the batches in flight.
    """

    def __init__(
        self, plan_of: Callable[[tuple[int, int]], Plan], follow: Callable[[int, int], tuple[int, int]]
    ) -> None:
        self.plan_of = plan_of
        self.follow = follow
        self.cursor = (0, 0)
        self.in_flight: deque[tuple[tuple[int, int], Plan]] = deque()

    def pull(self) -> Plan:
        plan = self.plan_of(self.cursor)
        self.in_flight.append((self.cursor, plan))
        self.cursor = self.follow(*self.cursor)
        return plan

    def get(self, key: tuple[int, int], run: Callable[[], Tensor]) -> tuple[Tensor, Plan]:
        if self.in_flight:
            if all(k != key for k, _ in self.in_flight):
                self.cursor = key
        else:
            self.cursor = key
        while True:
            images = run()
            k, plan = self.in_flight.popleft()
            if k == key:
                return images, plan


class _Engine:
    """One split on the device behind one backend."""

    def __init__(
        self,
        split: Records,
        batch_size: int,
        augment: Augment,
        fill: tuple[int, int, int],
        device: torch.device,
        backend: BackendChoice | str,
        compiled: bool,
        plan_of: Callable[[tuple[int, int]], Plan],
        follow: Callable[[int, int], tuple[int, int]],
    ) -> None:
        name = backend.name if isinstance(backend, BackendChoice) else choose_backend(backend, device).name
        self._pid = os.getpid()
        self._device = device
        self.plan_of = plan_of
        self._dali: dali_graph.DaliGraph | None = None
        self._torch: TorchGraph | None = None
        records = upload(split, device)
        if name == "dali":
            self._pump = _Pump(plan_of, follow)
            self._labels = decode_labels(records, split)
            try:
                self._dali = dali_graph.DaliGraph(records, split, self._pump.pull, batch_size, augment, fill)
            except dali_graph.Unsupported as error:
                raise BackendError(str(error)) from None
        else:
            self._torch = TorchGraph(records, split, augment, fill, compiled=compiled)

    def batch(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if os.getpid() != self._pid:
            raise RuntimeError("a loader does not survive fork(): make it in the process that uses it")
        if self._torch is not None:
            return self._torch.batch(self.plan_of(key))
        if self._dali is not None:
            images, plan = self._pump.get(key, self._dali.run)
            return images, self._labels[to_device(plan.indices, self._device)]
        raise RuntimeError("the loader is closed")

    def close(self) -> None:
        if os.getpid() != self._pid:  # stopping threads that fork() did not copy would wait for ever
            return
        if self._dali is not None:
            self._dali.close()
        self._dali = self._torch = None


class TrainLoader:
    """Augmented batches, a pure function of (seed, epoch, step): starting at a step gives what running up to it gives.

    `batch_size` is the global batch; this rank gets positions rank::world_size of it. Raises ValueError where the batch
    does not divide by the world size or exceeds the split, or reflected padding exceeds the image.
    """

    def __init__(
        self,
        split: Records,
        *,
        batch_size: int,
        augment: Augment,
        fill: tuple[int, int, int],
        seed: int,
        device: torch.device,
        backend: BackendChoice | str,
        tail: Tail = "drop",
        rank: int = 0,
        world_size: int = 1,
        compiled: bool = False,
    ) -> None:
        if augment.crop and augment.padding_mode == "reflect" and augment.pad >= min(split.height, split.width):
            raise ValueError(
                f"augment.pad {augment.pad} reflects more than an image of {split.height} x {split.width} has"
            )
        stream = Stream(
            len(split.records),
            batch_size,
            augment,
            seed,
            size=(split.height, split.width),
            tail=tail,
            rank=rank,
            world_size=world_size,
        )
        self.steps_per_epoch = stream.steps_per_epoch
        self._engine = _Engine(
            split,
            batch_size // world_size,
            augment,
            fill,
            device,
            backend,
            compiled,
            lambda key: stream.batch(*key),
            stream.next_step,
        )

    def plan(self, epoch: int, step: int) -> Plan:
        """What is done to which images at a step, for this rank."""
        return self._engine.plan_of((epoch, step))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, labels) for the steps from `start_step`: images (batch/world, 3, H, W) uint8 on the device,
        channels-last; labels (batch/world,) int64. A batch is its own memory: it stays valid as long as it is held.
        """
        for step in range(start_step, self.steps_per_epoch):
            yield self._engine.batch((epoch, step))

    def close(self) -> None:
        """Stops the pipeline and frees the resident data; batches already yielded stay valid."""
        self._engine.close()


class EvalLoader:
    """Every image exactly once over all ranks, in order and unaugmented, in batches of one fixed size.

    `batch_size` is the global batch; this rank gets positions rank::world_size of it, and as many batches as any other.
    """

    def __init__(
        self,
        split: Records,
        *,
        batch_size: int,
        device: torch.device,
        backend: BackendChoice | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_shard(batch_size, rank, world_size)
        num_images = self.num_images = len(split.records)
        num_steps = self._num_steps = -(-num_images // batch_size)
        self._device = device
        positions = np.arange(num_steps * batch_size).reshape(num_steps, batch_size)[:, rank::world_size]
        self._valid = to_device(positions < num_images, device)
        indices = np.where(positions < num_images, positions, 0)
        self._engine = _Engine(
            split,
            batch_size // world_size,
            NO_AUGMENT,
            (0, 0, 0),
            device,
            backend,
            False,
            lambda key: identity_plan(indices[key[1]]),
            lambda epoch, step: (epoch, (step + 1) % num_steps),
        )

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (images, labels, valid): as TrainLoader, and a (batch/world,) bool mask on the device, False where the
        last batch is filled up with image 0."""
        for step in range(self._num_steps):
            images, labels = self._engine.batch((0, step))
            yield images, labels, self._valid[step]

    def close(self) -> None:
        """Stops the pipeline and frees the resident data; batches already yielded stay valid."""
        self._engine.close()

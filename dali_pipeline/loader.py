"""Device batches of images and labels by DALI or by torch, of images that lie on the device or are sent there batch by batch: the
same pixels in each way, for any (seed, epoch, step)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dali_pipeline.backend import Backend, BackendChoice, BackendError, choose_backend
from dali_pipeline.dali_graph import DaliGraph, Unsupported
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder, Graph, MakeGraph
from dali_pipeline.memory import Residence, Resident, choose_residence
from dali_pipeline.plan import NO_AUGMENT, Plan, Stream, Tail, check_shard, identity_plan
from dali_pipeline.resident import to_device, upload
from dali_pipeline.resized import ResizedCrop
from dali_pipeline.torch_graph import TorchGraph

GRAPHS: dict[Backend, MakeGraph] = {"dali": DaliGraph, "torch": TorchGraph}

Key = tuple[int, int]  # (epoch, step)


class Pump:
    """Gets the batch of a key (epoch, step) from a graph that prefetches.

    DALI pulls plans ahead of what it delivers, on the assumption that keys are requested in their natural order (`follow`). A
    request out of that order discards the batches that were prefetched and goes on from the new key.
    """

    def __init__(self, plan_of: Callable[[Key], Plan], follow: Callable[[int, int], Key]) -> None:
        self.plan_of = plan_of
        self.follow = follow
        self.cursor: Key = (0, 0)
        self.in_flight: deque[tuple[Key, Plan]] = deque()

    def pull(self) -> Plan:
        """The next plan, for the graph."""
        plan = self.plan_of(self.cursor)
        self.in_flight.append((self.cursor, plan))
        self.cursor = self.follow(*self.cursor)
        return plan

    def get(self, key: Key, run: Callable[[], Tensor]) -> tuple[Tensor, Plan]:
        """The images of the key, by as many calls of the graph's `run` as it takes, and their plan."""
        if all(pulled != key for pulled, _ in self.in_flight):
            self.cursor = key
        while True:
            before = len(self.in_flight)
            try:
                images = run()
            except BaseException:
                while len(self.in_flight) > before:  # a call that failed will not deliver what it pulled
                    self.in_flight.pop()
                raise
            pulled, plan = self.in_flight.popleft()
            if pulled == key:
                return images, plan


class Engine:
    """The images and labels of one split on the device, by one backend: the batch of a key is what `plan_of` says.

    `residence`: whether all of the images lie on the device, or each batch is sent there. `processes`: how many of them share the
    host's memory, each with an engine of its own.
    """

    def __init__(
        self,
        split: Split,
        order: FeedOrder,
        backend: BackendChoice | str,
        *,
        plan_of: Callable[[Key], Plan],
        follow: Callable[[int, int], Key],
        processes: int = 1,
    ) -> None:
        self._resize: ResizedCrop | None = None
        if order.augment.resized:  # the graph gathers the images as they are
            self._resize = ResizedCrop(order, split.height, split.width)
            order = replace(order, augment=NO_AUGMENT)
        self.residence = choose_residence(order.resident, split, order.augment, order.device, processes)
        order = replace(order, resident="always" if self.residence.resident else "never")
        name = backend.name if isinstance(backend, BackendChoice) else choose_backend(backend, order.device).name
        self.plan_of = plan_of
        self._pid = os.getpid()
        self._device = order.device
        self._pump = Pump(plan_of, follow)
        self._labels = upload(split.labels, order.device)
        try:
            self._graph: Graph | None = GRAPHS[name](
                split, order, self._pump.pull if self._resize is None else self._gather
            )
        except Unsupported as error:
            raise BackendError(str(error)) from None

    def _gather(self) -> Plan:
        return identity_plan(self._pump.pull().indices)

    def batch(self, key: Key) -> tuple[Tensor, Tensor]:
        """(images, labels) of the key's plan of n images: (n, 3, H, W) uint8, channels-last, and (n,) int64."""
        if os.getpid() != self._pid:
            raise RuntimeError("a loader does not survive fork(): make it in the process that uses it")
        if self._graph is None:
            raise RuntimeError("the loader is closed")
        images, plan = self._pump.get(key, self._graph.run)
        if self._resize is not None:
            images = self._resize(images, plan)
        return images, self._labels[to_device(plan.indices, self._device)]

    def close(self) -> None:
        if os.getpid() != self._pid:  # after fork() DALI's threads do not exist here, and stopping them would hang
            return
        if self._graph is not None:
            self._graph.close()
        self._graph = None


class TrainLoader:
    """Augmented batches, a pure function of (seed, epoch, step): starting at a step gives what running up to it gives.

    `order.batch_size` is the global batch size; this rank gets positions rank::world_size of each batch. Raises ValueError
    where the batch size is no multiple of the world size or exceeds the split, or the reflected padding exceeds the image;
    BackendError where the backend cannot run, or cannot process images or batches of this shape.
    """

    def __init__(
        self,
        split: Split,
        order: FeedOrder,
        *,
        seed: int,
        backend: BackendChoice | str,
        tail: Tail = "drop",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        augment = order.augment
        if augment.crop and augment.padding_mode == "reflect" and augment.pad >= min(split.height, split.width):
            raise ValueError(
                f"augment.pad {augment.pad} reflects more than an image of {split.height} x {split.width} has"
            )
        stream = Stream(
            len(split),
            order.batch_size,
            augment,
            seed,
            size=(split.height, split.width),
            tail=tail,
            rank=rank,
            world_size=world_size,
        )
        self.steps_per_epoch = stream.steps_per_epoch
        self._engine = Engine(
            split,
            replace(order, batch_size=order.batch_size // world_size),
            backend,
            plan_of=lambda key: stream.batch(*key),
            follow=stream.next_step,
            processes=world_size,
        )

    @property
    def residence(self) -> Residence:
        """Whether the images lie on the device, and why."""
        return self._engine.residence

    def plan(self, epoch: int, step: int) -> Plan:
        """Which images this rank gets at a step, and how they are augmented."""
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
        split: Split,
        *,
        batch_size: int,
        device: torch.device,
        backend: BackendChoice | str,
        resident: Resident = "auto",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_shard(batch_size, rank, world_size)
        num_images = self.num_images = len(split)
        num_steps = self._num_steps = -(-num_images // batch_size)
        positions = np.arange(num_steps * batch_size).reshape(num_steps, batch_size)[:, rank::world_size]
        self._valid = to_device(positions < num_images, device)
        indices = np.where(positions < num_images, positions, 0)
        self._engine = Engine(
            split,
            FeedOrder(
                batch_size=batch_size // world_size,
                augment=NO_AUGMENT,
                fill=(0, 0, 0),
                device=device,
                resident=resident,
            ),
            backend,
            plan_of=lambda key: identity_plan(indices[key[1]]),
            follow=lambda epoch, step: (epoch, (step + 1) % num_steps),
            processes=world_size,
        )

    @property
    def residence(self) -> Residence:
        """Whether the images lie on the device, and why."""
        return self._engine.residence

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

"""Batches of images that stay in host memory, or in a memory map: each is gathered, and sent to the device, ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dali_pipeline.dataset import Split
from dali_pipeline.plan import Augment, Plan
from dali_pipeline.resident import reflect_borders

AHEAD = 2  # batches that are gathered while an earlier one is in use


def left_to_apply(augment: Augment) -> Augment:
    """What of an augmentation is left once the images of a batch are gathered: they are stored mirrored where they are to be."""
    return replace(augment, flip=False)


@dataclass(frozen=True)
class Staged:
    """The images of one plan. `images`: (slots, H + 2*border, W + 2*border, 3) uint8, borders filled, those that the plan mirrors
    mirrored already. `plan`: what is left to do with them, `left_to_apply` of the augmentation; its indices are slots."""

    images: Tensor
    plan: Plan


class Kept:
    """Images that lie on the device, `resident_images` of a split, for each plan from `source`."""

    def __init__(self, images: Tensor, source: Callable[[], Plan]) -> None:
        self._images: Tensor | None = images
        self._source = source

    @contextmanager
    def next(self) -> Iterator[Staged]:
        """All of the images, and the next plan, as it is."""
        assert self._images is not None
        yield Staged(self._images, self._source())

    def close(self) -> None:
        """Frees the images."""
        self._images = None


class Stream:
    """Pulls plans from `source`, AHEAD of what it gives; a thread of its own gathers their images from the split.

    On the host the images are read, mirrored and given their border; with a CUDA device as `target` they are then copied there,
    on a stream of their own. `slots`: places in a batch, by default as many as images; those beyond the images hold `spare`, a
    colour.
    """

    def __init__(
        self,
        split: Split,
        augment: Augment,
        source: Callable[[], Plan],
        *,
        target: torch.device,
        border: int,
        slots: int | None = None,
        spare: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self._split, self._augment, self._source = split, augment, source
        self._target, self._border, self._slots, self._spare = target, border, slots, spare
        self._copies = torch.cuda.Stream(target) if target.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._queue: deque[tuple[Plan, Tensor, Future[Staged]]] = deque()
        self._blocks: list[Tensor] = []  # host memory that no batch under way uses
        self._thread = ThreadPoolExecutor(1, "gather")

    @contextmanager
    def next(self) -> Iterator[Staged]:
        """The oldest plan pulled. On the CPU its images lie in memory that is written again after the next call. An error in
        the block leaves the plans pulled before to be given again, and forgets those that this call has pulled."""
        before = len(self._queue)
        try:
            while len(self._queue) <= AHEAD:
                self._queue.append(self._begin(self._source()))
            _, block, gathered = self._queue[0]
            staged = gathered.result()
            if self._copies is not None:  # the copy is complete, but its memory belongs to another stream
                staged.images.record_stream(torch.cuda.current_stream(self._target))
            yield staged
        except BaseException:
            while len(self._queue) > before:
                self._queue.pop()
            if self._queue:
                self._queue[0] = self._begin(self._queue[0][0])  # what failed may have been the gathering
            raise
        self._queue.popleft()
        self._blocks.append(block)

    def close(self) -> None:
        """Stops the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()
        self._blocks.clear()

    def _begin(self, plan: Plan) -> tuple[Plan, Tensor, Future[Staged]]:
        block = self._block(len(plan))
        return plan, block, self._thread.submit(self._gather, plan, block)

    def _block(self, count: int) -> Tensor:
        """Memory for a batch of `count` images: used before, or new and with its spare slots filled."""
        split, border = self._split, self._border
        slots = count if self._slots is None else self._slots
        while self._blocks:
            block = self._blocks.pop()
            if len(block) == slots:
                return block
        shape = (slots, split.height + 2 * border, split.width + 2 * border, 3)
        block = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._copies is not None)
        block[count:] = torch.tensor(self._spare, dtype=torch.uint8)
        return block

    def _gather(self, plan: Plan, block: Tensor) -> Staged:
        """In the thread. The mirrored images come last, so that they lie in one piece."""
        split, border, augment = self._split, self._border, self._augment
        order = np.argsort(plan.flip, kind="stable")
        pixels = torch.from_numpy(split.gather(plan.indices[order]))
        if split.planar:
            pixels = pixels.permute(0, 2, 3, 1)
        images, plain = block[: len(plan)], len(plan) - int(plan.flip.sum())
        inner = images[:, border : border + split.height, border : border + split.width]
        inner[:plain] = pixels[:plain]
        inner[plain:] = pixels[plain:].flip(2)
        if augment.padding_mode == "reflect":
            reflect_borders(images, border)
        slot = np.empty(len(plan), np.int64)
        slot[order] = np.arange(len(plan))
        # a window of the mirrored image, at the mirrored column
        dx = np.where(plan.flip, 2 * augment.pad - plan.dx, plan.dx) if augment.crop else plan.dx
        left = replace(plan, indices=slot, dx=dx, flip=np.zeros(len(plan), bool))
        if self._copies is None:
            return Staged(block, left)
        with torch.cuda.stream(self._copies):
            images = block.to(self._target, non_blocking=True)
        self._copies.synchronize()  # before the block is written again
        return Staged(images, left)

"""The stages of this project that are measured: its pipelines alone, the training step alone, both together, the evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Stage, device_peak_gib, reset_device_peak, synchronize
from dali_pipeline.backend import Backend, BackendError, choose_backend
from dali_pipeline.dataset import Dataset, Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.loader import TrainLoader
from dali_pipeline.plan import NO_AUGMENT, Augment
from net.interface import Network
from train.machine.compiler import find_compiler
from train.session import Session
from train.step.meter import StepMeter
from train.step.schedule import OneCycle

LEARNING_RATE = 1e-3  # speed does not depend on it, and training on random labels does not diverge with it


class _Enough(Exception):
    """Raised to end Trainer.train_epoch after the wanted number of steps."""


class TimedLoader:
    """Passes on the batches of a loader, and measures how long its user waited for them."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.waited = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._loader.epoch(epoch, start_step)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch


class Training:
    """The stages of a training, from a session's trainer that is built, compiled and warmed up. Each stage continues in the
    augmentation plan where the one before stopped. `dataset` is the recipe's data set, where it has been read already."""

    def __init__(self, session: Session, dataset: Dataset | None = None) -> None:
        reset_device_peak(session.runtime.device)
        session.build(dataset=dataset)
        session.warm_up()
        self.trainer, self.runtime, self.backend = session.trainer, session.runtime, session.backend
        self.device = session.runtime.device
        self.compile_seconds = session.times.compile
        self.loader = TimedLoader(self.trainer.train_loader)
        self.trainer.train_loader = self.loader  # type: ignore[assignment]
        self.batch_size = session.config.train.batch_size
        self.schedule = OneCycle(LEARNING_RATE, LEARNING_RATE, 1.0, 10**12)
        # seconds of the training thread end to end: waiting for the pipeline, and in all
        self.waited = self.spent = 0.0
        self._epoch = self._step = 0
        self._new_meter()
        dataset = session.dataset
        shape = (self.batch_size, dataset.height, dataset.width, 3)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        self._labels = torch.randint(0, dataset.num_classes, (self.batch_size,), device=self.device)
        self.training_flops = training_flops(self.trainer.net, dataset.height, dataset.width)

    def _new_meter(self) -> None:
        self._meter = StepMeter(self._epoch, self.trainer.steps_per_epoch, self.device)

    def _spans(self, steps: int) -> Iterator[tuple[int, int, int]]:
        """The next steps as (epoch, first, one past the last)."""
        while steps:
            first = self._step
            stop = min(first + steps, self.trainer.steps_per_epoch)
            yield self._epoch, first, stop
            steps -= stop - first
            self._step = stop
            if stop == self.trainer.steps_per_epoch:
                self._epoch, self._step = self._epoch + 1, 0
                self._new_meter()

    def run_pipeline(self, steps: int) -> float:
        for epoch, first, stop in self._spans(steps):
            for _ in zip(range(stop - first), self.loader.epoch(epoch, first), strict=False):
                pass
        return steps * self.batch_size

    def run_step(self, steps: int) -> float:
        self.trainer.step.train()
        for _ in range(steps):
            self.trainer.train_one(self._images, self._labels, LEARNING_RATE)
        return steps * self.batch_size

    def run_end_to_end(self, steps: int) -> float:
        """Trainer.train_epoch, including what a run does on the host after each step."""
        begun, waited = time.perf_counter(), self.loader.waited
        for epoch, first, stop in self._spans(steps):
            meter = self._meter

            def after_step(done: int, meter: StepMeter = meter, stop: int = stop) -> None:
                meter.poll(done)
                if done == stop < self.trainer.steps_per_epoch:
                    raise _Enough

            with suppress(_Enough):
                self.trainer.train_epoch(epoch, self.schedule, meter, first, after_step)
            if stop == self.trainer.steps_per_epoch:
                meter.finish(stop)
        synchronize(self.device)
        self.spent += time.perf_counter() - begun
        self.waited += self.loader.waited - waited
        return steps * self.batch_size

    def run_evaluation(self, steps: int) -> float:
        for _ in range(steps):
            self.trainer.evaluate()
        return steps * len(self.trainer.dataset.test)

    def device_peak_gib(self) -> float | None:
        """The peak GPU memory of training and evaluation, compilation included. To be called before other stages use the GPU."""
        if self.device.type == "cuda":
            self.run_end_to_end(2)
            self.trainer.evaluate()
        return device_peak_gib(self.device)

    def stage(self, name: str, seconds: float) -> Stage:
        """The stage `name`: pipeline, step, end_to_end or evaluation."""
        epoch = 1 if name == "evaluation" else self.trainer.steps_per_epoch
        return Stage(name, getattr(self, f"run_{name}"), self.device, seconds, epoch)


def training_flops(net: Network, height: int, width: int) -> int:
    """Floating-point operations of training on one image, two for each multiply-add: the forward pass, as many for the gradients
    of the activations and as many for those of the weights. The first layer's input, the image, needs no gradient."""
    first_layer = next(weights for name, weights in net.named_parameters() if net.role(name) == "filter")
    return 6 * net.multiply_adds(height, width) - 2 * first_layer.numel() * height * width


@dataclass(frozen=True)
class Kind:
    """A way to apply plans: the backend, the device, and whether torch.compile fuses the operations."""

    backend: Backend
    device: torch.device
    compiled: bool = False

    def loader(
        self, split: Split, *, batch_size: int, augment: Augment, fill: tuple[int, int, int], seed: int = 0
    ) -> TrainLoader:
        """A loader of the split's batches that works in this way."""
        order = FeedOrder(batch_size=batch_size, augment=augment, fill=fill, device=self.device, compiled=self.compiled)
        return TrainLoader(split, order, seed=seed, backend=self.backend)


class Pipeline:
    """A stage that takes batches from one loader, epoch after epoch."""

    def __init__(self, dataset: Dataset, kind: Kind, *, batch_size: int, augment: Augment) -> None:
        self.device, self.batch_size = kind.device, batch_size
        self.loader = kind.loader(dataset.train, batch_size=batch_size, augment=augment, fill=dataset.fill)
        self._batches = endless(self.loader)

    def run(self, steps: int) -> float:
        for _ in range(steps):
            next(self._batches)
        return steps * self.batch_size

    def stage(self, name: str, seconds: float) -> Stage:
        return Stage(name, self.run, self.device, seconds, self.loader.steps_per_epoch)

    def close(self) -> None:
        self.loader.close()


def endless(loader: TrainLoader) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from loader.epoch(epoch)


def pipeline_kinds(devices: Sequence[torch.device]) -> tuple[dict[str, Kind], dict[str, str]]:
    """Every kind of pipeline that runs on this machine, by name; and for the others the reason why not."""
    kinds: dict[str, Kind] = {}
    left_out: dict[str, str] = {}
    for device in devices:
        name = f"pipeline_dali_{device.type}"
        try:
            choose_backend("dali", device)
            kinds[name] = Kind("dali", device)
        except BackendError as error:
            left_out[name] = str(error)
        kinds[f"pipeline_torch_eager_{device.type}"] = Kind("torch", device)
        able, why = find_compiler(device)
        if able:
            kinds[f"pipeline_torch_compiled_{device.type}"] = Kind("torch", device, compiled=True)
        else:
            left_out[f"pipeline_torch_compiled_{device.type}"] = why
    return kinds, left_out


def each_alone(augment: Augment) -> dict[str, Augment]:
    """Variants by name: no augmentation, each one that is switched on by itself, and all of them."""
    found = {"none": NO_AUGMENT}
    if augment.crop:
        found["crop"] = replace(NO_AUGMENT, crop=True, pad=augment.pad, padding_mode=augment.padding_mode)
    if augment.flip:
        found["flip"] = replace(NO_AUGMENT, flip=True)
    if augment.cutout:
        found["cutout"] = replace(NO_AUGMENT, cutout=augment.cutout)
    return found | {"all": augment}

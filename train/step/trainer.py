"""The network with everything that trains it: one training step, one epoch of them, one evaluation."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import net as networks
from dali_pipeline.backend import BackendChoice
from dali_pipeline.dataset import Dataset
from dali_pipeline.feed import FeedOrder
from dali_pipeline.loader import EvalLoader, TrainLoader
from net.interface import Network
from net.options import parts_of
from train.config import Config
from train.failpoints import failpoint
from train.machine.distributed import Group
from train.machine.runtime import Runtime, seed_everything
from train.step.average import WeightAverage
from train.step.borrow import borrowed_state
from train.step.captured import CapturedStep
from train.step.evaluation import Score, evaluate
from train.step.measures import Measure, measures_of
from train.step.meter import StepMeter
from train.step.optim import Optimizers, parameter_groups
from train.step.schedule import OneCycle, Rates
from train.step.steps import EvalStep, TrainStep, balanced_weights, compile_in_place
from train.step.views import VIEWS


def make_train_loader(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    backend: BackendChoice | str,
    *,
    seed: int | None = None,
    compiled: bool = False,
    group: Group | None = None,
) -> TrainLoader:
    """The augmented training batches of a recipe; `seed` replaces the recipe's. Raises the errors of TrainLoader."""
    group = group or Group()
    return TrainLoader(
        dataset.train,
        FeedOrder(
            batch_size=config.train.batch_size,
            augment=config.augment,
            fill=dataset.fill,
            device=device,
            compiled=compiled,
            resident=config.data.resident,
        ),
        seed=config.train.seed if seed is None else seed,
        backend=backend,
        tail=config.train.tail,
        rank=group.rank,
        world_size=group.world_size,
    )


def new_network(config: Config, dataset: Dataset, initial: Mapping[str, Tensor] | None = None) -> Network:
    """The network of a recipe, on the CPU, with the parts frozen that the recipe freezes. Its weights are drawn from torch's
    generator, and replaced by those of `initial`. Without those, a network that asks for it (`images_to_prepare`) is initialised
    from training images, evenly spread over the training split."""
    network = networks.build(config.net, dataset.num_classes)
    network.freeze(parts_of(config.net.freeze))
    if initial is not None:
        network.load_state_dict({**network.state_dict(), **initial})
    elif network.images_to_prepare:
        count = min(network.images_to_prepare, len(dataset.train))
        some = dataset.train.take(np.arange(count) * len(dataset.train) // count)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (dataset.mean, dataset.std))
        network.prepare((torch.from_numpy(some.images).permute(0, 3, 1, 2).float() - mean) / std)
    return network


class Trainer:
    """The network with everything that trains it, in one process.

    `step` is the compiled training step, inside DistributedDataParallel where there are several processes. `captured`, where
    there is one, replays `step` with the update as one CUDA graph. `net` is the network itself, without wrappers, so its
    state-dict keys have no prefixes. `measures` is what the last evaluation reports, on the validation split where there is one,
    and `plain_measures` what those after earlier epochs do; the first of both chooses best.pt. `initial`: weights to begin with,
    by their names in the state; what they leave out is drawn.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        runtime: Runtime,
        backend: BackendChoice,
        group: Group | None = None,
        *,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.dataset, self.runtime, self.group = config, dataset, runtime, group or Group()
        self.backend, self.initial = backend, initial
        device = runtime.device
        network: nn.Module = new_network(config, dataset, initial).to(device)
        self.synchronised = config.train.sync_bn and self.group.world_size > 1
        if self.synchronised:
            # its import brings torch's compiler, which takes longer than the rest of torch
            from train.step.sync_bn import synchronise_batch_norm

            network = synchronise_batch_norm(network, device)
        if runtime.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert isinstance(network, Network)
        self.net = network
        self.ema: WeightAverage | None = None
        if config.train.ema_decay > 0:
            self.ema = WeightAverage(network, config.train.ema_decay)
        given = Rates.given(config.schedule)
        groups = parameter_groups(network, config.optim, None if given is None else given.lr_max)
        self.optimizers = Optimizers(groups, config.optim, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "fp16")
        self.measures = measures_of(config.train, "test" if dataset.validation is None else "validation")
        self.plain_measures = tuple(measure for measure in self.measures if measure.views == "plain")
        self._build_steps(runtime.compile_mode)
        self.train_loader = self._train_loader(config.train.seed)
        self.eval_loader = self.make_eval_loader(self.measures[0].split, backend)
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.local_batch = config.train.batch_size // self.group.world_size

    def _train_loader(self, seed: int) -> TrainLoader:
        return make_train_loader(
            self.config,
            self.dataset,
            self.runtime.device,
            self.backend,
            seed=seed,
            compiled=self.runtime.compile_mode is not None,
            group=self.group,
        )

    def make_eval_loader(self, split: str, backend: BackendChoice) -> EvalLoader:
        """A loader of this process's part of the split with this name; the caller closes it. Raises the errors of EvalLoader."""
        return EvalLoader(
            self.dataset.splits[split],
            batch_size=self.config.train.eval_batch_size,
            device=self.runtime.device,
            backend=backend,
            resident=self.config.data.resident,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )

    def _build_steps(self, compile_mode: str | None) -> None:
        dataset, runtime = self.dataset, self.runtime
        self.captured: CapturedStep | None = None
        self.not_captured: str | None = None  # why a step that was to be captured is not
        optim = self.config.optim
        balanced = optim.class_weights == "balanced"
        self.train_step = TrainStep(
            self.net,
            dataset.mean,
            dataset.std,
            label_smoothing=optim.label_smoothing,
            class_weights=balanced_weights(dataset.train.labels, dataset.num_classes) if balanced else None,
            autocast_dtype=runtime.autocast_dtype,
            channels_last=runtime.channels_last,
        ).to(runtime.device)
        averaged: dict[str, nn.Module] = {} if self.ema is None else {"ema": self.ema.module}
        self.eval_steps = {weights: self._eval_step(module) for weights, module in {"": self.net, **averaged}.items()}
        if compile_mode is not None:
            self._compile_steps(compile_mode)
        self.step: nn.Module = self.train_step
        if self.group.world_size > 1:
            devices = [runtime.device.index] if runtime.device.type == "cuda" else None
            # the only buffers are batch norm's statistics; average_statistics combines them where they are used
            known = inspect.signature(
                DistributedDataParallel
            ).parameters  # newer versions of torch have renamed the option
            off: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self.step = DistributedDataParallel(self.train_step, device_ids=devices, **off)

    def _eval_step(self, net: nn.Module) -> EvalStep:
        return EvalStep(
            net,
            self.dataset.mean,
            self.dataset.std,
            autocast_dtype=self.runtime.autocast_dtype,
            channels_last=self.runtime.channels_last,
        ).to(self.runtime.device)

    def _compile_steps(self, mode: str) -> None:
        for step in (self.train_step, *self.eval_steps.values()):
            compile_in_place(step, mode)

    def compiled_on(self, mode: str) -> None:
        """Have the steps, which were built to run eagerly, compiled at their first call."""
        self.runtime = replace(self.runtime, compile_mode=mode)
        self._compile_steps(mode)
        if self.backend.name == "torch":  # its pipeline is compiled too
            self.train_loader.close()
            self.train_loader = self._train_loader(self.config.train.seed)

    def compiled_off(self) -> None:
        """Go on without torch.compile."""
        self.runtime = replace(self.runtime, compile_mode=None)
        self._build_steps(None)

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Restores all state at the end of the block, in which this process trains by itself: the others may take longer,
        or other numbers of steps, or fail. torch's own SyncBatchNorm, on CUDA, waits for the others there too."""
        with borrowed_state(self.net, self.optimizers, self.scaler):
            if not self.synchronised:
                yield
                return
            from train.step.sync_bn import alone

            with alone():
                yield

    def step_seconds(self, enough: float = 1.0, most: int = 4) -> float:
        """The processor time of one training step on the CPU, compiled or not as it is now. It is the shortest of at most `most`
        steps after a first one, or the first one's where that alone takes `enough` seconds. Trains on a random batch, and
        restores all state."""
        with self._by_itself():
            images, labels = self._random_batch(self.local_batch)
            first = self._timed(images, labels, self.train_step)
            if first >= enough:
                return first
            times = [self._timed(images, labels, self.train_step)]
            while len(times) < most and sum(times) < enough:
                times.append(self._timed(images, labels, self.train_step))
        return min(times)

    def compiled_gain(self, pairs: int) -> float:
        """An eager step's time over a compiled one's, on the CPU: the ratio of the shortest of `pairs` steps each, run in turns.
        Trains on a random batch, and restores all state."""
        eager, compiled = [], []
        with self._by_itself():
            images, labels = self._random_batch(self.local_batch)
            for _ in range(pairs):
                eager.append(self._timed(images, labels, self.train_step.forward))
                compiled.append(self._timed(images, labels, self.train_step))
        return min(eager) / min(compiled)

    def _timed(self, images: Tensor, labels: Tensor, step: Callable[[Tensor, Tensor], Any]) -> float:
        begun = time.thread_time()  # processor time of this thread: other programs do not count
        self.train_one(images, labels, 0.0, step)
        return time.thread_time() - begun

    def _random_batch(self, size: int) -> tuple[Tensor, Tensor]:
        dataset, device = self.dataset, self.runtime.device
        images = torch.randint(0, 256, (size, dataset.height, dataset.width, 3), dtype=torch.uint8, device=device)
        return images.permute(0, 3, 1, 2), torch.randint(0, dataset.num_classes, (size,), device=device)

    def warm_up(self, training: bool = True) -> None:
        """Compile (and on CUDA capture) the training and the evaluation graph on random batches; all state is restored. Without
        `training` the evaluation graph alone."""
        calls = range(3 if self.runtime.device.type == "cuda" else 1)
        with self._by_itself():
            # drawn first: a capture that fails may leave the device's generator unusable
            to_evaluate, _ = self._random_batch(self.config.train.eval_batch_size // self.group.world_size)
            if training:
                images, labels = self._random_batch(self.local_batch)
                for _ in calls:
                    # not through DistributedDataParallel, where all processes would wait if the compiler failed on one of them
                    self.train_one(images, labels, 0.0, self.train_step)
                if self.runtime.step_graph:
                    self._capture(images, labels)
            with torch.no_grad():
                for step in self.eval_steps.values():
                    step.eval()
                    for _ in calls:
                        torch.compiler.cudagraph_mark_step_begin()
                        step(to_evaluate)
        if training:
            # the pipeline comes last: DALI prefetches from its first batch on, which would break a capture of CUDA graphs
            next(self.train_loader.epoch(0))
        # the evaluation step has switched the network to eval mode
        self.net.train()

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        """Have the steps to come replay a CUDA graph; `not_captured` says why they do not."""

        def run(images: Tensor, labels: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
            self.optimizers.set_rate(rate)
            return self._update_on(images, labels, self.train_step)

        try:
            self.captured = CapturedStep(run, images, labels)
        except RuntimeError as error:  # of CUDA, or of torch where a call may not be captured
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of the capture fails too, and says less
                cause = cause.__context__
            self.not_captured = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        finally:
            self.optimizers.set_rate(0.0)

    def train_one(
        self, images: Tensor, labels: Tensor, rate: float, step: Callable[[Tensor, Tensor], Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: forward, loss, backward, update at the given rate. Gives (loss, correct), on the device, which the next step
        may overwrite."""
        failpoint("step")
        # marks the begin of a CUDA graph; without it an evaluation between two steps would cause another capture
        if self.runtime.compile_mode is not None:  # the next line imports the compiler
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizers.set_rate(rate)
        if self.captured is not None and step is None:
            loss, correct = self.captured(images, labels, rate)
        else:
            loss, correct = self._update_on(images, labels, step or self.step)
        self.optimizers.look_ahead()
        return loss, correct

    def _update_on(
        self, images: Tensor, labels: Tensor, step: Callable[[Tensor, Tensor], Any]
    ) -> tuple[Tensor, Tensor]:
        loss, correct = step(images, labels)
        self.scaler.scale(loss).backward()
        self.optimizers.step(self.scaler)
        self.scaler.update()
        self.optimizers.zero_grad()
        return loss.detach(), correct

    def train_epoch(
        self,
        epoch: int,
        schedule: OneCycle,
        meter: StepMeter,
        start_step: int = 0,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Steps `start_step` to the end of the epoch; `after_step(done)` runs on the host after each.

        No step waits for the device.
        """
        self.step.train()
        ema_every = self.config.train.ema_every
        for step, (images, labels) in enumerate(self.train_loader.epoch(epoch, start_step), start_step):
            global_step = epoch * self.steps_per_epoch + step
            loss, correct = self.train_one(images, labels, schedule(global_step))
            self.net.steps += 1
            meter.record(step, loss, correct)
            if self.ema is not None and (global_step + 1) % ema_every == 0:
                self.ema.update(self.net)
            if after_step is not None:
                after_step(step + 1)

    def evaluate(
        self, after_batch: Callable[[int], None] | None = None, measures: Sequence[Measure] | None = None
    ) -> dict[Measure, Score]:
        """The scores of `measures`, by default of the recipe's. An exception from `after_batch` ends the evaluation."""
        return self.evaluate_on(self.eval_loader, self.measures if measures is None else measures, after_batch)

    def evaluate_on(
        self, loader: EvalLoader, measures: Sequence[Measure], after_batch: Callable[[int], None] | None = None
    ) -> dict[Measure, Score]:
        """The scores of these measures on what `loader` gives. All views go through the same compiled step, one after another."""
        self.average_statistics()
        scores: dict[Measure, Score] = {}
        for weights, step in self.eval_steps.items():
            if of_step := [measure for measure in measures if measure.weights == weights]:
                views = [VIEWS[measure.views] for measure in of_step]
                scores |= zip(of_step, evaluate(step, loader, views=views, after_batch=after_batch).scores, strict=True)
        return {measure: scores[measure] for measure in measures}

    def average_statistics(self) -> None:
        """Replace batch norm's running statistics, of which each process has its own, by their mean over the processes."""
        if self.group.world_size == 1 or self.config.train.sync_bn:
            return
        modules = [self.net] if self.ema is None else [self.net, self.ema.module]
        buffers = [b for module in modules for b in module.running_statistics()]
        if not buffers:
            return
        together = torch.cat([b.flatten() for b in buffers])
        torch.distributed.all_reduce(together)
        together /= self.group.world_size
        for buffer, mean in zip(buffers, together.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))

    def finite(self) -> bool:
        """Whether all weights and statistics are finite numbers."""
        tensors = [t for t in self.net.state_dict().values() if t.is_floating_point()]
        return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())

    def state(self) -> dict[str, Any]:
        """The state that steps change, as plain dicts."""
        return {
            "model": self.net.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizers.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Restore only the weights and their average from the result of `state`."""
        self.net.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        self.load_weights(state)
        self.optimizers.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():  # the state may come from a training without a scaler
            self.scaler.load_state_dict(state["scaler"])

    def start_over(self, seed: int) -> None:
        """Reset to the state of a new trainer with this seed. The tensors of the network and of its average keep their memory, so
        that what was compiled or captured stays valid; `config` is not changed."""
        seed_everything(seed, self.config.train.deterministic)
        drawn = new_network(self.config, self.dataset, self.initial)
        self.net.load_state_dict(drawn.state_dict())
        self.net.train()
        if self.ema is not None:
            self.ema.start_over(drawn)
        self.optimizers.zero_grad()
        self.optimizers.start_over()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(torch.amp.GradScaler(self.runtime.device.type).state_dict())
        self.train_loader.close()
        self.train_loader = self._train_loader(seed)

    def close(self) -> None:
        """Stop the pipelines and free the resident images."""
        self.train_loader.close()
        self.eval_loader.close()

"""The network with everything that trains it: one training step, one epoch of them, one evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dali_pipeline.datasets import Dataset
from dali_pipeline.loader import BackendChoice, EvalLoader, TrainLoader
from dali_pipeline.plan import Augment
from net.resnet import CustomResNet
from train.borrow import borrowed_state
from train.config import Config
from train.distributed import Group
from train.evaluation import Evaluation, evaluate
from train.optim import OneCycle, make_optimizer, set_learning_rate
from train.progress import StepMeter
from train.runtime import Runtime
from train.steps import EvalStep, TrainStep
from train.sync_bn import synchronise_batch_norm


def make_train_loader(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    backend: BackendChoice | str,
    *,
    compiled: bool = False,
    group: Group | None = None,
) -> TrainLoader:
    """The augmented training batches of a recipe; raises what TrainLoader raises."""
    group = group or Group()
    return TrainLoader(
        dataset.train,
        batch_size=config.train.batch_size,
        augment=Augment(**asdict(config.augment)),
        fill=dataset.fill,
        seed=config.train.seed,
        device=device,
        backend=backend,
        tail=config.train.tail,
        rank=group.rank,
        world_size=group.world_size,
        compiled=compiled,
    )


class Trainer:
    """The network with everything that trains it, on one process.

    `step` is the compiled training step, under DistributedDataParallel where there are several processes; `net` is the
    plain network inside, whose state-dict keys are clean.
    """

    def __init__(
        self, config: Config, dataset: Dataset, runtime: Runtime, backend: BackendChoice, group: Group | None = None
    ) -> None:
        self.config, self.dataset, self.runtime, self.group = config, dataset, runtime, group or Group()
        device = runtime.device
        net: nn.Module = CustomResNet(dataset.num_classes, config.net.width, config.net.logit_scale).to(device)
        if config.train.sync_bn and self.group.world_size > 1:
            net = synchronise_batch_norm(net, device)
        if runtime.channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net = net
        self.ema: AveragedModel | None = None
        if config.train.ema_decay > 0:
            self.ema = AveragedModel(net)
        self.optimizer = make_optimizer(
            net,
            momentum=config.optim.momentum,
            nesterov=config.optim.nesterov,
            weight_decay=config.optim.weight_decay,
            norm_bias_weight_decay=config.optim.norm_bias_weight_decay,
            device=device,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "fp16")
        self._build_steps(runtime.compile_mode)
        self.train_loader = make_train_loader(
            config, dataset, device, backend, compiled=runtime.compile_mode is not None, group=self.group
        )
        self.eval_loader = EvalLoader(
            dataset.test,
            batch_size=config.train.eval_batch_size,
            device=device,
            backend=backend,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.local_batch = config.train.batch_size // self.group.world_size

    def _build_steps(self, compile_mode: str | None) -> None:
        dataset, runtime = self.dataset, self.runtime
        common: dict[str, Any] = {"autocast_dtype": runtime.autocast_dtype, "channels_last": runtime.channels_last}
        tta = self.config.train.tta
        self.train_step = TrainStep(
            self.net, dataset.mean, dataset.std, label_smoothing=self.config.optim.label_smoothing, **common
        ).to(runtime.device)
        self.eval_step = EvalStep(self.net, dataset.mean, dataset.std, tta=tta, **common).to(runtime.device)
        self.ema_step: EvalStep | None = None
        if self.ema is not None:
            self.ema_step = EvalStep(self.ema.module, dataset.mean, dataset.std, tta=tta, **common).to(runtime.device)
        if compile_mode is not None:
            for step in (self.train_step, self.eval_step, self.ema_step):
                if step is not None:
                    step.compile(mode=compile_mode, dynamic=False)
        self.step: nn.Module = self.train_step
        if self.group.world_size > 1:
            devices = [runtime.device.index] if runtime.device.type == "cuda" else None
            # its only buffers are batch norm's statistics, which average_statistics brings together where they are used
            known = inspect.signature(
                DistributedDataParallel
            ).parameters  # newer versions of torch have renamed the option
            off: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self.step = DistributedDataParallel(self.train_step, device_ids=devices, **off)

    def compiled_off(self) -> None:
        """Go on without torch.compile."""
        self.runtime = replace(self.runtime, compile_mode=None)
        self._build_steps(None)

    def warm_up(self) -> None:
        """Compile (and on CUDA capture) the training and the evaluation graph on random batches; all state comes back."""
        height, width = self.dataset.train.height, self.dataset.train.width

        def batch(size: int) -> tuple[Tensor, Tensor]:
            images = torch.randint(0, 256, (size, height, width, 3), dtype=torch.uint8, device=self.runtime.device)
            labels = torch.randint(0, self.dataset.num_classes, (size,), device=self.runtime.device)
            return images.permute(0, 3, 1, 2), labels

        with borrowed_state(self.net, self.optimizer, self.scaler):
            images, labels = batch(self.local_batch)
            for _ in range(3 if self.runtime.device.type == "cuda" else 1):
                # not through DistributedDataParallel: a compiler may fail on one process alone
                self.train_one(images, labels, 0.0, self.train_step)
            images, _ = batch(self.config.train.eval_batch_size // self.group.world_size)
            with torch.no_grad():
                for step in (self.eval_step, self.ema_step):
                    if step is not None:
                        step.eval()
                        for _ in range(3 if self.runtime.device.type == "cuda" else 1):
                            torch.compiler.cudagraph_mark_step_begin()
                            step(images)
        # the pipeline last: DALI prefetches from its first batch on, which would break a capture of CUDA graphs
        next(self.train_loader.epoch(0))
        # the average shares no memory with the network, but its batch-norm mode was switched
        self.net.train()

    def train_one(
        self, images: Tensor, labels: Tensor, rate: float, step: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: forward, loss, backward, update at the given rate. Gives (loss, correct), on the device."""
        # every step is a CUDA graph of its own: without the mark an evaluation between two steps would capture anew
        torch.compiler.cudagraph_mark_step_begin()
        set_learning_rate(self.optimizer, rate)
        loss, correct = (step or self.step)(images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
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
            meter.record(step, loss, correct)
            if self.ema is not None and (global_step + 1) % ema_every == 0:
                self._update_average(self.ema)
            if after_step is not None:
                after_step(step + 1)

    @torch.no_grad()
    def _update_average(self, ema: AveragedModel) -> None:
        """average = decay * average + (1 - decay) * now, of weights and batch-norm statistics; the first update copies.

        AveragedModel's own update would make the host wait: it copies its counter to the device each time.
        """
        now = list(chain(self.net.parameters(), self.net.buffers()))
        averages = list(chain(ema.module.parameters(), ema.module.buffers()))
        floats = [i for i, tensor in enumerate(now) if tensor.is_floating_point()]
        if int(ema.n_averaged) > 0:  # on the CPU
            weight = 1 - self.config.train.ema_decay
            torch._foreach_lerp_([averages[i] for i in floats], [now[i] for i in floats], weight)
            counters = [i for i, tensor in enumerate(now) if not tensor.is_floating_point()]
            torch._foreach_copy_([averages[i] for i in counters], [now[i] for i in counters])
        else:
            torch._foreach_copy_(averages, now)
        ema.n_averaged += 1

    def evaluate(self, after_batch: Callable[[int], None] | None = None) -> tuple[Evaluation, Evaluation | None]:
        """The test set through the network, and through the weights' average where one is kept."""
        self.average_statistics()
        plain = evaluate(self.eval_step, self.eval_loader, after_batch=after_batch)
        if self.ema_step is None:
            return plain, None
        return plain, evaluate(self.ema_step, self.eval_loader, after_batch=after_batch)

    def average_statistics(self) -> None:
        """In place, over the processes: the mean of batch norm's running statistics, each process's own until then."""
        if self.group.world_size == 1 or self.config.train.sync_bn:
            return
        modules = [self.net] if self.ema is None else [self.net, self.ema.module]
        buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
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
        """Everything that a step changes, as plain dicts."""
        return {
            "model": self.net.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.net.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        fused = [group["fused"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = own  # of this device, not of the one that saved
        if state["scaler"] and self.scaler.is_enabled():  # either may have trained without one
            self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        self.train_loader.close()
        self.eval_loader.close()

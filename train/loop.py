"""Training as it is described in the README: set up, warm up, find the rates, then epochs of steps and evaluations."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dali_pipeline.datasets import Dataset
from dali_pipeline.loader import BackendChoice, EvalLoader, TrainLoader
from dali_pipeline.plan import Augment
from net.resnet import CustomResNet
from train.borrow import borrowed_state
from train.checkpoint import save_checkpoint
from train.config import Config, checkpoint_interval, to_dict
from train.distributed import Group
from train.evaluation import Evaluation, Score, evaluate
from train.optim import OneCycle, make_optimizer, set_learning_rate
from train.progress import EpochDisplay, NonFiniteLoss, StepMeter, duration
from train.record import Log, RunFolder
from train.runtime import Runtime
from train.steps import EvalStep, TrainStep

LONG_RUN_SECONDS = 3600.0
STEPS_BETWEEN_QUESTIONS = 20  # between processes: may we stop, may we save


class Interrupted(Exception):
    """A signal asked the run to end; the step is finished and the state saved. `code` is the process's exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class SignalWatch:
    """The first SIGINT or SIGTERM is noted, for the loop to end at the next step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def watching(self) -> Iterator[SignalWatch]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Times:
    """Seconds by what they were spent on."""

    set_up: float = 0.0
    compile: float = 0.0
    lr_search: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0

    @contextmanager
    def on(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun)


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
        net: nn.Module = CustomResNet(dataset.num_classes, config.net.width).to(device)
        if config.train.sync_bn and self.group.world_size > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        if runtime.channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net = net
        self.ema: AveragedModel | None = None
        if config.train.ema_decay > 0:
            average = get_ema_multi_avg_fn(config.train.ema_decay)
            self.ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
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
        augment = config.augment
        self.train_loader = TrainLoader(
            dataset.train,
            batch_size=config.train.batch_size,
            augment=Augment(
                crop=augment.crop,
                pad=augment.pad,
                padding_mode=augment.padding_mode,
                flip=augment.flip,
                cutout=augment.cutout,
            ),
            fill=dataset.fill,
            seed=config.train.seed,
            device=device,
            backend=backend,
            tail=config.train.tail,
            rank=self.group.rank,
            world_size=self.group.world_size,
            compiled=runtime.compile_mode is not None,
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
        train_step = TrainStep(
            self.net, dataset.mean, dataset.std, label_smoothing=self.config.optim.label_smoothing, **common
        ).to(runtime.device)
        self.eval_step = EvalStep(self.net, dataset.mean, dataset.std, tta=tta, **common).to(runtime.device)
        self.ema_step: EvalStep | None = None
        if self.ema is not None:
            self.ema_step = EvalStep(self.ema.module, dataset.mean, dataset.std, tta=tta, **common).to(runtime.device)
        if compile_mode is not None:
            for step in (train_step, self.eval_step, self.ema_step):
                if step is not None:
                    step.compile(mode=compile_mode, dynamic=False)
        self.step: nn.Module = train_step
        if self.group.world_size > 1:
            devices = [runtime.device.index] if runtime.device.type == "cuda" else None
            self.step = DistributedDataParallel(train_step, device_ids=devices)

    def compiled_off(self) -> None:
        """Go on without torch.compile."""
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
                self.train_one(images, labels, 0.0)
            images, _ = batch(self.config.train.eval_batch_size // self.group.world_size)
            with torch.no_grad():
                for step in (self.eval_step, self.ema_step):
                    if step is not None:
                        step.eval()
                        for _ in range(3 if self.runtime.device.type == "cuda" else 1):
                            step(images)
        # the pipeline last: DALI prefetches from its first batch on, which would break a capture of CUDA graphs
        next(self.train_loader.epoch(0))
        # the average shares no memory with the network, but its batch-norm mode was switched
        self.net.train()

    def train_one(self, images: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One step: forward, loss, backward, update at the given rate. Gives (loss, correct), on the device."""
        set_learning_rate(self.optimizer, rate)
        loss, correct = self.step(images, labels)
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
                self.ema.update_parameters(self.net)
            if after_step is not None:
                after_step(step + 1)

    def evaluate(self) -> tuple[Evaluation, Evaluation | None]:
        """The test set through the network, and through the weights' average where one is kept."""
        plain = evaluate(self.eval_step, self.eval_loader)
        return plain, evaluate(self.ema_step, self.eval_loader) if self.ema_step is not None else None

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
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        self.train_loader.close()
        self.eval_loader.close()


@dataclass
class Position:
    """Where a run stands: finished epochs, steps done in the next one, and what is known of those steps."""

    epoch: int = 0
    step: int = 0
    step_losses: list[float] = field(default_factory=list)
    step_correct: list[int] = field(default_factory=list)
    seconds: float = 0.0  # training time already spent on the unfinished epoch
    best_accuracy: float = -1.0
    best_epoch: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)


def checkpoint_state(trainer: Trainer, schedule: OneCycle, position: Position, times: Times) -> dict[str, Any]:
    """The content of a checkpoint: the trainer's state, the position, and what an analysis needs to know."""
    dataset = trainer.dataset
    return {
        **trainer.state(),
        "epoch": position.epoch,
        "step": position.step,
        "step_losses": position.step_losses,
        "step_correct": position.step_correct,
        "seconds": position.seconds,
        "metrics": position.metrics,
        "best_accuracy": position.best_accuracy,
        "best_epoch": position.best_epoch,
        "test_accuracy": position.metrics[-1]["test_accuracy"] if position.metrics else None,
        "lr_max": schedule.lr_max,
        "lr_min": schedule.lr_min,
        "steps_per_epoch": trainer.steps_per_epoch,
        "times": vars(times).copy(),
        "config": to_dict(trainer.config),
        "data_name": dataset.name,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "fill": list(dataset.fill),
        "height": dataset.train.height,
        "width": dataset.train.width,
    }


def restore(trainer: Trainer, state: dict[str, Any], times: Times) -> Position:
    """Put trainer and times where a checkpoint left them."""
    trainer.load_state(state)
    for name, seconds in state["times"].items():
        setattr(times, name, getattr(times, name) + seconds)
    names = ("epoch", "step", "step_losses", "step_correct", "seconds", "best_accuracy", "best_epoch", "metrics")
    return Position(**{name: state[name] for name in names})


class Run:
    """The epochs of a run: trains, evaluates, reports, saves."""

    def __init__(
        self,
        trainer: Trainer,
        schedule: OneCycle,
        folder: RunFolder | None,
        log: Log,
        times: Times,
        position: Position,
        signals: SignalWatch,
    ) -> None:
        self.trainer, self.schedule, self.folder, self.log = trainer, schedule, folder, log
        self.times, self.position, self.signals = times, position, signals
        self.every_steps, self.every_seconds = checkpoint_interval(trainer.config.run.checkpoint_every)
        self.last_save = time.perf_counter()
        self.estimated = False
        self.writer: Any = None
        if trainer.config.run.tensorboard and folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=position.epoch + 1)  # type: ignore[no-untyped-call]

    def train(self) -> None:
        """All epochs that are left."""
        while self.position.epoch < self.trainer.config.train.epochs:
            self._epoch()
        if self.writer is not None:
            self.writer.close()

    def _epoch(self) -> None:
        trainer, position, config = self.trainer, self.position, self.trainer.config
        steps, device = trainer.steps_per_epoch, trainer.runtime.device
        meter = StepMeter(position.epoch, steps, device)
        if position.step:
            meter.losses[: position.step] = torch.tensor(position.step_losses, device=device)
            if trainer.group.first:  # the saved counts are those of all processes together
                meter.correct[: position.step] = torch.tensor(position.step_correct, device=device)
        title = f"epoch {position.epoch + 1}/{config.train.epochs}"
        display = EpochDisplay(self.log, title, steps, position.step, config.train.batch_size)
        begun, before, start = time.perf_counter(), position.seconds, position.step

        def after_step(done: int) -> None:
            if meter.poll(done):
                display.update(done, meter)
            self._estimate(done - start, time.perf_counter() - begun)
            self._maybe_stop_or_save(done, meter, before + time.perf_counter() - begun)

        try:
            with self.times.on("training", device), self._naming_the_images():
                trainer.train_epoch(position.epoch, self.schedule, meter, position.step, after_step)
                self._over_ranks(meter.losses, meter.correct)
                meter.seen = 0  # the totals over all processes are new to the host
                meter.finish(steps)
        finally:
            display.close()
        seconds = before + time.perf_counter() - begun
        eval_begun = time.perf_counter()
        with self.times.on("evaluation", device):
            plain, ema = trainer.evaluate()
        self._finish_epoch(meter, seconds, time.perf_counter() - eval_begun, plain, ema)

    @contextmanager
    def _naming_the_images(self) -> Iterator[None]:
        """Add to a NonFiniteLoss which images the step had: the plan knows them."""
        try:
            yield
        except NonFiniteLoss as error:
            images = self.trainer.train_loader.plan(error.epoch, error.step).indices.tolist()
            shown = ", ".join(map(str, images[:8])) + (f" ... {images[-1]}" if len(images) > 8 else "")
            rate = self.schedule(error.epoch * self.trainer.steps_per_epoch + error.step)
            error.args = (
                f"{error} (learning rate {rate:.3g}, training images {shown}); the checkpoint before it is kept. "
                "Lower schedule.lr_max, or use train.precision=fp32",
            )
            raise

    def _over_ranks(self, losses: Tensor, correct: Tensor) -> None:
        """In place: the mean of the losses and the sum of the correct predictions over all processes."""
        if self.trainer.group.world_size > 1:
            torch.distributed.all_reduce(losses)
            losses /= self.trainer.group.world_size
            torch.distributed.all_reduce(correct)

    def _finish_epoch(
        self, meter: StepMeter, seconds: float, eval_seconds: float, plain: Evaluation, ema: Evaluation | None
    ) -> None:
        trainer, position, config = self.trainer, self.position, self.trainer.config
        train_loss, train_accuracy = meter.means(config.train.batch_size)
        images = trainer.steps_per_epoch * config.train.batch_size
        position.epoch += 1
        position.step, position.step_losses, position.step_correct, position.seconds = 0, [], [], 0.0
        score = plain.plain
        record: dict[str, Any] = {
            "epoch": position.epoch,
            "lr": self.schedule(position.epoch * trainer.steps_per_epoch - 1),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": score.loss,
            "test_accuracy": score.accuracy,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "eval_seconds": eval_seconds,
        }
        others: dict[str, Score | None] = {"test_tta": plain.flip}
        if ema is not None:
            others |= {"ema_test": ema.plain, "ema_test_tta": ema.flip}
        for name, other in others.items():
            if other is not None:
                record |= {f"{name}_loss": other.loss, f"{name}_accuracy": other.accuracy}
        position.metrics.append(record)
        self.log(
            f"epoch {position.epoch}/{config.train.epochs}: lr {record['lr']:.4g}, loss {train_loss:.4f}, "
            f"accuracy {train_accuracy:.2f}%, {seconds:.1f} s, {record['images_per_second']:,.0f} images/s"
        )
        self.log(f"test: {score}")
        labels = {"test_tta": "test, flip TTA", "ema_test": "test, EMA", "ema_test_tta": "test, EMA and flip TTA"}
        for name, other in others.items():
            if other is not None:
                self.log(f"{labels[name]}: {other}")
        better = score.accuracy > position.best_accuracy
        if better:
            position.best_accuracy, position.best_epoch = score.accuracy, position.epoch
        if not math.isfinite(score.loss):
            raise NonFiniteLoss(position.epoch - 1, trainer.steps_per_epoch - 1, score.loss)
        if self.writer is not None:
            for name, value in record.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, position.epoch)
            self.writer.flush()
        self.save(best=better)
        if self.trainer.group.any(self.signals.received is not None):
            raise Interrupted(self.signals.received or signal.SIGTERM)

    def save(self, best: bool = False) -> None:
        """Write last.pt (and best.pt), and metrics.jsonl to match."""
        self.last_save = time.perf_counter()
        if self.folder is None:
            return
        state = checkpoint_state(self.trainer, self.schedule, self.position, self.times)
        path = self.folder.path
        save_checkpoint(path / "last.pt", state, keep_previous=path / "previous.pt")
        if best:
            save_checkpoint(path / "best.pt", state)
        self.folder.write_metrics(self.position.metrics)

    def _maybe_stop_or_save(self, done: int, meter: StepMeter, seconds: float) -> None:
        group = self.trainer.group
        due = self.every_steps is not None and done % self.every_steps == 0
        stop = False
        # several processes must agree on the step at which they save or stop: they ask each other now and then
        if group.world_size == 1 or done % STEPS_BETWEEN_QUESTIONS == 0:
            stop = group.any(self.signals.received is not None)
            if self.every_seconds is not None:
                due = due or group.any(time.perf_counter() - self.last_save >= self.every_seconds)
        if done == self.trainer.steps_per_epoch:
            return  # the epoch's end saves and stops by itself
        if due or stop:
            self._save_inside(done, meter, seconds)
        if stop:
            raise Interrupted(self.signals.received or signal.SIGTERM)

    def _save_inside(self, done: int, meter: StepMeter, seconds: float) -> None:
        meter.finish(done)
        losses, correct = meter.losses[:done].clone(), meter.correct[:done].clone()
        self._over_ranks(losses, correct)
        position = self.position
        position.step, position.seconds = done, seconds
        position.step_losses, position.step_correct = losses.tolist(), correct.tolist()
        self.save()

    def _estimate(self, done: int, elapsed: float) -> None:
        """Once, after the first steps: what the run will take, where that is long."""
        if self.estimated or done < 3 or elapsed < 5:
            return
        self.estimated = True
        trainer = self.trainer
        left = trainer.total_steps - self.position.epoch * trainer.steps_per_epoch
        total = elapsed / done * left
        if total > LONG_RUN_SECONDS:
            self.log(long_run_advice(total, elapsed / done, trainer.config, trainer.runtime))


def long_run_advice(seconds: float, per_step: float, config: Config, runtime: Runtime) -> str:
    """What a run of hours is told after its first steps: the estimate, and which keys shorten it."""
    shorter = ["fewer epochs (train.epochs=)"]
    if config.net.width > 16:
        shorter.insert(
            0, f"a narrower network (net.width=16 costs about {(16 / config.net.width) ** 2:.0%} of the arithmetic)"
        )
    if runtime.device.type == "cpu":
        if any("bf16 is faster" in note for note in runtime.notes):
            shorter.insert(0, "train.precision=bf16 (this CPU has bf16 matrix units)")
        shorter.append("a machine with a GPU")
    return (
        f"note: this run will take about {duration(seconds)} at {per_step:.1f} s a step on {runtime.device.type}. It goes on; "
        f"shorter: {', '.join(shorter)}"
    )


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: of this process on the host, and of torch's allocator on the GPU."""
    peak = {}
    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        peak["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
    except ImportError:  # Windows
        pass
    if device.type == "cuda":
        peak["device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak


def summary_lines(run: Run, path: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The end of a run, as summary.json and as lines for a person."""
    trainer, position, times = run.trainer, run.position, run.times
    last = position.metrics[-1]
    images = sum(round(m["seconds"] * m["images_per_second"]) for m in position.metrics)
    seconds = sum(m["seconds"] for m in position.metrics)
    summary: dict[str, Any] = {
        "epochs": position.epoch,
        "best_accuracy": position.best_accuracy,
        "best_epoch": position.best_epoch,
        "last_accuracy": last["test_accuracy"],
        "lr_max": run.schedule.lr_max,
        "lr_min": run.schedule.lr_min,
        "seconds": vars(times).copy(),
        "images_per_second": images / seconds,
        "peak_memory": peak_memory(trainer.runtime.device),
    }
    parts = {"set-up": times.set_up, "compile": times.compile, "LR search": times.lr_search}
    parts |= {"training": times.training, "evaluation": times.evaluation}
    memory = ", ".join(f"{gib:.2f} GiB {name.removesuffix('_gib')}" for name, gib in summary["peak_memory"].items())
    lines = [
        "",
        f"best accuracy  {position.best_accuracy:.2f}% (epoch {position.best_epoch}), last {last['test_accuracy']:.2f}%",
        f"time           {duration(sum(parts.values()))}: "
        + ", ".join(f"{name} {duration(spent)}" for name, spent in parts.items()),
        f"throughput     {summary['images_per_second']:,.0f} images/s in training",
        f"peak memory    {memory}",
    ]
    extra = [(k, last[f"{k}_accuracy"]) for k in ("test_tta", "ema_test", "ema_test_tta") if f"{k}_accuracy" in last]
    if extra:
        names = {"test_tta": "flip TTA", "ema_test": "EMA", "ema_test_tta": "EMA and flip TTA"}
        lines.insert(2, "also, at the end  " + ", ".join(f"{names[k]} {accuracy:.2f}%" for k, accuracy in extra))
        summary |= {f"last_{k}_accuracy": accuracy for k, accuracy in extra}
    if path is not None:
        lines += [f"run folder     {path}", f"next           python -m analysis {path}"]
    return summary, lines

"""The epochs of a run: train, evaluate, report, save; and where a run stands, to go on from there."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import save_checkpoint
from train.config import checkpoint_interval, to_dict
from train.estimate import LongRunNotice
from train.evaluation import Evaluation, Score
from train.optim import OneCycle
from train.progress import EpochDisplay, NonFiniteLoss, StepMeter
from train.record import Log, RunFolder
from train.signals import Interrupted, SignalWatch
from train.trainer import Trainer

STEPS_BETWEEN_QUESTIONS = 20  # between processes: may we stop, may we save


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
        notice: LongRunNotice,
    ) -> None:
        self.trainer, self.schedule, self.folder, self.log = trainer, schedule, folder, log
        self.times, self.position, self.signals, self.notice = times, position, signals, notice
        self.every_steps, self.every_seconds = checkpoint_interval(trainer.config.run.checkpoint_every)
        self.last_save = time.perf_counter()
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
        begun, before = time.perf_counter(), position.seconds

        def after_step(done: int) -> None:
            if meter.poll(done):
                display.update(done, meter)
            self.notice.step()
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

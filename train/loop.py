"""The epochs of a run: train, evaluate, report, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import torch

from dali_pipeline.loader import EvalLoader
from train.config import checkpoint_interval, to_dict
from train.disk.checkpoint import CheckpointError, on_host, save_last
from train.disk.folder import RunFolder, RunFolderError
from train.disk.snapshot import DataFacts, Position, Snapshot, load_snapshot
from train.failpoints import failpoint
from train.machine.signals import Interrupted
from train.screen.notice import LongRunNotice
from train.screen.progress import EpochDisplay, EvaluationDisplay
from train.session import Session
from train.step.evaluation import Score
from train.step.measures import Measure, measures_of
from train.step.meter import NonFiniteLoss, StepMeter
from train.step.schedule import OneCycle, Rates

# how often processes on GPUs ask each other whether to stop or save, or whether a loss is NaN
STEPS_BETWEEN_QUESTIONS = 20
_AFTER_NON_FINITE = (
    "the checkpoint before it is kept. Lower schedule.lr_max, or use train.precision=fp32 where it is not already"
)


class _EvaluationInterrupted(Exception):
    """A signal came during the evaluation. It is abandoned; the resumed run repeats it."""


def saves_in_background(device: torch.device) -> bool:
    """Whether checkpoints are written by another thread: on a GPU, where writing one may take longer than an epoch. On the CPU
    the thread would take cores from the training."""
    return device.type == "cuda"


def store(folder: RunFolder, state: dict[str, Any], best: bool) -> None:
    """Write last.pt (and best.pt), then metrics.jsonl with the same epochs."""
    failpoint("save")
    save_last(folder.path, state, best)
    folder.write_metrics(state["metrics"])
    failpoint("saved")


class Run:
    """The epochs of a run: trains, evaluates, reports, saves."""

    def __init__(
        self,
        session: Session,
        schedule: OneCycle,
        folder: RunFolder | None,
        position: Position,
        notice: LongRunNotice,
    ) -> None:
        self.session, self.trainer, self.config = session, session.trainer, session.config
        self.schedule, self.folder, self.log = schedule, folder, session.log
        self.times, self.position, self.signals, self.notice = session.times, position, session.signals, notice
        self.every_steps, self.every_seconds = checkpoint_interval(self.config.run.checkpoint_every)
        self.last_save = time.perf_counter()
        self.failure: NonFiniteLoss | None = None  # of this process, before the other processes know of it
        self._saver = ThreadPoolExecutor(1, "save") if saves_in_background(session.runtime.device) else None
        self._saving: Future[None] | None = None
        self.writer: Any = None
        if self.config.run.tensorboard and folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            events = folder.path / "tensorboard"
            try:
                self.writer = SummaryWriter(str(events), purge_step=position.epoch + 1)  # type: ignore[no-untyped-call]
            except OSError as error:
                raise RunFolderError(
                    f"{events}: cannot be written: {error.strerror}; choose another run.dir= or leave run.tensorboard off"
                ) from None

    def train(self) -> None:
        """Train the epochs that are left."""
        with self.signals.deferring(), self._all_saved():
            if self.position.epoch == 0 and self.position.step == 0:
                self.save()  # so that even the first epoch can be resumed, and a full disk is noticed before the first step
                with self._saving_together():
                    self.settle()
            elif self.folder is not None:
                self.folder.write_metrics(
                    self.position.metrics
                )  # a kill may have left this file an epoch behind last.pt
            while self.position.epoch < self.config.train.epochs:
                self._epoch()
            self._add_views()

    def close(self) -> None:
        """Finish what is written beside the run's own files."""
        if self.writer is not None:
            self.writer.close()

    def measure_test(self) -> dict[str, dict[Measure, Score]]:
        """The test set by the weights of last.pt and, where the run folder holds it, of best.pt: once, after the last epoch of
        a training that a validation split has chosen. The trainer keeps its own weights."""
        with (
            self.times.on("evaluation", self.trainer.runtime.device),
            closing(self.session.eval_loader("test")) as loader,
        ):
            found = self._measure_checkpoints(loader)
        if self.writer is not None:
            epochs = {"last.pt": self.position.epoch, "best.pt": self.position.best_epoch}
            for name, scores in found.items():
                for measure, score in scores.items():
                    for key, value in _recorded(measure, score).items():
                        self.writer.add_scalar(f"{key}_of_{name.removesuffix('.pt')}", value, epochs[name])
            self.writer.flush()
        return found

    def _measure_checkpoints(self, loader: EvalLoader) -> dict[str, dict[Measure, Score]]:
        trainer, position = self.trainer, self.position
        measures = measures_of(self.config.train, "test")

        def measured(checkpoint: str) -> dict[Measure, Score]:
            with self._displayed(f"test set, {checkpoint}", loader, measures, self._stay_together) as after_batch:
                return trainer.evaluate_on(loader, measures, after_batch)

        found = {"last.pt": measured("last.pt")}
        if not self.session.group.any(self.folder is not None):
            return found
        if position.best_epoch == position.epoch:
            return found | {"best.pt": found["last.pt"]}
        best = self.session.group.from_first(self._best_weights)
        if best is None:
            return found
        own = on_host({"model": trainer.net.state_dict(), "ema": trainer.ema and trainer.ema.state_dict()})
        trainer.load_weights(best)
        try:
            return found | {"best.pt": measured("best.pt")}
        finally:
            trainer.load_weights(own)

    def _best_weights(self) -> dict[str, Any] | None:
        """None, with a warning, where best.pt went away or is not that of the best epoch: the training is over, and what
        else there is to tell of it must not be lost."""
        assert self.folder is not None, "the first process has it"
        path = self.folder.path / "best.pt"
        try:
            snapshot = load_snapshot(path)
        except CheckpointError as error:
            self.log(f"WARNING: best.pt is not measured: {error}")
            return None
        found, expected = snapshot.position.epoch, self.position.best_epoch
        if found != expected:  # a kill between best.pt and last.pt, and the repeated epoch came out differently
            self.log(f"WARNING: {path}: is not measured: it is of epoch {found}, and the best epoch was {expected}")
            return None
        return {name: snapshot.trainer_state[name] for name in ("model", "ema")}

    def _epoch(self) -> None:
        trainer, position, config = self.trainer, self.position, self.config
        steps, device, processes = trainer.steps_per_epoch, trainer.runtime.device, trainer.group.world_size
        meter = StepMeter(position.epoch, steps, device)
        start, saved = position.step, (position.step_losses, position.step_correct)
        if start:
            meter.losses[:start] = torch.tensor(saved[0], device=device)
            # the saved counts are those of all processes together; the display shows the part of this one
            meter.correct[:start] = torch.tensor(saved[1], device=device) // processes
        title = f"epoch {position.epoch + 1}/{config.train.epochs}"
        display = EpochDisplay(self.log, title, steps, start, config.train.batch_size, processes)
        elsewhere = self.times.training - position.seconds  # training time of other epochs

        def seconds() -> float:
            self.times.count()
            return self.times.training - elsewhere

        def after_step(done: int) -> None:
            with self._noting_failure():
                if meter.poll(done):
                    display.update(done, meter)
            self.notice.step()
            self._maybe_stop_or_save(done, meter, seconds, saved)

        try:
            with self.times.on("training", device):
                trainer.train_epoch(position.epoch, self.schedule, meter, start, after_step)
                losses, correct = self._totals(meter, steps, saved)
        finally:
            display.close()
        eval_begun = time.perf_counter()
        try:
            last = position.epoch + 1 == config.train.epochs
            measures = trainer.measures if last else trainer.plain_measures
            with (
                self.times.on("evaluation", device),
                self._displayed(
                    f"{title}, {measures[0].split}", trainer.eval_loader, measures, self._stop_in_evaluation
                ) as after_batch,
            ):
                scores = trainer.evaluate(after_batch, measures)
        except _EvaluationInterrupted:
            self._save_inside(steps, losses, correct, seconds())
            raise self._interrupted() from None
        self._finish_epoch(losses, correct, seconds(), time.perf_counter() - eval_begun, scores)

    def _add_views(self) -> None:
        """Of a finished run that was resumed with more views than its last epoch was measured by: measure those."""
        last = self.position.metrics[-1]
        missing = [measure for measure in self.trainer.measures if f"{measure.key}_accuracy" not in last]
        if not missing:
            return
        loader = self.trainer.eval_loader
        with (
            self.times.on("evaluation", self.trainer.runtime.device),
            self._displayed(
                f"{missing[0].split} set, further views", loader, missing, self._stay_together
            ) as after_batch,
        ):
            scores = self.trainer.evaluate(after_batch, missing)
        self._check_finite(scores, self.position.epoch)
        added: dict[str, float] = {}
        for measure, score in scores.items():
            added |= _recorded(measure, score)
            self.log(f"{measure.label}: {score}")
        last |= added
        self._show(added)
        self.save()

    def _check_finite(self, scores: dict[Measure, Score], epoch: int) -> None:
        """Raise NonFiniteLoss where the loss of a measure is no finite number, which no checkpoint may hold."""
        for measure, score in scores.items():
            if not math.isfinite(score.loss):
                error = NonFiniteLoss(epoch - 1, self.trainer.steps_per_epoch - 1, score.loss)
                error.args = (f"{measure.label} loss {score.loss} after epoch {epoch}; {_AFTER_NON_FINITE}",)
                raise error

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """A NonFiniteLoss inside the block is kept in `failure`. A single process raises it at once; several processes first tell
        each other, as otherwise the rest would wait for the one that stopped."""
        try:
            yield
        except NonFiniteLoss as error:
            if self.failure is None:
                self.failure = self._naming_the_images(error)
            if self.trainer.group.world_size == 1:
                raise self.failure from None

    def _naming_the_images(self, error: NonFiniteLoss) -> NonFiniteLoss:
        """Add to the message the learning rate and the images of the step."""
        images = self.trainer.train_loader.plan(error.epoch, error.step).indices.tolist()
        shown = ", ".join(map(str, images[:8])) + (f" ... {images[-1]}" if len(images) > 8 else "")
        rate = self.schedule(error.epoch * self.trainer.steps_per_epoch + error.step)
        error.args = (f"{error} (learning rate {rate:.3g}, training images {shown}); {_AFTER_NON_FINITE}",)
        return error

    def _raise_shared(self, noticed: bool) -> None:
        """`noticed`: at least one process has a NonFiniteLoss. All of them then raise that of the first such process."""
        if noticed:
            mine = self.failure and (self.failure.epoch, self.failure.step, self.failure.loss, str(self.failure))
            epoch, step, loss, text = next(found for found in self.trainer.group.gather(mine) if found)
            error = NonFiniteLoss(epoch, step, loss)
            error.args = (text,)
            raise error

    def _interrupted(self) -> Interrupted:
        """The exception for a signal that came to this process or to another one, after all saving is done."""
        with self._saving_together():
            self.settle()
        received = [number for number in self.trainer.group.gather(self.signals.received) if number is not None]
        return Interrupted(received[0], saved=self.folder is not None)

    def _asking(self, done: int) -> bool:
        """Whether the processes ask each other after this step: on GPUs, whose steps are short, only every few steps."""
        alone = self.trainer.group.world_size == 1
        return alone or self.trainer.runtime.device.type == "cpu" or done % STEPS_BETWEEN_QUESTIONS == 0

    @contextmanager
    def _displayed(
        self, title: str, loader: EvalLoader, measures: Sequence[Measure], then: Callable[[int], None]
    ) -> Iterator[Callable[[int], None]]:
        """Gives what an evaluation by these measures is to call after each batch: it shows how far that is, and calls `then`."""
        passes = len({measure.weights for measure in measures})
        display = EvaluationDisplay(self.log, title, passes * len(loader))

        def after_batch(done: int) -> None:
            display.advance()
            then(done)

        try:
            yield after_batch
        finally:
            display.close()

    def _stop_in_evaluation(self, done: int) -> None:
        if self._asking(done) and self.trainer.group.any(self.signals.received is not None):
            raise _EvaluationInterrupted

    def _stay_together(self, done: int) -> None:
        """After a batch of the final evaluation: nobody is so far ahead that its wait for the totals meets a time limit."""
        if self._asking(done):
            self.trainer.group.any(False)

    def _totals(
        self, meter: StepMeter, done: int, saved: tuple[list[float], list[int]]
    ) -> tuple[list[float], list[int]]:
        """For each of the first `done` steps, the mean loss and the number of correct predictions over all processes."""
        group = self.trainer.group
        with self._noting_failure():
            meter.finish(done)
        self._raise_shared(group.any(self.failure is not None))
        losses, correct = meter.losses[:done].clone(), meter.correct[:done].clone()
        if group.world_size > 1:
            torch.distributed.all_reduce(losses)
            losses /= group.world_size
            torch.distributed.all_reduce(correct)
        start = len(saved[0])
        return saved[0] + losses[start:].tolist(), saved[1] + correct[start:].tolist()

    def _finish_epoch(
        self,
        losses: list[float],
        correct: list[int],
        seconds: float,
        eval_seconds: float,
        scores: dict[Measure, Score],
    ) -> None:
        trainer, position, config = self.trainer, self.position, self.config
        images = trainer.steps_per_epoch * config.train.batch_size
        train_loss, train_accuracy = math.fsum(losses) / len(losses), 100 * sum(correct) / images
        (leading, score), *others = scores.items()
        self._check_finite(scores, position.epoch + 1)
        position.epoch += 1
        position.step, position.step_losses, position.step_correct, position.seconds = 0, [], [], 0.0
        entry: dict[str, Any] = {
            "epoch": position.epoch,
            "lr": self.schedule(position.epoch * trainer.steps_per_epoch - 1),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            **_recorded(leading, score),
            "seconds": seconds,
            "images_per_second": images / seconds,
            "eval_seconds": eval_seconds,
        }
        for measure, other in others:
            entry |= _recorded(measure, other)
        position.metrics.append(entry)
        self.log(
            f"epoch {position.epoch}/{config.train.epochs}: lr {entry['lr']:.4g}, loss {train_loss:.4f}, "
            f"accuracy {train_accuracy:.2f}%, {seconds:.1f} s, {entry['images_per_second']:,.0f} images/s"
        )
        for measure, found in scores.items():
            self.log(f"{measure.label}: {found}")
        better = score.accuracy > position.best_accuracy
        if better:
            position.best_accuracy, position.best_epoch = score.accuracy, position.epoch
        self._show({name: value for name, value in entry.items() if name != "epoch"})
        self.save(best=better)
        if self.trainer.group.any(self.signals.received is not None):
            raise self._interrupted()

    def _show(self, values: dict[str, float]) -> None:
        """Give TensorBoard, where it is asked for, these values of the last epoch."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.position.epoch)
            self.writer.flush()

    @contextmanager
    def _saving_together(self) -> Iterator[None]:
        """For a block in which the first process may wait for the disk, and the others for it."""
        group = self.trainer.group
        with group.phase("saving"), self.times.on("saving"), group.together():
            yield

    def save(self, best: bool = False) -> None:
        """Write last.pt (and best.pt) and metrics.jsonl. Raises NonFiniteLoss, and saves nothing, if a weight is not finite."""
        self.last_save = time.perf_counter()
        with self._saving_together():
            if self.folder is not None:
                self._write(self.folder, best)

    def _write(self, folder: RunFolder, best: bool) -> None:
        position = self.position
        if not self.trainer.finite():
            error = NonFiniteLoss(position.epoch, max(position.step - 1, 0), math.nan)
            where = f"epoch {position.epoch + 1}, step {position.step}" if position.step else f"epoch {position.epoch}"
            error.args = (f"weights or batch-norm statistics are not finite after {where}; {_AFTER_NON_FINITE}",)
            raise error
        self.settle()
        state = self.snapshot().to_dict()
        if self._saver is None:
            store(folder, state, best)
        else:
            self._saving = self._saver.submit(store, folder, on_host(state), best)

    def snapshot(self) -> Snapshot:
        """The state of the training now."""
        dataset = self.trainer.dataset
        return Snapshot(
            **self.trainer.state(),
            position=self.position,
            rates=Rates(self.schedule.lr_max, self.schedule.lr_min),
            steps_per_epoch=self.trainer.steps_per_epoch,
            times=self.times.seconds(),
            machine=self.session.machine(),
            config=to_dict(self.config),
            data=DataFacts(
                dataset.name,
                dataset.class_names,
                dataset.mean,
                dataset.std,
                dataset.fill,
                dataset.height,
                dataset.width,
                None if dataset.validation is None else dataset.validation.fingerprint,
            ),
        )

    def settle(self) -> None:
        """Wait until a save in the background is on disk; raises the error that it met."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    @contextmanager
    def _all_saved(self) -> Iterator[None]:
        """Waits at the end of the block until everything is on disk; an error of the block itself is raised on."""
        try:
            yield
            with self._saving_together():
                self.settle()
        finally:
            if self._saver is not None:
                self._saver.shutdown(wait=True)
            if (
                self._saving is not None and (error := self._saving.exception()) is not None
            ):  # only a warning, as the block's own error is raised
                self.log(f"WARNING: the last save failed, the one before it is kept: {error}")

    def _maybe_stop_or_save(
        self, done: int, meter: StepMeter, seconds: Callable[[], float], saved: tuple[list[float], list[int]]
    ) -> None:
        due = self.every_steps is not None and done % self.every_steps == 0
        stop = False
        if self._asking(done):
            late = self.every_seconds is not None and time.perf_counter() - self.last_save >= self.every_seconds
            flags = (self.signals.received is not None, late, self.failure is not None)
            stop, late, failed = self.trainer.group.any_of(flags)
            self._raise_shared(failed)
            due = due or late
        if done == self.trainer.steps_per_epoch:
            return  # the evaluation comes next, and stops by itself
        if due or stop:
            self._save_inside(done, *self._totals(meter, done, saved), seconds())
        if stop:
            raise self._interrupted()

    def _save_inside(self, done: int, losses: list[float], correct: list[int], seconds: float) -> None:
        """Save within an epoch: after `done` of its steps, or after all of them and before the evaluation."""
        self.trainer.average_statistics()
        position = self.position
        position.step, position.seconds = done, seconds
        position.step_losses, position.step_correct = losses, correct
        self.save()


def _recorded(measure: Measure, score: Score) -> dict[str, float]:
    return {f"{measure.key}_loss": score.loss, f"{measure.key}_accuracy": score.accuracy}

"""Sets up what a training needs: machine, data, network. What is quick to check comes first."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from dali_pipeline import sources
from dali_pipeline.backend import BackendChoice, BackendError, choose_backend
from dali_pipeline.dataset import Dataset
from dali_pipeline.loader import EvalLoader
from net.options import parts_of
from train.agreement import asked_of, disagreement, facts_of
from train.compiling import Choice
from train.config import Config, ConfigError, check_batch_size
from train.disk.initial import InitialWeights, load_initial_weights
from train.failpoints import failpoint
from train.machine.distributed import OtherProcessFailed, from_environment, name_of_process, process_group
from train.machine.environment import git_commit, system_facts, versions
from train.machine.place import GroupError, torchrun_job, under_torchrun
from train.machine.runtime import RuntimeUnavailable, prepare, seed_everything
from train.machine.signals import SignalWatch
from train.screen.clock import Times
from train.screen.log import Log
from train.screen.progress import duration
from train.step.trainer import Trainer

_Made = TypeVar("_Made", Trainer, EvalLoader)


class Session:
    """A recipe on this machine, for as long as a with-statement lasts:

        with Session(config) as session:   # device, precision, process group, pipeline backend
            session.build()                # data and network
            session.warm_up()              # compilation
            session.trainer ...

    `times` counts what the time goes into. With `handle_signals`, SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the training after a
    step and with a checkpoint; with `owns_process` false, for a process that does other things too, a second signal does not end
    the process. `options` are those of the command that change what a run does, by name: all processes must be given the same.
    Raises UserError for what a user can correct.
    """

    def __init__(
        self,
        config: Config,
        log: Log | None = None,
        *,
        handle_signals: bool = False,
        owns_process: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self._options, self._owns_process = options or {}, owns_process
        self.group = from_environment()
        self.log = log or Log(quiet=not self.group.first)
        self.times = Times()
        self.signals = SignalWatch(repeats=under_torchrun(), announce=self.group.first, owns_process=owns_process)
        self._handle_signals = handle_signals
        self._notes: list[str] = []
        self._dataset: Dataset | None = None
        self._initial: InitialWeights | None = None
        self._trainer: Trainer | None = None

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            if self._handle_signals:
                stack.enter_context(self.signals.watching())
            self._begun = time.perf_counter()
            connecting = process_group(self.group, self.config.train.device, owns_process=self._owns_process)
            self.group = stack.enter_context(connecting)
            with self.group.phase("looking at the machine"):
                self._agree(lambda: asked_of(self.config, self._options), "were started differently")
                with self.group.together():
                    self._look_at_machine()
                device = {f"train.device={self.config.train.device}": self.runtime.device.type}
                self._agree(lambda: device, "compute on different devices")
                self._agree_on_precision()
                self._agree_on_compiler()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def at_end(self, call: Callable[[], object]) -> None:
        """Have `call` called when the session ends; several are called in reverse order."""
        self._stack.callback(call)

    @property
    def dataset(self) -> Dataset:
        """The data set that `build` has read."""
        assert self._dataset is not None, "Session.build comes first"
        return self._dataset

    @property
    def trainer(self) -> Trainer:
        """The trainer that `build` has made."""
        assert self._trainer is not None, "Session.build comes first"
        return self._trainer

    def _agree(self, facts: Callable[[], dict[str, str]], how: str) -> None:
        """Raises GroupError on the first process, and OtherProcessFailed with its exit code on the others, where the processes'
        facts differ; `how` says in a word what that means."""
        if self.group.world_size == 1:
            return
        with self.group.together():
            own = facts()
        found = self.group.gather((name_of_process(self.group.rank), own))
        different = disagreement(*zip(*found, strict=True))
        if different is not None:
            error = GroupError(f"the processes {how}: {different}. Start all of them alike, from copies of one folder")
            raise error if self.group.first else OtherProcessFailed(str(error), error.exit_code)

    def _look_at_machine(self) -> None:
        failpoint("machine")
        self._prepare(self.config.train.precision)
        if self.config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise RuntimeUnavailable("run.tensorboard=true: tensorboard is missing; pip install -e '.[tensorboard]'")
        self.backend = choose_backend(self.config.data.backend, self.runtime.device)
        for note in self.runtime.notes:
            if note != self.runtime.compile_note or self.runtime.compile_mode == self._compiler:
                self.log(note)
        fallback = self.config.data.backend == "auto" and self.backend.name != "dali"
        self.log(f"{'WARNING: ' if fallback else ''}pipeline: {self.backend.name} ({self.backend.reason})")

    def _prepare(self, precision: str) -> None:
        train = self.config.train
        self.runtime = prepare(
            device=train.device,
            precision=precision,
            compile=train.compile,
            step_graph=train.step_graph,
            channels_last=train.channels_last,
            local_rank=self.group.local_rank,
            processes=self.group.world_size,
        )
        self._compiler = self.runtime.compile_mode
        if train.compile == "auto" and self.runtime.device.type == "cpu" and self._compiler is not None:
            self.runtime = self.runtime.compiling(None, "weighed once the trainer is built")

    def _agree_on_precision(self) -> None:
        """Where train.precision=auto finds bf16 for some processes only, all of them take what the others have: fp32 on CPUs,
        fp16, with its scaler, on GPUs."""
        if self.config.train.precision == "auto":
            without = [found for found in self.group.gather(self.runtime.precision) if found != "bf16"]
            if without:
                unit = {"cpu": "CPU", "cuda": "GPU"}.get(self.runtime.device.type, "device")
                self._take_precision(without[0], f"another process's {unit} does not compute bf16")

    def _agree_on_compiler(self) -> None:
        """Where train.compile=auto finds a compiler for some processes only, none of them compiles: those that do wait for each
        other in the warm-up, to which the rest would not come."""
        if self.config.train.compile == "auto":
            why = self.runtime.compile_note.partition("(")[2].removesuffix(")")
            missing = None if self._compiler is not None else f"{name_of_process(self.group.rank)}: {why}"
            without = [found for found in self.group.gather(missing) if found is not None]
            if without and self._compiler is not None:
                self._compiler = None
                self._settle_compiling(None, without[0], warning=True)

    def go_on_as(self, began: Mapping[str, Any]) -> None:
        """To be called before `build` by a run that is resumed: where train.precision=auto leaves it open and the run began on a
        CPU, it goes on in the precision that it began with. `began` is its `Snapshot.machine`."""
        on_cpu = began.get("device") == self.runtime.device.type == "cpu"
        if self.config.train.precision == "auto" and on_cpu and began.get("precision") in ("fp32", "bf16"):
            self._take_precision(began["precision"], "as the run began")
            self._agree_on_compiler()  # in another precision it may be another one

    def _take_precision(self, precision: str, why: str) -> None:
        if precision != self.runtime.precision:
            before = self.runtime.compile_note
            self._prepare(precision)
            self.runtime = self.runtime.saying(f"precision: {precision} ({why})")
            self.log(self.runtime.note_on("precision"))
            if self.runtime.compile_note != before and self.runtime.compile_mode == self._compiler:
                self.log(self.runtime.compile_note)

    def note(self, text: str) -> None:
        """Log a warning, and keep it for environment.json."""
        self.log(f"WARNING: {text}")
        self._notes.append(text)

    def build(
        self,
        check: Callable[[Dataset], None] | None = None,
        dataset: Dataset | None = None,
        *,
        resuming: bool = False,
    ) -> None:
        """Read the data (unless given as `dataset`), call `check` with them, which may raise, and make the trainer. With
        `resuming` its weights are to come from a checkpoint of the run's own, and net.init is not read."""
        with self.group.phase("loading the data"):
            self._initial = None if resuming else self._load_initial()
            self._dataset = dataset = self._load_data(dataset)
        with self.group.phase("building the pipeline and the network"):
            self._build(dataset, check)
        self.at_end(self.trainer.close)
        self.times.set_up += time.perf_counter() - self._begun

    def _build(self, dataset: Dataset, check: Callable[[Dataset], None] | None) -> None:
        with self.group.together():
            if check is not None:
                check(dataset)
            self._check_initial(dataset)
            failpoint("build")
        self._trainer, self.backend = self._by_backend("pipeline", partial(self._make_trainer, dataset))
        self._describe(dataset, self._trainer)

    def _load_data(self, dataset: Dataset | None) -> Dataset:
        # the first process downloads what is missing, the others wait and then read it
        with self.group.together():
            failpoint("load")
            if dataset is None and self.group.first:
                dataset = self._load(download=None)
        with self.group.together():
            dataset = dataset or self._load(download=False)
            self._check_fit(dataset)
        self._agree(partial(facts_of, dataset), "have read different data")
        counts = [f"{len(dataset.train):,} training"]
        if dataset.validation is not None:
            how = "" if self.config.data.validation is None else f" (data.validation={self.config.data.validation:g})"
            counts.append(f"{len(dataset.validation):,} validation{how}")
        self.log(
            f"data: {dataset.name}, {', '.join(counts)} and {len(dataset.test):,} test images of "
            f"{dataset.height} x {dataset.width}, {dataset.num_classes} classes ({dataset.source})"
        )
        for remark in dataset.remarks:
            self.log(remark)
        for note in dataset.notes:
            self.log(f"WARNING: {note}")
        return dataset

    def _load_initial(self) -> InitialWeights | None:
        """The weights that net.init names, read by the first process for all."""
        given = self.config.net.init
        return None if given is None else self.group.from_first(lambda: load_initial_weights(given, self.config.net))

    def _check_initial(self, dataset: Dataset) -> None:
        """What net.init and net.freeze do with these data, in the log. Raises ConfigError where that makes no sense."""
        frozen = parts_of(self.config.net.freeze)
        if self._initial is not None:
            there, here = len(self._initial.class_names), dataset.num_classes
            if "classifier" in frozen and there != here:
                raise ConfigError(
                    f"net.freeze: the classifier is drawn anew for the {here} classes of {dataset.name} (net.init has {there}), "
                    "and must be trained; leave it out"
                )
            self.log(self._initial.sentence(dataset.class_names))
        elif frozen and self.config.net.init is None:
            self.log(f"WARNING: net.freeze: without net.init, {', '.join(frozen)} stay as they are drawn")

    def _load(self, download: bool | None) -> Dataset:
        return sources.load(self.config.data, None if self.log.quiet else sources.to_stderr, download=download)

    def _check_fit(self, dataset: Dataset) -> None:
        train, world = self.config.train, self.group.world_size
        check_batch_size(train.batch_size, len(dataset.train), dataset.name)
        for key in ("batch_size", "eval_batch_size"):
            if getattr(train, key) % world:
                raise ConfigError(f"train.{key}: {getattr(train, key)} does not divide by the {world} processes")
        if dataset.height % 8 or dataset.width % 8:
            raise ConfigError(
                f"data.name: the network halves images three times, {dataset.height} x {dataset.width} are no multiples of 8"
            )

    def _by_backend(self, what: str, make: Callable[[BackendChoice], _Made]) -> tuple[_Made, BackendChoice]:
        """What `make` gives for the backend that runs on this machine, and that backend; under data.backend=auto torch's on all
        processes, with a warning that is about `what`, where the backend of any of them cannot take the data. All processes
        call it together."""
        made, problem = None, None
        with self.group.together():
            try:
                made = make(self.backend)
            except BackendError as error:
                if self.config.data.backend != "auto":
                    raise
                problem = str(error)
        problems = [found for found in self.group.gather(problem) if found is not None]
        if not problems:
            assert made is not None
            return made, self.backend
        if made is not None:
            made.close()
        choice = BackendChoice("torch", f"torch on {self.runtime.device}: {problems[0]}")
        self.log(f"WARNING: {what}: torch ({choice.reason})")
        with self.group.together():
            return make(choice), choice

    def eval_loader(self, split: str) -> EvalLoader:
        """A loader of this process's part of the split with this name, for an evaluation beside those of the epochs; the caller
        closes it. All processes call it together."""
        return self._by_backend(f"{split} images", partial(self.trainer.make_eval_loader, split))[0]

    def _describe(self, dataset: Dataset, trainer: Trainer) -> None:
        """Say what the trainer has decided by itself."""
        for images, loader in (("training", trainer.train_loader), (trainer.measures[0].split, trainer.eval_loader)):
            if not loader.residence.resident:
                self.log(f"{images} images: sent to {self.runtime.device} batch by batch ({loader.residence.reason})")
        if trainer.net.frozen:
            trained = sum(p.numel() for p in trainer.net.parameters() if p.requires_grad)
            whole = sum(p.numel() for p in trainer.net.parameters())
            self.log(f"frozen: {', '.join(trainer.net.frozen)}; {trained:,} of {whole:,} parameters are trained")
        tail = len(dataset.train) % self.config.train.batch_size
        if tail:
            what = (
                "carried into the next epoch" if self.config.train.tail == "endless" else "left out, others each epoch"
            )
            self.log(f"an epoch: {trainer.steps_per_epoch} full batches; the {tail} images beyond them are {what}")

    def _make_trainer(self, dataset: Dataset, backend: BackendChoice) -> Trainer:
        seed_everything(self.config.train.seed, self.config.train.deterministic)
        initial = None if self._initial is None else self._initial.for_classes(dataset.class_names)
        return Trainer(self.config, dataset, self.runtime, backend, self.group, initial=initial)

    def warm_up(self, steps_left: int | None = None, began: Mapping[str, Any] | None = None) -> None:
        """Compile the training and the evaluation step, as far as they are to be used. Where the compiler fails,
        train.compile=auto goes on uncompiled, with a warning; a mode that was asked for is an error.

        With auto, a CPU compiles where that pays for `steps_left` steps; None means enough of them, and 0 that the training is
        over: then at most the test set is left to be measured, where a validation split was held out. `began` is
        `Snapshot.machine` of a resumed run: one that began on a CPU goes on as it began, compiled or not.
        """
        with self.group.phase("compiling"):
            self._warm_up(steps_left, began)

    def _warm_up(self, steps_left: int | None, began: Mapping[str, Any] | None) -> None:
        choice = self._choose(steps_left, began) if self.config.train.compile == "auto" else None
        mode, training = self.runtime.compile_mode, steps_left != 0
        if mode is None and not (training and self.runtime.step_graph):
            return
        if not (training or self.dataset.validation is not None):
            return
        what = "the training and the evaluation step" if training else "the evaluation step"
        self.log("capturing the training step ..." if mode is None else f"compiling {what} (mode {mode}) ...")
        begun = time.perf_counter()
        reason = None
        with self.times.on("compile", self.runtime.device):
            with self.group.together():
                try:
                    self.trainer.warm_up(training)
                except Exception as error:
                    if not _is_compile_failure(error):
                        raise
                    reason = _reason(error)
                    if self.config.train.compile != "auto":
                        raise RuntimeUnavailable(
                            f"train.compile={mode}: torch.compile failed: {reason}; or use train.compile=auto, which then goes "
                            "on uncompiled"
                        ) from error
            failures = [found for found in self.group.gather(reason) if found is not None]
            if failures:
                self.trainer.compiled_off()
                why = f"torch.compile failed, training goes on uncompiled and slower: {failures[0]}"
                self._settle_compiling(None, why, warning=True)
                if training and self.runtime.step_graph:
                    self.trainer.warm_up()
                    self._check_capture()
                return
            seconds = time.perf_counter() - begun
            learnt = choice.learn(seconds) if choice is not None and training else None
        if mode is not None:
            self.log(f"compiled in {duration(seconds)}")
        self._check_capture()
        if mode is None and self.runtime.step_graph:
            self.log(f"captured in {duration(seconds)}")
        if learnt is not None and not learnt.pays:
            self.trainer.compiled_off()
            self._settle_compiling(None, learnt.why)

    def _choose(self, steps_left: int | None, began: Mapping[str, Any] | None) -> Choice | None:
        """Decide for train.compile=auto whether to compile; None where there is nothing to decide."""
        if self.runtime.device.type != "cpu" or self._compiler is None:
            return None
        with self.times.on("compile"):
            choice = Choice(self.trainer, self._compiler)
            weighed = choice.weigh(steps_left, began)
            if weighed.pays:
                self.trainer.compiled_on(self._compiler)
        self._settle_compiling(self._compiler if weighed.pays else None, weighed.why)
        return choice

    def _settle_compiling(self, mode: str | None, why: str, *, warning: bool = False) -> None:
        self.runtime = self.runtime.compiling(mode, why)
        self.log(f"{'WARNING: ' if warning else ''}{self.runtime.compile_note}")

    def _check_capture(self) -> None:
        """Say where the step could not be captured. Raises RuntimeUnavailable where that was asked for."""
        problem = self.trainer.not_captured
        if problem is None:
            return
        if self.config.train.step_graph == "on":
            raise RuntimeUnavailable(
                f"train.step_graph=on: the step cannot be captured: {problem}; use train.step_graph=auto"
            )
        self.runtime = replace(self.runtime, step_graph=False).saying(
            f"step graph: off (it cannot be captured: {problem})"
        )
        self.log(f"WARNING: {self.runtime.note_on('step graph')}")

    def machine(self) -> dict[str, Any]:
        """What is no key of the recipe and changes a run's results, if only by rounding: `Snapshot.machine`."""
        on_cpu = self.runtime.device.type == "cpu"
        return {
            "device": self.runtime.device.type,
            "precision": self.runtime.precision,
            "compile": self.runtime.compile_mode or "off",
            "step_graph": self.runtime.step_graph,
            "channels_last": self.runtime.channels_last,
            "processes": self.group.world_size,
            "torch": str(torch.__version__),
            # they share out sums, which then round differently
            **({"threads": torch.get_num_threads()} if on_cpu else {}),
        }

    def environment(self) -> dict[str, Any]:
        """The content of environment.json: what the result depends on besides the recipe."""
        device = self.runtime.device
        return {
            "commit": git_commit(),
            "versions": versions(),
            **system_facts(),
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "precision": self.runtime.precision,
            "compile": self.runtime.compile_mode or "off",
            "step_graph": self.runtime.step_graph,
            "channels_last": self.runtime.channels_last,
            "backend": self.backend.name,
            "backend_reason": self.backend.reason,
            "notes": [*self.runtime.notes, *self.dataset.notes, *self._notes],
            "data_source": self.dataset.source,
            "world_size": self.group.world_size,
            **({"torchrun": job} if (job := torchrun_job()) else {}),
            "threads": torch.get_num_threads(),
        }


def _is_compile_failure(error: Exception) -> bool:
    compilers = ("torch._dynamo", "torch._inductor", "triton")
    return type(error).__module__.startswith(compilers) or "Triton Error" in str(error)


def _reason(error: Exception) -> str:
    """The first line of the error, and the next one where it only introduces that ("backend='inductor' raised:")."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    count = next((n for n, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count])

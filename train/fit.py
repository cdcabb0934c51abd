"""From a configuration to a finished run folder; what `python -m train` calls."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from dali_pipeline.datasets import Dataset
from dali_pipeline.datasets import load as load_dataset
from dali_pipeline.loader import BackendChoice, BackendError, choose_backend
from train.checkpoint import CheckpointError, load_checkpoint, write_atomic
from train.config import Config, ConfigError, to_dict, to_yaml
from train.distributed import Group, from_environment, process_group, under_torchrun
from train.estimate import LongRunNotice
from train.loop import RESUMED, Position, Run, Times, machine, restore
from train.lr_finder import RangeTestError, range_test, suggest
from train.optim import OneCycle
from train.progress import duration
from train.record import Log, RunFolder, git_commit, system_record
from train.runtime import Runtime, RuntimeUnavailable, prepare, seed_everything, versions
from train.signals import SignalWatch
from train.summary import summary_lines
from train.trainer import Trainer

# what may differ between a run and its resumption: none of these changes a weight
HARMLESS = {
    "data.root",
    "data.download",
    "data.backend",
    "train.eval_batch_size",
    "train.tta",
    "run.dir",
    "run.analyse",
    "run.tensorboard",
    "run.checkpoint_every",
}


SHOWN = 10  # names of files in one line


class Setup:
    """What a run stands on, made in the order in which things can go wrong cheaply: machine, data, network."""

    def __init__(self, config: Config, log: Log, times: Times, group: Group) -> None:
        self.config, self.log, self.times, self.group = config, log, times, group
        train = config.train
        self.runtime: Runtime = prepare(
            device=train.device,
            precision=train.precision,
            compile=train.compile,
            channels_last=train.channels_last,
            local_rank=group.local_rank,
        )
        if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise RuntimeUnavailable("run.tensorboard=true: tensorboard is missing; pip install -e '.[tensorboard]'")
        self.backend: BackendChoice = choose_backend(config.data.backend, self.runtime.device)
        for note in self.runtime.notes:
            log(note)
        fallback = config.data.backend == "auto" and self.backend.name != "dali"
        log(f"{'WARNING: ' if fallback else ''}pipeline: {self.backend.name} ({self.backend.reason})")

    def load_data(self) -> Dataset:
        # the first process downloads what is missing, the others wait and then read it
        with self.group.together():
            dataset = self._load(self.config.data.download) if self.group.first else None
        with self.group.together():
            dataset = dataset or self._load(download=False)
            self._check_fit(dataset)
        self.log(
            f"data: {dataset.name}, {len(dataset.train):,} training and {len(dataset.test):,} test images of "
            f"{dataset.train.height} x {dataset.train.width}, {dataset.num_classes} classes ({dataset.source})"
        )
        return dataset

    def _load(self, download: bool) -> Dataset:
        data = self.config.data
        return load_dataset(
            data.name,
            Path(data.root).expanduser(),
            download=download,
            progress=not self.log.quiet,
            synthetic_size=data.synthetic_size,
            synthetic_classes=data.synthetic_classes,
            synthetic_count=data.synthetic_count,
        )

    def _check_fit(self, dataset: Dataset) -> None:
        train, world = self.config.train, self.group.world_size
        if train.batch_size > len(dataset.train):
            raise ConfigError(
                f"train.batch_size: {train.batch_size} is more than the {len(dataset.train)} training images of {dataset.name}"
            )
        for key in ("batch_size", "eval_batch_size"):
            if getattr(train, key) % world:
                raise ConfigError(f"train.{key}: {getattr(train, key)} does not divide by the {world} processes")
        if dataset.train.height % 8 or dataset.train.width % 8:
            raise ConfigError(
                f"data.synthetic_size: the network halves images three times, {dataset.train.height} is no multiple of 8"
            )

    def build(self, dataset: Dataset) -> Trainer:
        try:
            trainer = self._trainer(dataset)
        except BackendError as error:  # of this data: what the machine lacks showed when the backend was chosen
            if self.config.data.backend != "auto":
                raise
            self.backend = BackendChoice("torch", f"torch on {self.runtime.device}: {error}")
            self.log(f"WARNING: pipeline: torch ({self.backend.reason})")
            trainer = self._trainer(dataset)
        tail = len(dataset.train) % self.config.train.batch_size
        if tail:
            what = (
                "carried into the next epoch" if self.config.train.tail == "endless" else "left out, others each epoch"
            )
            self.log(f"an epoch: {trainer.steps_per_epoch} full batches; the {tail} images beyond them are {what}")
        return trainer

    def _trainer(self, dataset: Dataset) -> Trainer:
        seed_everything(self.config.train.seed, self.config.train.deterministic)
        return Trainer(self.config, dataset, self.runtime, self.backend, self.group)

    def warm_up(self, trainer: Trainer) -> None:
        """Compile, and say so: it can take half a minute. Under compile=auto a compiler that fails is gone without, loudly."""
        mode = self.runtime.compile_mode
        if mode is None:
            return
        self.log(f"compiling the training and the evaluation step (mode {mode}) ...")
        begun = time.perf_counter()
        reason = None
        with self.times.on("compile", self.runtime.device):
            with self.group.together():
                try:
                    trainer.warm_up()
                except Exception as error:
                    if self.config.train.compile != "auto" or not _is_compile_failure(error):
                        raise
                    reason = str(error).strip().splitlines()[0]
            failures = [found for found in self.group.gather(reason) if found is not None]
            if failures:
                note = f"compile: off (torch.compile failed, training goes on uncompiled and slower: {failures[0]})"
                self.log(f"WARNING: {note}")
                trainer.compiled_off()
                self.runtime = replace(self.runtime, compile_mode=None, notes=(*self.runtime.notes, note))
                return
        self.log(f"compiled in {duration(time.perf_counter() - begun)}")


def _is_compile_failure(error: Exception) -> bool:
    compilers = ("torch._dynamo", "torch._inductor", "triton")
    return type(error).__module__.startswith(compilers) or "Triton Error" in str(error)


def environment(setup: Setup, dataset: Dataset) -> dict[str, Any]:
    """environment.json: what the result depends on beside the recipe."""
    import torch

    device = setup.runtime.device
    record: dict[str, Any] = {
        "commit": git_commit(),
        "versions": versions(),
        **system_record(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "precision": setup.runtime.precision,
        "compile": setup.runtime.compile_mode or "off",
        "channels_last": setup.runtime.channels_last,
        "backend": setup.backend.name,
        "backend_reason": setup.backend.reason,
        "notes": list(setup.runtime.notes),
        "data_source": dataset.source,
        "world_size": setup.group.world_size,
        "threads": torch.get_num_threads(),
    }
    return record


def find_rates(
    setup: Setup, trainer: Trainer, folder: RunFolder | None, notice: LongRunNotice, overwrite: bool
) -> tuple[float, float]:
    """Run the range test, write lr_finder.csv, and give (lr_max, lr_min), given values standing as they are.

    With `overwrite` what the folder held goes, once there are rates to begin with.
    """
    schedule = setup.config.schedule
    with setup.times.on("lr_search", setup.runtime.device):
        result = range_test(
            trainer,
            start=schedule.find_start,
            end=schedule.find_end,
            steps=schedule.find_steps,
            log=setup.log,
            bar=setup.log.terminal and not setup.log.quiet,
            after_step=notice.step,
        )
    curve = None if folder is None else folder.path / "lr_finder.csv"
    try:
        suggestion = suggest(result)
    except RangeTestError:
        if folder is not None and curve is not None and not folder.holds_run():
            result.write_csv(curve)  # it shows why
        raise
    setup.log(suggestion.sentence())
    lr_max = schedule.lr_max if isinstance(schedule.lr_max, float) else suggestion.lr_max
    lr_min = schedule.lr_min if isinstance(schedule.lr_min, float) else min(suggestion.lr_min, lr_max)
    if lr_min > lr_max:
        raise ConfigError(
            f"schedule.lr_min: {lr_min:g} is above the lr_max found, {lr_max:.4g}; set schedule.lr_max too"
        )
    if folder is not None and curve is not None:
        if overwrite:
            _start_over(folder, setup.log)
        result.write_csv(curve)
    return lr_max, lr_min


def _start_over(folder: RunFolder, log: Log) -> None:
    stays = folder.start_over()
    if stays:
        more = f" and {len(stays) - SHOWN} more" if len(stays) > SHOWN else ""
        log(f"--overwrite: left in {folder.path}, as no run wrote it: {', '.join(stays[:SHOWN])}{more}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """ "section.key: old -> new" for every key that changes what a run computes."""
    changed = []
    for section, keys in new.items():
        for key, value in keys.items():
            name, before = f"{section}.{key}", old.get(section, {}).get(key)
            if name in HARMLESS or before == value or (value == "find" and isinstance(before, float)):
                continue
            changed.append(f"{name}: {before} -> {value}")
    return changed


def _load_for_resume(path: Path, config: Config, fallback: bool, extend: bool, log: Log) -> dict[str, Any]:
    last, previous = path / "last.pt", path / "previous.pt"
    try:
        state = load_checkpoint(last)
    except CheckpointError as error:
        if not fallback:
            hint = "; --fallback continues from previous.pt" if previous.exists() else ""
            raise CheckpointError(f"{error}{hint}") from None
        state = load_checkpoint(previous)
        log(f"WARNING: {error}; continuing from {previous}")
    missing = [key for key in RESUMED if key not in state]
    if missing:
        raise CheckpointError(f"{path}: the checkpoint is no training state, it lacks {', '.join(missing)}")
    old, new = state["config"], to_dict(config)
    longer = config.train.epochs > old["train"]["epochs"]
    if extend and longer:
        old = {**old, "train": {**old["train"], "epochs": config.train.epochs}}
    changed = differences(old, new)
    if changed:
        hint = "; a longer training of the same recipe needs --extend" if longer and not extend else ""
        raise ConfigError(
            f"{path}: --resume continues the recipe that the run began with, but these keys differ: "
            f"{'; '.join(changed)}. Leave them as they were, or start a new run{hint}"
        )
    return state


def _restore_last(path: Path) -> None:
    """Where last.pt is damaged, put previous.pt in its place, lest the next save keep the damaged one as previous.pt."""
    try:
        load_checkpoint(path / "last.pt")
    except CheckpointError:
        write_atomic(path / "last.pt", (path / "previous.pt").read_bytes())


def _check_same_data(state: dict[str, Any], dataset: Dataset) -> None:
    """data.root may change, what lies there may not."""
    now = {"mean": list(dataset.mean), "std": list(dataset.std), "class_names": list(dataset.class_names)}
    for name, value in now.items():
        if state[name] != value:
            raise ConfigError(
                f"data.root: the {dataset.name} found now is not what the run was trained on: {name} was {state[name]}, "
                f"is {value} ({dataset.source})"
            )


def _note_changes(state: dict[str, Any], trainer: Trainer, log: Log) -> None:
    old, new = state.get("machine", {}), machine(trainer)
    changed = [f"{key} {old[key]} -> {value}" for key, value in new.items() if key in old and old[key] != value]
    if changed:
        log(
            f"WARNING: resumed under other conditions, the results will differ by rounding or more: {', '.join(changed)}"
        )


def fit(
    config: Config,
    run_dir: Path | None,
    *,
    log: Log | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fallback: bool = False,
    extend: bool = False,
    on_range_test: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Train `config` into `run_dir` (None keeps nothing) and give the summary.

    `resume` continues from last.pt (with `fallback` from previous.pt where last.pt is damaged, with `extend` to a larger
    train.epochs: the steps that are left take their rates from the schedule of the longer training); `on_range_test` is
    called with the folder once lr_finder.csv is there. Raises what its parts raise; see train/__main__.py for their exit codes.
    """
    group = from_environment()
    log = log or Log(quiet=not group.first)
    times = Times()
    signals = SignalWatch(repeats=under_torchrun(), announce=group.first)
    with ExitStack() as stack:
        stack.enter_context(signals.watching())
        begun = time.perf_counter()
        stack.enter_context(process_group(group, config.train.device))
        with group.together():
            setup = Setup(config, log, times, group)
        folder, state = None, None
        with group.together():
            if run_dir is not None and group.first:
                folder = RunFolder(run_dir, resume=resume, overwrite=overwrite)
                stack.callback(folder.close)
        if resume:
            assert run_dir is not None, "resuming needs the folder that holds last.pt"
            state = group.from_first(lambda: _load_for_resume(run_dir, config, fallback, extend, log))
            # the rates that were found are part of the recipe now
            config.schedule.lr_max, config.schedule.lr_min = state["lr_max"], state["lr_min"]
        dataset = setup.load_data()
        with group.together():
            if state is not None:
                _check_same_data(state, dataset)
            trainer = setup.build(dataset)
        stack.callback(trainer.close)
        times.set_up += time.perf_counter() - begun
        setup.warm_up(trainer)

        notice = LongRunNotice(trainer.total_steps, config, setup.runtime, log)
        position = Position()
        if state is not None:
            with group.together():
                position = restore(trainer, state, times)
            _note_changes(state, trainer, log)
            if folder is not None and fallback:
                _restore_last(folder.path)
            log(f"resumed from {run_dir} at epoch {position.epoch}, step {position.step}")
        elif "find" in (config.schedule.lr_max, config.schedule.lr_min):
            lr_max, lr_min = find_rates(setup, trainer, folder, notice, overwrite)
            config.schedule.lr_max, config.schedule.lr_min = lr_max, lr_min
            if folder is not None and on_range_test is not None:
                on_range_test(folder.path)
        elif folder is not None and overwrite:
            _start_over(folder, log)
        assert isinstance(config.schedule.lr_max, float) and isinstance(config.schedule.lr_min, float)
        schedule = OneCycle(
            config.schedule.lr_max,
            config.schedule.lr_min,
            config.schedule.peak_epoch * trainer.steps_per_epoch,
            trainer.total_steps,
        )
        with group.together():
            if folder is not None:
                # first, as it proves that a run lies here: after a kill the folder can be overwritten
                folder.write_json("environment.json", environment(setup, dataset))
                folder.write_text("config.yaml", to_yaml(config))
        run = Run(trainer, schedule, folder, log, times, position, signals, notice)
        run.train()
        summary, lines = summary_lines(run, run_dir)
        if folder is not None:
            folder.write_json("summary.json", summary)
        for line in lines:
            log(line)
        return summary


def find_only(
    config: Config,
    run_dir: Path,
    *,
    log: Log | None = None,
    overwrite: bool = False,
    on_range_test: Callable[[Path], None] | None = None,
) -> tuple[float, float]:
    """The range test alone: writes lr_finder.csv into the folder and gives the suggested (lr_max, lr_min)."""
    group = from_environment()
    log = log or Log(quiet=not group.first)
    times = Times()
    config.schedule.lr_max = config.schedule.lr_min = "find"
    with ExitStack() as stack:
        stack.enter_context(SignalWatch(repeats=under_torchrun()).watching())
        stack.enter_context(process_group(group, config.train.device))
        with group.together():
            setup = Setup(config, log, times, group)
        folder = None
        with group.together():
            if group.first:
                folder = RunFolder(run_dir, overwrite=overwrite, range_test=True)
                stack.callback(folder.close)
        dataset = setup.load_data()
        with group.together():
            trainer = setup.build(dataset)
        stack.callback(trainer.close)
        setup.warm_up(trainer)
        notice = LongRunNotice(config.schedule.find_steps, config, setup.runtime, log)
        rates = find_rates(setup, trainer, folder, notice, overwrite)
        if folder is not None and on_range_test is not None:
            on_range_test(folder.path)
        return rates

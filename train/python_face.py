"""`train.fit`: a training as a call, for scripts and notebooks. Stable from version 0.2 on: names, arguments and results
stay; new ones may be added."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline import torch_graph
from dali_pipeline.errors import at_home
from train.config import Config, ConfigError, find_recipe, from_dict, load_config, own_keys, to_dict, with_overrides
from train.disk.folder import default_run_dir, read_metrics
from train.errors import UserError
from train.machine.distributed import from_environment
from train.machine.process import process_as_found
from train.machine.signals import Interrupted
from train.run import fit as train_into
from train.screen.log import Log
from train.step.steps import EvalStep, TrainStep

NAME = "python"  # of the run folder where the recipe has no file to be called by
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class FinishedRun:
    """A run that has finished. Accuracies are in percent.

    folder: the run folder, absolute; `analysis.load(folder)` predicts, evaluates and draws from it.
    accuracy: of the test set after the last epoch (`last_accuracy` of summary.json), chosen by nothing.
    best_accuracy, best_epoch: of best.pt. Without a validation split the test set itself has chosen it, which flatters;
        with one the accuracy is None where best.pt could not be read at the end. Both are None where best.pt was lost.
    metrics: metrics.jsonl, a dict an epoch; summary: summary.json.
    """

    folder: Path
    accuracy: float
    best_accuracy: float | None
    best_epoch: int | None
    metrics: list[dict[str, Any]] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)


def fit(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Config,
    *overrides: str,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> FinishedRun:
    """Train, and return the finished run.

    recipe: the path of a YAML file, or the name of a recipe that is installed ("quickstart"); or its content, as nested
    dicts or a `train.Config`. NumPy's scalars are taken as numbers, and paths as text.
    overrides: "section.key=value", as on the command line.

    The run folder is run.dir; by default runs/NAME after the recipe's file, or runs/python where there is none, with a number
    appended if that exists. `resume` continues the run in it (by default the newest), `overwrite` replaces it; `quiet` prints
    nothing. The folder holds what `python -m train` writes except the pictures: `analysis.load(run.folder).report()` draws
    them.

    Raises UserError (ConfigError, DataError, NonFiniteLoss ...) with a one-line message for what a user can correct; OSError
    and torch.OutOfMemoryError where disk or memory fail; KeyboardInterrupt where SIGINT, SIGTERM, SIGHUP or SIGUSR1 ended the
    training, after a whole step and with a checkpoint. It never ends the process, handles signals in the main thread only, and
    restores the signal handlers, the number of threads, torch's global flags and the default generators. Only one call at a
    time.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite: a run is either continued or replaced")
    log = Log(quiet or not from_environment().first, owns_process=False)
    config, name = _configuration(recipe, overrides, log)
    folder = _folder(config, name, resume)
    try:
        with _alone(), process_as_found():
            summary = train_into(config, folder, log=log, resume=resume, overwrite=overwrite, owns_process=False)
    except Interrupted as error:
        text = (
            f"{error}: stopped after a whole step; {folder} holds the state, continue with resume=True"
            if error.saved
            else f"{error}: stopped, nothing was trained since the last checkpoint"
        )
        raise KeyboardInterrupt(text) from None
    if config.run.analyse:
        log(f"next           analysis.load({str(folder)!r}).report() draws the pictures")
    lines = folder / "metrics.jsonl"  # of several processes perhaps only the first sees the folder
    return FinishedRun(
        folder=folder,
        accuracy=summary["last_accuracy"],
        best_accuracy=summary["best_accuracy"],
        best_epoch=summary["best_epoch"],
        metrics=read_metrics(lines) if lines.exists() else [],
        summary=summary,
    )


def _configuration(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Config, overrides: tuple[str, ...], log: Log
) -> tuple[Config, str]:
    """The configuration, checked like one from a file, and the name for its run folder."""
    for word in overrides:
        if not isinstance(word, str):
            raise ConfigError(f"{word!r} is no override; expected text, section.key=value, such as 'train.epochs=3'")
    if isinstance(recipe, (str, os.PathLike)):
        path = at_home(recipe, "recipe", ConfigError)
        found = find_recipe(path)
        if found != path:
            log(f"recipe: {found}, as no file {path} lies here")
        return load_config(found, overrides, log), found.stem
    if isinstance(recipe, Config):
        # with another data.name the keys of the one before go
        given = {word.partition("=")[0] for word in overrides}
        return from_dict(own_keys(with_overrides(_plain_tree(to_dict(recipe)), overrides), given)[0]), NAME
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"{recipe!r} is no recipe; expected the path of a YAML file, nested dicts or a train.Config")
    return from_dict(with_overrides(_plain_tree(recipe), overrides)), NAME


def _plain_tree(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which NumPy's scalars, paths and the like are replaced by what a YAML file can hold."""
    return {
        section: {key: _plain(value) for key, value in content.items()} if isinstance(content, Mapping) else content
        for section, content in recipe.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _folder(config: Config, name: str, resume: bool) -> Path:
    if config.run.dir is not None:
        return at_home(config.run.dir, "run.dir", ConfigError).absolute()
    if from_environment().world_size > 1:
        raise ConfigError("run.dir: several processes that train together need the run folder's name")
    return default_run_dir(name, resume).absolute()


@contextmanager
def _alone() -> Iterator[None]:
    """Refuses a second training at the same time: both would change and restore the same settings of the process."""
    if not _one_at_a_time.acquire(blocking=False):
        raise UserError("another training runs in this process; wait for it, or start this one in a process of its own")
    try:
        yield
    finally:
        try:
            _forget_compiled()
        finally:
            _one_at_a_time.release()


def _forget_compiled() -> None:
    """Clear torch's compiled functions. In one process torch compiles a function for at most eight shapes of its inputs and
    weights; without this the ninth width of a search, or the ninth number of images, would train uncompiled."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and hasattr(frames, "reset_code"):
        for function in (TrainStep.forward, EvalStep.forward, *torch_graph.COMPILED):
            frames.reset_code(function.__code__)

"""Resuming: which checkpoint to continue from, and whether recipe, data and machine are still those of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dali_pipeline.dataset import Dataset
from dali_pipeline.regular import read_regular
from train.config import KEYS, Config, ConfigError, changes, from_record, own_keys, sources_of_key, to_dict
from train.disk.atomic import write_atomic
from train.disk.checkpoint import CheckpointError
from train.disk.content import misfit
from train.disk.snapshot import Snapshot, load_snapshot


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """ "section.key: old -> new" for every key that differs and changes what a run computes. A key that the old recipe does not
    have, as an earlier version wrote it, counts as its default. Where data.name differs, the keys of the two data sets are not
    listed as well."""
    found = []
    data = old.get("data", {}).get("name")
    for section, keys in new.items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            before = old.get(section, {}).get(key, KEYS[name][0].default)
            # the range test has since replaced "find" by a rate
            if before == value or (value == "find" and isinstance(before, float)):
                continue
            if changes(name) in ("result", "rounding") and data in (sources_of_key(name) or (data,)):
                found.append(f"{name}: {before} -> {value}")
    return found


def load_for_resume(
    path: Path, config: Config, *, fallback: bool, extend: bool, log: Callable[[str], None]
) -> Snapshot:
    """The state to continue from: last.pt of the folder, or with `fallback` previous.pt where last.pt is damaged. Raises
    CheckpointError; ConfigError where the recipe differs. With `extend`, train.epochs may be larger than before. A best.pt that
    is not that of the state's best epoch is put right, with a warning."""
    last, previous = path / "last.pt", path / "previous.pt"
    try:
        file, snapshot = last, load_snapshot(last)
    except CheckpointError as error:
        if not fallback:
            hint = "; --fallback continues from previous.pt" if previous.exists() else ""
            raise CheckpointError(f"{error}{hint}") from None
        file, snapshot = previous, load_snapshot(previous)
        log(f"WARNING: {error}; continuing from {previous}")
    try:
        epochs = from_record(snapshot.config, lambda note: log(f"note: the checkpoint's recipe: {note}")).train.epochs
    except ConfigError as error:
        raise CheckpointError(f"{file}: holds no recipe that this version reads: {error}") from None
    (old, _), new = own_keys(snapshot.config), to_dict(config)
    longer = config.train.epochs > epochs
    if extend and longer:
        old = {**old, "train": {**old.get("train", {}), "epochs": config.train.epochs}}
    changed = differences(old, new)
    if changed:
        hint = "; a longer training of the same recipe needs --extend" if longer and not extend else ""
        raise ConfigError(
            f"{path}: --resume continues the recipe that the run began with, but these keys differ: "
            f"{'; '.join(changed)}. Leave them as they were, or start a new run{hint}"
        )
    position = snapshot.position
    if position.epoch > config.train.epochs or (position.epoch == config.train.epochs and position.step):
        raise CheckpointError(
            f"{file}: holds what no training leaves: epoch is {position.epoch} and step {position.step}, with "
            f"train.epochs={config.train.epochs}; use another checkpoint of the run"
        )
    _settle_best(path, file, snapshot, log)
    return snapshot


def _settle_best(path: Path, file: Path, snapshot: Snapshot, log: Callable[[str], None]) -> None:
    """See to it that best.pt holds the weights of the epoch that the state to continue from calls the best. Where it does not (it
    is damaged or gone, or a kill came between writing it and last.pt), it is written from that state, if that is of the best
    epoch; else no epoch counts as the best so far, and the next one will be."""
    position, best = snapshot.position, path / "best.pt"
    if position.best_epoch == 0:
        return
    try:
        found = load_snapshot(best).position
        if (found.epoch, found.step) == (position.best_epoch, 0):
            return
        reason = f"{best}: is of epoch {found.epoch}, and the best epoch of {file.name} is {position.best_epoch}"
    except CheckpointError as error:
        reason = str(error)
    if (position.epoch, position.step) == (position.best_epoch, 0):
        write_atomic(best, read_regular(file))
        log(f"WARNING: {reason}; written anew from {file.name}, which is of that epoch")
        return
    log(
        f"WARNING: {reason}; the weights of epoch {position.best_epoch} ({position.best_accuracy:.2f}%) are lost, and "
        "best.pt will be the best of the epochs from here on"
    )
    position.best_accuracy, position.best_epoch = -1.0, 0


def check_fits(snapshot: Snapshot, state: dict[str, Any], steps_per_epoch: int, where: Path) -> None:
    """Raise CheckpointError unless the snapshot can be loaded into a trainer in this `state` (`Trainer.state`)."""
    problem = None
    if snapshot.steps_per_epoch != steps_per_epoch:
        problem = f"steps_per_epoch is {snapshot.steps_per_epoch}, and an epoch has {steps_per_epoch}"
    for name, found in snapshot.trainer_state.items():
        optional = name == "scaler" and not (found and state[name])  # it may come from a training without one
        problem = problem or (None if optional else misfit(found, state[name], name))
    if problem:
        raise CheckpointError(f"{where}: the checkpoint is not that of this network and recipe: {problem}")


def restore_last(path: Path) -> None:
    """Where last.pt is damaged, replace it by previous.pt; otherwise the next save would keep the damaged one as previous.pt."""
    try:
        load_snapshot(path / "last.pt")
    except CheckpointError:
        write_atomic(path / "last.pt", read_regular(path / "previous.pt"))


def check_same_data(snapshot: Snapshot, dataset: Dataset) -> None:
    """Raise ConfigError unless the data are the run's. data.root may differ, the images there may not."""
    for name in ("mean", "std", "class_names"):
        then, now = getattr(snapshot.data, name), getattr(dataset, name)
        if then != now:
            raise ConfigError(
                f"data.root: the {dataset.name} found now is not what the run was trained on: {name} was {list(then)}, "
                f"is {list(now)} ({dataset.source})"
            )
    now_validation = None if dataset.validation is None else dataset.validation.fingerprint
    if snapshot.data.validation != now_validation:
        raise ConfigError(
            f"data.root: the validation split of {dataset.name} is not that of the run: it was "
            f"{_named(snapshot.data.validation)}, is {_named(now_validation)} ({dataset.source})"
        )


def _named(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else f"the one with SHA-256 {fingerprint[:12]}"


def note_changes(then: dict[str, Any], now: dict[str, Any], log: Callable[[str], None]) -> None:
    """Log a warning where device, arithmetic or software differ from those that the run began with (`Snapshot.machine`)."""
    changed = [f"{key} {then[key]} -> {value}" for key, value in now.items() if key in then and then[key] != value]
    if changed:
        log(
            f"WARNING: resumed under other conditions, the results will differ by rounding or more: {', '.join(changed)}"
        )

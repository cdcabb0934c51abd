"""Resuming: which checkpoint to continue from, and whether recipe, data and machine are still those of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dali_pipeline.dataset import Dataset
from train.config import KEYS, Config, ConfigError, changes, own_keys, sources_of_key, to_dict
from train.disk.atomic import write_atomic
from train.disk.checkpoint import CheckpointError, load_checkpoint
from train.disk.snapshot import Snapshot


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
    CheckpointError; ConfigError where the recipe differs. With `extend`, train.epochs may be larger than before."""
    last, previous = path / "last.pt", path / "previous.pt"
    try:
        state = load_checkpoint(last)
    except CheckpointError as error:
        if not fallback:
            hint = "; --fallback continues from previous.pt" if previous.exists() else ""
            raise CheckpointError(f"{error}{hint}") from None
        state = load_checkpoint(previous)
        log(f"WARNING: {error}; continuing from {previous}")
    snapshot = Snapshot.from_dict(state, path)
    (old, note), new = own_keys(snapshot.config), to_dict(config)
    if note:
        log(f"note: the checkpoint's recipe: {note}")
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
    return snapshot


def restore_last(path: Path) -> None:
    """Where last.pt is damaged, replace it by previous.pt; otherwise the next save would keep the damaged one as previous.pt."""
    try:
        load_checkpoint(path / "last.pt")
    except CheckpointError:
        write_atomic(path / "last.pt", (path / "previous.pt").read_bytes())


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

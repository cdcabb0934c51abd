"""Whether the processes that train together were asked for the same: the same recipe, code, versions and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dali_pipeline
import net
import train
from dali_pipeline.dataset import Dataset
from train.config import Config, changes, to_dict
from train.machine.environment import versions

MAX_NAMED = 8  # differences in one message


def asked_of(config: Config, options: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same for all processes: every key that changes a run, or when it saves, `options` (of the command), the
    versions and the source code."""
    facts = {name: str(value) for name, value in options.items()}
    for section, keys in to_dict(config).items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            # all processes save together
            if changes(name) != "nothing" or name == "run.checkpoint_every":
                facts[name] = str(value)
    for name, version in versions().items():
        shown = ".".join(str(version).split(".")[:2]) if name == "python" else str(version)
        facts[f"the version of {name}"] = shown
    facts["the source code"] = f"SHA-256 {_digest_of_source()[:12]}"
    return facts


def facts_of(dataset: Dataset) -> dict[str, str]:
    """What must be the same of the data on all machines."""
    facts = {"the classes": ", ".join(dataset.class_names)}
    for name, split in dataset.splits.items():
        facts[f"the {name} split"] = f"{len(split):,} images, SHA-256 {split.fingerprint[:12]}"
    return facts


def disagreement(names: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str | None:
    """The differences between `facts`, one mapping for each process of `names`, in words; None where there are none."""
    keys = list(dict.fromkeys(key for found in facts for key in found))
    said = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for name, found in zip(names, facts, strict=True):
            values.setdefault(found.get(key, "none"), []).append(name)
        if len(values) > 1:
            said.append(f"{key}: {', '.join(f'{value} for {_some(who)}' for value, who in values.items())}")
    if not said:
        return None
    more = [f"and {len(said) - MAX_NAMED} more"] if len(said) > MAX_NAMED else []
    return "; ".join([*said[:MAX_NAMED], *more])


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _digest_of_source() -> str:
    digest = hashlib.sha256()
    for package in (dali_pipeline, net, train):
        (folder,) = package.__path__
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{path.relative_to(Path(folder).parent)}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()

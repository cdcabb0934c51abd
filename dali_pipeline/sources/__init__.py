"""The data sets by name. A new source is one file beside this one and one row of SOURCES."""

from __future__ import annotations

import inspect
import typing
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal

from dali_pipeline.dataset import DataError, Dataset
from dali_pipeline.errors import at_home
from dali_pipeline.hold_out import hold_out
from dali_pipeline.options import DataOptions
from dali_pipeline.sources.cifar import Cifar10, Cifar100
from dali_pipeline.sources.digits import Digits
from dali_pipeline.sources.folder import Folder
from dali_pipeline.sources.npz import Npz
from dali_pipeline.sources.source import Say, Source
from dali_pipeline.sources.synthetic import Synthetic
from dali_pipeline.words import to_stderr

__all__ = ["SOURCES", "Say", "Source", "data_sections", "load", "source_of", "to_stderr"]

SOURCES: dict[str, type[Source]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "folder": Folder,
    "npz": Npz,
    "digits": Digits,
    "synthetic": Synthetic,
}


def data_sections() -> dict[str, type[DataOptions]]:
    """The dataclass of the `data:` section for each `data.name`: the keys that all sources share, then the source's own,
    whose metadata names as `sources` those that they belong to."""
    names = Literal[tuple(SOURCES)]  # type: ignore[valid-type]
    (shared,) = (f for f in fields(DataOptions) if f.name == "name")
    namespace = {"__doc__": DataOptions.__doc__, "__module__": __name__}
    owners = _owners()
    sections = {}
    for source_name, source in SOURCES.items():
        hints = typing.get_type_hints(source)
        name: Any = field(default=source_name, metadata=shared.metadata)
        keys: list[tuple[str, Any, Any]] = [("name", names, name)]
        for f in fields(source):
            metadata = {**f.metadata, "sources": owners[f.name]}
            keys.append((f.name, hints[f.name], field(default=f.default, metadata=metadata)))
        sections[source_name] = make_dataclass(
            f"{source.__name__}Data", keys, bases=(DataOptions,), namespace=namespace, frozen=True, kw_only=True
        )
    return sections


def _owners() -> dict[str, tuple[str, ...]]:
    """For each key of a source the names of those that have it. Sources share a key where they inherit it from one class.
    Raises ValueError where two classes declare the same one."""
    declared: dict[str, object] = {f.name: DataOptions for f in fields(DataOptions)}
    owners: dict[str, tuple[str, ...]] = dict.fromkeys(declared, ("every data set",))
    for source_name, source in SOURCES.items():
        for f in fields(source):
            (by,) = (cls for cls in source.__mro__ if f.name in inspect.get_annotations(cls))
            if declared.setdefault(f.name, by) is not by:
                raise ValueError(
                    f"data.{f.name} is a key of {owners[f.name][0]} already, and {source_name} declares it again"
                )
            owners[f.name] = (*owners.get(f.name, ()), source_name)
    return owners


def source_of(options: DataOptions) -> Source:
    """The source that `options.name` names, with its keys as `options` has them, or else their defaults."""
    source = SOURCES.get(options.name)
    if source is None:
        raise DataError(f"unknown data set {options.name!r}, expected one of {', '.join(SOURCES)}")
    return source(**{f.name: getattr(options, f.name) for f in fields(source) if hasattr(options, f.name)})


def load(
    options: DataOptions, say: Say | None = None, *, download: bool | None = None, root: Path | None = None
) -> Dataset:
    """The data set of the `data:` section, with the validation split that the section asks for. Raises DataError where it
    cannot be read or downloaded.

    `say` receives lines about a download's progress (`to_stderr` prints them); None is silent. `download` and `root`, where
    given, replace those of `options`.
    """
    folder = at_home(options.root if root is None else root, "data.root", DataError)
    dataset = source_of(options).load(folder, download=options.download if download is None else download, say=say)
    if options.validation is None:
        return dataset
    if dataset.validation is not None:
        raise DataError(f"data.validation: {dataset.name} has a validation split of its own; leave the key out")
    return hold_out(dataset, options.validation)

"""The part of the `data:` section that every data set shares. Each source adds its own keys (dali_pipeline/sources)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def key(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field for one key: its meaning (`help`), its range (`at_least` or `above`, and `at_most` or `below`; for text
    a `pattern`), and what changing it `changes` about a run: "result" (the default), "rounding", "speed" or "nothing"."""
    return field(default=default, metadata={"help": help, **about})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data set, and the input pipeline."""

    name: str = key("cifar10", "the data set")
    root: str = key("data", "folder that holds the data, or that receives the download", changes="nothing")
    download: bool = key(
        True, "fetch a missing CIFAR archive (170 MB), verify it and keep it in data.root", changes="nothing"
    )
    backend: Literal["auto", "dali", "torch"] = key(
        "auto", "input pipeline; auto takes DALI wherever it gives the right pixels", changes="speed"
    )
    resident: Literal["auto", "always", "never"] = key(
        "auto",
        "whether all decoded images lie on the device; never sends each batch from host memory, auto where they take more than "
        "half of what is free",
        changes="speed",
    )
    validation: int | float | None = key(
        None,
        "training images held out to choose best.pt by: a fraction (0.1) or a count (5000); null holds out none",
        above=0.0,
        at_most=10**9,
    )

"""What a data source is: its own keys of the `data:` section, and the data set that they describe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dali_pipeline.dataset import Dataset

Say = Callable[[str], None]  # takes a line about the progress


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """One way to get a data set. The fields of a subclass are the keys that the `data:` section has for it alone, made by
    `dali_pipeline.options.key`; a key's name must be no other source's."""

    def training_images(self) -> int | None:
        """How many there will be, where that is known without reading anything."""
        return None

    def check(self) -> None:  # noqa: B027  most sources have nothing to check
        """Raises ValueError, "data.KEY: ...", for values that no training can use although each is in its own range."""

    @abstractmethod
    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        """The data set, from the folder `root`, into which it may be downloaded. Raises DataError where it cannot be had.

        `say` receives lines about the progress; None wants none.
        """

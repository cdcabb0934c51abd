"""What a data source is: its own keys of the `data:` section, and the data set that they describe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from dali_pipeline.dataset import Dataset
from dali_pipeline.progress import Say

__all__ = ["Say", "Source"]


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """One kind of data set. The fields of a subclass are the keys of the `data:` section that belong to this source alone,
    declared with `dali_pipeline.options.key`. Sources share a key by inheriting it from one class;
    no two classes may declare one of the same name."""

    def training_images(self) -> int | None:
        """The number of training images; None where it is not known before the data are read."""
        return None

    def check(self) -> None:  # noqa: B027  most sources have nothing to check
        """Raises ValueError, "data.KEY: ...", for values that no training can use although each is in its own range."""

    @abstractmethod
    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        """The data set from the folder `root`; with `download` it may be downloaded into it. Raises DataError where it cannot be
        read or downloaded.

        `say` receives lines about the progress; with None there are none.
        """

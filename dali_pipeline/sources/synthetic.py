"""Random pixels of any size and number, for measurements and for trying a recipe without data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dali_pipeline.dataset import DataError, Dataset, Split, with_statistics
from dali_pipeline.options import key
from dali_pipeline.sources.source import Say, Source


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Uniformly random pixels and labels."""

    synthetic_size: int = key(32, "height and width of synthetic images", at_least=32, at_most=1024)
    synthetic_classes: int = key(10, "classes of the synthetic set", at_least=2, at_most=256)
    synthetic_count: int = key(50_000, "training images of the synthetic set", at_least=10, at_most=10**9)

    def training_images(self) -> int:
        return self.synthetic_count

    def check(self) -> None:
        if self.synthetic_size % 8:
            raise ValueError(
                f"data.synthetic_size: {self.synthetic_size} is no multiple of 8, as the network halves images three times"
            )

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        return random_dataset(self.synthetic_size, self.synthetic_classes, self.synthetic_count)


def random_dataset(size: int = 32, classes: int = 10, count: int = 50_000, seed: int = 0) -> Dataset:
    """`count` training images of size x size and a fifth as many test images, the same for the same seed."""
    limits = {
        "size": (size, 1, 4096),
        "classes": (classes, 1, 256),
        "count": (count, 1, 10**9),
        "seed": (seed, 0, 2**63),
    }
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise DataError(f"synthetic {name} is {value}, expected {least}..{most}")

    def split(stream: int, length: int) -> Split:
        generator = np.random.Generator(np.random.Philox(key=[seed, stream]))
        # the first byte of each row is not used; it keeps the pixels of a seed the same as in earlier versions
        rows = generator.integers(0, 256, (length, 1 + 3 * size * size), np.uint8)
        labels = generator.integers(0, classes, length, np.uint8, endpoint=False).astype(np.int64)
        return Split(rows[:, 1:].reshape(length, 3, size, size), labels, planar=True)

    try:
        train, test = split(0, count), split(1, max(1, count // 5))
    except MemoryError as error:
        raise DataError(f"synthetic: {count:,} images of {size} x {size} do not fit into memory") from error
    names = tuple(f"class_{label}" for label in range(classes))
    return with_statistics("synthetic", train, test, names, f"synthetic, random pixels, seed {seed}")

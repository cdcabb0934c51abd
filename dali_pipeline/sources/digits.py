"""The handwritten digits that ship inside scikit-learn: a data set that needs neither a file nor a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import DataError, Dataset, Pixels, Split, with_statistics
from dali_pipeline.sources.source import Say, Source


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """The 1,797 digits as 32 x 32 RGB.

    Pixels 0..16 on 8 x 8 are upscaled bilinearly by 4 (pixel centres aligned, edges repeated) and scaled to 0..255, in
    integers, rounded half up; the three channels are equal. Test: every fifth image of each class, in scikit-learn's
    order (the 5th, 10th, ...); train: the others. The same writers occur in both. A mirrored digit is not a digit, so the
    recipe trains without flips.
    """

    def training_images(self) -> int:
        return 1442

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(f"digits come with scikit-learn, which cannot be imported: {error}") from error
        bunch = load_digits()
        labels = bunch.target.astype(np.int64)
        grey = _upscale(bunch.images.astype(np.int64))
        pixels = np.repeat(grey[..., None], 3, axis=3)
        is_test = np.zeros(len(labels), bool)
        for label in range(10):
            is_test[np.flatnonzero(labels == label)[4::5]] = True
        train, test = (Split(pixels[rows], labels[rows]) for rows in (~is_test, is_test))
        names = tuple(str(label) for label in range(10))
        return with_statistics("digits", train, test, names, "scikit-learn's load_digits, upscaled to 32 x 32 RGB")


def _upscale(images: npt.NDArray[np.int64]) -> Pixels:
    """(N, 8, 8) in 0..16 to (N, 32, 32) uint8 in 0..255."""
    # Output i has its centre at (i + 1/2) / 4 - 1/2 = (2i - 3) / 8 of the input: weights are eighths.
    weights = np.zeros((32, 8), np.int64)
    for row in range(32):
        low, fraction = divmod(2 * row - 3, 8)
        weights[row, max(low, 0)] += 8 - fraction
        weights[row, min(low + 1, 7)] += fraction
    scaled = weights @ images @ weights.T  # 16 * 64 at full ink
    pixels: Pixels = ((scaled * 255 + 512) // 1024).astype(np.uint8)
    return pixels

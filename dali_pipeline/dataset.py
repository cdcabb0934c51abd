"""Labelled images in host memory, and a data set's class names, mean and standard deviation. Needs only NumPy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import UserError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class DataError(UserError):
    """The data set cannot be read or downloaded. The message names the file or address, what was expected, what was found
    and what to do."""


class DataNotWritten(DataError):
    """A download, or decoded images, cannot be written: the disk is full, or the like."""

    exit_code = 1


@dataclass(frozen=True, eq=False)
class Facts:
    """What a source has noted of M images, so that their pixels need not be read for it.

    digests: uint8 (M, 32), the SHA-256 of each image's file. sums, squares: int64 (M, 3), the sum of each channel's values
    0..255 over the image, and of their squares.
    """

    digests: npt.NDArray[np.uint8]
    sums: npt.NDArray[np.int64]
    squares: npt.NDArray[np.int64]

    def take(self, places: npt.NDArray[Any] | slice) -> Facts:
        return Facts(self.digests[places], self.sums[places], self.squares[places])


@dataclass(frozen=True, eq=False)
class Split:
    """N labelled images of one size.

    pixels: uint8 (M, H, W, 3), or with `planar` (M, 3, H, W), as CIFAR's files hold them; any strides, so that they may be a
    view of a file's records, and perhaps a memory map. labels: int64 (N,). rows: int64 (N,), where not all of the pixels in
    their order belong to the split: image i is pixels[rows[i]]. facts: of the M images. Raises ValueError for anything else.
    """

    pixels: Pixels
    labels: Labels
    planar: bool = field(default=False, kw_only=True)
    rows: npt.NDArray[np.int64] | None = field(default=None, kw_only=True)
    facts: Facts | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[1 if self.planar else 3] != 3:
            expected = "(N, 3, H, W)" if self.planar else "(N, H, W, 3), or (N, 3, H, W) with planar=True"
            raise ValueError(f"pixels are {self.pixels.dtype} {shape}, expected uint8 {expected}")
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self),):
            raise ValueError(f"labels are {self.labels.dtype} {self.labels.shape}, expected int64 ({len(self)},)")

    def __len__(self) -> int:
        return len(self.pixels if self.rows is None else self.rows)

    @property
    def height(self) -> int:
        return int(self.pixels.shape[2 if self.planar else 1])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[3 if self.planar else 2])

    @property
    def images(self) -> Pixels:
        """(N, H, W, 3) uint8, a contiguous copy."""
        return self.images_on_demand[:]

    @property
    def images_on_demand(self) -> ImagesOnDemand:
        """The same, read from `pixels` only when they are asked for."""
        return ImagesOnDemand(self)

    def gather(self, places: npt.NDArray[Any] | slice) -> Pixels:
        """The pixels of the images at these places, in the order of the axes of `pixels`: a view where they lie in one piece,
        else a copy."""
        return np.asarray(self.pixels[places if self.rows is None else self.rows[places]])

    def take(self, places: npt.NDArray[Any] | slice) -> Split:
        """The images at these places (a slice, indices (n,) or a mask (N,)) as a split of their own. A memory map stays one."""
        labels = self.labels[places]
        if isinstance(places, slice) and self.rows is None:
            facts = None if self.facts is None else self.facts.take(places)
            return Split(self.pixels[places], labels, planar=self.planar, facts=facts)
        if self.rows is None and self.facts is None and not isinstance(self.pixels, np.memmap):
            return Split(self.pixels[places], labels, planar=self.planar)
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return replace(self, labels=labels, rows=rows[places])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the shape, the pixels and the labels: the same for either order of the axes."""
        digest = hashlib.sha256(f"{len(self)} x {self.height} x {self.width} x 3".encode())
        for piece in pieces(self, 1 << 22):
            digest.update(np.ascontiguousarray(piece).data)
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        return digest.hexdigest()


class ImagesOnDemand:
    """The images of a split, of which those that are asked for are copied: [place] is (H, W, 3), [places] (n, H, W, 3)."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self.shape = (len(split), split.height, split.width, 3)

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, places: int | np.integer[Any] | npt.NDArray[Any] | slice) -> Pixels:
        if isinstance(places, (int, np.integer)):
            single: Pixels = self[np.array([places])][0]
            return single
        return np.array(_hwc(self._split, self._split.gather(places)), order="C")


def some(names: Sequence[str], most: int = 10) -> str:
    """The names, or the first of them and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _hwc(split: Split, pixels: Pixels) -> Pixels:
    """Pixels of the split as (n, H, W, 3), without a copy."""
    return pixels.transpose(0, 2, 3, 1) if split.planar else pixels


def pieces(split: Split, size: int) -> Iterator[Pixels]:
    """The images of a split in order, (n, H, W, 3) of at most `size` bytes (but at least one image); views where they lie in one
    piece."""
    count = max(1, size // max(1, 3 * split.height * split.width))
    for start in range(0, len(split), count):
        yield _hwc(split, split.gather(slice(start, start + count)))


@dataclass(frozen=True, eq=False)
class Dataset:
    """mean, std: per channel over all training pixels, in units of 0..255, so that x_norm = (x - mean) / std.

    fill: the mean colour, rounded, which cutout paints. source: where the data came from, for a run's environment.json.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: tuple[int, int, int]
    source: str
    validation: Split | None = None  # held-out training images, which choose best.pt
    notes: tuple[str, ...] = ()  # what a user should know about these data, as warnings
    remarks: tuple[str, ...] = ()  # and what else is worth a line of the log

    @property
    def splits(self) -> dict[str, Split]:
        """By name: train, validation where there is one, test."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def height(self) -> int:
        return self.train.height

    @property
    def width(self) -> int:
        return self.train.width


def with_statistics(
    name: str,
    train: Split,
    test: Split,
    class_names: tuple[str, ...],
    source: str,
    *,
    validation: Split | None = None,
) -> Dataset:
    """The data set with mean, standard deviation and fill colour of its training pixels.

    Everything before the square root is computed in integers, so that no digits cancel. Raises DataError where a channel has
    the same value everywhere.
    """
    mean, std = [], []
    pixels = len(train) * train.height * train.width
    for channel, total, squares in zip(("red", "green", "blue"), *channel_sums(train), strict=True):
        if pixels * squares == total**2:
            raise DataError(f"{source}: every training pixel of the {channel} channel is the same: these are no images")
        mean.append(total / pixels)
        std.append(math.sqrt(pixels * squares - total**2) / pixels)
    return Dataset(
        name,
        train,
        test,
        class_names,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        fill=(round(mean[0]), round(mean[1]), round(mean[2])),
        source=source,
        validation=validation,
    )


def channel_sums(split: Split) -> tuple[list[int], list[int]]:
    """For each channel the sum of all its values, and of their squares: exact."""
    if split.facts is not None:
        rows = slice(None) if split.rows is None else split.rows
        return split.facts.sums[rows].sum(0).tolist(), split.facts.squares[rows].sum(0).tolist()
    values, histogram = range(256), channel_histogram(split).tolist()
    sums = [sum(n * v for n, v in zip(counts, values, strict=True)) for counts in histogram]
    return sums, [sum(n * v * v for n, v in zip(counts, values, strict=True)) for counts in histogram]


def channel_histogram(split: Split) -> npt.NDArray[np.int64]:
    """(3, 256): how often each value occurs in each channel."""
    histogram = np.zeros((3, 256), np.int64)
    # bincount converts its input to 8 bytes a value, so it gets pieces that stay in the processor's cache
    for piece in pieces(split, 3 << 19):
        for channel in range(3):
            histogram[channel] += np.bincount(piece[..., channel].ravel(), minlength=256)
    return histogram

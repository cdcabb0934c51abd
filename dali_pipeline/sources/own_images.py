"""What the sources of a user's own images have in common: their keys, and the way from a list of images to a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import DataError, Dataset, Labels, Split, some, with_statistics
from dali_pipeline.hold_out import chosen_by_hash
from dali_pipeline.options import key
from dali_pipeline.sources.source import Source
from dali_pipeline.words import printable_path

if TYPE_CHECKING:
    from dali_pipeline.decoded import DecodedImages

SPLITS = ("train", "validation", "test")
UNEVEN = 1.5  # from this ratio of the largest class to the smallest on, the log gives both


@dataclass(frozen=True, kw_only=True)
class OwnImages(Source):
    """Images of any size, decoded once and kept in the size that the network gets."""

    image_size: int = key(32, "height and width that images are resized to, a multiple of 8", at_least=32, at_most=1024)
    resize: Literal["crop", "squash"] = key(
        "crop", "how images take that form: the middle cut out (the short side decides), or squashed to it"
    )
    test: int | float = key(
        0.2,
        "images held out as the test set where the data have none: a fraction (0.2) or a count (500), by hash",
        above=0.0,
        at_most=10**9,
    )

    def check(self) -> None:
        if self.image_size % 8:
            raise ValueError(
                f"data.image_size: {self.image_size} is no multiple of 8, as the network halves images three times"
            )
        if isinstance(self.test, float) and self.test >= 1:
            raise ValueError(f"data.test: {self.test:g} is neither a fraction below 1 nor a whole number of images")


@dataclass(frozen=True, eq=False)
class Listing:
    """M images with what is known of them beforehand. labels: (M,). split: (M,), a place in SPLITS; None where the test set is
    still to be held out. name_of gives an image's name for messages."""

    labels: Labels
    split: npt.NDArray[np.uint8] | None
    class_names: tuple[str, ...]
    names: Sequence[str]
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def assemble(name: str, listing: Listing, decoded: DecodedImages, test: float, where: str, version: str) -> Dataset:
    """The data set of the images that could be read. Raises DataError where no training is possible."""
    rows = np.arange(len(listing.labels))
    if decoded.problems:
        rows = np.delete(rows, list(decoded.problems))
    notes, remarks = list(listing.notes), [*listing.remarks, *_made(decoded)]
    labels, digests = listing.labels, decoded.facts.digests
    if decoded.problems:
        labels, digests = labels[rows], digests[rows]
    if listing.split is None:
        # other bits of the hash than those by which data.validation then chooses
        salted = np.empty_like(digests)
        for salt, digest in zip(salted, digests, strict=True):
            salt[:] = np.frombuffer(hashlib.sha256(b"test" + digest.tobytes()).digest(), np.uint8)
        held = chosen_by_hash(salted, labels, test, len(listing.class_names))
        split = np.where(held, SPLITS.index("test"), SPLITS.index("train")).astype(np.uint8)
        remarks.append(
            f"data.test={test:g}: {held.sum():,} of {len(held):,} images held out as the test set, by their hash"
        )
    else:
        split = listing.split[rows] if decoded.problems else listing.split
    parts = {part: np.flatnonzero(split == place) for place, part in enumerate(SPLITS)}
    counts = {part: np.bincount(labels[places], minlength=len(listing.class_names)) for part, places in parts.items()}
    notes += _check_classes(listing.class_names, counts, where)
    remarks += _balance(listing.class_names, counts["train"])
    for part in ("test", "validation"):
        notes += _twice(listing.names, rows, digests, parts["train"], parts[part], part)

    everything = Split(decoded.pixels, listing.labels, facts=decoded.facts)
    splits = {part: everything.take(_as_slice(rows[places])) for part, places in parts.items() if len(places)}
    dataset = with_statistics(
        name,
        splits["train"],
        splits["test"],
        listing.class_names,
        f"{where}, {version}",
        validation=splits.get("validation"),
    )
    return replace(dataset, notes=tuple(notes), remarks=tuple(remarks))


def _as_slice(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | slice:
    """The rows as a slice where they lie in one piece."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _made(decoded: DecodedImages) -> list[str]:
    from dali_pipeline.images import Made  # here, as what decodes images is slow to import

    kinds = {
        Made.OPAQUE: "with transparent parts, which became white",
        Made.EIGHT_BITS: "of more than 8 bits a channel, which became 8",
        Made.FIRST_FRAME: "of several frames, of which the first was taken",
    }
    counts = {words: int(np.count_nonzero(decoded.made & kind)) for kind, words in kinds.items()}
    return [f"{count:,} image{'s' * (count > 1)} {words}" for words, count in counts.items() if count]


def _check_classes(names: Sequence[str], counts: dict[str, npt.NDArray[np.int64]], where: str) -> list[str]:
    """Notes about classes that are missing somewhere. Raises DataError where no training is possible."""
    train, test = counts["train"], counts["test"]

    def without(part: npt.NDArray[np.int64]) -> list[str]:
        return [names[label] for label in np.flatnonzero(part == 0).tolist()]

    if np.count_nonzero(sum(counts.values())) < 2:
        only = f" ({names[0]})" if names else ""
        raise DataError(f"{where}: holds images of {min(len(names), 1)} class{only}; two are the least to tell apart")
    for part, words in ((train, "training"), (test, "test")):
        if not part.any():
            raise DataError(f"{where}: there is no {words} image")
    if missing := without(train):
        raise DataError(
            f"{where}: no training image of {some(missing)}, only others; add some, or take the class out everywhere"
        )
    notes = []
    for split in ("validation", "test"):
        if counts[split].any() and (missing := without(counts[split])):
            notes.append(f"no {split} image of {some(missing)}")
    return notes


def _balance(names: Sequence[str], train: npt.NDArray[np.int64]) -> list[str]:
    low, high = int(train.argmin()), int(train.argmax())
    if train[high] < UNEVEN * train[low]:
        return []
    return [
        f"classes are uneven: from {train[low]:,} training images of {names[low]} to {train[high]:,} of {names[high]}; "
        "optim.class_weights=balanced lets each count the same"
    ]


def _twice(
    names: Sequence[str],
    rows: npt.NDArray[np.int64],
    digests: npt.NDArray[np.uint8],
    train: npt.NDArray[np.int64],
    other: npt.NDArray[np.int64],
    part: str,
) -> list[str]:
    """A note where the same file is a training image and in another split."""
    heads = np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()  # enough of a hash for a warning
    found = other[np.isin(heads[other], heads[train])]
    if not len(found):
        return []
    twin = train[np.flatnonzero(heads[train] == heads[found[0]])[0]]
    return [
        f"{len(found):,} {part} image{'s are' if len(found) > 1 else ' is'} among the training images too, which flatters: "
        f"{printable_path(names[int(rows[found[0]])])} is {printable_path(names[int(rows[twin])])}"
    ]

"""Training images held out for validation: they choose best.pt, so that the test set is only measured. Needs only NumPy."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import DataError, Dataset, Labels, Split, pieces, some, with_statistics


def digests(split: Split) -> npt.NDArray[np.uint8]:
    """uint8 (N, 32): SHA-256 of each image's file where the source has noted it, else of its pixels, (H, W, 3) in C order,
    whatever the order of the axes in memory."""
    if split.facts is not None:
        return split.facts.digests if split.rows is None else split.facts.digests[split.rows]
    found = np.empty((len(split), 32), np.uint8)
    images = (image for piece in pieces(split, 1 << 22) for image in np.ascontiguousarray(piece))
    for digest, image in zip(found, images, strict=True):
        digest[:] = np.frombuffer(hashlib.sha256(image.data).digest(), np.uint8)
    return found


def held_out(split: Split, amount: float, num_classes: int) -> npt.NDArray[np.bool_]:
    """(N,) mask of the images to hold out: a pure function of the pixels and, for a count, of the labels.

    `amount` below 1 is a fraction: it takes every image whose digest, read as a number between 0 and 1, is smaller. An image
    therefore stays in its split when other images are added or removed. `amount` from 1 on is a count: from each class it
    takes the count / num_classes images with the smallest digests (one more from the first classes where that does not
    divide). Images with equal pixels land in the same split, so with duplicates there may be more images than asked for.
    """
    return chosen_by_hash(digests(split), split.labels, amount, num_classes)


def chosen_by_hash(
    found: npt.NDArray[np.uint8], labels: Labels, amount: float, num_classes: int
) -> npt.NDArray[np.bool_]:
    """`held_out` for images of these digests (N, 32) and labels (N,)."""
    if amount < 1:
        numbers = np.ascontiguousarray(found[:, :8]).view(">u8")[:, 0]
        mask: npt.NDArray[np.bool_] = numbers < np.uint64(min(int(amount * 2**64), 2**64 - 1))
        return mask
    chosen: set[bytes] = set()
    each, more = divmod(int(amount), num_classes)
    for label in range(num_classes):
        of_class = sorted({found[i].tobytes() for i in np.flatnonzero(labels == label)})
        chosen.update(of_class[: each + (label < more)])
    return np.fromiter((digest.tobytes() in chosen for digest in found), bool, len(found))


def hold_out(dataset: Dataset, amount: float) -> Dataset:
    """The data set with a part of its training images as validation split; mean and standard deviation are those of the rest.

    A class without a validation image is named in `notes`. Raises DataError where a class would have no training image left.
    """
    mask = held_out(dataset.train, amount, dataset.num_classes)
    train, validation = dataset.train.take(~mask), dataset.train.take(mask)
    wanted = f"data.validation: {amount:g}"
    for split, what in ((train, "training"), (validation, "validation")):
        counts = np.bincount(split.labels, minlength=dataset.num_classes)
        present = np.bincount(dataset.train.labels, minlength=dataset.num_classes) > 0
        empty = [dataset.class_names[label] for label in np.flatnonzero((counts == 0) & present)]
        if not empty:
            continue
        names = some(empty)
        if split is train or len(split) == 0:
            raise DataError(f"{wanted} of {len(dataset.train):,} training images leaves no {what} image of {names}")
        dataset = replace(dataset, notes=(*dataset.notes, f"{wanted} holds out no image of {names}"))
    made = with_statistics(
        dataset.name, train, dataset.test, dataset.class_names, dataset.source, validation=validation
    )
    return replace(made, notes=dataset.notes, remarks=dataset.remarks)

"""Draws everything that is random about an epoch: its permutation, and each image's crop offset, flip and cutout centre.

A plan depends only on (seed, epoch) and is drawn with NumPy; `dali_graph` and `torch_graph` apply it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dali_pipeline.options import key

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Tail = Literal["drop", "endless"]

RECTANGLES = 1 << 64  # the counter of the first block of random resized crops, beyond those of any number of images
SHAPES = 1024  # steps from the narrowest to the widest shape of a crop
WORDS_PER_IMAGE = 4  # one Philox-4x64 block: permutation key, crop offset, flip, cutout centre
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Augment:
    """What is random about a training image. Drawn per (seed, epoch, image) by dali_pipeline/plan.py."""

    crop: bool = key(True, "pad, then crop back to the image's size at a random offset")
    pad: int = key(4, "pixels of padding on each side", at_least=0, at_most=32)
    padding_mode: Literal["zero", "reflect"] = key("zero", "what the padding holds: black, or the image reflected")
    flip: bool = key(True, "mirror left-right with probability 1/2")
    flip_rule: Literal["random", "alternating"] = key(
        "random",
        "which epochs show an image mirrored: random draws anew in each, alternating draws once and turns every epoch",
    )
    cutout: int = key(
        8,
        "side of the square painted in the mean colour (arXiv:1708.04552); 0 turns it off",
        at_least=0,
        at_most=1024,  # the side of the largest images
    )
    scale: float = key(
        1.0,
        "smallest part of an image's area that a random crop takes, resized back to the whole (arXiv:1409.4842); 1 turns it off",
        at_least=0.01,
        at_most=1.0,
    )
    aspect: float = key(
        1.3333, "the widest shape of such a crop, and the inverse of the narrowest", at_least=1.0, at_most=4.0
    )

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"augment.pad is {self.pad}, expected 0 or more pixels")
        if self.cutout < 0:
            raise ValueError(f"augment.cutout is {self.cutout}, expected 0 (off) or more pixels")
        if self.padding_mode not in ("zero", "reflect"):
            raise ValueError(f"augment.padding_mode is {self.padding_mode!r}, expected 'zero' or 'reflect'")
        if self.flip_rule not in ("random", "alternating"):
            raise ValueError(f"augment.flip_rule is {self.flip_rule!r}, expected 'random' or 'alternating'")
        if not 0 < self.scale <= 1:
            raise ValueError(f"augment.scale is {self.scale}, expected above 0 and at most 1 (off)")
        if not self.aspect >= 1:
            raise ValueError(f"augment.aspect is {self.aspect}, expected 1 or more")
        if self.resized and self.crop:
            raise ValueError(
                f"augment.scale: {self.scale:g} takes crops and resizes them, augment.crop=true takes crops of padded images; "
                "set augment.crop=false"
            )

    @property
    def offsets(self) -> int:
        """Number of crop offsets an axis: 2 * pad + 1, or 1 without crop."""
        return 2 * self.pad + 1 if self.crop else 1

    @property
    def resized(self) -> bool:
        """Whether crops of random size are resized to the whole."""
        return self.scale < 1


NO_AUGMENT = Augment(crop=False, pad=0, flip=False, cutout=0)


@dataclass(frozen=True)
class Plan:
    """What happens to n images, in order of use; all arrays are (n,).

    Image `indices` is padded by `pad` on each side. From it a window of the image's own size is cropped, whose corner is at
    row dy and column dx (0..2*pad); the window is mirrored left to right where `flip` is set, and a square around (cy, cx)
    is painted over. With `rectangle`, (n, 4) int16, nothing is padded: the part of the image that begins at row `top` and column
    `left`, of `rows` x `columns`, in this order, is resized to the whole before it is mirrored.
    """

    indices: IntArray
    dy: IntArray
    dx: IntArray
    flip: BoolArray
    cy: IntArray
    cx: IntArray
    rectangle: npt.NDArray[np.int16] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, positions: IntArray | slice) -> Plan:
        return Plan(*(array[positions] for array in self._arrays()))

    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        drawn = self.indices, self.dy, self.dx, self.flip, self.cy, self.cx
        return drawn if self.rectangle is None else (*drawn, self.rectangle)

    @staticmethod
    def concatenate(plans: list[Plan]) -> Plan:
        if len(plans) == 1:
            return plans[0]
        return Plan(*(np.concatenate(arrays) for arrays in zip(*(plan._arrays() for plan in plans), strict=True)))


def identity_plan(indices: IntArray) -> Plan:
    """The plan that leaves the images as they are."""
    zeros = np.zeros(len(indices), np.int64)
    return Plan(np.asarray(indices, np.int64), zeros, zeros, zeros.astype(bool), zeros, zeros)


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a square's side or a pair; ValueError below 1."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image size is {height} x {width}, expected at least 1 x 1")
    return height, width


def draw_plan(seed: int, epoch: int, num_images: int, augment: Augment, size: int | tuple[int, int] = 32) -> Plan:
    """The plan of one whole epoch: (num_images,) arrays in order of use.

    Image i uses the four words of Philox-4x64's block i under the key (seed, epoch), both modulo 2^64. Its draws therefore
    depend neither on the other images nor on how the epoch is batched or sharded. An augmentation that is switched off is
    not drawn: the window stays in the middle, nothing is mirrored. Each augmentation has its own word, so switching one off
    does not change the draws of the others.

    With augment.flip_rule="alternating" whether an image is mirrored is read from epoch 0's words, and turned in every odd
    epoch: of two epochs in a row each image is mirrored in one (arXiv:2404.00498).

    With augment.scale below 1 image i also uses the words of block 2^64 + i under the same key: area, shape, row and column of
    its rectangle.
    """
    height, width = image_size(size)
    rectangle = (
        _rectangles(_words(seed, epoch, num_images, RECTANGLES), augment, height, width) if augment.resized else None
    )
    alternating = augment.flip and augment.flip_rule == "alternating"
    first = _mirrored(_words(seed, 0, num_images)) if alternating else None
    words = _words(seed, epoch, num_images)
    indices = _order(words[:, 0])
    # a word at a time, as the words of all images in their new order would be the largest array of an epoch
    if augment.crop:
        offset = _below(words[indices, 1], augment.offsets**2)
        dy, dx = offset // augment.offsets, offset % augment.offsets
    else:
        dy = dx = np.full(num_images, augment.pad, np.int64)
    if not augment.flip:
        flip = np.zeros(num_images, bool)
    elif first is not None:
        flip = first[indices] ^ bool(epoch % 2)
    else:
        flip = _mirrored(words)[indices]
    centre = _below(words[indices, 3], height * width)
    if rectangle is not None:
        rectangle = rectangle[indices]
    return Plan(indices, dy, dx, flip, centre // width, centre % width, rectangle)


def _words(seed: int, epoch: int, num_images: int, block: int = 0) -> npt.NDArray[np.uint64]:
    """(num_images, WORDS_PER_IMAGE) of one epoch from this block of the generator on, by index of the image."""
    key = np.array([seed & _WORD, epoch & _WORD], np.uint64)
    generator = np.random.Philox(key=key).advance(block)
    return generator.random_raw(WORDS_PER_IMAGE * num_images).reshape(num_images, WORDS_PER_IMAGE)


def _rectangles(words: npt.NDArray[np.uint64], augment: Augment, height: int, width: int) -> npt.NDArray[np.int16]:
    """(n, 4): top, left, rows, columns of a random part of an image.

    Its area, in pixels, is uniform from augment.scale of the image's on; its shape, columns to rows, is uniform in the logarithm
    between 1 / augment.aspect and augment.aspect, in SHAPES steps; a side that would exceed the image is cut to it. Its place is
    uniform among those inside the image. The steps are rounded to 16 bits, and the rest is exact in every floating point
    arithmetic (division and square root), so that all machines draw the same.
    """
    pixels = height * width
    least = max(1, math.ceil(augment.scale * pixels))
    area = least + _below(words[:, 0], pixels - least + 1)
    steps = np.array([round(augment.aspect ** (2 * k / SHAPES - 1) * 65536) / 65536 for k in range(SHAPES + 1)])
    shape = steps[_below(words[:, 1], SHAPES + 1)]
    found = np.empty((len(words), 4), np.int16)
    found[:, 2] = np.clip(np.rint(np.sqrt(area / shape)), 1, height)
    found[:, 3] = np.clip(np.rint(np.sqrt(area * shape)), 1, width)
    for side, size in enumerate((height, width)):
        found[:, side] = _below(words[:, 2 + side], size - found[:, 2 + side].astype(np.int64) + 1)
    return found


def _mirrored(words: npt.NDArray[np.uint64]) -> BoolArray:
    """The highest bit of each image's third word."""
    flip: BoolArray = (words[:, 2] >> np.uint64(63)).astype(bool)
    return flip


def _order(keys: npt.NDArray[np.uint64]) -> IntArray:
    """Argsort, equal keys by index. NumPy's default sort is several times faster than its stable one, so the stable one is
    used only where keys are equal: one epoch of 50,000 images in 10^10."""
    order = np.argsort(keys)
    ranked = keys[order]
    if np.any(ranked[1:] == ranked[:-1]):
        order = np.argsort(keys, kind="stable")
    return order


def _below(words: npt.NDArray[np.uint64], n: int | IntArray) -> IntArray:
    """0..n-1 from the upper 32 bits (multiply and shift), `n` one for all or an array: no value is likelier than another by more
    than n / 2^32."""
    drawn: IntArray = (((words >> np.uint64(32)) * np.asarray(n, np.uint64)) >> np.uint64(32)).astype(np.int64)
    return drawn


class Stream:
    """The batches of all epochs for one rank; any (epoch, step) at any time.

    `batch_size` is the global batch; rank r takes positions r::world_size of it. tail="drop": an epoch is its own
    permutation, and images that do not fill a last batch are left out. tail="endless": the permutations of all epochs are
    joined and cut into full batches, so every image is used equally often and a batch may span two permutations.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        augment: Augment,
        seed: int,
        *,
        size: int | tuple[int, int] = 32,
        tail: Tail = "drop",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_shard(batch_size, rank, world_size)
        if batch_size > num_images:
            raise ValueError(f"batch size {batch_size} is larger than the data set of {num_images} images")
        if tail not in ("drop", "endless"):
            raise ValueError(f"tail is {tail!r}, expected 'drop' or 'endless'")
        self.num_images = num_images
        self.batch_size = batch_size
        self.steps_per_epoch = num_images // batch_size
        self._augment = augment
        self._seed = seed
        self._size = image_size(size)
        self._tail = tail
        self._rank = rank
        self._world_size = world_size
        self._drawn: dict[int, Plan] = {}  # this rank's part is cut from it batch by batch

    def batch(self, epoch: int, step: int) -> Plan:
        """This rank's part of global batch `step` of `epoch`: (batch_size / world_size,) arrays."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps")
        if self._tail == "drop":
            position = epoch * self.num_images + step * self.batch_size
        else:
            position = (epoch * self.steps_per_epoch + step) * self.batch_size
        end = position + self.batch_size
        position += self._rank
        parts = []
        while position < end:
            drawn, offset = divmod(position, self.num_images)
            stop = min(end - drawn * self.num_images, self.num_images)
            part = self._epoch(drawn).take(slice(offset, stop, self._world_size))
            parts.append(part)
            position += len(part) * self._world_size
        return Plan.concatenate(parts)

    def next_step(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _epoch(self, epoch: int) -> Plan:
        plan = self._drawn.get(epoch)
        if plan is None:
            # A batch spans at most two epochs, and prefetching reaches at most one epoch ahead. What goes, goes first.
            self._drawn = {e: p for e, p in self._drawn.items() if abs(e - epoch) <= 1}
            plan = draw_plan(self._seed, epoch, self.num_images, self._augment, self._size)
            self._drawn[epoch] = plan
        return plan


def check_shard(batch_size: int, rank: int, world_size: int) -> None:
    """ValueError unless the global batch divides evenly over the ranks."""
    if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch size {batch_size}, rank {rank} of {world_size} is no shard: expected rank < world size"
        )
    if batch_size % world_size:
        raise ValueError(f"batch size {batch_size} is not divisible by world size {world_size}")

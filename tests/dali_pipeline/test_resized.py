"""Random resized crops: the plan against draws in Python integers, the pixels against a loop over single pixels, Pillow and
interpolation in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.loader import TrainLoader
from dali_pipeline.plan import NO_AUGMENT, Augment, Plan, Stream, draw_plan
from dali_pipeline.resized import ResizedCrop
from train.config import ConfigError, load_config

CPU = torch.device("cpu")
FILL = (125, 122, 113)
Pixels = npt.NDArray[np.uint8]


def resizing(**options: Any) -> Augment:
    return Augment(**{"crop": False, "scale": 0.2, **options})


def scalar_rectangle(
    seed: int, epoch: int, image: int, augment: Augment, height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of one image, from numpy's generator advanced to its counter."""
    generator = np.random.Philox(key=seed % 2**64 + (epoch << 64))
    generator.advance(2**64 + image)
    words = [int(word) >> 32 for word in generator.random_raw(4)]
    least = math.ceil(augment.scale * height * width)
    area = least + (words[0] * (height * width - least + 1) >> 32)
    step = words[1] * 1025 >> 32
    shape = round(augment.aspect ** ((step - 512) / 512) * 2**16) / 2**16
    rows = min(max(round(math.sqrt(area / shape)), 1), height)
    columns = min(max(round(math.sqrt(area * shape)), 1), width)
    return words[2] * (height - rows + 1) >> 32, words[3] * (width - columns + 1) >> 32, rows, columns


@pytest.mark.parametrize("seed", [0, 2**63, -5])
@pytest.mark.parametrize(
    ("size", "options"), [((32, 32), {}), ((64, 40), {"scale": 0.35, "aspect": 2.0}), ((5, 3), {"aspect": 1.0})]
)
def test_rectangles_equal_independent_scalar_draws(seed: int, size: tuple[int, int], options: dict[str, float]) -> None:
    augment = resizing(**options)
    plan = draw_plan(seed, 3, 60, augment, size)
    assert plan.rectangle is not None and plan.rectangle.shape == (60, 4)
    for image, rectangle in zip(plan.indices.tolist(), plan.rectangle.tolist(), strict=True):
        assert tuple(rectangle) == scalar_rectangle(seed, 3, image, augment, *size)


def test_resizing_leaves_every_other_draw_as_it_is() -> None:
    with_it, without = (draw_plan(4, 2, 300, Augment(crop=False, scale=scale)) for scale in (0.1, 1.0))
    assert without.rectangle is None
    for name in ("indices", "dy", "dx", "flip", "cy", "cx"):
        np.testing.assert_array_equal(getattr(with_it, name), getattr(without, name))


def test_rectangles_lie_inside_and_are_spread_as_promised() -> None:
    plan = draw_plan(0, 0, 40_000, resizing(scale=0.1, aspect=1.5), (96, 64))
    assert plan.rectangle is not None
    top, left, rows, columns = plan.rectangle.astype(np.int64).T
    assert (top >= 0).all() and (left >= 0).all() and (top + rows <= 96).all() and (left + columns <= 64).all()
    whole = (rows < 96) & (columns < 64)  # where no side was cut
    ratio = np.log(columns / rows)[whole & (rows * columns < 1500)]
    assert abs(ratio).max() < math.log(1.5) * 1.1
    counts = np.histogram(ratio, 4, (-math.log(1.5), math.log(1.5)))[0]
    assert counts.min() > 0.9 * counts.mean()
    small = rows * columns < 0.5 * 96 * 64  # too small to be cut in any shape drawn
    share = (rows * columns)[small] / (96 * 64)
    assert share.min() > 0.09
    expected = 40_000 * 0.1 / 0.9  # of each tenth of the area
    for low in (0.1, 0.2, 0.3):
        assert abs(((share >= low) & (share < low + 0.1)).sum() - expected) < 6 * math.sqrt(expected) + 0.02 * expected
    place = (top / np.maximum(96 - rows, 1))[rows < 70]
    assert np.histogram(place, 5, (0, 1))[0].min() > 0.15 * len(place)


def test_batches_of_a_stream_carry_the_rectangles_of_their_images() -> None:
    for tail in ("drop", "endless"):
        stream = Stream(50, 20, resizing(), 1, tail=tail, rank=1, world_size=2)  # type: ignore[arg-type]
        for epoch in range(2):
            for step in range(2):
                plan = stream.batch(epoch, step)
                assert plan.rectangle is not None and len(plan.rectangle) == len(plan) == 10
    joined = Plan.concatenate([draw_plan(0, 0, 5, resizing()), draw_plan(0, 1, 5, resizing())])
    assert joined.rectangle is not None and len(joined.rectangle) == 10


def weighted(line: int, start: int, length: int, size: int) -> list[tuple[int, int]]:
    """(line of the image, weight in 256ths) for line `line` of `size` that are made from `length` lines from `start` on."""
    place = math.floor((Fraction((2 * line + 1) * length, 2 * size) - Fraction(1, 2)) * 256 + Fraction(1, 2))
    place = min(max(place, 0), (length - 1) * 256)
    first, rest = divmod(place, 256)
    return [(start + first, 256 - rest), (start + min(first + 1, length - 1), rest)]


def by_hand(image: Pixels, rectangle: list[int], flip: bool, cy: int, cx: int, cutout: int) -> Pixels:
    """One pixel at a time."""
    height, width, _ = image.shape
    top, left, rows, columns = rectangle
    out = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            total = sum(
                v * h * image[row, column].astype(int)
                for row, v in weighted(y, top, rows, height)
                for column, h in weighted(x, left, columns, width)
            )
            out[y, x] = (total + 2**15) // 2**16
    out = out[:, ::-1].copy() if flip else out
    for y in range(max(cy - cutout // 2, 0), min(cy - cutout // 2 + cutout, height)):
        for x in range(max(cx - cutout // 2, 0), min(cx - cutout // 2 + cutout, width)):
            out[y, x] = FILL
    return out


def make_split(count: int, height: int, width: int, planar: bool = False) -> Split:
    pixels = np.random.default_rng(7).integers(0, 256, (count, height, width, 3), np.uint8)
    stored = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if planar else pixels
    return Split(stored, np.arange(count), planar=planar)


WAYS = [(backend, resident) for backend in ("dali", "torch") for resident in ("always", "never")]


@pytest.mark.parametrize(("backend", "resident"), WAYS)
@pytest.mark.parametrize(
    ("size", "options"),
    [((9, 13), {"cutout": 4}), ((8, 8), {"cutout": 0, "aspect": 3.0}), ((12, 6), {"flip": False, "cutout": 3})],
)
def test_every_way_gives_the_pixels_of_a_loop(
    backend: str, resident: Any, size: tuple[int, int], options: dict[str, Any]
) -> None:
    split, augment = make_split(30, *size, planar=True), resizing(**options)
    order = FeedOrder(batch_size=12, augment=augment, fill=FILL, device=CPU, resident=resident)
    loader = TrainLoader(split, order, seed=5, backend=backend)
    plan = draw_plan(5, 1, 30, augment, size)
    assert plan.rectangle is not None
    for step in (1, 0):
        images, labels = next(loader.epoch(1, step))
        assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
        part = plan.take(slice(12 * step, 12 * step + 12))
        assert labels.tolist() == part.indices.tolist() and part.rectangle is not None
        for i in range(12):
            expected = by_hand(
                split.images[part.indices[i]],
                part.rectangle[i].tolist(),
                bool(part.flip[i]),
                int(part.cy[i]),
                int(part.cx[i]),
                augment.cutout,
            )
            np.testing.assert_array_equal(images[i].permute(1, 2, 0).numpy(), expected)
    loader.close()


def resized(images: Pixels, rectangles: npt.NDArray[np.int16]) -> Pixels:
    """Through ResizedCrop alone, neither mirrored nor cut out."""
    count, height, width, _ = images.shape
    zeros = np.zeros(count, np.int64)
    plan = Plan(np.arange(count), zeros, zeros, zeros.astype(bool), zeros, zeros, rectangles)
    order = FeedOrder(batch_size=count, augment=resizing(flip=False, cutout=0), fill=FILL, device=CPU)
    return (
        ResizedCrop(order, height, width)(torch.from_numpy(images).permute(0, 3, 1, 2), plan)
        .permute(0, 2, 3, 1)
        .numpy()
    )


def test_pixels_are_those_of_pillow_and_of_exact_interpolation_up_to_rounding() -> None:
    """On noise, where neighbours differ most: within two levels of either."""
    split, augment = make_split(16, 48, 64), resizing(scale=0.05)
    rectangles = draw_plan(0, 0, 16, augment, (48, 64)).rectangle
    assert rectangles is not None
    ours = resized(split.images, rectangles)
    for image, (top, left, rows, columns), found in zip(split.images, rectangles.tolist(), ours, strict=True):
        part = np.ascontiguousarray(image[top : top + rows, left : left + columns])
        pillow = np.asarray(Image.fromarray(part).resize((64, 48), Image.Resampling.BILINEAR))
        assert np.abs(found.astype(int) - pillow).max() <= 2
        exact = F.interpolate(
            torch.from_numpy(part).permute(2, 0, 1)[None].double(), (48, 64), mode="bilinear", align_corners=False
        )[0]
        assert np.abs(found - exact.permute(1, 2, 0).numpy()).max() <= 0.5 + 2 * 255 / 512
        assert np.abs(found - exact.permute(1, 2, 0).numpy()).mean() < 0.35


@pytest.mark.gpu
@pytest.mark.parametrize("resident", ["always", "never"])
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_gpu_gives_the_bits_of_the_cpu(backend: str, resident: Any) -> None:
    split, batches = make_split(600, 64, 64), {}
    for device in ("cpu", "cuda"):
        augment, where = resizing(scale=0.08), torch.device(device)
        order = FeedOrder(batch_size=128, augment=augment, fill=FILL, device=where, resident=resident)
        loader = TrainLoader(split, order, seed=0, backend=backend)
        batches[device] = [images.cpu() for images, _ in loader.epoch(0)]
        loader.close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches["cpu"], batches["cuda"], strict=True))


def test_the_whole_image_as_its_own_rectangle_stays_as_it_is() -> None:
    images = make_split(4, 24, 16).images
    np.testing.assert_array_equal(resized(images, np.array([[0, 0, 24, 16]] * 4, np.int16)), images)


def test_padded_crops_and_resized_ones_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"augment\.scale: 0\.3 takes crops and resizes them.*set augment\.crop=false"):
        Augment(scale=0.3)
    with pytest.raises(ConfigError, match=r"set augment\.crop=false"):
        load_config("quickstart", ["augment.scale=0.3", "augment.crop=true"])
    assert load_config("quickstart", ["augment.scale=0.3", "augment.crop=false"]).augment.resized
    assert not NO_AUGMENT.resized


@pytest.mark.parametrize(
    ("values", "words"), [({"scale": 0.0}, "augment.scale is 0.0"), ({"aspect": 0.5}, "aspect is 0.5")]
)
def test_values_out_of_range_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resizing(**values)

"""The rectangles, pasted in NumPy from strips stacked by hand, against windows cut out of np.pad."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipeline.layout import StripLayout, resident_windows
from dali_pipeline.plan import Augment, Plan, draw_plan

FILL = 255  # the images hold 1..254: neither the fill nor the black border
Pixels = npt.NDArray[np.uint8]


def padded(images: Pixels, border: int, augment: Augment) -> Pixels:
    around = ((0, 0), (border, border), (border, border))
    return np.pad(images, around, mode="constant" if augment.padding_mode == "zero" else "reflect")


def stacked(images: Pixels, layout: StripLayout, augment: Augment) -> Pixels:
    """One channel of the resident strips: the images, their mirror images, the patch, black up to the end."""
    slots = padded(images, layout.border, augment)
    if augment.flip:
        slots = np.concatenate([slots, slots[:, :, ::-1]])
    if layout.patch is not None:
        assert layout.patch == len(slots)
        slots = np.concatenate([slots, np.full_like(slots[:1], FILL)])
    assert len(slots) == layout.used <= layout.slots
    empty = np.zeros((layout.slots - len(slots), *slots.shape[1:]), np.uint8)
    return np.concatenate([slots, empty]).reshape(layout.resident_shape[:3])


def pasted(resident: Pixels, layout: StripLayout, plan: Plan) -> Pixels:
    """A batch's strips, as multi_paste and where needed erase make them of the rectangles."""
    ids, corner, size, target, *erase = layout.rectangles(plan)
    out = np.zeros(layout.batch_shape[:3], np.uint8)
    for strip in range(layout.strips):
        for k, source in enumerate(ids[strip]):
            (y, x), (height, width), (row, column) = (pair[strip, k].astype(int) for pair in (corner, size, target))
            assert height >= 1 and width >= 1 and y >= 0 and x >= 0 and row >= 0 and column >= 0
            piece = resident[int(source), y : y + height, x : x + width]
            assert piece.shape == (height, width) == out[strip, row : row + height, column : column + width].shape
            out[strip, row : row + height, column : column + width] = piece
        if erase:
            holes = (array[strip].reshape(-1, 2).astype(int) for array in erase)
            for (row, column), (height, width) in zip(*holes, strict=True):
                out[strip, row : row + height, column : column + width] = FILL
    return out


def expected(images: Pixels, plan: Plan, augment: Augment) -> Pixels:
    """The batch, an image at a time."""
    height, width = images.shape[1:]
    result = []
    for i, dy, dx, flip, cy, cx in zip(plan.indices, plan.dy, plan.dx, plan.flip, plan.cy, plan.cx, strict=True):
        image = images[i]
        if augment.crop:
            image = padded(images, augment.pad, augment)[i, dy : dy + height, dx : dx + width]
        image = (image[:, ::-1] if flip else image).copy()
        top, left = cy - augment.cutout // 2, cx - augment.cutout // 2
        image[max(top, 0) : max(top + augment.cutout, 0), max(left, 0) : max(left + augment.cutout, 0)] = FILL
        result.append(image)
    return np.stack(result)


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch_size=st.sampled_from((1, 3, 8, 17, 20, 32)),
    augment=st.builds(
        Augment,
        crop=st.booleans(),
        pad=st.integers(0, 10),
        padding_mode=st.sampled_from(("zero", "reflect")),
        flip=st.booleans(),
        cutout=st.integers(0, 12),
    ),
    borders=st.booleans(),
    patched=st.booleans(),
    most_strips=st.sampled_from((1, 4, 16, 64)),
)
def test_pasted_rectangles_equal_windows_of_the_padded_images(
    height: int, width: int, batch_size: int, augment: Augment, borders: bool, patched: bool, most_strips: int
) -> None:
    if augment.padding_mode == "reflect" and augment.pad >= min(height, width):
        return  # refused by the loader
    images = np.random.default_rng(0).integers(1, FILL, (40, height, width), np.uint8)
    layout = StripLayout(
        40, height, width, batch_size, augment, padded=borders, patched=patched, most_strips=most_strips
    )
    plan = draw_plan(1, 0, 40, augment, (height, width)).take(slice(batch_size))
    got = pasted(stacked(images, layout, augment), layout, plan)
    np.testing.assert_array_equal(got.reshape(batch_size, height, width), expected(images, plan, augment))


@pytest.mark.parametrize(
    ("batch_size", "most", "strips"),
    [(512, 16, 16), (512, 64, 64), (500, 16, 10), (500, 64, 50), (17, 16, 1), (24, 16, 12), (1, 64, 1), (16, 16, 16)],
)
def test_a_batch_is_cut_into_equal_strips(batch_size: int, most: int, strips: int) -> None:
    layout = StripLayout(1000, 32, 24, batch_size, Augment(), padded=True, patched=True, most_strips=most)
    assert layout.strips == strips
    assert math.prod(layout.batch_shape) == batch_size * 32 * 24 * 3
    assert layout.slots - layout.strips < layout.used == 2001 <= layout.slots


@pytest.mark.parametrize(("strips", "cells"), [(16, 36_000), (64, 17_000)])
def test_more_strips_leave_dali_fewer_cells_to_cut(strips: int, cells: int) -> None:
    """The figures that dali_graph.py states."""
    layout = StripLayout(5000, 32, 32, 512, Augment(), padded=True, patched=True, most_strips=strips)
    _, _, size, start = layout.rectangles(draw_plan(0, 0, 5000, Augment()).take(slice(512)))
    edges = np.concatenate([start, start + size], axis=1)  # (strips, 2k, 2)
    found = sum(math.prod(len({0, *along}) - 1 for along in strip.T.tolist()) for strip in edges)
    assert found == pytest.approx(cells, rel=0.03)


@pytest.mark.parametrize(
    ("augment", "given", "border"),
    [
        ({}, False, 0),
        ({}, True, 4),
        ({"padding_mode": "reflect"}, False, 4),
        ({"pad": 8}, False, 8),  # as wide as the image: a window may show nothing of it
        ({"crop": False}, True, 0),
    ],
)
def test_a_border_lies_there_where_it_is_asked_for_or_needed(augment: Any, given: bool, border: int) -> None:
    layout = StripLayout(10, 8, 20, 5, Augment(**augment), padded=given, patched=True, most_strips=16)
    assert layout.border == border and layout.pitch == 8 + 2 * border


def test_windows_of_mirrored_images_are_mirrored_windows() -> None:
    augment = Augment(pad=3)
    image = np.random.default_rng(0).integers(1, 255, (1, 6, 10), np.uint8)
    plan = draw_plan(0, 0, 200, augment, (6, 10))
    slot, start = resident_windows(plan, 200, augment)
    np.testing.assert_array_equal(slot, np.where(plan.flip, 200 + plan.indices, plan.indices))
    cases = zip(plan.dy, plan.dx, plan.flip, start + augment.pad, strict=True)
    plain, mirrored = (padded(strip, 3, augment)[0] for strip in (image, image[:, :, ::-1]))
    for dy, dx, flip, (row, column) in cases:
        wanted = plain[dy : dy + 6, dx : dx + 10]
        found = (mirrored if flip else plain)[row : row + 6, column : column + 10]
        np.testing.assert_array_equal(found, wanted[:, ::-1] if flip else wanted)

"""The plan against scalar draws in Python integers, and against the uniform distributions that it claims."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipeline.plan import Augment, Plan, Stream, Tail, draw_plan

FIELDS = [
    field.name for field in dataclasses.fields(Plan) if field.name != "rectangle"
]  # tests/dali_pipeline/test_resized.py
SEEDS = (0, 1, 2**63, -5)


def assert_uniform(counts: npt.NDArray[np.int64]) -> None:
    """Pearson's statistic within five standard deviations of its mean, at equal expectations."""
    expected = counts.sum() / counts.size
    assert expected >= 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom), (statistic, freedom)


def assert_same(a: Plan, b: Plan) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def joined(plans: list[Plan]) -> dict[str, npt.NDArray[np.int64]]:
    return {name: np.concatenate([getattr(plan, name) for plan in plans]) for name in FIELDS}


def scalar_draw(seed: int, epoch: int, image: int, pad: int, height: int, width: int) -> tuple[int, ...]:
    """(key, dy, dx, flip, cy, cx) of one image, in Python integers, from numpy's generator advanced to its counter."""
    generator = np.random.Philox(key=seed % 2**64 + (epoch << 64))
    generator.advance(image)
    key, offset, flip, centre = (int(word) for word in generator.random_raw(4))
    dy, dx = divmod((offset >> 32) * (2 * pad + 1) ** 2 >> 32, 2 * pad + 1)
    cy, cx = divmod((centre >> 32) * height * width >> 32, width)
    return key, dy, dx, flip >> 63, cy, cx


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("pad", "size"), [(4, (32, 32)), (1, (7, 12)), (0, (1, 1)), (9, (64, 48))])
def test_plan_equals_independent_scalar_draws(seed: int, pad: int, size: tuple[int, int]) -> None:
    num_images, epoch = 50, 3
    plan = draw_plan(seed, epoch, num_images, Augment(pad=pad), size)
    drawn = [scalar_draw(seed, epoch, image, pad, *size) for image in range(num_images)]
    order = sorted(range(num_images), key=lambda image: (drawn[image][0], image))
    assert plan.indices.tolist() == order
    for column, name in enumerate(FIELDS[1:], start=1):
        assert getattr(plan, name).tolist() == [drawn[image][column] for image in order], name


@pytest.mark.parametrize("seed", SEEDS)
def test_alternating_flips_turn_the_bit_of_epoch_0_in_every_odd_epoch(seed: int) -> None:
    num_images = 60
    first = np.array([scalar_draw(seed, 0, image, 4, 32, 32)[3] for image in range(num_images)], bool)
    assert 0 < first.sum() < num_images
    for epoch in range(6):
        random = draw_plan(seed, epoch, num_images, Augment())
        alternating = draw_plan(seed, epoch, num_images, Augment(flip_rule="alternating"))
        by_image = np.empty(num_images, bool)
        by_image[alternating.indices] = alternating.flip
        np.testing.assert_array_equal(by_image, ~first if epoch in (1, 3, 5) else first)
        for name in FIELDS:
            if name != "flip":
                np.testing.assert_array_equal(getattr(alternating, name), getattr(random, name), err_msg=name)
    off = draw_plan(seed, 1, num_images, Augment(flip=False, flip_rule="alternating"))
    assert not off.flip.any()


@pytest.mark.parametrize("tail", ["drop", "endless"])
def test_two_epochs_of_alternating_batches_show_each_image_both_ways(tail: Tail) -> None:
    stream = Stream(48, 16, Augment(flip_rule="alternating"), 3, tail=tail)
    plans = joined([stream.batch(epoch, step) for epoch in (4, 5) for step in range(3)])
    seen = {(int(i), bool(f)) for i, f in zip(plans["indices"], plans["flip"], strict=True)}
    assert seen == {(i, f) for i in range(48) for f in (False, True)}


@pytest.mark.parametrize("num_images", [1, 2, 1000, 50_000])
def test_indices_are_a_permutation(num_images: int) -> None:
    indices = draw_plan(0, 0, num_images, Augment()).indices
    np.testing.assert_array_equal(np.sort(indices), np.arange(num_images))


def test_equal_keys_are_ordered_by_index() -> None:
    from dali_pipeline.plan import _order

    keys = np.arange(1000, dtype=np.uint64) % np.uint64(3)
    np.testing.assert_array_equal(_order(keys), sorted(range(1000), key=lambda i: (i % 3, i)))


def test_every_image_takes_every_place_equally_often() -> None:
    counts = np.zeros((8, 8), np.int64)
    for epoch in range(4000):
        counts[np.arange(8), draw_plan(7, epoch, 8, Augment()).indices] += 1
    assert_uniform(counts)


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_uniform_and_independent(seed: int) -> None:
    augment, num_images = Augment(), 50_000
    plans = joined([draw_plan(seed, epoch, num_images, augment) for epoch in range(2)])
    offsets = plans["dy"] * 9 + plans["dx"]
    centres = plans["cy"] * 32 + plans["cx"]
    flips = plans["flip"].astype(np.int64)
    place = np.arange(2 * num_images) % num_images * 16 // num_images
    assert_uniform(np.bincount(offsets, minlength=81))
    assert_uniform(np.bincount(centres, minlength=1024))
    assert_uniform(np.bincount(flips, minlength=2))
    assert_uniform(np.bincount(offsets * 2 + flips, minlength=162))
    assert_uniform(np.bincount(offsets * 16 + centres // 64, minlength=81 * 16))
    assert_uniform(np.bincount(centres * 2 + flips, minlength=2048))
    assert_uniform(np.bincount(place * 81 + offsets, minlength=16 * 81))
    assert_uniform(np.bincount(place * 2 + flips, minlength=32))


def test_draws_of_one_image_over_epochs_are_uniform() -> None:
    plans = [draw_plan(0, epoch, 3, Augment()) for epoch in range(4000)]
    at = [int(np.flatnonzero(plan.indices == 1)[0]) for plan in plans]
    assert_uniform(np.bincount([plan.dy[i] * 9 + plan.dx[i] for plan, i in zip(plans, at, strict=True)], minlength=81))
    assert_uniform(np.bincount([int(plan.flip[i]) for plan, i in zip(plans, at, strict=True)], minlength=2))


@pytest.mark.parametrize("size", [(8, 8), (20, 12), (1, 5)])
def test_centres_cover_images_of_any_size(size: tuple[int, int]) -> None:
    plan = draw_plan(0, 0, 40_000, Augment(), size)
    assert_uniform(np.bincount(plan.cy * size[1] + plan.cx, minlength=size[0] * size[1]))


def test_seeds_and_epochs_differ_and_repeat() -> None:
    augment = Augment()
    base = draw_plan(0, 0, 1000, augment)
    assert_same(base, draw_plan(0, 0, 1000, augment))
    for other in (draw_plan(1, 0, 1000, augment), draw_plan(0, 1, 1000, augment)):
        for name in FIELDS:
            assert (getattr(base, name) != getattr(other, name)).any(), name
    assert (draw_plan(1, 0, 1000, augment).indices != draw_plan(0, 1, 1000, augment).indices).any()


def test_draws_of_an_image_do_not_depend_on_the_number_of_images() -> None:
    small, large = (draw_plan(3, 2, n, Augment()) for n in (100, 5000))
    for image in (0, 42, 99):
        a, b = (np.flatnonzero(plan.indices == image)[0] for plan in (small, large))
        for name in FIELDS:
            assert getattr(small, name)[a] == getattr(large, name)[b], name


def test_switching_one_augmentation_off_leaves_the_others() -> None:
    base = draw_plan(0, 0, 500, Augment())
    without_crop = draw_plan(0, 0, 500, Augment(crop=False))
    assert (without_crop.dy == 4).all() and (without_crop.dx == 4).all()
    without_flip = draw_plan(0, 0, 500, Augment(flip=False))
    assert not without_flip.flip.any()
    for name in ("indices", "flip", "cy", "cx"):
        np.testing.assert_array_equal(getattr(base, name), getattr(without_crop, name))
    for name in ("indices", "dy", "dx", "cy", "cx"):
        np.testing.assert_array_equal(getattr(base, name), getattr(without_flip, name))
    for change in (Augment(cutout=0), Augment(cutout=5), Augment(padding_mode="reflect")):
        assert_same(base, draw_plan(0, 0, 500, change))


def all_batches(
    epochs: int, batch_size: int, tail: Tail, *, num_images: int = 100, rank: int = 0, world_size: int = 1
) -> list[Plan]:
    stream = Stream(num_images, batch_size, Augment(), 5, tail=tail, rank=rank, world_size=world_size)
    return [stream.batch(epoch, step) for epoch in range(epochs) for step in range(stream.steps_per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 60, 100])
def test_drop_takes_the_start_of_each_epochs_plan(batch_size: int) -> None:
    used = 100 // batch_size * batch_size
    wanted = joined([draw_plan(5, epoch, 100, Augment()).take(slice(used)) for epoch in range(3)])
    batches = all_batches(3, batch_size, "drop")
    assert len(batches) == 3 * (100 // batch_size) and all(len(batch) == batch_size for batch in batches)
    for name, values in joined(batches).items():
        np.testing.assert_array_equal(values, wanted[name])


@pytest.mark.parametrize("batch_size", [1, 7, 32, 60, 100])
def test_endless_runs_through_all_epochs_without_a_gap(batch_size: int) -> None:
    batches = all_batches(7, batch_size, "endless")
    assert all(len(batch) == batch_size for batch in batches)
    wanted = joined([draw_plan(5, epoch, 100, Augment()) for epoch in range(7)])
    for name, values in joined(batches).items():
        np.testing.assert_array_equal(values, wanted[name][: len(values)])


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 60),
    local=st.integers(1, 20),
    world_size=st.integers(1, 5),
    tail=st.sampled_from(("drop", "endless")),
)
def test_ranks_interleave_to_the_global_batch(num_images: int, local: int, world_size: int, tail: Tail) -> None:
    batch_size = local * world_size
    if batch_size > num_images:
        with pytest.raises(ValueError, match="larger than the data set"):
            Stream(num_images, batch_size, Augment(), 5, tail=tail)
        return
    whole = all_batches(3, batch_size, tail, num_images=num_images)
    ranks = [
        all_batches(3, batch_size, tail, num_images=num_images, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            assert_same(batch.take(slice(rank, None, world_size)), ranks[rank][step])


@pytest.mark.parametrize("tail", ["drop", "endless"])
def test_batches_do_not_depend_on_the_order_of_asking(tail: Tail) -> None:
    wanted = all_batches(4, 30, tail)
    stream = Stream(100, 30, Augment(), 5, tail=tail)
    for step in np.random.default_rng(0).permutation(len(wanted)):
        assert_same(stream.batch(*divmod(int(step), 3)), wanted[step])


def test_next_step_runs_over_the_end_of_an_epoch() -> None:
    stream = Stream(100, 30, Augment(), 5)
    assert [stream.next_step(0, 0), stream.next_step(0, 1), stream.next_step(0, 2)] == [(0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pad": -1}, "augment.pad is -1"),
        ({"cutout": -8}, "augment.cutout is -8"),
        ({"padding_mode": "edge"}, "'edge', expected 'zero' or 'reflect'"),
    ],
)
def test_augment_refuses_values_out_of_range(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augment(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": 32, "world_size": 3}, "32 is not divisible by world size 3"),
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 32, "rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_size": 101}, "101 is larger than the data set of 100"),
        ({"batch_size": 10, "tail": "keep"}, "'keep', expected 'drop' or 'endless'"),
        ({"batch_size": 10, "size": (0, 4)}, "0 x 4"),
    ],
)
def test_stream_refuses_what_it_cannot_split(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Stream(100, augment=Augment(), seed=0, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [(0, 3), (-1, 0), (0, -1)])
def test_stream_refuses_steps_outside_the_epoch(key: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="an epoch has 3 steps"):
        Stream(100, 30, Augment(), 5).batch(*key)


def test_import_takes_neither_torch_nor_dali() -> None:
    code = "import sys, dali_pipeline.plan; print(sorted({'torch', 'nvidia.dali'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

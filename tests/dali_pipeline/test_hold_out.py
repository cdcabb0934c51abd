"""The validation split, against a few lines of NumPy and hashlib."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipeline import sources
from dali_pipeline.dataset import DataError, Dataset, Split, with_statistics
from dali_pipeline.hold_out import held_out, hold_out
from dali_pipeline.sources.digits import Digits
from train.config import Config, ConfigError, changed


def images_of(count: int, classes: int, seed: int = 0, copies: int = 0) -> Split:
    """Random images, the last `copies` of them equal to the first, with labels of their own."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
    if copies:
        pixels[-copies:] = pixels[:copies]
    return Split(pixels, generator.integers(0, classes, count))


def dataset_of(train: Split, classes: int) -> Dataset:
    names = tuple(f"class {label}" for label in range(classes))
    return with_statistics("made up", train, images_of(20, classes, seed=9), names, "random")


def expected_by_fraction(split: Split, fraction: float) -> npt.NDArray[np.bool_]:
    return np.array(
        [
            int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big") / 2**64 < fraction
            for image in split.images
        ]
    )


@given(st.integers(20, 200), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_fraction_holds_out_the_images_whose_hash_lies_below_it(count: int, fraction: float, seed: int) -> None:
    split = images_of(count, 3, seed)
    assert np.array_equal(held_out(split, fraction, 3), expected_by_fraction(split, fraction))


def test_a_count_takes_the_smallest_hashes_of_each_class() -> None:
    split = images_of(300, 4)
    mask = held_out(split, 41, 4)
    for label, wanted in enumerate((11, 10, 10, 10)):  # 41 = 4 * 10 + 1
        of_class = np.flatnonzero(split.labels == label)
        order = sorted(of_class, key=lambda i: hashlib.sha256(split.images[i].tobytes()).digest())
        assert set(np.flatnonzero(mask & (split.labels == label))) == set(order[:wanted])


@pytest.mark.parametrize("amount", [0.3, 60])
def test_no_image_lies_in_two_splits_even_where_the_data_hold_it_twice(amount: float) -> None:
    split = images_of(200, 5, copies=60)
    found = hold_out(dataset_of(split, 5), amount)
    assert found.validation is not None
    assert len(found.train) + len(found.validation) == 200

    def contents(part: Split) -> set[bytes]:
        return {image.tobytes() for image in part.images}

    assert not contents(found.train) & contents(found.validation)


def test_an_image_keeps_its_side_when_others_are_added() -> None:
    few = images_of(100, 2)
    more = Split(
        np.concatenate([images_of(50, 2, seed=3).pixels, few.pixels]),
        np.concatenate([np.zeros(50, np.int64), few.labels]),
    )
    assert np.array_equal(held_out(more, 0.25, 2)[50:], held_out(few, 0.25, 2))


def test_the_order_of_the_axes_in_memory_does_not_matter() -> None:
    split = images_of(60, 3)
    planar = Split(np.ascontiguousarray(split.pixels.transpose(0, 3, 1, 2)), split.labels, planar=True)
    for amount in (0.4, 20):
        assert np.array_equal(held_out(planar, amount, 3), held_out(split, amount, 3))


def test_mean_and_deviation_are_those_of_what_is_left() -> None:
    split = images_of(120, 3)
    found = hold_out(dataset_of(split, 3), 0.5)
    left = split.images[~expected_by_fraction(split, 0.5)].reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(found.mean, left.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, left.std(0), rtol=1e-12)
    assert found.test.fingerprint == dataset_of(split, 3).test.fingerprint


def test_a_class_without_a_validation_image_is_named() -> None:
    split = images_of(100, 2)
    mask = expected_by_fraction(split, 0.2)
    labels = np.where(mask, 0, split.labels)  # every image that is held out is of class 0
    labels[np.flatnonzero(~mask)[:5]] = 1
    found = hold_out(dataset_of(Split(split.pixels, labels), 2), 0.2)
    assert found.notes == ("data.validation: 0.2 holds out no image of class 1",)


def test_a_class_that_keeps_no_training_image_is_refused_by_name() -> None:
    split = images_of(100, 2)
    labels = np.zeros(100, np.int64)
    labels[np.flatnonzero(expected_by_fraction(split, 0.2))[:3]] = 1
    with pytest.raises(DataError, match=r"leaves no training image of class 1"):
        hold_out(dataset_of(Split(split.pixels, labels), 2), 0.2)


def test_the_key_reaches_every_source_and_a_split_of_its_own_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(Config(), {"data.name": "digits", "data.validation": 100})
    found = sources.load(config.data)
    assert found.validation is not None and len(found.validation) == 100 and len(found.train) == 1342
    assert np.bincount(found.validation.labels).tolist() == [10] * 10
    plain = sources.load(changed(config, {"data.validation": None}).data)
    monkeypatch.setattr(Digits, "load", lambda *a, **b: replace(plain, validation=plain.test))
    assert sources.load(changed(config, {"data.validation": None}).data).validation is plain.test
    with pytest.raises(DataError, match="has a validation split of its own"):
        sources.load(config.data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "above 0"),
        (-5, "above 0"),
        (1.5, "neither a fraction"),
        (1442, "leaves none"),
        ("half", "int | float | null"),
        (True, ""),
    ],
)
def test_impossible_amounts_are_refused_before_anything_is_read(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation") as caught:
        changed(Config(), {"data.name": "digits", "data.validation": value})
    assert words in str(caught.value)

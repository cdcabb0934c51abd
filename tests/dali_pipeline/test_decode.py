"""The decoded, padded and mirrored images of both backends against np.pad over single images."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipeline import dali_decode
from dali_pipeline.backend import choose_backend
from dali_pipeline.dali_decode import SAMPLE_BYTES, SAMPLE_IMAGES, decode_images
from dali_pipeline.dali_graph import MOST_STRIPS
from dali_pipeline.dataset import Split
from dali_pipeline.layout import StripLayout
from dali_pipeline.plan import Augment
from dali_pipeline.resident import resident_images

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU = torch.device("cpu")
WAYS: list[Callable[..., torch.Tensor]] = [decode_images, resident_images]


def make_split(num_images: int, height: int, width: int, *, planar: bool, head: int = 0) -> Split:
    """Random images; `head` bytes before each make the pixels a view with gaps, as the labels of CIFAR's records do."""
    shape = (3, height, width) if planar else (height, width, 3)
    records = np.random.default_rng(5).integers(0, 256, (num_images, head + math.prod(shape)), dtype=np.uint8)
    return Split(records[:, head:].reshape(num_images, *shape), np.zeros(num_images, np.int64), planar=planar)


def expected(split: Split, border: int, reflect: bool, mirrored: bool, slots: int) -> npt.NDArray[np.uint8]:
    """An image at a time."""
    plain = []
    for pixels in split.pixels:
        image = np.stack(list(pixels), axis=-1) if split.planar else pixels
        around = ((border, border), (border, border), (0, 0))
        plain.append(np.pad(image, around, mode="reflect" if reflect else "constant"))
    images = [*plain, *(image[:, ::-1] for image in plain if mirrored)]
    return np.stack([*images, *[np.zeros_like(images[0])] * (slots - len(images))])


@pytest.mark.parametrize("decode", WAYS)
@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize(("border", "reflect"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize(
    ("num_images", "height", "width", "head", "sample", "spare"),
    [
        (23, 32, 32, 1, 10, 3),  # a last chunk that is smaller, in one sample; black slots at the end
        (26, 32, 32, 1, 10, 0),  # one in two samples
        (40, 32, 32, 2, 10, 0),  # chunks that come out even
        (1, 32, 32, 0, 10, 0),
        (7, 9, 5, 1, 3, 2),
        (5, 17, 40, 0, 1, 1),
    ],
)
def test_decoded_images_equal_numpys(
    monkeypatch: pytest.MonkeyPatch,
    decode: Callable[..., torch.Tensor],
    planar: bool,
    mirrored: bool,
    border: int,
    reflect: bool,
    num_images: int,
    height: int,
    width: int,
    head: int,
    sample: int,
    spare: int,
) -> None:
    monkeypatch.setattr(dali_decode, "SAMPLE_IMAGES", sample)
    split = make_split(num_images, height, width, planar=planar, head=head)
    slots = num_images * (1 + mirrored) + spare
    images = decode(split, CPU, border=border, reflect=reflect, mirrored=mirrored, slots=slots)
    assert images.dtype == torch.uint8 and images.is_contiguous()
    np.testing.assert_array_equal(images.numpy(), expected(split, border, reflect, mirrored, slots))


@settings(max_examples=40, deadline=None)
@given(
    num_images=st.integers(1, 9),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    planar=st.booleans(),
    border=st.integers(0, 14),
    reflect=st.booleans(),
    mirrored=st.booleans(),
)
def test_dali_decodes_any_size_as_torch_does(
    num_images: int, height: int, width: int, planar: bool, border: int, reflect: bool, mirrored: bool
) -> None:
    if reflect:
        border = min(border, height - 1, width - 1)  # more is refused by the loader
    split = make_split(num_images, height, width, planar=planar, head=1)
    by_dali, by_torch = (decode(split, CPU, border=border, reflect=reflect, mirrored=mirrored) for decode in WAYS)
    assert torch.equal(by_dali, by_torch)


class Runs:
    """Counts the pipelines built, and the shapes that each was fed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipelines = 0
        self.chunks: list[tuple[int, ...]] = []
        build = dali_decode._build

        def counting(*arguments: Any, **options: Any) -> Any:
            pipe = build(*arguments, **options)
            self.pipelines += 1
            feed = pipe.feed_input

            def feeding(name: str, data: Any, **how: Any) -> None:
                self.chunks.append(data.shape)
                feed(name, data, **how)

            pipe.feed_input = feeding
            return pipe

        monkeypatch.setattr(dali_decode, "_build", counting)


def test_fifty_thousand_images_are_decoded_ten_thousand_a_sample_by_one_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(monkeypatch)
    decode_images(make_split(50_000, 2, 2, planar=True, head=1), CPU, mirrored=True)
    assert runs.chunks == [(2, 10_000, 3, 2, 2), (2, 10_000, 3, 2, 2), (2, 5_000, 3, 2, 2)] and runs.pipelines == 1


def test_samples_of_large_images_hold_fewer_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch)
    monkeypatch.setattr(dali_decode, "SAMPLE_BYTES", 4 * 12 * 12 * 3 + 1)  # as they are with their borders
    decode_images(make_split(21, 8, 8, planar=False), CPU, border=2)
    assert [shape[:2] for shape in runs.chunks] == [(2, 4), (2, 4), (1, 5)]
    monkeypatch.setattr(dali_decode, "SAMPLE_BYTES", 1)
    runs.chunks.clear()
    decode_images(make_split(3, 8, 8, planar=False), CPU)
    assert [shape[:2] for shape in runs.chunks] == [(2, 1), (1, 1)]


def test_a_sample_of_cifar_is_ten_thousand_images_and_never_more_than_cuda_can_start() -> None:
    assert SAMPLE_BYTES // (40 * 40 * 3) >= SAMPLE_IMAGES == 10_000 < 65_535


def test_the_pipeline_is_gone_after_the_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the garbage collector comes by: on a GPU it holds memory."""
    pipelines = []
    build = dali_decode._build

    def remembering(*arguments: Any, **options: Any) -> Any:
        pipe = build(*arguments, **options)
        pipelines.append(weakref.ref(pipe))
        return pipe

    monkeypatch.setattr(dali_decode, "_build", remembering)
    gc.disable()
    try:
        images = decode_images(make_split(30, 8, 8, planar=True), CPU, border=2, mirrored=True)
        assert [pipe() for pipe in pipelines] == [None]
    finally:
        gc.enable()
    assert images.any()


def test_the_memory_that_the_decode_states_is_that_of_cifar10() -> None:
    layout = StripLayout(50_000, 32, 32, 512, Augment(), padded=True, patched=True, most_strips=MOST_STRIPS["cuda"])
    assert layout.slots == 100_032 and round(math.prod(layout.resident_shape) / 1e6) == 480
    assert round(SAMPLE_IMAGES * (2 * 32 * 32 * 3 + 2 * 40 * 40 * 3) / 1e6) == 157
    assert decode_images.__doc__ and "480 MB" in decode_images.__doc__ and "157 MB" in decode_images.__doc__


@pytest.mark.parametrize(
    ("operator", "fault"),
    [
        ("transpose", None),  # of the images upside down
        ("slice", {"out_of_bounds_policy": "reflect_1001"}),  # it repeats the edge
        ("flip", {"horizontal": 0}),
    ],
)
def test_dali_that_decodes_to_wrong_pixels_is_not_used(
    monkeypatch: pytest.MonkeyPatch, operator: str, fault: dict[str, Any] | None
) -> None:
    import nvidia.dali.fn as fn

    right, flip = getattr(fn, operator), fn.flip

    def wrong(images: Any, **options: Any) -> Any:
        if fault is None:
            return right(flip(images, horizontal=0, vertical=1), **options)
        return right(images, **{**options, **fault})

    assert choose_backend("auto", CPU).name == "dali"
    monkeypatch.setattr(fn, operator, wrong)
    choice = choose_backend("auto", CPU)
    assert choice.name == "torch" and "images differ from the reference" in choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize(("border", "reflect"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("size", [(32, 32), (7, 45)])
def test_gpu_decodes_as_numpy_does(
    monkeypatch: pytest.MonkeyPatch,
    planar: bool,
    mirrored: bool,
    border: int,
    reflect: bool,
    size: tuple[int, int],
) -> None:
    monkeypatch.setattr(dali_decode, "SAMPLE_IMAGES", 1_000)
    split = make_split(2_345, *size, planar=planar, head=1)
    slots = 2_345 * (1 + mirrored) + 3
    images = decode_images(split, torch.device("cuda"), border=border, reflect=reflect, mirrored=mirrored, slots=slots)
    with torch.cuda.stream(torch.cuda.Stream()):  # complete for any stream
        got = images.cpu()
    np.testing.assert_array_equal(got.numpy(), expected(split, border, reflect, mirrored, slots))


@pytest.mark.gpu
def test_gpu_decodes_chunks_of_full_size() -> None:
    split = make_split(25_000, 32, 32, planar=True, head=1)
    images = decode_images(split, torch.device("cuda"), border=4, reflect=True, mirrored=True)
    assert torch.equal(images.cpu(), resident_images(split, CPU, border=4, reflect=True, mirrored=True))

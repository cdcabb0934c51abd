"""What the benchmarks let pass as correct images, of others and of our own, and the process that the others live in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from benchmarks.peers import (
    ANSWER_SECONDS,
    CHECK_FILL,
    CUTOUT,
    PeerError,
    PeerHost,
    Task,
    WrongImages,
    check,
    check_augmented,
    check_loader,
    check_plain,
    peers,
)
from benchmarks.stages import Kind, pipeline_kinds
from dali_pipeline.dataset import Split
from dali_pipeline.plan import Augment, draw_plan
from dali_pipeline.sources.synthetic import random_dataset

Floats = npt.NDArray[np.float32]


def augmented(count: int = 64, **changes: Any) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Images augmented one by one as the plan says: (pixels, labels, originals)."""
    images = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), np.uint8)
    plan = draw_plan(3, 0, count, Augment(**changes))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (index, dy, dx, flip, cy, cx) in enumerate(
        zip(plan.indices, plan.dy, plan.dx, plan.flip, plan.cy, plan.cx, strict=True)
    ):
        image = padded[index, dy : dy + 32, dx : dx + 32].copy()
        if flip:
            image = image[:, ::-1].copy()
        side = changes.get("cutout", CUTOUT)
        image[max(cy - side // 2, 0) : cy + side // 2, max(cx - side // 2, 0) : cx + side // 2] = CHECK_FILL
        out[i] = image
    return out.astype(np.float32), plan.indices, images


def test_right_augmentation_passes() -> None:
    check_augmented(*augmented(256), CHECK_FILL)  # enough for most of the 81 offsets of a crop to occur


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("channels", "no crop and flip"),
        ("upside down", "no crop and flip"),
        ("other image", "no crop and flip"),
        ("transposed", "no crop and flip"),
        ("twice", "different images"),
        ("normalised", "no crop and flip"),
    ],
)
def test_wrong_pixels_are_caught(fault: str, words: str) -> None:
    pixels, labels, images = augmented()
    if fault == "channels":
        pixels = pixels[..., ::-1]
    elif fault == "upside down":
        pixels = pixels[:, ::-1]
    elif fault == "other image":
        labels = np.roll(labels, 1)
    elif fault == "transposed":
        pixels = pixels.swapaxes(1, 2)
    elif fault == "twice":
        labels = np.concatenate([labels[:-1], labels[:1]])
    elif fault == "normalised":
        pixels = pixels / 255
    with pytest.raises(WrongImages, match=words):
        check_augmented(pixels, labels, images, CHECK_FILL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flip": False}, "0% of the images are mirrored"),
        ({"crop": False, "pad": 4}, "only 1 of 81 crop offsets"),
        ({"cutout": 0}, "no square of 8 x 8"),
        ({"cutout": 6}, "no square of 8 x 8"),
    ],
)
def test_missing_augmentations_are_caught(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongImages, match=words):
        check_augmented(*augmented(**changes), CHECK_FILL)


def test_another_fill_colour_and_another_padding_are_caught() -> None:
    pixels, labels, images = augmented()
    with pytest.raises(WrongImages, match="no square"):
        check_augmented(pixels, labels, images, (0, 0, 0))
    with pytest.raises(WrongImages, match="no crop and flip"):
        check_augmented(pixels, labels, images, CHECK_FILL, padding="reflect")


def test_plain_images_must_be_the_originals_with_their_labels() -> None:
    images = np.random.default_rng(1).integers(0, 256, (64, 32, 32, 3), np.uint8)
    order = np.random.default_rng(2).permutation(64)
    check_plain(images[order].astype(np.float32), order, images)
    with pytest.raises(WrongImages, match="differ from the original"):
        check_plain(images[order][..., ::-1].astype(np.float32), order, images)
    with pytest.raises(WrongImages, match="differ from the original"):
        check_plain(images[order].astype(np.float32), np.roll(order, 1), images)
    with pytest.raises(WrongImages, match="different images"):
        check_plain(images[order][:-1].astype(np.float32), order[:-1], images)


def test_own_pipelines_pass_the_check_of_the_peers() -> None:
    kinds, _ = pipeline_kinds([torch.device("cpu")])
    for name, kind in kinds.items():
        if "compiled" not in name:
            check_loader(lambda split, augment, kind=kind: own_epoch(split, augment, kind))


def own_epoch(split: Split, augment: Augment, kind: Kind) -> Iterator[tuple[Tensor, Tensor]]:
    return kind.loader(split, batch_size=64, augment=augment, fill=CHECK_FILL, seed=1).epoch(0)


def small_task() -> Task:
    dataset = random_dataset(count=512)
    return Task(dataset.train.images, dataset.train.labels, 64, CHECK_FILL, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
def test_airbench_delivers_what_it_should() -> None:
    pytest.importorskip("airbench")
    check(peers()["airbench"], small_task())


def test_peers_are_checked_timed_and_left_out_with_a_reason_and_one_that_hangs_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # in the other process, a package that cannot be imported
    kornia = tmp_path / "kornia.py"
    kornia.write_text("raise ImportError('no module named kornia', name='kornia')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    host = PeerHost(small_task())
    try:
        before = host.stage("torchvision_pil_0_workers", 0.01)
        for stage in (before, host.stage("torchvision_pil_2_workers", 0.01)):
            assert stage.sample() > 0
        with pytest.raises(PeerError, match=r"kornia is not installed; pip install -e '\.\[bench\]'"):
            host.stage("kornia", 0.01)
        with pytest.raises(PeerError, match="needs a CUDA device"):
            host.stage("airbench", 0.01)
        with pytest.raises(PeerError, match="KeyError"):
            host.stage("no such peer", 0.01)
        assert host.stage("torchvision_pil_0_workers", 0.01).sample() > 0, "the process outlives a peer's failure"
        kornia.write_text("import time\ntime.sleep(600)  # and now one that hangs")
        with monkeypatch.context() as patched:
            patched.setattr("benchmarks.peers.ANSWER_SECONDS", 1.0)
            with pytest.raises(PeerError, match="no answer within 1 s"):
                host.stage("kornia", 0.01)
        assert before.sample() > 0, "a new process takes over"
    finally:
        host.close()
    with pytest.raises(PeerError, match="ended"):
        host.ask("sample", "torchvision_pil_0_workers", 0.01)
    assert ANSWER_SECONDS <= 60

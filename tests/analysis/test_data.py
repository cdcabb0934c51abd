"""analysis.data: what it says of a data set, against a data set of which all is known."""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import data
from dali_pipeline import sources
from dali_pipeline.sources.synthetic import random_dataset
from train.config import changed

COUNTS = {"train": {"ash": 6, "birch": 12}, "test": {"ash": 3, "birch": 4}}


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    """train/ and test/ of two classes, 40 x 60 pixels, the first file of each class 20 x 24; COUNTS says how many."""
    root = tmp_path / "trees"
    generator = np.random.default_rng(0)
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (40, 60) if number else (20, 24)
                Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number}.png")
    return root


def looked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    assert data.main([str(word) for word in words]) == 0
    return capsys.readouterr()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_counts_sizes_and_statistics_are_those_of_the_files(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, _ = looked(capsys, trees, "--output", tmp_path / "out")
    table = {row["class"]: row for row in rows(tmp_path / "out" / "classes.csv")}
    assert table.keys() == {"ash", "birch"}
    for split, classes in COUNTS.items():
        assert {name: int(row[split]) for name, row in table.items()} == classes
    assert "from 20 x 24 to 40 x 60 (height x width)" in said and "21 of 25 have 40 x 60" in said
    assert "4 files are smaller than 32 x 32" in said and "equal images: none" in said
    dataset = sources.load(data.recipe_for(str(trees), []).data)
    pixels = dataset.train.images.reshape(-1, 3).astype(np.float64)
    for values in (pixels.mean(0), pixels.std(0)):
        assert "/".join(f"{value:.2f}" for value in values) in said
    assert rows(tmp_path / "out" / "duplicates.csv") == rows(tmp_path / "out" / "broken.csv") == []
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.width > 8 * 128 and picture.height > 6 * 128


def test_equal_and_broken_files_are_named_whatever_their_names(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ash, birch = trees / "train" / "ash", trees / "train" / "birch"
    shutil.copy(ash / "1.png", ash / 'again, "again".png')
    shutil.copy(ash / "2.png", birch / "2 of ash.png")
    shutil.copy(birch / "3.png", trees / "test" / "birch" / os.fsdecode(b"seen \xff.png"))
    (ash / "broken.png").write_bytes((ash / "3.png").read_bytes()[:500])
    (birch / "empty.png").write_bytes(b"")
    said, _ = looked(capsys, trees, "--output", tmp_path / "out")
    assert "equal images: within train 2; test in train 1; under different classes 1" in said
    assert "2 of 30 files cannot be read and are left out" in said
    assert "2 files cannot be read: training stops there" in said
    found = rows(tmp_path / "out" / "duplicates.csv")
    groups = {
        frozenset((row["split"], row["class"], row["image"]) for row in found if row["hash"] == each)
        for each in {row["hash"] for row in found}
    }
    assert groups == {
        frozenset({("train", "ash", "train/ash/1.png"), ("train", "ash", 'train/ash/again, "again".png')}),
        frozenset({("train", "ash", "train/ash/2.png"), ("train", "birch", "train/birch/2 of ash.png")}),
        frozenset({("train", "birch", "train/birch/3.png"), ("test", "birch", r"test/birch/seen \xff.png")}),
    }
    broken = rows(tmp_path / "out" / "broken.csv")
    assert [row["file"] for row in broken] == ["train/ash/broken.png", "train/birch/empty.png"]
    assert "is empty" in broken[1]["reason"] and str(birch / "empty.png") in said
    said, _ = looked(capsys, trees, "data.on_error=skip", "--output", tmp_path / "out")
    assert "2 of 30 files cannot be read and are left out" in said and "training stops" not in said


def test_equal_files_on_one_side_of_a_held_out_test_set(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trees / "train"
    for number in range(12):
        shutil.copy(root / "birch" / f"{number}.png", root / "birch" / f"{number} again.png")
    said, _ = looked(capsys, root, "data.test=0.4", "--output", tmp_path / "out")
    dataset = sources.load(changed(data.recipe_for(str(root), []), {"data.test": 0.4}).data)
    kept = {split: Counter(part.labels.tolist())[1] // 2 for split, part in dataset.splits.items()}
    assert kept["train"] + kept["test"] == 12 and kept["test"]
    assert f"equal images: within train {kept['train']}; within test {kept['test']}" in said
    found = Counter(row["split"] for row in rows(tmp_path / "out" / "duplicates.csv"))
    assert found == {split: 2 * count for split, count in kept.items()}


def test_equal_images_of_a_data_set_without_files_are_named_by_their_place(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    drawn[7] = drawn[3]
    labels = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x_train=drawn, y_train=labels, x_test=drawn[[3, 5]], y_test=labels[[3, 5]])
    assert data.main([str(tmp_path / "a.npz"), "--output", str(tmp_path / "out"), "--count", "3"]) == 0
    found = [(row["split"], row["image"]) for row in rows(tmp_path / "out" / "duplicates.csv")]
    assert sorted(found) == [("test", "0"), ("test", "1"), ("train", "3"), ("train", "5"), ("train", "7")]


def test_augmented_samples_are_augmentations_of_the_image_beside_them() -> None:
    config = changed(data.recipe_for("synthetic", []), {"augment.crop": False, "augment.cutout": 0})
    dataset = random_dataset(count=64)
    some = dataset.train.take(data.chosen(dataset.train, 20, seed=1))
    mirrored = 0
    for epoch in range(2):
        for image, seen in zip(some.images, data.augmented(config, dataset, some, epoch), strict=True):
            assert np.array_equal(seen, image) or np.array_equal(seen, image[:, ::-1])
            mirrored += not np.array_equal(seen, image)
    assert 5 < mirrored < 35
    plain = data.augmented(changed(config, {"augment.flip": False}), dataset, some, 0)
    assert np.array_equal(plain, some.images)


def test_samples_come_from_all_classes_in_turn() -> None:
    train = random_dataset(count=400).train
    counts = np.bincount(train.labels[data.chosen(train, 30, seed=0)], minlength=10)
    assert counts.tolist() == [3] * 10
    uneven = train.take(np.flatnonzero((train.labels != 4) | (np.cumsum(train.labels == 4) < 2)))
    assert np.bincount(uneven.labels[data.chosen(uneven, 20, seed=0)])[4] == 1


def test_without_output_the_folder_bears_the_whole_name_of_the_data(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trees.rename(tmp_path / "trees v1.5")
    looked(capsys, "trees v1.5", "--count", "1")
    assert (tmp_path / "runs" / "data" / "trees v1.5" / "classes.csv").exists()


def test_a_data_set_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, _ = looked(capsys, "digits", "data.validation=100", "--output", tmp_path / "out", "--count", "4")
    assert "10 classes" in said and "validation" in said and "no augmentation" not in said
    assert {"class", "train", "validation", "test"} == rows(tmp_path / "out" / "classes.csv")[0].keys()


def test_many_classes_are_cut_in_the_middle_and_all_in_the_order_of_their_counts() -> None:
    counts = {"train": np.arange(1000), "test": np.ones(1000, np.int64)}
    lines = data.balance_lines([f"class {label}" for label in range(1000)], counts)
    assert len(lines) == 22 and lines[1].split() == ["class", "999", "999", "1"]
    assert lines[11].strip() == "..." and lines[-1].split()[:3] == ["class", "0", "0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifr10"], "did you mean cifar10?"),
        (["{root}/nothing"], "neither a folder of images, an .npz file nor a data set"),
        (["{root}/file.txt"], "is a file; expected a folder of images or an .npz file"),
        (["digits", "--count", "0"], "must be at least 1"),
        (["digits", "data.image_size=64"], "data.image_size: belongs to"),
        (["{root}", "augment.pad=x"], "augment.pad"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("", encoding="utf-8")
    assert data.main([word.format(root=tmp_path) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "runs").exists()

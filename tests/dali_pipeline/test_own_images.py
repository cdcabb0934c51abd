"""Folders, tables and NumPy files of one's own images: what is read, held out and refused, and what is kept on the disk."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from places import ROOT

from dali_pipeline import decoded, sources
from dali_pipeline.dataset import DataError, Dataset
from dali_pipeline.images import read_image
from train.config import Config, ConfigError, changed


def picture(seed: int, size: int = 32) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def tree(root: Path, counts: dict[str, int], seed: int = 0) -> list[Path]:
    """Files root/KEY/N.png, so many for each key, each another image."""
    files = []
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            files.append(root / name / f"{number:03}.png")
            Image.fromarray(picture(seed + len(files))).save(files[-1])
    return files


def load(root: Path, said: list[str] | None = None, name: str = "folder", **keys: Any) -> Dataset:
    values = {"data.name": name, "data.root": str(root), **{f"data.{key}": value for key, value in keys.items()}}
    return sources.load(changed(Config(), values).data, None if said is None else said.append)


def refused(root: Path, *words: str, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **keys)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def contents(images: Iterable[npt.NDArray[np.uint8]]) -> set[bytes]:
    return {image.tobytes() for image in images}


# folders


def test_train_val_and_test_are_the_three_splits_and_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    files = tree(tmp_path, {"train/b": 4, "train/a": 5, "val/a": 2, "val/b": 1, "test/a": 1, "test/b": 3})
    found = load(tmp_path)
    assert found.class_names == ("a", "b") and found.validation is not None and not found.notes
    for name, split in (("train", found.train), ("val", found.validation), ("test", found.test)):
        expected = sorted(file for file in files if file.parts[-3] == name)
        assert split.labels.tolist() == ["ab".index(file.parts[-2]) for file in expected]
        assert np.array_equal(split.images, np.stack([read_image(file, 32, 32) for file in expected]))
    values = found.train.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose([found.mean, found.std], [values.mean(0), values.std(0)], rtol=1e-12)
    with pytest.raises(DataError, match="validation split of its own"):
        load(tmp_path, validation=0.2)


def test_without_test_the_validation_folder_is_the_test_set_and_that_is_said(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a": 6, "train/b": 6, "valid/a": 2, "valid/b": 3})
    found = load(tmp_path)
    assert len(found.test) == 5 and found.validation is None
    assert any("there is no test/, so valid/ is the test set" in note for note in found.notes)
    held = load(tmp_path, validation=4)
    assert held.validation is not None and len(held.validation) == 4 and len(held.train) == 8
    assert held.notes == found.notes


@pytest.mark.parametrize("amount", [0.3, 20])
def test_of_a_tree_without_train_the_test_set_is_held_out_by_the_hash_of_the_files(
    tmp_path: Path, amount: float
) -> None:
    files = tree(tmp_path, {"a": 50, "b": 50})
    found = load(tmp_path, test=amount)
    digests = [hashlib.sha256(b"test" + hashlib.sha256(file.read_bytes()).digest()).digest() for file in files]
    if amount < 1:
        low = [int.from_bytes(digest[:8], "big") < 0.3 * 2**64 for digest in digests]
        held = {read_image(file, 32, 32).tobytes() for file, is_low in zip(files, low, strict=True) if is_low}
    else:
        held = set()
        for part in (slice(50), slice(50, 100)):
            lowest = sorted(zip(digests[part], files[part], strict=True))[:10]
            held |= {read_image(file, 32, 32).tobytes() for _, file in lowest}
    assert contents(found.test.images) == held
    assert len(found.train) + len(found.test) == 100
    assert any(f"data.test={amount:g}: {len(held)} of 100 images held out" in line for line in found.remarks)
    # data.validation asks other bits of the same hash: it is no part of the test set, and not empty
    thrice = load(tmp_path, test=amount, validation=0.25)
    assert thrice.validation is not None and len(thrice.validation) > 5
    assert contents(thrice.test.images) == held
    assert not contents(thrice.validation.images) & (held | contents(thrice.train.images))


def test_a_train_folder_alone_is_such_a_tree(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a": 30, "train/b": 30, "notes": 1})
    found = load(tmp_path, test=10)
    assert (len(found.train), len(found.test)) == (50, 10)
    assert "notes/ beside train/ is passed over" in found.remarks


@pytest.mark.parametrize(
    ("train", "val", "test"), [("Train", "Val", "Test"), ("TRAIN", "Validation", "TEST"), ("training", "", "testing")]
)
def test_folders_of_splits_may_be_written_otherwise(tmp_path: Path, train: str, val: str, test: str) -> None:
    tree(tmp_path, {f"{train}/a": 4, f"{train}/b": 3, f"{test}/a": 2, f"{test}/b": 1})
    if val:
        tree(tmp_path, {f"{val}/a": 2, f"{val}/b": 2}, seed=50)
    found = load(tmp_path)
    assert found.class_names == ("a", "b") and (len(found.train), len(found.test)) == (7, 3)
    assert (found.validation is not None) == bool(val)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    tree(tmp_path, {"bus": 20, "car": 20, "train": 20})
    assert load(tmp_path, test=6).class_names == ("bus", "car", "train")


def test_the_size_and_the_rule_are_those_of_the_keys(tmp_path: Path) -> None:
    for place, name in enumerate(("a", "b")):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test" / name).mkdir(parents=True)
        for part in ("train", "test"):
            Image.fromarray(picture(place, 100)[:60]).save(tmp_path / part / name / "x.png")
    for size in (32, 64):
        for resize in ("crop", "squash"):
            found = load(tmp_path, image_size=size, resize=resize)
            expected = read_image(tmp_path / "train" / "a" / "x.png", size, size, resize)  # type: ignore[arg-type]
            assert np.array_equal(found.train.images[0], expected)
    wrongs: list[tuple[dict[str, Any], str]] = [({"image_size": 36}, "no multiple of 8"), ({"test": 1.5}, "data.test")]
    for wrong, words in wrongs:
        with pytest.raises(ConfigError, match=words):
            load(tmp_path, **wrong)


def test_files_lie_at_any_depth_and_hidden_ones_other_kinds_and_circles_are_passed_over(tmp_path: Path) -> None:
    tree(
        tmp_path, {"train/a/deep/er": 3, "train/b": 4, "test/a": 1, "test/b": 1, "train/a/.hidden": 2, "train/.git": 1}
    )
    (tmp_path / "train/b/.DS_Store.png").write_bytes(b"x")
    (tmp_path / "train/b/readme.txt").write_bytes(b"x")
    (tmp_path / "train/b/UPPER.PNG").write_bytes((tmp_path / "train/b/000.png").read_bytes())
    (tmp_path / "train/a/deep/round").symlink_to(tmp_path / "train/a")
    found = load(tmp_path)
    assert np.bincount(found.train.labels).tolist() == [3, 5] and found.class_names == ("a", "b")
    assert "files of other kinds are passed over: 1 .txt" in found.remarks
    assert any("train/a/deep/round" in note and "back to a folder around them" in note for note in found.notes)


def test_names_of_folders_that_are_hard_to_write_become_class_names_that_are_not(tmp_path: Path) -> None:
    names = [b"two words", "größe".encode(), b"a'\"b", b"caf\xe9"]
    try:
        for place, name in enumerate(names):
            for part in (b"train", b"test"):
                folder = Path(os.fsdecode(b"/".join([os.fsencode(tmp_path), part, name])))
                folder.mkdir(parents=True)
                Image.fromarray(picture(2 * place + (part == b"test"))).save(folder / "x.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names alone")
    found = load(tmp_path)
    assert set(found.class_names) == {"two words", "größe", "a'\"b", r"caf\xe9"}
    assert all(name.isprintable() and name.encode() for name in found.class_names)


def test_uneven_classes_and_images_in_two_splits_are_told(tmp_path: Path) -> None:
    files = tree(tmp_path, {"train/a": 12, "train/b": 4, "test/a": 2, "test/b": 2})
    assert any("from 4 training images of b to 12 of a" in line for line in load(tmp_path).remarks)
    (tmp_path / "test/b/again.png").write_bytes(files[2].read_bytes())
    (note,) = load(tmp_path).notes
    assert note == (
        "1 test image is among the training images too, which flatters: test/b/again.png is train/a/002.png"
    )


def test_what_cannot_be_trained_on_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "gone: no such folder", "data.root=DIR")
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file", "is a file, expected a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folder of a class")
    tree(tmp_path / "flat", {"train": 3})
    refused(tmp_path / "flat", "flat/train: holds no folder of a class")
    tree(tmp_path / "half", {"test/a": 1, "val/a": 1})
    refused(tmp_path / "half", "holds test/ and val/ but no train/")
    tree(tmp_path / "both", {"train/a": 1, "val/a": 1, "valid/a": 1})
    refused(tmp_path / "both", "both val/ and valid/")
    (tmp_path / "nothing/train/a").mkdir(parents=True)
    refused(tmp_path / "nothing", "holds no image in a", ".jpeg")
    tree(tmp_path / "one", {"train/a": 9, "test/a": 2})
    refused(tmp_path / "one", "holds images of 1 class (a)", "two are the least")
    tree(tmp_path / "untaught", {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1, "test/c": 1})
    refused(tmp_path / "untaught", "no training image of c")


def test_an_empty_class_is_left_out_and_a_class_without_test_images_is_named(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a": 3, "train/b": 3, "train/c": 3, "test/a": 1, "test/b": 1})
    (tmp_path / "train" / "nothing").mkdir()
    found = load(tmp_path)
    assert found.class_names == ("a", "b", "c")
    assert [note.split(": ", 1)[-1] for note in found.notes] == [
        "no image in nothing: left out as classes",
        "no test image of c",
    ]


def test_broken_files_stop_with_their_names_or_are_left_out_and_listed(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 2})
    (tmp_path / "train/a/002.png").write_bytes(b"")
    (tmp_path / "train/b/broken.jpg").write_bytes(b"no image")
    words = ["2 of 15 files cannot be read", "train/a/002.png: is empty", "train/b/broken.jpg: is no image"]
    refused(tmp_path, *words, "data.on_error=skip")
    for _ in range(2):  # decoded, and found again
        found = load(tmp_path, on_error="skip")
        assert np.bincount(found.train.labels).tolist() == [4, 5] and len(found.test) == 4
        assert all(any(word in note for note in found.notes) for word in words)
        left = [read_image(tmp_path / f"train/a/{number:03}.png", 32, 32) for number in (0, 1, 3, 4)]
        assert np.array_equal(found.train.images[:4], np.stack(left))
        values = found.train.images.reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    for file in tmp_path.glob("*/*/*.png"):
        file.write_bytes(b"")
    assert refused(tmp_path, "15 of 15 files", on_error="skip").endswith("mend or remove them")


# tables


def test_a_table_names_files_labels_and_splits(tmp_path: Path) -> None:
    files = tree(tmp_path, {"pictures": 8})
    lines = [
        "path;label;split",
        *(f"pictures/{f.name};{n % 3 + 9};{('train', 'Test')[n > 4]}" for n, f in enumerate(files)),
    ]
    (tmp_path / "labels.csv").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    found = load(tmp_path, table="labels.csv")
    assert found.class_names == ("9", "10", "11")  # numbers by size
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2] and found.test.labels.tolist() == [0, 1, 2]
    order = [0, 3, 1, 4, 2]
    assert np.array_equal(found.train.images, np.stack([read_image(files[place], 32, 32) for place in order]))
    lines = [line.rpartition(";")[0].replace(";", ",") for line in lines]
    (tmp_path / "plain.csv").write_text("\n".join(lines), encoding="utf-8")
    assert len(load(tmp_path, table="plain.csv", test=3).test) == 3
    zeros = ["path,label", *(f"pictures/{f.name},{('2', '01', '1', '02')[n % 4]}" for n, f in enumerate(files))]
    (tmp_path / "zeros.csv").write_text("\n".join(zeros), encoding="utf-8")
    assert load(tmp_path, table="zeros.csv", test=2).class_names == ("01", "1", "02", "2")


def test_paths_in_a_table_may_hold_whatever_a_file_system_takes(tmp_path: Path) -> None:
    names = ["line\nbreak.png", "one, two.png", 'a "b".png', "next\x85line.png", "para\u2029graph.png", "caf\udce9.png"]
    for place, name in enumerate(names):
        Image.fromarray(picture(place)).save(tmp_path / name)
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("path", "label"), *((name, place % 2) for place, name in enumerate(names))])
    found = load(tmp_path, table="t.csv", test=2)
    assert contents([*found.train.images, *found.test.images]) == contents(map(picture, range(len(names))))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has no column path, but none"]),
        ("file,label\nx.png,a", ["has no column path, but file, label"]),
        ("path,label\nx.png", ["line 2: 1 columns, expected 2"]),
        ("path,label\nx.png,", ["line 2: label is empty"]),
        ("path,label\nx.png,a\nx.png,b", ["line 3: x.png is named twice"]),
        ("path,label,split\nx.png,a,dev", ["line 2: split is 'dev', expected train, val or test"]),
        ("path,label\n", ["names no image"]),
        ('path,label\n"x,a\n', ["line"]),
        ("path,label,split\nx.png,a,train\ny.png,b,test", ["x.png: no such file", "y.png: no such file"]),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_its_line(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "t.csv").write_text(text)
    refused(tmp_path, *words, table="t.csv")
    refused(tmp_path, "data.table", "no such file", table="gone.csv")


# NumPy files


def test_a_numpy_file_gives_what_was_saved(tmp_path: Path) -> None:
    grey, coloured = np.stack([picture(n)[..., 0] for n in range(9)]), np.stack([picture(n) for n in range(9)])
    labels = np.arange(9) % 3 + 4
    arrays = {
        "train_images": grey[:5],
        "train_labels": labels[:5, None].astype(np.uint8),
        "val_images": grey[5:7],
        "val_labels": labels[5:7],
        "test_images": coloured[6:],
        "test_labels": labels[6:],
    }
    np.savez_compressed(tmp_path / "med.npz", **arrays)
    for root in (tmp_path, tmp_path / "med.npz"):
        found = load(root, name="npz")
        assert found.class_names == ("4", "5", "6") and found.validation is not None
        assert np.array_equal(found.train.images, np.repeat(grey[:5, ..., None], 3, 3))
        assert np.array_equal(found.validation.images[..., 1], grey[5:7]) and np.array_equal(
            found.test.images, coloured[6:]
        )
        assert found.train.labels.tolist() == [0, 1, 2, 0, 1] and found.test.labels.tolist() == [0, 1, 2]
    np.savez(tmp_path / "keras.npz", x_train=grey, y_train=labels, x_test=grey[:3], y_test=labels[:3])
    assert len(load(tmp_path / "keras.npz", name="npz").test) == 3
    np.savez(tmp_path / "plain.npz", images=coloured, labels=labels)
    held = load(tmp_path / "plain.npz", name="npz", test=3)
    assert len(held.test) == 3 and contents([*held.train.images, *held.test.images]) == contents(coloured)
    refused(tmp_path, "holds 3", "data.root=FILE.npz", name="npz")


def test_images_of_a_numpy_file_are_resized_as_files_are(tmp_path: Path) -> None:
    images = np.stack([picture(n, 100)[:60] for n in range(6)])
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(6) % 2)
    Image.fromarray(images[0]).save(tmp_path / "first.png")
    found = load(tmp_path / "x.npz", name="npz", test=2, resize="squash", image_size=40)
    assert read_image(tmp_path / "first.png", 40, 40, "squash").tobytes() in contents(
        [*found.train.images, *found.test.images]
    )


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, "holds pictures; expected train_images"),
        ({"images": np.zeros((2, 8, 8)), "labels": np.arange(2)}, "float64"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, int)}, "holds no image"),
        ({"images": np.zeros((2, 8, 8, 8, 3), np.uint8), "labels": np.arange(2)}, "three-dimensional"),
        ({"images": np.zeros((2, 8, 8, 8), np.uint8), "labels": np.arange(2)}, "three-dimensional"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros((2, 5), int)}, "several labels an image"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.arange(3)}, "a label for each image"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array(["a", "b"])}, "whole numbers"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([{}, {}])}, "whole numbers"),
        ({"images": np.zeros((8, 8, 2), np.uint8).T, "labels": np.arange(2)}, "Fortran"),
    ],
)
def test_numpy_files_of_other_things_are_refused_by_name(tmp_path: Path, arrays: Any, words: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", "x.npz", words, name="npz")


def test_damaged_numpy_files_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.stack([picture(n) for n in range(40)]), labels=np.arange(40) % 2)
    whole = (tmp_path / "x.npz").read_bytes()
    for content in (b"", b"no zip", whole[:3000], whole[:200] + bytes(500) + whole[700:]):
        (tmp_path / "x.npz").write_bytes(content)
        refused(tmp_path / "x.npz", "x.npz", name="npz")


# what is kept on the disk


def kept(root: Path) -> list[Path]:
    return sorted((root / decoded.FOLDER).iterdir())


def test_the_second_start_reads_no_image_and_a_change_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tree(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 2})
    said: list[str] = []
    first = load(tmp_path, said)
    assert re.search(r"decoding .* once: 14 images, 0\.0 MB in .*\.cifar-throughput", said[0])
    with monkeypatch.context() as without:
        without.setattr("dali_pipeline.images.Image.open", None)
        again = load(tmp_path, said)
    assert len(said) == 1 and again.train.fingerprint == first.train.fingerprint and len(kept(tmp_path)) == 1
    assert isinstance(again.train.pixels, np.memmap) and (again.mean, again.std) == (first.mean, first.std)
    Image.fromarray(picture(99)).save(files[0])
    third = load(tmp_path, said)
    assert len(kept(tmp_path)) == 2 and np.array_equal(third.train.images[0], picture(99))
    load(tmp_path, said, image_size=40)
    load(tmp_path, said, resize="squash")
    assert len(kept(tmp_path)) == 4
    with monkeypatch.context() as newer:
        newer.setattr("dali_pipeline.image_files.RULE", -1)
        load(tmp_path, said)
    assert len(kept(tmp_path)) == 5
    for path in kept(tmp_path):
        path.unlink()
    assert load(tmp_path).train.fingerprint == third.train.fingerprint


def test_a_file_that_can_be_read_by_now_is_read_though_its_size_and_time_are_as_they_were(tmp_path: Path) -> None:
    """As after chmod, or a failure of a network."""
    file = tree(tmp_path / "a", {"train/a": 30, "train/b": 30, "test/a": 2, "test/b": 2})[3]
    tree(tmp_path / "b", {"train/a": 30, "train/b": 30, "test/a": 2, "test/b": 2})
    expected = load(tmp_path / "b").train.fingerprint
    content, status = file.read_bytes(), file.stat()

    def write(data: bytes) -> None:
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    write(bytes(len(content)))
    killed = child(tmp_path / "a", "kill")
    killed.communicate(timeout=60)
    (part,) = kept(tmp_path / "a")
    assert killed.returncode == -signal.SIGKILL and part.suffix == ".part"
    write(content)
    assert load(tmp_path / "a").train.fingerprint == expected
    for path in kept(tmp_path / "a"):
        path.unlink()
    write(bytes(len(content)))
    refused(tmp_path / "a", "1 of 64 files cannot be read", "003.png")
    write(content)
    assert load(tmp_path / "a").train.fingerprint == expected


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    tree(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 2})
    first = load(tmp_path).train.fingerprint
    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert load(tmp_path).train.fingerprint == first


def test_where_nothing_can_be_written_it_lies_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "data", {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 2})
    (tmp_path / "data" / decoded.FOLDER).write_bytes(
        b""
    )  # a folder cannot be made: for root too, who may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    found = load(tmp_path / "data")
    assert len([*(tmp_path / "caches/cifar-throughput/decoded").rglob("*.pixels")]) == 1 and "caches" in found.source
    (tmp_path / "other").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    refused(tmp_path / "data", "no place to keep", "XDG_CACHE_HOME")


def test_of_two_files_alike_in_name_size_and_time_each_keeps_its_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        (folder / decoded.FOLDER).write_bytes(b"")  # nothing can be kept here
        for label in "xy":
            (folder / "train" / label).mkdir()
            for number in range(5):
                file = folder / "train" / label / f"{number}.bmp"
                Image.fromarray(picture(100 * seed + number)).save(file)
                os.utime(file, ns=(0, 10**18))
        np.savez(
            tmp_path / f"{name}.npz",
            images=np.stack([picture(100 * seed + n) for n in range(6)]),
            labels=np.arange(6) % 2,
        )
        os.utime(tmp_path / f"{name}.npz", ns=(0, 10**18))
    for kind, ending in (("folder", ""), ("npz", ".npz")):
        first, second = (load(tmp_path / f"{name}{ending}", name=kind, test=2) for name in ("a", "b"))
        for seed, found in enumerate((first, second)):
            expected = contents(picture(100 * seed + n) for n in range(6))
            assert contents([*found.train.images, *found.test.images]) <= expected


def test_too_little_room_is_told_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 2})
    usage = __import__("shutil").disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(tmp_path, "0.0 MB of decoded images do not fit", "data.image_size")


CHILD = """
import os, resource, signal, sys
from dali_pipeline import decoded, image_files, sources
from dali_pipeline.sources import data_sections
image_files.BATCH_FILES, decoded.SYNC_SECONDS = 8, 0.0
lines = []
def say(line):
    print(line, flush=True)
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    image_files.BATCH_FILES = 1
if sys.argv[2] == "kill":
    read, count = image_files.read_bytes, 0
    def counting(path):
        global count
        count += 1
        if count == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)
    image_files.read_bytes = counting
dataset = sources.load(data_sections()["folder"](root=sys.argv[1]), say)
print(dataset.train.fingerprint)
"""


def child(root: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_after_a_kill_the_next_start_goes_on_and_two_at_once_share_the_work(tmp_path: Path) -> None:
    tree(tmp_path / "a", {"train/a": 30, "train/b": 30, "test/a": 2, "test/b": 2})
    tree(tmp_path / "b", {"train/a": 30, "train/b": 30, "test/a": 2, "test/b": 2})
    killed = child(tmp_path / "a", "kill")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (part,) = kept(tmp_path / "a")
    assert part.suffix == ".part"
    both = [child(tmp_path / "a", "no"), child(tmp_path / "a", "no")]
    texts = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    there = [int(found[1]) for text in texts if (found := re.search(r"(\d+) images are there already", text))]
    assert len(there) == 1 and 8 <= there[0] < 40  # one of the two went on, the other found all
    expected = load(tmp_path / "b").train.fingerprint
    assert {text.splitlines()[-1] for text in texts} == {expected}
    assert len(kept(tmp_path / "a")) == 1


def test_a_disk_that_is_full_is_named_and_what_was_decoded_is_kept(tmp_path: Path) -> None:
    """The whole file is larger than the process may write: its size is not reserved, so the records come in the way."""
    tree(tmp_path, {"train/a": 30, "train/b": 30, "test/a": 2, "test/b": 2})
    full = child(tmp_path, "full")
    text = full.communicate(timeout=60)[0]
    assert full.returncode == 1 and "DataNotWritten" in text
    assert re.search(r"\.pixels: cannot be written: File too large; what was decoded so far is kept", text), text
    assert len(load(tmp_path).train) == 60


MEMORY = """
import re, sys, threading, time
from pathlib import Path
from dali_pipeline import sources
from dali_pipeline.sources import data_sections
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
options = data_sections()["npz"](root=sys.argv[1], validation=0.1)
sources.load(data_sections()["npz"](root=sys.argv[2], validation=0.1))  # what importing and thread pools take
before, most, done = anonymous(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
dataset = sources.load(options)
done.set()
watcher.join()
print(len(dataset.train) + len(dataset.validation) + len(dataset.test), anonymous() - before, most - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_start_from_decoded_images_takes_at_most_200_bytes_of_memory_an_image(tmp_path: Path) -> None:
    count = 200_000
    for name, images in (("many", count), ("few", 1000)):
        pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=pixels, labels=np.arange(images) % 10)
        load(tmp_path / f"{name}.npz", name="npz")
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "many.npz"), str(tmp_path / "few.npz")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    found, kept, most = map(int, done.stdout.split())
    assert found == count
    assert kept < most <= 200 * count, f"{kept / count:.0f} bytes an image kept, {most / count:.0f} at most"

"""Data sets against pure-Python readers, sklearn and hostile files; FUZZ_SECONDS and FUZZ_SEED lengthen the fuzzing."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import pickle
import random
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cifar import (
    files_of,
    member,
    members_of,
    packed,
    packed_pickles,
    python2_pickle,
    random_records,
    records_of,
    small,
    tar_of,
    with_archive,
    write_binary_folder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from dali_pipeline.dataset import DataError, Dataset, Facts, Split, channel_histogram, with_statistics
from dali_pipeline.hold_out import held_out
from dali_pipeline.options import DataOptions, key
from dali_pipeline.resident import resident_images
from dali_pipeline.sources import SOURCES, Say, Source, data_sections, load, source_of
from dali_pipeline.sources.cifar import CIFAR10_MEAN, CIFAR10_PIXELS, CIFAR10_STD, CIFARS, Cifar, load_cifar
from dali_pipeline.sources.digits import _upscale
from dali_pipeline.sources.synthetic import random_dataset

NAMES = ("cifar10", "cifar100")


def plain_images(data: bytes, label_bytes: int, height: int = 32, width: int = 32) -> list[Any]:
    """[(label, image as nested lists [y][x][channel])] by indexing bytes."""
    area = height * width
    result = []
    for start in range(0, len(data), label_bytes + 3 * area):
        pixels = start + label_bytes
        image = [
            [[data[pixels + c * area + y * width + x] for c in range(3)] for x in range(width)] for y in range(height)
        ]
        result.append((data[start + label_bytes - 1], image))
    return result


def refused(cifar: Cifar, root: Path, *expected: str) -> str:
    """Loading raises a DataError of one line that holds all of `expected`; nothing appears in root."""
    before = sorted(root.rglob("*"))
    with pytest.raises(DataError) as raised:
        load_cifar(cifar, root, mirrors=[])
    text = str(raised.value)
    assert "\n" not in text
    for part in expected:
        assert part in text
    assert sorted(root.rglob("*")) == before
    return text


# The binary folder


@pytest.mark.parametrize("name", NAMES)
def test_records_equal_a_plain_reading_of_the_bytes(name: str, tmp_path: Path) -> None:
    cifar = small(name, 3)
    content = random_records(cifar)
    write_binary_folder(cifar, tmp_path, content)
    dataset = load_cifar(cifar, tmp_path)
    train = b"".join(content[file.binary] for file in cifar.train_files)
    for split, data in ((dataset.train, train), (dataset.test, content[cifar.test_file.binary])):
        expected = plain_images(data, len(cifar.label_limits))
        assert len(split) == len(expected)
        assert split.labels.tolist() == [label for label, _ in expected]
        assert split.images.tolist() == [image for _, image in expected]
        assert split.labels.dtype == np.int64 and split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
    assert dataset.num_classes == len(dataset.class_names) == cifar.label_limits[-1]
    assert "not checked against the official hash" in dataset.source


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    label_bytes=st.integers(1, 2),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    count=st.integers(0, 4),
)
def test_splits_of_any_size_equal_a_plain_reading(
    data: st.DataObject, label_bytes: int, height: int, width: int, count: int
) -> None:
    size = count * (label_bytes + 3 * height * width)
    content = data.draw(st.binary(min_size=size, max_size=size))
    records = np.frombuffer(content, np.uint8).reshape(count, -1 if count else label_bytes + 3 * height * width)
    pixels = records[:, label_bytes:].reshape(count, 3, height, width)
    split = Split(pixels, records[:, label_bytes - 1].astype(np.int64), planar=True)
    expected = plain_images(content, label_bytes, height, width)
    assert split.labels.tolist() == [label for label, _ in expected]
    assert split.images.tolist() == [image for _, image in expected]
    assert split.images.shape == (count, height, width, 3)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    file=st.integers(0, 5),
    change=st.integers(-40, 40).filter(bool),
)
def test_a_file_of_any_other_size_is_refused(name: str, count: int, seed: int, file: int, change: int) -> None:
    cifar = small(name, count)
    content = random_records(cifar, seed)
    victim = sorted(content)[file % len(content)]
    data = content[victim]
    content[victim] = data[:change] if change < 0 else data + bytes(change)
    with tempfile.TemporaryDirectory() as folder:
        write_binary_folder(cifar, Path(folder), content)
        refused(cifar, Path(folder), victim, f"{len(data) + change:,} bytes", f"expected {len(data):,}")


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), record=st.integers(0, 2), column=st.integers(0, 1), excess=st.integers(0, 245))
def test_a_label_out_of_range_is_refused(name: str, record: int, column: int, excess: int) -> None:
    cifar = small(name, 3)
    column = min(column, len(cifar.label_limits) - 1)
    limit = cifar.label_limits[column]
    value = min(limit + excess, 255)
    content = random_records(cifar)
    victim = cifar.train_files[-1].binary
    data = bytearray(content[victim])
    data[record * cifar.record_bytes + column] = value
    content[victim] = bytes(data)
    expected = f"record {record} has label {value} in byte {column}, expected 0..{limit - 1}"
    with tempfile.TemporaryDirectory() as folder:
        write_binary_folder(cifar, Path(folder), content)
        refused(cifar, Path(folder), victim, expected)
    with tempfile.TemporaryDirectory() as folder:
        cifar, archive = packed(cifar, content)
        (Path(folder) / cifar.archive.name).write_bytes(archive)
        refused(cifar, Path(folder), victim, expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_a_folder_is_refused_and_an_empty_one_is_absent(name: str, tmp_path: Path) -> None:
    cifar = small(name)
    folder = write_binary_folder(cifar, tmp_path, random_records(cifar))
    (folder / cifar.test_file.binary).unlink()
    refused(cifar, tmp_path, str(folder / cifar.test_file.binary), "missing")
    refused(cifar, folder, str(folder / cifar.test_file.binary), "missing")
    for file in cifar.train_files:
        (folder / file.binary).unlink()
    with pytest.raises(DataError, match="looked in"):
        load_cifar(cifar, tmp_path, download=False)


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    cifar = small()
    folder = write_binary_folder(cifar, tmp_path, random_records(cifar))
    (folder / "data_batch_3.bin").unlink()
    (folder / "data_batch_3.bin").mkdir()
    refused(cifar, tmp_path, str(folder / "data_batch_3.bin"), "directory")


@pytest.mark.parametrize("layout", ["binary", "pickled", "archive"])
@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a link to a device", "a link to a named pipe"])
def test_a_data_file_that_is_no_regular_one_is_refused_without_waiting_or_reading(
    tmp_path: Path, layout: str, kind: str
) -> None:
    cifar, data = packed(small(), content := random_records(small()))
    if layout == "archive":
        (victim := tmp_path / cifar.archive.name).write_bytes(data)
    else:
        folder = (write_binary_folder if layout == "binary" else write_pickles)(cifar, tmp_path, content)
        victim = folder / getattr(cifar.train_files[2], layout)
    victim.unlink()
    if kind.startswith("a link"):
        target = Path("/dev/zero") if kind.endswith("device") else tmp_path / "pipe"
        victim.symlink_to(target)
    else:
        target = victim
    if kind.endswith("pipe"):
        os.mkfifo(target)
    elif kind == "a device":
        try:
            os.mknod(target, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")
    refused(cifar, tmp_path, f"{victim}: is {kind.removeprefix('a link to ')}, not a regular file")


def test_a_data_file_may_be_a_link_to_a_regular_one(tmp_path: Path) -> None:
    cifar, content = small(), random_records(small())
    folder = write_binary_folder(cifar, tmp_path, content)
    (folder / "test_batch.bin").rename(tmp_path / "elsewhere")
    (folder / "test_batch.bin").symlink_to(tmp_path / "elsewhere")
    assert records_of(load_cifar(cifar, tmp_path).test).tobytes() == content["test_batch.bin"]


def test_a_pickle_larger_than_any_of_its_kind_is_not_read(tmp_path: Path) -> None:
    cifar = small()
    victim = write_pickles(cifar, tmp_path, random_records(cifar)) / "test_batch"
    with victim.open("r+b") as file:
        file.truncate(10**12)  # sparse: reading it would take all memory
    refused(cifar, tmp_path, f"{victim}: is of 1,000,000,000,000 bytes, expected at most")


def test_root_may_be_the_archive_itself(tmp_path: Path) -> None:
    cifar, data = packed(small(), content := random_records(small()))
    path = tmp_path / "renamed.tgz"
    path.write_bytes(data)
    dataset = load_cifar(cifar, path, mirrors=[])
    assert records_of(dataset.test).tobytes() == content["test_batch.bin"] and str(path) in dataset.source
    path.write_bytes(data[:-1])
    assert "remove" not in refused(cifar, path, f"{path}: ")
    assert path.read_bytes() == data[:-1]
    np.savez(tmp_path / "mine.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert "remove" not in refused(cifar, tmp_path / "mine.npz", "data.name=npz")


def test_root_may_be_the_folder_itself_whatever_its_name(tmp_path: Path) -> None:
    cifar = small()
    content = random_records(cifar)
    folder = write_binary_folder(cifar, tmp_path, content)
    assert records_of(load_cifar(cifar, folder).test).tobytes() == content["test_batch.bin"]
    renamed = folder.rename(tmp_path / "other")
    assert records_of(load_cifar(cifar, renamed).test).tobytes() == content["test_batch.bin"]


def test_binary_goes_before_pickles_before_the_archive(tmp_path: Path) -> None:
    cifar = small()
    contents = [random_records(cifar, seed) for seed in range(3)]
    cifar, archive = packed(cifar, contents[2])
    (tmp_path / cifar.archive.name).write_bytes(archive)
    sources = []
    for write in (lambda: None, lambda: write_pickles(cifar, tmp_path, contents[1])):
        write()
        sources.append(load_cifar(cifar, tmp_path, mirrors=[]))
    write_binary_folder(cifar, tmp_path, contents[0])
    sources.append(load_cifar(cifar, tmp_path, mirrors=[]))
    for dataset, content in zip(sources, reversed(contents), strict=True):
        assert records_of(dataset.test).tobytes() == content["test_batch.bin"]
    assert ["sha256" in s.source for s in sources] == [True, False, False]
    assert ["pickles" in s.source for s in sources] == [False, True, False]


# The archive


@pytest.mark.parametrize("name", NAMES)
def test_a_placed_archive_is_read_without_unpacking(name: str, tmp_path: Path) -> None:
    cifar = small(name)
    content = random_records(cifar)
    members = members_of(cifar, content)
    random.Random(3).shuffle(members)
    extra = member(f"{cifar.binary_folder}/readme.html", b"x" * 5000)
    cifar = with_archive(cifar, gzip.compress(data := tar_of([extra, *members, extra]), mtime=0))
    (tmp_path / cifar.archive.name).write_bytes(gzip.compress(data, mtime=0))
    dataset = load_cifar(cifar, tmp_path, mirrors=[])
    assert records_of(dataset.train).tobytes() == b"".join(content[file.binary] for file in cifar.train_files)
    assert records_of(dataset.test).tobytes() == content[cifar.test_file.binary]
    assert [path.name for path in tmp_path.iterdir()] == [cifar.archive.name]


def test_an_archive_that_is_not_the_official_one_is_refused_and_left_alone(tmp_path: Path) -> None:
    cifar, archive = packed(small(), random_records(small()))
    path = tmp_path / cifar.archive.name
    for data, found in (
        (archive[:-1], f"{len(archive) - 1:,} bytes, expected {len(archive):,}"),
        (archive[:500] + bytes([archive[500] ^ 1]) + archive[501:], "sha256 "),
        (
            b"<!DOCTYPE html><html><title>Log in</title>",
            "not a gzip archive, 42 bytes that begin with b'<!DOCTYPE html>",
        ),
        (b"", "not a gzip archive, 0 bytes"),
    ):
        path.write_bytes(data)
        refused(cifar, tmp_path, str(path), found, cifar.archive.sha256, "remove it or replace it")
        assert path.read_bytes() == data


def archive_with(tmp_path: Path, cifar: Cifar, members: list[tuple[tarfile.TarInfo, bytes]]) -> Cifar:
    """Place an archive whose hash is right, so that its members are looked at."""
    data = gzip.compress(tar_of(members), 1)
    cifar = with_archive(cifar, data)
    (tmp_path / cifar.archive.name).write_bytes(data)
    return cifar


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "directory", "device", "fifo"])
def test_a_member_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    cifar = small()
    members = members_of(cifar, random_records(cifar))
    info = tarfile.TarInfo(members[2][0].name)
    info.type = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "directory": tarfile.DIRTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }[kind]
    info.linkname = "/etc/passwd"
    members[2] = (info, b"")
    refused(archive_with(tmp_path, cifar, members), tmp_path, info.name, "expected a plain file")


@pytest.mark.parametrize("change", [-1, 1, 3073])
def test_a_member_of_the_wrong_size_is_refused(tmp_path: Path, change: int) -> None:
    cifar = small()
    members = members_of(cifar, random_records(cifar))
    info, data = members[1]
    members[1] = member(info.name, data[:change] if change < 0 else data + bytes(change))
    refused(
        archive_with(tmp_path, cifar, members),
        tmp_path,
        info.name,
        f"{len(data) + change:,} bytes, expected {len(data):,}",
    )


def test_missing_members_are_named(tmp_path: Path) -> None:
    cifar = small()
    members = members_of(cifar, random_records(cifar))
    missing = [members.pop(4)[0].name, members.pop(0)[0].name]
    refused(archive_with(tmp_path, cifar, members), tmp_path, *missing, "missing")


@pytest.mark.parametrize("prefix", ["../", "/tmp/", "./", "a/../", "cifar-10-batches-bin/../"])
def test_a_member_on_another_path_is_not_taken_for_the_known_one_and_writes_nothing(
    tmp_path: Path, prefix: str
) -> None:
    cifar = small()
    members = members_of(cifar, random_records(cifar))
    info, data = members[0]
    escaping = member(prefix + info.name, data)
    root = tmp_path / "root"
    root.mkdir()
    before = sorted(tmp_path.rglob("*"))
    refused(archive_with(root, cifar, [escaping, *members[1:]]), root, info.name, "missing")
    load_cifar(archive_with(root, cifar, [escaping, *members]), root, mirrors=[])
    assert sorted(tmp_path.rglob("*")) == [*before, root / cifar.archive.name]


def test_a_gzip_stream_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    cifar, archive = packed(small(), random_records(small()))
    for length in (*range(2, 40), *range(40, len(archive) * 19 // 20, len(archive) // 30)):
        data = archive[:length]
        cifar = with_archive(cifar, data)  # the hash is right: only the reader can notice
        (tmp_path / cifar.archive.name).write_bytes(data)
        refused(cifar, tmp_path, str(tmp_path / cifar.archive.name))


def test_a_sparse_member_that_ends_early_is_refused(tmp_path: Path) -> None:
    cifar = small()
    members = members_of(cifar, random_records(cifar))
    data = bytearray(tar_of(members))
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data = bytearray(with_checksums(bytes(data)))
    cifar = with_archive(cifar, gzip.compress(data, 1, mtime=0))
    (tmp_path / cifar.archive.name).write_bytes(gzip.compress(data, 1, mtime=0))
    refused(cifar, tmp_path, str(tmp_path / cifar.archive.name))


@pytest.mark.parametrize("name", NAMES)
def test_load_finds_nothing_in_an_empty_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"looked in {tmp_path} for {CIFARS[name].binary_folder}/"):
        load(DataOptions(name=name, root=str(tmp_path), download=False))


# Pickles


def write_pickles(cifar: Cifar, root: Path, content: dict[str, bytes]) -> Path:
    folder = root / cifar.pickled_folder
    folder.mkdir(exist_ok=True)
    for file in files_of(cifar):
        (folder / file.pickled).write_bytes(python2_pickle(cifar, content[file.binary]))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_pickles_of_python_2_give_the_records_of_the_binary_files(name: str, tmp_path: Path) -> None:
    cifar = small(name)
    content = random_records(cifar)
    folder = write_pickles(cifar, tmp_path, content)
    # the hand-made pickle is one: the unrestricted reader agrees
    peer = pickle.loads((folder / cifar.test_file.pickled).read_bytes(), encoding="latin1")
    test = np.frombuffer(content[cifar.test_file.binary], np.uint8).reshape(-1, cifar.record_bytes)
    assert np.array_equal(peer["data"], test[:, len(cifar.label_limits) :])
    assert peer[cifar.label_keys[-1]] == test[:, len(cifar.label_limits) - 1].tolist()
    for root in (tmp_path, folder):
        dataset = load_cifar(cifar, root)
        assert records_of(dataset.train).tobytes() == b"".join(content[file.binary] for file in cifar.train_files)
        assert records_of(dataset.test).tobytes() == content[cifar.test_file.binary]
        assert "pickles" in dataset.source


@pytest.mark.parametrize("name", NAMES)
def test_the_python_archive_as_downloaded_gives_the_records_of_the_binary_files(name: str, tmp_path: Path) -> None:
    cifar = small(name)
    content = random_records(cifar)
    cifar, data = packed_pickles(cifar, content)
    path = tmp_path / f"cifar-{name.removeprefix('cifar')}-python.tar.gz"
    path.write_bytes(data)
    for root in (tmp_path, path):
        found = load_cifar(cifar, root, download=False)
        for split, files in ((found.train, cifar.train_files), (found.test, (cifar.test_file,))):
            expected = b"".join(content[file.binary] for file in files)
            assert records_of(split).tobytes() == expected
        assert found.source == f"{path} (pickles, sha256 {cifar.pickled_archive.sha256} verified)"
    for broken in (data[:-9], data[:5] + b"x" + data[6:], b"no archive"):
        path.write_bytes(broken)
        refused(cifar, tmp_path, str(path), cifar.pickled_archive.sha256)
    path.write_bytes(data)
    whole = packed(cifar, content)[0]
    write_binary_folder(cifar, tmp_path, content)
    assert "unpacked folder" in load_cifar(whole, tmp_path).source  # which needs no unpacking, and goes before


def test_coarse_labels_are_the_other_byte_of_the_records(tmp_path: Path) -> None:
    cifar = small("cifar100", 40)
    content = random_records(cifar)
    write_binary_folder(cifar, tmp_path, content)
    fine, coarse = (load_cifar(cifar, tmp_path, coarse=coarse) for coarse in (False, True))
    for split in ("train", "test"):
        records = np.frombuffer(content[f"{split}.bin"], np.uint8).reshape(-1, 3074)
        assert np.array_equal(coarse.splits[split].labels, records[:, 0])
        assert np.array_equal(fine.splits[split].labels, records[:, 1])
        assert np.array_equal(coarse.splits[split].images, fine.splits[split].images)
    assert (coarse.num_classes, fine.num_classes) == (20, 100)
    assert coarse.class_names[:2] == ("aquatic_mammals", "fish") and list(coarse.class_names) == sorted(
        coarse.class_names
    )


def test_the_key_for_the_labels_reaches_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("dali_pipeline.sources.cifar.load_cifar", lambda *a, coarse, **b: asked.append(coarse))
    for labels in ("fine", "coarse"):
        source_of(data_sections()["cifar100"](labels=labels)).load(Path(), download=False, say=None)  # type: ignore[call-arg]
    assert asked == [False, True]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("key", [str, str.encode])
@pytest.mark.parametrize("held", ["an array of its own", "a read-only view of bytes", "a slice"])
def test_pickles_of_python_3_are_read_too(tmp_path: Path, protocol: int, key: Any, held: str) -> None:
    """NumPy writes the three kinds of array differently in protocol 5."""
    cifar = small()
    content = random_records(cifar)
    folder = tmp_path / cifar.pickled_folder
    folder.mkdir()
    for file in files_of(cifar):
        rows = np.frombuffer(content[file.binary], np.uint8).reshape(-1, 3073)
        pixels = rows[:, 1:] if held == "a slice" else rows[:, 1:].copy()
        if held == "a read-only view of bytes":
            pixels = np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape)
        entries = {key("data"): pixels, key("labels"): rows[:, 0].tolist(), key("filenames"): ["a", "b"]}
        (folder / file.pickled).write_bytes(pickle.dumps(entries, protocol))
    assert records_of(load_cifar(cifar, tmp_path).test).tobytes() == content["test_batch.bin"]


class Payload:
    """Creates the file that it is given when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def deep(opcode: bytes) -> bytes:
    return b"\x80\x02}(" + b"N" + opcode * 50_000 + b"K\x01u."


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_payload_is_refused_and_never_runs(tmp_path: Path, protocol: int) -> None:
    cifar = small()
    content = random_records(cifar)
    folder = write_pickles(cifar, tmp_path, content)
    trap = tmp_path / "trap"
    data = pickle.dumps({"data": Payload(trap), "labels": [0] * 4}, protocol)
    pickle.loads(data)
    assert trap.exists()  # the payload works, were it admitted
    trap.unlink()
    (folder / "data_batch_2").write_bytes(data)
    refused(cifar, tmp_path, str(folder / "data_batch_2"), "not a CIFAR pickle")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"(S'true'\nios\nsystem\n.", "INST"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.", "_codecs.encode"),
        (b"\x80\x02c_codecs\nencode\n}b.", "no state"),
        (b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__code__Ns\x86b.", "no state"),
        (b"\x80\x02cnumpy\nndarray\n}b.", "__setstate__"),
        (b"\x80\x02cnumpy.core.numeric\n_frombuffer\n}b.", "no state"),
        (b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(NNNNtR.", "an array of a NoneType"),
        (b"\x80\x05\x96" + bytes([255] * 7) + b"\x7fx.", ""),  # a bytearray of 2^63 bytes
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index"),  # would have 32 GB of memo allocated
        (b"\x80\x02}p99999999999\n.", "memo index"),
        (b"\x80\x02" + b"\x8b\xff\xff\xff\x7f.", ""),
        (deep(b"\x85"), "TUPLE1"),
        (b"]" * 50_000 + b"a" * 49_999 + b".", "EMPTY_LIST"),
        (b"\x80\x02K\x01.", "int, expected a dict"),
        (b"\x80\x02}.", "no entry 'labels'"),
        (b"", "exhausted"),
        (b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", ""),
        (b"\x80\x09}.", "protocol"),
        (b"<!DOCTYPE html>", ""),
    ],
)
def test_a_hostile_or_damaged_pickle_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    cifar = small()
    folder = write_pickles(cifar, tmp_path, random_records(cifar))
    (folder / "test_batch").write_bytes(data)
    refused(cifar, tmp_path, str(folder / "test_batch"), reason)


def test_a_pickle_of_the_wrong_content_is_refused(tmp_path: Path) -> None:
    cifar = small()
    content = random_records(cifar)
    folder = write_pickles(cifar, tmp_path, content)
    rows = np.frombuffer(content["test_batch.bin"], np.uint8).reshape(-1, 3073)
    good = {"data": rows[:, 1:].copy(), "labels": rows[:, 0].tolist()}
    for change, expected in (
        ({"data": None}, "is not an array"),
        ({"data": good["data"][:3]}, "shape (3, 3072), expected (4, 3072)"),
        ({"data": good["data"].astype(np.int16)}, "uint8"),
        ({"data": np.asfortranarray(good["data"])}, "C order"),
        ({"data": good["data"].astype(object)}, "uint8"),
        ({"labels": [0, 1, 2]}, "list of 4 labels"),
        ({"labels": (0, 1, 2, 3)}, "list of 4 labels"),
        ({"labels": [0, 1, 2, 10]}, "record 3 has label 10, expected 0..9"),
        ({"labels": [0, -1, 2, 3]}, "record 1 has label -1"),
        ({"labels": [True, 1, 2, 3]}, "record 0 has label True"),
        ({"labels": [0.0, 1, 2, 3]}, "BINFLOAT"),
    ):
        (folder / "test_batch").write_bytes(pickle.dumps({**good, **change}, 4))
        refused(cifar, tmp_path, str(folder / "test_batch"), expected)
    (folder / "test_batch").write_bytes(bytes(10_000_000))
    refused(cifar, tmp_path, str(folder / "test_batch"), "10,000,000 bytes, expected at most")


# Statistics


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_std_equal_the_direct_computation(name: str, tmp_path: Path) -> None:
    cifar = small(name, 50)
    write_binary_folder(cifar, tmp_path, random_records(cifar))
    dataset = load_cifar(cifar, tmp_path)
    pixels = dataset.train.images.astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)
    assert dataset.fill == tuple(np.rint(pixels.mean(axis=(0, 1, 2))).astype(int))
    normalised = (pixels - dataset.mean) / dataset.std
    np.testing.assert_allclose(normalised.mean(axis=(0, 1, 2)), 0, atol=1e-9)
    np.testing.assert_allclose(normalised.std(axis=(0, 1, 2)), 1, rtol=1e-9)


def test_images_of_one_colour_are_refused(tmp_path: Path) -> None:
    cifar = small()
    write_binary_folder(cifar, tmp_path, {file.binary: bytes(4 * 3073) for file in files_of(cifar)})
    refused(cifar, tmp_path, "the red channel is the same")


def test_cifar10_constants_equal_the_published_figures() -> None:
    # of 0..1 pixels, as widely published to eight digits
    assert np.round(np.array(CIFAR10_MEAN) / 255, 8).tolist() == [0.49139968, 0.48215841, 0.44653091]
    assert np.round(np.array(CIFAR10_STD) / 255, 8).tolist() == [0.24703223, 0.24348513, 0.26158784]
    assert CIFAR10_PIXELS == 51_200_000


@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT names no folder with the official archive")
def test_cifar10_constants_equal_the_official_pixels() -> None:
    dataset = load(DataOptions(name="cifar10", root=os.environ["CIFAR_ROOT"], download=False))
    if "verified" not in dataset.source:
        pytest.skip("CIFAR_ROOT holds an unpacked folder, of which nobody knows whether it is the official one")
    sums = [dataset.train.images[..., channel].sum(dtype=np.int64) for channel in range(3)]
    assert tuple(int(total) / CIFAR10_PIXELS for total in sums) == CIFAR10_MEAN == dataset.mean
    assert dataset.std == CIFAR10_STD


def test_the_layouts_are_the_official_ones() -> None:
    for cifar, names in ((CIFARS["cifar10"], 10), (CIFARS["cifar100"], 100)):
        assert len(set(cifar.class_names)) == names == cifar.label_limits[-1]
        assert list(cifar.class_names) == sorted(cifar.class_names)
        assert sum(file.count for file in cifar.train_files) == 50_000 and cifar.test_file.count == 10_000
        assert re.fullmatch("[0-9a-f]{64}", cifar.archive.sha256)
        assert all(url.startswith("https://") and url.endswith(cifar.archive.name) for url in cifar.archive.urls)
    assert [CIFARS[name].record_bytes for name in NAMES] == [3073, 3074]


# Digits and synthetic


def test_digits_are_those_of_sklearn_split_by_every_fifth_of_a_class() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = load(DataOptions(name="digits"))
    seen: dict[int, int] = {}
    train, test = [], []
    for index, label in enumerate(bunch.target.tolist()):
        seen[label] = seen.get(label, 0) + 1
        (test if seen[label] % 5 == 0 else train).append(index)
    assert len(train) + len(test) == 1797 and not set(train) & set(test)
    for split, indices in ((dataset.train, train), (dataset.test, test)):
        assert split.labels.tolist() == bunch.target[indices].tolist()
        assert split.images.shape == (len(indices), 32, 32, 3)
        for image, original in zip(split.images, bunch.images[indices], strict=True):
            assert (image == image[..., :1]).all()
            # interpolation keeps the mean of each 4 x 4 block near its pixel, and the range
            assert image.max() <= original.max() * 255 / 16 + 1
        blocks = split.images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1)
        assert np.corrcoef(blocks, bunch.images[indices].reshape(-1))[0, 1] > 0.97
    for label in range(10):
        share = (dataset.test.labels == label).sum() / (bunch.target == label).sum()
        assert 0.19 < share <= 0.2
    assert dataset.class_names == tuple("0123456789") and not dataset.train.planar


def test_digits_are_upscaled_bilinearly() -> None:
    import torch

    small_images = np.random.default_rng(0).integers(0, 17, (50, 8, 8))
    peer = torch.nn.functional.interpolate(
        torch.from_numpy(small_images)[:, None].double(), size=(32, 32), mode="bilinear", align_corners=False
    )
    exact = peer[:, 0].numpy() * 255 / 16
    assert np.abs(_upscale(small_images) - exact).max() <= 0.5 + 1e-9


def test_digits_without_sklearn_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn, which cannot be imported"):
        load(DataOptions(name="digits"))


def synthetic_options(**keys: int) -> DataOptions:
    return data_sections()["synthetic"](**keys)  # type: ignore[arg-type]


def test_synthetic_is_reproducible_and_of_the_size_asked_for() -> None:
    first, again = (random_dataset(12, 7, 1000, seed=5) for _ in range(2))
    other = random_dataset(12, 7, 1000, seed=6)
    assert len(first.train) == 1000 and len(first.test) == 200 and first.train.images.shape == (1000, 12, 12, 3)
    assert np.array_equal(records_of(first.train), records_of(again.train))
    assert np.array_equal(records_of(first.test), records_of(again.test))
    assert not np.array_equal(records_of(first.train), records_of(other.train))
    assert not np.array_equal(records_of(first.train)[:200], records_of(first.test))
    assert set(first.train.labels.tolist()) == set(range(7)) and first.num_classes == 7
    np.testing.assert_allclose(first.mean, 127.5, atol=1)
    np.testing.assert_allclose(first.std, np.sqrt((256**2 - 1) / 12), atol=1)


def test_synthetic_classes_up_to_256_fit_the_label_byte() -> None:
    dataset = load(synthetic_options(synthetic_size=2, synthetic_classes=256, synthetic_count=20_000))
    assert set(dataset.train.labels.tolist()) == set(range(256))


@pytest.mark.parametrize("options", [{"size": 0}, {"classes": 257}, {"count": 0}, {"seed": -1}])
def test_synthetic_out_of_range_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match=f"is {next(iter(options.values()))}, expected"):
        random_dataset(**options)
    if "seed" not in options:
        with pytest.raises(DataError, match=f"is {next(iter(options.values()))}, expected"):
            load(synthetic_options(**{f"synthetic_{name}": value for name, value in options.items()}))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="'mnist', expected one of cifar10, cifar100, folder, npz, digits"):
        load(DataOptions(name="mnist"))


# Splits


@pytest.mark.parametrize(
    ("pixels", "labels", "planar", "words"),
    [
        (np.zeros((2, 48), np.uint8), np.zeros(2, np.int64), False, r"uint8 \(2, 48\), expected uint8 \(N, H, W, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, np.int64), False, r"\(2, 3, 4, 4\), .* with planar=True"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            np.zeros(2, np.int64),
            True,
            r"\(2, 4, 4, 3\), expected uint8 \(N, 3, H, W\)",
        ),
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int64), False, "float32"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            np.zeros(3, np.int64),
            False,
            r"labels are int64 \(3,\), expected int64 \(2,\)",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.uint8), False, "labels are uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 1), np.int64), False, r"labels are int64 \(2, 1\)"),
    ],
)
def test_a_split_of_inconsistent_sizes_is_refused(pixels: Any, labels: Any, planar: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Split(pixels, labels, planar=planar)


def both_layouts(count: int, height: int, width: int, seed: int = 0) -> tuple[Split, Split]:
    """The same random images in HWC order, and planar as a view of records."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, height, width, 3), np.uint8)
    labels = generator.integers(0, 1000, count)
    records = np.zeros((count, 2 + 3 * height * width), np.uint8)
    records[:, 2:] = images.transpose(0, 3, 1, 2).reshape(count, 3 * height * width)
    return Split(images, labels), Split(records[:, 2:].reshape(count, 3, height, width), labels, planar=True)


# a piece of the fingerprint holds 4 MiB, one of the histogram 1.5 MiB: several pieces, and images larger than a piece
@pytest.mark.parametrize(
    ("count", "height", "width"), [(0, 4, 4), (5, 3, 7), (7, 7, 3), (3000, 32, 24), (2, 1300, 1200)]
)
def test_the_order_of_the_axes_changes_neither_images_nor_statistics_nor_fingerprint(
    count: int, height: int, width: int
) -> None:
    images, planar = both_layouts(count, height, width)
    assert (images.height, images.width) == (planar.height, planar.width) == (height, width)
    assert len(images) == len(planar) == count
    assert np.array_equal(images.images, planar.images) and np.array_equal(images.images, images.pixels)
    for split in (images, planar):
        assert split.images.flags.c_contiguous and not np.shares_memory(split.images, split.pixels)
        counted = [np.bincount(images.pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
        assert np.array_equal(channel_histogram(split), counted)
    assert images.fingerprint == planar.fingerprint
    if count:
        first, second = (with_statistics("x", split, split, ("a",), "a test") for split in (images, planar))
        assert (first.mean, first.std, first.fill) == (second.mean, second.std, second.fill)


def test_the_fingerprint_is_that_of_shape_pixels_and_labels() -> None:
    split, _ = both_layouts(5, 4, 6)
    content = b"5 x 4 x 6 x 3" + split.images.tobytes() + split.labels.astype("<i8").tobytes()
    assert split.fingerprint == hashlib.sha256(content).hexdigest()
    pixels, labels = split.images, split.labels.copy()
    pixels[3, 1, 2, 0] ^= 1
    labels[4] += 1
    others = [
        Split(pixels, split.labels),
        Split(split.pixels, labels),
        Split(split.pixels.reshape(5, 6, 4, 3), split.labels),
    ]
    assert len({split.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_fingerprint_takes_no_second_copy_of_the_pixels() -> None:
    _, planar = both_layouts(20_000, 32, 32)  # 61 MB
    tracemalloc.start()
    try:
        assert len(planar.fingerprint) == 64
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


def mapped(tmp_path: Path, count: int = 60, planar: bool = False) -> tuple[Split, Split]:
    """The same random images in memory, and in a file that is only mapped."""
    shape = (count, 3, 8, 16) if planar else (count, 8, 16, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(count, dtype=np.int64) % 3
    pixels.tofile(tmp_path / "pixels")
    there = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=shape)
    return Split(pixels, labels, planar=planar), Split(there, labels, planar=planar)


@pytest.mark.parametrize("planar", [False, True])
def test_images_taken_from_a_memory_map_are_those_taken_from_memory_and_stay_in_the_file(
    tmp_path: Path, planar: bool
) -> None:
    ours, theirs = mapped(tmp_path, planar=planar)
    mask = np.random.default_rng(1).random(60) < 0.4
    for places in (mask, np.flatnonzero(mask)[::-1], slice(5, 40)):
        for then in (slice(None), slice(2, 9), np.array([3, 0, 3])):
            one, other = ours.take(places).take(then), theirs.take(places).take(then)
            assert isinstance(other.pixels, np.memmap) and len(one) == len(other)
            assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
            for asked in (0, np.int64(1), slice(1, 3), np.array([2, 0])):
                assert np.array_equal(other.images_on_demand[asked], one.images[asked])
            assert one.fingerprint == other.fingerprint
            assert np.array_equal(one.gather(slice(1, 3)), other.gather(slice(1, 3)))
            statistics = [with_statistics("x", split, split, ("a", "b", "c"), "a test") for split in (one, other)]
            assert statistics[0].mean == statistics[1].mean and statistics[0].std == statistics[1].std
            for mirrored in (False, True):
                resident = [
                    resident_images(split, torch.device("cpu"), border=2, mirrored=mirrored) for split in (one, other)
                ]
                assert torch.equal(*resident)


def test_what_a_source_has_noted_of_its_images_stands_in_for_reading_them(tmp_path: Path) -> None:
    ours, theirs = mapped(tmp_path)
    values = ours.images.astype(np.int64)
    digests = np.stack([np.frombuffer(hashlib.sha256(image).digest(), np.uint8) for image in ours.images])
    facts = Facts(digests, values.sum((1, 2)), (values**2).sum((1, 2)))
    silent = Split(np.zeros_like(theirs.pixels), ours.labels, facts=facts)  # whoever reads these pixels is wrong
    mask = np.random.default_rng(1).random(60) < 0.4
    for places in (slice(None), mask, slice(7, 50)):
        one, other = ours.take(places), silent.take(places).take(slice(None))
        statistics = [with_statistics("x", split, split, ("a", "b", "c"), "a test") for split in (one, other)]
        assert statistics[0].mean == statistics[1].mean and statistics[0].std == statistics[1].std
        for amount in (0.3, 6):
            assert np.array_equal(held_out(one, amount, 3), held_out(other, amount, 3))


# The registry of sources


@dataclass(frozen=True, kw_only=True)
class Stripes(Source):
    """A source as short as one can be: grey images, brighter from class to class."""

    stripes_count: int = key(6, "images", at_least=1, at_most=1000)

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        labels = np.arange(self.stripes_count) % 2
        pixels = np.broadcast_to((100 * labels + 10).astype(np.uint8)[:, None, None, None], (len(labels), 8, 8, 3))
        return with_statistics("stripes", Split(pixels, labels), Split(pixels, labels), ("dark", "bright"), str(root))


def test_a_source_of_ten_lines_is_one_row_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SOURCES, "stripes", Stripes)
    section = data_sections()["stripes"]
    assert set(typing.get_args(typing.get_type_hints(section)["name"])) == {*SOURCES} > {"digits", "stripes"}
    assert [f.name for f in dataclasses.fields(section)][-1] == "stripes_count"
    options = section(root="~", stripes_count=4)  # type: ignore[call-arg]
    assert options.name == "stripes"
    dataset = load(options, root=tmp_path)
    assert len(dataset.train) == 4 and dataset.class_names == ("dark", "bright") and dataset.source == str(tmp_path)
    assert dataset.mean == (60, 60, 60) and dataset.std == (50, 50, 50)
    assert load(options).source == str(Path.home())
    assert len(load(DataOptions(name="stripes")).train) == 6  # the key's default
    assert source_of(options).training_images() is None
    source_of(options).check()


def test_the_data_section_has_the_keys_of_its_source_alone() -> None:
    shared = [f.name for f in dataclasses.fields(DataOptions)]
    images = ["image_size", "resize", "test"]
    own = {
        "cifar100": ["labels"],
        "synthetic": ["synthetic_size", "synthetic_classes", "synthetic_count"],
        "folder": [*images, "table", "decoder", "on_error"],
        "npz": images,
    }
    assert data_sections().keys() == SOURCES.keys()
    for name, section in data_sections().items():
        assert [f.name for f in dataclasses.fields(section)] == [*shared, *own.get(name, [])]
        assert [f.name for f in dataclasses.fields(section) if name in f.metadata.get("sources", ())] == own.get(
            name, []
        )
        assert section().name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            section().name = "digits"  # type: ignore[misc]


@pytest.mark.parametrize("taken", ["root", "synthetic_size"])
def test_a_key_that_two_sources_declare_is_refused(monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    double = dataclasses.make_dataclass(
        "Double", [(taken, int, key(1, "a number"))], bases=(Stripes,), frozen=True, kw_only=True
    )
    monkeypatch.setitem(SOURCES, "double", double)
    with pytest.raises(ValueError, match=rf"data\.{taken} is a key of \w+"):
        data_sections()


def test_sources_know_their_number_of_training_images_without_reading() -> None:
    for name in NAMES:
        assert source_of(DataOptions(name=name, root="/nowhere")).training_images() == 50_000
    digits = source_of(DataOptions(name="digits"))
    assert digits.training_images() == len(load(DataOptions(name="digits")).train)
    assert source_of(synthetic_options(synthetic_count=321)).training_images() == 321


def test_a_synthetic_size_that_the_network_cannot_halve_is_refused_before_loading() -> None:
    source_of(synthetic_options(synthetic_size=40)).check()
    with pytest.raises(ValueError, match=r"data\.synthetic_size: 36 is no multiple of 8, as the network halves images"):
        source_of(synthetic_options(synthetic_size=36)).check()


def test_loading_may_be_told_not_to_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="downloading is switched off"):
        load(DataOptions(name="cifar10", root=str(tmp_path), download=True), download=False)


def test_importing_the_module_imports_no_heavy_package() -> None:
    code = (
        "import sys, dali_pipeline.sources, dali_pipeline.options, dali_pipeline.layout;"
        "print({'torch', 'nvidia', 'sklearn', 'tqdm', 'matplotlib', 'torchvision'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert output.stdout == "set()\n"


# Fuzzing


INTERESTING = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, b"q\x00", b"r\xff\xff\xff\xff")


def mutate(generator: random.Random, data: bytes) -> bytes:
    """One to eight flips, overwritten values, cuts, repetitions and digits changed, most of them near the beginning."""
    result = bytearray(data)
    for _ in range(generator.randint(1, 8)):
        if not result:
            break
        near = generator.random() < 0.5
        at = generator.randrange(min(len(result), 600) if near else len(result))
        match generator.randrange(7):
            case 0:
                result[at] ^= 1 << generator.randrange(8)
            case 1:
                result[at] = generator.randrange(256)
            case 2:
                value = generator.choice(INTERESTING)
                result[at : at + len(value)] = value
            case 3:
                del result[at : at + generator.choice((1, 2, 8, 512, 5000))]
            case 4:
                length = generator.choice((1, 4, 512, 3073))
                result[at:at] = result[at : at + length]
            case 5:
                result[at:at] = generator.choice(INTERESTING)
            case 6:
                if generator.random() < 0.2:
                    del result[at:]
    return bytes(result)


def with_checksums(tar: bytes) -> bytes:
    """A mutated tar whose header blocks are valid again, so that the reader goes on to what they say."""
    result = bytearray(tar)
    for start in range(0, len(result) - 511, 512):
        if result[start + 257 : start + 262] == b"ustar":
            block = bytes(result[start : start + 148]) + b" " * 8 + bytes(result[start + 156 : start + 512])
            result[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(result)


def fuzz(seed: int, seconds: float, root: Path) -> dict[str, int]:
    """Read mutated archives, folders and pickles: each gives a valid Dataset or a DataError. Returns the counts."""
    generator = random.Random(seed)
    layouts = [small(name, 1) for name in NAMES]
    contents = [random_records(cifar) for cifar in layouts]
    counts = {"read": 0, "refused": 0}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        index = generator.randrange(2)
        cifar, content = layouts[index], dict(contents[index])
        kind = generator.choice(("gzip", "tar", "binary", "pickle", "pickle"))
        victim = generator.choice(files_of(cifar))
        case = b""
        folder = Path(tempfile.mkdtemp(dir=root))
        if kind in ("gzip", "tar"):
            tar = tar_of(members_of(cifar, content))
            if kind == "tar":
                tar = mutate(generator, tar)
                tar = with_checksums(tar) if generator.random() < 0.7 else tar
            case = gzip.compress(tar, 1, mtime=0)
            if kind == "gzip":
                case = b"\x1f\x8b" + mutate(generator, case)[2:]
            cifar = with_archive(cifar, case)
            (folder / cifar.archive.name).write_bytes(case)
        elif kind == "binary":
            case = mutate(generator, content[victim.binary])
            write_binary_folder(cifar, folder, {**content, victim.binary: case})
        else:
            case = mutate(generator, python2_pickle(cifar, content[victim.binary]))
            (write_pickles(cifar, folder, content) / victim.pickled).write_bytes(case)
        try:
            dataset = load_cifar(cifar, folder, mirrors=[])
        except DataError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
        except BaseException as error:
            kept = root / f"{kind}-{seed}-{sum(counts.values())}"
            kept.write_bytes(case)
            raise AssertionError(f"{kind} case {kept} raised {type(error).__name__}: {error}") from error
        else:
            assert_valid(dataset, cifar)
            counts["read"] += 1
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    return counts


def assert_valid(dataset: Dataset, cifar: Cifar) -> None:
    for split, count in ((dataset.train, len(cifar.train_files)), (dataset.test, 1)):
        assert records_of(split).shape == (count, cifar.record_bytes)
        for column, limit in enumerate(cifar.label_limits):
            assert (records_of(split)[:, column] < limit).all()


def test_fuzzed_files_give_a_data_set_or_a_data_error(tmp_path: Path) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    counts = fuzz(seed, float(os.environ.get("FUZZ_SECONDS", "3")), tmp_path)
    print(f"fuzz, seed {seed}: {counts}")
    assert counts["read"] > 10 and counts["refused"] > 50

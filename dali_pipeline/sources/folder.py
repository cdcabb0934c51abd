"""A folder of your own images, or a table that names them.

    DIR/train/CLASS/...  DIR/test/CLASS/...  and perhaps  DIR/val/CLASS/...   (or valid, validation)
    DIR/train/CLASS/...  DIR/val/CLASS/...       without a test set val is the test set
    DIR/CLASS/...                                data.test of the images are held out as the test set
    (Train, TRAIN and training are train too, and so on)
    data.table=FILE.csv                          columns path, label and perhaps split (train, val, test)

Images are the files below CLASS, at any depth, of the kinds in SUFFIXES. Names that begin with a dot are passed over.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from dali_pipeline.dataset import DataError, Dataset, some
from dali_pipeline.errors import at_home
from dali_pipeline.options import key
from dali_pipeline.progress import Say
from dali_pipeline.regular import read_regular
from dali_pipeline.sources.own_images import SPLITS, Listing, OwnImages, assemble
from dali_pipeline.words import printable_path

if TYPE_CHECKING:
    from dali_pipeline.decoded import DecodedImages
    from dali_pipeline.image_files import Decoded

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# by the name of a folder, or in a table, in lower case
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LISTED = 200  # broken files that are left out: so many are named, a line each
MAX_DEPTH = 32  # folders below a class
LARGEST_TABLE = 1 << 30  # bytes


@dataclass(frozen=True, kw_only=True)
class Folder(OwnImages):
    """Image files in a folder for each class, or named by a table."""

    table: str | None = key(
        None, "CSV file with the columns path, label and perhaps split, in data.root; null: the folders are the classes"
    )
    decoder: Literal["cpu", "mixed"] = key(
        "cpu", "what decodes image files: cpu, to the same pixels everywhere, or mixed, nvJPEG on a GPU"
    )
    on_error: Literal["stop", "skip"] = key(
        "stop", "what becomes of files that cannot be read: stop before the training, or leave them out and list them"
    )

    def find(self, root: Path) -> Found:
        """The files, before any of them is opened. Raises DataError where they are no data set."""
        where = printable_path(root)
        if not root.is_dir():
            what = "is a file, expected a folder" if root.exists() else "no such folder"
            raise DataError(f"data.root: {where}: {what}; data.root=DIR names the folder of your images")
        try:
            if self.table is None:
                return _by_folder(root)
            return _by_table(root, at_home(self.table, "data.table", DataError))
        except OSError as error:
            raise DataError(f"{printable_path(error.filename or root)}: {error.strerror or error}") from None

    def decode(self, root: Path, found: Found, say: Say | None) -> tuple[DecodedImages, str]:
        """The files' images, in their order, and what decoded them. Raises DataError."""
        # here, as what decodes images is slow to import
        from dali_pipeline.decoded import Wanted, decoded_images
        from dali_pipeline.image_files import RULE, ImageFiles

        reader = ImageFiles(self.image_size, self.image_size, self.resize, self.decoder)

        def read(start: int, stop: int) -> Iterator[Decoded]:
            for batch in reader.read(found.paths.part(start, stop, below=root)):
                if reader.fallback and say:
                    say(f"WARNING: {reader.fallback}")
                    reader.fallback = None
                yield batch

        wanted = Wanted(
            key=f"{reader.version} {RULE} {self.resize} ".encode() + found.digest.digest(),
            count=len(found.paths),
            height=self.image_size,
            width=self.image_size,
            read=read,
            what=printable_path(root),
            beside=root,
        )
        return decoded_images(wanted, say), reader.version

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        where = printable_path(root)
        found = self.find(root)
        decoded, version = self.decode(root, found, say)
        count, listing = len(found.paths), found.listing()
        if decoded.problems:
            problems = list(decoded.problems.values())
            amount = f"{len(problems):,} of {count:,} files cannot be read"
            if self.on_error == "stop" or len(problems) == count:
                remedy = "mend or remove them"
                if len(problems) < count:
                    remedy += ", or leave them out by data.on_error=skip"
                raise DataError(f"{amount}: {some(problems)}; {remedy}")
            left = [f"{amount} and are left out:", *problems[:LISTED]]
            more = [f"and {len(problems) - LISTED:,} more"] if len(problems) > LISTED else []
            listing = replace(listing, notes=(*listing.notes, *left, *more))
        how = f"decoded by {version} into {printable_path(decoded.path)}"
        return assemble("folder", listing, decoded, self.test, where, how)


class Paths(Sequence[str]):
    """Many paths in little memory: their bytes in one piece."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, path: str) -> None:
        self._bytes += os.fsencode(path)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[single] for single in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return os.fsdecode(bytes(self._bytes[self._ends[place] : self._ends[place + 1]]))

    def part(self, start: int, stop: int, below: Path) -> Sequence[str]:
        """The paths from one place up to another, below a folder; looked up when they are asked for."""
        return _Part(self, start, stop, below)


class _Part(Sequence[str]):
    def __init__(self, paths: Paths, start: int, stop: int, below: Path) -> None:
        self._paths, self._places, self._below = paths, range(start, stop), below

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [str(self._below / self._paths[single]) for single in self._places[place]]
        return str(self._below / self._paths[self._places[place]])


@dataclass
class Found:
    """The files, in order, by their paths below the folder, with their labels and splits (places in SPLITS; without `has_test`
    the test set is still to be held out of those in train). `digest` is a hash of their paths, sizes and times of change."""

    class_names: tuple[str, ...]
    has_test: bool
    paths: Paths = field(default_factory=Paths)
    labels: array[int] = field(default_factory=lambda: array("q"))
    splits: bytearray = field(default_factory=bytearray)
    digest: Any = field(default_factory=hashlib.sha256)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, path: str, status: os.stat_result | None, label: int, split: str) -> None:
        self.paths.append(path)
        self.labels.append(label)
        self.splits.append(SPLITS.index(split))
        facts = b"gone" if status is None else b"%d %d" % (status.st_size, status.st_mtime_ns)
        self.digest.update(os.fsencode(path) + b"\0" + facts + b"\0")

    def listing(self) -> Listing:
        split = np.frombuffer(bytes(self.splits), np.uint8) if self.has_test else None
        labels = np.array(self.labels, np.int64)
        return Listing(labels, split, self.class_names, self.paths, tuple(self.notes), tuple(self.remarks))


# folders


def _by_folder(root: Path) -> Found:
    where, inside = printable_path(root), _folders(root)
    parts: dict[str, str] = {}  # by split, the folder
    notes, remarks = [], []
    named = {name: SPLIT_NAMES[name.lower()] for name in inside if name.lower() in SPLIT_NAMES}
    trains = [name for name, split in named.items() if split == "train"]
    if trains and (len(named) == len(inside) or training_folder(root) != root):
        for name in inside:
            if name not in named:
                remarks.append(f"{printable_path(name)}/ beside {trains[0]}/ is passed over")
            elif parts.setdefault(named[name], name) != name:
                raise DataError(f"{where}: holds both {parts[named[name]]}/ and {name}/; keep one of them")
        if "test" not in parts and "validation" in parts:
            parts["test"] = parts.pop("validation")
            notes.append(
                f"{where}: there is no test/, so {parts['test']}/ is the test set; best.pt is chosen on it, unless "
                "data.validation holds out other images for that"
            )
    elif inside and len(named) == len(inside):
        raise DataError(f"{where}: holds {'/ and '.join(inside)}/ but no train/")
    else:
        parts["train"] = ""
    classes = sorted({name for part in parts.values() for name in _folders(root / part)}, key=os.fsencode)
    if not classes:
        tree = printable_path(root / parts["train"])
        raise DataError(f"{tree}: holds no folder of a class; expected {tree}/CLASS/*.jpg, or data.table=FILE.csv")

    others: Counter[str] = Counter()
    loops: list[str] = []
    made = Found((), "test" in parts, notes=notes, remarks=remarks)
    for split, part in sorted(parts.items(), key=lambda item: SPLITS.index(item[0])):
        for label, name in enumerate(classes):
            found = images_below(root, f"{part}/{name}".lstrip("/"), others, loops)
            for path, status in sorted(found, key=lambda named: os.fsencode(named[0])):
                made.add(path, status, label, split)
    there = np.bincount(np.frombuffer(made.labels, np.int64), minlength=len(classes)) > 0
    names = [printable_path(name) for name in classes]
    made.class_names = _unique([name for name, some_are in zip(names, there, strict=True) if some_are], where)
    empty = [name for name, some_are in zip(names, there, strict=True) if not some_are]
    if len(empty) == len(classes):
        raise DataError(f"{where}: holds no image in {some(names)}; read are {', '.join(SUFFIXES)}")
    if empty:
        notes.append(f"{where}: no image in {some(empty)}: left out as classes")
        made.labels = array("q", (np.cumsum(there) - 1)[np.frombuffer(made.labels, np.int64)].tobytes())
    notes += not_followed(loops)
    remarks += passed_over(others)
    return made


def training_folder(root: Path) -> Path:
    """The folder of the training images' classes: train, however it is written, or else the root. A class may be called train
    too, as beside car and bus: it then holds images and no folders."""
    trains = [name for name in _folders(root) if SPLIT_NAMES.get(name.lower()) == "train"]
    return next((root / name for name in trains if _folders(root / name)), root)


def not_followed(loops: Sequence[str]) -> list[str]:
    """A line about links that `images_below` did not follow, where there are any."""
    return [f"links that lead back to a folder around them are not followed: {some(loops)}"] if loops else []


def passed_over(others: Counter[str]) -> list[str]:
    """A line about files that `images_below` passed over, where there are any."""
    kinds = [f"{count:,} {suffix}" for suffix, count in others.most_common()]
    return [f"files of other kinds are passed over: {some(kinds)}"] if kinds else []


def _unique(names: Sequence[str], where: str) -> tuple[str, ...]:
    again = [name for name, count in Counter(names).items() if count > 1]
    if again:
        raise DataError(f"{where}: two folders are both shown as {again[0]}; rename one of them")
    return tuple(names)


def _folders(path: Path) -> list[str]:
    """The folders in a folder, links to folders included, without hidden ones."""
    with os.scandir(path) as entries:
        return sorted((entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()), key=os.fsencode)


_Named = tuple[str, "os.stat_result | None"]


def images_below(root: Path, folder: str, others: Counter[str], loops: list[str]) -> Iterator[_Named]:
    """The images below a folder of the root, which may not exist, by their paths from the root; None for a link that leads
    nowhere. Files of other kinds are counted in `others` by their ending, `loops` receives links that are not followed."""
    around: list[tuple[int, int]] = []

    def below(folder: str) -> Iterator[_Named]:
        status = (root / folder).stat()
        if (status.st_dev, status.st_ino) in around or len(around) > MAX_DEPTH:
            loops.append(printable_path(folder))
            return
        around.append((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from below(f"{folder}/{entry.name}")
                elif entry.name.lower().endswith(SUFFIXES):
                    try:
                        yield f"{folder}/{entry.name}", entry.stat()
                    except OSError:
                        yield f"{folder}/{entry.name}", None
                else:
                    others[printable_path(Path(entry.name).suffix.lower()) or "without an ending"] += 1
        around.pop()

    if (root / folder).is_dir():
        yield from below(folder)


# tables


def _by_table(root: Path, table: Path) -> Found:
    path = root / table
    where = f"data.table: {printable_path(path)}"
    try:
        text = read_regular(path, LARGEST_TABLE).decode("utf-8-sig", "surrogateescape")
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; it is looked for in data.root") from None
    rows = csv.reader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count), strict=True
    )
    try:
        header = [column.strip().lower() for column in next(rows, [])]
        for column in ("path", "label"):
            if column not in header:
                raise DataError(
                    f"{where}: has no column {column}, but {', '.join(header) or 'none'}; expected path,label"
                )
        entries = _entries(rows, header, where)
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num}: {error}") from None
    classes = sorted({label for _, label, _ in entries.values()}, key=_natural)
    given = {split for _, _, split in entries.values()}
    made = Found(_unique([printable_path(name) for name in classes], where), "test" in given)
    if "test" not in given and "validation" in given:
        made.notes.append(f"{where}: names no test images, so those of val are the test set")
        made.has_test = True
    labels = {name: label for label, name in enumerate(classes)}
    order = sorted(
        entries.values(), key=lambda entry: (SPLITS.index(entry[2]), labels[entry[1]], os.fsencode(entry[0]))
    )
    for name, label, split in order:
        try:
            status = (root / name).stat()
        except (OSError, ValueError):
            status = None
        made.add(name, status, labels[label], "test" if split == "validation" and "test" not in given else split)
    return made


def _entries(rows: Any, header: Sequence[str], where: str) -> dict[str, tuple[str, str, str]]:
    """By path: path, label, split."""
    entries: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        line = f"{where}, line {rows.line_num}"
        if len(row) != len(header):
            raise DataError(f"{line}: {len(row)} columns, expected {len(header)} ({', '.join(header)})")
        cells = dict(zip(header, row, strict=True))
        path, label, split = cells["path"], cells["label"].strip(), cells.get("split", "train").strip().lower()
        if not path or not label:
            raise DataError(f"{line}: {'path' if label else 'label'} is empty")
        if split not in SPLIT_NAMES:
            raise DataError(f"{line}: split is {printable_path(split)!r}, expected train, val or test")
        if path in entries:
            raise DataError(f"{line}: {printable_path(path)} is named twice")
        entries[path] = (path, label, SPLIT_NAMES[split])
    if not entries:
        raise DataError(f"{where}: names no image")
    return entries


def _natural(label: str) -> tuple[int, str]:
    """Numbers by size, before words."""
    return (int(label), label) if label.isascii() and label.isdigit() and len(label) < 19 else (1 << 62, label)

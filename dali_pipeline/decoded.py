"""Decoded images on the disk: one file that is mapped into memory, made once and found again.

    pixels      uint8 (count, height, width, 3)
    records     RECORD (count,): the SHA-256 of each file, sums of its channels, what became of it
    problems    JSON, the files that could not be read; then its length and MAGIC

It lies in the folder .cifar-throughput beside the images or, where nothing can be written there, in the user's folder for
caches. Its name is a hash of all that its content depends on, so it is never out of date: other files, sizes, times or
settings mean another one. To clear: remove the folder.

While it is made it is called NAME.part; records are written after the pixels that they belong to are on the disk, so that the
next process goes on where a killed one stopped. A second process that wants the same waits for the first. NAME appears when
all is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import DataNotWritten, Facts, Pixels
from dali_pipeline.errors import cache_folder
from dali_pipeline.image_files import Decoded
from dali_pipeline.lock import NoLocks, is_still_at, try_lock
from dali_pipeline.progress import Meter, Say
from dali_pipeline.regular import open_regular
from dali_pipeline.words import printable_path

FOLDER = ".cifar-throughput"
MAGIC = b"decoded images 1"
# state: 0 not yet, 1 read, 2 could not be read
RECORD = np.dtype(
    [
        ("digest", "u1", 32),
        ("sums", "<i8", 3),
        ("squares", "<i8", 3),
        ("made", "u1"),
        ("state", "u1"),
        ("unused", "u1", 6),
    ]
)
SYNC_SECONDS = 2.0  # at most so much work is lost with a process that is killed


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be decoded: `count` images by `read`, which yields those from one place up to another in order.

    key: all that the pixels depend on. what: a few words for messages. beside: the folder of the images.
    """

    key: bytes
    count: int
    height: int
    width: int
    read: Callable[[int, int], Iterator[Decoded]]
    what: str
    beside: Path

    @property
    def name(self) -> str:
        head = f"{MAGIC!r} {self.count} {self.height} {self.width} ".encode()
        return f"{self.height}x{self.width}-{hashlib.sha256(head + self.key).hexdigest()[:32]}.pixels"

    @property
    def pixel_bytes(self) -> int:
        return self.count * self.height * self.width * 3

    @property
    def record_bytes(self) -> int:
        return self.count * RECORD.itemsize


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """The images in a file. pixels: a memory map (N, H, W, 3). facts: of the N images. made: (N,), sums of `images.Made`.
    problems: why an image could not be read, by its place."""

    path: Path
    pixels: Pixels
    facts: Facts
    made: npt.NDArray[np.uint8]
    problems: dict[int, str]


def decoded_images(wanted: Wanted, say: Say | None = None) -> DecodedImages:
    """The images, found on the disk or else decoded. Raises DataNotWritten where there is no room, or no place to
    write."""
    folders = [wanted.beside / FOLDER]
    if (caches := cache_folder()) is not None:
        # one for each folder of images: names, sizes and times in two of them can be equal
        whose = hashlib.sha256(os.fsencode(wanted.beside.resolve())).hexdigest()[:16]
        folders.append(caches / "decoded" / whose)
    for folder in folders:
        if (found := _open(folder / wanted.name, wanted)) is not None:
            if not _mended(found, wanted):
                return found
            with suppress(OSError):  # a folder that may only be read: then the next one
                found.path.unlink()
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(None, "is not writable")
            return _make(folder, wanted, Meter(f"decoding {wanted.what}", wanted.count, say, unit="images"))
        except OSError as error:
            reasons.append(f"{printable_path(folder)}: {error.strerror or error}")
    raise DataNotWritten(
        f"{wanted.what}: there is no place to keep {_size(wanted)} of decoded images ({'; '.join(reasons)}); "
        "XDG_CACHE_HOME=DIR names a folder that can be written to"
    )


def _mended(found: DecodedImages, wanted: Wanted) -> bool:
    """Whether an image can be read by now that could not: permissions and failures of a network leave a file's size and time as
    they were."""
    return any(not batch.problems for place in found.problems for batch in wanted.read(place, place + 1))


def _size(wanted: Wanted) -> str:
    size = wanted.pixel_bytes + wanted.record_bytes
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _open(path: Path, wanted: Wanted) -> DecodedImages | None:
    """The images in a finished file; None where there is none, or a damaged one."""
    end = wanted.pixel_bytes + wanted.record_bytes
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < end + 8 + len(MAGIC):
                return None
            file.seek(size - 8 - len(MAGIC))
            length, magic = int.from_bytes(file.read(8), "little"), file.read()
            if magic != MAGIC or end + length + 8 + len(MAGIC) != size:
                return None
            file.seek(end)
            problems = {int(place): str(why) for place, why in json.loads(file.read(length)).items()}
        shape = (wanted.count, wanted.height, wanted.width, 3)
        pixels = np.memmap(path, np.uint8, "r", shape=shape)
        records = np.memmap(path, RECORD, "r", offset=wanted.pixel_bytes, shape=(wanted.count,))
    except (OSError, ValueError, AttributeError):
        return None
    facts = Facts(records["digest"], records["sums"], records["squares"])
    return DecodedImages(path, pixels, facts, records["made"], problems)


def _make(folder: Path, wanted: Wanted, meter: Meter) -> DecodedImages:
    path = folder / wanted.name
    try:
        file = _open_locked(path, wanted, meter)
        if file is not None:
            with file:
                _check_room(path, wanted, file, meter)
                try:
                    _fill(file, wanted, meter)
                except OSError as error:
                    kept = "what was decoded so far is kept, and the next start goes on from there"
                    raise DataNotWritten(
                        f"{printable_path(path)}: cannot be written: {error.strerror or error}; {kept}"
                    ) from error
                if sys.platform == "win32":
                    file.close()
                with suppress(FileNotFoundError):  # without locks another process may have been faster
                    _part(path).replace(path)
    finally:
        meter.close()
    found = _open(path, wanted)
    if found is None:
        raise DataNotWritten(f"{printable_path(path)}: vanished as soon as it was made; start again")
    return found


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _open_locked(path: Path, wanted: Wanted, meter: Meter) -> FileIO | None:
    """The unfinished file, open and locked; None where another process has finished it."""
    waiting = False
    while _open(path, wanted) is None:
        file = open_regular(_part(path))
        try:
            locked = try_lock(file)
        except NoLocks as error:
            meter.say(f"{printable_path(path.parent)}: nothing can be locked on this file system ({error.strerror})")
            return file
        except OSError:
            file.close()
            raise
        if locked and is_still_at(file, _part(path)):
            return file
        file.close()
        if not locked:
            if not waiting:
                meter.say(f"{wanted.what}: another process is decoding the same images; waiting for it")
            waiting = True
            time.sleep(0.2)
    return None


def _check_room(path: Path, wanted: Wanted, file: FileIO, meter: Meter) -> None:
    meter.say(f"decoding {wanted.what} once: {wanted.count:,} images, {_size(wanted)} in {printable_path(path.parent)}")
    there = getattr(os.fstat(file.fileno()), "st_blocks", 0) * 512
    free = shutil.disk_usage(path.parent).free
    if wanted.pixel_bytes + wanted.record_bytes - there > free:
        raise DataNotWritten(
            f"{printable_path(path.parent)}: {_size(wanted)} of decoded images do not fit, {free / 1e6:,.1f} MB are free; "
            "make room or lower data.image_size"
        )


def _fill(file: FileIO, wanted: Wanted, meter: Meter) -> None:
    """Decode what is missing, and finish the file."""
    end = wanted.pixel_bytes + wanted.record_bytes
    if file.seek(0, os.SEEK_END) != end:
        file.truncate(end)
    states = np.memmap(file, RECORD, "r", offset=wanted.pixel_bytes, shape=(wanted.count,))["state"]
    done = int(np.argmin(states != 0)) if not states.all() else wanted.count
    problems: dict[int, str] = {}
    for place in np.flatnonzero(states[:done] == 2).tolist():  # only their number was kept
        (batch,) = wanted.read(place, place + 1)
        if not batch.problems:  # it can be read by now: go on from there
            done = place
            break
        problems[place] = batch.problems[0]
    del states
    if done:
        meter.say(f"decoding {wanted.what}: {done:,} images are there already")
    pending: list[npt.NDArray[np.void]] = []
    last = time.monotonic()
    try:
        for batch in wanted.read(done, wanted.count):
            _write(file, done * (wanted.pixel_bytes // wanted.count), batch.pixels)
            pending.append(_records(batch))
            problems |= {done + place: why for place, why in batch.problems.items()}
            done += len(batch.pixels)
            meter.show(done)
            if time.monotonic() - last >= SYNC_SECONDS:
                _sync(file, wanted, pending, done)
                last = time.monotonic()
    finally:
        _sync(file, wanted, pending, done)
    tail = json.dumps(problems).encode()
    _write(file, end, tail + len(tail).to_bytes(8, "little") + MAGIC)
    os.fsync(file.fileno())


def _records(batch: Decoded) -> npt.NDArray[np.void]:
    records = np.zeros(len(batch.pixels), RECORD)
    rows = batch.pixels.reshape(*batch.pixels.shape[:2], -1)
    records["digest"] = batch.digests
    for name, values in (("sums", rows), ("squares", np.square(rows, dtype=np.uint16))):
        # over the rows of an image first: along memory, that is ten times as fast
        records[name] = values.sum(1, dtype=np.uint32).reshape(len(rows), -1, 3).sum(1, dtype=np.int64)
    records["made"] = batch.made
    records["state"] = 1
    records["state"][list(batch.problems)] = 2
    return records


def _sync(file: FileIO, wanted: Wanted, pending: list[npt.NDArray[np.void]], done: int) -> None:
    """Write the records of the images up to `done`, once their pixels are on the disk."""
    if pending:
        os.fsync(file.fileno())
        records = np.concatenate(pending)
        _write(file, wanted.pixel_bytes + (done - len(records)) * RECORD.itemsize, records)
        pending.clear()


def _write(file: FileIO, place: int, content: npt.NDArray[np.generic] | bytes) -> None:
    file.seek(place)
    view = memoryview(content).cast("B") if isinstance(content, bytes) else content.reshape(-1).view(np.uint8).data
    while view:
        view = view[file.write(view) :]

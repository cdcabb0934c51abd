"""A NumPy file of images and labels, as those of MedMNIST: data.root=FILE.npz, or a folder that holds one such file.

    train_images train_labels  test_images test_labels  and perhaps  val_images val_labels
    x_train y_train  x_test y_test     the same as Keras names it
    images labels                      data.test of the images are held out as the test set

Images are uint8 (N, H, W), greyscale, or (N, H, W, 3); labels whole numbers (N,) or (N, 1). Arrays are read a piece at a time
and never held whole.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import DataError, Dataset, Labels
from dali_pipeline.progress import Say
from dali_pipeline.sources.own_images import SPLITS, Listing, OwnImages, assemble
from dali_pipeline.words import printable_path

if TYPE_CHECKING:
    from dali_pipeline.image_files import Decoded
    from dali_pipeline.images import Resize

# by split, the names of images and labels; the first that are there count
NAMES = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val"), ("valid_images", "valid_labels")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
PIECE_BYTES = 8 << 20
BROKEN = (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, zlib.error)


class Npz(OwnImages):
    """Images and labels in one .npz file."""

    def load(self, root: Path, *, download: bool, say: Say | None) -> Dataset:
        # here, as what decodes images is slow to import
        from PIL import __version__ as pillow_version

        from dali_pipeline.decoded import Wanted, decoded_images

        path = _file(root)
        where = printable_path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                parts = _parts(archive, where)
                labels = [_labels(archive, part, where) for part in parts]
                # sizes and times of two files can be equal, as of the folds of a cross-validation that one archive held
                sums = [archive.getinfo(f"{part.images}.npy").CRC for part in parts]
            status = path.stat()
        except BROKEN as error:
            raise DataError(f"{where}: no NumPy file that can be read: {error}") from None

        def read(start: int, stop: int) -> Iterator[Decoded]:
            try:
                yield from _images(path, parts, start, stop, self.image_size, self.resize)
            except BROKEN as error:
                raise DataError(f"{where}: damaged: {error}") from None

        count = sum(part.shape[0] for part in parts)
        if not count:
            raise DataError(f"{where}: holds no image: {parts[0].images} is {parts[0].shape}")
        facts = f"{status.st_size} {status.st_mtime_ns} {sums} {parts}"
        wanted = Wanted(
            key=f"npz Pillow {pillow_version} {self.resize} {facts}".encode(),
            count=count,
            height=self.image_size,
            width=self.image_size,
            read=read,
            what=where,
            beside=path.parent,
        )
        decoded = decoded_images(wanted, say)
        return assemble(
            "npz", _listing(parts, labels, where), decoded, self.test, where, f"kept in {printable_path(decoded.path)}"
        )


class _Part(NamedTuple):
    """The arrays of one split, by their names; shape: of the images."""

    split: str
    images: str
    labels: str
    shape: tuple[int, ...]


def _file(root: Path) -> Path:
    where = f"data.root: {printable_path(root)}"
    if root.is_dir():
        found = sorted(root.glob("*.npz"))
        if len(found) != 1:
            names = ", ".join(printable_path(path.name) for path in found[:5])
            held = f"holds {len(found)} ({names})" if found else "holds none"
            raise DataError(f"{where}: {held}; data.root=FILE.npz names the file")
        return found[0]
    if not root.is_file():
        raise DataError(
            f"{where}: {'no regular file' if root.exists() else 'no such file'}; data.root=FILE.npz names it"
        )
    return root


def _parts(archive: zipfile.ZipFile, where: str) -> list[_Part]:
    held = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    parts = []
    for split, pairs in NAMES.items():
        for images, labels in pairs:
            if {images, labels} <= held:
                parts.append(_Part(split, images, labels, _shape(archive, images, where)))
                break
    if not any(part.split == "train" for part in parts):
        expected = "expected train_images and train_labels, or images and labels"
        raise DataError(f"{where}: holds {', '.join(sorted(held)) or 'no array'}; {expected}")
    return parts


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, Fortran order and type of the array that the stream goes on with."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _shape(archive: zipfile.ZipFile, name: str, where: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as stream:
        shape, fortran, dtype = _header(stream)
    said = f"{where}: {name} is {dtype} {shape}"
    if dtype != np.uint8:
        raise DataError(f"{said}; images must be uint8, 0..255")
    if len(shape) == 5 or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise DataError(f"{said}: three-dimensional images or more channels; expected (N, H, W) or (N, H, W, 3)")
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        raise DataError(f"{said}; expected (N, H, W) or (N, H, W, 3)")
    if fortran:
        raise DataError(f"{said} in Fortran's order; save numpy.ascontiguousarray of it")
    return shape


def _labels(archive: zipfile.ZipFile, part: _Part, where: str) -> Labels:
    with archive.open(f"{part.labels}.npy") as stream:
        shape, _, dtype = _header(stream)
        said = f"{where}: {part.labels} is {dtype} {shape}"
        if dtype.kind not in "iu":
            raise DataError(f"{said}; labels must be whole numbers")
        if len(shape) == 2 and shape[1] > 1:
            raise DataError(f"{said}: several labels an image, which no training here takes; expected (N,) or (N, 1)")
        if shape not in ((part.shape[0],), (part.shape[0], 1)):
            raise DataError(f"{said}, but {part.images} {part.shape}; expected a label for each image")
        content = stream.read(part.shape[0] * dtype.itemsize)
    return np.frombuffer(content, dtype, part.shape[0]).astype(np.int64)


class _Names(Sequence[str]):
    """The images' names for messages, such as train_images[7]."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(part.shape[0] for part in self._parts)

    def __getitem__(self, place: Any) -> Any:
        for part in self._parts:
            if place < part.shape[0]:
                return f"{part.images}[{place}]"
            place -= part.shape[0]
        raise IndexError(place)


def _listing(parts: list[_Part], labels: list[Labels], where: str) -> Listing:
    together = np.concatenate(labels)
    values, places = np.unique(together, return_inverse=True)
    splits = [part.split for part in parts]
    notes = []
    if "test" not in splits and "validation" in splits:
        notes.append(f"{where}: there are no test images, so those of val are the test set")
        splits[splits.index("validation")] = "test"
    numbers = [np.full(part.shape[0], SPLITS.index(split), np.uint8) for part, split in zip(parts, splits, strict=True)]
    return Listing(
        places.astype(np.int64),
        np.concatenate(numbers) if "test" in splits else None,
        tuple(str(value) for value in values.tolist()),
        _Names(parts),
        tuple(notes),
    )


def _images(path: Path, parts: list[_Part], start: int, stop: int, size: int, resize: Resize) -> Iterator[Decoded]:
    """The images from one place up to another, over all splits; a compressed array is read from its beginning."""
    from dali_pipeline.image_files import Decoded, cpu_threads

    first = 0
    with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(cpu_threads()) as workers:
        for part in parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            first += part.shape[0]
            if low >= high:
                continue
            each = int(np.prod(part.shape[1:]))
            with archive.open(f"{part.images}.npy") as stream:
                _header(stream)
                stream.seek(low * each, 1)
                step = max(1, min(PIECE_BYTES // each, PIECE_BYTES // (3 * size * size)))
                for place in range(low, high, step):
                    count = min(step, high - place)
                    raw = np.frombuffer(stream.read(count * each), np.uint8).reshape(count, *part.shape[1:3], -1)
                    images = workers.map(lambda image: _fit(image, size, resize), raw)
                    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in raw)
                    pixels = np.stack(list(images))
                    yield Decoded(
                        pixels, np.frombuffer(digests, np.uint8).reshape(-1, 32), np.zeros(count, np.uint8), {}
                    )


def _fit(image: npt.NDArray[np.uint8], size: int, resize: Resize) -> npt.NDArray[np.uint8]:
    from PIL import Image

    from dali_pipeline.images import fit_rgb

    return fit_rgb(Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)).copy()), size, size, resize)

"""Many image files as pixels of one size: plain JPEG and PNG by NVIDIA DALI where it is installed, everything else by Pillow.

DALI's CPU decoder gives Pillow's pixels, bit for bit, for the files that dali_pipeline/image_header.py admits, and
everything is cut and resized by dali_pipeline/images.py. So the pixels of a whole file depend neither on the machine nor on what
is installed; only nvJPEG ("mixed", on a GPU) rounds differently.

An error makes a DALI pipeline unusable and does not say which file it was: then the pipeline is built anew, the files of the
batch are decoded one by one, and Pillow has the last word on those that DALI refuses. DALI 2.4 can even crash the process where
it refuses one file while it decodes others, so a file that it may refuse is left to Pillow from the start: image_header.py walks
through every segment of a JPEG file and checks the sums of a PNG file. Of other kinds, such as WebP and TIFF, only decoding tells
whether they are whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL import __version__ as pillow_version

from dali_pipeline.dataset import DataError, Pixels
from dali_pipeline.image_header import plain_size
from dali_pipeline.images import ImageError, Resize, check_area, decode_image, fit_rgb, quiet, read_bytes

Decoder = Literal["cpu", "mixed"]

# A batch ends where it reaches one of these: a photograph may decode to 40 MB.
BATCH_FILES, BATCH_BYTES, BATCH_PIXELS = 256, 64 << 20, 40_000_000
RULE = 2  # raised where the pixels of some file change while the libraries stay: images that are kept are then decoded anew
WORTH_DALI = 64  # files from which on importing DALI and building its pipeline pays
_DISTRIBUTIONS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110")


@dataclass(frozen=True, eq=False)
class Decoded:
    """n files in their order. pixels: uint8 (n, H, W, 3), black where a file could not be read. digests: uint8 (n, 32), the
    SHA-256 of each file. made: (n,), what the rule made of them, a sum of `Made`. problems: by its place, why a file could not
    be read."""

    pixels: Pixels
    digests: npt.NDArray[np.uint8]
    made: npt.NDArray[np.uint8]
    problems: dict[int, str]


class _File(NamedTuple):
    path: str
    data: bytes
    pixels: int  # height x width where the file is of a plain kind, else 0
    problem: str | None


class ImageFiles:
    """Reads image files as pixels (height, width, 3) by the rule of dali_pipeline/images.py.

    `version` names what decodes: other versions may give other pixels. `fallback` says, once files were read, why DALI had no
    part in it.
    """

    def __init__(self, height: int, width: int, resize: Resize = "crop", decoder: Decoder = "cpu") -> None:
        self._shape = (height, width)
        self._resize = resize
        self._decoder = decoder
        self._threads = cpu_threads()
        self._dali: _Dali | None = None
        self.version = ", ".join([*_dali_version(decoder), f"Pillow {pillow_version}"])
        self.fallback: str | None = None

    def read(self, paths: Sequence[str]) -> Iterator[Decoded]:
        """Yields the files, at most a few hundred at a time; while they are decoded the next ones are read from the disk. Raises
        DataError for the decoder `mixed` where there is no GPU."""
        self._open_dali(len(paths))
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(self._threads) as workers:
            at_most = max(1, min(BATCH_FILES, BATCH_BYTES // (3 * self._shape[0] * self._shape[1])))
            done, coming = 0, ahead.submit(_next_batch, paths[:at_most])
            while batch := coming.result():
                done += len(batch)
                coming = ahead.submit(_next_batch, paths[done : done + at_most])
                with quiet():
                    found = self._decode(batch, workers)
                yield found

    def _open_dali(self, count: int) -> None:
        if self._dali is not None:
            return
        if self._decoder == "mixed":
            self._dali = _Dali(self._threads, mixed=True)
        elif count >= WORTH_DALI:
            try:
                self._dali = _Dali(self._threads, mixed=False)
            except Exception as error:  # ImportError where it is missing, RuntimeError and others where it cannot run
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.fallback = f"DALI cannot decode here ({reason}); Pillow does it, more slowly, to the same pixels"

    def _decode(self, batch: Sequence[_File], workers: Executor) -> Decoded:
        pixels = np.zeros((len(batch), *self._shape, 3), np.uint8)
        made = np.zeros(len(batch), np.uint8)
        problems: dict[int, str] = {}
        plain = [place for place, file in enumerate(batch) if file.pixels] if self._dali is not None else []

        def fit(place: int, image: Pixels) -> None:
            if image.shape[:2] == self._shape:
                pixels[place] = image
            else:
                pixels[place] = fit_rgb(Image.fromarray(image), *self._shape, self._resize)

        def by_pillow(place: int) -> None:
            file = batch[place]
            try:
                if file.problem is not None:
                    raise ImageError(file.problem)
                pixels[place], made[place] = decode_image(file.data, file.path, *self._shape, self._resize)
            except ImageError as error:
                problems[place] = str(error)

        images = self._dali.decode([batch[place].data for place in plain]) if self._dali is not None and plain else []
        read = {place: image for place, image in zip(plain, images, strict=True) if image is not None}
        if all(image.shape[:2] == self._shape for image in read.values()):
            for place, image in read.items():
                pixels[place] = image
        else:
            list(workers.map(fit, read, read.values()))
        list(workers.map(by_pillow, [place for place in range(len(batch)) if place not in read]))
        digests = b"".join(hashlib.sha256(file.data).digest() for file in batch)
        return Decoded(pixels, np.frombuffer(digests, np.uint8).reshape(-1, 32), made, dict(sorted(problems.items())))


def cpu_threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next_batch(paths: Sequence[str]) -> list[_File]:
    """The first of the files, as many as make a batch."""
    batch: list[_File] = []
    size = pixels = 0
    for path in paths:
        try:
            file = _look(path)
        except ImageError as error:
            file = _File(path, b"", 0, str(error))
        batch.append(file)
        size, pixels = size + len(file.data), pixels + file.pixels
        if size >= BATCH_BYTES or pixels >= BATCH_PIXELS:
            break
    return batch


def _look(path: str) -> _File:
    """The file, and whether it is of a plain kind and not too large."""
    data = read_bytes(path)
    height, width = plain_size(data) or (0, 0)
    try:
        check_area(width, height)
    except Image.DecompressionBombError:
        return _File(path, data, 0, None)  # Pillow refuses it, and says so
    return _File(path, data, height * width, None)


def _dali_version(decoder: Decoder) -> list[str]:
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return [f"nvJPEG of DALI {version}" if decoder == "mixed" else f"DALI {version}"]
    return []


class _Dali:
    """DALI's image decoder."""

    def __init__(self, threads: int, *, mixed: bool) -> None:
        from dali_pipeline.dali import import_dali

        self._device = None
        if mixed:
            import torch

            if not torch.cuda.is_available():
                raise DataError(
                    "data.decoder=mixed: decodes on a GPU, and torch finds none here; data.decoder=cpu needs none"
                )
            self._device = torch.cuda.current_device()
        self._dali, self._fn = import_dali()
        self._threads = threads
        self._pipe = self._build()

    def _build(self) -> Any:
        pipe = self._dali.Pipeline(
            batch_size=BATCH_FILES, num_threads=self._threads, device_id=self._device, prefetch_queue_depth=1
        )
        with pipe:
            files = self._fn.external_source(name="files", dtype=self._dali.types.UINT8, ndim=1, no_copy=True)
            device = "cpu" if self._device is None else "mixed"
            pipe.set_outputs(self._fn.decoders.image(files, device=device, output_type=self._dali.types.RGB))
        pipe.build()
        return pipe

    def decode(self, files: Sequence[bytes]) -> list[Pixels | None]:
        """Each file as (height, width, 3), turned as EXIF says; None where DALI refuses it. Valid until the next call."""
        try:
            return list(self._run(files))
        except RuntimeError:
            self._pipe = self._build()
        found: list[Pixels | None] = []
        for file in files:
            try:
                found.append(self._run([file])[0].copy())
            except RuntimeError:
                found.append(None)
                self._pipe = self._build()
        return found

    def _run(self, files: Sequence[bytes]) -> list[Pixels]:
        self._pipe.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        (images,) = self._pipe.run()
        if self._device is not None:
            images = images.as_cpu()
        return [np.asarray(images[place]) for place in range(len(files))]

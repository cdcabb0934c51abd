"""Image files as RGB pixels of one size: the rule by which a folder of images is trained on and analysis.predict reads files.

- What Exif says of the orientation is carried out, or XMP where Exif says nothing.
- Greyscale, palettes, CMYK and other colours become RGB. Transparent parts become white.
- 16 bits a channel: the upper eight are kept. Of floating-point files, values lie between 0 and 1 where none is above 1, else
  between 0 and 255 where none is above 255, else between 0 and 65535, and are scaled to 0 to 255. A file with values outside,
  negative ones or NaN is refused.
- Of several frames or pages, the first.
- The middle is cut out in the wanted proportions ("crop": the short side decides), or the image is stretched to them ("squash");
  then it is resized, bicubically and with antialiasing. An image of the right size stays as it is.

dali_pipeline/image_files.py lets DALI decode most kinds; the pixels are the same, bit for bit.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dali_pipeline.dataset import Pixels
from dali_pipeline.errors import UserError
from dali_pipeline.regular import NotARegularFile, TooLarge, read_regular
from dali_pipeline.words import printable_path

Resize = Literal["crop", "squash"]
LARGEST_FILE = 1 << 30  # bytes


class Made(IntFlag):
    """What the rule had to make of a file, beyond converting between colour spaces of 8 bits."""

    OPAQUE = 1
    EIGHT_BITS = 2
    FIRST_FRAME = 4


class ImageError(UserError):
    """A file or object that cannot be read as an image. The message is one line that names it."""


def read_image(path: str | os.PathLike[str], height: int, width: int, resize: Resize = "crop") -> Pixels:
    """A file as (height, width, 3) uint8. Raises ImageError."""
    with quiet():
        return decode_image(read_bytes(path), path, height, width, resize)[0]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file. Raises ImageError."""
    try:
        return read_regular(Path(path), LARGEST_FILE)
    except FileNotFoundError:
        raise ImageError(f"{printable_path(path)}: no such file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, NotARegularFile) and Path(path).is_dir():
            reason = f"is a folder; give the images in it, {printable_path(path)}/*"
        elif not isinstance(error, (NotARegularFile, TooLarge)):
            reason = f"cannot be read: {reason}"
        raise ImageError(f"{printable_path(path)}: {reason}") from None
    except ValueError as error:  # a name with a zero byte
        raise ImageError(f"{printable_path(path)}: cannot be read: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow's warnings are not shown inside the block. It acts on all threads, and is entered by one at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode_image(
    data: bytes, path: str | os.PathLike[str], height: int, width: int, resize: Resize = "crop"
) -> tuple[Pixels, Made]:
    """The content of an image file by Pillow, within `quiet`: (height, width, 3) uint8, and what had to be made of it for that.
    Raises ImageError, which names `path`."""
    if not data:
        raise ImageError(f"{printable_path(path)}: is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            check_area(*opened.size)
            made = Made.FIRST_FRAME if getattr(opened, "is_animated", False) else Made(0)
            if opened.mode[0] in "IF":
                made |= Made.EIGHT_BITS
            if _transparent(opened):
                made |= Made.OPAQUE
            return fit_image(opened, height, width, resize), made
    except UnidentifiedImageError:
        raise ImageError(f"{printable_path(path)}: is no image, or of a kind that Pillow does not read") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{printable_path(path)}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels; shrink it first"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like for a damaged file
        raise ImageError(f"{printable_path(path)}: cannot be read as an image: {_reason(error)}") from None


def check_area(width: int, height: int) -> None:
    """Raises Image.DecompressionBombError for an image of more pixels than Pillow warns of."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


def fit_image(image: Image.Image, height: int, width: int, resize: Resize = "crop") -> Pixels:
    """An image by the rule above, (height, width, 3) uint8. Raises Pillow's errors."""
    return fit_rgb(_to_rgb(_upright(image)), height, width, resize)


def fit_rgb(image: Image.Image, height: int, width: int, resize: Resize = "crop") -> Pixels:
    """An RGB image cut and resized, (height, width, 3) uint8."""
    if resize == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    else:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its orientation says; Exif that cannot be read says nothing. ImageOps.exif_transpose turns it the same,
    but refuses such a file, and where it turns writes Exif anew, which raises for values that Pillow reads and cannot write."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        turn = None
    return image if turn is None else image.transpose(turn)


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _in_range(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values; ValueError unless they are all numbers from 0 to 65535."""
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no finite numbers (NaN or infinity)")
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"its values lie between {low:g} and {high:g}, expected 0 to 1, 0 to 255 or 0 to 65535")
    return values


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((_in_range(np.asarray(image)).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = _in_range(np.asarray(image, np.float64))
        highest = next(limit for limit in (1, 255, 65535) if values.max() <= limit)
        image = Image.fromarray((values * (255 / highest)).astype(np.uint8))
    if _transparent(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")

"""Image files of the user: the range of floating-point pixels by the written rule, and decoders that raise what they like."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from dali_pipeline.image_files import ImageFiles
from dali_pipeline.images import ImageError, read_image

RAISED: list[Exception] = [
    RuntimeError("Failed to decode image: Invalid AVIF"),
    struct.error("unpack requires a buffer of 4 bytes"),
    SyntaxError("broken PNG file"),
    KeyError(7),
    IndexError("list index out of range"),
    AssertionError(),
    ZeroDivisionError("division by zero"),
    AttributeError("'NoneType' object has no attribute 'read'"),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("ascii", b"\xff", 0, 1, "ordinal not in range"),
    NotImplementedError("two\nlines"),
    StopIteration(),
]


class _Odd(ImageFile.ImageFile):
    """A kind of image whose decoder raises the error of the number in the file: odd ones when opened, even ones when read."""

    format = "ODD"

    def _open(self) -> None:
        content = self.fp.read()  # type: ignore[union-attr]
        self._number = content[3]
        self._mode, self._size = "RGB", (32, 32)
        if self._number % 2:
            raise RAISED[self._number]

    def load(self) -> Any:
        raise RAISED[self._number]


@pytest.fixture
def odd_kind() -> Iterator[None]:
    Image.init()
    kinds, order = dict(Image.OPEN), list(Image.ID)
    Image.register_open("ODD", _Odd, lambda prefix: prefix.startswith(b"ODD"))
    yield
    Image.OPEN.clear()
    Image.OPEN.update(kinds)
    Image.ID[:] = order


@pytest.mark.usefixtures("odd_kind")
def test_whatever_a_decoder_raises_for_one_file_the_others_are_read(tmp_path: Path) -> None:
    paths = []
    for number in range(len(RAISED)):
        (tmp_path / f"{number}.odd").write_bytes(b"ODD" + bytes([number]))
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
        paths += [str(tmp_path / f"{number}.odd"), str(tmp_path / f"{number}.png")]
    (found,) = ImageFiles(32, 32).read(paths)
    assert list(found.problems) == list(range(0, len(paths), 2))
    for place, said in found.problems.items():
        assert said.startswith(f"{paths[place]}: ") and "\n" not in said
    assert [int(image[0, 0, 0]) for image in found.pixels[1::2]] == list(range(len(RAISED)))


def tiff(path: Path, values: np.ndarray[Any, Any]) -> Path:
    Image.fromarray(values).save(path / "values.tif")
    return path / "values.tif"


@pytest.mark.parametrize(
    ("highest", "factor"), [(0.25, 255), (1.0, 255), (1.5, 1), (255.0, 1), (256.0, 255 / 65535), (65535.0, 255 / 65535)]
)
def test_floating_point_pixels_are_scaled_by_their_highest_value(tmp_path: Path, highest: float, factor: float) -> None:
    values = np.linspace(0, highest, 32 * 32, dtype=np.float32).reshape(32, 32)
    found = read_image(tiff(tmp_path, values), 32, 32)
    expected = (values.astype(np.float64) * factor).astype(np.uint8)
    assert np.array_equal(found, np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("value", [-1, 65536, np.nan, np.inf])
def test_values_that_no_rule_covers_are_refused_by_name(tmp_path: Path, value: float, dtype: Any) -> None:
    if dtype is np.int32 and not np.isfinite(value):
        return
    values = np.zeros((32, 32), dtype)
    values[3, 3] = value
    with pytest.raises(
        ImageError, match=r"values\.tif: .*(no finite numbers|lie between .* expected 0 to 1, 0 to 255)"
    ):
        read_image(tiff(tmp_path, values), 32, 32)

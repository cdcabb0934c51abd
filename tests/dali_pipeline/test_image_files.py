"""Image files to pixels: DALI against Pillow, the rule for odd kinds against NumPy, and files that are broken."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dali_pipeline import image_files
from dali_pipeline.dataset import DataError
from dali_pipeline.image_files import Decoded, ImageFiles
from dali_pipeline.image_header import plain_size
from dali_pipeline.images import ImageError, Made, read_image

Pixels = npt.NDArray[np.uint8]


def photo(height: int = 45, width: int = 67, seed: int = 0) -> Image.Image:
    """Coarse colours with noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(int) + generator.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PLAIN: dict[str, Callable[[], bytes]] = {
    "444.jpg": lambda: encoded(photo(), "JPEG", subsampling=0),
    "420.jpg": lambda: encoded(photo(), "JPEG", subsampling=2, quality=75),
    "progressive.jpg": lambda: encoded(photo(), "JPEG", progressive=True),
    "grey.jpg": lambda: encoded(photo().convert("L"), "JPEG"),
    "one.jpg": lambda: encoded(photo(1, 1), "JPEG"),
    **{f"turned{i}.jpg": lambda i=i: encoded(photo(), "JPEG", exif=turned(i)) for i in range(1, 9)},  # type: ignore[misc]
    "rgb.png": lambda: encoded(photo(), "PNG"),
    "grey.png": lambda: encoded(photo().convert("L"), "PNG"),
    "bits.png": lambda: encoded(photo().convert("1"), "PNG"),
    "palette.png": lambda: encoded(photo().quantize(200), "PNG"),
    "short.png": lambda: re.sub(
        rb"....PLTE.{52}", chunk(b"PLTE", bytes(range(24))), encoded(photo().quantize(16), "PNG"), flags=re.DOTALL
    ),
    "two.png": lambda: encoded(photo().quantize(4), "PNG", bits=2),
    "exact.png": lambda: encoded(photo(32, 32), "PNG"),
}
ODD: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: encoded(photo().convert("CMYK"), "JPEG"),
    "lossy.webp": lambda: encoded(photo(), "WEBP", quality=70),
    "lossless.webp": lambda: encoded(photo(), "WEBP", lossless=True),
    "rgb.bmp": lambda: encoded(photo(), "BMP"),
    "raw.tif": lambda: encoded(photo(), "TIFF"),
    "grey.tiff": lambda: encoded(photo().convert("L"), "TIFF", compression="tiff_adobe_deflate"),
    "lzw.tif": lambda: encoded(photo(500, 300), "TIFF", compression="tiff_lzw"),
    "turned.png": lambda: encoded(photo(), "PNG", exif=turned(6)),
    "clear.png": lambda: encoded(photo().convert("RGBA"), "PNG"),
    "hole.png": lambda: encoded(photo().quantize(16), "PNG", transparency=3),
    "clear.webp": lambda: encoded(Image.new("RGBA", (40, 40), (9, 9, 9, 100)), "WEBP", lossless=True),
    "deep.png": lambda: encoded(Image.fromarray(np.full((40, 40), 32896, np.uint16)), "PNG"),
    "moving.gif": lambda: encoded(photo(), "GIF", save_all=True, append_images=[photo(seed=1)]),
    "moving.png": lambda: encoded(photo(), "PNG", save_all=True, append_images=[photo(seed=1)]),
    "pages.tif": lambda: encoded(photo(), "TIFF", save_all=True, append_images=[photo(seed=1)]),
    "float.tif": lambda: encoded(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"),
    "cmyk.tif": lambda: encoded(photo().convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "palette.tif": lambda: encoded(photo().quantize(9), "TIFF"),
    "clear.tif": lambda: encoded(photo().convert("RGBA"), "TIFF"),
    "turned.tif": lambda: encoded(photo(), "TIFF", exif=turned(6)),
    "bits.tif": lambda: encoded(photo().convert("1"), "TIFF"),
    "palette.bmp": lambda: encoded(photo().quantize(9), "BMP"),
    "after.jpg": lambda: encoded(photo(), "JPEG") + b"what a camera appends",
    "noend.png": lambda: encoded(photo(), "PNG")[:-12],
}
BROKEN: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"no image at all, " * 20,
    "cut.jpg": lambda: encoded(photo(), "JPEG")[:700],
    "cut.png": lambda: encoded(photo(), "PNG")[:700],
    "cut.webp": lambda: encoded(photo(), "WEBP")[:300],
    "cut.tif": lambda: encoded(photo(), "TIFF")[:-700],
    "cut.bmp": lambda: encoded(photo(), "BMP")[:700],
    "wrong.png": lambda: damaged_png(),
}


def damaged_png() -> bytes:
    """A PNG whose frame is whole and whose compressed data is not."""
    content = bytearray(encoded(photo(), "PNG"))
    start = content.index(b"IDAT") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    content[start + 40 : start + 80] = bytes(40)
    content[start + length : start + length + 4] = zlib.crc32(content[start - 4 : start + length]).to_bytes(4, "big")
    return bytes(content)


def write(folder: Path, files: dict[str, Callable[[], bytes]], times: int = 1) -> list[str]:
    paths = []
    for turn in range(times):
        for name, make in files.items():
            path = folder / f"{turn} {name}"
            path.write_bytes(make())
            paths.append(str(path))
    return paths


def read_all(paths: list[str], **how: Any) -> Decoded:
    batches = list(ImageFiles(32, 32, **how).read(paths))
    problems, first = {}, 0
    for batch in batches:
        problems |= {first + place: why for place, why in batch.problems.items()}
        first += len(batch.pixels)
    return Decoded(
        np.concatenate([batch.pixels for batch in batches]),
        np.concatenate([batch.digests for batch in batches]),
        np.concatenate([batch.made for batch in batches]),
        problems,
    )


def dali() -> None:
    pytest.importorskip("nvidia.dali")


# DALI and Pillow


def test_plain_kinds_are_recognised_with_their_size_and_nothing_else_is() -> None:
    for name, make in PLAIN.items():
        with Image.open(io.BytesIO(make())) as image:
            assert plain_size(make()) == image.size[::-1], name
    for name, make in (ODD | BROKEN).items():
        assert plain_size(make()) is None or name == "wrong.png", name


def test_a_file_whose_parts_do_not_hold_together_is_left_to_pillow() -> None:
    """DALI 2.4 can crash where it refuses one file of a batch, so a file that it would refuse must not come to it."""
    jpeg = PLAIN["444.jpg"]()
    assert plain_size(jpeg) == (45, 67)

    def changed(marker: int, offset: int, value: int, also: tuple[int, int] | None = None) -> bytes:
        content = bytearray(jpeg)
        for place, byte in filter(None, ((offset, value), also)):
            content[jpeg.index(bytes([0xFF, marker])) + place] = byte
        return bytes(content)

    scan = jpeg.index(b"\xff\xda")
    for damaged in (
        changed(0xDB, 1, 0x02),  # a marker that there is not
        changed(0xDB, 4, 0x50),  # a quantisation table of five bytes a number
        changed(0xC0, 9, 2),  # a frame of two components
        changed(0xC0, 11, 0x01),  # a component that is sampled nowhere
        changed(0xC0, 12, 3),  # its quantisation table was not given
        changed(0xC4, 5, 200),  # 200 codes of one bit
        changed(0xC4, 4, 0x03),  # the table that the scan needs has another number
        changed(0xDA, 5, 9),  # a scan of a component that the frame has not
        changed(0xDA, 3, 80),  # a segment that ends within the picture's data
        jpeg[:scan] + jpeg[-2:],  # no scan
        jpeg[:scan] + jpeg[scan + 14 :],
        changed(0xC0, 11, 0x31, also=(14, 0x21)),  # components sampled three times and twice
        jpeg[:2] + b"\xff\xf1\0\2" + jpeg[2:],  # a marker that stands for nothing yet
        jpeg[:-2] + jpeg[scan:],  # a second scan of components that had theirs
        changed(0xC4, 21, 0x1F),  # a number of bits that no first coefficient has
    ):
        assert plain_size(damaged) is None
    progressive = PLAIN["progressive.jpg"]()
    for start in (found.start() for found in re.finditer(rb"\xff\xda", progressive)):
        last = start + 4 + 2 * progressive[start + 4]  # the head's last bytes: first and last coefficient, and bits
        assert plain_size(progressive[: last + 3] + b"\x7c" + progressive[last + 4 :]) is None
    png = bytearray(PLAIN["rgb.png"]())
    png[png.index(b"IDAT") + 30] ^= 1  # its checksum tells
    assert plain_size(bytes(png)) is None
    assert plain_size(PLAIN["rgb.png"]()[:-12] + b"\0\0\0\1IEND\xaeB`\x82") is None  # an end that is not empty


def jpeg_with(*segments: bytes, marker: int = 0xE1, at: bytes = b"\xff\xdb", image: Image.Image | None = None) -> bytes:
    """A JPEG with notes of applications before the first marker `at`; its colours and its size tell how it was turned."""
    content = encoded(image or photo(), "JPEG")
    place = content.index(at)
    notes = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(note) + 2) + note for note in segments)
    return content[:place] + notes + content[place:]


def exif(*entries: bytes, order: str = "<", count: int | None = None, further: bytes = b"") -> bytes:
    """Exif with one directory of those entries; `further` follows it, from the place 14 + 12 * len(entries) on."""
    head = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    number = len(entries) if count is None else count
    return head + struct.pack(order + "H", number) + b"".join(entries) + bytes(4) + further


def entry(tag: int, kind: int, count: int, value: int, order: str = "<") -> bytes:
    """An entry of Exif, whose value lies at the beginning of its four bytes."""
    letter = {1: "B3x", 3: "H2x", 4: "I"}.get(kind, "I")
    return struct.pack(f"{order}HHI{letter}", tag, kind, count, value)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks: bytes, at: bytes = b"IDAT", image: Image.Image | None = None) -> bytes:
    """A PNG with further chunks before the first one of the name `at`."""
    content = encoded(image or photo(), "PNG")
    place = content.index(at) - 4
    return content[:place] + b"".join(chunks) + content[place:]


TURN = entry(0x0112, 3, 1, 6)
XMP = b"http://ns.adobe.com/xap/1.0/\0"
LONGER_XMP = b"http://ns.adobe.com/xmp/extension/\0" + bytes(40)
TURNING = b'<rdf:Description tiff:Orientation="6"/>'
MPF = b"MPF\0" + exif(
    entry(0xB001, 4, 1, 2), entry(0xB002, 7, 32, 38), further=struct.pack("<LLLHHLLLHH", 0x030000, *(0,) * 9)
).removeprefix(b"Exif\0\0")
RAW_EXIF = b"Raw profile type exif\0"
HEXED = b"\nexif\n%8d\n%s\n" % (len(exif(TURN)), exif(TURN).hex().encode())
LATE = encoded(photo(), "JPEG", progressive=True)
DIFFERENT: dict[
    str, Callable[[], bytes]
] = {  # where DALI and Pillow do not read the same, or one of them nothing at all
    "xmp.jpg": lambda: jpeg_with(XMP + TURNING),
    "xmp element.jpg": lambda: jpeg_with(XMP + b"<tiff:Orientation>8</tiff:Orientation>"),
    "xmp and exif without.jpg": lambda: jpeg_with(exif(entry(0x0128, 3, 1, 2)), XMP + TURNING),
    "long big endian.jpg": lambda: jpeg_with(exif(entry(0x0112, 4, 1, 6, ">"), order=">")),
    "byte.jpg": lambda: jpeg_with(exif(entry(0x0112, 1, 1, 6))),
    "second exif.jpg": lambda: jpeg_with(exif(entry(0x0128, 3, 1, 2)), exif(TURN)),
    "count beyond the end.jpg": lambda: jpeg_with(exif(TURN, count=50)),
    "value beyond the end.jpg": lambda: jpeg_with(exif(entry(0x013B, 2, 9, 5000), TURN)),
    "resolution too short.jpg": lambda: jpeg_with(exif(TURN, entry(0x011B, 3, 1, 72))),
    "white point too short.jpg": lambda: jpeg_with(exif(TURN, entry(0x013E, 3, 1, 72))),
    "chromaticities too short.jpg": lambda: jpeg_with(exif(TURN, entry(0x013F, 3, 1, 72))),
    "coefficients too short.jpg": lambda: jpeg_with(exif(TURN, entry(0x0211, 3, 1, 72))),
    "reference too short.jpg": lambda: jpeg_with(exif(TURN, entry(0x0214, 3, 1, 72))),
    "no adobe.jpg": lambda: re.sub(
        rb"\xff\xee\0\x0eAdobe.{7}", b"", encoded(photo().convert("CMYK"), "JPEG"), flags=re.DOTALL
    ),
    "turned cmyk.jpg": lambda: encoded(photo().convert("CMYK"), "JPEG", exif=turned(8)),
    "two pictures.jpg": lambda: jpeg_with(MPF, marker=0xE2),
    "xmp.png": lambda: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + TURNING)),
    "xmp packed.png": lambda: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TURNING))),
    "xmp text.png": lambda: png_with(chunk(b"tEXt", b"XML:com.adobe.xmp\0" + TURNING)),
    "xmp after the picture.png": lambda: png_with(
        chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + TURNING), at=b"IEND"
    ),
    "raw text.png": lambda: png_with(chunk(b"tEXt", RAW_EXIF + HEXED)),
    "raw packed.png": lambda: png_with(chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(HEXED))),
    "raw international.png": lambda: png_with(chunk(b"iTXt", RAW_EXIF + bytes(4) + HEXED)),
    "exif text.png": lambda: png_with(chunk(b"tEXt", b"exif\0" + exif(TURN))),
}
REFUSED: dict[str, Callable[[], bytes]] = {  # what Pillow does not take, and DALI would
    "jfif.jpg": lambda: jpeg_with(b"JFIF", marker=0xE0),
    "profile.jpg": lambda: jpeg_with(b"ICC_PROFILE\0", marker=0xE2),
    "adobe.jpg": lambda: jpeg_with(b"Adobe", marker=0xEE),
    "photoshop.jpg": lambda: jpeg_with(b"Photoshop 3.0\x008BIM\4\4", marker=0xED),
    "resolution.jpg": lambda: jpeg_with(exif(entry(0x011A, 1, 1, 72), entry(0x0128, 3, 1, 2), TURN)),
    "transparency.png": lambda: png_with(chunk(b"tEXt", b"transparency\0words")),
    "profile.png": lambda: png_with(chunk(b"iCCP", b"ICC\0\0" + zlib.compress(bytes(2 << 20)))),
    "packed text.png": lambda: png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))),
    "gamma.png": lambda: png_with(chunk(b"gAMA", b"\0\0")),
}
AGREED: dict[str, Callable[[], bytes]] = {  # ordinary notes
    **{
        f"exif {order}{way}.jpg": lambda order=order, way=way: jpeg_with(  # type: ignore[misc]
            exif(
                entry(0x010F, 2, 6, 62, order),
                entry(0x0112, 3, 1, way, order),
                entry(0x011A, 5, 1, 68, order),
                entry(0x0128, 3, 1, 2, order),
                order=order,
                further=b"Canon\0" + struct.pack(order + "II", 72, 1),
            )
        )
        for order in "<>"
        for way in range(1, 9)
    },
    "no orientation.jpg": lambda: jpeg_with(exif(entry(0x0128, 3, 1, 2))),
    "xmp.jpg": lambda: jpeg_with(XMP + b"<rdf:Description tiff:Make='Canon'/>" + bytes(60_000), exif()),
    "long xmp.jpg": lambda: jpeg_with(XMP + b"<rdf:Description/>", LONGER_XMP + b"<rdf:Description/>"),
    "xmp beside exif.jpg": lambda: jpeg_with(XMP + TURNING, exif(entry(0x0112, 3, 1, 3))),
    "photoshop.jpg": lambda: jpeg_with(b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\3abc\0", marker=0xED),
    "profile.jpg": lambda: encoded(photo(), "JPEG", icc_profile=bytes(100_000)),
    "comment.jpg": lambda: encoded(photo(), "JPEG", comment=TURNING),
    "xmp.png": lambda: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + b"<rdf:Description/>")),
    "texts.png": lambda: png_with(
        chunk(b"tEXt", b"Software\0a program"), chunk(b"tIME", b"\7\xd0\1\1\1\1\1"), at=b"IEND"
    ),
    "profile.png": lambda: encoded(photo(), "PNG", icc_profile=bytes(5000), dpi=(72, 72)),
    "colours.png": lambda: png_with(chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"sRGB", b"\0")),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_file_that_dali_and_pillow_would_read_differently_has_the_same_pixels_in_any_company(
    tmp_path: Path, name: str
) -> None:
    """Fewer than 64 files come to Pillow. How one of them is turned, or its colours, must not change with their number."""
    assert plain_size(DIFFERENT[name]()) is None
    dali()
    paths = write(tmp_path, {name: DIFFERENT[name]}, times=image_files.WORTH_DALI)
    alone, together = read_all(paths[:1]), read_all(paths)
    assert not alone.problems and not together.problems
    assert (together.pixels == alone.pixels).all() and (together.made == alone.made).all()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_pillow_refuses_is_refused_in_any_company(tmp_path: Path, name: str) -> None:
    assert plain_size(REFUSED[name]()) is None
    dali()
    paths = write(tmp_path, {name: REFUSED[name]}, times=image_files.WORTH_DALI)
    assert len(read_all(paths[:1]).problems) == 1 and len(read_all(paths).problems) == len(paths)


def test_ordinary_notes_leave_a_file_to_dali_which_reads_them_as_pillow_does(tmp_path: Path) -> None:
    for name, make in AGREED.items():
        assert plain_size(make()) == (45, 67), name
    dali()
    paths = write(tmp_path, AGREED, times=3)
    assert len(paths) >= image_files.WORTH_DALI
    for path, pixels in zip(paths, read_all(paths).pixels, strict=True):
        assert np.array_equal(pixels, read_image(path, 32, 32)), path


def test_notes_between_the_scans_of_a_picture_leave_it_to_pillow() -> None:
    last = LATE.rindex(b"\xff\xda")
    assert plain_size(LATE) == (45, 67)
    assert plain_size(LATE[:last] + b"\xff\xe1\0\4ab" + LATE[last:]) is None


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_dali_gives_the_pixels_of_pillow_to_the_bit(tmp_path: Path, resize: Any) -> None:
    dali()
    paths = write(tmp_path, PLAIN | ODD, times=3)
    found = read_all(paths, resize=resize)
    assert len(paths) >= image_files.WORTH_DALI and not found.problems
    for path, pixels, digest in zip(paths, found.pixels, found.digests, strict=True):
        assert np.array_equal(pixels, read_image(path, 32, 32, resize)), path
        assert bytes(digest) == hashlib.sha256(Path(path).read_bytes()).digest()


def test_without_dali_pillow_reads_the_same_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path, PLAIN | ODD, times=3)
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    reader = ImageFiles(32, 32)
    pixels = np.concatenate([batch.pixels for batch in reader.read(paths)])
    assert reader.fallback is not None and reader.fallback.startswith("DALI cannot decode here")
    for path, image in zip(paths, pixels, strict=True):
        assert np.array_equal(image, read_image(path, 32, 32)), path


def test_a_batch_with_broken_files_names_each_and_keeps_the_others(tmp_path: Path) -> None:
    paths = write(tmp_path, PLAIN | BROKEN, times=4)
    found = read_all(paths)
    assert [os.path.basename(paths[place])[2:] for place in found.problems] == [*BROKEN] * 4  # noqa: PTH119
    for place, path in enumerate(paths):
        if place in found.problems:
            assert found.problems[place].startswith(f"{path}: ") and "\n" not in found.problems[place]
            assert not found.pixels[place].any()
        else:
            assert np.array_equal(found.pixels[place], read_image(path, 32, 32)), path


def test_names_that_are_hard_to_write_are_read_and_shown_on_one_line(tmp_path: Path) -> None:
    names = [
        b"with blank.png",
        b"quo\"te's.png",
        "schön 漢字.png".encode(),
        b"caf\xe9.png",
        b"line\nbreak.png",
        b"$(x);.png",
    ]
    paths = [os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in names]  # noqa: PTH118
    try:
        for path in paths:
            Path(path).write_bytes(PLAIN["rgb.png"]())
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names alone")
    assert not read_all(paths).problems
    for path in paths:
        Path(path).write_bytes(b"broken")
    shown = " ".join(read_all(paths).problems.values())
    assert shown.isprintable() and r"caf\xe9.png" in shown and r"line\nbreak.png" in shown and shown.encode()


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    (tmp_path / "link.png").symlink_to(write(tmp_path, {"rgb.png": PLAIN["rgb.png"]})[0])
    names = ["folder", "pipe", "nowhere", "link", "missing"]
    found = read_all([str(tmp_path / f"{name}.png") for name in names])
    assert [*found.problems] == [0, 1, 2, 4]
    for place, words in {0: "is a folder", 1: "is a named pipe", 2: "no such file", 4: "no such file"}.items():
        assert words in found.problems[place]


def test_nvjpeg_without_a_gpu_is_refused_by_its_key(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DataError, match=r"data\.decoder=mixed: .* data\.decoder=cpu"):
        list(ImageFiles(32, 32, decoder="mixed").read(write(tmp_path, PLAIN)))


# the rule


def test_images_are_turned_upright_and_cut_to_the_middle(tmp_path: Path) -> None:
    sideways = np.zeros((64, 128, 3), np.uint8)
    sideways[:, :40] = 255  # once turned by a quarter, the top; the cut keeps the middle
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(sideways).save(tmp_path / "turned.png", exif=exif)
    found = read_image(tmp_path / "turned.png", 32, 32)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert found[0].min() > 200 and found[10:].max() < 50  # rows 32..96 of 128 remain: 8 of 64 are white
    squashed = read_image(tmp_path / "turned.png", 32, 32, resize="squash")
    assert squashed[8].min() > 200 and squashed[14:].max() < 50


@pytest.mark.parametrize(
    "odd",
    [
        entry(0x0131, 11, 1, 0x3F800000),  # the name of a program, as a number
        entry(0x8769, 9, 1, 0xFFFFFFFF),  # a directory that lies before the beginning
    ],
)
def test_exif_that_pillow_cannot_write_turns_an_image_all_the_same(tmp_path: Path, odd: bytes) -> None:
    (tmp_path / "odd.jpg").write_bytes(jpeg_with(exif(TURN, odd)))
    (tmp_path / "plain.jpg").write_bytes(jpeg_with(exif(TURN)))
    assert np.array_equal(read_image(tmp_path / "odd.jpg", 32, 32), read_image(tmp_path / "plain.jpg", 32, 32))


def test_exif_that_cannot_be_read_turns_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain.jpg").write_bytes(encoded(photo(), "JPEG", dpi=(72, 72)))
    (tmp_path / "odd.jpg").write_bytes(encoded(photo(), "JPEG", dpi=(72, 72), exif=b"Exif\0\0no directory"))
    assert np.array_equal(read_image(tmp_path / "odd.jpg", 32, 32), read_image(tmp_path / "plain.jpg", 32, 32))


def test_deep_transparent_and_indexed_images_keep_their_look(tmp_path: Path) -> None:
    deep = np.full((40, 40), 32896, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert abs(int(read_image(tmp_path / "deep.png", 32, 32)[5, 5, 0]) - 128) <= 1
    clear = np.zeros((40, 40, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 32, 32).min() == 255
    indexed = Image.fromarray(np.full((40, 40, 3), (200, 30, 60), np.uint8)).convert("P")
    indexed.save(tmp_path / "indexed.gif")
    assert np.abs(read_image(tmp_path / "indexed.gif", 32, 32)[3, 3].astype(int) - (200, 30, 60)).max() < 30


def test_an_image_of_the_right_size_is_taken_pixel_for_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "exact.png")
    assert np.array_equal(read_image(tmp_path / "exact.png", 32, 32), pixels)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(ImageError, match="30,000 pixels"):
        read_image(tmp_path / "bomb.png", 32, 32)


def test_what_the_rule_made_of_a_file_is_counted(tmp_path: Path) -> None:
    found = read_all(write(tmp_path, ODD))
    made = dict(zip(ODD, found.made.tolist(), strict=True))
    assert {name for name, what in made.items() if what & Made.OPAQUE} == {
        "clear.png",
        "hole.png",
        "clear.webp",
        "clear.tif",
    }
    assert {name for name, what in made.items() if what & Made.EIGHT_BITS} == {"deep.png", "float.tif"}
    assert {name for name, what in made.items() if what & Made.FIRST_FRAME} == {"moving.gif", "moving.png", "pages.tif"}


def test_half_transparent_parts_are_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 100, 200, 128)).save(tmp_path / "half.png")
    expected = np.array([0, 100, 200]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(read_image(tmp_path / "half.png", 32, 32) - expected).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64, np.arange(1024).reshape(32, 32) // 4),
        (np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32), None),
        (np.linspace(0, 255, 1024, dtype=np.float32).reshape(32, 32), None),
    ],
)
def test_more_than_eight_bits_become_eight(tmp_path: Path, values: Any, expected: Any) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    if expected is None:
        expected = np.floor(np.clip(values * (255.0 if values.max() <= 1 else 1.0), 0, 255))
    assert np.array_equal(read_image(tmp_path / "deep.tif", 32, 32), np.stack([expected] * 3, 2))


def test_shrinking_takes_every_pixel_into_account(tmp_path: Path) -> None:
    """A fine checkerboard becomes grey; without antialiasing it would be black, white or moire."""
    board = np.indices((160, 160)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    found = read_image(tmp_path / "board.png", 32, 32).astype(int)
    assert np.abs(found[2:-2, 2:-2] - 127.5).max() < 8


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(PLAIN)),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
)
def test_the_header_check_takes_any_bytes(name: str, changes: list[tuple[int, int]], kept: float) -> None:
    content = bytearray(PLAIN[name]())
    for place, value in changes:
        content[place % len(content)] = value
    size = plain_size(bytes(content[: int(kept * len(content))]))
    assert size is None or min(size) > 0

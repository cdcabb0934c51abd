"""Which image files are of the plain kinds that DALI decodes to the same pixels as Pillow: read off their structure.

Everything else is left to Pillow: odd kinds, several frames, transparency, more than 8 bits, a file that is cut off or whose
parts do not hold together.
"""

from __future__ import annotations

import re
import zlib

Size = tuple[int, int]  # height, width, before any turning

_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; arithmetic coding and lossless are rare
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))


def plain_size(data: bytes) -> Size | None:
    """The size of a whole JPEG, PNG, WebP, BMP or TIFF of 8 bits without transparency; None for any other file."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data.startswith(b"BM"):
            return _bmp(data)
        if data.startswith((b"II*\0", b"MM\0*")):
            return _tiff(data)
    except IndexError:  # the file ends within its header
        pass
    return None


def _number(data: bytes, start: int, length: int, order: str = "big") -> int:
    if start + length > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + length], order)  # type: ignore[arg-type]


def _sized(height: int, width: int) -> Size | None:
    return (height, width) if height and width else None


def _jpeg(data: bytes) -> Size | None:
    """Walks every segment up to the end of the image."""
    if data[-2:] != b"\xff\xd9":  # cut off, or something follows the image
        return None
    end, place = len(data) - 2, 2
    size: Size | None = None
    components: dict[int, int] = {}  # of the frame: by identifier, its quantisation table
    quantisation: set[int] = set()
    huffman: set[int] = set()
    scans = 0
    while place < end:
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _WITHOUT_LENGTH:
            place += 2
            continue
        if marker < 0xC0 or marker in (0xD8, 0xD9) or (0xC3 <= marker <= 0xCF and marker != 0xC4):
            return None
        length = _number(data, place + 2, 2)
        segment = data[place + 4 : place + 2 + length]
        place += 2 + length
        if length < 2 or place > end:
            return None
        if marker == 0xDB and not _quantisation_tables(segment, quantisation):
            return None
        if marker == 0xC4 and not _huffman_tables(segment, huffman):
            return None
        if marker in _START_OF_FRAME:
            count = segment[5]
            if size or segment[0] != 8 or count not in (1, 3, 4) or len(segment) != 6 + 3 * count:
                return None
            for at in range(6, len(segment), 3):
                across, down = segment[at + 1] >> 4, segment[at + 1] & 15
                if not (1 <= across <= 4 and 1 <= down <= 4):
                    return None
                components[segment[at]] = segment[at + 2]
            size = _sized(_number(segment, 1, 2), _number(segment, 3, 2))
            if size is None or len(components) != count:
                return None
        if marker == 0xDA:
            if size is None or not _scan(segment, components, quantisation, huffman):
                return None
            scans += 1
            found = _AFTER_SCAN.search(data, place)
            place = end if found is None else found.start()
    return size if scans else None


# a marker that ends a scan: neither a stuffed byte nor a restart
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _quantisation_tables(segment: bytes, known: set[int]) -> bool:
    at = 0
    while at < len(segment):
        precision, table = segment[at] >> 4, segment[at] & 15
        at += 1 + 64 * (1 + precision)
        if precision > 1 or table > 3 or at > len(segment):
            return False
        known.add(table)
    return True


def _huffman_tables(segment: bytes, known: set[int]) -> bool:
    """Whether each table has a code for each of its symbols, and none left that is all ones."""
    at = 0
    while at < len(segment):
        table, counts = segment[at], segment[at + 1 : at + 17]
        total, free = sum(counts), 1
        for count in counts:
            free = 2 * free - count
            if free < 1:
                return False
        at += 17 + total
        if len(counts) < 16 or total > 256 or table & 15 > 3 or table >> 4 > 1 or at > len(segment):
            return False
        known.add(table)
    return True


def _scan(segment: bytes, components: dict[int, int], quantisation: set[int], huffman: set[int]) -> bool:
    """Whether the head of a scan names components of the frame and tables that were given before it."""
    count = segment[0]
    if not 1 <= count <= 4 or len(segment) != 4 + 2 * count:
        return False
    first, last = segment[1 + 2 * count], segment[2 + 2 * count]
    if first > last or last > 63 or len({segment[at] for at in range(1, 1 + 2 * count, 2)}) != count:
        return False
    for at in range(1, 1 + 2 * count, 2):
        component, direct, alternating = segment[at], segment[at + 1] >> 4, segment[at + 1] & 15
        if components.get(component) not in quantisation:
            return False
        # a scan of a progressive image may need one of the two alone
        if (first == 0 and direct not in huffman) or (last > 0 and 16 + alternating not in huffman):
            return False
    return True


def _png(data: bytes) -> Size | None:
    if data[12:16] != b"IHDR" or data[24] > 8 or data[25] not in (0, 2, 3):
        return None
    place = 8
    while (kind := data[place + 4 : place + 8]) != b"IEND":
        # transparency, an animation, an orientation
        if len(kind) < 4 or kind in (b"tRNS", b"acTL", b"eXIf"):
            return None
        end = place + 8 + _number(data, place, 4)
        if zlib.crc32(data[place + 4 : end]) != _number(data, end, 4):
            return None
        place = end + 4
    return _sized(_number(data, 20, 4), _number(data, 16, 4)) if len(data) == place + 12 else None


def _webp(data: bytes) -> Size | None:
    if len(data) != 8 + _number(data, 4, 4, "little"):
        return None
    kind = data[12:16]
    if kind == b"VP8 ":
        return _sized(_number(data, 28, 2, "little") & 0x3FFF, _number(data, 26, 2, "little") & 0x3FFF)
    if kind == b"VP8L":
        bits = _number(data, 21, 4, "little")
        return None if bits >> 28 & 1 else ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8X" and not data[20] & 0b11010:  # transparency, EXIF, an animation
        return _number(data, 27, 3, "little") + 1, _number(data, 24, 3, "little") + 1
    return None


def _bmp(data: bytes) -> Size | None:
    width, height = _number(data, 18, 4, "little"), _number(data, 22, 4, "little")
    whole = len(data) >= _number(data, 10, 4, "little") + height * ((3 * width + 3) // 4 * 4)
    plain = _number(data, 14, 4, "little") >= 40 and _number(data, 28, 2, "little") == 24
    bottom_up = width < 1 << 31 and height < 1 << 31
    return _sized(height, width) if whole and plain and bottom_up and not _number(data, 30, 4, "little") else None


# the tags of a TIFF that matter here
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _ORIENTATION, _SAMPLES = 256, 257, 258, 259, 262, 274, 277
_STARTS, _LENGTHS, _PLANES, _TILES, _EXTRA, _FORMAT = 273, 279, 284, 322, 338, 339
_TIFF_VALUE_BYTES = {3: 2, 4: 4}  # by the type of a tag's values: 16 and 32 bits


def _tiff(data: bytes) -> Size | None:
    order = "little" if data.startswith(b"II") else "big"
    start = _number(data, 4, 4, order)
    count = _number(data, start, 2, order)
    if count > 100:
        return None
    tags: dict[int, list[int]] = {}
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        size = _TIFF_VALUE_BYTES.get(_number(data, entry + 2, 2, order), 0)
        values = _number(data, entry + 4, 4, order)
        if size and values * size <= len(data):
            first = entry + 8 if values * size <= 4 else _number(data, entry + 8, 4, order)
            tags[_number(data, entry, 2, order)] = [_number(data, first + n * size, size, order) for n in range(values)]
    single = {tag: values[0] for tag, values in tags.items() if len(values) == 1}
    grey = single.get(_COLOURS) == 1 and single.get(_SAMPLES, 1) == 1 and tags.get(_BITS) == [8]
    coloured = single.get(_COLOURS) == 2 and single.get(_SAMPLES) == 3 and tags.get(_BITS) == [8, 8, 8]
    usual = (
        single.get(_COMPRESSION, 1) in (1, 5, 8, 32946)  # none, LZW, deflate
        and single.get(_PLANES, 1) == single.get(_ORIENTATION, 1) == 1
        and set(tags.get(_FORMAT, [1])) == {1}
        and not tags.keys() & {_TILES, _EXTRA}
        and _number(data, start + 2 + 12 * count, 4, order) == 0  # no second page
    )
    starts, lengths = tags.get(_STARTS, []), tags.get(_LENGTHS, [])
    ends = [first + length for first, length in zip(starts, lengths, strict=False)]
    if not ((grey or coloured) and usual and len(starts) == len(lengths) > 0 and max(ends) <= len(data)):
        return None
    return _sized(single.get(_HEIGHT, 0), single.get(_WIDTH, 0))

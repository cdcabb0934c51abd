"""Which image files are plain JPEG or PNG, which DALI decodes to the same pixels as Pillow: read off their structure.

Everything else is left to Pillow: other kinds, several frames, transparency, more than 8 bits, a file that is cut off or whose
parts do not hold together.
"""

from __future__ import annotations

import re
import zlib

Size = tuple[int, int]  # height, width, before any turning

_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; arithmetic coding and lossless are rare
# Huffman and quantisation tables, the head of a scan, the restart interval, what applications note (EXIF), comments
_SEGMENTS = (0xC4, 0xDB, 0xDA, 0xDD, *range(0xE0, 0xF0), 0xFE)


def plain_size(data: bytes) -> Size | None:
    """The size of a whole JPEG or PNG of 8 bits without transparency; None for any other file."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
    except IndexError:  # the file ends within its header
        pass
    return None


def _number(data: bytes, start: int, length: int) -> int:
    if start + length > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + length], "big")


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
    progressive, scans = False, 0
    scanned: set[int] = set()  # of a sequential image: the components that had their one scan
    while place < end:
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker not in _START_OF_FRAME and marker not in _SEGMENTS:
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
            progressive = marker == 0xC2
            count = segment[5]
            if size or segment[0] != 8 or count not in (1, 3, 4) or len(segment) != 6 + 3 * count:
                return None
            if not _sampling({value >> 4 for value in segment[7::3]}) or not _sampling(
                {value & 15 for value in segment[7::3]}
            ):
                return None
            components |= zip(segment[6::3], segment[8::3], strict=True)
            size = _sized(_number(segment, 1, 2), _number(segment, 3, 2))
            if size is None or len(components) != count:
                return None
        if marker == 0xDA:
            if size is None or not _scan(segment, progressive, components, quantisation, huffman):
                return None
            named = [] if progressive else list(segment[1 : 1 + 2 * segment[0] : 2])
            if scanned.intersection(named):
                return None
            scanned.update(named)
            scans += 1
            found = _AFTER_SCAN.search(data, place)
            place = end if found is None else found.start()
    return size if scans else None


def _sampling(factors: set[int]) -> bool:
    """Whether the components can be sampled so often along one axis."""
    return min(factors) >= 1 and max(factors) <= 4 and not any(max(factors) % factor for factor in factors)


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
    """Whether each table has a code for each of its symbols and none left that is all ones, and whether the symbols of the first
    coefficients are numbers of bits."""
    at = 0
    while at < len(segment):
        table, counts = segment[at], segment[at + 1 : at + 17]
        total, free = sum(counts), 1
        for count in counts:
            free = 2 * free - count
            if free < 1:
                return False
        symbols = segment[at + 17 : at + 17 + total]
        at += 17 + total
        if len(counts) < 16 or total > 256 or table & 15 > 3 or table >> 4 > 1 or at > len(segment):
            return False
        if table >> 4 == 0 and max(symbols, default=0) > 15:
            return False
        known.add(table)
    return True


def _scan(
    segment: bytes, progressive: bool, components: dict[int, int], quantisation: set[int], huffman: set[int]
) -> bool:
    """Whether the head of a scan names components of the frame, tables that were given before it, and coefficients that a scan
    may hold."""
    count = segment[0]
    if not 1 <= count <= 4 or len(segment) != 4 + 2 * count:
        return False
    first, last = segment[1 + 2 * count], segment[2 + 2 * count]
    # bits of precision that earlier scans lack, and that this one lacks
    before, now = segment[-1] >> 4, segment[-1] & 15
    if progressive:
        alone = last == 0 if first == 0 else count == 1 and first <= last <= 63
        usual = alone and now <= 13 and before in (0, now + 1)
    else:
        usual = (first, last, before, now) == (0, 63, 0, 0)
    if not usual or len({segment[at] for at in range(1, 1 + 2 * count, 2)}) != count:
        return False
    for at in range(1, 1 + 2 * count, 2):
        component, direct, alternating = segment[at], segment[at + 1] >> 4, segment[at + 1] & 15
        if components.get(component) not in quantisation:
            return False
        # a scan of a progressive image may need one of the two alone
        if (first == 0 and direct not in huffman) or (last > 0 and 16 + alternating not in huffman):
            return False
    return True


_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # a chunk of no bytes, and its checksum


def _png(data: bytes) -> Size | None:
    if not data.endswith(_PNG_END) or data[12:16] != b"IHDR" or data[24] > 8 or data[25] not in (0, 2, 3):
        return None
    place = 8
    while place != len(data) - len(_PNG_END):
        # transparency, an animation, an orientation
        if data[place + 4 : place + 8] in (b"tRNS", b"acTL", b"eXIf"):
            return None
        end = place + 8 + _number(data, place, 4)
        if zlib.crc32(data[place + 4 : end]) != _number(data, end, 4):
            return None
        place = end + 4
    return _sized(_number(data, 20, 4), _number(data, 16, 4))

"""Which image files are plain JPEG or PNG, which DALI decodes to the same pixels as Pillow: read off their structure.

Everything else is left to Pillow: other kinds, several frames, transparency, more than 8 bits, a file that is cut off or whose
parts do not hold together. So are notes of applications (Exif, XMP, texts) which the two might not read alike: what is admitted
is listed, and of orientations it is a single one in Exif as the standard has it.
"""

from __future__ import annotations

import re
import struct
import zlib

Size = tuple[int, int]  # height, width, before any turning

_LONGEST = 65_500  # pixels along a side, of libjpeg; libpng takes more
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
    return (height, width) if 0 < height <= _LONGEST and 0 < width <= _LONGEST else None


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
    notes: list[tuple[int, bytes]] = []  # of applications: marker, segment
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
        if 0xE0 <= marker <= 0xEF:
            if scans:  # Pillow looks for them before the first scan alone
                return None
            notes.append((marker, segment))
        if marker == 0xDB and not _quantisation_tables(segment, quantisation):
            return None
        if marker == 0xC4 and not _huffman_tables(segment, huffman):
            return None
        if marker in _START_OF_FRAME:
            progressive = marker == 0xC2
            # DALI makes other RGB of four components, where they are turned or lack Adobe's note
            count = segment[5]
            if size or segment[0] != 8 or count not in (1, 3) or len(segment) != 6 + 3 * count:
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
    return size if scans and _noted_alike(notes) else None


def _noted_alike(notes: list[tuple[int, bytes]]) -> bool:
    """Whether DALI and Pillow take the same from what applications noted in a JPEG file, how it is to be turned above all, and
    Pillow can read what it would refuse the file for."""
    turned: list[bool] = []  # by each Exif: whether it gives an orientation
    elsewhere = False
    for marker, note in notes:
        if marker == 0xE0 and note.startswith(b"JFIF"):
            known = len(note) >= 14
        elif marker == 0xE1 and note.startswith(b"Exif\0\0"):
            found = _orientation(note[6:])
            known = found is not None
            turned.append(bool(found))
        elif marker == 0xE1:
            known = note.startswith((b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"))
            elsewhere |= b"Orientation" in note
        elif marker == 0xE2:
            # pieces of a colour profile have a head; MPF tells of further images
            known = len(note) >= 14 if note.startswith(b"ICC_PROFILE\0") else not note.startswith(b"MPF\0")
        elif marker == 0xED and note.startswith(b"Photoshop 3.0\0"):
            known = _photoshop(note)
        elif marker == 0xEE and note.startswith(b"Adobe"):
            known = len(note) >= 12
        else:
            known = True
        if not known:
            return False
    # Pillow joins several Exif, and takes the orientation in XMP where Exif has none; DALI does neither
    return len(turned) <= 1 and (not elsewhere or any(turned))


# bytes of a value, by its type in Exif: BYTE, ASCII, SHORT, LONG, RATIONAL, the same with a sign, FLOAT and DOUBLE
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
# Tags that one of the two reads beside the orientation, with the type and the number of values of the standard: where these are
# other ones Pillow may refuse the file, and DALI may look beyond the end of Exif and then forgets the orientation.
_EXIF_TAGS = {
    0x0112: (3, 1),  # Orientation
    0x011A: (5, 1),  # XResolution
    0x011B: (5, 1),  # YResolution
    0x013E: (5, 2),  # WhitePoint
    0x013F: (5, 6),  # PrimaryChromaticities
    0x0211: (5, 3),  # YCbCrCoefficients
    0x0214: (5, 6),  # ReferenceBlackWhite
}


def _orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8, in Exif without its name; 0 where there is none. None where the first directory is not whole, or
    says it in a way that is not the standard's."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        return None
    end = start + 2 + 12 * struct.unpack_from(order + "H", exif, start)[0]
    if start < 8 or end + 4 > len(exif):  # the directory ends with the place of the next one
        return None
    orientation = 0
    for tag, kind, count, place in struct.iter_unpack(order + "HHII", exif[start + 2 : end]):
        length = count * _VALUE_BYTES.get(kind, len(exif))
        if length > 4 and place + length > len(exif):  # Pillow ends its reading there
            return None
        if _EXIF_TAGS.get(tag, (kind, count)) != (kind, count):
            return None
        if tag == 0x0112:
            if orientation:
                return None
            orientation = place >> 16 if order == ">" else place & 0xFFFF
            if not 1 <= orientation <= 8:
                return None
    return orientation


def _photoshop(note: bytes) -> bool:
    """Whether each of Photoshop's resources is whole."""
    at = 14
    while at < len(note):
        if note[at : at + 4] != b"8BIM":
            return False
        at += 7 + note[at + 6]  # a number and a name, with its length before it
        at += at & 1
        at += 4 + _number(note, at, 4)
        at += at & 1
    return at <= len(note) + 1  # the last one may lack what makes its length even


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
_PNG_DEPTHS = {0: (1, 2, 4, 8), 2: (8,), 3: (1, 2, 4, 8)}  # bits, by colour: grey, RGB, palette
# Chunks that change no pixel, and how many bytes they may have: Pillow or DALI refuses some that are too short. Transparency,
# animations, an orientation (eXIf) and what nobody knows are not among them.
_PNG_NOTES = {
    b"gAMA": (4,),
    b"cHRM": (32,),
    b"sRGB": (1,),
    b"cICP": (4,),
    b"sBIT": (1, 3),
    b"bKGD": (1, 2, 6),
    b"pHYs": (9,),
    b"oFFs": (9,),
    b"tIME": (7,),
    b"iDOT": (28,),  # Apple
    b"vpAg": (9,),  # ImageMagick, as the next one
    b"caNv": (16,),
}
# Keywords of texts: those of the standard and others that are often met. By a few other ones Pillow finds an orientation or even
# transparency.
_PNG_KEYWORDS = frozenset(
    b"Title,Author,Description,Copyright,Creation Time,Software,Disclaimer,Warning,Source,Comment,"
    b"date:create,date:modify,date:timestamp,parameters,prompt,workflow".split(b",")
)
_PNG_LARGEST_NOTE = 1 << 20  # bytes of all texts, and of the colour profile: Pillow refuses more


def _png(data: bytes) -> Size | None:
    """Walks every chunk."""
    if not data.endswith(_PNG_END) or _number(data, 8, 4) != 13 or data[12:16] != b"IHDR":
        return None
    depth, colour = data[24], data[25]
    # compressed and filtered in the one way there is; interlaced or not
    if depth not in _PNG_DEPTHS.get(colour, ()) or data[26:28] != b"\0\0" or data[28] > 1:
        return None
    place, texts = 8, 0
    before = b""  # the chunk before this one
    seen: set[bytes] = set()
    while place != len(data) - len(_PNG_END):
        end = place + 8 + _number(data, place, 4)
        named = data[place + 4 : end]
        if zlib.crc32(named) != _number(data, end, 4):
            return None
        name, chunk = named[:4], b"" if named.startswith(b"IDAT") else named[4:]
        if name == b"IHDR":
            known = place == 8
        elif name == b"IDAT":
            known = before == name or name not in seen
        elif name == b"PLTE":
            known = 0 < len(chunk) <= 768 and len(chunk) % 3 == 0 and not seen & {b"PLTE", b"IDAT"}
        elif name in (b"tEXt", b"iTXt"):
            texts += len(chunk)
            known = texts <= _PNG_LARGEST_NOTE and _png_text(name, chunk)
        elif name == b"iCCP":
            known = _png_profile(chunk)
        else:
            known = len(chunk) in _PNG_NOTES.get(name, ())
        if not known:
            return None
        seen.add(name)
        before, place = name, end + 4
    if b"IDAT" not in seen or (colour == 3 and b"PLTE" not in seen):
        return None
    return _sized(_number(data, 20, 4), _number(data, 16, 4))


def _png_text(name: bytes, chunk: bytes) -> bool:
    """Whether Pillow takes nothing from a text that bears on the pixels."""
    keyword, found, text = chunk.partition(b"\0")
    if not found or (name == b"iTXt" and not text.startswith(b"\0\0")):  # a compressed one
        return False
    return keyword in _PNG_KEYWORDS or (keyword == b"XML:com.adobe.xmp" and b"Orientation" not in text)


def _png_profile(chunk: bytes) -> bool:
    """Whether Pillow can unpack a colour profile."""
    _, _, packed = chunk.partition(b"\0")
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed[1:], _PNG_LARGEST_NOTE)
    except zlib.error:
        return False
    return packed.startswith(b"\0") and unpacking.eof

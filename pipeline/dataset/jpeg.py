"""Read the structure of a JPEG file without decoding it: its frame, its scans, and what surrounds the picture.

Marker segments are described in ITU-T T.81, annex B; the EXIF block is a TIFF file in the segment APP1 (CIPA DC-008).
A file is scanned in one pass by `bytes.find` and a regular expression, so that its length alone bounds the time.
"""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from dataclasses import dataclass, field

#: A photo has about ten scans, two segments for each, and up to 255 segments of a colour profile.
MAXIMUM_SEGMENTS = 2000

_TEM, _SOI, _EOI, _SOS, _DQT, _APP0, _APP1 = 0x01, 0xD8, 0xD9, 0xDA, 0xDB, 0xE0, 0xE1
#: The markers at the end of a picture and at the beginning of a scan, as bytes.
END, SCAN = bytes((0xFF, _EOI)), bytes((0xFF, _SOS))
_WITHOUT_LENGTH = frozenset((_TEM, *range(0xD0, 0xD9)))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset((0xC0, 0xC1))
#: Frames that browsers show: baseline, extended sequential and progressive, with Huffman coding.
SHOWN = _SEQUENTIAL | {0xC2}
#: A marker inside coded data: neither a stuffed byte (FF 00) nor a restart marker nor a fill byte.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JFIF, _EXIF = b"JFIF\0", b"Exif\0\0"
#: What a scan header of a sequential frame ends with: all coefficients, with all their bits.
_ALL = b"\0\x3f\0"
_ORIENTATION, _SHORT = 0x0112, 3

_PADDING = re.compile(rb"[\0\xff]*")

#: The bytes from a start to an end are replaced.
Edit = tuple[int, int, bytes]


@dataclass
class Structure:
    """What a file contains.

    Attributes:
        frame: the marker of the frame header (SOF), 0 if there is none.
        header: its payload: precision, height, width, and the components.
        scans: the payloads of the scan headers (SOS) of the first picture.
        orientation: of the first EXIF block, 1 to 8; 1 if there is none.
        edits: what browsers pass over: zero and fill bytes between segments, a version of JFIF other than 1, parameters
            that have no meaning in a sequential frame.
        coded_padding: the same of zero bytes at the end of a scan, which may also be coded data.
        end: position after the marker EOI, None if it is missing.
        is_whole: all segments were read, no more than `MAXIMUM_SEGMENTS`.
        has_tables: no quantization table is filled with zeros.
    """

    frame: int = 0
    header: bytes = b""
    scans: list[bytes] = field(default_factory=list)
    orientation: int = 1
    edits: list[Edit] = field(default_factory=list)
    coded_padding: list[Edit] = field(default_factory=list)
    end: int | None = None
    is_whole: bool = True
    has_tables: bool = True

    def has_all_scans(self) -> bool:
        """Return whether every coefficient of every component is coded to its last bit (T.81, annex G)."""
        missing = {self.header[offset]: bytearray(64 * b"\1") for offset in range(6, len(self.header) - 2, 3)}
        for scan in self.scans:
            count = scan[0] if scan else 0
            components, rest = scan[1 : 1 + 2 * count : 2], scan[1 + 2 * count :]
            if len(rest) < 3:
                return False
            first, behind = rest[0], min(rest[1], 63) + 1
            for component in components:
                coefficients = missing.setdefault(component, bytearray(64))
                coefficients[first:behind] = bytes([rest[2] & 15]) * (behind - first)
        return not any(map(any, missing.values()))


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Return the content with these edits; a copy if there is one."""
    parts: list[bytes] = []
    position = 0
    for start, end, replacement in sorted(edits):
        parts += (content[position:start], replacement)
        position = end
    return b"".join((*parts, content[position:])) if edits else content


def read_structure(content: bytes) -> Structure:
    """Return the structure of a file that begins with the marker SOI."""
    found = Structure()
    has_exif = False
    position = 2
    for _ in range(MAXIMUM_SEGMENTS):
        position = _skip_padding(content, position, found)
        if content[position : position + 1] != b"\xff" or position + 1 == len(content):
            return found
        marker = content[position + 1]
        position += 2
        if marker == _EOI:
            found.end = position
            return found
        if marker in _WITHOUT_LENGTH:
            continue
        length = max(2, int.from_bytes(content[position : position + 2], "big"))
        payload = content[position + 2 : position + length]
        position += length
        if marker in _FRAMES and not found.frame:
            found.frame, found.header = marker, payload
        elif marker == _APP1 and not has_exif and payload.startswith(_EXIF):
            has_exif, found.orientation = True, _orientation(payload[len(_EXIF) :])
        elif marker == _APP0 and payload.startswith(_JFIF) and payload[5:6] != b"\1":
            found.edits.append((position - len(payload) + 5, position - len(payload) + 6, b"\1"))
        elif marker == _DQT:
            found.has_tables &= bytes(64) not in payload
        elif marker == _SOS:
            if found.frame in _SEQUENTIAL and payload[-3:] != _ALL and len(payload) == 4 + 2 * (payload or b"\0")[0]:
                found.edits.append((position - 3, position, _ALL))
                payload = payload[:-3] + _ALL
            found.scans.append(payload)
            following = _MARKER.search(content, position)
            start, position = position, following.start() if following is not None else len(content)
            if content[position - 1] in b"\0\xff":
                scan = content[start:position].rstrip(b"\xff")  # fill bytes, which decoders pass over
                data = scan.rstrip(b"\0")
                last = start + len(data) + data.endswith(b"\xff")  # FF 00 is a coded FF
                found.coded_padding += [(last, position, b"")] if last < start + len(scan) else []
    found.is_whole = False
    return found


def _skip_padding(content: bytes, position: int, found: Structure) -> int:
    """Record zero and fill bytes, and return the position of the marker after them."""
    match = _PADDING.match(content, position)
    end = match.end() if match is not None else position
    if content[end - 1 : end] == b"\xff" and end > position:
        end -= 1  # it begins the marker
    if end > position:
        found.edits.append((position, end, b""))
    return end


def _orientation(block: bytes) -> int:
    """Return the orientation in an EXIF block, 1 if it has no valid one."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    with suppress(struct.error):  # the block ends too early
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, offset)
            if tag == _ORIENTATION:
                return value if (kind, values) == (_SHORT, 1) and 1 <= value <= 8 else 1
    return 1

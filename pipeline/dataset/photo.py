"""The bytes of a photo -> its dimensions, or the reason why it is not usable.

The segments of a JPEG are read as ITU-T T.81, annex B, defines them; the orientation as Exif 2.3, 4.6, does.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from dataclasses import dataclass

import simplejpeg

from pipeline.errors import BadInput

#: A till photo has a megapixel or two; a file that claims more than this would take the memory of many photos.
MAXIMUM_PIXELS = 120_000_000
#: The coefficients of a progressive picture are in memory whole while it is decoded, so one at a time is decoded.
MAXIMUM_COEFFICIENT_BYTES = 100 << 20

_progressive = threading.Lock()

_TEM, _RST0, _SOI, _EOI, _SOS, _APP1 = 0x01, 0xD0, 0xD8, 0xD9, 0xDA, 0xE1
#: SOF0 to SOF15, without DHT, JPG and DAC, which are among them.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_SHORT = 3


@dataclass(frozen=True)
class Dimensions:
    """Width and height in pixels as stored, and the EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int


@dataclass(frozen=True)
class _Header:
    """What the segments before the first scan say.

    Attributes:
        sampling: horizontal and vertical sampling factor of each component.
        scan: where the first scan begins, in bytes from the start.
    """

    width: int
    height: int
    sampling: tuple[tuple[int, int], ...]
    is_progressive: bool
    orientation: int
    scan: int

    def coefficient_bytes(self) -> int:
        """Return the memory that decoding a progressive picture takes at any scale; 0 for any other picture."""
        if not self.is_progressive:
            return 0
        largest = max(h for h, _ in self.sampling) * max(v for _, v in self.sampling)
        return int(2 * self.width * self.height * sum(h * v for h, v in self.sampling) / max(1, largest))


def check_photo(content: bytes) -> Dimensions:
    """Decode a JPEG at an eighth of its size, which reads all of its data, and return its dimensions.

    Raises:
        BadInput: it is empty, not a JPEG, truncated, or damaged.
    """
    if not content:
        raise BadInput("photo_empty", "the file is empty")
    if not content.startswith(b"\xff\xd8"):
        kind = "a PNG" if content.startswith(b"\x89PNG") else "not a JPEG"
        raise BadInput("photo_not_jpeg", f"the file is {kind}")
    header = _read_header(content)
    if header is None or not header.width or not header.height or not header.sampling:
        raise _refusal(content, "has no readable header")
    if header.width * header.height > MAXIMUM_PIXELS:
        raise BadInput("photo_too_large", f"the picture is {header.width} x {header.height} pixels")
    needed = header.coefficient_bytes()
    if needed > MAXIMUM_COEFFICIENT_BYTES:
        raise BadInput("photo_too_large", f"a progressive picture of {header.width} x {header.height} pixels")
    # The data of a scan never holds the two bytes of the marker. A crash may leave zeros in its place, which decode.
    if content.rfind(bytes((0xFF, _EOI)), header.scan) == -1:
        raise BadInput("photo_truncated", "the file ends before the picture does")
    colours = "CMYK" if len(header.sampling) == 4 else "GRAY"
    try:
        with _progressive if needed else contextlib.nullcontext():
            # With a minimum of one pixel it takes the smallest scale, an eighth.
            simplejpeg.decode_jpeg(content, colours, fastdct=True, fastupsample=True, min_height=1, min_width=1)
    except ValueError as exc:
        raise _refusal(content, "cannot be decoded") from exc
    return Dimensions(header.width, header.height, header.orientation)


def _read_header(content: bytes) -> _Header | None:
    """Return what the segments up to the first scan say, None where they do not lead to one."""
    position, orientation = 2, 1
    frame: tuple[int, bytes] | None = None
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _TEM or _RST0 <= marker <= _EOI:  # without a length
            position += 2
            continue
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : position + 2 + length]
        if marker == _SOS:
            return _header_of(frame, orientation, position)
        if marker in _FRAMES and frame is None:
            frame = marker, segment
        elif marker == _APP1 and segment.startswith(_EXIF):
            orientation = _orientation(segment[len(_EXIF) :])
        position += 2 + length
    return None


def _header_of(frame: tuple[int, bytes] | None, orientation: int, scan: int) -> _Header | None:
    if frame is None or len(frame[1]) < 6:
        return None
    marker, segment = frame
    height, width, components = struct.unpack_from(">HHB", segment, 1)
    factors = segment[7 : 6 + 3 * components : 3]
    sampling = tuple((factor >> 4, factor & 15) for factor in factors)
    return _Header(width, height, sampling, marker in _PROGRESSIVE_FRAMES, orientation, scan)


def _orientation(tiff: bytes) -> int:
    """Return the orientation in the first directory of an EXIF block, 1 where there is none that can be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(min(entries, len(tiff) // 12)):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and count == 1 and 1 <= value <= 8 else 1
    except struct.error:  # it points beyond its end
        return 1
    return 1


def _refusal(content: bytes, what: str) -> BadInput:
    """Return the reject of a file that ends too early, or of one that is damaged: a whole JPEG ends with EOI."""
    if b"\xff\xd9" not in content[-64:]:
        return BadInput("photo_truncated", "the file ends before the picture does")
    return BadInput("photo_undecodable", f"the picture {what}")

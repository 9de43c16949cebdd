"""Check a photo: read its dimensions and orientation from the header, then decode all of its data.

Marker segments are described in ITU-T T.81, annex B; the EXIF block is a TIFF file in the segment APP1 (CIPA DC-008).
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import BadInput

#: A till photo has one or two megapixels.
MAXIMUM_PIXELS = 120_000_000
#: The decoder keeps all coefficients of a photo with several scans in memory, whatever the output scale.
MAXIMUM_COEFFICIENT_BYTES = 100 << 20

# One photo with several scans is decoded at a time, because the limit above is for the process.
_coefficients = threading.Lock()

_TEM, _RST0, _EOI, _SOS, _APP1 = 0x01, 0xD0, 0xD9, 0xDA, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_EXIF = b"Exif\0\0"
_ORIENTATION, _SHORT = 0x0112, 3


@dataclass(frozen=True)
class Dimensions:
    """Width and height in pixels as stored, and the EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int


def check_photo(content: bytes) -> Dimensions:
    """Decode a JPEG in grey at an eighth of its size, which reads all of its data, and return its dimensions.

    The decoder releases the GIL. Raises BadInput photo_empty, photo_not_jpeg, photo_too_large, photo_truncated or
    photo_undecodable.
    """
    if not content:
        raise BadInput("photo_empty", "the file is empty")
    if not content.startswith(b"\xff\xd8"):
        kind = "a PNG" if content.startswith(b"\x89PNG") else "not a JPEG"
        raise BadInput("photo_not_jpeg", f"the file is {kind}")
    dimensions, components, coefficient_bytes = _read_header(content)
    width, height = dimensions.width, dimensions.height
    if width * height > MAXIMUM_PIXELS:
        raise BadInput("photo_too_large", f"the picture is {width} x {height} pixels")
    if coefficient_bytes > MAXIMUM_COEFFICIENT_BYTES:
        raise BadInput("photo_too_large", f"a progressive picture of {width} x {height} pixels")
    # Imported here because it loads numpy: that takes 50 ms and starts threads, which should not exist before a fork.
    import simplejpeg

    try:
        with _coefficients if coefficient_bytes else contextlib.nullcontext():
            # A minimum of one pixel selects the smallest scale that the decoder has, an eighth.
            colorspace = "CMYK" if components == 4 else "GRAY"
            simplejpeg.decode_jpeg(content, colorspace, min_height=1, min_width=1, strict=True)
    except ValueError as exc:
        raise _damaged(content, "cannot be decoded") from exc
    return dimensions


def _damaged(content: bytes, what: str) -> BadInput:
    """Distinguish a file that ends too early from a damaged one: a complete JPEG ends with the marker EOI."""
    if b"\xff\xd9" not in content[-64:]:
        return BadInput("photo_truncated", "the file ends before the picture does")
    return BadInput("photo_undecodable", f"the picture {what}")


def _read_header(content: bytes) -> tuple[Dimensions, int, int]:
    """Return dimensions, number of components, and bytes of coefficients, 0 for a photo with a single scan."""
    orientation, frame, progressive = 1, b"", False
    for marker, segment in _segments(content):
        if marker in _FRAMES and not frame:
            frame, progressive = segment, marker in _PROGRESSIVE
        elif marker == _APP1 and orientation == 1 and segment.startswith(_EXIF):
            orientation = _orientation(segment[len(_EXIF) :])
        elif marker == _SOS and segment and len(frame) >= 6 and len(frame) >= 6 + 3 * frame[5]:
            height, width, components = struct.unpack_from(">HHB", frame, 1)
            factors = [(factor >> 4) * (factor & 15) for factor in frame[7 : 6 + 3 * components : 3]]
            if width and height and components and all(factors):
                several = progressive or segment[0] < components
                # Two bytes a coefficient; the component with the most samples has one for each pixel.
                needed = 2 * width * height * sum(factors) // max(factors) if several else 0
                return Dimensions(width, height, orientation), components, needed
    raise _damaged(content, "has no readable header")


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker and the payload of each segment up to and including the first SOS."""
    position = 2
    while position + 4 <= len(content):
        marker = content[position + 1]
        if content[position] != 0xFF or marker == 0xFF:  # padding before a marker
            position += 1
        elif marker == _TEM or _RST0 <= marker <= _EOI:  # without a length
            position += 2
        else:
            length = int.from_bytes(content[position + 2 : position + 4], "big")
            yield marker, content[position + 4 : position + 2 + length]
            if marker == _SOS:
                return
            position += 2 + max(2, length)


def _orientation(block: bytes) -> int:
    """Return the orientation in an EXIF block, 1 if it has no valid one."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    with contextlib.suppress(struct.error):  # the block ends too early
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, offset)
            if tag == _ORIENTATION:
                return value if (kind, values) == (_SHORT, 1) and 1 <= value <= 8 else 1
    return 1

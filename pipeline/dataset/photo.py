"""Check a photo: what browsers show whole is accepted, and everything else is rejected with what is wrong with it."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.dataset.jpeg import END, SCAN, SHOWN, Edit, Structure, edited, read_structure
from pipeline.dataset.kinds import kind_of
from pipeline.dataset.records import Deviation
from pipeline.errors import BadInput
from pipeline.units import counted

#: A till photo has one or two megapixels.
MAXIMUM_PIXELS = 120_000_000
#: The decoder keeps all coefficients of a photo with several scans in memory, whatever the output scale.
MAXIMUM_COEFFICIENT_BYTES = 48 << 20
#: Each scan visits all pixels: about a second of processor time; padding makes four attempts at most.
MAXIMUM_SCANNED_PIXELS = 1_000_000_000

# One photo with several scans is decoded at a time, because the limit above is for the process.
_coefficients = threading.Lock()

_PROGRESSIVE = 0xC2
#: Sampling factors of the first component that the decoder knows; the second and third have 1 x 1.
_SAMPLING = frozenset((0x11, 0x12, 0x14, 0x21, 0x22, 0x41))


@dataclass(frozen=True)
class Dimensions:
    """Width and height in pixels as stored, and the EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int


@dataclass(frozen=True)
class CheckedPhoto:
    """A photo that browsers show whole."""

    dimensions: Dimensions
    deviations: tuple[Deviation, ...] = ()


def check_photo(content: bytes) -> CheckedPhoto:
    """Decode a JPEG in grey at an eighth of its size, which reads all of its data.

    The decoder is strict. Padding and a missing end marker, which browsers tolerate, are mended in a copy. The decoder
    releases the GIL, so that several threads can decode at the same time.

    Raises:
        BadInput: photo_empty, photo_not_jpeg, photo_too_large, photo_truncated or photo_undecodable.
    """
    if not content:
        raise BadInput("photo_empty", "the file is empty")
    if not content.startswith(b"\xff\xd8"):
        raise BadInput("photo_not_jpeg", f"the file is {kind_of(content) or 'not a JPEG'}")
    found = read_structure(content)
    dimensions, components, several_scans = read_frame(content, found)
    deviations = []
    if not found.has_all_scans():
        raise _damaged(content, found, "some of its scans are missing")
    if found.end is None:
        deviations.append(Deviation("photo_no_end", "the end marker is missing"))
        # A marker that was cut in half is no coded data.
        whole = content.removesuffix(b"\xff") + END
    else:
        whole = content
        if len(content) > found.end:
            count = len(content) - found.end
            trailing = counted(count, "byte follows", "bytes follow")
            deviations.append(Deviation("photo_trailing_bytes", f"{trailing} the end of the picture"))
    with _coefficients if several_scans else contextlib.nullcontext():
        colorspace = "CMYK" if components == 4 else "GRAY"
        edits = next((edits for edits in _edits(found) if _is_decodable(edited(whole, edits), colorspace)), None)
    if edits is None:
        sampling = found.header[7::3]
        is_usual = sampling[0] in _SAMPLING and not sampling[1:3].strip(b"\x11") and sampling[3:] in (b"", sampling[:1])
        raise _damaged(
            content, found, "its data is damaged" + ("" if is_usual else ", or its sampling factors unusual")
        )
    if count := sum(end - start for start, end, replacement in edits if not replacement):
        deviations.append(Deviation("photo_padding", f"{counted(count, 'byte')} of padding between the segments"))
    if any(replacement for _, _, replacement in edits):
        deviations.append(Deviation("photo_header", "its header has values that every decoder passes over"))
    return CheckedPhoto(dimensions, tuple(deviations))


def _edits(found: Structure) -> Iterator[list[Edit]]:
    """Yield what browsers pass over: also zeros at the end of the last scan, whose first may be coded, or of all scans.

    More zeros may be coded, but a copy that was cut off ends in zeros as well, and must not pass for a whole photo.
    """
    yield found.edits
    for start, end, new in found.coded_padding[-1:]:
        yield from ([*found.edits, (first, end, new)] for first in range(start, min(start + 2, end)))
    if len(found.coded_padding) > 1:
        yield found.edits + found.coded_padding


def _is_decodable(content: bytes, colorspace: str) -> bool:
    # Imported here because it loads numpy: that takes 50 ms and starts threads, which should not exist before a fork.
    import simplejpeg

    try:
        # A minimum of one pixel selects the smallest scale that the decoder has, an eighth.
        simplejpeg.decode_jpeg(content, colorspace, min_height=1, min_width=1, strict=True)
    except ValueError:
        return False
    return True


def _damaged(content: bytes, found: Structure, why: str) -> BadInput:
    if found.end is None and not content.rstrip(b"\0").endswith(END):
        return BadInput("photo_truncated", "the file ends before the picture does")
    return BadInput("photo_undecodable", f"the picture cannot be shown: {why}")


def read_frame(content: bytes, found: Structure) -> tuple[Dimensions, int, bool]:
    """Return the dimensions, the number of components, and whether the decoder keeps coefficients for several scans.

    Raises:
        BadInput: the frame cannot be shown, or decoding it would take too much memory or time.
    """
    header = found.header
    components = header[5] if len(header) > 5 else 0
    if found.frame and found.frame not in SHOWN:
        kind = "arithmetic-coded" if found.frame > 0xC8 else "lossless or hierarchical"
        raise BadInput("photo_undecodable", f"the picture is {kind}, which browsers do not show")
    if not found.is_whole:
        raise BadInput("photo_undecodable", "the picture has too many segments")
    if not components or len(header) < 6 + 3 * components or not found.scans or not found.scans[0]:
        raise _damaged(content, found, "its header is damaged")
    precision, height, width = struct.unpack_from(">BHH", header)
    factors = [(factor >> 4) * (factor & 15) for factor in header[7 : 6 + 3 * components : 3]]
    if not (width and height and all(factors) and found.has_tables):
        raise _damaged(content, found, "its header is damaged")
    if precision != 8:
        raise BadInput("photo_undecodable", f"the picture has {precision} bits a sample, which browsers do not show")
    if width * height > MAXIMUM_PIXELS:
        raise BadInput("photo_too_large", f"the picture is {width} x {height} pixels")
    several_scans = found.frame == _PROGRESSIVE or found.scans[0][0] < components
    # Two bytes a coefficient; the component with the most samples has one for each pixel.
    if several_scans and 2 * width * height * sum(factors) // max(factors) > MAXIMUM_COEFFICIENT_BYTES:
        raise BadInput("photo_too_large", f"a progressive picture of {width} x {height} pixels")
    # A lenient decoder finds further scans behind data that is no segment.
    scans = len(found.scans) if found.end is not None else content.count(SCAN)
    if scans * width * height > MAXIMUM_SCANNED_PIXELS:
        raise BadInput("photo_too_large", f"the picture has {scans} scans of {width} x {height} pixels")
    return Dimensions(width, height, found.orientation), components, several_scans

"""Pure: the bytes of a photo -> its dimensions, or the reason why it is not usable."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.errors import BadInput

# A till photo has a megapixel or two; what claims more than this is not one, and would take the memory of many.
MAXIMUM_PIXELS = 120_000_000
# The coefficients of a progressive picture are in memory whole while it is decoded, so one is at a time.
MAXIMUM_COEFFICIENT_BYTES = 100 << 20
_progressive = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF data; a damaged picture is an error
Image.MAX_IMAGE_PIXELS = None  # Pillow would only warn; check_photo refuses before it decodes.
# Bytes for the decoder at once, most photos whole: what it leaves of a piece is copied in front of the next one.
ImageFile.MAXBLOCK = 1 << 20
_TEM, _RST0, _EOI, _SOS = 0x01, 0xD0, 0xD9, 0xDA
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Dimensions:
    """Width and height in pixels as stored, and the EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int


def check_photo(content: bytes) -> Dimensions:
    """Decode a JPEG at an eighth of its size, which reads all of its data, and return its dimensions.

    Raises:
        BadInput: it is empty, not a JPEG, truncated, or cannot be decoded.
    """
    if not content:
        raise BadInput("photo_empty", "the file is empty")
    if not content.startswith(b"\xff\xd8"):
        kind = "a PNG" if content.startswith(b"\x89PNG") else "not a JPEG"
        raise BadInput("photo_not_jpeg", f"the file is {kind}")
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as exc:
        raise BadInput(*_reason(content, "has no readable header")) from exc
    with image:
        width, height = image.size
        if width * height > MAXIMUM_PIXELS:
            raise BadInput("photo_too_large", f"the picture is {width} x {height} pixels")
        orientation = _orientation(image)
        needed = _coefficient_bytes(image)
        if needed > MAXIMUM_COEFFICIENT_BYTES:
            raise BadInput("photo_too_large", f"a progressive picture of {width} x {height} pixels")
        try:
            image.draft("L", (max(1, width // 8), max(1, height // 8)))
            with _progressive if needed else contextlib.nullcontext():
                image.load()
        except (OSError, SyntaxError, ValueError, IndexError, EOFError) as exc:
            raise BadInput(*_reason(content, "cannot be decoded")) from exc
    if not _has_end(content):
        raise BadInput("photo_truncated", "the file ends before the picture does")
    return Dimensions(width, height, orientation)


def _coefficient_bytes(image: Any) -> int:
    """Return what decoding a progressive JPEG takes whatever its scale: all coefficients; 0 for any other JPEG."""
    if not image.info.get("progressive"):
        return 0
    factors = [(horizontal, vertical) for _, horizontal, vertical, _ in image.layer]
    largest = max(h for h, _ in factors) * max(v for _, v in factors)
    return int(2 * image.size[0] * image.size[1] * sum(h * v for h, v in factors) / largest)


def _has_end(content: bytes) -> bool:
    """Say whether the marker EOI follows the first scan; zeros in its place, as a crash leaves them, decode as well.

    Segments are told apart as ITU-T T.81, annex B, has it; the data of a scan never holds the marker's two bytes.
    """
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == _SOS:
            break
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == _TEM or _RST0 <= marker <= _EOI:  # without a length
            position += 2
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return content.rfind(bytes((0xFF, _EOI)), position) != -1  # from the end, where it should be


def _reason(content: bytes, what: str) -> tuple[str, str]:
    """Tell a file that ends too early from one that is damaged: a whole JPEG ends with the marker EOI."""
    if b"\xff\xd9" not in content[-64:]:
        return "photo_truncated", "the file ends before the picture does"
    return "photo_undecodable", f"the picture {what}"


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1

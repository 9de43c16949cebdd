"""Make small JPEGs of photos, including what decodes of damaged ones. Pure: no I/O."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from PIL import Image, ImageFile

from pipeline.dataset.jpeg import read_structure
from pipeline.dataset.photo import MAXIMUM_PIXELS, read_frame
from pipeline.errors import BadInput

_JPEG = b"\xff\xd8"
_QUALITY = 72
#: Memory limit of a decoded picture before it is scaled down.
_MAXIMUM_DECODED_BYTES = 64 << 20
_ROUNDING = 4
_lenient = threading.Lock()


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data: URI, with the width and height of the stored original."""

    uri: str
    width: int
    height: int


def thumbnail(content: bytes, longest: int, *, damaged: bool = False) -> Thumbnail | None:
    """Return a thumbnail of at most `longest` pixels a side, None if it cannot be decoded in bounded memory.

    The EXIF orientation is neither applied nor copied.

    Arguments:
        damaged: accept a truncated file; the missing part is grey.
    """
    try:
        if content.startswith(_JPEG):
            read_frame(content, read_structure(content))
        with (
            _leniently() if damaged else nullcontext(),
            Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as one,
        ):
            width, height = one.size
            if width * height > MAXIMUM_PIXELS:
                return None
            one.draft("RGB", (longest, longest))
            if one.size[0] * one.size[1] * len(one.getbands()) > _MAXIMUM_DECODED_BYTES:
                return None
            one.thumbnail((longest, longest))
            small = one.convert("RGB")
    except (BadInput, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, IndexError):
        return None
    if damaged and _is_blank(small):
        return None
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", width, height)


def _is_blank(picture: Image.Image) -> bool:
    """Return whether nothing was decoded: all pixels are equal, except for rounding."""
    pixels = picture.convert("L").tobytes()
    return max(pixels) - min(pixels) <= _ROUNDING


@contextmanager
def _leniently() -> Iterator[None]:
    """Make Pillow accept truncated files; the setting is process-wide, hence the lock."""
    with _lenient:
        former = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = former

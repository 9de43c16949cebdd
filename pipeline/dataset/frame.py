"""The frame of a model's boxes: what their numbers mean, and whether a file as a whole contradicts that."""

from __future__ import annotations

import re
from decimal import Decimal

from pipeline.errors import UsageError

PIXELS = "pixels"
#: The side of a photo from which on boxes in pixels are expected beyond 1000.
LARGE = 1100

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
_ENOUGH_BOXES, _ENOUGH_PHOTOS = 200, 20
_THOUSANDTHS = 1000
#: Corners may overhang by 2 % of a side, as boxes that are clipped do.
_OVERHANG = Decimal("1.02")


def frame_of(coordinates: str) -> tuple[int | None, int | None]:
    """Return the width and height that the numbers of boxes refer to, None for those of each photo.

    Raises UsageError if it is none of `pixels`, `1000`, `1` and `<width>x<height>`.
    """
    if coordinates == PIXELS:
        return None, None
    if coordinates in ("1000", "1"):
        return int(coordinates), int(coordinates)
    if size := _SIZE.fullmatch(coordinates):
        return int(size[1]), int(size[2])
    hint = "Use pixels, 1000 (from 0 to 1000), 1 (from 0 to 1), or the size of resized photos, for example 1024x768."
    raise UsageError(f"--coordinates is {coordinates!r}.", hint)


def contradiction(coordinates: str, farthest: float, boxes: int, photos: int) -> tuple[str, bool]:
    """Return why numbers are hardly of a frame, empty if they may well be, and whether that is certain.

    Arguments:
        coordinates: the frame, as `frame_of` takes it.
        farthest: the largest coordinate of all boxes of the file.
        boxes, photos: number of boxes on photos with a side larger than `LARGE`, and of such photos.
    """
    if coordinates != "1" and farthest <= _OVERHANG:
        why = f"no corner of a box lies beyond {_OVERHANG}"
        return f"{why}; if they are fractions of the photo, load it with --coordinates 1", True
    edge = _THOUSANDTHS * _OVERHANG
    if coordinates == PIXELS and farthest <= edge and boxes:
        why = (
            f"no corner of a box lies beyond {edge:.0f}, although there are photos larger than {LARGE} pixels "
            f"(photos: {photos}, boxes on them: {boxes}); if they are thousandths, reset the batch and load it with "
            "--coordinates 1000"
        )
        return why, boxes >= _ENOUGH_BOXES and photos >= _ENOUGH_PHOTOS
    return "", False

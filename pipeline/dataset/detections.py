"""Map a key of the annotations file to its photo, and a value to usable detections."""

from __future__ import annotations

import re

from pipeline.dataset.forms import unwrapped
from pipeline.dataset.names import ANY_CASE, FOLDER, camera_of, numbers_of
from pipeline.dataset.records import MAXIMUM_BIGINT, Deviation, is_text
from pipeline.errors import BadInput

PLATE = "plate"
#: Maximum characters of a key; no system allows longer paths.
MAXIMUM_KEY = 4096
#: Maximum detections of a photo; a tray has dozens.
MAXIMUM_DETECTIONS = 10_000

_FARTHEST = 1_000_000
_NUMBERS = frozenset((int, float))
_SECTIONS = ("dishes", "plates")
_ID = re.compile(r"recognition_([0-9]+)", ANY_CASE)
_DIGITS = re.compile(r"[0-9]+")
#: A camera as a word in the names of folders: `domain` names none.
_CAMERA = re.compile(r"(?<![a-z])(?:main|qualifying)(?![a-z])", ANY_CASE)
_DISH = re.compile(r"dish_([0-9]{1,6})")

#: A labelled box: (`dish_<k>` or `plate`, x1, y1, x2, y2), corners in pixels, x1 < x2 and y1 < y2. A plain tuple, since
#: there are millions, and creating a named tuple takes longer than checking one.
Detection = tuple[str, float, float, float, float]


def photo_of(key: str) -> tuple[int, int]:
    """Return the recognition and the camera (1, 2) that a key names; raise BadInput annotation_key or id_invalid.

    The recognition is that of the nearest folder `recognition_<id>`, else of a folder `<id>` with the file, or with its
    folder photos. The file can name it, too, or alone.
    """
    if not is_text(key) or "\0" in key:
        raise BadInput("annotation_key", "the key is not valid UTF-8, or contains a NUL character")
    if len(key) > MAXIMUM_KEY:
        raise BadInput("annotation_key", f"the key has more than {MAXIMUM_KEY} characters")
    path = key.replace("\\", "/")
    *folders, name = path.split("/")
    nearest = [folder for folder in folders[-2:] if folder.lower() != "photos"][-1:]
    in_folder = next(filter(None, map(_numbers, reversed(folders))), None) or set(filter(_DIGITS.fullmatch, nearest))
    found = {digits.lstrip("0") or "0" for digits in (*in_folder, *numbers_of(name))}
    if not found:
        raise BadInput("annotation_key", "the key names no recognition")
    if len(found) > 1:
        shown = " and ".join(sorted(digits[:40] for digits in found))
        raise BadInput("annotation_key", f"the key names different recognitions, {shown[:100]}")
    camera = camera_of(path) or camera_of(" ".join([*_CAMERA.findall("/".join(folders)), name]))
    if camera is None:
        raise BadInput("annotation_key", "the key does not name one of Main and Qualifying")
    [digits] = found
    if len(digits) > 19 or int(digits) > MAXIMUM_BIGINT:
        raise BadInput("id_invalid", f"the number {digits[:40]} is too large for a bigint")
    return int(digits), camera


def _numbers(folder: str) -> set[str]:
    found = _ID.findall(folder)
    return set(found if FOLDER.fullmatch(folder) else numbers_of(folder)) if found else set()


def rank_of(key: str) -> str:
    """Return a text by which keys sort in natural order, in which export_10 follows export_9."""
    return _DIGITS.sub(lambda digits: digits[0].lstrip("0").zfill(20), key)


def detections_of(value: object, forms: set[Deviation]) -> tuple[list[Detection], list[BadInput]]:
    """Return the usable detections of a photo, in the order of the file, and the problems of the others.

    JSON in strings is read, and added to `forms`. Raises BadInput json_shape for the value as a whole.
    """
    value = unwrapped(value, forms)
    if not isinstance(value, dict) or not any(section in value for section in _SECTIONS):
        raise BadInput("json_shape", "the value is not an object with dishes and plates")
    usable: list[Detection] = []
    problems: list[BadInput] = []
    for section in _SECTIONS:
        part = unwrapped(value.get(section, {"qwen_detections": []}), forms)
        found = unwrapped(part.get("qwen_detections"), forms) if isinstance(part, dict) else None
        if not isinstance(found, list):
            raise BadInput("json_shape", f"{section} has no array qwen_detections")
        if len(usable) + len(problems) + len(found) > MAXIMUM_DETECTIONS:
            raise BadInput("json_shape", f"the photo has more than {MAXIMUM_DETECTIONS} detections")
        for number, entry in enumerate(found, 1):
            try:
                usable.append(_detection_of(entry))
            except BadInput as exc:
                problems.append(BadInput(exc.code, f"detection {number} of {section} {exc.message}"))
    return usable, problems


def _detection_of(entry: object) -> Detection:
    if not isinstance(entry, dict):
        raise BadInput("box_malformed", "is not an object")
    text = entry.get("label")
    dish = _DISH.fullmatch(text) if isinstance(text, str) else None
    if dish is None and text != PLATE:
        raise BadInput("label_unknown", "has a label that is neither dish_<k> nor plate")
    box = entry.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4:
        raise BadInput("box_malformed", "has no bbox_2d of four numbers")
    x1, y1, x2, y2 = box
    is_number = _NUMBERS.issuperset(map(type, box))
    if is_number and -_FARTHEST <= x1 < x2 <= _FARTHEST and -_FARTHEST <= y1 < y2 <= _FARTHEST:
        return f"dish_{int(dish[1])}" if dish else PLATE, x1, y1, x2, y2
    if is_number and all(-_FARTHEST <= corner <= _FARTHEST for corner in box):
        raise BadInput("box_malformed", "has a box without area")
    raise BadInput("box_malformed", "has a corner that is not a number of pixels")

"""Entries of the annotations file of a sample, those that a load rejects or notices among them."""

from __future__ import annotations

from pipeline.sample.menu import to_json
from pipeline.sample.photo import Box

EXPORT = "export_20251024_121255"

# What is wrong in qwen_annotations.json. The first seven are with the last good recognition, if there is one.
BROKEN_ANNOTATIONS: dict[str, str] = {
    "box_three_numbers": "a box of three numbers",
    "box_text": "a box that is a string",
    "box_inverted": "a box whose right edge is left of its left edge",
    "box_null": "a box with null for a number",
    "box_outside": "a box beyond the edge of its photo",
    "label_unknown": "a label that is neither dish_<k> nor plate",
    "value_shape": "the value of a photo is an array, not an object",
    "key_without_camera": "a key that names neither Main nor Qualifying",
    "unknown_recognition": "a key that names a recognition that is not in the dataset",
}

_BAD_BOXES: tuple[object, ...] = (
    [10, 20, 30],
    "10, 20, 60, 80",
    [60, 20, 10, 80],
    [10, 20, None, 80],
    [90_000, 20, 90_050, 80],
)


def detections_of(labels: list[str], boxes: tuple[Box | None, ...]) -> list[dict[str, object]]:
    """Return detections with these labels and boxes; without a box there is none."""
    return [{"bbox_2d": box, "label": label} for label, box in zip(labels, boxes, strict=True) if box]


def value_of(dishes: list[dict[str, object]], plates: list[dict[str, object]]) -> dict[str, object]:
    """Return the value of a photo with these detections."""
    return {"dishes": {"qwen_detections": dishes}, "plates": {"qwen_detections": plates}}


PLAIN = value_of([], [{"bbox_2d": (16, 16, 64, 64), "label": "plate"}])


def entry_of(identifier: str, path: str, value: object) -> bytes:
    """Return the entry of a photo, whose path is relative to the folder of its recognition."""
    return to_json(f"RRS_Dataset/{EXPORT}/recognition_{identifier}/{path}") + b": " + to_json(value)


def bad_detections() -> list[dict[str, object]]:
    """Return detections that are not usable, one for each kind of bad box, and one with an unknown label."""
    boxes = [{"bbox_2d": box, "label": "dish_0"} for box in _BAD_BOXES]
    return [*boxes, {"bbox_2d": [10, 20, 60, 80], "label": "tray"}]


def unusual_values() -> dict[str, object]:
    """Return values that are used and noticed, by the kind of the unusual recognition that they are for.

    A box overhangs its photo by a pixel, another is there thrice, and two values are JSON in strings.
    """
    odd: list[dict[str, object]] = [
        {"bbox_2d": box, "label": "plate"} for box in ([-1, 10, 60, 40], *[[70, 10, 90, 40]] * 3)
    ]
    text = to_json(PLAIN).decode()
    fenced = f"```json\n{text}\n```"
    return {"photo_no_end": value_of([], odd), "photo_padding": text, "photo_trailing_bytes": fenced}

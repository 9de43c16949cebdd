"""Compute the boxes drawn on photos and the items listed beside them, from database rows. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.thumbnail import Thumbnail
from pipeline.units import counted

#: Font size on a photo, as a share of its longer side.
_LETTER = 1 / 26
_KINDS = {"FOOD": "dish", "PLATE": "plate"}
_PREFIXES = {"dish": "", "plate": "P", "other": "X"}


@dataclass(frozen=True)
class Photo:
    """A photo with the rows of its boxes; `picture` is None if there is none, and `note` gives the reason."""

    camera: int
    picture: Thumbnail | None
    note: str
    boxes: Sequence[Any]


@dataclass(frozen=True)
class Item:
    """An item in the list beside the photos, with the label of its boxes, empty if none is shown, and remarks."""

    kind: str
    label: str
    name: str
    note: str


@dataclass(frozen=True)
class Box:
    """A box and the position of its label, in pixels of the photo as stored."""

    kind: str
    label: str
    name: str
    x: float
    y: float
    w: float
    h: float
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Drawn:
    """A photo with its boxes; `letter` is the font size in pixels of the photo."""

    camera: int
    picture: Thumbnail | None
    note: str
    boxes: Sequence[Box]
    letter: float


@dataclass(frozen=True)
class Tray:
    """A recognition as the page shows it."""

    id: int
    note: str
    photos: Sequence[Drawn]
    items: Sequence[Item]


def tray_of(recognition_id: int, note: str, photos: Sequence[Photo], rows: Sequence[Any]) -> Tray:
    """Number the items with a box on a shown photo (dishes 1, 2 …, plates P1 …, others X1 …), and label the boxes."""
    labels: dict[int, tuple[str, str, str]] = {}
    numbers: dict[str, int] = {}
    shown = {box.initial_tray_item_id for photo in photos if photo.picture for box in photo.boxes if _corners(box)}
    for row in rows:
        kind, label = _KINDS.get(row.item_type, "other"), ""
        if row.id in shown:
            numbers[kind] = numbers.get(kind, 0) + 1
            label = f"{_PREFIXES[kind]}{numbers[kind]}"
        labels[row.id] = kind, label, row.name or row.item_type.lower()
    seen = {
        row.id: [photo.camera for photo in photos if any(box.initial_tray_item_id == row.id for box in photo.boxes)]
        for row in rows
    }
    is_annotated = any(photo.boxes for photo in photos)
    items = [Item(*labels[row.id], _note(row, seen[row.id], is_annotated)) for row in rows]
    order = {"dish": 0, "plate": 1, "other": 2}
    items.sort(key=lambda item: order[item.kind])
    return Tray(recognition_id, note, [_drawn(photo, labels) for photo in photos], items)


def _note(row: Any, cameras: Sequence[int], is_annotated: bool) -> str:
    notes = []
    if row.source == "MODEL" and row.item_type != "PLATE":
        notes.append("not on the receipt")
    if row.has_ambiguity:
        notes.append("ambiguous within its line")
    if is_annotated and not cameras:
        notes.append("no box")
    elif len(cameras) == 1:
        notes.append(f"camera {cameras[0]} only")
    return ", ".join(notes)


def _drawn(photo: Photo, labels: Mapping[int, tuple[str, str, str]]) -> Drawn:
    if photo.picture is None:
        return Drawn(photo.camera, None, photo.note, [], 1.0)
    letter = max(photo.picture.width, photo.picture.height) * _LETTER
    boxes = list(_boxes(photo, photo.picture, labels, letter))
    left_out = len(photo.boxes) - len(boxes)
    invalid = f" {counted(left_out, 'box has', 'boxes have')} invalid coordinates." if left_out else ""
    note = f"{photo.note}{invalid}".strip()
    return Drawn(photo.camera, photo.picture, note, boxes, round(letter, 2))


def _boxes(
    photo: Photo, picture: Thumbnail, labels: Mapping[int, tuple[str, str, str]], letter: float
) -> Iterator[Box]:
    for row in photo.boxes:
        corners = _corners(row)
        if not corners:
            continue
        x, y, w, h = corners
        kind, label, name = labels.get(row.initial_tray_item_id, ("other", "?", ""))
        # Above the box; below it for a plate, to keep clear of the dish's label. Always inside the photo.
        label_x = min(max(x, 0.0), picture.width - (0.5 + 0.62 * len(label)) * letter)
        above_or_below = y + h if kind == "plate" else y - 1.3 * letter
        label_y = min(max(above_or_below, 0.0), picture.height - 1.3 * letter)
        yield Box(kind, label, name, x, y, w, h, round(label_x, 2), round(label_y, 2))


def _corners(box: Any) -> list[float]:
    """Return x, y, w and h of a box, empty if they are not all numbers."""
    found = [_number(box.bbox, name) for name in ("x", "y", "w", "h")]
    return [round(value, 2) for value in found if value is not None] if None not in found else []


def _number(bbox: Any, name: str) -> float | None:
    """Return a coordinate, None if it is not a finite number; the jsonb column has no constraint."""
    value = bbox.get(name) if isinstance(bbox, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)

"""What the app's older script leaves behind: rows of the app's tables, and photos that it encoded anew."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
from PIL import Image
from psycopg2.extras import Json

from pipeline.config import Settings
from pipeline.storage import Storage
from tests import world

#: Boxes of a photo: label, x, y, w, h.
Boxes = Sequence[tuple[str, float, float, float, float]]


def load(
    settings: Settings,
    dataset: Path,
    numbers: Sequence[int],
    batch_id: str | None,
    boxes: Mapping[tuple[int, int], Boxes] | None = None,
) -> None:
    """Load recognitions of a dataset; `boxes` has the detections of a photo, by recognition and camera."""
    found = world.folders(dataset)
    with (
        closing(Storage(settings)) as storage,
        closing(psycopg2.connect(settings.database_url.reveal())) as connection,
        connection,
        connection.cursor() as cursor,
    ):
        storage.ensure_bucket()
        for number in numbers:
            folder = found[number]
            cursor.execute("INSERT INTO public.recognitions (id, batch_id) VALUES (%s, %s)", (number, batch_id))
            images = [_photo(cursor, storage, folder, number, camera) for camera in (1, 2)]
            known = _menu(cursor, folder, number)
            items = _receipt(cursor, folder, number, known)
            for camera, image in enumerate(images, start=1):
                for label, *box in (boxes or {}).get((number, camera), ()):
                    item = items.get(label) or _item(cursor, number, items, label)
                    cursor.execute(
                        "INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox)"
                        " VALUES (%s, %s, %s)",
                        (image, item, Json(dict(zip("xywh", box, strict=True)))),
                    )


def _one(cursor: Any, statement: str, values: tuple[Any, ...]) -> int:
    cursor.execute(statement + " RETURNING id", values)
    return int(cursor.fetchone()[0])


def _photo(cursor: Any, storage: Storage, folder: Path, number: int, camera: int) -> int:
    [path] = folder.rglob("*Main.jpg" if camera == 1 else "*Qualifying.jpg")
    encoded = io.BytesIO()
    with Image.open(path) as photo:
        photo.convert("RGB").save(encoded, "JPEG", quality=60)
        size = photo.size
    key = f"recognitions/{number}/camera{camera}.jpg"
    storage.upload(key, encoded.getvalue())
    return _one(
        cursor,
        "INSERT INTO public.images (recognition_id, camera_number, storage_path, width, height)"
        " VALUES (%s, %s, %s, %s, %s)",
        (number, camera, key, *size),
    )


def _document(folder: Path, pattern: str) -> Any:
    paths = list(folder.rglob(pattern))
    return json.loads(paths[0].read_text(encoding="utf-8-sig")) if paths else []


def _menu(cursor: Any, folder: Path, number: int) -> set[str]:
    known: set[str] = set()
    for entry in _document(folder, "*AM.json"):
        if entry["ExternalId"] not in known:
            known.add(entry["ExternalId"])
            cursor.execute(
                "INSERT INTO public.recognition_active_menu_items"
                " (recognition_id, external_id, name, category, metadata) VALUES (%s, %s, %s, %s, %s)",
                (number, entry["ExternalId"], entry["Name"], entry.get("Category"), Json({"old": True})),
            )
    return known


def _receipt(cursor: Any, folder: Path, number: int, known: set[str]) -> dict[str, int]:
    """Write the receipt's lines, options and items; return the item of each label."""
    items: dict[str, int] = {}
    receipt = _document(folder, "*correct_dishes.json")
    recipe = _one(
        cursor, "INSERT INTO public.recipes (recognition_id, raw_payload) VALUES (%s, %s)", (number, Json(receipt))
    )
    for at, line in enumerate(receipt, start=1):
        dishes = {(dish["ExternalId"], dish["Name"]): None for dish in line["Dishes"]}
        single = len(dishes) == 1
        line_id = _one(
            cursor,
            "INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity, raw_name)"
            " VALUES (%s, %s, %s, %s, %s)",
            (recipe, at, line["Count"], not single, " / ".join(name for _, name in dishes)),
        )
        options = [
            _one(
                cursor,
                "INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name, is_selected)"
                " VALUES (%s, %s, %s, %s)",
                (line_id, *dish, single),
            )
            for dish in dishes
        ]
        [(external_id, name), *_] = dishes
        for item_number in range(1, line["Count"] + 1):
            metadata = {"name": name if single else None, "item_number": item_number}
            if item_number == 1:
                metadata["qwen_label"] = f"dish_{at - 1}"
            item = _one(
                cursor,
                "INSERT INTO public.initial_tray_items (recognition_id, item_type, source, recipe_line_option_id,"
                " recipe_line_id, menu_item_external_id, metadata)"
                " VALUES (%s, 'FOOD', 'RECIPE_LINE_OPTION', %s, %s, %s, %s)",
                (
                    number,
                    options[0] if single else None,
                    None if single else line_id,
                    external_id if single and external_id in known else None,
                    Json(metadata),
                ),
            )
            items.setdefault(f"dish_{at - 1}", item)
    _item(cursor, number, items, "plate")
    return items


def _item(cursor: Any, number: int, items: dict[str, int], label: str) -> int:
    items[label] = _one(
        cursor,
        "INSERT INTO public.initial_tray_items (recognition_id, item_type, source, metadata)"
        " VALUES (%s, %s, 'MODEL', %s)",
        (number, "PLATE" if label == "plate" else "FOOD", Json({"qwen_label": label})),
    )
    return items[label]

"""What a test compares: the domain, the raw rows and the bucket as they are, and as a dataset says they should be.

The expectation is worked out from the files alone, with none of the product's code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from typing import Any

import psycopg2
import requests
from PIL import Image

from pipeline.config import Settings
from pipeline.database.queries import statement
from pipeline.steps.verify import CHECKS

#: What makes an empty database the project of an app, with trays of its own.
APP = Path(__file__).with_name("app_project.sql")
DOMAIN = (
    "recognitions",
    "images",
    "menus",
    "menu_items",
    "recipes",
    "recipe_lines",
    "recipe_line_options",
    "initial_tray_items",
    "initial_annotations",
)
OURS = (
    *(f"public.{name}" for name in DOMAIN),
    "raw.photos",
    "raw.receipts",
    "raw.menus",
    "raw.detections",
    "ingest.batches",
    "ingest.batch_state",
    "ingest.manifest",
    "ingest.claims",
    "ingest.rejects",
    "ingest.proofs",
)

#: The trays that an app's project has of its own.
_OTHERS = "BETWEEN 90001 AND 90099"
#: The recognition that a row is of.
_RECOGNITION = {
    "public.recognitions": "id",
    "public.recipe_lines": "(SELECT p.recognition_id FROM public.recipes p WHERE p.id = recipe_id)",
    "public.recipe_line_options": "(SELECT p.recognition_id FROM public.recipes p"
    " JOIN public.recipe_lines l ON l.recipe_id = p.id WHERE l.id = recipe_line_id)",
    **dict.fromkeys(
        ("public.initial_annotations", "public.work_annotations", "public.split_annotations"),
        "(SELECT i.recognition_id FROM public.images i WHERE i.id = image_id)",
    ),
    **dict.fromkeys(
        (
            *("public.images", "public.recipes", "public.initial_tray_items", "public.recognition_active_menu_items"),
            *("public.validation_work_log", "public.work_items", "public.test_split_log", "public.split_items"),
            *("raw.recognition_files", "raw.recipes", "raw.qwen_annotations"),
        ),
        "recognition_id",
    ),
}


def ours(table: str) -> str:
    """Return the condition by which rows of a table are not of the trays that an app has of its own."""
    return f"{_RECOGNITION[table]} NOT {_OTHERS}" if table in _RECOGNITION else "true"


def recognition_of(table: str) -> str:
    """Return the expression for the recognition that a row of a table is of."""
    return _RECOGNITION[table]


def others(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return all that an app's project has of its own trays."""
    texts = {
        name: f"SELECT t::text FROM {name} t WHERE {column} {_OTHERS} ORDER BY 1"
        for name, column in _RECOGNITION.items()
    }
    return dict(zip(texts, queries(dsn, texts.values()), strict=True))


_FIRST = itemgetter(0)
_ITEM_KEY = itemgetter(0, 1, 2, 3, 4)
_RECOGNITIONS = f"SELECT id, batch_id, captured_on::text FROM public.recognitions WHERE id NOT {_OTHERS} ORDER BY id"
_MENUS = f"""
    SELECT recognition_id, external_id, name, category, price, metadata
    FROM public.recognition_active_menu_items WHERE recognition_id NOT {_OTHERS}
    ORDER BY recognition_id, external_id, name
"""
_IMAGES = f"""
    SELECT recognition_id, camera_number, storage_path, width, height, byte_size, sha256
    FROM public.images WHERE recognition_id NOT {_OTHERS} ORDER BY recognition_id, camera_number
"""
_LINES = f"""
    SELECT p.recognition_id, l.line_number, l.quantity, l.has_ambiguity, l.raw_name,
        (SELECT array_agg(o.external_id ORDER BY o.id) FROM public.recipe_line_options o WHERE o.recipe_line_id = l.id),
        (SELECT array_agg(o.name ORDER BY o.id) FROM public.recipe_line_options o WHERE o.recipe_line_id = l.id)
    FROM public.recipe_lines l JOIN public.recipes p ON p.id = l.recipe_id
    WHERE p.recognition_id NOT {_OTHERS} ORDER BY 1, 2
"""
_ITEMS = f"""
    SELECT i.recognition_id, i.item_type::text, i.source::text, i.line_number, i.ordinal, i.menu_item_external_id,
        o.external_id
    FROM public.initial_tray_items i LEFT JOIN public.recipe_line_options o ON o.id = i.recipe_line_option_id
    WHERE i.recognition_id NOT {_OTHERS}
    ORDER BY i.recognition_id, i.item_type::text, i.source::text, i.line_number, i.ordinal
"""
_ANNOTATIONS = f"""
    SELECT p.recognition_id, p.camera_number, a.detection, a.bbox, a.source, i.item_type::text, i.source::text,
        i.line_number, i.ordinal
    FROM public.initial_annotations a
    JOIN public.images p ON p.id = a.image_id
    JOIN public.initial_tray_items i ON i.id = a.initial_tray_item_id AND i.recognition_id = p.recognition_id
    WHERE p.recognition_id NOT {_OTHERS}
    ORDER BY p.recognition_id, p.camera_number, a.detection
"""


#: A dataset, the batch that loaded it, and which of its recognitions; None for all.
Part = tuple[Path, str, "Iterable[int] | None"]


@dataclass
class Domain:
    """The domain by natural keys: what a reader sees of the recognitions, whatever ids the rows have."""

    recognitions: list[tuple[Any, ...]]
    menus: list[tuple[Any, ...]]
    images: list[tuple[Any, ...]]
    lines: list[tuple[Any, ...]]
    items: list[tuple[Any, ...]]
    annotations: list[tuple[Any, ...]]


def query(dsn: str, statement: str, values: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
    """Run one statement, commit, and return its rows."""
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def queries(dsn: str, statements: Iterable[str]) -> list[list[tuple[Any, ...]]]:
    """Run statements that only look, over one connection, and return the rows of each."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        found = []
        for statement in statements:
            cursor.execute(statement)
            found.append(cursor.fetchall())
        return found


def domain(dsn: str) -> Domain:
    """Return the domain of a database."""
    return Domain(*queries(dsn, (_RECOGNITIONS, _MENUS, _IMAGES, _LINES, _ITEMS, _ANNOTATIONS)))


def without_ordinals(found: Domain) -> tuple[set[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return items and annotations for a domain in which annotations kept the items of earlier loads."""
    items = {row[:4] + row[5:] if row[2] == "MODEL" else row for row in found.items}
    return items, [row[:-1] for row in found.annotations]


def counts(dsn: str) -> dict[str, int]:
    """Return how many rows each of our tables has, those of the app's own trays aside."""
    found = queries(dsn, (f"SELECT count(*) FROM {name} WHERE {ours(name)}" for name in OURS))
    return {name: int(rows[0][0]) for name, rows in zip(OURS, found, strict=True)}


def dump(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of the domain with their ids, for `nothing was changed`."""
    texts = (f"SELECT t.*::text FROM public.{name} t ORDER BY 1" for name in DOMAIN)
    return dict(zip(DOMAIN, queries(dsn, texts), strict=True))


def objects(settings: Settings) -> dict[str, str]:
    """Return key -> SHA-256 of the content of every object in the bucket, each downloaded."""
    found: dict[str, str] = {}
    headers = {"Authorization": f"Bearer {settings.key.reveal()}"}
    with requests.Session() as session:
        session.trust_env = False
        cursor = None
        while True:
            body = {"prefix": "", **({"cursor": cursor} if cursor else {})}
            url = f"{settings.storage_url}/object"
            page = session.post(f"{url}/list-v2/{settings.bucket}", json=body, headers=headers, timeout=30).json()
            for entry in page["objects"]:
                answer = session.get(f"{url}/{settings.bucket}/{entry['name']}", headers=headers, timeout=30)
                assert answer.status_code == 200
                found[entry["name"]] = hashlib.sha256(answer.content).hexdigest()
            if not page["hasNext"]:
                return found
            cursor = page["nextCursor"]


def folders(dataset: Path) -> dict[int, Path]:
    """Return recognition -> folder; of several exports the one that sorts last."""
    found: dict[int, Path] = {}
    parents = [dataset, *sorted(path for path in dataset.iterdir() if path.is_dir())]
    for parent in parents:
        for path in parent.iterdir():
            match = re.fullmatch(r"(?:recognition_)?(\d+)", path.name)
            if match and path.is_dir():
                found[int(match[1])] = path
    return found


def expected(dataset: Path, batch_id: str, ids: Iterable[int] | None = None, qwen: Path | None = None) -> Domain:
    """Return what the domain has to be once these recognitions, all by default, are loaded by a batch.

    Arguments:
        qwen: the annotations file that was loaded for them; all of its boxes are good.
    """
    result = Domain([], [], [], [], [], [])
    annotations = json.loads(qwen.read_text(encoding="utf-8")) if qwen is not None else {}
    known = folders(dataset)
    for number in sorted(known if ids is None else ids):
        folder = known[number]
        photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        by_camera = sorted(photos, key=lambda path: "qualifying" in path.name.lower())
        date = re.search(r"\d{4}-\d\d-\d\d", by_camera[0].name)
        result.recognitions.append((number, batch_id, date[0] if date else None))
        for camera, path in enumerate(by_camera, 1):
            content = path.read_bytes()
            with Image.open(path) as image:
                width, height = image.size
            key = f"{batch_id}/recognitions/{number}/camera{camera}.jpg"
            digest = hashlib.sha256(content).hexdigest()
            result.images.append((number, camera, key, width, height, len(content), digest))
        _expect_documents(result, number, folder)
        _expect_annotations(result, number, annotations)
    return result


def _expect_documents(result: Domain, number: int, folder: Path) -> None:
    menu = _document(folder, "AM.json")
    entries = []
    known = {str(entry["ExternalId"]) for entry in menu or []}
    for entry in menu or []:
        price = entry.pop("Price", None)
        external_id, name = str(entry.pop("ExternalId")), entry.pop("Name")
        category = entry.pop("Category", None)
        entries.append((number, external_id, name, category, None if price is None else Decimal(str(price)), entry))
    result.menus += sorted(entries, key=lambda entry: (entry[1].encode(), entry[2].encode()))
    for line_number, line in enumerate(_document(folder, "correct_dishes.json", "CD.json") or [], 1):
        dishes, quantity = line["Dishes"], line["Count"]
        names = [dish["Name"] for dish in dishes]
        external_ids = [str(dish["ExternalId"]) for dish in dishes]
        raw_name = " / ".join(names)
        result.lines.append((number, line_number, quantity, len(dishes) > 1, raw_name, external_ids, names))
        option = external_ids[0] if len(external_ids) == 1 else None  # of several, a person chooses one later
        item = (option if option in known else None, option)
        result.items += [
            (number, "FOOD", "RECIPE_LINE_OPTION", line_number, nth, *item) for nth in range(1, quantity + 1)
        ]


def _expect_annotations(result: Domain, number: int, annotations: dict[str, Any]) -> None:
    """Pair detections with items as the contract says: the j-th dish_k with item min(j, n) of line k + 1."""
    quantities = {row[1]: row[2] for row in result.lines if row[0] == number}
    seen_by_model = set()
    for camera, name in ((1, "Main"), (2, "Qualifying")):
        keys = [key for key in annotations if f"recognition_{number}/" in key and name in key]
        if not keys:
            continue
        value = annotations[max(keys)]
        nth: dict[str, int] = {}
        boxes = [*value["dishes"]["qwen_detections"], *value["plates"]["qwen_detections"]]
        for detection, box in enumerate(boxes, 1):
            label = box["label"]
            nth[label] = nth.get(label, 0) + 1
            if label == "plate":
                item: tuple[Any, ...] = ("PLATE", "MODEL", 0, nth[label])
            else:
                line = int(label.removeprefix("dish_")) + 1
                if line in quantities:
                    item = ("FOOD", "RECIPE_LINE_OPTION", line, min(nth[label], quantities[line]))
                else:
                    item = ("FOOD", "MODEL", line, nth[label])
            if item[1] == "MODEL":
                seen_by_model.add((number, *item, None, None))
            x1, y1, x2, y2 = box["bbox_2d"]
            bbox = {"x": x1, "y": y1, "w": round(x2 - x1, 3), "h": round(y2 - y1, 3)}
            result.annotations.append((number, camera, detection, bbox, "MODEL", *item))
    result.items += sorted(seen_by_model)


def _document(folder: Path, *endings: str) -> Any:
    for path in folder.iterdir():
        if path.name.endswith(endings):
            return json.loads(path.read_text(encoding="utf-8-sig"))
    return None


def forget_migrations(dsn: str, version: str) -> None:
    """Take migrations of ours, from a version on, off the record, whichever history has them."""
    history = "ingest" if query(dsn, "SELECT 1 FROM ingest.schema_migrations") else "supabase_migrations"
    query(dsn, f"DELETE FROM {history}.schema_migrations WHERE version >= %s", (version,))


#: Recipes with a receipt that is not that of the batch which readers see.
OTHER_PAYLOADS = """
    SELECT 'raw_payload', p.recognition_id::text
    FROM public.recipes p
    JOIN public.recognitions g ON g.id = p.recognition_id
    JOIN raw.receipts r ON r.batch_id = g.batch_id AND r.recognition_id = g.id
    WHERE p.raw_payload <> r.receipt AND NOT EXISTS (
        SELECT FROM ingest.manifest m JOIN ingest.batches b ON b.id = m.batch_id
        WHERE m.recognition_id = g.id AND b.adopted)
"""


def inconsistencies(settings: Settings) -> list[tuple[Any, ...]]:
    """Return what breaks one of the promises within the database, found by the statements that `verify` runs."""
    checks = [f"SELECT what, message FROM ({statement(name)}) AS problem" for name in CHECKS]
    return [row for rows in queries(settings.database_url.reveal(), [*checks, OTHER_PAYLOADS]) for row in rows]


def dangling(settings: Settings) -> list[tuple[Any, ...]]:
    """Return the images that readers see, and whose object is not there as the row says."""
    rows = domain(settings.database_url.reveal()).images
    stored = objects(settings)
    return [row for row in rows if stored.get(row[2]) != row[6]]


def nothing(settings: Settings) -> None:
    """Assert that nothing is left of any batch but its own row, which says that it was reset."""
    found = counts(settings.database_url.reveal())
    batches = query(settings.database_url.reveal(), "SELECT count(*) FROM ingest.batches WHERE state = 'reset'")
    assert found == {**dict.fromkeys(found, 0), "ingest.batches": batches[0][0]}
    assert objects(settings) == {}


@dataclass
class World:
    """What has to be there: the domain, and key -> SHA-256 of the objects."""

    domain: Domain
    objects: dict[str, str]


def wanted(*parts: Part, qwen: Path | None = None, superseded: Iterable[Part] = ()) -> World:
    """Return what batches (dataset, batch id, recognitions) make of domain and bucket.

    Arguments:
        qwen: the annotations that readers see of all of them.
        superseded: what readers see no more, and the bucket still holds.
    """
    result = Domain([], [], [], [], [], [])
    for dataset, batch_id, ids in parts:
        part = expected(dataset, batch_id, ids, qwen)
        for name in vars(result):
            getattr(result, name).extend(getattr(part, name))
    for name in vars(result):
        # Stable: the order within stays.
        getattr(result, name).sort(key=_ITEM_KEY if name == "items" else _FIRST)
    images = [*result.images]
    for dataset, batch_id, ids in superseded:
        images += expected(dataset, batch_id, ids).images
    return World(result, {row[2]: row[6] for row in images})


def compare(settings: Settings, world: World) -> None:
    """Assert that domain and bucket are exactly that, and that the database does not contradict itself."""
    found = domain(settings.database_url.reveal())
    for name in vars(found):
        assert getattr(found, name) == getattr(world.domain, name), name
    assert objects(settings) == world.objects
    assert inconsistencies(settings) == []


def check(settings: Settings, *parts: Part, qwen: Path | None = None, superseded: Iterable[Part] = ()) -> None:
    """Assert that domain and bucket are exactly what batches make of them; see `wanted`."""
    compare(settings, wanted(*parts, qwen=qwen, superseded=superseded))

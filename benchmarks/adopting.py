"""What an app's project costs: adopting the trays of an older script, and a load into the app's own tables."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from benchmarks.bench import REPOSITORY, SMALL, Bench, World
from benchmarks.domain import copy, export
from benchmarks.loading import LIMIT_MB
from benchmarks.rows import Row, middle
from pipeline.storage import Storage

#: The app's project before our migrations, with three trays.
APP = REPOSITORY / "tests" / "app_project.sql"
#: The bound of `adopt`: ten minutes for 100,000 recognitions.
_SECONDS_EACH = 600 / 100_000
_THREADS = 16
_FIRST = 500_000_000
_TRAYS = """
INSERT INTO public.recognitions (id, batch_id) SELECT n, 'older_' || n %% 7 FROM generate_series(%(first)s, %(last)s) n;
INSERT INTO public.images (recognition_id, camera_number, storage_path, width, height)
SELECT n, c, format('recognitions/%%s/camera%%s.jpg', n, c), 160, 120
FROM generate_series(%(first)s, %(last)s) n CROSS JOIN generate_series(1, 2) c;
INSERT INTO public.recognition_active_menu_items (recognition_id, external_id, name, category, price, metadata)
SELECT n, e::text, 'dish ' || e, 'soups', 100, '{"Weight": 250, "Kind": "main"}'
FROM generate_series(%(first)s, %(last)s) n CROSS JOIN generate_series(1, %(entries)s) e;
INSERT INTO public.recipes (recognition_id, raw_payload) SELECT n, '[]' FROM generate_series(%(first)s, %(last)s) n;
INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, raw_name)
SELECT p.id, l, 1, 'dish ' || l FROM public.recipes p CROSS JOIN generate_series(1, 3) l
WHERE p.recognition_id BETWEEN %(first)s AND %(last)s;
INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name, is_selected)
SELECT l.id, l.line_number::text, l.raw_name, true
FROM public.recipes p JOIN public.recipe_lines l ON l.recipe_id = p.id
WHERE p.recognition_id BETWEEN %(first)s AND %(last)s;
INSERT INTO public.initial_tray_items (recognition_id, item_type, source, recipe_line_option_id, metadata)
SELECT p.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', o.id,
    jsonb_build_object('name', o.name, 'item_number', 1, 'qwen_label', 'dish_' || l.line_number - 1)
FROM public.recipes p
JOIN public.recipe_lines l ON l.recipe_id = p.id
JOIN public.recipe_line_options o ON o.recipe_line_id = l.id
WHERE p.recognition_id BETWEEN %(first)s AND %(last)s;
INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox)
SELECT i.id, t.id, '{"x": 1, "y": 2, "w": 3, "h": 4}'
FROM public.images i JOIN public.initial_tray_items t USING (recognition_id)
WHERE i.recognition_id BETWEEN %(first)s AND %(last)s;
"""
#: The app's tables in the order of their references, and the rows of a batch in each.
_TABLES = {
    "menus": "SELECT t.* FROM public.menus t",
    "menu_items": "SELECT t.* FROM public.menu_items t",
    "recognitions": "SELECT t.* FROM public.recognitions t WHERE batch_id = 'b'",
    "recognition_active_menu_items": "SELECT t.* FROM public.recognition_active_menu_items t JOIN public.recognitions r"
    " ON r.id = t.recognition_id WHERE r.batch_id = 'b'",
    "images": "SELECT t.* FROM public.images t JOIN public.recognitions r ON r.id = t.recognition_id"
    " WHERE r.batch_id = 'b'",
    "recipes": "SELECT t.* FROM public.recipes t JOIN public.recognitions r ON r.id = t.recognition_id"
    " WHERE r.batch_id = 'b'",
    "recipe_lines": "SELECT t.* FROM public.recipe_lines t JOIN public.recipes p ON p.id = t.recipe_id"
    " JOIN public.recognitions r ON r.id = p.recognition_id WHERE r.batch_id = 'b'",
    "recipe_line_options": "SELECT t.* FROM public.recipe_line_options t JOIN public.recipe_lines l"
    " ON l.id = t.recipe_line_id JOIN public.recipes p ON p.id = l.recipe_id"
    " JOIN public.recognitions r ON r.id = p.recognition_id WHERE r.batch_id = 'b'",
    "initial_tray_items": "SELECT t.* FROM public.initial_tray_items t JOIN public.recognitions r"
    " ON r.id = t.recognition_id WHERE r.batch_id = 'b'",
}
_REMOVE = """
DELETE FROM public.recipes WHERE recognition_id IN (SELECT id FROM public.recognitions WHERE batch_id = 'b');
DELETE FROM public.recognitions WHERE batch_id = 'b';
DELETE FROM public.menu_items;
DELETE FROM public.menus;
"""


def adopting(place: Bench, trays: int, entries: int, added: int, repeats: int) -> list[Row]:
    """Adopt trays with menu entries in the app's tables; then load others, beside COPY of the same rows.

    Arguments:
        trays: that the older script has loaded.
        entries: menu entries of each.
        added: recognitions of a load, on top of those and into an app without trays.
    """
    rows = []
    pairs: dict[str, list[tuple[float, float]]] = {"adopted": [], "nothing": []}
    grown: list[tuple[float, float]] = []
    with place.world(project=APP) as world, place.world(project=APP) as empty:
        for one in (world, empty):
            with closing(Storage(one.settings)) as storage:
                storage.ensure_bucket()  # as the older script has; a load creates none beside photos
        _fill(world, trays, entries)
        adopted = world.run("adopt", "--confirm", "--json")
        assert adopted.result["recognitions"] >= trays, adopted.result
        rows.append(Row(f"adopt {trays:,} trays / limit", adopted.seconds, trays * _SECONDS_EACH, "s"))
        rows.append(Row(f"adopt {trays:,} trays, memory / limit", adopted.megabytes, LIMIT_MB, "MB"))
        for turn in range(repeats):
            dataset = place.dataset(added, SMALL)
            taken = {}
            for name, target in sorted({"adopted": world, "nothing": empty}.items(), reverse=bool(turn % 2)):
                loaded = target.run("load", "--batch-id", "b", "--source", str(dataset), "--local-scheduler", "--json")
                taken[name] = float(loaded.result["operations"]["transform"]["total_seconds"])
                files = export(target, place.folder, _TABLES)
                target.run("reset", "--batch-id", "b", "--confirm", "--json")
                target.maintain("VACUUM (ANALYZE)")
                pairs[name].append((taken[name] / added * 1000, copy(target, files) / added * 1000))
                target.query(_REMOVE)
                target.maintain("VACUUM (ANALYZE)")
            grown.append((taken["adopted"] / added * 1000, taken["nothing"] / added * 1000))
    for name, each in pairs.items():
        rows.append(middle(f"commit of {added:,} recognitions on top of {name} / COPY of its rows", each, "ms"))
    rows.append(middle(f"commit of {added:,} on top of {trays:,} adopted / on top of nothing", grown, "ms"))
    return rows


def _fill(world: World, trays: int, entries: int) -> None:
    """Make trays with SQL, a thousand at a time, and an object for each of their photos."""
    for first in range(_FIRST, _FIRST + trays, 1000):
        last = min(first + 1000, _FIRST + trays) - 1
        world.transact([_TRAYS], {"first": first, "last": last, "entries": entries})
    world.maintain("VACUUM (ANALYZE)")
    with closing(Storage(world.settings)) as storage, ThreadPoolExecutor(_THREADS) as executor:
        keys = (f"recognitions/{n}/camera{c}.jpg" for n in range(_FIRST, _FIRST + trays) for c in (1, 2))
        for _ in executor.map(lambda key: storage.upload(key, key.encode()), keys):
            pass

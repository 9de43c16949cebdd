"""What the id of a row means, which never changes."""

from __future__ import annotations

from tests import world

#: For each kind of row: its id, then what it means.
MEANINGS = {
    "annotation": f"""
        SELECT a.id, i.recognition_id, i.camera_number, a.label, a.bbox::text
        FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id
        WHERE i.{world.ours("public.images")}""",
    "pairing": f"SELECT id, initial_tray_item_id FROM public.initial_annotations"
    f" WHERE {world.ours('public.initial_annotations')}",
    "item": f"""
        SELECT t.id, t.recognition_id, t.item_type, t.source, t.metadata ->> 'name',
            (SELECT array_agg(o.name ORDER BY o.name) FROM public.recipe_line_options o
             WHERE o.recipe_line_id = t.recipe_line_id)
        FROM public.initial_tray_items t WHERE {world.ours("public.initial_tray_items")}""",
    "line": f"""
        SELECT l.id, p.recognition_id, l.quantity,
            (SELECT array_agg(o.external_id || o.name ORDER BY o.name) FROM public.recipe_line_options o
             WHERE o.recipe_line_id = l.id)
        FROM public.recipe_lines l JOIN public.recipes p ON p.id = l.recipe_id
        WHERE p.{world.ours("public.recipes")}""",
    "option": "SELECT id, recipe_line_id, external_id, name FROM public.recipe_line_options"
    f" WHERE {world.ours('public.recipe_line_options')}",
}


def meanings(dsn: str) -> dict[str, dict[int, tuple[object, ...]]]:
    """Return what each id means, by kind of row."""
    return {
        kind: {row[0]: tuple(map(str, row[1:])) for row in world.query(dsn, text)} for kind, text in MEANINGS.items()
    }

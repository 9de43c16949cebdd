"""Verify: contradictions within the database."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg2
import pytest

from pipeline.config import Settings
from pipeline.database.queries import statement
from pipeline.steps.verify import CHECKS
from tests import reset_support, world
from tests.reset_support import Command, LoadBatch, fail_at, stop_failing
from tests.services import MakeDataset
from tests.sweeps import sweep

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load


@dataclass(frozen=True)
class Flaw:
    """What contradicts itself: the check that is to find it, what makes it, and what is found."""

    check: str
    make: str
    found: tuple[str | None, str, str]


def flaws(first: int, last: int, other: int, facts: dict[str, Any]) -> Iterator[Flaw]:
    """Yield flaws of a database where readers see `first` in version b2, `last` in b1, and `other` in b3."""
    lines, items = facts["lines"], facts["items"]
    yield Flaw(
        "check_versions",
        f"DELETE FROM public.recognitions WHERE id = {last}",
        ("b1", f"recognition {last}", "is in finished batch b1 and not in the domain"),
    )
    yield Flaw(
        "check_versions",
        f"UPDATE public.recognitions SET batch_id = 'b1' WHERE id = {first}",
        ("b2", f"recognition {first}", "is shown as batch b1 has it, not as batch b2"),
    )
    yield Flaw(
        "check_versions",
        f"INSERT INTO public.recognitions (id, batch_id) VALUES ({facts['unfinished']}, 'b4')",
        ("b4", f"recognition {facts['unfinished']}", "is in the domain and in no finished batch"),
    )
    yield Flaw(
        "check_images",
        f"DELETE FROM public.images WHERE recognition_id = {first} AND camera_number = 2",
        ("b2", f"recognition {first}, camera 2", "has no image"),
    )
    key = f"b1/recognitions/{last}/camera1.jpg"
    for change, path in (
        ("storage_path = 'b1/x'", "b1/x"),
        ("byte_size = byte_size + 1", key),
        ("sha256 = repeat('0', 64)", key),
        ("width = width + 1", key),
        ("height = height + 1", key),
    ):
        yield Flaw(
            "check_images",
            f"UPDATE public.images SET {change} WHERE recognition_id = {last} AND camera_number = 1",
            ("b1", f"recognition {last}, camera 1", f"names {path}, which is not what batch b1 sent"),
        )
    yield Flaw(
        "check_raw",
        f"DELETE FROM raw.receipts WHERE batch_id = 'b1' AND recognition_id = {first}",
        ("b1", "batch b1", "recognitions in raw: 3 instead of 4"),
    )
    yield Flaw(
        "check_raw",
        "DELETE FROM raw.receipts WHERE batch_id = 'b4'",
        ("b4", "batch b4", "recognitions in raw: 0 instead of 2"),
    )
    for batch_id in ("zz", "b0"):
        yield Flaw(
            "check_raw",
            f"INSERT INTO raw.receipts (batch_id, recognition_id) VALUES ('{batch_id}', 1)",
            (batch_id, f"batch {batch_id}", "recognitions in raw: 1 instead of 0"),
        )
    for batch_id in ("zz", "q0", "b1"):
        yield Flaw(
            "check_raw",
            "INSERT INTO raw.detections (batch_id, recognition_id, camera_number, detection, label, x1, y1, x2,"
            f" y2) VALUES ('{batch_id}', 1, 1, 1, 'plate', 0, 0, 1, 1)",
            (batch_id, f"batch {batch_id}", "has annotations in raw, and is not there"),
        )
    yield Flaw(
        "check_receipts",
        f"DELETE FROM public.initial_tray_items WHERE id = {facts['item']}",
        (
            "b1",
            f"recognition {last}",
            f"has {lines} receipt lines with {items - 1} items instead of {lines} with {items}",
        ),
    )
    yield Flaw(
        "check_receipts",
        "INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity, raw_name)"
        f" SELECT id, 99, 1, false, 'x' FROM public.recipes WHERE recognition_id = {last}",
        (
            "b1",
            f"recognition {last}",
            f"has {lines + 1} receipt lines with {items} items instead of {lines} with {items}",
        ),
    )
    yield Flaw(
        "check_annotations",
        f"DELETE FROM public.initial_annotations WHERE id = {facts['annotation']}",
        (
            "q1",
            f"recognition {last}, camera {facts['camera']}",
            f"has {facts['annotations'] - 1} annotations instead of {facts['annotations']}",
        ),
    )
    yield Flaw(
        "check_annotations",
        "INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, bbox, source) "
        f"SELECT min(id), {facts['item']}, 1, '{{}}', 'MODEL' FROM public.images WHERE recognition_id = {other}",
        ("b3", f"recognition {other}, camera 1", "has 1 annotations instead of 0"),
    )
    yield Flaw(
        "check_annotations",
        "INSERT INTO public.initial_tray_items (id, recognition_id, item_type, source, ordinal) OVERRIDING SYSTEM VALUE"
        f" VALUES (1000000, {other}, 'PLATE', 'MODEL', 1)",
        ("b3", "tray item 1000000", "is of the model, and no annotation shows it"),
    )
    yield Flaw(
        "check_menus",
        "INSERT INTO public.menus (id, content_sha256) OVERRIDING SYSTEM VALUE VALUES (1000000, 'x')",
        (None, "menu 1000000", "belongs to no recognition"),
    )
    for batch_id, step in (("b1", "discover"), ("b1", "upload"), ("b1", "copy"), ("b1", "transform"), ("q1", "copy")):
        yield Flaw(
            "check_markers",
            f"DELETE FROM ingest.batch_state WHERE batch_id = '{batch_id}' AND step = '{step}'",
            (batch_id, f"batch {batch_id}", "is done and lacks a marker"),
        )
    for make, what in (
        ("INSERT INTO ingest.batch_state (batch_id, step, started_at) VALUES ('b0', 'load', now())", "markers"),
        ("UPDATE ingest.manifest SET batch_id = 'b0' WHERE batch_id = 'b4'", "a manifest"),
    ):
        yield Flaw("check_markers", make, ("b0", "batch b0", f"is reset and has {what} left"))
    for batch_id, state_now in (("b1", "done"), ("b0", "reset"), ("b3", "resetting")):
        yield Flaw(
            "check_markers",
            f"UPDATE ingest.batches SET state = '{state_now}' WHERE id = '{batch_id}';"
            f"INSERT INTO ingest.claims VALUES ('load', 1, '{batch_id}')",
            (batch_id, f"batch {batch_id}", f"is {state_now} and holds recognitions"),
        )


def test_each_check_finds_what_contradicts_itself_and_nothing_in_a_sound_database(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(4)
    load(dataset, "b1")
    load(dataset, "q0", qwen=True)
    load(dataset, "q1", "--force", qwen=True)
    load(dataset, "b2", "--force", "--limit", "2")
    load(small_dataset(1, seed=9), "b3")
    load(small_dataset(1, seed=8), "b0")
    for batch_id in ("b0", "q0"):
        assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
    fail_at(dsn, "transform")
    assert command("load", "--source", small_dataset(2, seed=7), "--batch-id", "b4", "--local-scheduler").code == 3
    stop_failing(dsn)
    first, *_, last, other = sorted({*world.folders(dataset), *world.folders(small_dataset(1, seed=9))})
    values = {
        "item": f"SELECT min(id) FROM public.initial_tray_items WHERE recognition_id = {last} AND line_number = 1"
        " AND source = 'RECIPE_LINE_OPTION'",
        "items": f"SELECT count(*) FROM public.initial_tray_items WHERE recognition_id = {last}"
        " AND source = 'RECIPE_LINE_OPTION'",
        "lines": "SELECT count(*) FROM public.recipe_lines l JOIN public.recipes p ON p.id = l.recipe_id"
        f" WHERE p.recognition_id = {last}",
        "annotation": "SELECT min(a.id) FROM public.initial_annotations a JOIN public.initial_tray_items i"
        f" ON i.id = initial_tray_item_id WHERE recognition_id = {last} AND i.source <> 'MODEL'",
        "unfinished": "SELECT min(recognition_id) FROM ingest.manifest WHERE batch_id = 'b4'",
    }
    facts = {name: world.query(dsn, text)[0][0] for name, text in values.items()}
    photo = f"SELECT image_id FROM public.initial_annotations WHERE id = {facts['annotation']}"
    counted = f"SELECT count(*) FROM public.initial_annotations WHERE image_id = ({photo})"
    facts["annotations"] = world.query(dsn, counted)[0][0]
    facts["camera"] = world.query(dsn, f"SELECT camera_number FROM public.images WHERE id = ({photo})")[0][0]
    assert None not in facts.values()
    seen = set()
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:

        def found(check: str) -> list[tuple[Any, ...]]:
            cursor.execute(f"SELECT batch_id, what, message FROM ({statement(check)}) AS problem")
            return cursor.fetchall()

        assert {check: found(check) for check in CHECKS} == {check: [] for check in CHECKS}
        for flaw in flaws(first, last, other, facts):
            cursor.execute("SET LOCAL session_replication_role = replica")  # a broken database has no foreign keys
            cursor.execute(flaw.make)
            assert found(flaw.check) == [flaw.found], flaw.make
            connection.rollback()
            seen.add(flaw.check)
    assert seen == set(CHECKS)
    assert world.inconsistencies(settings) == []


def test_items_of_others_contradict_nothing(
    load: LoadBatch, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(2)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    first, second = sorted(world.folders(dataset))
    for item_type, source in itertools.product(("BOTTLE", "FOOD", "PLATE"), ("MODEL", "RECIPE_LINE_OPTION")):
        values = f"({first}, '{item_type}', '{source}')"
        world.query(dsn, f"INSERT INTO public.initial_tray_items (recognition_id, item_type, source) VALUES {values}")
    world.query(dsn, f"UPDATE public.initial_tray_items SET item_type = 'BOTTLE' WHERE recognition_id = {second}")
    assert world.inconsistencies(settings) == []


INCONSISTENT = {
    "of no batch": "INSERT INTO public.menus (id, content_sha256) OVERRIDING SYSTEM VALUE VALUES (1000000, 'x')",
    "of a batch": "UPDATE public.images SET width = 1 WHERE camera_number = 1 AND storage_path LIKE 'b1/%'",
    "of annotations": "DELETE FROM public.initial_annotations WHERE id = (SELECT min(id) FROM"
    " public.initial_annotations WHERE detection IS NOT NULL)",
    "of a batch that was reset": "INSERT INTO ingest.batches (id, kind, state, source, bucket)"
    " VALUES ('zz', 'load', 'reset', '/', 'x'); INSERT INTO public.recognitions (id, batch_id) VALUES (1, 'zz')",
    "of a batch in another bucket": "UPDATE ingest.batches SET bucket = 'another' WHERE id = 'b2';"
    "UPDATE public.images SET width = 1 WHERE camera_number = 1 AND storage_path LIKE 'b2/%'",
}


@pytest.mark.parametrize("kind", sweep(zip(INCONSISTENT)))
def test_a_database_that_contradicts_itself_is_told_and_left_to_its_owner(
    kind: str, command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(1)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    load(small_dataset(1, seed=9), "b2")
    world.query(dsn, INCONSISTENT[kind])
    problems = world.inconsistencies(settings)
    assert problems
    lines = [f"* {what} inconsistent: {message}\n" for what, message in problems]
    before = world.dump(dsn), world.objects(settings)
    found = command("verify", "--quiet")
    assert found.code == 5
    assert [line for line in lines if line not in found.out] == []
    assert f", {len(lines)} inconsistent.\n" in found.out
    mended = command("verify", "--quiet", "--repair")
    assert mended.code == 5
    for what, _ in problems:
        assert f"Not repaired: {what}: reset the batch and load it again to repair rows\n" in mended.out
    # The objects of a batch in another bucket are orphans in this one, and stay, since images name them.
    objects = 2 if kind == "of a batch in another bucket" else 0
    assert mended.out.endswith(f"; remaining: {len(lines) + objects}.\n")
    assert (world.dump(dsn), world.objects(settings)) == before

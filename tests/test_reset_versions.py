"""Reset of forced reloads: the former versions come back with their ids."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest

from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS
from tests import reset_support, world
from tests.reset_support import Command, LoadBatch, batch_states, edit, fail_at, state, stop_failing, vary
from tests.services import MakeDataset

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load


def thin_out(annotations: dict[str, Any], turn: int) -> None:
    """Take away some photos, and some detections of the others."""
    for position, key in enumerate(sorted(annotations)):
        if position % 4 == turn:
            del annotations[key]
        else:
            detections = annotations[key]["dishes"]["qwen_detections"]
            del detections[turn : turn + 1]


NATURAL_KEYS = (
    "SELECT recognition_id, camera_number, id FROM public.images",
    "SELECT recognition_id, 0, id FROM public.recipes",
    "SELECT p.recognition_id, (l.line_number, l.quantity, l.raw_name)::text, l.id"
    " FROM public.recipe_lines l JOIN public.recipes p ON p.id = recipe_id",
    "SELECT t.recognition_id, (t.item_type, t.source, l.quantity, l.raw_name, t.line_number, t.ordinal)::text, t.id"
    " FROM public.initial_tray_items t LEFT JOIN public.recipe_lines l ON l.id = t.recipe_line_id",
    "SELECT i.recognition_id, (i.camera_number, a.label, a.bbox)::text, a.id"
    " FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id",
)


def by_natural_key(dsn: str) -> dict[tuple[object, ...], int]:
    """Return (table, natural key) -> id; of rows with equal keys, as the app's own trays have, the highest id."""
    rows = ((n, row) for n, text in enumerate(NATURAL_KEYS) for row in world.query(dsn, text))
    return {(n, *row[:-1]): row[-1] for n, row in sorted(rows, key=lambda pair: pair[1][-1])}


def test_a_forced_version_that_is_reset_gives_back_the_former_one_with_the_ids_that_stayed(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
) -> None:
    former, dataset = small_dataset(6), own_dataset(6)
    load(former, "b1")
    load(former, "q1", qwen=True)
    before, kept = state(settings), by_natural_key(dsn)
    vary(dataset)
    load(dataset, "b2", "--force")
    second = by_natural_key(dsn)
    both = kept.keys() & second.keys()
    assert {key[0] for key in both} == set(range(len(NATURAL_KEYS)))
    assert kept.keys() - second.keys()
    assert second.keys() - kept.keys()
    # What the app has of rows that stay does not stand in the way.
    world.query(
        dsn,
        "CREATE TABLE public.app_notes AS SELECT id AS image, recognition_id AS recognition FROM public.images;"
        "ALTER TABLE public.app_notes ADD FOREIGN KEY (image) REFERENCES public.images,"
        " ADD FOREIGN KEY (recognition) REFERENCES public.recognitions",
    )
    done = command("reset", "--batch-id", "b2", "--confirm")
    assert (done.code, done.err) == (0, "")
    assert "\n  batch b1: the former version of 6 recognitions is restored\n" in done.out
    assert state(settings) == before
    world.check(settings, (former, "b1", None), qwen=former / ANNOTATIONS)
    third = by_natural_key(dsn)
    assert third.keys() == kept.keys()
    assert {key: third[key] for key in both} == {key: kept[key] for key in both} == {key: second[key] for key in both}


def test_readers_see_the_former_version_until_the_commit_of_the_forced_one(
    load: LoadBatch, command: Command, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(6)
    load(dataset, "b1")
    before, shown = state(settings), world.dump(dsn)
    vary(dataset)
    fail_at(dsn, "transform")
    arguments = ("load", "--source", dataset, "--batch-id", "b2", "--force", "--local-scheduler")
    assert command(*arguments).code == 3
    stop_failing(dsn)
    assert world.dump(dsn) == shown
    assert batch_states(dsn) == {"b1": "done", "b2": "loading"}
    assert world.query(dsn, "SELECT count(*) FROM raw.receipts WHERE batch_id = 'b2'") == [(6,)]
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    assert world.dump(dsn) == shown
    assert state(settings) == before
    # The same again to its end: now readers see the new version, and the former one is still there.
    assert command(*arguments).code == 0
    assert world.domain(dsn).images == world.expected(dataset, "b2").images
    after = state(settings)
    assert after["objects"].items() >= before["objects"].items()
    for name in ("raw.photos", "raw.receipts", "raw.menus", "ingest.manifest", "ingest.batch_state"):
        assert set(after[name]) > set(before[name]), name


@pytest.mark.slow
def test_reset_of_the_superseded_version_changes_nothing_that_readers_see(
    load: LoadBatch, command: Command, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(6)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    vary(dataset)
    load(dataset, "b2", "--force")
    load(dataset, "q2", "--force", qwen=True)
    shown = world.dump(dsn)
    for batch_id in ("b1", "q1"):
        done = command("reset", "--batch-id", batch_id, "--confirm")
        assert done.code == 0
        assert "public." not in done.out
        assert "is restored" not in done.out
        assert world.dump(dsn) == shown
    world.check(settings, (dataset, "b2", None), qwen=dataset / ANNOTATIONS)
    assert {row[0] for row in world.query(dsn, "SELECT batch_id FROM raw.photos")} == {"b2"}
    for batch_id in ("b2", "q2"):
        assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
    world.nothing(settings)


@pytest.mark.slow
def test_of_three_versions_the_middle_one_goes_first_and_the_last_gives_each_recognition_its_own_former_one(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
) -> None:
    former, middle, last = small_dataset(6), own_dataset(6), own_dataset(6)
    numbers = sorted(world.folders(former))
    vary(middle)
    vary(last, 1)
    load(former, "b1")
    load(middle, "b2", "--force", "--limit", "2")
    two = state(settings)
    load(last, "b3", "--force")
    told = command("reset", "--batch-id", "b3", "--dry-run")
    assert "  batch b1: the former version of 4 recognitions is restored\n" in told.out
    assert "  batch b2: the former version of 2 recognitions is restored\n" in told.out
    three, shown = state(settings), world.dump(dsn)
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    assert world.dump(dsn) == shown
    assert three["objects"].items() - world.objects(settings).items() == {
        (row[2], row[6]) for row in world.expected(middle, "b2", numbers[:2]).images
    }
    load(middle, "b2", "--force", "--limit", "2")  # the same id is now the newest version
    assert {row[1] for row in world.domain(dsn).recognitions[:2]} == {"b2"}
    assert command("reset", "--batch-id", "b3", "--confirm").code == 0
    assert state(settings)["domain"] == two["domain"]
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    world.check(settings, (former, "b1", None))


def test_reset_of_annotations_gives_back_the_former_ones_with_the_ids_that_stayed(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
) -> None:
    dataset, other = small_dataset(6), own_dataset(6)
    load(dataset, "b1")
    without = state(settings)
    load(dataset, "q1", qwen=True)
    first, kept = state(settings), by_natural_key(dsn)
    edit(other / ANNOTATIONS, partial(thin_out, turn=0))
    load(other, "q2", "--force", qwen=True)
    second = by_natural_key(dsn)
    assert second.keys() < kept.keys()
    done = command("reset", "--batch-id", "q2", "--confirm")
    assert done.code == 0
    assert "bucket" not in done.out
    annotated = len({row[0] for row in world.domain(dsn).annotations})
    told = re.search(r"  batch (\w+): the former annotations of (\d+) recognitions are restored\n", done.out)
    assert told is not None, done.out
    name, count = told.groups()
    assert name == "q1"
    assert 0 < int(count) <= annotated
    assert state(settings) == first
    third = by_natural_key(dsn)
    assert {key: third[key] for key in second} == second
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)
    assert command("reset", "--batch-id", "q1", "--confirm").code == 0
    assert state(settings) == without


def test_a_menu_goes_with_its_last_recognition_and_a_shared_one_stays(
    load: LoadBatch, command: Command, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(6)
    numbers = sorted(world.folders(dataset))
    menus = {number: next(world.folders(dataset)[number].rglob("*_AM.json")) for number in numbers}
    for number in numbers[3:5]:
        edit(menus[number], lambda menu: menu.pop())
    load(dataset, "b1", "--limit", "3")
    [(shared,)] = world.query(dsn, "SELECT id FROM public.menus")
    load(dataset, "b2")
    assert world.query(dsn, "SELECT count(*) FROM public.menus") == [(2,)]
    done = command("reset", "--batch-id", "b2", "--confirm")
    assert done.code == 0
    items = len(json.loads(menus[numbers[3]].read_text(encoding="utf-8-sig")))
    assert "  public.menus: 1 row is deleted\n" in done.out
    assert f"  public.menu_items: {items} rows are deleted\n" in done.out
    assert world.query(dsn, "SELECT id FROM public.menus") == [(shared,)]
    world.check(settings, (dataset, "b1", numbers[:3]))
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.query(dsn, "SELECT count(*) FROM public.menus") == [(0,)]
    assert world.query(dsn, "SELECT count(*) FROM public.menu_items") == [(0,)]

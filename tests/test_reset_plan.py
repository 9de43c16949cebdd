"""The plan of a reset, and the references that refuse it."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import RefusedError
from pipeline.steps import reset
from tests import reset_support, world
from tests.reset_support import (
    NOTES,
    App,
    Command,
    LoadBatch,
    everything,
    fail_at,
    planned,
    rows,
    state,
    stop_failing,
    vary,
)
from tests.runner import ForkServer, Runner
from tests.services import MakeDataset

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load


def ids(dsn: str) -> dict[str, set[Any]]:
    """Return the rows of public and raw, by what tells one from another."""
    texts = {f"public.{name}": f"SELECT id FROM public.{name}" for name in world.DOMAIN}
    if world.query(dsn, "SELECT ingest.has_menu_table()") == [(True,)]:
        texts["public.recognition_active_menu_items"] = "SELECT id FROM public.recognition_active_menu_items"
    texts |= {name: f"SELECT t::text FROM {name} t" for name in world.OURS if name.startswith("raw.")}
    return {name: {row[0] for row in found} for name, found in rows(dsn, **texts).items()}


# The plan


def test_a_plan_keeps_nobody_from_work(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(2), "b1")
    execute, tried = Connection.execute, []

    def beside(connection: Connection, name: str, /, **parameters: object) -> object:
        found = execute(connection, name, **parameters)
        if name == "plan_reset":
            tried.append(parameters["locks"])
            for table in ("recognitions", "initial_tray_items"):
                world.query(dsn, f"SELECT id FROM public.{table} FOR UPDATE NOWAIT")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "execute", beside)
        assert command("reset", "--batch-id", "b1", "--dry-run").code == 0
    assert tried == [False]
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0


@pytest.mark.slow
def test_a_dry_run_changes_nothing_and_counts_what_then_goes(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
) -> None:
    dataset, other = own_dataset(6), small_dataset(3, seed=9)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    vary(dataset)
    load(dataset, "b2", "--force", "--limit", "4")
    fail_at(dsn, "transform")
    assert command("load", "--source", other, "--batch-id", "b3", "--local-scheduler").code == 3
    stop_failing(dsn)
    raw = {"raw.photos", "raw.receipts", "raw.menus"}
    lines = {"public.recipe_lines", "public.recipe_line_options", "public.initial_tray_items"}
    seen = {"public.initial_annotations", "public.initial_tray_items", "raw.detections"}
    loaded = {f"public.{name}" for name in world.DOMAIN} - {"public.initial_annotations"}
    for batch_id, tables in (("b3", raw), ("b2", raw | lines), ("q1", seen), ("b1", raw | loaded)):
        before, there, objects = everything(settings), ids(dsn), world.objects(settings)
        told = command("reset", "--batch-id", batch_id, "--dry-run", *(["--confirm"] if batch_id == "b2" else []))
        assert (told.code, told.err) == (0, "")
        assert everything(settings) == before
        done = command("reset", "--batch-id", batch_id, "--confirm")
        assert (done.code, done.out) == (0, f"{told.out}Batch {batch_id} is reset.\n")
        left, gone = ids(dsn), objects.keys() - world.objects(settings).keys()
        going = {name: len(there[name] - left[name]) for name in there if there[name] - left[name]}
        assert planned(told.out) == (going, len(gone))
        assert going.keys() >= tables
        assert all(key.startswith(f"{batch_id}/recognitions/") for key in gone)
        [(size,)] = world.query(dsn, f"SELECT bytes FROM ingest.batches WHERE id = '{batch_id}'")
        assert (f"{len(gone)} objects are deleted, {size / 1000:.1f} kB" in told.out) == (batch_id != "q1")
    world.nothing(settings)


def test_a_dry_run_tells_what_blocks(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(3), "b1")
    world.query(dsn, NOTES.create)
    before = everything(settings)
    told = command("reset", "--batch-id", "b1", "--dry-run")
    assert told.code == 0
    assert re.search(r"^  blocked by (public\.)?app_notes: 3 rows reference rows of \S*recognitions ", told.out, re.M)
    assert everything(settings) == before


# What blocks


BLOCKING = {
    "recognitions": NOTES,
    "images, by two columns, cascading": App(
        "public.app_crops",
        "CREATE TABLE public.app_crops (recognition bigint, camera smallint, FOREIGN KEY (recognition, camera)"
        " REFERENCES public.images (recognition_id, camera_number) ON DELETE CASCADE);"
        "INSERT INTO public.app_crops SELECT recognition_id, camera_number FROM public.images, generate_series(1, 2)",
        4,
        "images",
    ),
    "images, in another schema, set to null": App(
        'app."The marks"',
        'CREATE SCHEMA app; CREATE TABLE app."The marks" (image bigint REFERENCES public.images ON DELETE SET NULL);'
        'INSERT INTO app."The marks" SELECT id FROM public.images UNION ALL SELECT NULL',
        2,
        "images",
    ),
    "tray items, partitioned": App(
        "public.app_items",
        "CREATE TABLE public.app_items (item bigint REFERENCES public.initial_tray_items, kind text)"
        " PARTITION BY LIST (kind);"
        "CREATE TABLE public.app_items_food PARTITION OF public.app_items FOR VALUES IN ('FOOD');"
        "INSERT INTO public.app_items SELECT min(id), 'FOOD' FROM public.initial_tray_items GROUP BY recognition_id",
        1,
        "initial_tray_items",
    ),
}


@pytest.mark.slow
def test_rows_of_other_tables_that_reference_what_would_go_refuse_the_reset(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset, other = small_dataset(3), small_dataset(4, seed=9)
    load(dataset, "b1")
    load(other, "b2")
    before = everything(settings)
    for kind, app in BLOCKING.items():
        world.query(dsn, app.create)
        theirs = world.query(dsn, f"SELECT count(*) FROM {app.table}")
        refused = command("reset", "--batch-id", "b2", "--confirm")
        assert refused.code == 4, kind
        assert re.search(app.told(4), refused.err), refused.err
        # The deed itself, without the plan before it, is refused as well.
        with closing(Database(settings)) as database, pytest.raises(RefusedError, match=app.told(4)):
            reset.reset_batch(database, settings, "b2")
        assert everything(settings) == before, kind
        assert world.query(dsn, f"SELECT count(*) FROM {app.table}") == theirs
        world.query(dsn, f"TRUNCATE {app.table}")
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    world.check(settings, (dataset, "b1", None))


def test_what_references_other_batches_blocks_nothing(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    for app in BLOCKING.values():
        world.query(dsn, app.create)
    load(small_dataset(4, seed=9), "b2")
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    world.check(settings, (dataset, "b1", None))


def test_a_reference_that_arrives_after_the_plan_refuses_the_reset(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(3), "b1")
    monkeypatch.setattr("pipeline.cli.batches.require_typed", lambda *_: world.query(dsn, NOTES.create))
    before = state(settings)
    refused = command("reset", "--batch-id", "b1")
    assert refused.code == 4
    assert re.search(NOTES.told(3), refused.err)
    assert "Traceback" not in refused.err
    assert state(settings) == before


def test_a_reference_that_arrives_while_the_reset_waits_for_it_refuses_the_reset(
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    workdir: Path,
    fork_server: ForkServer,
) -> None:
    load(small_dataset(3), "b1")
    world.query(dsn, "CREATE TABLE public.marks (image_id bigint REFERENCES public.images (id) ON DELETE CASCADE)")
    before = state(settings)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO public.marks SELECT max(id) FROM public.images")
        running = Runner(fork_server, workdir, {}).start("reset", "--batch-id", "b1", "--confirm")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        assert wait_until(lambda: world.query(dsn, waiting) == [(1,)] or running.wait(0), 60)
        connection.commit()
    refused = running.finish()
    assert refused.code == 4, refused
    assert "public.marks (1 row, to public.images)" in refused.stderr
    assert world.query(dsn, "SELECT count(*) FROM public.marks") == [(1,)]
    assert state(settings) == before

"""Reset: a batch goes as if it had never been loaded, former versions come back, and what stands in the way is told."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests

from embedded_supabase.files import wait_until
from pipeline import storage
from pipeline.batches.lock import BatchLock
from pipeline.cli import main
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import DatabaseError, RefusedError, StorageError
from pipeline.graph import tasks
from pipeline.graph.run import registry
from pipeline.sample.writer import ANNOTATIONS
from pipeline.steps import reset
from pipeline.storage import Storage
from tests import test_luigi, world
from tests.runner import ForkServer, Runner
from tests.services import MakeDataset, RunPipeline, Start, environment_file, subprocess_environment
from tests.test_luigi import finish
from tests.test_steps import Load

BARE = (sys.executable, "-m", "luigi", "--module", "pipeline", "ResetBatch", "--local-scheduler")
COMMAND = (sys.executable, "-m", "pipeline", "reset")

luigid = test_luigi.luigid


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, where stdin is no terminal."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.database_url.reveal()


@pytest.fixture
def load(command: Command) -> Callable[..., None]:
    """Load a dataset, or with `qwen` its annotations, to the end."""

    def run(source: Path, batch_id: str, *options: str, qwen: bool = False) -> None:
        arguments = ("load-qwen", "--file", source / ANNOTATIONS) if qwen else ("load", "--source", source)
        done = command(*arguments, "--batch-id", batch_id, "--local-scheduler", *options)
        assert (done.code, done.err) == (0, "")

    return run


LoadBatch = Callable[..., None]


def rows(dsn: str, **statements: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of several statements by their names."""
    return dict(zip(statements, world.queries(dsn, statements.values()), strict=True))


def state(settings: Settings) -> dict[str, Any]:
    """Return all that a reset has to leave as it found it: what readers see, the bucket, the others' rows."""
    dsn = settings.database_url.reveal()
    others = [name for name in world.OURS if not name.startswith("public.") and name != "ingest.batches"]
    return {
        "domain": vars(world.domain(dsn)),
        "objects": world.objects(settings),
        **rows(
            dsn,
            menus="SELECT content_sha256, (SELECT count(*) FROM public.menu_items i WHERE i.menu_id = m.id)"
            " FROM public.menus m ORDER BY 1",
            batches="SELECT id, state FROM ingest.batches WHERE state <> 'reset' ORDER BY 1",
            **{name: f"SELECT t::text FROM {name} t ORDER BY 1" for name in others},
        ),
    }


def everything(settings: Settings) -> tuple[object, ...]:
    """Return all rows with their ids and the bucket, for `nothing was changed`."""
    texts = {name: f"SELECT t::text FROM {name} t ORDER BY 1" for name in world.OURS}
    return rows(settings.database_url.reveal(), **texts), world.objects(settings)


def ids(dsn: str) -> dict[str, set[Any]]:
    """Return the rows of public and raw, by what tells one from another."""
    texts = {f"public.{name}": f"SELECT id FROM public.{name}" for name in world.DOMAIN}
    texts |= {name: f"SELECT t::text FROM {name} t" for name in world.OURS if name.startswith("raw.")}
    return {name: {row[0] for row in found} for name, found in rows(dsn, **texts).items()}


def planned(out: str) -> tuple[dict[str, int], int]:
    """Return what a plan says: the rows by table, and the objects."""
    rows = {name: int(count) for name, count in re.findall(r"^  (\S+): (\d+) rows are deleted$", out, re.MULTILINE)}
    objects = re.findall(r"^  bucket \S+: (\d+) objects are deleted, ", out, re.MULTILINE)
    return rows, int(objects[0]) if objects else 0


def batch_states(dsn: str) -> dict[str, str]:
    return dict(world.query(dsn, "SELECT id, state FROM ingest.batches"))


def fail_at(dsn: str, step: str) -> None:
    """Let no marker of a step be written."""
    world.query(
        dsn,
        "CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'on purpose'; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON ingest.batch_state FOR EACH ROW"
        f" WHEN (NEW.step = '{step}') EXECUTE FUNCTION public.fail()",
    )


def stop_failing(dsn: str) -> None:
    world.query(dsn, "DROP FUNCTION public.fail CASCADE")


def receipts(dataset: Path) -> list[Path]:
    return sorted(dataset.rglob("*_correct_dishes.json"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of a file in place."""
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def vary(dataset: Path, turn: int = 0) -> None:
    """Make another version of a dataset: photos, menus and receipts differ in part, and other lines are there."""
    folders = [folder for _, folder in sorted(world.folders(dataset).items())]
    photos = [next(folder.rglob("*_Main.jpg")) for folder in folders]
    shutil.copyfile(photos[-1 - turn], photos[turn])
    edit(next(folders[turn].rglob("*_AM.json")), lambda menu: menu[0].update(Name=f"of version {turn}"))
    found = receipts(dataset)
    found[turn].unlink()
    edit(found[turn + 1], lambda lines: lines.append({"Count": 3, "Dishes": [{"Name": "x", "ExternalId": "7"}]}))
    edit(found[turn + 2], lambda lines: lines.__delitem__(slice(1, None)))
    edit(found[turn + 2], lambda lines: lines[0].update(Count=lines[0]["Count"] + 1))


def thin_out(annotations: dict[str, Any], turn: int) -> None:
    """Take away some photos, and some detections of the others."""
    for position, key in enumerate(sorted(annotations)):
        if position % 4 == turn:
            del annotations[key]
        else:
            detections = annotations[key]["dishes"]["qwen_detections"]
            del detections[turn : turn + 1]


# As if never loaded


@pytest.mark.parametrize("order", [("q2", "b2"), ("b2", "q2")])
def test_reset_is_as_if_the_batch_had_never_been_loaded(
    order: Sequence[str], load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    first, second = small_dataset(6), small_dataset(4, broken=True, seed=9)
    world.nothing(settings)
    load(first, "b1")
    load(first, "q1", qwen=True)
    before = state(settings)
    load(second, "b2")
    load(second, "q2", qwen=True)
    assert world.query(dsn, "SELECT DISTINCT batch_id FROM ingest.rejects ORDER BY 1") == [("b2",), ("q2",)]
    loaded = state(settings)
    for batch_id in order:
        done = command("reset", "--batch-id", batch_id, "--confirm")
        assert (done.code, done.err) == (0, "")
        assert done.out.endswith(f"\nBatch {batch_id} is reset.\n")
        assert world.inconsistencies(settings) == []
    assert state(settings) == before
    world.check(settings, (first, "b1", None), qwen=first / ANNOTATIONS)

    load(second, "b2")
    load(second, "q2", qwen=True)
    again = state(settings)
    for name in ("domain", "objects", "batches", "menus", "raw.receipts", "raw.menus", "raw.detections"):
        assert again[name] == loaded[name], name
    for batch_id in ("b1", "b2", "q1", "q2"):
        assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
    world.nothing(settings)
    assert batch_states(dsn) == dict.fromkeys(("b1", "b2", "q1", "q2"), "reset")


def test_annotations_come_back_when_their_photos_are_loaded_again(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.domain(dsn) == world.Domain([], [], [], [], [], [])
    assert world.inconsistencies(settings) == []
    load(dataset, "b3")
    world.check(settings, (dataset, "b3", None), qwen=dataset / ANNOTATIONS)


# Versions

NATURAL_KEYS = (
    "SELECT recognition_id, camera_number, id FROM public.images",
    "SELECT recognition_id, 0, id FROM public.recipes",
    "SELECT p.recognition_id, l.line_number, l.id FROM public.recipe_lines l JOIN public.recipes p ON p.id = recipe_id",
    "SELECT recognition_id, (item_type, source, line_number, ordinal)::text, id FROM public.initial_tray_items",
    "SELECT i.recognition_id, (i.camera_number, a.source, a.detection)::text, a.id"
    " FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id",
)


def by_natural_key(dsn: str) -> dict[tuple[object, ...], int]:
    """Return (table, natural key) -> id."""
    return {(n, *row[:-1]): row[-1] for n, text in enumerate(NATURAL_KEYS) for row in world.query(dsn, text)}


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
    [(name, count)] = re.findall(r"  batch (\w+): the former annotations of (\d+) recognitions is restored\n", done.out)
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
    assert "  public.menus: 1 rows are deleted\n" in done.out
    assert f"  public.menu_items: {items} rows are deleted\n" in done.out
    assert world.query(dsn, "SELECT id FROM public.menus") == [(shared,)]
    world.check(settings, (dataset, "b1", numbers[:3]))
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.query(dsn, "SELECT count(*) FROM public.menus") == [(0,)]
    assert world.query(dsn, "SELECT count(*) FROM public.menu_items") == [(0,)]


# The plan


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


@dataclass(frozen=True)
class App:
    """A table of the app: what makes it, how many of its rows reference something of a recognition, and what."""

    table: str
    create: str
    rows: int
    target: str

    def told(self, recognitions: int) -> str:
        """Return the pattern of how a refusal tells of it."""
        name = re.escape(self.table.removeprefix("public.")).replace('"', '"?')  # quoted or not
        return rf"\b(public\.)?{name} \({self.rows * recognitions} rows, to (public\.)?{self.target}\)"


NOTES = App(
    "public.app_notes",
    "CREATE TABLE public.app_notes (recognition bigint REFERENCES public.recognitions);"
    "INSERT INTO public.app_notes SELECT id FROM public.recognitions",
    1,
    "recognitions",
)
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
    monkeypatch.setattr("pipeline.cli.batches._confirm", lambda batch_id: world.query(dsn, NOTES.create))
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
        cursor.execute("INSERT INTO public.marks SELECT min(id) FROM public.images")
        running = Runner(fork_server, workdir, {}).start("reset", "--batch-id", "b1", "--confirm")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        assert wait_until(lambda: world.query(dsn, waiting) == [(1,)] or running.wait(0), 60)
        connection.commit()
    refused = running.finish()
    assert refused.code == 4, refused
    assert "public.marks (1 rows, to public.images)" in refused.stderr
    assert world.query(dsn, "SELECT count(*) FROM public.marks") == [(1,)]
    assert state(settings) == before


# A reset that was cut off


def test_a_reset_that_goes_on_later_takes_nothing_from_a_later_load_of_the_same_id(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, database: Database
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    batch = database.run(lambda connection: reset._unpublish(connection, "b1"))
    assert batch is not None
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    load(dataset, "b1")
    with closing(Storage(settings)) as door, pytest.raises(RefusedError, match="was started anew in the meantime"):
        reset._remove_objects(database, door, batch, lambda _: None)
    world.check(settings, (dataset, "b1", None))


def test_the_numbers_of_a_load_are_not_kept_for_a_batch_that_was_reset_meanwhile(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(1), "b1")
    world.query(dsn, "DELETE FROM ingest.batch_state WHERE step = 'load'")
    registry.open(production=False)
    parameters: dict[str, Any] = {"batch_id": "b1", "source": str(small_dataset(1))}
    task = tasks.LoadBatch(**parameters)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    with pytest.raises(RefusedError, match="is reset, not done"):
        task.run()
    world.nothing(settings)
    load(small_dataset(1), "b1")
    world.check(settings, (small_dataset(1), "b1", None))


def test_a_delete_that_deletes_nothing_is_not_believed(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    dsn: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(1), "b1")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", lambda self, keys: 0)
        done = command("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 3
    assert "Storage still holds objects of batch b1" in done.err
    assert batch_states(dsn) == {"b1": "resetting"}
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)


# Which batch


@pytest.mark.parametrize("batch_id", ["never", "../b1", "b1/recognitions", "", "é"])
def test_an_id_that_is_none_is_wrong_usage(
    batch_id: str, load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(1), "b1")
    before = everything(settings)
    done = command("reset", "--batch-id", batch_id, "--confirm")
    assert (done.code, done.out) == (2, "")
    assert repr(batch_id) in done.err or f"There is no batch {batch_id}." in done.err
    assert everything(settings) == before


def test_the_id_has_to_be_given(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("reset", "--confirm")
    assert stopped.value.code == 2
    assert "--batch-id" in capsys.readouterr().err


def test_a_second_reset_is_nothing_to_do(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(1), "b1")
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    before = everything(settings)
    for options in (["--confirm"], [], ["--dry-run"]):
        again = command("reset", "--batch-id", "b1", *options)
        assert (again.code, again.err) == (0, "")
        assert again.out == "Batch b1 was reset before; nothing of it is left.\n"
    assert everything(settings) == before


def test_pending_migrations_are_told_first(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(1), "b1")
    world.query(dsn, "DELETE FROM supabase_migrations.schema_migrations WHERE version >= '20260102000200'")
    before = everything(settings)
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert (done.code, done.out) == (2, "")
    assert "20260102000200_publish" in done.err
    assert everything(settings) == before


def test_a_batch_goes_out_of_the_bucket_that_it_was_loaded_into(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    workdir: Path,
) -> None:
    load(small_dataset(3), "b1")
    other = replace(settings, bucket=f"{settings.bucket}-other")
    (workdir / ".env.local").write_text(environment_file(other), encoding="utf-8")
    load(small_dataset(4, seed=9), "b2")
    with closing(Storage(other)) as door:
        door.upload("b1/recognitions/1/camera1.jpg", b"of somebody else")
    stay = world.objects(other)
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 0
    assert f"\n  bucket {settings.bucket}: 6 objects are deleted, " in done.out
    assert world.objects(settings) == {}
    assert world.objects(other) == stay


# Confirming it

#: Make stdin the terminal of this session, as a shell does, so that a Ctrl-C that is typed there is a signal.
AT_A_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


def typed(workdir: Path, letters: bytes) -> tuple[int, str]:
    """Run a reset of b1 at a terminal, type letters when it asks; return the exit code and what was to be read."""
    ours, theirs = os.openpty()
    shown = b""
    with subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, "reset", "--batch-id", "b1"],
        cwd=workdir,
        env=subprocess_environment({"TERM": "dumb"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        try:
            asked = False
            while select.select([ours], [], [], 60)[0]:
                try:
                    chunk = os.read(ours, 4096)
                except OSError:  # nobody has the terminal open any more
                    break
                if not chunk:
                    break
                shown += chunk
                if not asked and b"to delete all this: " in shown:
                    asked = True
                    os.write(ours, letters)
        finally:
            os.close(ours)  # hangs up: whoever still reads there ends
        return process.wait(60), shown.decode().replace("\r\n", "\n")


def test_at_a_terminal_the_id_has_to_be_typed(
    load: LoadBatch, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    load(small_dataset(3), "b1")
    before = everything(settings)
    for letters in (b"b2\n", b"\x04"):
        code, shown = typed(workdir, letters)
        assert code == 4, shown
        assert "  public.recognitions: 3 rows are deleted\n" in shown
        assert "Type the batch's id, b1, to delete all this: " in shown
        assert "Error: Batch b1 was not reset" in shown
        assert everything(settings) == before
    code, shown = typed(workdir, b"\x03")
    assert code == 130, shown
    assert "Interrupted." in shown
    assert "Traceback" not in shown
    assert everything(settings) == before
    code, shown = typed(workdir, b" b1 \n")
    assert (code, "Batch b1 is reset." in shown) == (0, True), shown
    world.nothing(settings)


def test_without_a_terminal_it_is_refused_unless_it_is_confirmed(
    load: LoadBatch, command: Command, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(3), "b1")
    before = everything(settings)
    refused = command("reset", "--batch-id", "b1")
    assert refused.code == 4
    assert "  public.recognitions: 3 rows are deleted\n" in refused.out
    assert "no terminal" in refused.err
    assert "--confirm" in refused.err
    piped = run_pipeline("reset", "--batch-id", "b1")
    assert (piped.returncode, piped.stdout, piped.stderr) == (4, refused.out, refused.err)
    assert everything(settings) == before


# Objects


def test_objects_go_in_calls_of_at_most_a_page_several_at_once(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert storage.PAGE == 1000
    dataset = small_dataset(12)
    load(dataset, "b1", "--limit", "11")
    load(dataset, "b2")
    calls: list[list[str]] = []
    together = threading.Barrier(4)
    remove = Storage.remove

    def noted(self: Storage, keys: Sequence[str]) -> int:
        calls.append(list(keys))
        together.wait(30)  # breaks unless four calls are under way at the same time
        return remove(self, keys)

    monkeypatch.setattr("pipeline.steps.reset.PAGE", 6)
    monkeypatch.setattr(Storage, "remove", noted)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert sorted(len(keys) for keys in calls) == [4, 6, 6, 6]
    assert {key for keys in calls for key in keys} == {
        row[2] for row in world.expected(dataset, "b1", sorted(world.folders(dataset))[:11]).images
    }
    world.check(settings, (dataset, "b2", [max(world.folders(dataset))]))


def test_objects_that_arrive_while_others_go_are_removed_as_well(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(3), "b1")
    remove = Storage.remove
    late = itertools.repeat("b1/recognitions/1/camera1.jpg")

    def overtaken(self: Storage, keys: Sequence[str]) -> int:
        gone = remove(self, keys)
        for key in itertools.islice(late, 1):
            self.upload(key, b"of a run that was overtaken")
        return gone

    monkeypatch.setattr(Storage, "remove", overtaken)
    endless = command("reset", "--batch-id", "b1", "--confirm")
    assert endless.code == 3
    assert "Storage still holds objects of batch b1" in endless.err
    assert batch_states(dsn) == {"b1": "resetting"}
    late = itertools.repeat("b1/recognitions/999999999/camera2.jpg", 2)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert list(late) == []
    world.nothing(settings)


def test_what_is_not_below_the_prefix_of_the_batch_stays(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(3), "b1")
    load(small_dataset(3, seed=9), "b1.1")
    load(small_dataset(3, seed=8), "b10")
    with closing(Storage(settings)) as door:
        door.upload("b1/thumbnails/1.jpg", b"of somebody else")
    before = world.objects(settings)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.objects(settings) == {key: one for key, one in before.items() if not key.startswith("b1/recognitions")}


# Unfinished batches


def test_an_unfinished_batch_goes_with_its_claims_so_that_another_takes_its_recognitions(
    command: Command, small_dataset: MakeDataset, settings: Settings, database: Database, dsn: str
) -> None:
    dataset = small_dataset(6)
    killed = Load(settings, database, dataset)
    assert killed.discover(batch_size=2).shards == 3
    before_any = world.counts(dsn)
    killed.upload(1)
    killed.copy(1)
    killed.upload(2)
    with closing(Storage(settings)) as door:  # of the third shard one object arrived
        door.upload(world.expected(dataset, "b1").images[-1][2], b"half a shard")
    assert world.counts(dsn)["raw.receipts"] == 2
    assert before_any["ingest.claims"] == 6
    held = command("load", "--source", dataset, "--batch-id", "b2", "--local-scheduler")
    assert "Skipped: 6 held by unfinished b1." in held.out
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 0
    assert planned(done.out) == ({"raw.photos": 4, "raw.receipts": 2, "raw.menus": 1}, 9)
    assert batch_states(dsn) == {"b1": "reset", "b2": "done"}
    assert world.counts(dsn)["ingest.claims"] == 0
    assert command("load", "--source", dataset, "--batch-id", "b3", "--local-scheduler").code == 0
    world.check(settings, (dataset, "b3", None))


def test_unfinished_annotations_go_with_their_claims(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    load(dataset, "b1")
    before = state(settings)
    fail_at(dsn, "transform")
    arguments = ("load-qwen", "--file", dataset / ANNOTATIONS, "--local-scheduler", "--batch-id")
    assert command(*arguments, "q1").code == 3
    stop_failing(dsn)
    assert world.query(dsn, "SELECT DISTINCT kind, batch_id FROM ingest.claims") == [("qwen", "q1")]
    done = command("reset", "--batch-id", "q1", "--confirm")
    assert done.code == 0
    rows, objects = planned(done.out)
    assert (list(rows), objects) == (["raw.detections"], 0)
    assert state(settings) == before
    load(dataset, "q2", qwen=True)
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)


def test_what_is_unfinished_is_finished_though_what_it_builds_on_is_reset_meanwhile(
    load: LoadBatch, command: Command, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(6)
    load(dataset, "b1")
    vary(dataset)
    forced = ("load", "--source", dataset, "--batch-id", "b2", "--force", "--local-scheduler")
    annotations = ("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--local-scheduler")
    fail_at(dsn, "transform")
    assert [command(*forced).code, command(*annotations).code] == [3, 3]
    stop_failing(dsn)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert not any(vars(world.domain(dsn)).values())
    assert command(*annotations).code == 0
    assert not any(vars(world.domain(dsn)).values())
    assert command(*forced).code == 0
    world.check(settings, (dataset, "b2", None), qwen=dataset / ANNOTATIONS)


# Stopped, and beside others


def stop_in_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first call remove two objects, and no other call any."""
    remove, first = Storage.remove, iter([True])

    def refuse(self: Storage, keys: Sequence[str]) -> int:
        if next(first, False):
            return remove(self, keys)
        raise StorageError("Storage refuses, on purpose.")

    monkeypatch.setattr("pipeline.steps.reset.PAGE", 2)
    monkeypatch.setattr(Storage, "remove", refuse)


def stop_before_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(connection: Connection, batch_id: str) -> None:
        raise DatabaseError("PostgreSQL refuses, on purpose.")

    monkeypatch.setattr(reset, "_delete_manifest", refuse)


@pytest.mark.parametrize("stop", [stop_in_storage, stop_before_the_manifest])
def test_stopped_between_its_phases_the_same_reset_finishes_it(
    stop: Callable[[pytest.MonkeyPatch], None],
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = small_dataset(6)
    load(dataset, "b1", "--limit", "4")
    before = state(settings)
    load(dataset, "b2")
    with monkeypatch.context() as patch:
        stop(patch)
        failed = command("reset", "--batch-id", "b2", "--confirm")
    assert failed.code == 3
    assert "on purpose" in failed.err
    assert "python -m pipeline reset --batch-id b2" in failed.err
    assert "Traceback" not in failed.err
    assert "is reset" not in failed.out
    assert batch_states(dsn) == {"b1": "done", "b2": "resetting"}
    assert vars(world.domain(dsn)) == before["domain"]
    assert "b2 is resetting: python -m pipeline reset --batch-id b2\n" in command("status").out
    refused = command("load", "--source", dataset, "--batch-id", "b2", "--local-scheduler")
    assert refused.code == 4
    assert "Batch b2 is being reset." in refused.err
    assert "python -m pipeline reset --batch-id b2" in refused.err
    told = command("reset", "--batch-id", "b2", "--dry-run")
    assert told.code == 0
    assert "its rows are deleted already" in told.out
    assert planned(told.out) == ({}, 2 if stop is stop_in_storage else 0)
    assert command("reset", "--batch-id", "b2").code == 4  # it asks again
    assert batch_states(dsn)["b2"] == "resetting"
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    assert state(settings) == before
    load(dataset, "b2")
    numbers = sorted(world.folders(dataset))
    world.check(settings, (dataset, "b1", numbers[:4]), (dataset, "b2", numbers[4:]))


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


@pytest.mark.parametrize("table", ["raw.receipts", "ingest.manifest"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_a_transaction_it_has_done_all_of_a_phase_or_nothing(
    how: signal.Signals,
    table: str,
    load: LoadBatch,
    command: Command,
    start: Start,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    before = everything(settings)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {table} IN SHARE MODE")  # it may read, and waits to delete
        running = start(*COMMAND, "--batch-id", "b1", "--confirm")
        assert wait_until(lambda: world.query(dsn, WAITING) == [(1,)] or running.poll() is not None, 60)
        running.send_signal(how)
        code, out, err = finish(running, 30)
        connection.rollback()
    assert "is reset" not in out
    if how == signal.SIGTERM:
        assert code == 130, err
        assert "Interrupted. To go on: python -m pipeline reset --batch-id b1 --confirm\n" in err
        assert "Traceback" not in err
    else:
        assert code == -signal.SIGKILL
    assert wait_until(lambda: world.query(dsn, WAITING) == [(0,)], 30)
    if table == "raw.receipts":
        assert wait_until(lambda: everything(settings) == before, 30)
    else:
        assert batch_states(dsn) == {"b1": "resetting"}
        assert world.domain(dsn).images == []
        assert world.objects(settings) == {}
        assert world.counts(dsn)["ingest.manifest"] == 3
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)


def test_reset_beside_a_run_of_the_batch_is_refused(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    load(small_dataset(3, seed=9), "b2")
    before = everything(settings)
    running = BatchLock(settings, "b1", patience=0)
    monkeypatch.setattr("pipeline.graph.run.BatchLock", partial(BatchLock, patience=0.1))
    refused = command("reset", "--batch-id", "b1", "--confirm")
    assert refused.code == 4
    assert "Another run of batch b1 is going on." in refused.err
    assert everything(settings) == before
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    running.release()
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)


def test_a_load_beside_a_reset_of_its_batch_is_refused(
    load: LoadBatch, command: Command, start: Start, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE ingest.manifest IN SHARE MODE")
        running = start(*COMMAND, "--batch-id", "b1", "--confirm")
        assert wait_until(lambda: world.query(dsn, WAITING) == [(1,)] or running.poll() is not None, 60)
        refused = command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler")
        assert (refused.code, "Batch b1 is being reset." in refused.err) == (4, True)
        connection.rollback()
    assert finish(running)[0] == 0
    load(dataset, "b1")
    world.check(settings, (dataset, "b1", None))


# Under Luigi


def test_the_bare_command_resets_what_is_confirmed(
    load: LoadBatch, start: Start, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(3), "b1")
    before = everything(settings)
    code, out, err = finish(start(*BARE, "--batch-id", "b1"))
    assert (code, out) == (40, "")
    assert "Error: Batch b1 is not reset without --confirm." in err
    assert "Hint: " in err
    assert "Traceback" not in err
    assert everything(settings) == before
    world.query(dsn, NOTES.create)
    code, out, err = finish(start(*BARE, "--batch-id", "b1", "--confirm"))
    assert code == 30
    assert re.search(NOTES.told(3), err)
    assert "Traceback" not in err
    world.query(dsn, f"DROP TABLE {NOTES.table}")
    assert everything(settings) == before
    done = finish(start(*BARE, "--batch-id", "b1", "--confirm"))
    assert (done[0], done[2]) == (0, "")
    assert done[1].startswith("Batch b1 is reset, it had 3 recognitions, 6 photos, ")
    world.nothing(settings)
    assert finish(start(*BARE, "--batch-id", "b1", "--confirm"))[0] == 0


def test_under_luigid_a_batch_comes_goes_and_comes_again_at_once(
    luigid: str,
    run_pipeline: RunPipeline,
    workdir: Path,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    (workdir / "luigi.cfg").write_text(f"[core]\nscheduler_url = {luigid}\n", encoding="utf-8")
    dataset = small_dataset(3)
    for command in ("load", "reset", "load", "reset"):
        options = ("--source", dataset) if command == "load" else ("--confirm",)
        done = run_pipeline(command, "--batch-id", "b1", *options)
        assert (done.returncode, done.stderr) == (0, "")
        if command == "load":
            world.check(settings, (dataset, "b1", None))
        else:
            world.nothing(settings)
    with requests.Session() as session:
        session.trust_env = False
        told = session.get(f"{luigid}/api/task_list", params={"data": '{"status": "DONE"}'}, timeout=10).text
    for task in ("LoadBatch_b1", "ResetBatch_b1", "UploadShard_b1"):
        assert task in told  # it was luigid that handed them out


# History


def test_history_stays(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(6), "b1")
    load(small_dataset(6), "q1", qwen=True)
    kept = {}
    for batch_id in ("b1", "q1"):
        kept[batch_id] = json.loads(command("status", "--batch-id", batch_id, "--json").out)
        assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
    found = {batch["batch_id"]: batch for batch in json.loads(command("status", "--json").out)["batches"]}
    lines = command("status").out.splitlines()
    for batch_id in ("b1", "q1"):
        [(moment,)] = world.query(dsn, f"SELECT reset_at FROM ingest.batches WHERE id = '{batch_id}'")
        assert (found[batch_id]["state"], found[batch_id]["reset_at"]) == ("reset", moment.isoformat())
        assert any(line.split()[:2] == [batch_id, "reset"] and f"{moment:%Y-%m-%d %H:%M:%S}" in line for line in lines)
        former = json.loads(command("status", "--batch-id", batch_id, "--json").out)
        assert former == {**kept[batch_id], "state": "reset", "reset_at": moment.isoformat()}
        assert former["total_seconds"] > 0
    text = command("status", "--batch-id", "b1")
    assert text.out.startswith("Batch b1 is reset, it had 6 recognitions, 12 photos, ")
    assert "    storage_upload: 12 ops, avg " in text.out
    assert json.loads(command("status", "--json").out)["unfinished"] == []

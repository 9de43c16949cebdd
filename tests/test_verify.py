"""Verify: every difference between database and bucket is told by its line, nothing else is, and repair mends it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pipeline.batches.lock import BatchLock
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.database.queries import statement
from pipeline.steps.verify import CHECKS, Verification
from pipeline.storage import Storage, StoredObject
from tests import test_luigi, test_reset, world
from tests.services import MakeDataset, Start, StorageServer, environment_file, free_port
from tests.test_reset import Command, Done, LoadBatch, fail_at, stop_failing

KINDS = ("equal", "missing", "dangling", "damaged", "orphan", "inconsistent")

command = test_reset.command
load = test_reset.load
dsn = test_reset.dsn


def totals(settings: Settings, **counts: int) -> str:
    """Return the line with the totals."""
    found = ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in KINDS)
    return f"Verified bucket {settings.bucket}: {found}.\n"


def equal(keys: Sequence[str]) -> str:
    return "".join(f"= {key}\n" for key in sorted(keys))


@dataclass(frozen=True)
class Bucket:
    """The bucket of a test, to be spoiled."""

    settings: Settings
    server: StorageServer

    def file(self, key: str) -> Path:
        """Return the file below the server's root that is the content of an object."""
        with closing(sqlite3.connect(f"{(self.server.root / 'index.sqlite').as_uri()}?mode=ro", uri=True)) as index:
            [(version,)] = index.execute(
                "SELECT version FROM objects WHERE bucket_id = ? AND name = ?", (self.settings.bucket, key)
            ).fetchall()
        return self.server.root.joinpath("objects", version[:2], version)

    def read(self, key: str) -> bytes:
        return self.file(key).read_bytes()

    def put(self, key: str, content: bytes) -> None:
        with closing(Storage(self.settings)) as storage:
            storage.upload(key, content)

    def remove(self, *keys: str) -> None:
        with closing(Storage(self.settings)) as storage:
            assert storage.remove(keys) == len(keys)

    def listed(self) -> list[str]:
        with closing(Storage(self.settings)) as storage:
            return [found.key for found in storage.list_objects("")]


@pytest.fixture
def stored(settings: Settings, storage_server: StorageServer) -> Bucket:
    return Bucket(settings, storage_server)


def photo_of(dataset: Path, key: str) -> Path:
    """Return the photo that was sent under a key."""
    _, _, number, camera = key.split("/")
    name = "*_Main.jpg" if camera == "camera1.jpg" else "*_Qualifying.jpg"
    return next(world.folders(dataset)[int(number)].rglob(name))


# As it should be


def test_a_sound_database_and_bucket_are_equal_in_the_order_of_the_keys(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "3")
    dataset = small_dataset(10, first_id=95)  # 100 sorts before 95
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    # Ids that sort otherwise with a slash after them than without, or otherwise in another collation.
    for seed, batch_id in enumerate(("b1-a", "b1.a", "b10", "B1", "b_1"), 1):
        load(small_dataset(2, seed=seed), batch_id)
    load(dataset, "b0", "--force", "--limit", "4")
    load(small_dataset(2, seed=9), "gone")
    assert command("reset", "--batch-id", "gone", "--confirm").code == 0
    keys = list(world.objects(settings))
    assert keys == sorted(keys)
    assert len(keys) == 48
    for options in ((), ("--deep",), ("--repair",)):
        done = command("verify", *options)
        assert (done.code, done.err) == (0, "")
        wanted = equal(keys) + totals(settings, equal=48)
        assert done.out == wanted + ("Repaired: 0; remaining: 0.\n" if options == ("--repair",) else "")
    assert command("verify", "--quiet") == Done(0, totals(settings, equal=48), "")
    counts = {**dict.fromkeys(KINDS, 0), "equal": 48}
    assert json.loads(command("verify", "--json").out) == {
        "bucket": settings.bucket,
        "unfinished": [],
        "elsewhere": {},
        "differences": [],
        "totals": counts,
        "repaired": 0,
        "remaining": 0,
        "not_mended": [],
    }
    for batch_id, count in (("b1", 20), ("b1-a", 4), ("B1", 4), ("b0", 8)):
        done = command("verify", "--batch-id", batch_id)
        assert done.out == equal([key for key in keys if key.startswith(f"{batch_id}/")]) + totals(
            settings, equal=count
        )
        assert done.code == 0


def test_before_the_first_load_there_is_nothing_that_differs(command: Command, settings: Settings) -> None:
    assert command("verify") == Done(0, totals(settings), "")
    assert command("verify", "--repair").code == 0


def test_many_pages_and_many_shards_are_merged_without_a_slip(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    dataset = small_dataset(10, first_id=95)
    load(dataset, "b1")
    load(dataset, "b2", "--force")
    keys = stored.listed()
    assert len(keys) == 40
    monkeypatch.setattr("pipeline.storage.PAGE", 3)
    monkeypatch.setattr("pipeline.steps.verify.PAGE", 2)
    assert command("verify") == Done(0, equal(keys) + totals(settings, equal=40), "")
    lost = keys[::3]
    strangers = ["a/first", "b1/recognitions/0", "b1/zz", "b2/recognitions/103/camera3.jpg", "zz/last"]
    stored.remove(*lost)
    for key in strangers:
        stored.put(key, b"1")
    done = command("verify")
    assert done.code == 5
    told = [line.split() for line in done.out.splitlines()[:-1]]
    assert [line[1] for line in told] == sorted([*keys, *strangers])
    assert [line[1] for line in told if line[0] == "-"] == lost
    assert [line[1] for line in told if line[0] == "+"] == strangers
    assert command("verify", "--repair", "--quiet").code == 0
    assert stored.listed() == keys
    assert command("verify") == Done(0, equal(keys) + totals(settings, equal=40), "")


# Each kind of difference


@dataclass(frozen=True)
class Plant:
    """A difference: what makes it of which key, and how its line goes on."""

    key: str
    make: Callable[[Bucket, str], None]
    sign: str
    kind: str
    message: str
    deep: bool = False

    def line(self) -> str:
        return f"{self.sign} {self.key} {self.kind}: {self.message}\n"


def flip(bucket: Bucket, key: str) -> None:
    """Change the content on the server's disk, where only who reads it sees that."""
    file = bucket.file(key)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def put_other_bytes(bucket: Bucket, key: str) -> None:
    bucket.put(key, bytes(reversed(bucket.read(key))))


def put_fewer_bytes(bucket: Bucket, key: str) -> None:
    bucket.put(key, bucket.read(key)[:-1])


def put_stranger(bucket: Bucket, key: str) -> None:
    bucket.put(key, b"12345")


def plants(dataset: Path) -> list[Plant]:
    """Return some of each kind; `b1` and `b2` are versions of the dataset, `b0` was reset."""
    first, *_, last = sorted(world.folders(dataset))
    shown, other = (f"b2/recognitions/{first}/camera{camera}.jpg" for camera in (1, 2))
    former = f"b1/recognitions/{last}/camera2.jpg"
    whole = photo_of(dataset, other).stat().st_size
    stranger = "5 bytes, of no batch on record"
    unnamed = "5 bytes, that no row names"
    return [
        Plant(shown, Bucket.remove, "-", "dangling", "readers see its row, and there is no object"),
        Plant(former, Bucket.remove, "-", "missing", "the object of a version that a later one superseded"),
        Plant(other, put_fewer_bytes, "*", "damaged", f"{whole - 1} bytes instead of {whole}"),
        Plant(other, put_other_bytes, "*", "damaged", "its MD5 differs"),
        Plant(other, flip, "*", "damaged", f"its content differs, {whole} bytes", deep=True),
        Plant("0/first.jpg", put_stranger, "+", "orphan", stranger),
        Plant("file", put_stranger, "+", "orphan", stranger),
        Plant("b/recognitions/1/camera1.jpg", put_stranger, "+", "orphan", stranger),
        Plant("zz/last", put_stranger, "+", "orphan", stranger),
        Plant("b1/recognitions/1/camera1.jpg", put_stranger, "+", "orphan", unnamed),
        Plant(f"b2/recognitions/{last}/camera3.jpg", put_stranger, "+", "orphan", unnamed),
        Plant("b2/other", put_stranger, "+", "orphan", unnamed),
        Plant("b0/recognitions/1/camera1.jpg", put_stranger, "+", "orphan", unnamed),
    ]


def test_each_kind_of_difference_is_told_by_its_line_and_mended(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    dataset = small_dataset(3)
    load(small_dataset(2, seed=9), "b0")
    assert command("reset", "--batch-id", "b0", "--confirm").code == 0
    load(dataset, "b1")
    load(dataset, "b2", "--force")
    sound = world.objects(settings)
    for plant in plants(dataset):
        plant.make(stored, plant.key)
        options = ("--deep",) if plant.deep else ()
        if plant.deep:
            assert command("verify").code == 0, plant
        found = command("verify", *options)
        lines = {**{key: f"= {key}\n" for key in sound}, plant.key: plant.line()}
        same = len(sound) - (plant.key in sound)
        wanted = "".join(lines[key] for key in sorted(lines)) + totals(settings, equal=same, **{plant.kind: 1})
        assert found == Done(5, wanted, "")
        quiet = plant.line() + totals(settings, equal=same, **{plant.kind: 1})
        again, orphans = (0, 1) if plant.kind == "orphan" else (1, 0)
        plan = f"Repair: {again} objects are uploaded again from their source, {orphans} orphans are removed.\n"
        mended = command("verify", "--repair", "--quiet", *options)
        assert mended == Done(0, f"{quiet}{plan}Repaired: 1; remaining: 0.\n", "")
        assert world.objects(settings) == sound, plant
    assert command("verify", "--deep", "--quiet") == Done(0, totals(settings, equal=len(sound)), "")


def test_all_of_them_at_once_are_one_json_object(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    load(dataset, "b2", "--force")
    sound = world.objects(settings)
    chosen = {plant.key: plant for plant in plants(dataset)}
    del chosen["b0/recognitions/1/camera1.jpg"]
    for plant in chosen.values():
        plant.make(stored, plant.key)
    differences = [
        {"sign": plant.sign, "kind": plant.kind, "key": key, "message": plant.message}
        for key, plant in sorted(chosen.items())
    ]
    counts = {kind: sum(one["kind"] == kind for one in differences) for kind in KINDS}
    counts["equal"] = len(sound) - 3
    found = command("verify", "--deep", "--json")
    assert (found.code, found.err, found.out.count("\n")) == (5, "", 1)
    report = {
        "bucket": settings.bucket,
        "unfinished": [],
        "elsewhere": {},
        "differences": differences,
        "totals": counts,
    }
    assert json.loads(found.out) == {**report, "repaired": 0, "remaining": len(chosen), "not_mended": []}
    mended = command("verify", "--deep", "--repair", "--json")
    assert (mended.code, mended.err, mended.out.count("\n")) == (0, "", 1)
    assert json.loads(mended.out) == {**report, "repaired": len(chosen), "remaining": 0, "not_mended": []}
    assert world.objects(settings) == sound


def spoil_by_removal(file: Path) -> None:
    file.unlink()


def spoil_by_cutting(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("spoil", [spoil_by_removal, spoil_by_cutting])
def test_an_object_that_is_listed_and_cannot_be_read_is_damaged(
    spoil: Callable[[Path], None],
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
) -> None:
    load(small_dataset(2), "b1")
    sound = world.objects(settings)
    first, *rest = sound
    spoil(stored.file(first))
    assert command("verify", "--quiet") == Done(0, totals(settings, equal=4), "")
    found = command("verify", "--deep")
    assert found.code == 5, found.err
    line, _, others = found.out.partition("\n")
    assert line.startswith(f"* {first} damaged: ")
    assert others == equal(rest) + totals(settings, equal=3, damaged=1)
    assert command("verify", "--deep", "--repair", "--quiet").code == 0
    assert world.objects(settings) == sound


@pytest.mark.parametrize("threads", [4, 1])
def test_deep_reads_several_objects_at_once_and_tells_them_in_order(
    threads: int,
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", str(threads))
    load(small_dataset(4), "b1")
    keys = stored.listed()
    flip(stored, keys[2])
    together = threading.Barrier(threads)
    digest, begun = Storage.digest, set()

    def noted(self: Storage, key: str) -> tuple[int, str]:
        if key not in begun:  # what differs is read again
            begun.add(key)
            together.wait(30)  # breaks unless so many are under way at the same time
        return digest(self, key)

    monkeypatch.setattr(Storage, "digest", noted)
    done = command("verify", "--deep")
    assert [line.split()[:2] for line in done.out.splitlines()[:-1]] == [
        ["*" if key == keys[2] else "=", key] for key in keys
    ]
    assert done.code == 5


def test_a_service_that_is_away_is_no_difference(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    load(small_dataset(1), "b1")
    away = replace(
        settings, url=f"http://127.0.0.1:{free_port()}", tuning=replace(settings.tuning, retry_max_attempts=0)
    )
    text = environment_file(away) + "PIPELINE_RETRY_MAX_ATTEMPTS='0'\n"
    (workdir / ".env.local").write_text(text, encoding="utf-8")
    for options in ((), ("--repair",), ("--deep",)):
        done = command("verify", *options)
        assert (done.code, done.out) == (3, "")
        assert "cannot be reached" in done.err


# The database against itself


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
    for batch_id, number in (("zz", 1), ("b4", facts["unfinished"])):
        yield Flaw(
            "check_versions",
            f"INSERT INTO public.recognitions (id, batch_id) VALUES ({number}, '{batch_id}')",
            (batch_id, f"recognition {number}", "is in the domain and in no finished batch"),
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
        ("b1", "batch b1", "has 3 recognitions in raw instead of 4"),
    )
    yield Flaw(
        "check_raw",
        "DELETE FROM raw.receipts WHERE batch_id = 'b4'",
        ("b4", "batch b4", "has 0 recognitions in raw instead of 2"),
    )
    for batch_id in ("zz", "b0"):
        yield Flaw(
            "check_raw",
            f"INSERT INTO raw.receipts (batch_id, recognition_id) VALUES ('{batch_id}', 1)",
            (batch_id, f"batch {batch_id}", "has 1 recognitions in raw instead of 0"),
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
        ("q1", f"recognition {last}", f"has {facts['annotations'] - 1} annotations instead of {facts['annotations']}"),
    )
    yield Flaw(
        "check_annotations",
        "INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, bbox, source) "
        f"SELECT min(id), {facts['item']}, 1, '{{}}', 'QWEN' FROM public.images WHERE recognition_id = {other}",
        (None, f"recognition {other}", "has 1 annotations instead of 0"),
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
        "annotations": "SELECT count(*) FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id"
        f" WHERE i.recognition_id = {last}",
        "unfinished": "SELECT min(recognition_id) FROM ingest.manifest WHERE batch_id = 'b4'",
    }
    facts = {name: world.query(dsn, text)[0][0] for name, text in values.items()}
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


INCONSISTENT = {
    "of no batch": "INSERT INTO public.menus (id, content_sha256) OVERRIDING SYSTEM VALUE VALUES (1000000, 'x')",
    "of a batch": "UPDATE public.images SET width = 1 WHERE camera_number = 1",
    "of annotations": "DELETE FROM public.initial_annotations WHERE id = (SELECT min(id) FROM"
    " public.initial_annotations WHERE image_id = (SELECT min(id) FROM public.images))",
    "of a batch that is not there": "INSERT INTO public.recognitions (id, batch_id) VALUES (1, 'zz')",
    "of a batch in another bucket": "UPDATE ingest.batches SET bucket = 'another' WHERE id = 'b2';"
    "UPDATE public.images SET width = 1 WHERE camera_number = 1 AND storage_path LIKE 'b2/%'",
}


@pytest.mark.parametrize("kind", INCONSISTENT)
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
    assert mended.out.endswith(f"; remaining: {len(lines)}.\n")
    assert world.dump(dsn) == before[0]
    if kind != "of a batch in another bucket":  # whose objects are orphans in this one
        assert world.objects(settings) == before[1]


# Which batches


def test_unfinished_batches_are_left_out_and_named(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(1), "b1")
    load(small_dataset(2, seed=9), "b2")
    with monkeypatch.context() as patch:
        test_reset.stop_in_storage(patch)
        assert command("reset", "--batch-id", "b2", "--confirm").code == 3
    fail_at(dsn, "transform")
    assert command("load", "--source", small_dataset(1, seed=8), "--batch-id", "b3", "--local-scheduler").code == 3
    stop_failing(dsn)
    stored.remove(next(key for key in stored.listed() if key.startswith("b3/")))
    stored.put("b3/recognitions/1/camera1.jpg", b"under way")
    keys = stored.listed()
    assert {key.split("/")[0] for key in keys} == {"b1", "b2", "b3"}
    named = "Skipped, because they are unfinished: b2, b3.\n"
    wanted = equal(keys[:2]) + totals(settings, equal=2) + named
    assert command("verify") == Done(0, wanted, "")
    assert command("verify", "--repair") == Done(0, f"{wanted}Repaired: 0; remaining: 0.\n", "")
    assert json.loads(command("verify", "--json").out)["unfinished"] == ["b2", "b3"]
    assert stored.listed() == keys
    for batch_id, state_now in (("b2", "resetting"), ("b3", "loading")):
        for option in ("--quiet", "--repair", "--json"):
            done = command("verify", "--batch-id", batch_id, option)
            assert (done.code, done.out) == (3, "")
            assert f"Batch {batch_id} is {state_now}" in done.err


def test_one_batch_alone_is_looked_at_and_mended(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket, dsn: str
) -> None:
    load(small_dataset(2), "b1")
    load(small_dataset(2, seed=9), "b10")
    load(small_dataset(1, seed=8), "b0")
    assert command("reset", "--batch-id", "b0", "--confirm").code == 0
    keys = stored.listed()
    lost = [keys[0], keys[-1]]
    stored.remove(*lost)
    extra = ["b0/x", "b1/x", "b10/x", "stranger"]
    for key in extra:
        put_stranger(stored, key)
    world.query(dsn, "UPDATE public.images SET width = 1 WHERE id IN (SELECT max(id) FROM public.images)")
    found = command("verify", "--batch-id", "b1", "--repair", "--quiet")
    assert found.code == 0
    assert found.out.startswith(f"- {lost[0]} dangling: readers see its row, and there is no object\n+ b1/x orphan: ")
    assert totals(settings, equal=3, dangling=1, orphan=1) in found.out
    assert found.out.endswith("Repaired: 2; remaining: 0.\n")
    assert stored.listed() == sorted({*keys, *extra} - {lost[1], "b1/x"})
    assert command("verify", "--batch-id", "b0", "--quiet").out.startswith("+ b0/x orphan: ")
    found = command("verify", "--batch-id", "b10", "--quiet")
    assert (found.code, found.out.count("\n")) == (5, 4)
    assert found.out.endswith(totals(settings, equal=3, dangling=1, orphan=1, inconsistent=1))


def test_a_batch_that_is_not_there_is_wrong_usage(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, workdir: Path, dsn: str
) -> None:
    load(small_dataset(1), "b1")
    for batch_id in ("never", "", "../b1"):
        done = command("verify", "--batch-id", batch_id)
        assert (done.code, done.out) == (2, "")
        assert f"There is no batch {batch_id} " in done.err
    (workdir / ".env.local").write_text(environment_file(replace(settings, bucket="another")), encoding="utf-8")
    done = command("verify", "--batch-id", "b1")
    assert (done.code, "There is no batch b1 with objects in the bucket another." in done.err) == (2, True)
    world.query(dsn, "DELETE FROM supabase_migrations.schema_migrations WHERE version >= '20260102000200'")
    done = command("verify")
    assert (done.code, "20260102000200_publish" in done.err) == (2, True)


# What repair does not do


def test_what_its_source_no_longer_has_is_not_mended_and_repair_says_why(
    command: Command, load: LoadBatch, own_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    dataset = own_dataset(3)
    load(dataset, "b1")
    sound = world.objects(settings)
    changed, gone, spoiled, whole = list(sound)[:4]
    photos = {key: photo_of(dataset, key) for key in (changed, gone, spoiled)}
    contents = {path: path.read_bytes() for path in photos.values()}
    stored.remove(changed, gone, whole)
    put_fewer_bytes(stored, spoiled)
    before = stored.read(spoiled)
    put_stranger(stored, "stranger")
    for key in (changed, spoiled):
        photos[key].write_bytes(contents[photos[key]][:-1] + b"?")  # of the same size
    photos[gone].unlink()
    reasons = [
        f"{changed}: {photos[changed]} is no longer what was loaded",
        f"{gone}: {photos[gone]} cannot be read: No such file or directory",
        f"{spoiled}: {photos[spoiled]} is no longer what was loaded",
    ]
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5
    assert done.out.endswith(
        "Repair: 4 objects are uploaded again from their source, 1 orphans are removed.\n"
        + "".join(f"Not repaired: {reason}\n" for reason in reasons)
        + "Repaired: 2; remaining: 3.\n"
    )
    assert stored.listed() == sorted(sound.keys() - {changed, gone})
    assert stored.read(spoiled) == before
    again = json.loads(command("verify", "--repair", "--json").out)
    assert (again["repaired"], again["remaining"], again["not_mended"]) == (0, 3, reasons)
    for path, content in contents.items():
        path.write_bytes(content)
    assert command("verify", "--repair", "--quiet").code == 0
    assert world.objects(settings) == sound


def test_what_the_bucket_does_not_keep_is_not_mended(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(2), "b1")
    lost, spoiled, *_ = stored.listed()
    stored.remove(lost)
    put_fewer_bytes(stored, spoiled)
    monkeypatch.setattr(Storage, "upload", lambda self, key, content: None)
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5, done.err
    for key in (lost, spoiled):
        assert f"Not repaired: {key}: Storage does not keep what it is sent\n" in done.out
    assert done.out.endswith("Repaired: 0; remaining: 2.\n")


def test_a_bucket_of_strangers_is_left_alone(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket, workdir: Path
) -> None:
    load(small_dataset(1), "b1")
    elsewhere = replace(settings, bucket=f"{settings.bucket}-other")
    (workdir / ".env.local").write_text(environment_file(elsewhere), encoding="utf-8")
    load(small_dataset(1, seed=9), "b2")
    other = Bucket(elsewhere, stored.server)
    ours = other.listed()
    strangers = ["b1/recognitions/1/camera1.jpg", "stranger"]
    for key in strangers:
        put_stranger(other, key)
    other.remove(*ours)  # nothing shows that this bucket is the database's
    lines = [f"+ {strangers[0]} orphan: 5 bytes, of a batch that is in the bucket {settings.bucket}\n"]
    lines += [f"- {key} dangling: readers see its row, and there is no object\n" for key in ours]
    lines += [f"+ {strangers[1]} orphan: 5 bytes, of no batch on record\n"]
    wanted = "".join(lines) + totals(elsewhere, dangling=2, orphan=2)
    wanted += f"Skipped, because they are in the bucket {settings.bucket}: b1.\n"
    assert command("verify") == Done(5, wanted, "")
    refused = command("verify", "--repair")
    assert refused.code == 4
    assert refused.out.startswith(wanted)
    assert "The bucket holds 2 objects of no batch on record" in refused.err
    assert "nothing was changed" in refused.err
    assert other.listed() == strangers
    refused = command("verify", "--repair", "--json")
    assert refused.code == 4
    assert not refused.out or json.loads(refused.out)["totals"]["orphan"] == 2
    assert other.listed() == strangers
    # Of one batch nobody else's object is looked at, so that it may be mended.
    assert command("verify", "--repair", "--batch-id", "b2").code == 0
    assert other.listed() == sorted([*strangers, *ours])
    assert command("verify", "--repair").code == 0
    assert other.listed() == ours


def test_what_is_left_of_a_batch_that_was_reset_is_no_stranger(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    load(small_dataset(1), "b1")
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    put_stranger(stored, "b1/recognitions/1/camera1.jpg")
    assert command("verify", "--repair").code == 0
    world.nothing(settings)


def test_a_batch_that_is_being_run_is_not_mended(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    load(small_dataset(1), "b1")
    load(small_dataset(1, seed=9), "b2")
    sound = world.objects(settings)
    lost = min(sound), max(sound)
    stored.remove(*lost)
    for key in ("b1/x", "b2/x", "stranger"):
        put_stranger(stored, key)
    running = BatchLock(settings, "b1", patience=0)
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5
    for key in (lost[0], "b1/x"):
        assert f"Not repaired: {key}: a run of batch b1 is going on\n" in done.out
    assert done.out.endswith("Repaired: 3; remaining: 2.\n")
    assert stored.listed() == sorted([*(sound.keys() - {lost[0]}), "b1/x"])
    running.release()
    assert command("verify", "--repair", "--quiet").code == 0
    assert world.objects(settings) == sound


# Beside a load and a reset


class Meanwhile(Storage):
    """A Storage where something happens while it is listed, once, after so many objects."""

    def __init__(self, settings: Settings, after: int, action: Callable[[], object]) -> None:
        super().__init__(settings)
        self._after, self._action = after, action
        self.acted = False

    def list_objects(self, prefix: str, after: str = "", last: str | None = None) -> Iterator[StoredObject]:
        for count, found in enumerate(super().list_objects(prefix, after, last)):
            if count == self._after:
                self.acted = True
                self._action()
            yield found


CHANGES = {
    "a batch is reset": ["reset b1"],
    "a batch is reset and loaded again": ["reset b1", "load b1"],
    "another batch is loaded": ["load b00", "load b3"],
    "an unfinished batch is finished": ["load b2"],
    "an unfinished batch is reset": ["reset b2"],
    "a new version is loaded": ["load b3 --force", "load b0 --force"],
    "a new version is loaded and the former one goes": ["load b3 --force", "reset b1"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "deep"), [*((change, False) for change in CHANGES), *((change, True) for change in list(CHANGES)[:2])]
)
def test_what_changes_while_it_is_looked_at_is_no_difference(
    change: str,
    deep: bool,
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    database: Database,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    sources = {"b1": small_dataset(3), "b2": small_dataset(2, seed=8), "b00": small_dataset(2, seed=7)}
    load(small_dataset(1, seed=9), "a")
    load(sources["b1"], "b1")
    load(small_dataset(1, seed=6), "z")
    fail_at(dsn, "transform")
    assert command("load", "--source", sources["b2"], "--batch-id", "b2", "--local-scheduler").code == 3
    stop_failing(dsn)

    def act() -> None:
        for line in CHANGES[change]:
            verb, batch_id, *options = line.split()
            if verb == "reset":
                assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
            elif batch_id == "b3" and not options:
                load(small_dataset(1, seed=5), "b3")
            else:
                load(sources.get(batch_id, sources["b1"]), batch_id, *options)

    monkeypatch.setattr("pipeline.storage.PAGE", 3)
    monkeypatch.setattr("pipeline.steps.verify.PAGE", 2)
    with closing(Meanwhile(settings, 4, act)) as storage:
        verification = Verification(database, storage, settings.bucket, deep=deep)
        found = list(verification.run())
    assert storage.acted
    assert [finding for finding in found if finding.kind != "equal"] == []
    untouched = [finding.key for finding in found if finding.batch_id in ("a", "z")]
    assert len(untouched) == 4
    assert command("verify", "--deep", "--quiet").code == 0


def test_verify_beside_a_load_and_a_reset_in_other_processes(
    command: Command,
    load: LoadBatch,
    start: Start,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
) -> None:
    load(small_dataset(2), "b0")
    load(small_dataset(12, seed=9), "b1")
    arguments = ("--source", small_dataset(24, seed=8), "--batch-id", "b2", "--local-scheduler")

    def look() -> None:
        for options in ((), ("--deep", "--repair")):
            done = command("verify", "--quiet", *options)
            assert (done.code, done.err) == (0, ""), done.out

    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.recognitions IN SHARE MODE")  # neither is done before we have looked
        running = [
            start(*test_luigi.COMMAND, *arguments, env=test_luigi.SLOW),
            start(*test_reset.COMMAND, "--batch-id", "b1", "--confirm"),
        ]
        while world.query(dsn, test_reset.WAITING) != [(2,)]:
            assert [process.poll() for process in running] == [None, None]
            look()
        look()
        connection.rollback()
    while any(process.poll() is None for process in running):
        look()
    for process in running:
        code, _, err = test_luigi.finish(process)
        assert code == 0, err
    world.check(settings, (small_dataset(2), "b0", None), (small_dataset(24, seed=8), "b2", None))
    assert command("verify", "--deep", "--quiet").code == 0


def test_repair_leaves_alone_what_was_changed_since_it_was_looked_at(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    database: Database,
) -> None:
    dataset, other = small_dataset(1), small_dataset(1, seed=9)
    [number] = world.folders(other)
    load(dataset, "b1")
    load(other, "b2")
    assert command("reset", "--batch-id", "b2", "--confirm").code == 0
    left = f"b2/recognitions/{number}/camera1.jpg"
    put_stranger(stored, left)
    put_stranger(stored, "b1/x")
    with closing(Storage(settings)) as storage:
        verification = Verification(database, storage, settings.bucket)
        found = [finding for finding in verification.run() if finding.kind != "equal"]
        assert [(finding.key, finding.kind) for finding in found] == [("b1/x", "orphan"), (left, "orphan")]
        load(other, "b2")
        assert command("reset", "--batch-id", "b1", "--confirm").code == 0
        load(dataset, "b1")
        mended = list(verification.repair(iter(found)))
    assert [(finding.key, why) for finding, why in mended] == [
        ("b1/x", "batch b1 was changed in the meantime"),
        (left, "batch b2 was changed in the meantime"),
    ]
    assert command("verify", "--repair", "--quiet").code == 0
    world.check(settings, (dataset, "b1", None), (other, "b2", None))


def test_a_stranger_that_a_batch_has_taken_since_it_was_looked_at_stays(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    database: Database,
) -> None:
    dataset, other = small_dataset(1), small_dataset(1, seed=9)
    [number] = world.folders(other)
    load(dataset, "b1")
    put_stranger(stored, f"b2/recognitions/{number}/camera1.jpg")
    with closing(Storage(settings)) as storage:
        verification = Verification(database, storage, settings.bucket)
        found = [finding for finding in verification.run() if finding.kind != "equal"]
        assert [(finding.batch_id, finding.kind) for finding in found] == [(None, "orphan")]
        load(other, "b2")
        list(verification.repair(iter(found)))
    world.check(settings, (dataset, "b1", None), (other, "b2", None))

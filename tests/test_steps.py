"""The steps one by one, for what only happens in between: files that change, a bucket that lies, shards that fail."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedded_supabase.files import wait_until
from pipeline.batches import state as batch_state
from pipeline.batches.lock import BatchLock
from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.batches.state import COPY, UPLOAD
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import (
    AccessDenied,
    DatabaseError,
    DatabaseUnavailable,
    HeldError,
    PipelineError,
    RefusedError,
    SettingsError,
    StorageError,
    StorageUnavailable,
    UnfinishedError,
)
from pipeline.observe.metrics import Metrics
from pipeline.steps import discover as discover_module
from pipeline.steps import parallel
from pipeline.steps import upload as upload_module
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import MAXIMUM_SHARDS, Discovery, Request, discover, shard_size
from pipeline.steps.read import Budget
from pipeline.steps.reset import reset_batch
from pipeline.steps.send import ShardTransfer
from pipeline.steps.transform import transform_batch, withdraw_lost_shards
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage, StoredObject
from tests import world
from tests.services import MakeDataset


class Load:
    """A batch `b1`, carried on step by step."""

    def __init__(self, settings: Settings, database: Database, dataset: Path) -> None:
        self.settings, self.database, self.dataset = settings, database, dataset
        self.metrics = Metrics()

    def discover(self, batch_size: int = 100, batch_id: str = "b1", limit: int | None = None) -> Discovery:
        resolve_batch(self.settings, self.database, LoadRequest(batch_id, str(self.dataset)))
        with closing(Storage(self.settings)) as storage:
            storage.ensure_bucket()
        request = Request(batch_id, str(self.dataset), self.settings.bucket, limit=limit, batch_size=batch_size)
        found = discover(self.database, request)
        assert found is not None
        return found

    def upload(self, shard: int = 1, storage: Storage | None = None) -> None:
        with (
            closing(storage or Storage(self.settings)) as opened,
            closing(Uploader(self.database, opened)) as uploader,
        ):
            uploader.upload("b1", shard)

    def copy(self, shard: int = 1) -> None:
        copy_shard(self.database, self.settings, "b1", shard)

    def transform(self) -> None:
        with closing(Storage(self.settings, self.metrics)) as storage:
            transform_batch(self.database, storage, "b1", self.metrics)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        return world.query(self.settings.database_url.reveal(), statement)

    def counter(self, name: str) -> int:
        """Return a counter of the upload of the first shard."""
        (row,) = self.query("SELECT metrics->'counters' FROM ingest.batch_state WHERE step = 'upload' AND shard = 1")
        return int(row[0].get(name, 0))

    def done(self, step: str, shard: int = 1) -> bool:
        return self.database.run(lambda connection: batch_state.is_done(connection, "b1", step, shard))


@pytest.fixture
def load(settings: Settings, database: Database, own_dataset: MakeDataset) -> Load:
    return Load(settings, database, own_dataset(6))


# Files that change


def test_files_that_vanish_or_change_after_discovery_are_rejects(load: Load) -> None:
    known = world.folders(load.dataset)
    ids = sorted(known)
    load.discover()
    next(known[ids[0]].rglob("*_Main.jpg")).unlink()
    with open(next(known[ids[1]].rglob("*_Qualifying.jpg")), "ab") as photo:
        photo.write(b"more")
    next(known[ids[2]].rglob("*_AM.json")).unlink()
    next(known[ids[3]].rglob("*_AM.json")).write_text("[]", encoding="utf-8")
    shutil.rmtree(known[ids[4]])
    load.upload()
    load.copy()
    load.transform()
    assert load.query("SELECT recognition_id, code FROM ingest.rejects ORDER BY 1") == [
        (ids[0], "photo_vanished"),
        (ids[1], "photo_changed"),
        (ids[2], "json_vanished"),
        (ids[3], "json_changed"),
        (ids[4], "json_vanished"),
    ]
    world.check(load.settings, (load.dataset, "b1", [ids[5]]))


def test_documents_that_change_between_upload_and_copy_are_rejects_whose_objects_go(load: Load) -> None:
    known = world.folders(load.dataset)
    ids = sorted(known)
    load.discover()
    load.upload()
    assert len(world.objects(load.settings)) == 12
    receipts = {number: next(known[number].rglob("*_correct_dishes.json"), None) for number in ids}
    changed, gone = [number for number in ids if receipts[number] is not None][:2]
    first, second = receipts[changed], receipts[gone]
    assert first is not None
    assert second is not None
    first.write_text('[{"Count": 1, "Dishes": [{"Name": "x", "ExternalId": "1"}]}]', encoding="utf-8")
    second.unlink()
    load.copy()
    assert load.query("SELECT count(*) FROM raw.photos") == [(8,)]
    load.transform()
    assert load.query("SELECT recognition_id, code, step FROM ingest.rejects ORDER BY 1") == sorted(
        [(changed, "json_changed", "copy"), (gone, "json_vanished", "copy")]
    )
    assert load.query("SELECT count(*) FROM ingest.manifest") == [(4,)]
    assert load.query("SELECT recognitions, photos FROM ingest.batches") == [(4, 8)]
    world.check(load.settings, (load.dataset, "b1", [number for number in ids if number not in (changed, gone)]))


def test_a_menu_of_which_one_whole_copy_is_left_serves_all(load: Load) -> None:
    load.discover()
    load.upload()
    known = world.folders(load.dataset)
    by_content: dict[bytes, list[Path]] = {}
    for number in sorted(known):
        for path in known[number].rglob("*_AM.json"):
            by_content.setdefault(path.read_bytes(), []).append(path)
    content, paths = max(by_content.items(), key=lambda item: len(item[1]))
    assert len(paths) > 1
    for path in paths[:-1]:
        path.unlink()
    load.copy()
    load.transform()
    for path in paths[:-1]:
        path.write_bytes(content)
    assert load.query("SELECT count(*) FROM ingest.rejects") == [(0,)]
    world.check(load.settings, (load.dataset, "b1", None))


def test_a_menu_that_another_shard_has_needs_no_file(load: Load) -> None:
    load.discover(batch_size=3)
    known = world.folders(load.dataset)
    shards = [sorted(known)[:3], sorted(known)[3:]]
    for shard in (1, 2):
        load.upload(shard)
    load.copy(1)
    menus = {path: path.read_bytes() for numbers in shards for n in numbers for path in known[n].rglob("*_AM.json")}
    copied = {content for path, content in menus.items() if any(known[n] in path.parents for n in shards[0])}
    gone = [path for path, content in menus.items() if content in copied and known[shards[0][0]] not in path.parents]
    assert any(known[number] in path.parents for number in shards[1] for path in gone)
    for path in gone:
        path.unlink()
    load.copy(2)
    load.transform()
    for path in gone:
        path.write_bytes(menus[path])
    assert load.query("SELECT count(*) FROM ingest.rejects") == [(0,)]
    world.check(load.settings, (load.dataset, "b1", None))


def test_a_copy_that_waited_for_another_sees_its_marker(load: Load) -> None:
    load.discover()
    load.upload()
    with ThreadPoolExecutor(1) as executor:
        with load.database.transaction() as connection:
            held = batch_state.hold_step(connection, "b1", COPY, 1)
            assert held is not None
            second = executor.submit(load.copy)
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            assert wait_until(lambda: load.query(waiting) == [(1,)], 20.0)
            batch_state.mark(connection, "b1", COPY, 1, held.now, {})
        second.result()
    assert load.query("SELECT count(*) FROM raw.photos") == [(0,)]
    assert load.query("SELECT count(*) FROM raw.receipts") == [(0,)]


# A bucket that lies


class Forgetful(Storage):
    """A Storage that says yes to some uploads and keeps nothing, or something else."""

    def __init__(self, settings: Settings, times: int, content: bytes | None) -> None:
        super().__init__(settings)
        self._times, self._content = times, content

    def upload(self, key: str, content: bytes) -> None:
        if key.endswith("camera2.jpg") and self._times > 0:
            self._times -= 1
            if self._content is not None:
                super().upload(key, self._content)
            return
        super().upload(key, content)


@pytest.mark.parametrize("content", [None, b"something else"])
def test_what_the_bucket_does_not_hold_as_it_was_sent_is_sent_again(load: Load, content: bytes | None) -> None:
    load.discover()
    load.upload(storage=Forgetful(load.settings, 3, content))
    assert load.counter("objects_resent") == 3
    load.copy()
    load.transform()
    world.check(load.settings, (load.dataset, "b1", None))


def test_a_shard_whose_objects_never_arrive_is_not_marked_and_is_sent_again(load: Load) -> None:
    found = load.discover(batch_size=3)
    assert found.shards == 2
    load.upload(1)
    first = world.objects(load.settings)
    assert len(first) == 6
    with pytest.raises(StorageError, match="does not keep what it was sent"):
        load.upload(2, storage=Forgetful(load.settings, 1000, b"something else"))
    assert not load.done(UPLOAD, 2)
    assert world.objects(load.settings).items() >= first.items()
    load.upload(2)
    for shard in (1, 2):
        load.copy(shard)
    load.transform()
    world.check(load.settings, (load.dataset, "b1", None))


class Unlisted(Storage):
    """A Storage that does not list, for good."""

    def list_objects(self, prefix: str, after: str = "", last: str | None = None) -> Iterator[StoredObject]:
        raise StorageError("Storage answers with a list of an unknown format.")


def test_a_shard_that_cannot_be_listed_keeps_what_an_earlier_run_sent(load: Load) -> None:
    load.discover()
    key = f"b1/recognitions/{sorted(world.folders(load.dataset))[0]}/camera1.jpg"
    with closing(Storage(load.settings)) as storage:
        storage.upload(key, b"what a run that was killed has left")
    with pytest.raises(StorageError, match="an unknown format"):
        load.upload(storage=Unlisted(load.settings))
    assert set(world.objects(load.settings)) == {key}
    load.upload()
    load.copy()
    load.transform()
    world.check(load.settings, (load.dataset, "b1", None))


def test_objects_that_are_there_already_are_not_sent_again_and_strangers_are_removed(load: Load) -> None:
    load.discover()
    ids = sorted(world.folders(load.dataset))
    wanted = world.expected(load.dataset, "b1")
    with closing(Storage(load.settings)) as storage:
        for row in wanted.images[:4]:
            photo = next(path for path in load.dataset.rglob("*.jpg") if path.stat().st_size == row[5])
            storage.upload(row[2], photo.read_bytes())
        storage.upload(f"b1/recognitions/{ids[2]}0/camera1.jpg", b"a stranger in the shard's range")
    load.upload()
    assert load.counter("objects_found") + load.counter("objects_uploaded") == 12
    assert load.counter("objects_found") >= 3  # two photos of the same size may have been mixed up above
    load.copy()
    load.transform()
    world.check(load.settings, (load.dataset, "b1", None))


class Overtaken(Storage):
    """A Storage of a run that is overtaken by another one, at its first upload."""

    def __init__(self, settings: Settings, overtake: Callable[[], None], failure: Exception | None) -> None:
        super().__init__(settings)
        self._overtake: Callable[[], None] | None = overtake
        self._failure = failure
        self._lock = threading.Lock()

    def upload(self, key: str, content: bytes) -> None:
        with self._lock:
            overtake, self._overtake = self._overtake, None
            if overtake is not None:
                overtake()
        if self._failure is not None:
            raise self._failure
        super().upload(key, content)


def test_a_run_that_was_overtaken_and_then_fails_removes_nothing(load: Load) -> None:
    load.discover()
    refused = StorageError("Storage answers InvalidKey.", "", "InvalidKey")
    with pytest.raises(StorageError, match="InvalidKey"):
        load.upload(storage=Overtaken(load.settings, load.upload, refused))
    assert load.done(UPLOAD)
    load.copy()
    load.transform()
    world.check(load.settings, (load.dataset, "b1", None))


def test_a_run_that_was_overtaken_and_then_rejects_removes_nothing(load: Load) -> None:
    load.discover()
    photos = {path: path.read_bytes() for path in sorted(load.dataset.rglob("*.jpg"))[-4:]}

    def overtake() -> None:
        load.upload()
        for path in photos:
            path.unlink()

    stalled = replace(load.settings, tuning=replace(load.settings.tuning, thread_count=1))
    load.upload(storage=Overtaken(stalled, overtake, None))
    for path, content in photos.items():
        path.write_bytes(content)
    load.copy()
    load.transform()
    assert load.query("SELECT count(*) FROM ingest.rejects") == [(0,)]
    world.check(load.settings, (load.dataset, "b1", None))


class OvertakenWhenRead(Overtaken):
    """A Storage of a run that another one overtakes when all six recognitions are read and none is sent.

    If there is a failure, it is that of the last response.
    """

    def __init__(self, settings: Settings, overtake: Callable[[], None], failure: Exception | None = None) -> None:
        self._arrived: list[str] = []
        self._failure_of_last = failure

        def wait_and_overtake() -> None:
            assert wait_until(lambda: len(self._arrived) == 6, 20.0)
            overtake()

        super().__init__(settings, wait_and_overtake, None)

    def upload(self, key: str, content: bytes) -> None:
        self._arrived.append(key)
        super().upload(key, content)
        if self._failure_of_last is not None and len(self._arrived) == 12:
            raise self._failure_of_last


def one_with_receipt(load: Load) -> int:
    return next(number for number, one in world.folders(load.dataset).items() if [*one.rglob("*correct_dishes.json")])


def spoil(load: Load, pattern: str, *numbers: int) -> None:
    """Change a file of recognitions, so that they are rejected from now on."""
    for number in numbers:
        with open(next(world.folders(load.dataset)[number].rglob(pattern)), "ab") as file:
            file.write(b" ")


def reject_in_upload(load: Load) -> None:
    spoil(load, "*_Main.jpg", one_with_receipt(load))
    load.upload()


def reject_in_copy(load: Load) -> None:
    load.upload()
    spoil(load, "*correct_dishes.json", one_with_receipt(load))
    load.copy()


def reject_and_remove(load: Load) -> None:
    reject_in_copy(load)
    with closing(Storage(load.settings)) as storage:
        assert withdraw_lost_shards(load.database, storage, "b1") == []


def reject_and_publish(load: Load) -> None:
    reject_in_copy(load)
    load.transform()


def reject_and_withdraw(load: Load) -> None:
    reject_in_upload(load)
    load.copy()
    with closing(Storage(load.settings)) as storage:
        storage.remove_all([min(world.objects(load.settings))])
        assert withdraw_lost_shards(load.database, storage, "b1") == [1]


@pytest.mark.parametrize(
    ("overtake", "failure"),
    [
        (reject_in_upload, None),
        (reject_and_remove, None),
        (reject_and_publish, None),
        (reject_and_withdraw, None),
        (reject_in_upload, StorageError("Storage answers InvalidKey.")),
        (reject_and_publish, StorageUnavailable("Storage is unreachable.")),
    ],
)
def test_what_a_run_sends_after_another_one_rejected_it_is_removed(
    load: Load, overtake: Callable[[Load], None], failure: PipelineError | None
) -> None:
    load.discover()
    gone = one_with_receipt(load)
    with suppress(PipelineError):
        load.upload(storage=OvertakenWhenRead(load.settings, partial(overtake, load), failure))
    if not load.done(COPY):
        load.copy()
    load.transform()
    assert load.query("SELECT recognition_id FROM ingest.rejects") == [(gone,)]
    world.check(load.settings, (load.dataset, "b1", [one for one in world.folders(load.dataset) if one != gone]))


def test_what_a_run_sends_for_a_batch_that_is_held_without_it_is_removed(load: Load) -> None:
    load.discover()

    def hold() -> None:
        spoil(load, "*_Main.jpg", *world.folders(load.dataset))
        load.upload()
        load.copy()
        load.query("UPDATE ingest.rejects SET code = 'photo_damaged'")
        with pytest.raises(HeldError):
            load.transform()

    with pytest.raises(HeldError):
        load.upload(storage=OvertakenWhenRead(load.settings, hold))
    assert world.objects(load.settings) == {}


def test_what_a_run_sends_for_a_batch_that_is_forgotten_is_removed(load: Load) -> None:
    load.discover()

    def forget() -> None:
        load.upload()
        load.copy()
        load.query("INSERT INTO public.recognitions (id) SELECT recognition_id FROM ingest.manifest")
        load.transform()
        assert load.query("SELECT id FROM ingest.batches") == []

    with pytest.raises(RefusedError, match="unknown, not loading"):
        load.upload(storage=OvertakenWhenRead(load.settings, forget))
    assert world.objects(load.settings) == {}


def test_what_a_run_sends_for_a_batch_that_was_started_anew_without_it_is_removed(load: Load) -> None:
    load.discover()

    def start_anew() -> None:
        reset_batch(load.database, load.settings, "b1")
        load.discover(limit=4)
        load.upload()
        load.copy()
        load.transform()

    with pytest.raises(RefusedError, match="started anew"):
        load.upload(storage=OvertakenWhenRead(load.settings, start_anew))
    world.check(load.settings, (load.dataset, "b1", sorted(world.folders(load.dataset))[:4]))


def test_what_a_run_sent_ahead_and_another_one_rejected_is_removed(load: Load) -> None:
    load.discover(batch_size=3)
    [(gone,)] = load.query("SELECT min(recognition_id) FROM ingest.manifest WHERE shard = 2")
    with (
        closing(Storage(load.settings)) as storage,
        closing(Uploader(load.database, storage, ahead=True)) as uploader,
    ):
        uploader.upload("b1", 1)
        assert wait_until(lambda: len(world.objects(load.settings)) == 12, 20.0)
        spoil(load, "*_Main.jpg", gone)
        load.upload(2)
        storage.upload(f"b1/recognitions/{gone}/camera1.jpg", b"as if the network had delivered it only now")
    for shard in (1, 2):
        load.copy(shard)
    load.transform()
    world.check(load.settings, (load.dataset, "b1", [one for one in world.folders(load.dataset) if one != gone]))


def is_waited_for(load: Load) -> bool:
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    database = "(SELECT oid FROM pg_database WHERE datname = current_database())"
    return wait_until(lambda: load.query(f"{waiting} AND database = {database}") == [(1,)], 20.0)


def test_a_run_that_fails_waits_for_the_one_that_marks_its_shard(load: Load) -> None:
    load.discover()
    gone = one_with_receipt(load)
    failure = StorageError("Storage answers InvalidKey.")
    with ThreadPoolExecutor(1) as executor:
        with load.database.transaction() as connection:
            held = batch_state.hold_step(connection, "b1", UPLOAD, 1)
            assert held is not None
            second = executor.submit(load.upload, storage=OvertakenWhenRead(load.settings, lambda: None, failure))
            assert is_waited_for(load)
            connection.execute("delete_manifest_rejected", batch_id="b1", recognition_ids=[gone])
            batch_state.mark(connection, "b1", UPLOAD, 1, held.now, {})
        assert second.exception(20.0) is failure
    listed = {key for (key,) in load.query("SELECT unnest(object_keys) FROM ingest.manifest")}
    assert set(world.objects(load.settings)) == listed
    assert len(listed) == 10


class Rediscovered(OvertakenWhenRead):
    """A Storage of a run that removes what it sent while the same batch is discovered anew."""

    def __init__(self, load: Load, overtake: Callable[[], None], executor: ThreadPoolExecutor) -> None:
        super().__init__(load.settings, overtake)
        self._load, self._executor = load, executor
        self.discovery: Future[Discovery] | None = None

    def remove(self, keys: Sequence[str]) -> list[str]:
        self.discovery = self._executor.submit(self._load.discover)
        assert is_waited_for(self._load)
        return super().remove(keys)


def test_a_batch_is_not_made_anew_while_a_run_removes_its_objects(load: Load) -> None:
    load.discover()

    def forget() -> None:
        load.query("DELETE FROM ingest.looks; DELETE FROM ingest.claims; DELETE FROM ingest.manifest")
        load.query("DELETE FROM ingest.batch_state; DELETE FROM ingest.batches")

    with ThreadPoolExecutor(1) as executor:
        storage = Rediscovered(load, forget, executor)
        with pytest.raises(RefusedError, match="unknown, not loading"):
            load.upload(storage=storage)
        assert storage.discovery is not None
        assert storage.discovery.result(20.0).recognitions == 6
    load.upload()
    load.copy()
    load.transform()
    world.check(load.settings, (load.dataset, "b1", None))


# Markers


def test_a_step_whose_marker_is_there_does_nothing(load: Load) -> None:
    load.discover()
    load.upload()
    shutil.move(load.dataset, load.dataset.with_name("moved"))
    load.upload()
    shutil.move(load.dataset.with_name("moved"), load.dataset)
    load.copy()
    load.copy()
    load.transform()
    load.transform()
    request = Request("b1", str(load.dataset), load.settings.bucket)
    assert discover(load.database, request) is None
    world.check(load.settings, (load.dataset, "b1", None))


def test_a_batch_is_not_transformed_before_all_of_it_is_copied(load: Load) -> None:
    load.discover(batch_size=3)
    for shard in (1, 2):
        load.upload(shard)
    load.copy(2)
    with pytest.raises(UnfinishedError, match="1 of 2 shards are not copied yet"):
        load.transform()
    assert not load.done(COPY, 1)
    assert world.domain(load.settings.database_url.reveal()).images == []


def test_a_step_of_a_batch_that_is_not_being_loaded_writes_nothing(load: Load) -> None:
    load.discover()
    load.upload()
    load.query("UPDATE ingest.batches SET state = 'resetting'")
    with pytest.raises(RefusedError, match="is resetting, not loading"):
        load.copy()
    assert load.query("SELECT count(*) FROM raw.photos") == [(0,)]


# Discovery and its bounds


def test_a_recognition_is_in_one_unfinished_batch_at_most(load: Load) -> None:
    first = load.discover(limit=4)
    second = load.discover(batch_id="b2")
    assert (first.recognitions, first.beyond_limit) == (4, 2)
    assert (second.recognitions, second.held_elsewhere, second.held_by) == (2, 4, ["b1"])


def test_what_another_discovery_took_meanwhile_is_told(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = discover_module._stage

    def stage_and_lose(*arguments: Any) -> int:
        monkeypatch.setattr(discover_module, "_stage", stage)
        looked = stage(*arguments)
        with closing(Database(load.settings)) as other:
            discover(other, Request("b1", str(load.dataset), load.settings.bucket, limit=4))
        return looked

    monkeypatch.setattr(discover_module, "_stage", stage_and_lose)
    found = load.discover(batch_id="b2")
    assert (found.recognitions, found.held_elsewhere, found.held_by) == (2, 4, ["b1"])
    assert (found.files["used"], found.files["not_taken"]) == (8, 16)
    assert load.query("SELECT held_elsewhere, held_by FROM ingest.batches WHERE id = 'b2'") == [(4, ["b1"])]


def test_the_shards_of_a_batch_are_ranges_of_keys(
    settings: Settings, database: Database, own_dataset: MakeDataset
) -> None:
    load = Load(settings, database, own_dataset(10, first_id=95))
    assert load.discover(batch_size=3).shards == 4
    rows = load.query("SELECT shard, unnest(object_keys) FROM ingest.manifest")
    in_order = [shard for shard, _ in sorted(rows, key=lambda row: str(row[1]))]
    assert in_order == sorted(in_order, key=str)
    assert len(in_order) == 20
    for shard in (4, 2, 1, 3):
        load.upload(shard)
        load.copy(shard)
    load.transform()
    world.check(settings, (load.dataset, "b1", None))


@given(st.integers(0, 2_000_000), st.integers(1, 10_000))
def test_a_batch_stays_under_a_thousand_tasks(recognitions: int, batch_size: int) -> None:
    size = shard_size(recognitions, batch_size)
    shards = -(-recognitions // size)
    assert size >= batch_size
    assert shards <= MAXIMUM_SHARDS
    assert 2 * shards + 3 < 1000
    assert size == batch_size or -(-recognitions // (size - 1)) > MAXIMUM_SHARDS


# The lock of a run


@pytest.fixture
def lock(load: Load) -> Iterator[BatchLock]:
    lock = BatchLock(load.settings, "b1", print, patience=0)
    yield lock
    lock.release()


def test_two_runs_of_a_batch_do_not_go_together(load: Load, lock: BatchLock) -> None:
    with pytest.raises(RefusedError, match="Another run of batch b1 is going on"):
        BatchLock(load.settings, "b1", print, patience=0)
    BatchLock(load.settings, "b2", print, patience=0).release()
    lock.release()
    BatchLock(load.settings, "b1", print, patience=0).release()


def test_the_lock_is_one_of_a_transaction(load: Load, lock: BatchLock) -> None:
    held = load.query(
        "SELECT a.state, l.mode FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory'"
        " AND a.datname = current_database()"
    )
    assert held == [("idle in transaction", "ExclusiveLock")]


LOSE = (
    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
    " WHERE application_name = 'pipeline lock b1' AND datname = current_database()"
)


def is_locked(load: Load) -> bool:
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
    return load.query(f"{held} AND database = (SELECT oid FROM pg_database WHERE datname = current_database())") == [
        (1,)
    ]


def test_a_lock_whose_connection_broke_is_taken_again(load: Load, lock: BatchLock) -> None:
    assert load.query(LOSE) == [(True,)]
    assert not is_locked(load)
    assert wait_until(lambda: is_locked(load), 20)
    with pytest.raises(RefusedError, match="Another run of batch b1"):
        BatchLock(load.settings, "b1", print, patience=0)


@pytest.mark.slow
@pytest.mark.parametrize("error", [AccessDenied, SettingsError, DatabaseError, DatabaseUnavailable])
def test_a_lock_is_taken_again_after_any_error_of_the_database(
    load: Load, lock: BatchLock, error: type[PipelineError], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []

    def fail(where: str) -> None:
        raised.append(where)
        raise error("The database refuses it.")

    def one(self: Connection, name: str, /, **parameters: object) -> Any:
        return fail(name) if name == "now" else Connection.one(self, name, **parameters)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_connect", lambda _: fail("connect"))
        if error is DatabaseError:  # a statement that somebody cancels
            assert lock._connection is not None
            patch.setattr(lock._connection, "one", partial(one, lock._connection))
        else:
            load.query(LOSE)
        assert wait_until(lambda: "connect" in raised, 20)
        assert not is_locked(load)
    assert wait_until(lambda: is_locked(load), 20)


def test_a_run_whose_lock_another_run_took_is_told(load: Load) -> None:
    lost: list[RefusedError] = []
    lock = BatchLock(load.settings, "b1", lost.append, patience=0)
    assert load.query(LOSE) == [(True,)]
    other = BatchLock(load.settings, "b1", print, patience=10)
    assert wait_until(lambda: bool(lost), 20)
    assert "Another run of batch b1" in lost[0].message
    lock.release()
    other.release()


def test_documents_are_not_copied_into_a_batch_of_annotations(load: Load) -> None:
    load.discover()
    load.upload()
    load.query("UPDATE ingest.batches SET kind = 'qwen' WHERE id = 'b1'")
    with pytest.raises(RefusedError, match="started anew"):
        load.copy()
    assert not load.done(COPY)
    assert load.done(UPLOAD)


# Memory


def test_the_budget_is_never_exceeded_but_by_one_alone() -> None:
    budget = Budget(10)
    lock, used, most = threading.Lock(), [0], [0]

    def use(size: int) -> None:
        with budget.reserved(size):
            with lock:
                used[0] += size
                assert used[0] <= 10 or used[0] == size
                most[0] = max(most[0], used[0])
            time.sleep(0.001)
            with lock:
                used[0] -= size

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(use, [6, 4, 1000, 10, 3, 3, 3, 11, 1] * 5))
    assert most == [1000]


def test_the_budget_is_released_after_an_error() -> None:
    budget = Budget(10)
    with pytest.raises(KeyError), budget.reserved(1000):
        raise KeyError
    with budget.reserved(6), budget.reserved(4):
        pass


def test_what_was_sent_leaves_nothing_behind_that_only_a_collection_would_remove(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    sendings: list[weakref.ref[ShardTransfer]] = []

    class Watched(ShardTransfer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            sendings.append(weakref.ref(self))

    monkeypatch.setattr(upload_module, "ShardTransfer", Watched)
    load.discover()
    gc.disable()
    try:
        load.upload()
        assert wait_until(lambda: sendings[0]() is None, 20)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("worked", "in_threads"), [(time.perf_counter, False), (lambda: 0.0, True)], ids=["works all the time", "waits"]
)
def test_folders_are_inspected_in_their_order_on_any_file_system(
    monkeypatch: pytest.MonkeyPatch, worked: Callable[[], float], in_threads: bool
) -> None:
    threads: set[str] = set()

    def look(item: int) -> int:
        threads.add(threading.current_thread().name)
        return item

    monkeypatch.setattr(parallel, "_TRIED", 2)
    monkeypatch.setattr(time, "thread_time", worked)
    with ThreadPoolExecutor(2) as executor:
        assert list(parallel.spread(look, range(6), executor)) == [*range(6)]
    assert (threads != {threading.current_thread().name}) == in_threads

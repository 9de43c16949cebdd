"""Reset of unfinished batches, resets that were stopped, and resets beside other runs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from pipeline.batches.lock import BatchLock
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import DatabaseError, RefusedError
from pipeline.graph import tasks
from pipeline.graph.run import registry
from pipeline.sample.writer import ANNOTATIONS
from pipeline.steps import reset
from pipeline.storage import Storage
from tests import reset_support, world
from tests.reset_support import (
    COMMAND,
    WAITING,
    Command,
    LoadBatch,
    batch_states,
    everything,
    fail_at,
    planned,
    state,
    stop_failing,
    stop_in_storage,
    vary,
)
from tests.services import MakeDataset, Start
from tests.test_luigi import finish
from tests.test_steps import Load

#: They wait more than they compute.
pytestmark = pytest.mark.slow

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load


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
        patch.setattr(Storage, "remove", lambda self, keys: list(keys))
        done = command("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 3
    assert "Storage still holds objects that it was asked to delete, b1/recognitions/" in done.err
    assert batch_states(dsn) == {"b1": "resetting"}
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)


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
    assert held.code == 3
    assert "All that is new belongs to unfinished b1: nothing was loaded." in held.err
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 0
    assert planned(done.out) == ({"raw.photos": 4, "raw.receipts": 2, "raw.menus": 1}, 9)
    assert batch_states(dsn) == {"b1": "reset"}
    assert world.counts(dsn)["ingest.claims"] == 0
    assert command("load", "--source", dataset, "--batch-id", "b2", "--local-scheduler").code == 0
    world.check(settings, (dataset, "b2", None))


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
    photos = {path: path.read_bytes() for path in dataset.rglob("*.jpg")}
    vary(dataset)
    for path, content in photos.items():  # the annotations are for these
        path.write_bytes(content)
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
    running = BatchLock(settings, "b1", print, patience=0)
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

"""Verify: what repair leaves alone, and runs beside a load and a reset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest

from pipeline.batches.lock import BatchLock
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.errors import RefusedError, StorageError
from pipeline.steps.verify import Verification
from pipeline.storage import Storage, StoredObject
from tests import reset_support, test_luigi, verify_support, world
from tests.reset_support import Command, Done, LoadBatch, fail_at, stop_failing
from tests.services import MakeDataset, Start, environment_file
from tests.verify_support import Bucket, photo_of, put_fewer_bytes, put_stranger, totals

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load
stored = verify_support.stored


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
    put_stranger(stored, "zz/recognitions/9/camera1.jpg")
    for key in (changed, spoiled):
        photos[key].write_bytes(contents[photos[key]][:-1] + b"?")  # of the same size
    photos[gone].unlink()
    reasons = [
        f"{changed}: {photos[changed]} is no longer what was loaded",
        f"{gone}: {photos[gone]}: the file vanished since it was loaded",
        f"{spoiled}: {photos[spoiled]} is no longer what was loaded",
    ]
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5
    assert done.out.endswith(
        "Repair: 4 objects to upload again, 1 orphan to remove.\n"
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


def test_what_storage_refuses_stops_nothing_else(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(2), "b1")
    refused, *others = keys = stored.listed()
    stored.remove(*keys)
    stranger = "b1/recognitions/9/camera1.jpg"
    put_stranger(stored, stranger)
    upload = Storage.upload

    def refusing(storage: Storage, key: str, content: bytes) -> None:
        if key == refused:
            raise StorageError("The object exceeded the maximum allowed size.", "")
        upload(storage, key, content)

    monkeypatch.setattr(Storage, "upload", refusing)
    monkeypatch.setattr(Storage, "remove", lambda _, keys: list(keys))
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5, done.err
    assert f"Not repaired: {refused}: Storage refuses it: The object exceeded the maximum allowed size.\n" in done.out
    assert f"Not repaired: {stranger}: Storage does not delete it\n" in done.out
    assert done.out.endswith("Repaired: 3; remaining: 2.\n")
    assert stored.listed() == sorted([*others, stranger])


def test_a_file_in_the_place_of_a_photo_is_not_read_beyond_its_size(
    command: Command, load: LoadBatch, own_dataset: MakeDataset, stored: Bucket
) -> None:
    dataset = own_dataset(1)
    load(dataset, "b1")
    large, pipe = keys = stored.listed()
    paths = [photo_of(dataset, key) for key in keys]
    stored.remove(*keys)
    paths[1].unlink()
    os.truncate(paths[0], 1 << 40)
    os.mkfifo(paths[1])
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5, done.err
    for key, path in zip((large, pipe), paths, strict=True):
        assert f"Not repaired: {key}: {path} is no longer what was loaded\n" in done.out


def test_a_bucket_of_strangers_is_left_alone(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket, workdir: Path
) -> None:
    load(small_dataset(1), "b1")
    elsewhere = replace(settings, bucket=f"{settings.bucket}-other")
    (workdir / ".env.local").write_text(environment_file(elsewhere), encoding="utf-8")
    with closing(Storage(elsewhere)) as door:
        door.ensure_bucket()
    load(small_dataset(1, seed=9), "b2")
    other = Bucket(elsewhere, stored.server)
    ours = other.listed()
    strangers = ["b1/recognitions/1/camera1.jpg", "zz/recognitions/9/camera1.jpg"]
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
    with closing(Database(elsewhere)) as database, closing(Storage(elsewhere)) as storage:
        compared = Verification(database, storage)
        findings = [one for one in compared.run() if one.kind == "orphan"]
        with pytest.raises(RefusedError, match="The bucket holds 2 objects"):
            list(compared.repair(iter(findings)))
        with pytest.raises(ValueError, match="to its end"):
            list(Verification(database, storage).repair(iter(findings)))
    assert other.listed() == strangers
    refused = command("verify", "--repair", "--batch-id", "b2")
    assert refused.code == 4
    assert "The bucket holds 2 objects of no batch on record" in refused.err
    assert other.listed() == strangers
    theirs = f"{ours[0]}.txt"  # below the prefix of a batch, and no key of ours
    put_stranger(other, theirs)
    assert command("verify", "--repair", "--batch-id", "b2").code == 0
    assert other.listed() == sorted([*strangers, *ours, theirs])
    assert command("verify", "--repair").code == 0
    assert other.listed() == sorted([*ours, theirs])


def test_a_batch_whose_objects_are_all_gone_is_mended_in_an_empty_bucket(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    load(small_dataset(1), "b1")
    sound = world.objects(settings)
    stored.remove(*sound)
    assert command("verify", "--repair", "--batch-id", "b1").code == 0
    assert world.objects(settings) == sound


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
    for key in ("b1/recognitions/7/camera1.jpg", "b2/recognitions/7/camera1.jpg", "zz/recognitions/9/camera1.jpg"):
        put_stranger(stored, key)
    running = BatchLock(settings, "b1", print, patience=0)
    done = command("verify", "--repair", "--quiet")
    assert done.code == 5
    for key in (lost[0], "b1/recognitions/7/camera1.jpg"):
        assert f"Not repaired: {key}: a run of batch b1 is going on\n" in done.out
    assert done.out.endswith("Repaired: 3; remaining: 2.\n")
    assert stored.listed() == sorted([*(sound.keys() - {lost[0]}), "b1/recognitions/7/camera1.jpg"])
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
        verification = Verification(database, storage, deep=deep)
        found = list(verification.run())
    assert storage.acted
    assert [finding for finding in found if finding.kind != "equal"] == []
    untouched = [finding.key for finding in found if finding.batch_id in ("a", "z")]
    assert len(untouched) == 4
    assert command("verify", "--deep", "--quiet").code == 0


@pytest.mark.slow
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
            start(*reset_support.COMMAND, "--batch-id", "b1", "--confirm"),
        ]
        while world.query(dsn, reset_support.WAITING) != [(2,)]:
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


@pytest.mark.slow
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
    put_stranger(stored, "b1/recognitions/7/camera1.jpg")
    with closing(Storage(settings)) as storage:
        verification = Verification(database, storage)
        found = [finding for finding in verification.run() if finding.kind != "equal"]
        assert [(finding.key, finding.kind) for finding in found] == [
            ("b1/recognitions/7/camera1.jpg", "orphan"),
            (left, "orphan"),
        ]
        load(other, "b2")
        assert command("reset", "--batch-id", "b1", "--confirm").code == 0
        load(dataset, "b1")
        mended = list(verification.repair(iter(found)))
    assert [(finding.key, why) for finding, why in mended] == [
        ("b1/recognitions/7/camera1.jpg", "batch b1 was changed in the meantime"),
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
        verification = Verification(database, storage)
        found = [finding for finding in verification.run() if finding.kind != "equal"]
        assert [(finding.batch_id, finding.kind) for finding in found] == [(None, "orphan")]
        load(other, "b2")
        list(verification.repair(iter(found)))
    world.check(settings, (dataset, "b1", None), (other, "b2", None))

"""The bucket of a batch: proved before it is believed, and compared with what was sent right before the commit."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from embedded_supabase.storage.auth import mint_key
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.steps import transform
from pipeline.storage import Storage
from tests import reset_support, verify_support, world
from tests.proxies import Fault, Request, StorageProxy, error, first
from tests.reset_support import Command, LoadBatch, fail_at, stop_failing
from tests.services import MakeDataset, StorageServer, environment_file
from tests.sweeps import sweep
from tests.test_storage_answers import bucket_request, listed, make_anew, said
from tests.verify_support import Bucket, photo_of, put_fewer_bytes, put_stranger

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load
stored = verify_support.stored

ALWAYS = 1_000_000


@pytest.fixture(autouse=True)
def small_shards(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "2")
    monkeypatch.setattr("backoff.full_jitter", lambda value: 0.01)


def uncommitted(command: Command, dsn: str, dataset: Path) -> None:
    """Load a batch to its commit, which fails."""
    fail_at(dsn, "transform")
    assert command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler").code == 3
    stop_failing(dsn)


# Objects that went away between two runs


@pytest.mark.parametrize("spoil", [lambda bucket, key: bucket.remove(key), put_fewer_bytes], ids=["missing", "differs"])
def test_objects_lost_before_the_commit_are_sent_again_with_their_shard(
    command: Command,
    dsn: str,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    spoil: Callable[[Bucket, str], None],
) -> None:
    dataset = small_dataset(6)
    uncommitted(command, dsn, dataset)
    spoil(stored, stored.listed()[5])
    done = command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler")
    assert done.code == 0, done.err
    world.check(settings, (dataset, "b1", None))
    assert command("verify", "--deep", "--quiet").code == 0
    assert world.counts(dsn)["ingest.batch_state"] == 9
    [(sent,)] = world.query(
        dsn, "SELECT sum((metrics->'counters'->>'objects_uploaded')::int) FROM ingest.batch_state WHERE step = 'upload'"
    )
    assert sent == 9, "of the shard that was withdrawn one object alone is sent again"


def test_a_photo_that_changed_since_is_rejected_when_its_object_is_lost(
    command: Command, dsn: str, own_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    dataset = own_dataset(6)
    uncommitted(command, dsn, dataset)
    lost = stored.listed()[4]
    stored.remove(lost)
    with open(photo_of(dataset, lost), "ab") as photo:
        photo.write(b"more")
    done = command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler")
    assert done.code == 0, done.err
    number = int(lost.split("/")[2])
    assert world.query(dsn, "SELECT recognition_id, code FROM ingest.rejects") == [(number, "photo_changed")]
    world.check(settings, (dataset, "b1", [one for one in world.folders(dataset) if one != number]))


def test_what_another_process_rejects_while_a_shard_is_withdrawn_leaves_no_object(
    command: Command,
    dsn: str,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = small_dataset(6)
    uncommitted(command, dsn, dataset)
    stored.remove(stored.listed()[5])
    number = int(stored.listed()[6].split("/")[2])
    remove, turns = transform._remove_rejected, itertools.count()

    def removing(database: Database, storage: Storage, batch_id: str) -> None:
        remove(database, storage, batch_id)
        if not next(turns):
            world.query(dsn, f"DELETE FROM raw.receipts WHERE recognition_id = {number}")  # COPY has none of it
            database.run(lambda one: one.execute("leave_out_copy", batch_id=batch_id, recognition_ids=[number]))

    monkeypatch.setattr(transform, "_remove_rejected", removing)
    done = command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler")
    assert done.code == 0, done.err
    assert number not in {row[0] for row in world.query(dsn, "SELECT id FROM public.recognitions")}
    assert [key for key in stored.listed() if f"/{number}/" in key] == []
    assert world.inconsistencies(settings) == []


def test_a_lost_object_that_cannot_be_sent_leaves_the_batch_unfinished(
    command: Command, dsn: str, own_dataset: MakeDataset, settings: Settings, stored: Bucket, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    uncommitted(command, dsn, dataset)
    lost = stored.listed()[4]
    stored.remove(lost)
    [folder] = {path.parent for path in world.folders(dataset).values()}
    folder.rename(tmp_path / "away")
    folder.mkdir()
    done = command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler")
    assert done.code == 3
    assert world.domain(dsn).recognitions == []
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    assert command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler").code == 0
    world.check(settings, (dataset, "b1", None))


# What a reset takes


@pytest.fixture
def proxy(settings: Settings, workdir: Path) -> StorageProxy:
    return StorageProxy(settings.url)


def test_a_reset_takes_nothing_but_keys_of_the_form_of_its_batch(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    load(small_dataset(3), "b1")
    strangers = [
        "b1/recognitions/1/camera1.jpg.json",
        "b1/recognitions/1/camera3.jpg",
        "b1/recognitions/1/thumbnails/camera1.jpg",
        "b1/recognitions/x1/camera1.jpg",
        "b1/recognitions/notes.txt",
    ]
    late = "b1/recognitions/999999999/camera1.jpg"
    for key in [*strangers, late]:
        put_stranger(stored, key)
    plan = command("reset", "--batch-id", "b1", "--dry-run")
    assert f"\n  bucket {settings.bucket}: 7 objects are deleted, " in plan.out
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert stored.listed() == sorted(strangers)


def test_a_reset_says_how_many_objects_were_missing_already(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    load(small_dataset(3), "b1")
    stored.remove(*stored.listed()[:2])
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert (done.code, done.err) == (0, "2 objects of batch b1 were missing from the bucket already.\n")
    world.nothing(settings)


def test_a_key_that_sees_the_bucket_and_no_object_is_told_so(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    proxy: StorageProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(3), "b1")
    asked: list[str] = []

    def plan(request: Request) -> Fault | None:
        if request.path.startswith("/storage/v1/object/info/"):
            asked.append(request.path)
            return error(404, "not_found", "NoSuchKey", "Object not found")
        return listed() if "/list-v2/" in request.path else said([]) if request.method == "DELETE" else None

    proxy.plan = plan
    with proxy:
        monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        assert "6 dangling" in command("verify").out
        done = command("reset", "--batch-id", "b1", "--confirm")
    assert (done.code, done.err) == (0, "6 objects of batch b1 were missing from the bucket already.\n")
    assert len(asked) == 12


@pytest.mark.parametrize(
    "gone", sweep(zip([[], ["k0", "k1"] * 500, ["recognitions"]])), ids=["nothing", "others", "no key"]
)
@pytest.mark.parametrize("is_marked", [True, False], ids=["marked", "unmarked"])
def test_a_delete_that_deletes_nothing_forgets_nothing(
    load: LoadBatch,
    command: Command,
    dsn: str,
    small_dataset: MakeDataset,
    settings: Settings,
    proxy: StorageProxy,
    monkeypatch: pytest.MonkeyPatch,
    gone: list[str],
    is_marked: bool,
) -> None:
    load(small_dataset(3), "b1")
    if not is_marked:
        world.query(dsn, "DELETE FROM ingest.batch_state WHERE step = 'upload'")
    answer = said([{"name": name} for name in gone])

    def plan(request: Request) -> Fault | None:
        return listed() if "/list-v2/" in request.path else answer if request.method == "DELETE" else None

    proxy.plan = plan
    with proxy, monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        assert command("reset", "--batch-id", "b1", "--confirm").code == 3
    assert reset_support.batch_states(dsn) == {"b1": "resetting"}
    assert len(world.objects(settings)) == 6
    assert world.counts(dsn)["ingest.manifest"] == 3
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)


def test_a_bucket_whose_time_is_not_on_record_is_proved_as_well(
    load: LoadBatch,
    command: Command,
    dsn: str,
    small_dataset: MakeDataset,
    settings: Settings,
    proxy: StorageProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(3), "b1")
    world.query(dsn, "UPDATE ingest.batches SET bucket_created_at = NULL")
    hidden = error(404, "Bucket not found", "NoSuchBucket", "Bucket not found")

    def plan(request: Request) -> Fault | None:
        if request.method == "DELETE":
            return said([])
        return hidden if "/bucket/" in request.path else listed() if "/list-v2/" in request.path else None

    proxy.plan = plan
    with proxy, monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        for look in (["status"], ["status", "--check"], ["verify"], ["reset", "--batch-id", "b1", "--confirm"]):
            assert command(*look).code == 2, look
        again = command("load", "--source", small_dataset(2, seed=7), "--batch-id", "b2")
        assert again.code == 4
    assert len(world.objects(settings)) == 6
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0


@pytest.mark.parametrize("options", [("--dry-run",), ("--confirm",)], ids=" ".join)
def test_an_unfinished_batch_is_not_forgotten_by_a_key_that_sees_nothing(
    command: Command,
    dsn: str,
    small_dataset: MakeDataset,
    settings: Settings,
    proxy: StorageProxy,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    uncommitted(command, dsn, small_dataset(3))
    hidden = error(404, "Bucket not found", "NoSuchBucket", "Bucket not found")
    proxy.plan = first(ALWAYS, hidden, lambda request: "/bucket/" in request.path)
    with proxy, monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        done = command("reset", "--batch-id", "b1", *options)
        assert done.code == 2
        assert "SUPABASE_SERVICE_ROLE_KEY" in done.err
    assert reset_support.batch_states(dsn) == {"b1": "loading"}
    assert len(world.objects(settings)) == 6
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)


# What each command says of a bucket that is hidden, gone, or another one


def delete(settings: Settings) -> None:
    bucket_request(settings, "POST", "/empty")
    bucket_request(settings, "DELETE")


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "unfinished"])
@pytest.mark.parametrize(("harm", "code"), [(delete, 2), (make_anew, 4)], ids=["deleted", "made anew"])
def test_every_look_at_the_bucket_ends_alike(
    command: Command,
    load: LoadBatch,
    dsn: str,
    small_dataset: MakeDataset,
    settings: Settings,
    harm: Callable[[Settings], None],
    code: int,
    is_done: bool,
) -> None:
    if is_done:
        load(small_dataset(2), "b1")
    else:
        uncommitted(command, dsn, small_dataset(2))
    harm(settings)
    for look in (["status"], ["status", "--check"], ["verify"], ["verify", "--repair"], ["reset", "--batch-id", "b1"]):
        done = command(*look)
        assert done.code == code, (look, done.out, done.err)
        assert "storage-answers.md" in done.out + done.err


@pytest.mark.parametrize("begun", [False, True], ids=["no batch", "an unfinished batch"])
@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_a_key_from_which_objects_are_hidden_is_refused_early(
    command: Command,
    dsn: str,
    small_dataset: MakeDataset,
    storage_server: StorageServer,
    monkeypatch: pytest.MonkeyPatch,
    begun: bool,
    role: str,
) -> None:
    if begun:
        uncommitted(command, dsn, small_dataset(2))
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", mint_key(storage_server.secret, role))
    for look in (["status"], ["status", "--check"], ["verify"], ["verify", "--repair"]):
        done = command(*look)
        assert done.code == 2, (look, done.out)
        assert f"of the role {role}" in done.out + done.err


@pytest.mark.parametrize("another", ["b1", "b2"])
def test_one_batch_of_another_bucket_is_enough_to_refuse(
    command: Command, load: LoadBatch, dsn: str, small_dataset: MakeDataset, settings: Settings, another: str
) -> None:
    for number, batch in enumerate(("b1", "b2")):
        load(small_dataset(2, seed=number), batch)
    world.query(dsn, f"UPDATE ingest.batches SET bucket_created_at = '2020-01-01' WHERE id = '{another}'")
    stored = world.objects(settings)
    source = small_dataset(2, seed=5)
    for look in (
        ["status"],
        ["status", "--check"],
        ["verify", "--repair"],
        ["load", "--source", source, "--batch-id", "b3"],
    ):
        done = command(*look)
        assert done.code == 4, (look, done.out, done.err)
        assert f"that of batch {another} at 2020-01-01" in done.out + done.err
    assert world.objects(settings) == stored
    assert command("verify", "--batch-id", "b1" if another == "b2" else "b2").code == 0


@pytest.mark.parametrize("kind", ["load", "load-qwen"])
def test_a_report_does_not_call_photos_missing_that_its_key_does_not_see(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    storage_server: StorageServer,
    monkeypatch: pytest.MonkeyPatch,
    workdir: Path,
    kind: str,
) -> None:
    dataset = small_dataset(2)
    load(dataset, "b1")
    if kind == "load-qwen":
        load(dataset, "q1", qwen=True)
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", mint_key(storage_server.secret, "anon"))
    done = command("report", "--batch-id", "b1" if kind == "load" else "q1", "--out", "page.html")
    assert done.code == 0
    assert "The page is without photos from Storage: The key is one of the role anon" in done.err
    page = (workdir / "page.html").read_text(encoding="utf-8")
    assert "Storage was not available." in page
    assert "has no object for this photo" not in page


def test_the_plan_of_a_reset_names_photos_that_the_list_lacks(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    load(small_dataset(2), "b1")
    line = f"  bucket {settings.bucket}: 4 objects are deleted, "
    plan = command("reset", "--batch-id", "b1", "--dry-run").out
    assert line in plan
    assert "on record" not in plan
    stored.remove(*stored.listed())
    plan = command("reset", "--batch-id", "b1", "--dry-run").out
    assert f"  bucket {settings.bucket}: 0 objects are deleted, 0 B; 4 photos are on record\n" in f"{plan}\n"


# What is on record


def test_a_batch_records_its_bucket_before_the_first_object_is_sent(
    command: Command, dsn: str, small_dataset: MakeDataset, settings: Settings
) -> None:
    uncommitted(command, dsn, small_dataset(3))
    with closing(Storage(settings)) as storage:
        found = storage.find_bucket()
    assert found is not None
    recorded = world.query(dsn, "SELECT bucket, bucket_created_at FROM ingest.batches")
    assert recorded == [(settings.bucket, found["created_at"])]


def test_a_bucket_that_no_batch_uses_may_be_absent(command: Command, settings: Settings) -> None:
    done = command("status")
    assert done.code == 0
    assert f"bucket {settings.bucket} does not exist yet" in done.out
    assert command("verify").code == 0


@pytest.mark.parametrize("project", ["of ours", "of an app"])
def test_no_bucket_is_created_beside_the_photos_that_are_there(
    project: str, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str, workdir: Path
) -> None:
    dataset, photo = small_dataset(2), "recognitions/7/camera1.jpg"
    if project == "of ours":
        assert command("load", "--source", dataset, "--limit", "1", "--batch-id", "b0").code == 0
        photo = "b0/recognitions/"
    else:
        world.query(dsn, "INSERT INTO public.recognitions (id) VALUES (7)")
        columns = "recognition_id, camera_number, storage_path, width, height"
        world.query(dsn, f"INSERT INTO public.images ({columns}) VALUES (7, 1, %s, 4, 3)", (photo,))
    before, other = world.dump(dsn), replace(settings, bucket=f"{settings.bucket}-x")
    (workdir / ".env.local").write_text(environment_file(other), encoding="utf-8")
    refused = command("load", "--source", dataset, "--batch-id", "b1")
    assert (refused.code, refused.out) == (4, "")
    assert f"There is no bucket {other.bucket}, but the project has photos already, such as {photo}" in refused.err
    assert "`status --check` finds it" in refused.err
    assert world.dump(dsn) == before
    with closing(Storage(other)) as storage:
        assert storage.find_bucket() is None
        storage.ensure_bucket()  # as a person does who wants one
    assert command("load", "--source", dataset, "--batch-id", "b1").code == 0


@pytest.mark.parametrize("adopted", [False, True], ids=["unknown", "adopted"])
def test_no_photo_goes_to_another_bucket_than_that_of_the_app(
    adopted: bool,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    workdir: Path,
    stored: Bucket,
) -> None:
    dataset, number = small_dataset(2), uuid.uuid4().int % 10**12  # other tests share the server
    world.query(dsn, "INSERT INTO public.recognitions (id, batch_id) VALUES (%s, 'manual')", (number,))
    with closing(Storage(settings)) as storage:
        storage.ensure_bucket()
    for camera in (1, 2):
        key = f"recognitions/{number}/camera{camera}.jpg"
        put_stranger(stored, key)
        columns = "recognition_id, camera_number, storage_path, width, height"
        world.query(dsn, f"INSERT INTO public.images ({columns}) VALUES (%s, %s, %s, 4, 3)", (number, camera, key))
    if adopted:
        assert command("adopt", "--confirm").code == 0
    other = replace(settings, bucket=f"{settings.bucket}-x")
    with closing(Storage(other)) as storage:
        storage.ensure_bucket()
    (workdir / ".env.local").write_text(environment_file(other), encoding="utf-8")
    refused = command("load", "--source", dataset, "--batch-id", "b1")
    assert (refused.code, refused.out) == (4, "")
    assert (
        f"are in the bucket {settings.bucket}, not in {other.bucket}, for example recognitions/{number}/" in refused.err
    )
    assert f"Set STORAGE_BUCKET={settings.bucket}." in refused.err
    assert replace(stored, settings=other).listed() == []
    checked = command("status", "--check").out
    said = f"1 finished batch is in the bucket {settings.bucket}, not in {other.bucket}, for example manual."
    assert (said in checked) == adopted
    (workdir / ".env.local").write_text(environment_file(settings), encoding="utf-8")
    assert command("load", "--source", dataset, "--batch-id", "b1").code == 0


def test_an_upload_leaves_alone_what_others_have_in_the_range_of_its_shard(
    command: Command, dsn: str, small_dataset: MakeDataset, stored: Bucket
) -> None:
    dataset = small_dataset(3)
    numbers = sorted(world.folders(dataset))
    uncommitted(command, dsn, dataset)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    others = f"b1/recognitions/{numbers[0]}/thumbnail.jpg"
    ours = f"b1/recognitions/{numbers[0]}0/camera1.jpg"
    for key in (others, ours):
        put_stranger(stored, key)
    assert command("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler").code == 0
    assert others in stored.listed()
    assert ours not in stored.listed()

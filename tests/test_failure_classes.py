"""What a failed load leaves behind, for each class of error: only an error about data rolls an upload back."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedded_supabase.ports import free_port
from pipeline.cli import main
from pipeline.config import Settings
from tests import world
from tests.proxies import (
    BAD_GATEWAY,
    DATABASE_TIMEOUT,
    INTERNAL,
    NO_SERVICE,
    PORTAL,
    RESET,
    SILENT,
    SLOW_DOWN,
    Fault,
    StorageProxy,
    error,
    first,
    page,
)
from tests.services import MakeDataset, RunPipeline

#: They wait more than they compute.
pytestmark = pytest.mark.slow

ONCE = {"PIPELINE_RETRY_MAX_ATTEMPTS": "0", "PIPELINE_BATCH_SIZE": "2"}
UPLOADED = "SELECT shard FROM ingest.batch_state WHERE step = 'upload' ORDER BY shard"
SENT = "SELECT coalesce(sum((metrics -> 'counters' ->> 'objects_uploaded')::int), 0) FROM ingest.batch_state"

RAISE = """
CREATE FUNCTION public.fail_on_purpose() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}'; END $$;
CREATE TRIGGER fail_on_purpose BEFORE {event} ON {table} FOR EACH STATEMENT EXECUTE FUNCTION public.fail_on_purpose()
"""
MEND = "DROP FUNCTION public.fail_on_purpose() CASCADE"


def load(run: RunPipeline, dataset: object) -> int:
    return run("load", "--source", str(dataset), "--batch-id", "b1", "--local-scheduler", env=ONCE).returncode


@pytest.mark.parametrize(
    "code",
    [
        "08006",  # connection failure
        "25006",  # read-only transaction
        "42501",  # insufficient privilege
        "42P01",  # undefined table
        "53100",  # disk full
        "53200",  # out of memory
        "57014",  # query canceled
        "57P01",  # admin shutdown
        "58030",  # I/O error
        "P0001",  # an error of a trigger of the app
        "XX000",  # internal error
    ],
)
def test_an_error_that_is_not_about_data_leaves_the_uploads(
    code: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn, dataset = settings.database_url.reveal(), small_dataset(6)
    world.query(dsn, RAISE.format(code=code, event="INSERT", table="raw.receipts"))
    assert load(run_pipeline, dataset) == 3
    assert len(world.objects(settings)) == 12
    assert world.query(dsn, UPLOADED) == [(1,), (2,), (3,)]
    sent = world.query(dsn, SENT)
    world.query(dsn, MEND)
    assert load(run_pipeline, dataset) == 0
    assert world.query(dsn, SENT) == sent == [(12,)]
    world.check(settings, (dataset, "b1", None))


@pytest.mark.parametrize(
    ("code", "event", "table"),
    [
        *((code, "INSERT", "raw.receipts") for code in ("22001", "22P02", "23502", "23503", "23505", "23514")),  # COPY
        *((code, "UPDATE", "ingest.manifest") for code in ("23503", "23514")),  # upload
    ],
)
def test_an_error_about_data_rolls_the_uploads_back(
    code: str, event: str, table: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn, dataset = settings.database_url.reveal(), small_dataset(6)
    world.query(dsn, RAISE.format(code=code, event=event, table=table))
    assert load(run_pipeline, dataset) == 3
    assert world.objects(settings) == {}
    assert world.query(dsn, UPLOADED) == []
    world.query(dsn, MEND)
    assert load(run_pipeline, dataset) == 0
    world.check(settings, (dataset, "b1", None))


def test_an_error_that_is_not_about_data_in_the_upload_leaves_its_objects(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn, dataset = settings.database_url.reveal(), small_dataset(6)
    world.query(dsn, RAISE.format(code="P0001", event="UPDATE", table="ingest.manifest"))
    assert load(run_pipeline, dataset) == 3
    assert world.objects(settings) != {}
    assert world.query(dsn, UPLOADED) == []
    world.query(dsn, MEND)
    assert load(run_pipeline, dataset) == 0
    world.check(settings, (dataset, "b1", None))


# Storage

ALWAYS = 1_000_000
MARKED = "SELECT step, shard FROM ingest.batch_state WHERE step <> 'discover' ORDER BY step, shard"


@pytest.fixture
def storage(workdir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> StorageProxy:
    """A proxy to Storage for commands that do not retry and wait at most a moment."""
    monkeypatch.setattr("backoff.full_jitter", lambda _: 0.01)
    monkeypatch.setattr("pipeline.storage.transport.READ_TIMEOUT", 0.5)
    for name, value in {**ONCE, "PIPELINE_THREAD_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    return StorageProxy(settings.url)


def load_here(dataset: Path) -> int:
    return main(["load", "--source", str(dataset), "--batch-id", "b1"])


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        (error(401, "Unauthorized", "InvalidJWT", "jwt expired", 401), 2),
        (error(403, "Unauthorized", "AccessDenied", "no access", 403), 2),
        (error(404, "Bucket not found", "NoSuchBucket", "Bucket not found"), 3),
        (error(409, "Duplicate", "KeyAlreadyExists", "The resource already exists"), 3),
        (SLOW_DOWN, 3),
        (INTERNAL, 3),
        (BAD_GATEWAY, 3),
        (NO_SERVICE, 3),
        (page(540, "Project Paused"), 3),
        (DATABASE_TIMEOUT, 3),
        (RESET, 3),
        (SILENT, 3),
        (PORTAL, 3),
    ],
    ids=str,
)
def test_an_error_of_storage_keeps_what_is_complete_and_the_load_resumes(
    fault: Fault,
    exit_code: int,
    storage: StorageProxy,
    small_dataset: MakeDataset,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dsn, dataset = settings.database_url.reveal(), small_dataset(4)
    victim = world.expected(dataset, "b1").images[5][2]
    storage.plan = first(ALWAYS, fault, lambda request: request.is_upload and request.path.endswith(victim))
    with storage:
        monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", storage.url)
        assert load_here(dataset) == exit_code
        kept = world.objects(settings)
        assert len(kept) >= 4
        assert (victim in kept) == fault.silent
        assert world.query(dsn, MARKED) == [("copy", 1), ("upload", 1)]
        assert world.domain(dsn).recognitions == []
        storage.plan = None
        storage.forget()
        assert load_here(dataset) == 0
    assert sum(storage.tries().values()) == 8 - len(kept)
    world.check(settings, (dataset, "b1", None))


def test_a_photo_larger_than_the_bucket_allows_is_a_reject(
    storage: StorageProxy, small_dataset: MakeDataset, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_dataset(4)
    images = world.expected(dataset, "b1").images
    too_large = error(413, "Payload too large", "EntityTooLarge", "The object exceeded the maximum allowed size")
    storage.plan = first(ALWAYS, too_large, lambda request: request.is_upload and request.path.endswith(images[5][2]))
    with storage:
        monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", storage.url)
        assert [load_here(dataset), load_here(dataset)] == [0, 0]
    found = world.query(settings.database_url.reveal(), "SELECT recognition_id, code, step FROM ingest.rejects")
    assert found == [(images[5][0], "photo_too_large", "upload")]
    world.check(settings, (dataset, "b1", sorted({image[0] for image in images} - {images[5][0]})))


def test_a_refused_connection_leaves_nothing_and_the_load_resumes(
    storage: StorageProxy, small_dataset: MakeDataset, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_dataset(4)
    with storage, monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", f"http://127.0.0.1:{free_port()}")
        assert load_here(dataset) == 3
    assert world.query(settings.database_url.reveal(), MARKED) == []
    assert load_here(dataset) == 0
    world.check(settings, (dataset, "b1", None))

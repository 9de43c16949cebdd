"""What a failed COPY leaves behind, for each class of error: only an error about data rolls an upload back."""

from __future__ import annotations

import pytest

from pipeline.config import Settings
from tests import world
from tests.services import MakeDataset, RunPipeline

ONCE = {"PIPELINE_RETRY_MAX_ATTEMPTS": "0", "PIPELINE_BATCH_SIZE": "2"}
UPLOADED = "SELECT shard FROM ingest.batch_state WHERE step = 'upload' ORDER BY shard"
SENT = "SELECT coalesce(sum((metrics -> 'counters' ->> 'objects_uploaded')::int), 0) FROM ingest.batch_state"

RAISE = """
CREATE FUNCTION public.fail_on_purpose() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}'; END $$;
CREATE TRIGGER fail_on_purpose BEFORE INSERT ON raw.{table} FOR EACH STATEMENT EXECUTE FUNCTION public.fail_on_purpose()
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
    world.query(dsn, RAISE.format(code=code, table="receipts"))
    assert load(run_pipeline, dataset) == 3
    assert len(world.objects(settings)) == 12
    assert world.query(dsn, UPLOADED) == [(1,), (2,), (3,)]
    sent = world.query(dsn, SENT)
    world.query(dsn, MEND)
    assert load(run_pipeline, dataset) == 0
    assert world.query(dsn, SENT) == sent == [(12,)]
    world.check(settings, (dataset, "b1", None))


@pytest.mark.parametrize("code", ["22001", "22P02", "23502", "23505", "23514"])
def test_an_error_about_data_rolls_the_uploads_back(
    code: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn, dataset = settings.database_url.reveal(), small_dataset(6)
    world.query(dsn, RAISE.format(code=code, table="receipts"))
    assert load(run_pipeline, dataset) == 3
    assert world.objects(settings) == {}
    assert world.query(dsn, UPLOADED) == []
    world.query(dsn, MEND)
    assert load(run_pipeline, dataset) == 0
    world.check(settings, (dataset, "b1", None))

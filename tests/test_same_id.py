"""Two requests with one batch id, of which neither was on record when the other one looked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import psycopg2
import pytest

from pipeline.batches.bucket import open_bucket
from pipeline.batches.lock import BatchLock
from pipeline.config import Settings
from tests import annotating, world
from tests.annotating import Run
from tests.services import MakeDataset, RunPipeline, Start
from tests.sweeps import sweep

run = annotating.run
OURS = (sys.executable, "-m", "pipeline")
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline")
ANNOTATIONS = "qwen_annotations.json"


@contextmanager
def seconds_taken(settings: Settings, prefix: str, seconds: int) -> Iterator[set[str]]:
    """Hold the locks of the ids of the next seconds, as other runs do that are not on record yet; yield those ids."""
    now = time.time()
    ids = [f"{prefix}_{time.strftime('%Y%m%d_%H%M%S', time.localtime(now + n))}" for n in range(seconds)]
    with closing(psycopg2.connect(settings.database_url.reveal())) as connection, connection.cursor() as cursor:
        for one in ids:
            cursor.execute("SELECT pg_advisory_lock(hashtextextended('pipeline.batch:' || %s, 0))", [one])
        yield set(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "prefix"),
    sweep(
        [
            ((*OURS, "load", "--local-scheduler", "--source"), "batch"),
            ((*OURS, "load-qwen", "--local-scheduler", "--file"), "qwen"),
            ((*OURS, "discover", "--source"), "batch"),
            ((*BARE, "LoadBatch", "--local-scheduler", "--source"), "batch"),
            ((*BARE, "LoadQwen", "--local-scheduler", "--file"), "qwen"),
        ],
        every=3,
    ),
    ids=lambda one: one if isinstance(one, str) else " ".join(one[2:]),
)
def test_a_new_batch_takes_no_id_of_a_run_that_is_not_on_record(
    command: tuple[str, ...],
    prefix: str,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    source = small_dataset(3)
    if prefix == "qwen":
        assert run_pipeline("load", "--source", source, "--batch-id", "b0").returncode == 0
        source /= ANNOTATIONS
    with seconds_taken(settings, prefix, 45) as taken:
        process = start(*command, source)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    made = {row[0] for row in world.query(settings.database_url.reveal(), "SELECT id FROM ingest.batches")} - {"b0"}
    assert len(made) == 1
    assert not made & taken


class _Before:
    """Let another load do its work between the moment a request is resolved and the moment it takes its lock."""

    def __init__(self, other: Any) -> None:
        self.other, self.batch_ids = other, list[str]()

    def __call__(self, settings: Settings, batch_id: str, *args: Any, **kwargs: Any) -> BatchLock:
        self.batch_ids.append(batch_id)
        if len(self.batch_ids) == 1:
            done = self.other(batch_id)
            assert done.returncode == 0, done.stderr
        return BatchLock(settings, batch_id, *args, **kwargs)


@pytest.mark.parametrize("known", [False, True], ids=["batch", "look"])
@pytest.mark.parametrize("named", [False, True], ids=["new id", "named"])
@pytest.mark.parametrize("command", ["load", "discover"])
def test_the_batch_of_another_source_is_not_reported_as_the_own(
    command: str,
    named: bool,
    known: bool,
    run: Run,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = small_dataset(2), small_dataset(3, seed=1, first_id=200_000)
    if known:  # there is nothing to load, and no batch is made
        assert run_pipeline("load", "--source", one, "--batch-id", "b0").returncode == 0
    before = _Before(lambda batch_id: run_pipeline("load", "--source", one, "--batch-id", batch_id))
    monkeypatch.setattr("pipeline.graph.run.BatchLock", before)
    done = run(command, "--source", two, *(["--batch-id", "b1"] if named else []))
    first = before.batch_ids[0]
    if named:
        assert (done.code, f"Batch {first} was started with --source {one}." in done.err) == (4, True), done.err
        assert done.out == ""
    else:
        assert done.code == 0, done.err
        sources = dict(world.query(settings.database_url.reveal(), "SELECT id, source FROM ingest.batches"))
        assert sources.pop(before.batch_ids[-1]) == str(two)
        assert set(sources.values()) == {str(one)}


def test_the_same_request_finds_the_batch_done(
    run: Run, run_pipeline: RunPipeline, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = partial(run_pipeline, "load", "--source", small_dataset(2), "--batch-id")
    monkeypatch.setattr("pipeline.graph.run.BatchLock", _Before(load))
    done = run("load", "--source", small_dataset(2), "--batch-id", "b1")
    assert (done.code, "nothing was loaded" in done.out) == (0, True), done.out


def test_discoveries_beside_each_other_do_not_share_an_id(
    run: Run, run_pipeline: RunPipeline, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = small_dataset(2), small_dataset(3, seed=1, first_id=200_000)

    def open_first(*args: Any) -> Any:  # the lock is taken by then
        done = run_pipeline("discover", "--source", one, "--batch-id", "b1")
        assert done.returncode == 0, done.stderr
        return open_bucket(*args)

    monkeypatch.setattr("pipeline.graph.run.open_bucket", open_first)
    done = run("discover", "--source", two, "--batch-id", "b1")
    assert (done.code, "Batch b1 was started with --source" in done.err) == (4, True), done.err

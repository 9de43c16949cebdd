"""Two at once: they serialise or one is refused with a clear message, and nothing is loaded twice."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS
from tests import world
from tests.runner import Ended, ForkServer, Runner, Running
from tests.services import MakeDataset

_BACKENDS = (
    "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
    " WHERE application_name LIKE 'pipeline%%' AND datname = current_database()"
)


@pytest.fixture
def runner(workdir: Path, fork_server: ForkServer) -> Runner:
    return Runner(fork_server, workdir, {"PIPELINE_BATCH_SIZE": "1", "PIPELINE_THREAD_COUNT": "1"})


def query(settings: Settings, statement: str, *values: object) -> list[tuple[Any, ...]]:
    return world.query(settings.database_url.reveal(), statement, values)


def parts(settings: Settings, dataset: Path) -> list[world.Part]:
    """What each batch has of a dataset, as the domain says."""
    ours = world.ours("public.recognitions")
    shown = f"SELECT batch_id, array_agg(id ORDER BY id) FROM public.recognitions WHERE {ours} GROUP BY 1 ORDER BY 1"
    return [(dataset, batch_id, ids) for batch_id, ids in query(settings, shown)]


def refused(ended: Ended, batch_id: str) -> bool:
    return ended.code == 4 and f"Another run of batch {batch_id} is going on." in ended.stderr


def test_three_runs_of_one_batch_at_once(runner: Runner, settings: Settings, small_dataset: MakeDataset) -> None:
    command = ("load", "--source", small_dataset(12), "--batch-id", "b1", "--local-scheduler")
    ended = [running.finish() for running in [runner.start(*command) for _ in range(3)]]
    assert any(one.code == 0 for one in ended)
    assert all(one.code == 0 or refused(one, "b1") for one in ended), ended
    world.check(settings, (small_dataset(12), "b1", None))


@pytest.mark.parametrize("kind", ["load", "load-qwen"])
def test_batches_over_the_same_dataset_at_once_share_it_out(
    kind: str, runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(12)
    if kind == "load-qwen":
        assert runner("load", "--source", dataset, "--batch-id", "b0").code == 0
    given = ("--source", dataset) if kind == "load" else ("--file", dataset / ANNOTATIONS)
    names = ["b1", "b2", "b3"]
    started = [runner.start(kind, *given, "--batch-id", name, "--local-scheduler") for name in names]
    for running in started:
        ended = running.finish()
        # One that finds all recognitions in unfinished batches has nothing to load.
        assert ended.code == 0 or (ended.code == 3 and "All that is new belongs to" in ended.stderr), ended.stderr
    held = query(settings, "SELECT recognition_id FROM ingest.manifest WHERE batch_id = ANY (%s)", names)
    assert len(held) == len(set(held)) == 12
    qwen = dataset / ANNOTATIONS if kind == "load-qwen" else None
    world.check(settings, *parts(settings, dataset), qwen=qwen)


def test_a_forced_reload_beside_a_reset_of_the_former_version(
    runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    first, second = small_dataset(6), small_dataset(6, seed=1, first_id=100_024)
    assert runner("load", "--source", first, "--batch-id", "b1").code == 0
    load = runner.start("load", "--source", second, "--batch-id", "b2", "--force", "--local-scheduler")
    reset = runner.start("reset", "--batch-id", "b1", "--confirm")
    for running in (load, reset):
        ended = running.finish()
        assert ended.code == 0, ended.stderr
    world.check(settings, (second, "b2", None))


def stalled(runner: Runner, settings: Settings, dataset: Path) -> Running:
    """A load with two workers, stopped with all its processes after its first shards."""
    running = runner.start("load", "--source", dataset, "--batch-id", "b1", "--workers", "2", "--local-scheduler")
    markers = "SELECT count(*) >= 3 FROM ingest.batch_state"
    assert wait_until(lambda: query(settings, markers) == [(True,)] or running.wait(0), 60)
    running.signal(signal.SIGSTOP)
    assert not running.wait(0), "it was too fast to be stopped"
    return running


@pytest.mark.slow
@pytest.mark.parametrize("meanwhile", ["resumed", "reset", "reset and loaded again"])
def test_a_run_that_was_cut_off_and_goes_on_later_changes_nothing(
    meanwhile: str, runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(20)
    load = ("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler")
    reset = ("reset", "--batch-id", "b1", "--confirm")
    first = stalled(runner, settings, dataset)
    # While it holds the lock, a second run and a reset wait for a while and are refused.
    others = [runner.start(*command) for command in (load, reset)]
    assert all(refused(running.finish(), "b1") for running in others)
    # The server takes its connections for lost, as after a minute without an answer.
    query(settings, _BACKENDS)
    commands: dict[str, list[tuple[str | Path, ...]]] = {
        "resumed": [load],
        "reset": [reset],
        "reset and loaded again": [reset, load],
    }
    for command in commands[meanwhile]:
        ended = runner(*command, env={"PIPELINE_BATCH_SIZE": "3"})
        assert ended.code == 0, ended.stderr
    before = world.dump(settings.database_url.reveal()), world.objects(settings)
    first.signal(signal.SIGCONT)
    assert first.finish().code in (0, 3, 4)
    assert (world.dump(settings.database_url.reveal()), world.objects(settings)) == before
    if meanwhile == "reset":
        world.nothing(settings)
    else:
        world.check(settings, (dataset, "b1", None))

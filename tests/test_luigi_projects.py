"""One luigid for several projects: batches of one name, at once, and helpers of each project at its own batch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from embedded_supabase.files import wait_until
from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from tests import world
from tests.habits import habit
from tests.runner import ForkServer, Runner, placed_runner
from tests.services import MakeDataset, RunLuigi, StorageServer, asked_of_luigid, running_luigid
from tests.test_luigi_habits import LOCAL, SCHEDULER, WORKER
from tests.test_worker import holding

SHARDED = {"PIPELINE_BATCH_SIZE": "2", "PIPELINE_THREAD_COUNT": "2"}


@pytest.fixture
def luigid(tmp_path: Path) -> Iterator[str]:
    with running_luigid(tmp_path) as url:
        yield url


Project = tuple[Settings, Runner]


@pytest.fixture
def projects(
    postgres_server: EmbeddedPostgres,
    template_database: str,
    storage_server: StorageServer,
    fork_server: ForkServer,
    luigid: str,
) -> Iterator[tuple[Project, Project]]:
    """Two projects, with a database, a bucket and a folder each, and one luigid in both folders' luigi.cfg."""
    with ExitStack() as stack:
        both = [
            stack.enter_context(placed_runner(postgres_server, template_database, storage_server, fork_server))
            for _ in range(2)
        ]
        for _, runner in both:
            (runner.folder / "luigi.cfg").write_text(f"[core]\nscheduler_url = {luigid}\n")
        yield both[0], both[1]


@habit(SCHEDULER, "one luigid for several projects, with batches of the same name at once", "works")
@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_two_projects_load_batches_of_one_name_at_once(
    workers: str, luigid: str, projects: tuple[Project, Project], small_dataset: MakeDataset
) -> None:
    datasets = small_dataset(8), small_dataset(8, seed=1)
    with ExitStack() as stack:
        held = [stack.enter_context(holding(settings.database_url.reveal(), 1)) for settings, _ in projects]
        running = [
            runner.start("load", "--source", source, "--batch-id", "b1", "--workers", workers)
            for source, (_, runner) in zip(datasets, projects, strict=True)
        ]

        def at_first_shard() -> bool:
            found = asked_of_luigid(luigid, "task_list", status="RUNNING", upstream_status="")
            return [one["params"].get("shard") for one in found.values()].count("1") == 2

        # Both are at the shard that nobody can finish, with the same parameters but for the project.
        assert wait_until(at_first_shard, 60)
        for one in held:
            one.let_go(1)
        ended = [one.finish() for one in running]
    assert [one.code for one in ended] == [0, 0], ended
    names = {re.findall(r"where this project is (\w+)", one.stderr)[0] for one in ended}
    assert len(names) == 2
    for source, (settings, _) in zip(datasets, projects, strict=True):
        world.check(settings, (source, "b1", None))
    done = asked_of_luigid(luigid, "task_list", status="DONE", upstream_status="")
    assert {one["params"]["supabase_project"] for one in done.values()} == names
    assert len(done) == 2 * (3 + 2 * 4)


@habit(WORKER, "`pipeline worker` beside batches of other projects", "works: it takes none of their tasks")
def test_a_helper_takes_no_task_of_another_project(
    luigid: str, projects: tuple[Project, Project], small_dataset: MakeDataset
) -> None:
    (ours, first), (theirs, second) = projects
    with holding(ours.database_url.reveal(), 1) as held, holding(theirs.database_url.reveal(), 1, 2, 3, 4) as others:
        running = [one.start("load", "--source", small_dataset(8), "--batch-id", "b1") for one in (first, second)]

        def pending() -> list[str]:
            found = asked_of_luigid(luigid, "task_list", status="PENDING", upstream_status="")
            return [one["name"] for one in found.values()]

        assert wait_until(lambda: pending().count("UploadShard") == 6, 60)
        helped = first("worker", "--idle", "1")
        assert helped.code == 0, helped.stderr
        assert re.fullmatch(r"Batch b1: 3 shards: upload, 3 shards: copy\.\n", helped.stdout)
        # Theirs still waits for every shard.
        marked = "SELECT step FROM ingest.batch_state"
        assert world.query(theirs.database_url.reveal(), marked) == [("discover",)]
        held.let_go(1)
        for shard in range(1, 5):
            others.let_go(shard)
        assert [one.finish().code for one in running] == [0, 0]
    for settings in (ours, theirs):
        world.check(settings, (small_dataset(8), "b1", None))


@habit(WORKER, "a task of another project, which Luigi's own assistant may get", "refused: both are named")
def test_a_task_of_another_project_is_refused(run_luigi: RunLuigi) -> None:
    shard = ("--module", "pipeline", "UploadShard", "--batch-id", "b1", "--shard", "1", LOCAL)
    refused = run_luigi("luigi", *shard, "--supabase-project", "12345678")
    assert refused.code != 0
    assert re.search(r"UploadShard of batch b1 is a task of the project 12345678, not of \w{8}\.", refused.stderr)

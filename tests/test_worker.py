"""Further workers at a batch: what they take, how they leave, and what becomes of a dataset that is not there."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import psycopg2
import pytest
import requests

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from pipeline.config import Settings
from pipeline.graph import luigid as luigid_calls
from tests import world
from tests.services import (
    REPOSITORY,
    MakeDataset,
    RunPipeline,
    Start,
    after_target,
    end,
    subprocess_environment,
)

#: They wait more than they compute.
pytestmark = pytest.mark.slow

LOAD = (sys.executable, "-m", "pipeline", "load", "--batch-id", "b1")
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline", "LoadBatch", "--batch-id", "b1")
HELP = (sys.executable, "-m", "pipeline", "worker")
SMALL = {"PIPELINE_BATCH_SIZE": "2", "PIPELINE_THREAD_COUNT": "2"}
SECONDS = 60.0


class Luigid:
    """A running luigid, and what it knows."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url, self.process = url, process

    def tasks(self, status: str) -> dict[str, Any]:
        """Return the tasks in a state, by id."""
        with requests.Session() as session:
            session.trust_env = False
            data = json.dumps({"status": status, "upstream_status": "", "limit": False})
            answer = session.get(f"{self.url}/api/task_list", params={"data": data}, timeout=10)
        found: dict[str, Any] = answer.json()["response"]
        return found

    def running(self, who: str) -> list[str]:
        """Return the displayed names of the tasks that a worker whose id has this in it is at."""
        running = self.tasks("RUNNING").values()
        return [one["display_name"] for one in running if who in (one["worker_running"] or "")]


class MakeLuigid(Protocol):
    """Start a luigid that misses a worker after so many seconds; the former one is killed, with all that it knew."""

    def __call__(self, disconnect: float = 30, port: int | None = None) -> Luigid: ...


def configuration(url: str, disconnect: float) -> str:
    """Return our luigi.cfg with another address, and another patience with workers that are gone."""
    text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    for former, new in (
        ("scheduler_port = 8082", f"scheduler_url = {url}/"),
        ("worker_disconnect_delay = 30", f"worker_disconnect_delay = {disconnect}"),
    ):
        assert former in text
        text = text.replace(former, new)
    return text


@pytest.fixture
def luigid(workdir: Path, tmp_path: Path) -> Iterator[MakeLuigid]:
    started: list[subprocess.Popen[bytes]] = []

    def make(disconnect: float = 30, port: int | None = None) -> Luigid:
        for former in started:
            former.kill()
            former.wait()
        url = f"http://127.0.0.1:{port or free_port()}"
        (workdir / "luigi.cfg").write_text(configuration(url, disconnect), encoding="utf-8")
        command = [sys.executable, "-c", "import luigi.cmdline; luigi.cmdline.luigid()", "--address", "127.0.0.1"]
        command += ["--port", url.rpartition(":")[2], "--state-path", str(tmp_path / "state")]
        with open(tmp_path / "luigid.log", "wb") as log:
            process = subprocess.Popen(command, cwd=workdir, env=subprocess_environment(), stdout=log, stderr=log)
        started.append(process)
        assert wait_until(lambda: luigid_calls.answers(url) or process.poll() is not None, 30)
        assert process.poll() is None, (tmp_path / "luigid.log").read_text(encoding="utf-8")
        return Luigid(url, process)

    yield make
    for process in started:
        process.send_signal(signal.SIGCONT)
        end(process)


class Held:
    """Steps that nobody can finish: their locks are ours until they are let go."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def hold(self, shard: int) -> None:
        """Take the lock of the upload of a shard."""
        key = f"pipeline.step:b1/upload/{shard}"
        self._cursor.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", (key,))

    def let_go(self, shard: int) -> None:
        """Give it back."""
        key = f"pipeline.step:b1/upload/{shard}"
        self._cursor.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", (key,))
        assert self._cursor.fetchall() == [(True,)]


@contextmanager
def holding(dsn: str, *shards: int) -> Iterator[Held]:
    """Hold the uploads of some shards of b1."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        held = Held(cursor)
        for shard in shards:
            held.hold(shard)
        yield held


def marked(settings: Settings) -> dict[str, set[int]]:
    """Return which uploads are marked, by worker."""
    found: dict[str, set[int]] = {}
    statement = "SELECT worker, shard FROM ingest.batch_state WHERE step = 'upload'"
    for name, shard in world.query(settings.database_url.reveal(), statement):
        found.setdefault(name, set()).add(shard)
    return found


def by(process: subprocess.Popen[str], settings: Settings) -> set[int]:
    """Return the shards that a worker of one process has uploaded."""
    return {shard for name, shards in marked(settings).items() if name.endswith(f":{process.pid}") for shard in shards}


def rejects(settings: Settings) -> list[tuple[Any, ...]]:
    return world.query(settings.database_url.reveal(), "SELECT recognition_id, code FROM ingest.rejects ORDER BY 1")


def until(condition: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Wait for a condition, while none of the processes may end."""
    met: list[object] = []

    def check() -> bool:
        met[:] = [condition()]
        return bool(met[0]) or any(one.poll() is not None for one in processes)

    wait_until(check, SECONDS)
    ended = [one.communicate() for one in processes if one.poll() is not None]
    assert met[0], ended


def finish(process: subprocess.Popen[str], timeout: float = SECONDS) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def started_by(service: Luigid) -> list[str]:
    """Return what the starter is at; its worker's id has the batch in it."""
    return service.running("batch=b1")


def at_shards(service: Luigid, *shards: str) -> set[str]:
    """Return the workers that are at the upload of one of these shards."""
    running = service.tasks("RUNNING").values()
    return {
        one["worker_running"] for one in running if one["name"] == "UploadShard" and one["params"]["shard"] in shards
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", [LOAD, BARE], ids=["load", "bare"])
def test_two_workers_and_the_starter_share_the_shards(
    form: tuple[str, ...], luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    # Nobody gets past one of these, so that each of the three has one, however fast the others are.
    with holding(settings.database_url.reveal(), 1, 2, 3) as held:
        starter = start(*form, "--source", small_dataset(24), env=SMALL)
        until(lambda: len(world.objects(settings)) == 4, starter)
        helpers = [start(*HELP, "--idle", "3", env=SMALL) for _ in range(2)]
        until(lambda: len(at_shards(service, "1", "2", "3")) == 3, starter, *helpers)
        for shard in (1, 2, 3):
            held.let_go(shard)
        code, _, stderr = finish(starter)
        assert code == 0, stderr
    world.check(settings, (small_dataset(24), "b1", None))
    assert 1 in by(starter, settings)
    assert all(by(helper, settings) for helper in helpers)
    for helper in helpers:
        code, stdout, stderr = finish(helper)
        assert (code, after_target(stderr)) == (0, f"Helping with batch b1: {small_dataset(24)}\n")
        told = re.fullmatch(r"Batch b1: (\d+) shards?: upload(?:, \d+ shards?: copy)?\.\n", stdout)
        # What another one did while we asked for it counts as done once more.
        assert told is not None, stdout
        assert int(told[1]) >= len(by(helper, settings))
    assert sum(map(len, marked(settings).values())) == 12


def test_the_starter_waits_for_a_shard_that_another_worker_is_at(
    luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    with holding(settings.database_url.reveal(), 1, 2) as held:
        starter = start(*LOAD, "--source", small_dataset(8), env=SMALL)
        until(lambda: started_by(service), starter)
        helper = start(*HELP, "--workers", "2", env=SMALL)
        until(lambda: any("shard=2" in one for one in service.running("workers=2")), starter, helper)
        held.let_go(1)
        # All but that shard is done, and the starter has nothing in hand.
        copied = "SELECT shard FROM ingest.batch_state WHERE step = 'copy' ORDER BY shard"
        until(lambda: world.query(settings.database_url.reveal(), copied) == [(1,), (3,), (4,)], starter, helper)
        until(lambda: not started_by(service), starter, helper)
        held.let_go(2)
        assert finish(starter)[0] == 0
    world.check(settings, (small_dataset(8), "b1", None))
    helper.terminate()
    assert finish(helper)[0] == 130


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_worker_that_is_told_to_leave_hands_on_what_it_was_at(
    workers: str, luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid(disconnect=600)  # nobody is missed during this test
    with holding(settings.database_url.reveal(), 1, 2) as held:
        starter = start(*LOAD, "--source", small_dataset(8), env=SMALL)
        until(lambda: started_by(service), starter)
        helper = start(*HELP, "--workers", workers, env=SMALL)
        until(lambda: any("shard=2" in one for one in service.running(f"workers={workers}, host")), starter, helper)
        until(lambda: len(children_of(helper.pid)) >= (workers == "2"), starter, helper)
        children = [int(pid) for pid in children_of(helper.pid)]
        helper.send_signal(signal.SIGTERM)
        code, _, stderr = finish(helper)
        assert (code, "Traceback" in stderr) == (130, False), stderr
        assert "Interrupted. Run the same command again." in stderr
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
        held.let_go(1)
        held.let_go(2)
        assert finish(starter)[0] == 0
    world.check(settings, (small_dataset(8), "b1", None))
    assert by(starter, settings) >= {1, 2}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_worker_that_is_told_to_take_no_further_task_ends_with_what_it_did(
    workers: str, luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    with holding(settings.database_url.reveal(), *range(1, 9)) as held:
        starter = start(*LOAD, "--source", small_dataset(16), env=SMALL)
        until(lambda: started_by(service), starter)
        helper = start(*HELP, "--workers", workers, env=SMALL)
        until(lambda: len(service.running(f"workers={workers}, host")) == int(workers), starter, helper)
        helper.send_signal(signal.SIGUSR1)
        for shard in range(2, 9):
            held.let_go(shard)
        code, stdout, stderr = finish(helper, 30)
        what = "1 shard" if workers == "1" else "2 shards"
        assert (code, stdout) == (0, f"Batch b1: {what}: upload.\n"), stderr
        held.let_go(1)
        assert finish(starter)[0] == 0
    world.check(settings, (small_dataset(16), "b1", None))


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()


def test_what_a_killed_worker_was_at_is_taken_over(
    luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid(disconnect=5)
    with holding(settings.database_url.reveal(), 1, 2) as held:
        starter = start(*BARE, "--source", small_dataset(12), env=SMALL)
        until(lambda: started_by(service), starter)
        helper = start(*HELP, env=SMALL)
        until(lambda: any("shard=2" in one for one in service.running("workers=1, host")), starter, helper)
        helper.kill()
        helper.wait()
        held.let_go(1)
        held.let_go(2)
        code, _, stderr = finish(starter)
        assert code == 0, stderr
    world.check(settings, (small_dataset(12), "b1", None))
    assert by(starter, settings) >= {1, 2}


def test_when_the_starter_leaves_no_further_shard_is_taken(
    luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    arguments = ("--source", small_dataset(12))
    with holding(settings.database_url.reveal(), 1, 2, 3, 4, 5, 6) as held:
        starter = start(*LOAD, *arguments, env=SMALL)
        until(lambda: started_by(service) and len(world.objects(settings)) == 4, starter)
        helper = start(*HELP, "--idle", "4", env=SMALL)
        until(lambda: service.running("workers=1, host"), starter, helper)
        starter.terminate()
        assert finish(starter)[0] == 130
        for shard in range(1, 7):
            held.let_go(shard)
        code, stdout, stderr = finish(helper)
        assert (code, stdout) == (0, "Batch b1: 1 shard: upload.\n"), stderr
    assert [len(shards) for shards in marked(settings).values()] == [1]
    assert finish(start(*LOAD, *arguments, env=SMALL))[0] == 0
    world.check(settings, (small_dataset(12), "b1", None))


def test_a_luigid_that_forgot_the_run_is_told_anew(
    luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    with holding(settings.database_url.reveal(), 1) as held:
        starter = start(*LOAD, "--source", small_dataset(8), env=SMALL)
        until(lambda: len(world.objects(settings)) == 4, starter)
        assert len(service.tasks("PENDING")) > 4
        service = luigid(port=int(service.url.rpartition(":")[2]))
        assert not service.tasks("PENDING")
        held.let_go(1)
        code, _, stderr = finish(starter)
        assert code == 0, stderr
        assert "luigid has forgotten this run: scheduling it again." in stderr
    world.check(settings, (small_dataset(8), "b1", None))


def test_a_starter_that_shares_does_not_send_ahead(
    luigid: MakeLuigid, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    with holding(settings.database_url.reveal(), 1) as held:
        starter = start(*LOAD, "--source", small_dataset(8), env=SMALL)
        until(lambda: started_by(service), starter)
        until(lambda: len(world.objects(settings)) == 4, starter)
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        until(lambda: world.query(settings.database_url.reveal(), waiting) == [(1,)], starter)
        assert len(world.objects(settings)) == 4
        held.let_go(1)
        assert finish(starter)[0] == 0
    world.check(settings, (small_dataset(8), "b1", None))


def limit_tasks(workdir: Path, seconds: int) -> None:
    """Let Luigi end a task after so many seconds, or never."""
    path = workdir / "luigi.cfg"
    text = re.sub(r"timeout = \d+\n", "", path.read_text(encoding="utf-8"))
    assert "[worker]\n" in text
    path.write_text(text.replace("[worker]\n", f"[worker]\ntimeout = {seconds}\n"), encoding="utf-8")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_task_that_luigi_ends_after_a_time_is_a_failure_with_a_cause(
    workers: str, luigid: MakeLuigid, start: Start, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    service = luigid()
    arguments = ("--source", small_dataset(12))
    with holding(settings.database_url.reveal(), *range(1, 7)) as held:
        starter = start(*LOAD, *arguments, env=SMALL)
        until(lambda: started_by(service), starter)
        limit_tasks(workdir, 2)
        helper = start(*HELP, "--workers", workers, env=SMALL)
        code, stdout, stderr = finish(helper)
        assert (code, stdout) == (3, ""), stderr
        assert re.search(r"3 shards in a row failed here, the last: Task UploadShard\S+ timed out after 2 sec", stderr)
        starter.terminate()
        assert finish(starter)[0] == 130
        for shard in range(2, 7):
            held.let_go(shard)
        code, _, stderr = finish(start(*LOAD, *arguments, "--workers", workers, "--local-scheduler", env=SMALL))
        assert code == 3, stderr
        assert re.search(r"Failed: UploadShard\(.*shard=1, .* timed out after 2 seconds", stderr)
        assert "Batch b1 is unfinished: 1 task failed." in stderr
    limit_tasks(workdir, 0)
    assert finish(start(*LOAD, *arguments, env=SMALL))[0] == 0
    world.check(settings, (small_dataset(12), "b1", None))


# Without work, or without what it takes


def test_without_luigid_a_worker_is_refused(run_pipeline: RunPipeline, workdir: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    (workdir / "luigi.cfg").write_text(configuration(url, 30), encoding="utf-8")
    done = run_pipeline("worker")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Error: No luigid answers at {url}/" in done.stderr
    assert "scheduler_url in the section [core] of luigi.cfg" in done.stderr


def test_without_work_a_worker_leaves_after_a_while(luigid: MakeLuigid, run_pipeline: RunPipeline) -> None:
    luigid()
    done = run_pipeline("worker", "--idle", "1")
    assert (done.returncode, done.stdout, after_target(done.stderr)) == (0, "There was nothing to help with.\n", "")
    told = run_pipeline("worker", "--idle", "0", "--json")
    assert json.loads(told.stdout) == {"tasks": 0, "failed": 0, "batches": {}}


def test_a_task_of_another_package_is_left_alone(
    luigid: MakeLuigid, run_pipeline: RunPipeline, settings: Settings
) -> None:
    service = luigid()
    told = {"worker": "stranger", "status": "PENDING", "runnable": True, "module": "elsewhere"}
    for task_id, family, parameters in (
        ("Foreign_1", "Foreign", {}),
        ("CopyShard_1", "CopyShard", {"batch_id": "b1", "shard": "1", "production": "False"}),
    ):
        data = json.dumps({**told, "task_id": task_id, "family": family, "params": parameters})
        with requests.Session() as session:
            session.trust_env = False
            session.post(f"{service.url}/api/add_task", data={"data": data}, timeout=10).raise_for_status()
    done = run_pipeline("worker", "--idle", "2")
    assert (done.returncode, after_target(done.stderr)) == (0, "")
    assert set(service.tasks("PENDING")) == {"Foreign_1", "CopyShard_1"}


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_host_without_the_dataset_leaves_before_it_rejects_anything(
    empty: bool,
    luigid: MakeLuigid,
    start: Start,
    run_pipeline: RunPipeline,
    own_dataset: MakeDataset,
    settings: Settings,
) -> None:
    service, dataset = luigid(), own_dataset(12)
    with holding(settings.database_url.reveal(), 1) as held:
        starter = start(*LOAD, "--source", dataset, env=SMALL)
        until(lambda: started_by(service), starter)
        until(lambda: len(world.objects(settings)) == 4, starter)
        with away(dataset, empty=empty):
            done = run_pipeline("worker")
            assert (done.returncode, done.stdout) == (2, "")
            assert f"Error: The dataset of batch b1 is not on this host: {dataset}" in done.stderr
        held.let_go(1)
        assert finish(starter)[0] == 0
    assert rejects(settings) == []
    world.check(settings, (dataset, "b1", None))


@contextmanager
def away(dataset: Path, *, empty: bool) -> Iterator[None]:
    """Take a dataset away for a while, as when it is not mounted."""
    elsewhere = dataset.with_name("elsewhere")
    dataset.rename(elsewhere)
    if empty:
        dataset.mkdir()
    try:
        yield
    finally:
        if empty:
            dataset.rmdir()
        elsewhere.rename(dataset)


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_dataset_that_goes_away_under_a_worker_is_not_rejected(
    empty: bool, luigid: MakeLuigid, start: Start, own_dataset: MakeDataset, settings: Settings
) -> None:
    service, dataset = luigid(), own_dataset(12)
    with holding(settings.database_url.reveal(), 1, 2) as held:
        starter = start(*LOAD, "--source", dataset, env=SMALL)
        until(lambda: started_by(service), starter)
        until(lambda: len(world.objects(settings)) == 4, starter)
        helper = start(*HELP, env=SMALL)
        until(lambda: len(world.objects(settings)) >= 8, starter, helper)
        with away(dataset, empty=empty):
            held.let_go(2)
            code, _, stderr = finish(helper)
            assert code == 2, stderr
            assert f"Error: The dataset of batch b1 is not on this host: {dataset}" in stderr
        held.let_go(1)
        assert finish(starter)[0] == 0
    assert rejects(settings) == []
    world.check(settings, (dataset, "b1", None))


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_dataset_that_goes_away_in_the_middle_of_a_load_leaves_it_unfinished(
    empty: bool, start: Start, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(24)
    arguments = ("--source", dataset, "--local-scheduler")
    with holding(settings.database_url.reveal(), 1) as held:
        starter = start(*LOAD, *arguments, env=SMALL)
        until(lambda: len(world.objects(settings)) >= 4, starter)
        with away(dataset, empty=empty):
            held.let_go(1)
            code, _, stderr = finish(starter)
            assert code == 3, stderr
            assert "is gone, or has no recognition in it any more" in stderr
    assert rejects(settings) == []
    assert finish(start(*LOAD, *arguments, env=SMALL))[0] == 0
    assert rejects(settings) == []
    world.check(settings, (dataset, "b1", None))


def test_what_a_worker_does_not_see_the_starter_decides(
    luigid: MakeLuigid, start: Start, own_dataset: MakeDataset, settings: Settings
) -> None:
    service, dataset = luigid(), own_dataset(12)
    known, dsn = world.folders(dataset), settings.database_url.reveal()
    with holding(dsn, 1) as held:
        starter = start(*LOAD, "--source", dataset, env=SMALL)
        until(lambda: started_by(service), starter)
        until(lambda: len(world.objects(settings)) == 4, starter)
        lost = int(world.query(dsn, "SELECT recognition_id FROM ingest.manifest WHERE shard = 3 LIMIT 1")[0][0])
        next(known[lost].rglob("*_Main.jpg")).unlink()
        helper = start(*HELP, "--idle", "3", "--json", env=SMALL)
        until(lambda: by(helper, settings) == {2, 4, 5, 6}, starter, helper)
        held.let_go(1)
        assert finish(starter)[0] == 0
        assert {1, 3} <= by(starter, settings)
    code, stdout, stderr = finish(helper)
    assert (code, json.loads(stdout)["failed"]) == (0, 1), stderr
    assert rejects(settings) == [(lost, "photo_vanished")]
    world.check(settings, (dataset, "b1", [number for number in known if number != lost]))

"""The graph under Luigi: the bare command, luigid up and down, several workers, exit codes, and being stopped."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import requests

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from pipeline.config import Settings
from pipeline.graph.failures import Failure
from tests import world
from tests.habits import habit
from tests.runner import Ended
from tests.services import MakeDataset, RunLuigi, Start, after_target, running_luigid

BARE = (sys.executable, "-m", "luigi", "--module", "pipeline", "LoadBatch")
COMMAND = (sys.executable, "-m", "pipeline", "load")
TASK = ("luigi", "--module", "pipeline", "LoadBatch")
SLOW = {"PIPELINE_BATCH_SIZE": "2", "PIPELINE_THREAD_COUNT": "1"}


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def told(ended: Ended) -> tuple[int, str, str]:
    return ended.code, ended.stdout, ended.stderr


#: How the summary of a load that found its batch done begins.
_REPEATED = re.compile(
    r"Batch (\S+) is done already, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: nothing was loaded\. It has"
)


def as_first(stdout: str) -> str:
    """Return what a load that found its batch done says, as the first line of the load before it."""
    assert _REPEATED.match(stdout)
    return _REPEATED.sub(r"Batch \1 is done:", stdout)


def first_line(stdout: str) -> str:
    return stdout.partition("\n")[0] + "\n"


@pytest.fixture
def luigid(tmp_path: Path) -> Iterator[str]:
    """The address of a running luigid."""
    with running_luigid(tmp_path) as url:
        yield url


def markers(settings: Settings) -> int:
    return int(world.query(settings.database_url.reveal(), "SELECT count(*) FROM ingest.batch_state")[0][0])


def test_the_bare_command_without_luigid_warns_once_and_loads(
    run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ("--batch-id", "b1", "--source", small_dataset(6), "--scheduler-url", url)
    code, stdout, stderr = told(run_luigi(*TASK, *arguments))
    assert code == 0
    assert after_target(stderr).count("\n") == 1
    assert f"luigid does not answer at {url}: using the local scheduler." in stderr
    assert stdout.startswith("Batch b1 is done: 6 recognitions, 12 photos")
    assert "Performance Metrics:" in stdout
    world.check(settings, (small_dataset(6), "b1", None))


def test_the_bare_command_with_a_local_scheduler_says_no_word_of_luigid(
    run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings
) -> None:
    arguments = ("--batch-id", "b1", "--source", small_dataset(6), "--local-scheduler")
    first = told(run_luigi(*TASK, *arguments))
    assert (first[0], after_target(first[2])) == (0, "")
    assert first[1].startswith("Batch b1 is done: 6 recognitions")
    again = told(run_luigi(*TASK, *arguments))
    assert (again[0], after_target(again[2])) == (0, "")
    assert as_first(again[1]) == first_line(first[1])
    assert told(run_luigi("pipeline", "load", *arguments)) == again
    world.check(settings, (small_dataset(6), "b1", None))


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "4"])
def test_luigid_schedules_the_work_and_is_told_no_secret(
    workers: str, luigid: str, run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings
) -> None:
    arguments = ("--batch-id", "b1", "--source", small_dataset(12), "--workers", workers, "--scheduler-url", luigid)
    code, stdout, stderr = told(run_luigi(*TASK, *arguments, env={"PIPELINE_BATCH_SIZE": "3"}))
    assert (code, after_target(stderr)) == (0, "")
    assert stdout.startswith("Batch b1 is done: 12 recognitions")
    world.check(settings, (small_dataset(12), "b1", None))
    with requests.Session() as session:
        session.trust_env = False
        heard = session.get(f"{luigid}/api/task_list", params={"data": '{"status": "DONE"}'}, timeout=10).text
    assert heard.count("UploadShard_b1") >= 4
    assert settings.key.reveal() not in heard
    assert settings.database_url.reveal() not in heard


def test_a_failure_is_never_exit_code_0(run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings) -> None:
    dsn = settings.database_url.reveal()
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    arguments = ("--batch-id", "b1", "--source", small_dataset(6), "--local-scheduler")
    # The working directory has no luigi.cfg, as that of an installed wheel: the exit codes come with the package.
    code, stdout, stderr = told(run_luigi(*TASK, *arguments))
    assert code == 30
    assert stdout.startswith("Batch b1 is unfinished: 6 recognitions with 12 photos planned, ")
    assert "Failed: CopyShard(batch_id=b1" in stderr
    assert "To go on: luigi --module pipeline LoadBatch --batch-id b1" in stderr
    assert "Traceback" not in stderr
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    assert told(run_luigi(*TASK, *arguments))[0] == 0
    world.check(settings, (small_dataset(6), "b1", None))


def test_an_error_before_the_first_task_is_a_sentence_and_a_hint(
    run_luigi: RunLuigi, small_dataset: MakeDataset
) -> None:
    code, stdout, stderr = told(
        run_luigi(*TASK, "--batch-id", "../b1", "--source", small_dataset(3), "--local-scheduler")
    )
    assert (code, stdout) == (40, "")
    assert "Error: The batch id '../b1' is not valid." in stderr
    assert "Hint: " in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "SIGKILL"])
@pytest.mark.parametrize("form", [BARE, COMMAND], ids=["bare", "load"])
def test_stopped_in_the_middle_the_same_command_finishes_it(
    form: tuple[str, ...],
    how: str,
    workers: str,
    start: Start,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    arguments = ("--source", small_dataset(40), "--workers", workers, "--local-scheduler", "--batch-id", "b1")
    running = start(*form, *arguments, env=SLOW)
    wait_until(lambda: markers(settings) >= 5 or running.poll() is not None, 60)
    assert running.poll() is None, "it was too fast to be stopped"
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)
    else:
        running.send_signal(getattr(signal, "SIGKILL" if how == "SIGKILL" else "SIGTERM"))
    code, stdout, stderr = finish(running)
    if how == "SIGKILL":
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        typed = "luigi --module pipeline LoadBatch" if form is BARE else "python -m pipeline load"
        assert f"Interrupted. To go on: {typed} --batch-id b1" in stderr
        assert "Traceback" not in stderr
    assert "Performance Metrics" not in stdout
    assert world.domain(settings.database_url.reveal()).images == []  # all or nothing
    assert 5 <= markers(settings) < 43
    assert finish(start(*form, *arguments))[0] == 0
    world.check(settings, (small_dataset(40), "b1", None))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_statement_that_waits_in_postgresql_does_not_hold_up_a_stop(
    workers: str, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    arguments = ("--source", small_dataset(6), "--workers", workers, "--local-scheduler", "--batch-id", "b1")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.images IN ACCESS EXCLUSIVE MODE")  # the transform waits for it
        running = start(*COMMAND, *arguments)
        assert wait_until(lambda: world.query(dsn, waiting) == [(1,)] or running.poll() is not None, 60)
        running.terminate()
        code, _, stderr = finish(running, 20)
        assert (code, "Traceback" in stderr) == (130, False), stderr
        connection.rollback()
    assert world.domain(dsn).images == []
    assert finish(start(*COMMAND, *arguments))[0] == 0
    world.check(settings, (small_dataset(6), "b1", None))


@pytest.mark.slow
@habit("Workers", "`kill -9` of a load under luigid, and the same command again", "works: it goes on at once")
def test_stopped_under_luigid_the_same_command_finishes_it_at_once(
    luigid: str, start: Start, run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings
) -> None:
    arguments = ("--source", small_dataset(40), "--workers", "3", "--batch-id", "b1", "--scheduler-url", luigid)
    running = start(*BARE, *arguments, env=SLOW)
    wait_until(lambda: markers(settings) >= 5 or running.poll() is not None, 60)
    running.kill()
    assert finish(running)[0] == -signal.SIGKILL
    code, _, stderr = told(run_luigi(*TASK, *arguments))
    assert code == 0
    assert re.fullmatch(r"Resuming batch b1: \d+ of 40 recognitions were uploaded before\.\n", after_target(stderr))
    world.check(settings, (small_dataset(40), "b1", None))


@pytest.mark.slow
@habit("Workers", "the same batch twice at once", "works where the first ends soon, else refused")
def test_a_second_run_of_a_batch_waits_or_is_refused(
    start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    arguments = ("--source", small_dataset(40), "--local-scheduler", "--batch-id", "b1")
    first = start(*COMMAND, *arguments, env=SLOW)
    wait_until(lambda: markers(settings) >= 2 or first.poll() is not None, 60)
    second = start(*COMMAND, *arguments)
    assert finish(first)[0] == 0
    code, _, stderr = finish(second)
    assert code == 0 or (code == 4 and "Another run of batch b1 is going on." in stderr)
    world.check(settings, (small_dataset(40), "b1", None))


def test_an_error_of_the_system_in_a_task_comes_with_its_remedy() -> None:
    failure = Failure.of("UploadShard", OSError(errno.EMFILE, "Too many open files"))
    assert "ulimit -n" in failure.hint
    assert failure.as_error() is None
    assert Failure.of("UploadShard", ValueError("other")).hint == ""

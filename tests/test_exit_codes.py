"""Exit codes and signals: each code that the README and the Luigi guide list, and what stops a command in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from pipeline.storage import Storage
from tests import world
from tests.proxies import LOST, DatabaseProxy, Harm, Message
from tests.services import (
    REPOSITORY,
    MakeDataset,
    RunLuigi,
    RunPipeline,
    Start,
    after_target,
    asked_of_luigid,
    end_group,
    running_luigid,
    subprocess_environment,
)

OURS = (sys.executable, "-m", "pipeline")
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline")
#: Many small shards, so that there is time to stop in the middle.
SLOW = {"PIPELINE_BATCH_SIZE": "2", "PIPELINE_THREAD_COUNT": "1"}
#: Luigi's codes that do not occur here, as the guide states.
NEVER = {10, 20}
_CODE = re.compile(r"\| (\d+) \|")


#: Exit code, stdout and stderr.
Ended = tuple[int, str, str]


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Ended:
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def documented(document: str) -> set[int]:
    """Return the codes of the table below the heading "Exit codes" of a document."""
    rest = (REPOSITORY / document).read_text(encoding="utf-8").split("\n## Exit codes", 1)[1]
    table = re.search(r"\n\n(\|.*?)\n\n", rest, re.DOTALL)
    assert table
    return {int(code) for code in _CODE.findall(table[1])}


def markers(settings: Settings) -> int:
    return int(world.query(settings.database_url.reveal(), "SELECT count(*) FROM ingest.batch_state")[0][0])


def spoil(settings: Settings) -> None:
    """Make every COPY of a menu fail."""
    world.query(settings.database_url.reveal(), "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")


def lose_an_object(settings: Settings) -> None:
    """Remove an object that a row names."""
    with closing(Storage(settings)) as storage:
        storage.remove(list(world.objects(settings))[:1])


# Every code of `python -m pipeline`


def nothing_to_do(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    assert run("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    return run("load", "--source", dataset, "--batch-id", "b1")


def wrong_usage(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    return run("load", "--source", dataset / "nowhere", "--batch-id", "b1")


def unfinished(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    spoil(settings)
    return run("load", "--source", dataset, "--batch-id", "b1")


def refused(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    assert run("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    return run("reset", "--batch-id", "b1")


def differences(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    assert run("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    lose_an_object(settings)
    return run("verify")


def held(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    """Load a recognition without photos."""
    source = settings.home / "broken"
    (source / "recognition_1").mkdir(parents=True)
    return run("load", "--source", source, "--batch-id", "b1")


def interrupted(run: RunPipeline, dataset: Path, settings: Settings) -> subprocess.CompletedProcess[str]:
    """Stop itself as soon as it looks at the batch."""
    stop = "lambda *_, **__: signal.raise_signal(signal.SIGTERM)"
    program = (
        f"import signal; from pipeline import cli; cli.batches.resolve_batch = {stop}; raise SystemExit(cli.main())"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "load", "--source", str(dataset), "--dry-run"],
        env=subprocess_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


Ours = Callable[[RunPipeline, Path, Settings], "subprocess.CompletedProcess[str]"]
CODES_OF_OURS: dict[int, tuple[Ours, str]] = {
    0: (nothing_to_do, ""),
    2: (wrong_usage, "Error: "),
    3: (unfinished, "Error: Batch b1 is unfinished: 1 task failed."),
    4: (refused, "Error: Batch b1 was not reset"),
    5: (differences, ""),
    6: (held, "Error: Batch b1 is held"),
    130: (interrupted, "Interrupted. "),
}


@pytest.mark.parametrize("code", CODES_OF_OURS)
def test_each_code_of_ours(
    code: int, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    make, told = CODES_OF_OURS[code]
    done = make(run_pipeline, small_dataset(3), settings)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    if code not in (0, 5):
        assert done.stderr.strip()


def test_the_documents_have_the_codes_that_are_tested() -> None:
    assert documented("README.md") == set(CODES_OF_OURS)
    assert documented("docs/guides/luigi.md") == set(CODES_OF_BARE) | NEVER


# Every code of `luigi --module pipeline`


class Bare(NamedTuple):
    """Run the bare command: forked, but where a signal is sent to it."""

    run: RunLuigi
    start: Start
    dataset: Path
    settings: Settings

    def __call__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Ended:
        ended = self.run("luigi", "--module", "pipeline", *arguments, env=env)
        return ended.code, ended.stdout, ended.stderr


def bare_nothing_to_do(bare: Bare) -> Ended:
    arguments = ("LoadBatch", "--batch-id", "b1", "--source", bare.dataset, "--local-scheduler")
    assert bare(*arguments)[0] == 0
    return bare(*arguments)


def bare_wrong_usage(bare: Bare) -> Ended:
    return bare("LoadBatch", "--no-such-option", "--local-scheduler")


def bare_not_run(bare: Bare) -> Ended:
    """Let somebody press the visualiser's switch."""
    with running_luigid(bare.dataset.parent) as url:
        asked_of_luigid(url, "pause")
        return bare("LoadBatch", "--batch-id", "b1", "--source", bare.dataset, "--scheduler-url", url)


def bare_task_failed(bare: Bare) -> Ended:
    spoil(bare.settings)
    return bare("LoadBatch", "--batch-id", "b1", "--source", bare.dataset, "--local-scheduler")


def bare_scheduling_error(bare: Bare) -> Ended:
    """Let every question for a marker fail once the run has its lock; the lock itself stays."""

    def plan(message: Message) -> Harm | None:
        return LOST if "AS done" in message.text else None

    with DatabaseProxy(bare.settings.database_url.reveal(), plan) as proxy:
        environment = {"DATABASE_URL": proxy.url, "PIPELINE_RETRY_MAX_ATTEMPTS": "0"}
        arguments = ("LoadBatch", "--batch-id", "b1", "--source", bare.dataset, "--local-scheduler")
        return bare(*arguments, env=environment)


def bare_nothing_was_begun(bare: Bare) -> Ended:
    return bare("LoadBatch", "--batch-id", "b1", "--source", bare.dataset / "nowhere", "--local-scheduler")


def bare_interrupted(bare: Bare) -> Ended:
    with closing(psycopg2.connect(bare.settings.database_url.reveal())) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.images IN EXCLUSIVE MODE")  # the transform waits for it
        running = bare.start(*BARE, "LoadBatch", "--batch-id", "b1", "--source", bare.dataset, "--local-scheduler")
        assert wait_until(lambda: waits_for_a_lock(bare.settings) or running.poll() is not None, 60)
        running.terminate()
        return finish(running)


CODES_OF_BARE: dict[int, tuple[Callable[[Bare], Ended], str]] = {
    0: (bare_nothing_to_do, ""),
    2: (bare_wrong_usage, "unrecognized arguments"),
    25: (bare_not_run, ""),
    30: (bare_task_failed, "Failed: CopyShard(batch_id=b1"),
    35: (bare_scheduling_error, "Failed: LoadBatch("),
    40: (bare_nothing_was_begun, "Error: "),
    130: (bare_interrupted, "Interrupted. To go on: luigi --module pipeline LoadBatch --batch-id b1"),
}


@pytest.mark.parametrize("code", CODES_OF_BARE)
def test_each_code_of_the_bare_command(
    code: int, run_luigi: RunLuigi, start: Start, own_dataset: MakeDataset, settings: Settings
) -> None:
    make, told = CODES_OF_BARE[code]
    found, _, stderr = make(Bare(run_luigi, start, own_dataset(3), settings))
    assert found == code, stderr
    assert told in stderr
    assert "Traceback" not in stderr


# What stops a command


def waits_for_a_lock(settings: Settings) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(world.query(settings.database_url.reveal(), waiting) == [(1,)])


class Terminal:
    """A terminal of its own for a command, which a person may close."""

    def __init__(self, folder: Path, *command: str | Path, env: dict[str, str]) -> None:
        here, there = os.openpty()
        self._here = here
        # The leader of a session has the first terminal that it opens.
        at_it = ("sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(there))
        self.process = subprocess.Popen(
            [*at_it, *map(str, command)],
            cwd=folder,
            env=subprocess_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )
        self._kept = there  # until the command has opened it, or it would be gone

    def shown(self) -> str:
        """Return what is on the screen by now, at most a page of it."""
        return os.read(self._here, 1 << 16).decode(errors="replace")

    def close(self) -> None:
        """Close the window."""
        for end in (self._kept, self._here):
            os.close(end)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        end_group(self.process)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "4"])
@pytest.mark.parametrize("form", [(*OURS, "load"), (*BARE, "LoadBatch")], ids=["load", "bare"])
def test_a_terminal_that_closes_stops_a_load_in_good_order(
    form: tuple[str, ...],
    workers: str,
    workdir: Path,
    start: Start,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    arguments = ("--source", small_dataset(40), "--workers", workers, "--local-scheduler", "--batch-id", "b1")
    with Terminal(workdir, *form, *arguments, env=SLOW) as terminal:
        running = terminal.process
        assert wait_until(lambda: markers(settings) >= 5 or running.poll() is not None, 60)
        assert running.poll() is None, terminal.shown()
        terminal.close()
        assert running.wait(60) == 130
    assert world.domain(settings.database_url.reveal()).images == []
    left = markers(settings)
    assert 5 <= left < 43
    assert wait_until(lambda: not runs(settings), 30)  # nor does a worker go on by itself
    assert markers(settings) == left
    assert finish(start(*form, *arguments))[0] == 0
    world.check(settings, (small_dataset(40), "b1", None))


def runs(settings: Settings) -> bool:
    """Return whether anybody is connected but the one who asks."""
    others = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return bool(world.query(settings.database_url.reveal(), others)[0][0])


@pytest.mark.slow
def test_what_nohup_started_outlives_its_terminal(
    workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    load = ("nohup", *OURS, "load", "--source", small_dataset(40), "--batch-id", "b1", "--local-scheduler")
    with Terminal(workdir, *load, "--workers", "2", env=SLOW) as terminal:
        running = terminal.process
        assert wait_until(lambda: markers(settings) >= 2 or running.poll() is not None, 60)
        assert running.poll() is None, terminal.shown()
        terminal.close()
        assert running.wait(120) == 0
    assert "Batch b1 is done" in (workdir / "nohup.out").read_text(encoding="utf-8")
    world.check(settings, (small_dataset(40), "b1", None))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize(
    ("table", "command", "going_on"),
    [
        (
            "public.initial_annotations IN SHARE MODE",
            ("load-qwen", "--batch-id", "q1", "--local-scheduler"),
            "load-qwen --batch-id q1",
        ),
        ("raw.receipts IN SHARE MODE", ("reset", "--batch-id", "b1", "--confirm"), "reset --batch-id b1 --confirm"),
        ("ingest.manifest IN ACCESS EXCLUSIVE MODE", ("verify",), ""),
    ],
    ids=["load-qwen", "reset", "verify"],
)
def test_a_signal_stops_the_other_commands_in_good_order(
    table: str,
    command: tuple[str, ...],
    going_on: str,
    how: str,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    dataset = small_dataset(3)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    if command[0] == "load-qwen":
        command = (*command, "--file", str(dataset / "qwen_annotations.json"))
    before = world.domain(settings.database_url.reveal())
    with closing(psycopg2.connect(settings.database_url.reveal())) as connection, connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {table}")
        running = start(*OURS, *command)
        assert wait_until(lambda: waits_for_a_lock(settings) or running.poll() is not None, 60)
        running.send_signal(getattr(signal, how))
        code, stdout, stderr = finish(running, 30)
        connection.rollback()
    assert code == 130, stderr
    stderr = after_target(stderr)
    assert stderr.startswith("Interrupted. ")
    assert stderr.count("\n") == 1
    assert going_on in stderr
    assert not re.search("is reset|Performance Metrics|Verified", stdout)
    assert world.domain(settings.database_url.reveal()) == before
    assert run_pipeline(*command).returncode == 0


def test_a_stop_is_heeded_before_the_first_task(start: Start, settings: Settings, small_dataset: MakeDataset) -> None:
    """A load that only looks which batch is meant has nothing to go on with but itself."""
    with closing(psycopg2.connect(settings.database_url.reveal())) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE ingest.batches IN ACCESS EXCLUSIVE MODE")
        running = start(*OURS, "load", "--source", small_dataset(3))
        assert wait_until(lambda: waits_for_a_lock(settings) or running.poll() is not None, 60)
        running.terminate()
        code, stdout, stderr = finish(running, 30)
    assert (code, stdout, after_target(stderr)) == (130, "", "Interrupted. Run the same command again.\n")


# Nobody reads what is said


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("command", "spoiled", "code"),
    [
        (("load", "--json"), False, 0),
        (("load", "--json"), True, 3),
        (("verify",), False, 0),
        (("verify",), True, 5),
        (("status", "--batch-id", "b1"), False, 0),
    ],
)
def test_a_reader_that_has_gone_does_not_change_what_came_of_it(
    command: tuple[str, ...],
    spoiled: bool,
    code: int,
    buffered: bool,
    workdir: Path,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    source = ("--source", str(small_dataset(3)), "--batch-id", "b1")
    if command[0] == "load":
        command = (*command, *source)
        if spoiled:
            spoil(settings)
    else:
        assert run_pipeline("load", *source).returncode == 0
        if spoiled:
            lose_an_object(settings)
    hears, tells = os.pipe()
    os.close(hears)
    with open(tells, "wb") as nobody:
        done = subprocess.run(
            [*OURS, *command],
            cwd=workdir,
            env=subprocess_environment({"PYTHONUNBUFFERED": "" if buffered else "1"}),
            stdin=subprocess.DEVNULL,
            stdout=nobody,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    # What writes line by line ends where nobody reads on, and does not pretend to have seen it through.
    assert done.returncode == (3 if command == ("verify",) and not buffered else code), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


IN_A_STRING = """
import os, signal, sys
from pipeline.graph.process import Interrupts
with Interrupts(lambda: None, lambda: "Again.") as interrupts:
    try:
        interrupts.begin()
        eval("os.kill(os.getpid(), signal.SIGINT) or sum(range(10 ** 8))")
    except KeyboardInterrupt:
        interrupts.announce()
sys.exit(130)
"""


def test_a_string_that_python_compiles_and_runs(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(IN_A_STRING, encoding="utf-8")
    environment = subprocess_environment({"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted. Again.\n")

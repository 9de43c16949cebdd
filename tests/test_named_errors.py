"""Errors name where they came from: Luigi's configuration, limits and disks of this machine, the database's server."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import AccessDenied, DatabaseError, DatabaseUnavailable
from pipeline.observe.metrics import Metrics
from pipeline.steps.transform import transform_batch
from pipeline.storage import Storage
from tests import world
from tests.database_support import door
from tests.services import MakeDataset, RunPipeline, Start, after_target, execute, subprocess_environment
from tests.sweeps import sweep

BIN = Path(sys.executable).parent
LOAD = ("--batch-id", "b1")


# luigi.cfg

_BROKEN = {
    "no section": b"thread_count = 3\n",
    "a byte order mark": b"\xef\xbb\xbf[pipeline]\nthread_count = 3\n",
    "UTF-16": "[pipeline]\nthread_count = 3\n".encode("utf-16"),
    "a section twice": b"[pipeline]\nthread_count = 3\n[pipeline]\nbatch_size = 3\n",
    "an option twice": b"[pipeline]\nthread_count = 3\nthread_count = 4\n",
    "no option": b"[pipeline]\nthread_count\n",
}
_WRONG = {
    "a level": (b"[core]\nlog_level = LOUD\n", "log_level in [core]"),
    "a number": (b"[worker]\nwait_interval = soon\n", "wait_interval in [worker]"),
    "a name": (b"[pipeline]\nthread_cout = 3\n", "thread_cout"),
    "a bound": (b"[pipeline]\nthread_count = 9999\n", "thread_count is 9999"),
    "a retry": (b"[core]\nrpc_retry_wait = soon\n", "rpc_retry_wait in [core]"),
    "a fraction of retries": (b"[core]\nrpc_retry_attempts = 2.5\n", "rpc_retry_attempts in [core]"),
    "a negative wait": (b"[core]\nrpc_retry_wait = -1\n", "rpc_retry_wait in [core]"),
    "a timeout": (b"[core]\nrpc_connect_timeout = x\n", "rpc_connect_timeout in [core]"),
    "a fraction": (b"[pipeline]\nthread_count = 4.0\n", "thread_count is '4.0', not a whole number"),
    "a reference": (b"[core]\nscheduler_url = %(nowhere)s\n", "scheduler_url in [core]"),
}


def one_sentence(stderr: str) -> str:
    """Return the error, which is one line and a hint."""
    error, hint = stderr.splitlines()
    assert error.startswith("Error: ")
    assert hint.startswith("Hint: ")
    return error


_MODULE, _SCRIPT = (sys.executable, "-m", "pipeline"), (str(BIN / "pipeline"),)


@pytest.mark.parametrize(
    ("program", "kind"), sweep([*((_MODULE, kind) for kind in _BROKEN), (_SCRIPT, next(iter(_BROKEN)))], 3)
)
def test_a_luigi_cfg_that_cannot_be_read_is_one_sentence(program: tuple[str, ...], kind: str, workdir: Path) -> None:
    (workdir / "luigi.cfg").write_bytes(_BROKEN[kind])
    arguments = [*program, "status"]
    done = subprocess.run(
        arguments,
        cwd=workdir,
        env=subprocess_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Luigi's configuration (luigi.cfg, luigi.toml or LUIGI_CONFIG_PATH) cannot be" in one_sentence(done.stderr)


@pytest.mark.parametrize("kind", _WRONG)
def test_a_wrong_value_in_luigi_cfg_is_named(kind: str, run_pipeline: RunPipeline, workdir: Path) -> None:
    content, named = _WRONG[kind]
    (workdir / "luigi.cfg").write_bytes(content)
    done = run_pipeline("status")
    assert (done.returncode, done.stdout) == (2, "")
    assert named in one_sentence(done.stderr)


_TOML = {
    "no section": ("thread_count = 3\n", "cannot be read"),
    "no value": ("[pipeline]\nthread_count =\n", "cannot be read"),
    "a section twice": ("[pipeline]\n[pipeline]\n", "cannot be read"),
    "a list of sections": ("[[pipeline]]\nthread_count = 3\n", "cannot be read"),
    "no date": ("a = 2020-13-45\n", "cannot be read"),
    "a name": ("[pipeline]\nthread_cout = 3\n", "thread_cout"),
    "a bound": ("[pipeline]\nthread_count = 0\n", "thread_count is 0"),
    "a fraction": ("[pipeline]\nthread_count = 4.5\n", "thread_count is '4.5', not a whole number"),
    "a table": ("[pipeline]\nthread_count = {a = 1}\n", "thread_count"),
    "a list": ("[worker]\nwait_interval = [3]\n", "wait_interval in [worker]"),
    "a retry": ('[core]\nrpc_retry_wait = "soon"\n', "rpc_retry_wait in [core]"),
    "a level": ("[core]\nlog_level = 5\n", "log_level in [core]"),
}


@pytest.mark.parametrize("kind", _TOML)
def test_a_fault_in_a_luigi_toml_is_one_sentence(kind: str, run_pipeline: RunPipeline, workdir: Path) -> None:
    content, named = _TOML[kind]
    (workdir / "luigi.toml").write_text(content, encoding="utf-8")
    done = run_pipeline("status")
    assert done.returncode == 2
    assert named in one_sentence(done.stderr)


def test_a_luigi_toml_that_luigi_reads_at_its_import_is_one_sentence(start: Start, workdir: Path) -> None:
    (workdir / "luigi.toml").write_text("[pipeline]\nthread_count =\n", encoding="utf-8")
    process = start(sys.executable, "-m", "pipeline", "status", env={"LUIGI_CONFIG_PARSER": "toml"})
    _, told = process.communicate(timeout=60)
    assert (process.returncode, "cannot be read" in one_sentence(told)) == (2, True)


def test_values_of_the_section_default_are_no_names_of_the_pipeline(run_pipeline: RunPipeline, workdir: Path) -> None:
    (workdir / "luigi.cfg").write_text("[DEFAULT]\nplace = here\n[pipeline]\nthread_count = 3\n", encoding="utf-8")
    assert run_pipeline("status").returncode == 0


# This machine


def limited(workdir: Path, blocks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may write files of so many kilobytes."""
    command = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(
        command,
        cwd=workdir,
        env=subprocess_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_limit_of_file_sizes_is_not_a_fault_of_the_output(blocks: int, workdir: Path) -> None:
    done = limited(workdir, blocks, "status")
    assert (done.returncode, done.stdout) == (3, "")
    assert "The output" not in one_sentence(done.stderr)
    assert "ulimit -f" in done.stderr


@pytest.mark.parametrize("unbuffered", [pytest.param("", marks=pytest.mark.slow), "1"])
@pytest.mark.parametrize(
    "command",
    sweep(
        zip(
            [
                ("status",),
                ("status", "--json"),
                ("verify",),
                ("verify", "--json"),
                ("load", "--source", "{dataset}", "--batch-id", "b2", "--force"),
                ("reset", "--batch-id", "b1", "--dry-run"),
            ]
        )
    ),
)
def test_a_full_disk_under_stdout_is_a_fault_of_the_output(
    command: tuple[str, ...],
    unbuffered: str,
    workdir: Path,
    small_dataset: MakeDataset,
    settings: Settings,
    run_pipeline: RunPipeline,
) -> None:
    dataset = small_dataset(2)
    assert run_pipeline("load", "--source", dataset, *LOAD).returncode == 0
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *(one.format(dataset=dataset) for one in command)],
            cwd=workdir,
            env=subprocess_environment({"PYTHONUNBUFFERED": unbuffered}),
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    error, hint = after_target(done.stderr).splitlines()[-2:]
    assert done.returncode == 3
    assert error == "Error: The output cannot be written: No space left on device."
    assert hint.startswith("Hint: Free space there")


@pytest.mark.slow
def test_a_limit_of_open_files_does_not_make_the_dataset_vanish(
    workdir: Path, small_dataset: MakeDataset, settings: Settings, run_pipeline: RunPipeline
) -> None:
    dataset = small_dataset(40)
    for limit in (20, 28):
        command = f'ulimit -n {limit}; exec "$@"'
        done = subprocess.run(
            ["bash", "-c", command, "bash", sys.executable, "-m", "pipeline", "load", "--source", str(dataset), *LOAD],
            cwd=workdir,
            env=subprocess_environment(),
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert "is gone" not in done.stderr
        if limit > 20 and done.returncode == 0:
            continue  # it depends on the threads how many files are open at once
        assert done.returncode == 3
        assert "Too many open files" in done.stderr, done.stderr
    assert execute(settings.database_url.reveal(), "SELECT count(*) FROM ingest.rejects") == [(0,)]
    assert run_pipeline("load", "--source", dataset, *LOAD).returncode == 0
    world.check(settings, (dataset, "b1", None))


def test_a_full_disk_under_stderr_does_not_stop_a_load(
    workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "load", "--source", str(small_dataset(3)), *LOAD, "--verbose"],
            cwd=workdir,
            env=subprocess_environment(),
            stdout=subprocess.PIPE,
            stderr=full,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    assert done.returncode == 0
    assert done.stdout.startswith("Batch b1 is done: 3 recognitions, 6 photos")
    world.check(settings, (small_dataset(3), "b1", None))


# The database's server


@pytest.mark.parametrize(
    ("body", "code"),
    sweep(
        [
            ("INSERT INTO app_nowhere VALUES (1)", "42P01"),
            ("PERFORM app_nothing()", "42883"),
            ("OLD.nothing := 1", "42703"),
            ("RAISE EXCEPTION 'this tray is being annotated'", "P0001"),
        ]
    ),
)
def test_a_trigger_of_the_app_that_fails_in_a_reset_is_named(
    body: str, code: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    assert run_pipeline("load", "--source", small_dataset(2), *LOAD).returncode == 0
    url = settings.database_url.reveal()
    execute(
        url,
        f"CREATE FUNCTION public.app_goodbye() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN OLD; END $$",
    )
    execute(url, "CREATE TRIGGER app_goodbye BEFORE DELETE ON images FOR EACH ROW EXECUTE FUNCTION app_goodbye()")
    failed = run_pipeline("reset", *LOAD, "--confirm")
    assert failed.returncode == 3
    assert code in failed.stderr
    assert "app_goodbye" in failed.stderr
    assert "migrate" not in failed.stderr
    execute(url, "DROP TRIGGER app_goodbye ON images")
    assert run_pipeline("reset", *LOAD, "--confirm").returncode == 0


@pytest.mark.parametrize("name", ["public.goodbye", '"My App"."on del"', '"on(del)"', '"Ω".gone'])
def test_a_function_of_the_app_is_named_whatever_its_name_is_made_of(name: str, database: Database) -> None:
    schema = name.partition(".")[0] if "." in name else "public"
    statement = (
        f"CREATE SCHEMA IF NOT EXISTS {schema}; CREATE FUNCTION {name}() RETURNS void LANGUAGE plpgsql AS "
        f'$$ BEGIN INSERT INTO "no(where)" VALUES (\'a "b" c(d)\'); END $$; SELECT {name}()'
    )
    with pytest.raises(DatabaseError) as caught, database.transaction() as connection:
        connection.run_script(statement)
    assert f"The function {name.removeprefix('public.')} of the database" in caught.value.hint


def test_a_table_of_ours_that_is_gone_is_still_a_matter_of_migrations(database: Database, settings: Settings) -> None:
    execute(settings.database_url.reveal(), "ALTER TABLE raw.menus RENAME TO elsewhere")
    with pytest.raises(Exception, match=r"raw\.menus") as caught, database.transaction() as connection:
        connection.execute("count_raw", batch_id="b1")
    assert "migrate" in str(vars(caught.value)["hint"])


@contextmanager
def failing_server(fields: bytes) -> Iterator[str]:
    """Let every connection in, and answer every query with an error of these fields; yield the address."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + (len(body) + 4).to_bytes(4, "big") + body

    ready = message(b"Z", b"I")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, suppress(ConnectionError):
                peer.recv(4096)
                told = (b"client_encoding\0UTF8\0", b"DateStyle\0ISO, MDY\0", b"standard_conforming_strings\0on\0")
                peer.sendall(message(b"R", bytes(4)) + b"".join(message(b"S", one) for one in told) + ready)
                while peer.recv(4096):
                    peer.sendall(message(b"E", fields + b"\0") + ready)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"postgresql://postgres@127.0.0.1:{listener.getsockname()[1]}/postgres?sslmode=disable"
        finally:
            thread.join(10)


@pytest.mark.parametrize(
    ("file", "hint"), [(b"dsm_impl.c", "Enlarge /dev/shm"), (b"md.c", "The disk of the database is full")]
)
def test_full_shared_memory_of_the_server_is_not_a_full_disk(file: bytes, hint: str) -> None:
    fields = (
        b"SERROR\0VERROR\0C53100\0Mcould not resize shared memory segment: No space left on device\0F" + file + b"\0"
    )
    with (
        failing_server(fields) as url,
        closing(door(url, retry_max_attempts=0)) as database,
        pytest.raises(DatabaseUnavailable) as caught,
        database.transaction() as connection,
    ):
        connection.run_script("SELECT 1")
    assert hint in caught.value.hint


def test_a_pooler_may_refuse_the_login_at_the_first_statement() -> None:
    fields = b"SERROR\0VERROR\0CXX000\0MTenant or user not found\0"
    with (
        failing_server(fields) as url,
        closing(door(url, retry_max_attempts=0)) as database,
        pytest.raises(AccessDenied) as caught,
        database.transaction() as connection,
    ):
        connection.run_script("SELECT 1")
    assert "postgres.<project>" in caught.value.hint


# Counted once


def test_a_commit_that_is_retried_is_counted_once(
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = settings.database_url.reveal()
    execute(
        url,
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not yet'; END $$",
    )
    execute(url, "CREATE TRIGGER stop BEFORE INSERT ON recognitions EXECUTE FUNCTION stop()")
    assert run_pipeline("load", "--source", small_dataset(2), *LOAD).returncode == 3
    execute(url, "DROP TRIGGER stop ON recognitions")
    commit, attempts = Connection.commit, []

    def fail_twice(connection: Connection) -> None:
        attempts.append(connection)
        if 2 <= len(attempts) <= 3:  # the first transaction removes what was rejected
            raise DatabaseUnavailable("on purpose")
        commit(connection)

    monkeypatch.setattr(Connection, "commit", fail_twice)
    with closing(Storage(settings)) as storage:
        transform_batch(database, storage, "b1", Metrics())
    assert len(attempts) == 4
    [(ops,)] = execute(
        url, "SELECT metrics #>> '{operations,transform,ops}' FROM ingest.batch_state WHERE step = 'transform'"
    )
    assert ops == "1"


def test_the_command_says_nothing_after_the_target_where_all_is_well(
    run_pipeline: RunPipeline, small_dataset: MakeDataset
) -> None:
    done = run_pipeline("load", "--source", small_dataset(2), *LOAD)
    assert (done.returncode, after_target(done.stderr)) == (0, "")

"""SIGTERM and Ctrl-C end every command within ten seconds, whatever it waits for: a test for each kind of waiting.

docs/reference/limits.md lists the kinds. What was done before the signal is resumed by the next run.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import psycopg2
import pytest
from PIL import Image

from embedded_supabase.files import locked, make_home, wait_until
from embedded_supabase.ports import free_port
from pipeline.config import Settings
from tests import processes, world
from tests.listeners import listening
from tests.proxies import LOST, SILENT, SLOW_DOWN, STALLED, DatabaseProxy, Fault, StorageProxy, first
from tests.services import (
    REPOSITORY,
    MakeDataset,
    RunPipeline,
    Start,
    after_target,
    close_pipes,
    running_luigid,
    subprocess_environment,
)
from tests.test_worker import holding

#: They wait more than they compute.
pytestmark = pytest.mark.slow

OURS = (sys.executable, "-m", "pipeline")
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline")
LOAD = (*OURS, "load", "--batch-id", "b1")
LUIGI = (*BARE, "LoadBatch", "--batch-id", "b1")
LOCAL = ("--local-scheduler",)
SMALL = {"PIPELINE_BATCH_SIZE": "2", "PIPELINE_THREAD_COUNT": "2"}
#: The contract's; a command takes seven seconds at most.
SECONDS = 10.0

signals = pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"]
)


def waits(running: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait until a command waits for what never comes."""
    wait_until(lambda: bool(condition()) or running.poll() is not None, 60)
    assert running.poll() is None, running.communicate()


def read_until(running: subprocess.Popen[str], text: str) -> None:
    """Read the lines of stderr up to one with a text."""
    assert running.stderr is not None
    while text not in (line := running.stderr.readline()):
        assert line


def ended(running: subprocess.Popen[str], how: signal.Signals = signal.SIGTERM) -> str:
    """Send a signal; return what the command says on stderr when it ends in time."""
    began = time.monotonic()
    running.send_signal(how)
    _, stderr = running.communicate(timeout=3 * SECONDS)
    seconds = time.monotonic() - began
    assert (running.returncode, "Traceback" in stderr) == (130, False), stderr
    assert len(re.findall("^Interrupted[.] ", stderr, re.MULTILINE)) == 1, stderr
    assert seconds < SECONDS
    return stderr


@contextmanager
def table_locked(settings: Settings, table: str, mode: str = "ACCESS EXCLUSIVE") -> Iterator[Callable[[], bool]]:
    """Lock a table; yield whether a session waits for a lock."""
    dsn = settings.database_url.reveal()
    waiting = (
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {table} IN {mode} MODE")
        yield lambda: bool(world.query(dsn, waiting)[0][0])


@contextmanager
def storage_with(
    settings: Settings, fault: Fault, method: str, part: str
) -> Iterator[tuple[StorageProxy, Callable[[], bool]]]:
    """Put a proxy before Storage that treats some requests badly; yield it, and whether there was one."""
    plan = first(sys.maxsize, fault, lambda asked: asked.method == method and part in asked.path)
    with StorageProxy(settings.url, plan) as proxy:
        yield proxy, lambda: fault in proxy.met()


def resumes(run: RunPipeline, settings: Settings, dataset: Path, *arguments: str) -> None:
    """Load to the end, and compare."""
    again = run("load", "--batch-id", "b1", "--source", dataset, *LOCAL, *arguments)
    assert again.returncode == 0, again.stderr
    world.check(settings, (dataset, "b1", None))


# The start of the program

SCRIPT = (str(Path(sys.executable).with_name("pipeline")),)
#: Python calls a handler between two calls: a signal right before a long one is handled after it.
SLOW_IMPORT = """
import sys, time
print("imported", file=sys.stderr, flush=True)
for _ in range(6000):
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize("form", [OURS, SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize("module", ["luigi", "requests", "sqlalchemy"])
def test_a_signal_during_an_import(
    module: str, form: tuple[str, ...], how: signal.Signals, tmp_path: Path, start: Start
) -> None:
    stub = tmp_path / f"{module}.py"
    stub.write_text(SLOW_IMPORT, "utf-8")
    path = f"{tmp_path}:{subprocess_environment()['PYTHONPATH']}"
    running = start(*form, "status", env={"PYTHONPATH": path})
    read_until(running, "imported")
    assert ended(running, how) == "Interrupted. Run the same command again.\n"


@pytest.mark.parametrize("form", [(*OURS, "status"), LUIGI], ids=["status", "luigi"])
def test_a_signal_while_the_handlers_are_set(form: tuple[str, ...], tmp_path: Path, start: Start) -> None:
    stub = "import signal\nfrom pipeline.graph import process\n"
    stub += "def enter(self, _enter=process.Interrupts.__enter__):\n    _enter(self)\n    signal.raise_signal(15)\n"
    stub += "    return self\nprocess.Interrupts.__enter__ = enter\n"
    (tmp_path / "sent.py").write_text(stub, encoding="utf-8")
    program = "import runpy, sys, sent; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    command = ["luigi", *form[form.index("--module") :]] if form is LUIGI else ["pipeline", *form[3:]]
    running = start(sys.executable, "-c", program, *command, env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    _, stderr = running.communicate(timeout=3 * SECONDS)
    assert (running.returncode, after_target(stderr)) == (130, "Interrupted. Run the same command again.\n")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_signal_in_code_of_luigi(where: str, workdir: Path, tmp_path: Path, start: Start) -> None:
    """It comes before or after Luigi has its worker schedule the load."""
    stub = "import signal\nfrom pipeline.graph.worker import RunWorker\n"
    stub += "def add(self, *args, _add=RunWorker.add):\n    before and signal.raise_signal(15)\n"
    stub += "    added = _add(self, *args)\n    before or signal.raise_signal(15)\n    return added\n"
    stub += f"before, RunWorker.add = {where == 'before'}, add\n"
    (tmp_path / "sent.py").write_text(stub, encoding="utf-8")
    program = "import runpy, sys, sent; sys.argv = sys.argv[1:]; runpy.run_module('luigi', run_name='__main__')"
    command = ["luigi", *LUIGI[LUIGI.index("--module") :], "--source", str(tmp_path), *LOCAL]
    running = start(sys.executable, "-c", program, *command, env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    _, stderr = running.communicate(timeout=3 * SECONDS)
    assert (running.returncode, after_target(stderr)) == (130, "Interrupted. Run the same command again.\n")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the handlers of a process")
@pytest.mark.parametrize("form", [OURS, SCRIPT], ids=["module", "script"])
def test_a_signal_at_any_moment_of_the_start(form: tuple[str, ...], start: Start) -> None:
    def handles(running: subprocess.Popen[str]) -> bool:
        status = Path(f"/proc/{running.pid}/status").read_text(encoding="utf-8")
        [caught] = re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    for tenths in range(10):
        running = start(*form, "load", "--source", "/nowhere")
        assert wait_until(partial(handles, running), 60)
        time.sleep(tenths / 10)
        running.send_signal(signal.SIGTERM)
        _, stderr = running.communicate(timeout=3 * SECONDS)
        if tenths and "Error: " in stderr:
            break  # the command, which fails, was quicker than the signal
        assert (running.returncode, after_target(stderr)) == (130, "Interrupted. Run the same command again.\n")


# Storage


@pytest.mark.parametrize(
    ("form", "fault", "how"),
    [
        (LOAD, SILENT, signal.SIGTERM),
        pytest.param(LOAD, STALLED, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(LUIGI, SILENT, signal.SIGINT, marks=pytest.mark.slow),
        (LUIGI, STALLED, signal.SIGTERM),
    ],
    ids=["load, headers", "load, body", "luigi, headers", "luigi, body"],
)
def test_an_upload_without_a_whole_response(
    form: tuple[str, ...],
    fault: Fault,
    how: signal.Signals,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    with storage_with(settings, fault, "POST", ".jpg") as (proxy, met):
        env = {**SMALL, "NEXT_PUBLIC_SUPABASE_URL": proxy.url}
        running = start(*form, "--source", small_dataset(6), *LOCAL, env=env)
        waits(running, met)
        typed = "python -m pipeline load" if form is LOAD else "luigi --module pipeline LoadBatch"
        assert f"To go on: {typed} --batch-id b1" in ended(running, how)
    resumes(run_pipeline, settings, small_dataset(6))


@pytest.mark.parametrize("form", [LOAD, LUIGI], ids=["load", "luigi"])
@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_second_signal(
    workers: str, form: tuple[str, ...], start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    with storage_with(settings, SILENT, "POST", ".jpg") as (proxy, met):
        env = {**SMALL, "NEXT_PUBLIC_SUPABASE_URL": proxy.url}
        running = start(*form, "--source", small_dataset(6), *LOCAL, "--workers", workers, env=env)
        waits(running, met)
        running.send_signal(signal.SIGINT)
        if workers == "2":  # the message is the last thing but the end of the interpreter
            read_until(running, "Interrupted. ")
            running.send_signal(signal.SIGINT)
            _, stderr = running.communicate(timeout=SECONDS)
            assert (running.returncode, stderr) == (130, "")
        else:
            time.sleep(0.5)  # it waits for its threads by then
            ended(running, signal.SIGINT)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_wait_before_a_retry(
    workers: str, start: Start, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    with storage_with(settings, SLOW_DOWN, "POST", ".jpg") as (proxy, _):
        env = {**SMALL, "NEXT_PUBLIC_SUPABASE_URL": proxy.url, "PIPELINE_RETRY_BACKOFF_FACTOR": "10"}
        running = start(*LOAD, "--source", small_dataset(6), *LOCAL, "--workers", workers, env=env)
        waits(running, lambda: sum(proxy.met().values()) > 4)
        ended(running)
    resumes(run_pipeline, settings, small_dataset(6))


@pytest.mark.parametrize(
    ("command", "method", "part"),
    [
        (("verify",), "POST", "/list"),
        pytest.param(("verify", "--deep"), "GET", ".jpg", marks=pytest.mark.slow),
        (("reset", "--batch-id", "b1", "--confirm"), "DELETE", "/object"),
        pytest.param(("report", "--batch-id", "b1"), "GET", ".jpg", marks=pytest.mark.slow),
        (("status",), "GET", "/bucket"),
    ],
    ids=["verify", "verify deep", "reset", "report", "status"],
)
def test_other_commands_without_a_response_of_storage(
    command: tuple[str, ...],
    method: str,
    part: str,
    start: Start,
    run_pipeline: RunPipeline,
    own_dataset: MakeDataset,
    settings: Settings,
) -> None:
    dataset = own_dataset(2)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    dataset.rename(dataset.with_name("away"))  # so that a report asks Storage
    with storage_with(settings, SILENT, method, part) as (proxy, met):
        running = start(*OURS, *command, env={"NEXT_PUBLIC_SUPABASE_URL": proxy.url})
        waits(running, met)
        ended(running)
    assert run_pipeline(*command).returncode == 0


# PostgreSQL


@signals
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_copy_that_waits_for_a_lock(
    workers: str,
    how: signal.Signals,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    with table_locked(settings, "raw.receipts") as waiting:
        running = start(*LOAD, "--source", small_dataset(6), *LOCAL, "--workers", workers, env=SMALL)
        waits(running, waiting)
        ended(running, how)
    resumes(run_pipeline, settings, small_dataset(6))


@signals
@pytest.mark.parametrize(
    ("command", "table"),
    [
        ((*OURS, "migrate"), "supabase_migrations.schema_migrations"),
        ((*OURS, "status"), "ingest.batches"),
        ((*OURS, "load", "--dry-run"), "ingest.batches"),
        ((*OURS, "reset", "--batch-id", "b1", "--confirm"), "ingest.batches"),
        ((*BARE, "LoadBatch"), "ingest.batches"),
        ((*BARE, "ResetBatch", "--batch-id", "b1", "--confirm"), "ingest.batches"),
    ],
    ids=lambda one: one if isinstance(one, str) else " ".join(one[3:]),
)
def test_a_statement_that_waits_for_a_lock(
    command: tuple[str, ...],
    table: str,
    how: signal.Signals,
    start: Start,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    with table_locked(settings, table) as waiting:
        running = start(*command, env={"DATASET_DIR": str(small_dataset(3))})
        waits(running, waiting)
        ended(running, how)


@pytest.mark.parametrize(
    "command",
    [
        (*LOAD, *LOCAL),
        pytest.param((*OURS, "verify"), marks=pytest.mark.slow),
        pytest.param(LUIGI, marks=pytest.mark.slow),
    ],
    ids=["load", "verify", "luigi"],
)
def test_a_database_that_hangs_and_takes_no_cancellation(
    command: tuple[str, ...], start: Start, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    with DatabaseProxy(settings.database_url.reveal()) as proxy, listening() as monitor:

        def hang(message: object) -> None:
            if len(proxy.seen) > 3:
                proxy.hung.set()

        proxy.plan = hang
        env = {"DATASET_DIR": str(small_dataset(3)), "DATABASE_URL": proxy.url, "PING_URL": monitor.url}
        running = start(*command, env=env)
        waits(running, proxy.hung.is_set)
        time.sleep(0.5)  # the command is in libpq by then, and nothing shows that from outside
        ended(running)
        assert monitor.paths() == ["/start", "/130"]
    resumes(run_pipeline, settings, small_dataset(3))


def test_a_database_that_is_tried_again(start: Start, small_dataset: MakeDataset) -> None:
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    env = {"DATABASE_URL": url, "PIPELINE_RETRY_BACKOFF_FACTOR": "10", "PIPELINE_RETRY_MAX_ATTEMPTS": "10"}
    running = start(*OURS, "load", "--verbose", "--source", small_dataset(3), env=env)
    read_until(running, "Trying again in")
    ended(running)


@pytest.mark.parametrize(
    ("command", "table", "hint"),
    [
        ((*LOAD, "--strict"), "ingest.looks", "Run the same command again."),
        ((*LUIGI, "--strict"), "ingest.looks", "Run the same command again."),
        ((*LOAD, "--workers", "2"), "ingest.looks", "Run the same command again."),
        ((*LOAD, "--workers", "2"), "raw.receipts", "To go on: python -m pipeline load --batch-id b1"),
        ((*LUIGI, "--workers", "2"), "raw.receipts", "To go on: luigi --module pipeline LoadBatch --batch-id b1"),
    ],
    ids=["load", "luigi", "workers", "after discovery", "luigi, after discovery"],
)
def test_the_hint_names_the_batch_once_it_is_on_record(
    command: tuple[str, ...], table: str, hint: str, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    with table_locked(settings, table, "EXCLUSIVE") as waiting:  # it is readable
        running = start(*command, "--source", small_dataset(6), *LOCAL, env=SMALL)
        waits(running, waiting)
        assert f"Interrupted. {hint}\n" in ended(running)


@pytest.mark.parametrize("form", [LOAD, LUIGI], ids=["load", "luigi"])
def test_a_database_that_goes_away_before_the_summary(
    form: tuple[str, ...], start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")  # the first summary is the last
    with (
        DatabaseProxy(dsn, lambda one: LOST if "SELECT step, shard, started_at" in one.text else None) as proxy,
        listening() as monitor,
    ):
        slow = {"PIPELINE_RETRY_BACKOFF_FACTOR": "10", "PIPELINE_RETRY_MAX_ATTEMPTS": "10"}
        env = {"DATABASE_URL": proxy.url, "PING_URL": monitor.url, **slow}
        running = start(*form, "--source", small_dataset(3), *LOCAL, env=env)
        waits(running, proxy.met)
        ended(running)
        assert monitor.paths() == ["/start", "/130"]


@signals
def test_the_lock_of_a_batch(how: signal.Signals, start: Start, small_dataset: MakeDataset, settings: Settings) -> None:
    dsn = settings.database_url.reveal()
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(hashtextextended('pipeline.batch:b1', 0))")
        running = start(*LOAD, "--source", small_dataset(3))
        asking = "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'pipeline lock b1'"
        waits(running, lambda: world.query(dsn, asking)[0][0])
        ended(running, how)


# luigid and other machines


@signals
@pytest.mark.parametrize("command", [LOAD, LUIGI], ids=["load", "luigi"])
def test_a_luigid_that_hangs_during_a_load(
    command: tuple[str, ...],
    how: signal.Signals,
    workdir: Path,
    tmp_path: Path,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    with running_luigid(tmp_path) as url, holding(settings.database_url.reveal(), 1) as held:
        configure(workdir, url)
        running = start(*command, "--source", small_dataset(6), env=SMALL)
        waits(running, lambda: world.objects(settings))
        with stopped(url):
            held.let_go(1)
            marked = "SELECT count(*) > 0 FROM ingest.batch_state WHERE step = 'upload'"
            waits(running, lambda: world.query(settings.database_url.reveal(), marked)[0][0])
            ended(running, how)
    resumes(run_pipeline, settings, small_dataset(6))


def configure(workdir: Path, url: str) -> None:
    text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    (workdir / "luigi.cfg").write_text(
        text.replace("scheduler_port = 8082", f"scheduler_url = {url}/"), encoding="utf-8"
    )


@contextmanager
def stopped(url: str) -> Iterator[None]:
    """Stop the process that listens at an address of loopback, without ending it."""
    pid = listener(int(url.rpartition(":")[2]))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def listener(port: int) -> int:
    """Return the process, a child of this one, that listens on a port."""
    table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    rows = [line.split() for line in table]
    (inode,) = (row[9] for row in rows if row[1] == f"0100007F:{port:04X}" and row[3] == "0A")
    [pid] = (pid for pid in processes.children(os.getpid()) if f"socket:[{inode}]" in processes.open_files(pid))
    return pid


@pytest.mark.parametrize("hangs", [False, True], ids=["idle", "luigid hangs"])
def test_a_worker_without_work(hangs: bool, workdir: Path, tmp_path: Path, start: Start) -> None:
    with running_luigid(tmp_path) as url:
        configure(workdir, url)
        running = start(*OURS, "worker", "--verbose")
        read_until(running, "Running Worker")
        if hangs:
            with stopped(url):
                ended(running)
        else:
            ended(running)


def test_a_shard_that_a_worker_on_another_machine_has(
    workdir: Path,
    tmp_path: Path,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    dsn = settings.database_url.reveal()
    with running_luigid(tmp_path) as url, holding(dsn, 1, 2) as held:
        configure(workdir, url)
        running = start(*LOAD, "--source", small_dataset(6), "--verbose", env=SMALL)
        waits(running, lambda: world.objects(settings))
        helper = start(*OURS, "worker", env=SMALL)
        uploading = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        waits(running, lambda: world.query(dsn, uploading) == [(2,)])
        held.let_go(1)
        read_until(running, "waiting for Worker(")
        ended(running)
        ended(helper)
    resumes(run_pipeline, settings, small_dataset(6))


# Files, processor and terminal


#: A module that Python imports at its start; it opens a named pipe, which nobody writes to, in place of photos.
HUNG = """
import os
opened = os.open
def open_photo(path, flags, *more, **rest):
    if str(path).endswith("_Main.jpg"):
        path, flags = {fifo!r}, os.O_RDONLY
    return opened(path, flags, *more, **rest)
os.open = open_photo
"""


@pytest.mark.parametrize(
    ("workers", "how"),
    [
        ("1", signal.SIGTERM),
        pytest.param("1", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("2", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_file_system_that_hangs(
    workers: str,
    how: signal.Signals,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
    tmp_path: Path,
) -> None:
    fifo, modules = tmp_path / "fifo", tmp_path / "modules"
    os.mkfifo(fifo)
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(HUNG.format(fifo=str(fifo)), encoding="utf-8")
    env = {**SMALL, "PYTHONPATH": f"{modules}{os.pathsep}{REPOSITORY}"}
    running = start(*LOAD, "--source", small_dataset(6), *LOCAL, "--workers", workers, env=env)
    waits(running, lambda: reads_a_fifo(running.pid))
    ended(running, how)
    resumes(run_pipeline, settings, small_dataset(6))


def reads_a_fifo(pid: int) -> bool:
    """Return whether a thread of a process or of its children waits for the other end of a named pipe."""
    return any(processes.waits_in(one, "wait_for_partner") for one in (pid, *processes.children(pid)))


@signals
def test_photos_that_take_long_to_decode(
    how: signal.Signals,
    start: Start,
    run_pipeline: RunPipeline,
    own_dataset: MakeDataset,
    settings: Settings,
) -> None:
    dataset = own_dataset(6)
    stream = io.BytesIO()
    Image.new("L", (5000, 5000), 3).save(stream, "JPEG", progressive=True, quality=60)
    slow, before = stream.getvalue(), {}
    scan = slow[slow.rindex(b"\xff\xda") : -2]
    for photo in sorted(dataset.rglob("*.jpg")):
        before[photo] = photo.read_bytes()
        photo.write_bytes(slow[:-2] + scan * 27 + slow[-2:])
    running = start(*LOAD, "--source", dataset, *LOCAL)
    marked = "SELECT count(*) > 0 FROM ingest.batch_state WHERE step = 'discover'"
    waits(running, lambda: world.query(settings.database_url.reveal(), marked)[0][0])
    ended(running, how)
    for photo, content in before.items():
        photo.write_bytes(content)
    assert run_pipeline("reset", "--batch-id", "b1", "--confirm").returncode == 0
    resumes(run_pipeline, settings, dataset)


@signals
@pytest.mark.parametrize(
    "command", [("completion", "bash"), ("status",), ("load", "--dry-run")], ids=lambda one: one[0]
)
def test_a_full_pipe(
    command: tuple[str, ...], how: signal.Signals, workdir: Path, small_dataset: MakeDataset, tmp_path: Path
) -> None:
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writes, b" " * 4096)
    with open(tmp_path / "stderr", "w+", encoding="utf-8") as stderr:
        environment = subprocess_environment({"DATASET_DIR": str(small_dataset(3))})
        running = subprocess.Popen([*OURS, *command], env=environment, stdout=writes, stderr=stderr, encoding="utf-8")
        try:
            waits(running, lambda: processes.waits_in(running.pid, "pipe_write"))
            began = time.monotonic()
            running.send_signal(how)
            assert running.wait(3 * SECONDS) == 130
            assert time.monotonic() - began < SECONDS
        finally:
            running.kill()
            running.wait()
            os.close(reads)
            os.close(writes)
        stderr.seek(0)
        assert "Interrupted. " in stderr.read()


@pytest.mark.slow
@signals
def test_a_full_pipe_of_both_outputs(how: signal.Signals, workdir: Path) -> None:
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writes, b" " * 4096)
    running = subprocess.Popen([*OURS, "status"], env=subprocess_environment(), stdout=writes, stderr=writes)
    try:
        assert wait_until(lambda: processes.waits_in(running.pid, "pipe_write"), 60)
        began = time.monotonic()
        running.send_signal(how)
        assert running.wait(3 * SECONDS) == 130
        assert time.monotonic() - began < SECONDS
    finally:
        running.kill()
        running.wait()
        os.close(reads)
        os.close(writes)


@signals
def test_a_prompt(
    how: signal.Signals, workdir: Path, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    assert run_pipeline("load", "--source", small_dataset(2), "--batch-id", "b1").returncode == 0
    here, there = os.openpty()
    with open(there, "rb") as terminal:
        running = subprocess.Popen(
            [*OURS, "reset", "--batch-id", "b1"],
            env=subprocess_environment(),
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    try:
        assert running.stderr is not None
        shown = ""
        while not ("to delete all this from" in shown and shown.endswith(": ")):
            character = running.stderr.read(1)
            assert character, shown
            shown += character
        running.send_signal(how)
        _, stderr = running.communicate(timeout=SECONDS)
        assert running.returncode == 130
        assert "Interrupted. " in stderr
    finally:
        running.kill()
        running.wait()
        close_pipes(running)
        os.close(here)
    world.check(settings, (small_dataset(2), "b1", None))


@signals
@pytest.mark.parametrize("command", ["up", "down"])
def test_another_command_that_starts_or_stops_the_services(
    command: str, how: signal.Signals, start: Start, tmp_path: Path, workdir: Path
) -> None:
    home = tmp_path / "embedded"
    make_home(home)
    (workdir / ".env.local").unlink()
    with locked(home / "lock"):
        running = start(*OURS, command, env={"PIPELINE_HOME": str(home)})
        waits(running, lambda: str(home / "lock") in processes.open_files(running.pid))
        ended(running, how)


@pytest.mark.slow
@signals
def test_services_that_start(
    how: signal.Signals, start: Start, run_pipeline: RunPipeline, short_folder: Path, workdir: Path
) -> None:
    home = short_folder / f"interrupted-{how}"
    running = start(*OURS, "up", env={"PIPELINE_HOME": str(home)})
    waits(running, (home / "postgres").is_dir)
    ended(running, how)
    for command in ("up", "down"):
        done = run_pipeline(command, env={"PIPELINE_HOME": str(home)})
        assert done.returncode == 0, done.stderr

"""Fixtures: one PostgreSQL and one Storage server a session, a database and a bucket of its own for every test."""

from __future__ import annotations

import itertools
import operator
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.services import create_roles
from pipeline.config import Settings, known_secrets
from pipeline.database import Database
from pipeline.database.migrate import migrate
from pipeline.observe.ping import PING
from pipeline.sample import write_sample
from pipeline.storage import Storage
from tests import world
from tests.luigi_support import SharedLuigid, shared_luigid
from tests.runner import Ended, ForkServer, start_forked
from tests.services import (
    MakeDataset,
    RunLuigi,
    RunPipeline,
    Start,
    StorageServer,
    end_group,
    environment_file,
    fresh_bucket,
    fresh_database,
    is_foreign,
    local_settings,
    running_storage,
    subprocess_environment,
)
from tests.sweeps import Share

SMALL_PHOTO = (160, 120)
#: Free bytes that servers of all test processes may need in memory.
_MEMORY = 6 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests' databases be those of a project: an empty one, or that of an app with trays and work in it."""
    parser.addoption("--project", choices=("empty", "app"), default="empty", help="what the tests' databases hold")
    parser.addoption("--share", default="0/1", metavar="NUMBER/COUNT", help="which share of a test's slow cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow cases of other shares, and begin with slow ones: none of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    tests = [item.nodeid.partition("[")[0] if item.get_closest_marker("slow") else None for item in items]
    taken = Share.parse(config.getoption("--share")).take(tests)
    config.hook.pytest_deselected(items=list(itertools.compress(items, map(operator.not_, taken))))
    items[:] = itertools.compress(items, taken)


@pytest.fixture(scope="session", autouse=True)
def _hangup() -> None:
    """Let SIGHUP end the commands that tests start, also where the tests run under nohup, which ignores it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests() -> None:
    """Begin every test as a new process does: a secret of another test is no secret in the texts of this one."""
    known_secrets.cache_clear()


@pytest.fixture(autouse=True)
def _no_pings_in_other_tests() -> Iterator[None]:
    """End every test with the pings that it began: a command in this process does not wait long for its last one."""
    yield
    for thread in threading.enumerate():
        if thread.name == PING:
            thread.join()


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets, which the server's user can pass through when we are root.

    It is in memory where there is room: ext4 takes up to half a millisecond longer to create a file while many were
    deleted in the last five minutes, and each test has a database of some 450 files.
    """
    in_memory = Path("/dev/shm")
    has_room = in_memory.is_dir() and shutil.disk_usage(in_memory).free >= _MEMORY
    folder = Path(tempfile.mkdtemp(prefix="pipeline-tests-", dir=in_memory if has_room else "/tmp"))
    if os.geteuid() == 0:
        folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def made_data(short_folder: Path) -> Path:
    """A PostgreSQL data directory to copy, for tests that are not about initdb: it takes longer than all the rest."""
    server = EmbeddedPostgres(short_folder / "made", durable=False)
    server.start()
    server.stop()
    return server.data_path


@pytest.fixture(scope="session")
def postgres_server(short_folder: Path) -> Iterator[EmbeddedPostgres]:
    """A running PostgreSQL with the roles of a Supabase project; it forgets everything when it crashes."""
    server = EmbeddedPostgres(short_folder / "pg", durable=False)
    try:
        create_roles(server.start())
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def is_app(pytestconfig: pytest.Config) -> bool:
    """Whether the tests' databases are an app's project."""
    return bool(pytestconfig.getoption("project") == "app")


@pytest.fixture(scope="session")
def app_template(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The name of a database as an app has it, without our migrations, to copy; nobody is connected to it."""
    name = "app"
    with fresh_database(postgres_server.dsn, name) as url:
        world.query(url, world.APP.read_text(encoding="utf-8"))
        yield name


@pytest.fixture(scope="session")
def template_database(postgres_server: EmbeddedPostgres, is_app: bool, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a database with all migrations, to copy; nobody is connected to it."""
    name, template = "migrated", request.getfixturevalue("app_template") if is_app else "template1"
    with fresh_database(postgres_server.dsn, name, template) as url:
        nowhere = StorageServer("http://127.0.0.1:1", "", "none", Path())
        settings = local_settings(url, nowhere, "none", Path())
        with closing(Database(settings)) as database:
            migrate(database)
        yield name


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, template_database: str, is_app: bool) -> Iterator[str]:
    """The address of a database of this test's own, with all migrations; what an app has in it has to stay."""
    with fresh_database(postgres_server.dsn, f"test_{uuid.uuid4().hex}", template_database) as url:
        before = world.others(url) if is_app else {}
        yield url
        assert not is_app or world.others(url) == before


@pytest.fixture
def empty_database_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The address of a database of this test's own, without any migration."""
    with fresh_database(postgres_server.dsn, f"empty_{uuid.uuid4().hex}") as url:
        yield url


@pytest.fixture(scope="session")
def storage_server(short_folder: Path) -> Iterator[StorageServer]:
    """A running Storage server that all tests share, each with a bucket of its own."""
    folder = short_folder / "storage"
    folder.mkdir()
    with running_storage(folder) as server:
        yield server


@pytest.fixture
def bucket(storage_server: StorageServer) -> Iterator[str]:
    """The name of a bucket of this test's own that does not exist yet."""
    with fresh_bucket(storage_server) as name:
        yield name


@pytest.fixture
def has_photos(is_app: bool, request: pytest.FixtureRequest) -> bool:
    """Whether the database has photos before the test, so that their bucket has to exist."""
    return is_app or "app_template" in request.fixturenames


@pytest.fixture
def settings(
    database_url: str, storage_server: StorageServer, bucket: str, tmp_path: Path, has_photos: bool
) -> Settings:
    """The settings of the environment `local` for this test's database and bucket."""
    settings = local_settings(database_url, storage_server, bucket, tmp_path / "home")
    if has_photos:
        with closing(Storage(settings)) as storage:
            storage.ensure_bucket()
    return settings


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """This test's database through the pipeline's own door."""
    with closing(Database(settings)) as database:
        yield database


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take away every variable that decides what the pipeline does, and the folders of the real home."""
    for name in list(os.environ):
        if is_foreign(name):
            monkeypatch.delenv(name)
    home = tmp_path / "user"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def workdir(settings: Settings, clean_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory, an empty folder but for the `.env.local` of these settings."""
    folder = tmp_path / "work"
    folder.mkdir()
    file = folder / ".env.local"
    file.touch(mode=0o600)
    file.write_text(environment_file(settings), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """The process that forks for `Runner`."""
    with closing(ForkServer()) as server:
        yield server


@pytest.fixture
def run_pipeline(workdir: Path, fork_server: ForkServer, short_folder: Path) -> RunPipeline:
    """Run a command in the working directory to its end, its output captured.

    It is forked, unless there is a variable that a new interpreter alone regards.
    """

    def run(
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        environment = subprocess_environment(env)
        if not any(name.startswith("PYTHON") for name in env or {}):
            output = Path(tempfile.mkdtemp(dir=short_folder))
            ended = start_forked(fork_server, output, cwd or workdir, arguments, environment).finish(timeout)
            return subprocess.CompletedProcess(arguments, ended.code, ended.stdout, ended.stderr)
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *map(str, arguments)],
            cwd=cwd or workdir,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, postgres_server: EmbeddedPostgres) -> Iterator[SharedLuigid]:
    """A luigid with history, metrics, mails and resources, for all tests about the habits of Luigi's users."""
    with shared_luigid(tmp_path_factory.mktemp("luigid"), postgres_server) as running:
        yield running


@pytest.fixture
def run_luigi(workdir: Path, fork_server: ForkServer, short_folder: Path) -> RunLuigi:
    """Run a command of Luigi's, or a script, in the working directory to its end: forked, its output captured."""

    def run(program: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Ended:
        output = Path(tempfile.mkdtemp(dir=short_folder))
        environment = subprocess_environment(env)
        return start_forked(fork_server, output, workdir, arguments, environment, program).finish()

    return run


@pytest.fixture
def start(workdir: Path) -> Iterator[Start]:
    """Start a command in the working directory, its output in pipes; at the end it and its children are killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=workdir,
            env=subprocess_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        end_group(process)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """Datasets that all tests share; whoever changes a file takes `own_dataset`."""
    written: dict[tuple[int, bool, int, int | None], Path] = {}

    def make(recognitions: int = 12, *, broken: bool = False, seed: int = 0, first_id: int | None = None) -> Path:
        wanted = (recognitions, broken, seed, first_id)
        if wanted not in written:
            folder = tmp_path_factory.mktemp("dataset")
            write_sample(folder, recognitions, seed, broken=broken, first_id=first_id, size=SMALL_PHOTO, workers=1)
            written[wanted] = folder
        return written[wanted]

    return make


@pytest.fixture
def own_dataset(small_dataset: MakeDataset, tmp_path: Path) -> MakeDataset:
    """Copies of such datasets, a new one at every call, for this test to change."""
    copies: list[Path] = []

    def make(recognitions: int = 12, *, broken: bool = False, seed: int = 0, first_id: int | None = None) -> Path:
        shared = small_dataset(recognitions, broken=broken, seed=seed, first_id=first_id)
        copy = tmp_path / f"dataset-{len(copies)}"
        shutil.copytree(shared, copy)
        copies.append(copy)
        return copy

    return make

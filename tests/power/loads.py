"""Loads that a power failure ends: PostgreSQL recovers, Storage starts on a state, the same command finishes the load.

The disk of the Storage server stops at an entry of its log. Then the load is killed, and so is PostgreSQL, which
recovers from its own log. Each state of Storage gets a copy of the recovered database.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tornado.httpserver
import tornado.netutil

from embedded_supabase.files import has_ended, make_home, wait_until
from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.services import create_roles
from embedded_supabase.storage.auth import mint_key
from embedded_supabase.storage.faults import FaultInjector
from embedded_supabase.storage.routes import application
from embedded_supabase.storage.store import ObjectStore
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.database.migrate import migrate
from pipeline.sample import write_sample
from tests import world
from tests.power import sqlite
from tests.power.log import Recorder
from tests.power.model import Model
from tests.power.script import Violation
from tests.runner import ForkServer, Runner
from tests.services import StorageServer, environment_file, fresh_database, local_settings, running_storage

BUCKET = "photos"
SECRET = "a secret for tests, at least 32 bytes long"
_TEMPLATE = "migrated"
_SECONDS = 120.0
_LOAD = ("load", "--batch-id", "b1", "--source")


class StoppingDisk(Recorder):
    """A recorder whose disk stops before the entry with this number, until it is released."""

    def __init__(self, folder: Path, end: int | None) -> None:
        super().__init__(folder)
        self.begin = 0
        self._end = end
        self.stopped, self.released = threading.Event(), threading.Event()
        self.before = self._wait

    def _wait(self) -> None:
        if self._end is not None and len(self.log) >= self._end:
            self.stopped.set()
            self.released.wait()


@contextmanager
def recorded_server(disk: StoppingDisk) -> Iterator[StorageServer]:
    """Serve a store in this process, with its own threads, on a disk that records."""
    root, running, ended = disk.folder / "root", threading.Event(), threading.Event()
    addresses: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve(store: ObjectStore) -> None:
        with closing(store):  # before the loop ends: that would cancel, not close, files that wait for a thread
            sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
            server = tornado.httpserver.HTTPServer(application(store, SECRET, FaultInjector()))
            server.add_sockets(sockets)
            stop = asyncio.Event()
            addresses.append((f"http://127.0.0.1:{sockets[0].getsockname()[1]}", asyncio.get_running_loop(), stop))
            running.set()
            await stop.wait()
            server.stop()
            await server.close_all_connections()

    def work() -> None:
        try:
            disk.make_folder(root)
            asyncio.run(serve(ObjectStore(root, disk)))
        finally:
            running.set()
            ended.set()

    with sqlite.recorded(disk):
        thread = threading.Thread(target=work, name="recorded server")
        thread.start()
        try:
            running.wait()
            [(url, loop, stop)] = addresses
            disk.begin = len(disk.log)
            yield StorageServer(url, SECRET, mint_key(SECRET), root)
            disk.released.set()
            loop.call_soon_threadsafe(stop.set)
        finally:
            disk.released.set()
            thread.join()


@dataclass(frozen=True)
class Loads:
    """What loads that end early need: a durable PostgreSQL with a migrated database, a dataset, a folder."""

    postgres: EmbeddedPostgres
    fork_server: ForkServer
    dataset: Path
    folder: Path

    def runner(self, settings: Settings) -> Runner:
        """Return a runner of commands with these settings."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        (folder / ".env.local").write_text(environment_file(settings), encoding="utf-8")
        return Runner(self.fork_server, folder, {"PIPELINE_THREAD_COUNT": "4", "PIPELINE_BATCH_SIZE": "2"})

    def entries(self) -> range:
        """Run a load to its end, and return the numbers of its entries in the log of its disk."""
        with ExitStack() as stack:
            disk = self._record(stack, None)[0]
        return range(disk.begin, len(disk.log))

    def interrupted(self, end: int, states: int, chance: random.Random) -> None:
        """Let the power fail at an entry of a load, and check so many states that it may leave.

        Raises:
            Violation: the load is not finished by the same command, or what it loaded is not what it should be.
        """
        with ExitStack() as stack:
            disk, database, empty = self._record(stack, end)
            model = Model(empty, {".": 0})
            for entry in disk.log[:end]:
                model.apply(entry)
            for _ in range(states):
                self._finish(model, database, chance)

    def _record(self, stack: ExitStack, end: int | None) -> tuple[StoppingDisk, str, Path]:
        """Run a load on a new disk; return the disk, the name of its database and an empty folder."""
        empty, folder = self.folder / uuid.uuid4().hex, self.folder / uuid.uuid4().hex
        empty.mkdir()
        folder.mkdir()
        name = f"load_{uuid.uuid4().hex}"
        url = stack.enter_context(fresh_database(self.postgres.dsn, name, _TEMPLATE))
        disk = StoppingDisk(folder, end)
        with recorded_server(disk) as server:
            running = self.runner(local_settings(url, server, BUCKET, folder / "home")).start(*_LOAD, self.dataset)
            if end is None:
                assert running.finish().code == 0
            else:
                assert wait_until(lambda: disk.stopped.is_set() or running.wait(0), _SECONDS)
                running.signal(signal.SIGKILL)
                pid = self.postgres.pid
                assert pid is not None
                os.kill(pid, signal.SIGQUIT)  # what `pg_ctl stop -m immediate` sends: no checkpoint
                assert wait_until(lambda: has_ended(pid), _SECONDS)
                running.wait(_SECONDS)
                self.postgres.start()
        return disk, name, empty

    def _finish(self, model: Model, database: str, chance: random.Random) -> None:
        """Start Storage on a state, finish the load, and compare everything."""
        folder, name = self.folder / uuid.uuid4().hex, f"state_{uuid.uuid4().hex}"
        folder.mkdir()
        model.after_power_failure(chance).write(folder)
        with (
            fresh_database(self.postgres.dsn, name, database) as url,
            running_storage(folder, SECRET) as server,
        ):
            settings = local_settings(url, server, BUCKET, folder / "home")
            runner = self.runner(settings)
            for command in ((*_LOAD, self.dataset), ("verify", "--deep", "--quiet")):
                ended = runner(*command)
                if ended.code != 0:
                    raise Violation(f"{command[0]} ended with {ended.code}: {ended.stdout}{ended.stderr}")
            try:
                world.check(settings, (self.dataset, "b1", None))
            except AssertionError as exc:
                raise Violation(f"what was loaded differs: {exc}") from exc


@contextmanager
def loads(folder: Path, recognitions: int = 8) -> Iterator[Loads]:
    """Start what the loads need, below a folder that the user of PostgreSQL can pass through."""
    dataset = folder / "dataset"
    write_sample(dataset, recognitions, 0, broken=False, size=(160, 120), workers=1)
    home = folder / "durable"
    make_home(home)
    nowhere = StorageServer("http://127.0.0.1:1", "", "none", Path())
    with EmbeddedPostgres(home) as postgres, closing(ForkServer()) as fork_server:
        create_roles(postgres.dsn)
        with fresh_database(postgres.dsn, _TEMPLATE) as url:
            with closing(Database(local_settings(url, nowhere, "none", Path()))) as database:
                migrate(database)
            yield Loads(postgres, fork_server, dataset, folder)

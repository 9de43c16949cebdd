"""What the clients of a Storage server do, and what each of them knows when the power fails."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import sqlite3
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from embedded_supabase.disk import Disk
from embedded_supabase.errors import EmbeddedError
from embedded_supabase.files import make_folder, make_home, make_parents, write_atomically
from embedded_supabase.storage.errors import ApiError
from embedded_supabase.storage.process import EmbeddedStorage
from embedded_supabase.storage.records import Attributes, Bucket, Sorting, now
from embedded_supabase.storage.store import ObjectStore
from tests.power import sqlite
from tests.power.log import Entry, Noted, Recorder

BUCKET = "b"
PORT = "23456"
POSTGRES, POSTGRES_MODE = "postgres", 0o711
_SIZES = (0, 1, 511, 700, 5000, 20000)
#: Pages of the write-ahead log after which SQLite copies them to the index; 1000 without this.
_CHECKPOINT = 12

#: Keys with content and content type; a bucket is the key of its name followed by a slash.
Contents = dict[str, tuple[bytes, str]]


class Violation(Exception):
    """A state after a power failure breaks a promise."""


@dataclass(frozen=True)
class Operation:
    """A request: `bucket`, `put`, `copy`, `move`, `delete` or `abandon`, an upload whose client disconnects."""

    kind: str
    keys: Sequence[str]
    content: bytes = b""
    mimetype: str = "image/jpeg"

    def effect(self, before: Contents) -> Contents:
        """Return what the server contains after the request."""
        after = dict(before)
        if self.kind == "bucket":
            after[f"{self.keys[0]}/"] = b"", ""
        elif self.kind == "put":
            after[self.keys[0]] = self.content, self.mimetype
        elif self.kind == "copy":
            after[self.keys[1]] = before[self.keys[0]]
        elif self.kind == "move" and self.keys[0] in after:
            after[self.keys[1]] = after.pop(self.keys[0])
        elif self.kind == "delete":
            for key in self.keys:
                after.pop(key, None)
        return after

    async def send(self, store: ObjectStore) -> None:
        """Do as the handlers of the server do; repeating a request that took effect changes nothing."""
        if self.kind == "bucket":
            if all(bucket.id != self.keys[0] for bucket in store.list_buckets()):
                await store.create_bucket(Bucket(self.keys[0], self.keys[0], False, None, None, now(), now()))
        elif self.kind in ("put", "abandon"):
            incoming = store.receive()
            for begin in range(0, len(self.content), 4096):
                incoming.write(self.content[begin : begin + 4096])
            if self.kind == "abandon":
                incoming.abandon()
            else:
                await store.put(BUCKET, self.keys[0], incoming, Attributes(self.mimetype))
        elif self.kind == "delete":
            await store.delete(BUCKET, self.keys)
        elif (source := store.find(BUCKET, self.keys[0])) is not None:
            if self.kind == "copy":
                await store.copy(source, BUCKET, self.keys[1], Attributes(source.mimetype))
            else:
                await store.move(source, BUCKET, self.keys[1])


#: Requests at the same time, with different keys; the next ones are sent when all have responses.
Step = Sequence[Operation]


def script(seed: str) -> list[list[Step]]:
    """Return the steps between the starts of a server."""
    chance = random.Random(seed)
    names = (f"k{number}" for number in itertools.count())

    def put(*keys: str) -> Step:
        return [Operation("put", [key], chance.randbytes(chance.choice(_SIZES)), f"image/{key}") for key in keys]

    a, b, c, d, e, f, g, h, i, j, k, m = itertools.islice(names, 12)
    return [
        [
            [Operation("bucket", [BUCKET])],
            put(a, b, c, d),
            [*put(a), Operation("copy", [b, e]), Operation("abandon", ["x"], b"x" * 5000)],
            [Operation("delete", [c, d]), *put(f, g)],
            [Operation("move", [f, h])],
            put(e),
        ],
        [
            put(i, a, j),
            [Operation("delete", [b]), Operation("bucket", ["other"]), *put(g)],
            [Operation("copy", [i, k]), Operation("move", [h, b]), Operation("abandon", ["y"], b"y")],
            put(m),
            [Operation("delete", [a, e, "absent"])],
        ],
        [put(k, c), [Operation("delete", [m]), *put(a)]],
    ]


@dataclass(frozen=True)
class Progress:
    """How far the clients of a script are: steps have numbers in the order of the script, and so have their requests.

    Attributes:
        step: the current step.
        begun: its requests that were sent at least once, also before an earlier power failure.
        answered: those that have a response.
        secret: the secret, once a start succeeded.
    """

    step: int = 0
    begun: frozenset[int] = frozenset()
    answered: frozenset[int] = frozenset()
    secret: str | None = None


@dataclass
class Client:
    """The clients of a server; they tell a recorder what they know."""

    sessions: Sequence[Sequence[Step]]
    is_home: bool
    steps: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = [step for session in self.sessions for step in session]

    def contents(self, progress: Progress) -> list[Contents]:
        """Return what the server may contain: all that was answered, and of the rest each request as a whole or not."""
        sure: Contents = {}
        for step in self.steps[: progress.step]:
            for operation in step:
                sure = operation.effect(sure)
        if progress.step == len(self.steps):
            return [sure]
        step = self.steps[progress.step]
        open_ones = sorted(progress.begun - progress.answered)
        possible = []
        for count in range(len(open_ones) + 1):
            for some in itertools.combinations(open_ones, count):
                contents = sure
                for number in sorted(progress.answered | set(some)):
                    contents = step[number].effect(contents)
                possible.append(contents)
        return possible

    def root(self, folder: Path) -> Path:
        """Return the folder of the store on a disk."""
        return folder / "srv" / "new" / "home" / "storage"

    def start(self, folder: Path, disk: Disk) -> tuple[ObjectStore, str]:
        """Start a server as `EmbeddedStorage.start`, or `main` of the server, does; return the store and the secret."""
        root = self.root(folder)
        if not self.is_home:
            make_parents(root, disk)
            disk.make_folder(root)
            return ObjectStore(root, disk), ""
        make_home(root.parent, disk)
        make_folder(root.parent / POSTGRES, POSTGRES_MODE, disk=disk)  # as `EmbeddedPostgres` of root does
        server = EmbeddedStorage(root.parent)
        server._disk = disk
        server._prepare()
        store = ObjectStore(root, disk)
        port = root.parent / "storage.port"
        if not port.exists():
            write_atomically(port, PORT, disk)
        return store, (root.parent / "jwt-secret").read_text(encoding="ascii")

    def run(
        self,
        folder: Path,
        disk: Disk,
        progress: Progress,
        note: Callable[[Progress], None],
        started: Callable[[ObjectStore], None] = lambda store: None,
        stopped: Callable[[ObjectStore], None] = lambda store: None,
    ) -> Progress:
        """Send all that has no response yet, and stop the server wherever the script does.

        Arguments:
            note: called whenever the clients know more.
            started: called after each start, before the first request.
            stopped: called before each stop.
        """

        async def send(store: ObjectStore, number: int) -> None:
            nonlocal progress
            progress = Progress(progress.step, progress.begun | {number}, progress.answered, progress.secret)
            note(progress)
            await self.steps[progress.step][number].send(store)
            progress = Progress(progress.step, progress.begun, progress.answered | {number}, progress.secret)
            note(progress)

        async def work(store: ObjectStore, end: int) -> None:
            nonlocal progress
            while progress.step < end:
                left = sorted(set(range(len(self.steps[progress.step]))) - progress.answered)
                await asyncio.gather(*(send(store, number) for number in left))
                progress = Progress(progress.step + 1, secret=progress.secret)
                note(progress)

        ends = list(itertools.accumulate(len(session) for session in self.sessions))
        first = progress.step == len(self.steps)
        for end in ends:
            if progress.step < end or (first and end == ends[-1]):
                store, secret = self.start(folder, disk)
                with closing(store):
                    progress = Progress(progress.step, progress.begun, progress.answered, secret)
                    note(progress)
                    started(store)
                    asyncio.run(work(store, end))
                    stopped(store)
        return progress


class _Inline(Executor):
    """Runs everything in the calling thread, so that the same seed gives the same log."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except (OSError, sqlite3.Error) as exc:
            future.set_exception(exc)
        return future


def record(client: Client, folder: Path, progress: Progress, seed: str) -> Recorder:
    """Run a script on a disk, and return the recorder."""
    recorder = Recorder(folder)
    chance = random.Random(seed)

    def started(store: ObjectStore) -> None:
        assert store._threads is not None
        assert store._commits._thread is not None
        store._threads.shutdown()
        store._commits._thread.shutdown()
        store._threads = store._commits._thread = _Inline()  # type: ignore[assignment]
        store._commits._connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT}")

    with (
        sqlite.recorded(recorder),
        mock.patch("uuid.uuid4", side_effect=lambda: uuid.UUID(int=chance.getrandbits(128), version=4)),
        mock.patch("secrets.token_hex", side_effect=lambda count: chance.randbytes(count).hex()),
    ):
        client.run(folder, recorder, progress, recorder.note, started)
    return recorder


def progress_at(log: Sequence[Entry], end: int, first: Progress) -> Progress:
    """Return what the clients know after the first entries of a log."""
    for entry in reversed(log[:end]):
        if isinstance(entry, Noted):
            assert isinstance(entry.fact, Progress)
            return entry.fact
    return first


def observed(store: ObjectStore) -> Contents:
    """Return what a store lists.

    Raises:
        Violation: an object is not as its entry says.
    """
    contents: Contents = {f"{bucket.id}/": (b"", "") for bucket in store.list_buckets()}
    page = store.listing.list_objects(BUCKET, "", 1000, None, delimiter=False, sorting=Sorting())
    for entry in page["objects"]:
        found = store.get(BUCKET, entry["name"])
        try:
            content = store.content_path(found).read_bytes()
        except FileNotFoundError:
            raise Violation(f"{found.name} is listed, and its file is missing") from None
        if (len(content), hashlib.md5(content, usedforsecurity=False).hexdigest()) != (found.size, found.etag):
            raise Violation(f"{found.name} is listed, and its content is not that of its upload")
        contents[found.name] = content, found.mimetype
    return contents


@contextmanager
def failures_are_violations() -> Iterator[None]:
    """Report that a server does not start, or that a request fails, as a violation."""
    try:
        yield
    except (OSError, sqlite3.Error, EmbeddedError, ApiError) as exc:
        raise Violation(f"{type(exc).__name__}: {exc}") from exc


def check(client: Client, folder: Path, progress: Progress) -> None:
    """Start a server on what a power failure left, compare it with what its clients know, and finish their script.

    Raises:
        Violation: a promise is broken.
    """
    home = client.root(folder).parent
    last: Contents = {}

    def compare(store: ObjectStore) -> None:
        found = observed(store)
        possible = client.contents(progress)
        if found not in possible:
            raise Violation(_difference(found, possible))
        _check_files(store)

    def keep(store: ObjectStore) -> None:
        nonlocal last
        last = observed(store)
        _check_files(store)

    if client.is_home and progress.secret is not None:
        with failures_are_violations():
            _check_home(home, progress.secret)
    once = Client([client.steps], client.is_home)  # one start is enough
    with failures_are_violations():
        once.run(folder, Disk(durable=False), progress, lambda fact: None, compare, keep)
    [wanted] = client.contents(Progress(len(client.steps)))
    if last != wanted:
        raise Violation(f"after the rest of the requests: {_difference(last, [wanted])}")


def _check_home(home: Path, secret: str) -> None:
    for name, wanted in (("jwt-secret", secret), ("storage.port", PORT)):
        if not (home / name).exists():
            raise Violation(f"{name} is missing")
        if (home / name).read_text(encoding="ascii") != wanted:
            raise Violation(f"{name} has another content")
    mode = stat.S_IMODE((home / POSTGRES).stat().st_mode)
    if mode != POSTGRES_MODE:
        raise Violation(f"the folder of PostgreSQL has the mode {mode:o}")


def _check_files(store: ObjectStore) -> None:
    left = os.listdir(store._incoming)
    versions = {version for (version,) in store._index.execute("SELECT version FROM objects")}
    files = {name for folder in list(os.scandir(store._objects)) for name in os.listdir(folder)}
    if left or files != versions:
        raise Violation(f"{len(left)} unfinished uploads and {len(files - versions)} files without a row are left")


def _difference(found: Contents, possible: Sequence[Contents]) -> str:
    sure = set.intersection(*(set(one.items()) for one in possible))
    allowed = set().union(*(one.items() for one in possible))
    missing = sorted(key for key, _ in sure - set(found.items()))
    extra = sorted(key for key, _ in set(found.items()) - allowed)
    return f"lost or changed: {' '.join(missing) or '-'}; not deleted or unknown: {' '.join(extra) or '-'}"

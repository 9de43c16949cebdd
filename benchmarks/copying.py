"""Rows a second of the COPY step, beside psql's \\copy of the same rows from files that are ready."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from benchmarks.bench import SMALL, Bench, World
from benchmarks.rows import Row, middle
from embedded_supabase.postgres.installation import binaries
from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import Request, discover
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage


@dataclass(frozen=True)
class _Table:
    """A table of the schema raw, and which of its rows belong to a shard of a batch."""

    name: str
    shard: str = (
        "JOIN ingest.manifest m USING (batch_id, recognition_id) WHERE batch_id = '{batch}' AND shard = {shard}"
    )


_BATCH = "b1"
_TABLES = (
    _Table("raw.menus", "WHERE batch_id = '{batch}' AND shard = {shard}"),
    _Table("raw.receipts"),
    _Table("raw.photos"),
)


@dataclass(frozen=True)
class _Ready:
    """The rows of a batch in files, by shard and table.

    Attributes:
        shards: scripts for psql, one transaction a shard.
        whole: a script with everything in one transaction.
        rows: in all files.
        megabytes: in all files.
    """

    shards: Path
    whole: Path
    rows: int
    megabytes: float


def copying(place: Bench, recognitions: int, repeats: int) -> list[Row]:
    """Copy documents with the facts of their photos again and again into tables without rows.

    What psql copies was read, checked and written as lines before: it is the database's limit for one session.
    """
    dataset = place.dataset(recognitions, SMALL)
    with (
        place.world() as world,
        closing(Database(world.settings)) as database,
        closing(Storage(world.settings)) as storage,
    ):
        shards = _prepare(world, database, storage, dataset)
        ready = _export(world, place.folder / "ready", shards)
        return _compare(world, database, shards, ready, repeats)


def _prepare(world: World, database: Database, storage: Storage, source: Path) -> range:
    """Carry the batch to where all is copied; return its shards."""
    storage.ensure_bucket()
    resolve_batch(world.settings, database, LoadRequest(_BATCH, str(source)))
    found = discover(database, Request.of(world.settings, _BATCH, str(source)))
    assert found is not None
    shards = range(1, found.shards + 1)
    with closing(Uploader(database, storage)) as uploader:
        for shard in shards:
            uploader.upload(_BATCH, shard)
            copy_shard(database, world.settings, _BATCH, shard)
    return shards


def _export(world: World, folder: Path, shards: Sequence[int]) -> _Ready:
    """Write what is copied into files, and the scripts that copy them."""
    folder.mkdir()
    rows = size = 0
    parts = []
    with closing(psycopg2.connect(world.database_url)) as connection, connection.cursor() as cursor:
        for shard in shards:
            part = []
            for table in _TABLES:
                path = folder / f"{table.name}-{shard}"
                which = table.shard.format(batch=_BATCH, shard=shard)
                with open(path, "wb") as file:
                    cursor.copy_expert(f"COPY (SELECT t.* FROM {table.name} t {which}) TO STDOUT", file)
                rows += cursor.rowcount
                size += path.stat().st_size
                part.append(f"\\copy {table.name} from '{path}'\n")
            parts.append("".join(part))
    single, whole = folder / "single.sql", folder / "whole.sql"
    single.write_text("".join(f"BEGIN;\n{part}COMMIT;\n" for part in parts), encoding="utf-8")
    whole.write_text(f"BEGIN;\n{''.join(parts)}COMMIT;\n", encoding="utf-8")
    return _Ready(single, whole, rows, size / 1e6)


def _compare(world: World, database: Database, shards: range, ready: _Ready, repeats: int) -> list[Row]:
    python = 0.0

    def ours() -> None:
        nonlocal python
        begin = time.process_time()
        _copy_all(database, world.settings, shards)
        python = time.process_time() - begin

    def by_workers() -> None:
        list(workers.map(_copy, shards, chunksize=4))

    each: list[tuple[float, float]] = []
    twice: list[tuple[float, float]] = []
    at_once: list[tuple[float, float]] = []
    shares: list[tuple[float, float]] = []
    with _psql(world) as psql, _workers(world, 2) as workers:
        for _ in range(repeats):
            peer = _seconds(world, lambda: psql(ready.shards))
            mine = _seconds(world, ours)
            both = _seconds(world, by_workers)
            whole = _seconds(world, lambda: psql(ready.whole))
            each.append((ready.rows / mine, ready.rows / peer))
            twice.append((ready.rows / both, ready.rows / peer))
            at_once.append((ready.rows / mine, ready.rows / whole))
            shares.append((python, mine))
    turns, peer_turns = _turns(world, shards, ready)
    first = middle("photos and documents, a transaction a shard / psql \\copy, the same", each, "rows/s")
    scale = ready.megabytes / ready.rows
    return [
        first,
        Row("  the same in MB", first.ours * scale, first.reference * scale, "MB/s"),
        middle("  two workers / psql \\copy, one after another", twice, "rows/s"),
        middle("  one after another / psql \\copy, all in one transaction", at_once, "rows/s"),
        middle("  processor time of our process / whole", shares, "s"),
        Row("  round trips of a shard / psql", turns / len(shards), peer_turns / len(shards), ""),
    ]


@contextmanager
def _workers(world: World, count: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that copy, as those of `--workers` do."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_connect, initargs=(world,)) as workers:
        list(workers.map(time.sleep, [0.1] * count))  # so that each of them has begun
        yield workers


_doors: list[tuple[Database, Settings]] = []


def _connect(world: World) -> None:
    database = Database(world.settings)
    with database.transaction() as connection:
        connection.execute("now")
    _doors.append((database, world.settings))


def _copy(shard: int) -> None:
    _copy_all(*_doors[0], (shard,))


def _copy_all(database: Database, settings: Settings, shards: Sequence[int]) -> None:
    for shard in shards:
        copy_shard(database, settings, _BATCH, shard)


def _seconds(world: World, work: Callable[[], None]) -> float:
    """Return how long the work takes when nothing of the batch is copied yet."""
    tables = ", ".join(table.name for table in _TABLES)
    world.query(f"TRUNCATE {tables}")
    world.query("DELETE FROM ingest.batch_state WHERE batch_id = %s AND step = 'copy'", _BATCH)
    world.maintain("CHECKPOINT")  # which else comes in the middle of one or the other
    os.sync()  # nor is anything of the questions before on its way to the disk
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _turns(world: World, shards: range, ready: _Ready) -> tuple[int, int]:
    """Return how often we and psql wait for the database, connecting left out; the batch has its rows in the end."""
    with world.database_relay() as relay, closing(Database(world.through(relay).settings)) as database:
        with _psql(world.through(relay)) as psql:
            relay.forget()
            _seconds(world, lambda: psql(ready.shards))
            peer = relay.turns
        with database.transaction() as connection:
            connection.execute("now")
        relay.forget()
        _seconds(world, lambda: _copy_all(database, world.settings, shards))
        return relay.turns, peer


@contextmanager
def _psql(world: World) -> Iterator[Callable[[Path], None]]:
    """Start the psql of the embedded PostgreSQL; give what makes it run a script to its end."""
    command = [str(binaries() / "psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", world.database_url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def run(script: Path | None) -> None:
            commands.write(f"\\i '{script}'\n" if script else "")
            commands.write("\\echo over\n")
            if answers.readline() != "over\n":
                raise SystemExit(f"psql failed at {script}.")

        run(None)
        yield run
        commands.close()

"""The index of objects in SQLite: its schema, its connections, and group commit."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS buckets (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, public INTEGER NOT NULL, file_size_limit INTEGER,
    allowed_mime_types TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS objects (
    bucket_id TEXT NOT NULL REFERENCES buckets (id), name TEXT NOT NULL, id TEXT NOT NULL, version TEXT NOT NULL,
    size INTEGER NOT NULL, etag TEXT NOT NULL, mimetype TEXT NOT NULL, cache_control TEXT NOT NULL,
    user_metadata TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    PRIMARY KEY (bucket_id, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS objects_lower ON objects (bucket_id, lower(name), name);
"""


def connect(path: Path, *, durable: bool) -> sqlite3.Connection:
    """Open a connection in autocommit mode, for one thread at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    # FULL syncs the write-ahead log at every commit. OFF still survives a crash of the process.
    for pragma in ("journal_mode = WAL", f"synchronous = {'FULL' if durable else 'OFF'}", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


class GroupCommit:
    """Runs changes of the index; changes that arrive during a commit share the next transaction.

    Arguments:
        connection: used by this object only.
        durable: commits sync the disk, so they run in a thread instead of the event loop.
    """

    def __init__(self, connection: sqlite3.Connection, *, durable: bool) -> None:
        self._connection = connection
        self._thread = ThreadPoolExecutor(1, "commit") if durable else None
        self._turn = asyncio.Lock()
        self._pending: list[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]] = []

    async def run(self, change: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a change in a transaction, and return its result after the commit.

        Raises:
            sqlite3.Error: the commit failed, and no change of the group took effect.
            Exception: the change raised it; the other changes of the group are not affected.
        """
        result: Future[_T] = Future()
        self._pending.append((change, result))
        async with self._turn:
            if not result.done():
                group, self._pending = self._pending, []
                if self._thread is None:
                    self._commit(group)
                else:
                    await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, group)
        return result.result()

    def close(self) -> None:
        """Finish the current commit, and close the connection."""
        if self._thread is not None:
            self._thread.shutdown()
        self._connection.close()

    def _commit(self, group: list[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]]) -> None:
        outcomes: list[tuple[Future[Any], Any, Exception | None]] = []
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for change, result in group:
                connection.execute("SAVEPOINT change")
                try:
                    outcomes.append((result, change(connection), None))
                except Exception as exc:
                    if not connection.in_transaction:  # SQLite rolled everything back, for example on a full disk
                        raise
                    connection.execute("ROLLBACK TO change")
                    outcomes.append((result, None, exc))
                connection.execute("RELEASE change")
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            outcomes = [(result, None, exc) for _, result in group]
        finally:
            # An open transaction would contain, and could lose, every later change.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        for result, value, error in outcomes:
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

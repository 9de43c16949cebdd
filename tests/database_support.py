"""Databases, connections and waits for tests of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import backoff
import pytest

from pipeline.database import Connection, Database
from tests.services import StorageServer, execute, local_settings

SECONDS = 20.0
NO_STORAGE = StorageServer("http://127.0.0.1:1", "", "none", Path())
PASSWORD = "correct-horse-battery"


def door(url: str, environment: str = "local", **tuning: Any) -> Database:
    settings = local_settings(url, NO_STORAGE, "none", Path())
    return Database(replace(settings, environment=environment, tuning=replace(settings.tuning, **tuning)))


def ask(connection: Connection, query: str) -> Any:
    """Return the only value of a query, through the connection of a transaction."""
    with connection._send(query) as cursor:
        ((value,),) = cursor.fetchall()
    return value


def transact(database: Database, work: Callable[[Connection], object], timeout: float = 60) -> None:
    with database.transaction(timeout) as connection:
        work(connection)


@contextmanager
def recorded_statements() -> Iterator[list[str]]:
    """Record the names of the statements that are executed in the block."""
    asked: list[str] = []
    execute = Connection.execute

    def recorded(self: Connection, name: str, /, **values: object) -> Any:
        asked.append(name)
        return execute(self, name, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "execute", recorded)
        yield asked


@pytest.fixture
def database(empty_database_url: str) -> Iterator[Database]:
    """A door to a database with a table of numbers and texts."""
    execute(empty_database_url, "CREATE TABLE numbers (n integer PRIMARY KEY, word text)")
    with closing(door(empty_database_url)) as database:
        yield database


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Take the place of waiting between tries: note the bounds that each wait is drawn from."""
    noted: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        noted.append((low, high))
        return 0.0

    monkeypatch.setattr(backoff, "full_jitter", lambda value: uniform(0, value))
    return noted


def numbers(url: str) -> list[int]:
    return [int(str(n)) for (n,) in execute(url, "SELECT n FROM numbers ORDER BY n")]


def backend(connection: Connection) -> int:
    return int(ask(connection, "SELECT pg_backend_pid()"))

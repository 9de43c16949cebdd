"""Connections to PostgreSQL, and transactions.

The database may be behind a pooler in transaction mode, so no session state outlasts a transaction: settings are local,
and there is no session-level lock and no named prepared statement.

A round trip takes longer than most statements, so the driver is in autocommit mode: BEGIN and the settings are sent in
one message with the first statement, the marker with COMMIT (PostgreSQL manual, Multiple Statements in a Simple Query).
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import cache, partial
from typing import Any, TypeVar, cast

import backoff
import psycopg2
import sqlalchemy
import sqlalchemy.exc
from psycopg2 import extensions
from psycopg2.extras import NamedTupleCursor
from sqlalchemy.dialects.postgresql import psycopg2 as postgresql
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from pipeline.config import Settings
from pipeline.database.address import malformed_url, split_parameters
from pipeline.database.copy import CopySource, line_of
from pipeline.database.errors import connection_error, translated
from pipeline.database.queries import statement
from pipeline.errors import DatabaseError, DatabaseUnavailable

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_Block = AbstractContextManager[None]

_LONGEST_WAIT = 60.0
#: Seconds: how much longer than its timeout a statement is waited for; for one without a timeout; between two looks.
_MARGIN, _LONGEST_STATEMENT, _LOOK = 30.0, 12 * 3600.0, 5.0

_LOCAL_SETTINGS = {
    "lock_timeout": "60s",
    "idle_in_transaction_session_timeout": "0",
    # A transaction whose client machine crashed holds its locks until the server notices, by default after two hours.
    # PostgreSQL ignores these settings on a Unix socket.
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}

#: Of each connection; the encoding is that of COPY lines, and overrides the URL and PGCLIENTENCODING.
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
_NUMBERS: dict[str, Any] = {"connect_timeout": 10, **_KEEPALIVES}


class Connection:
    """A connection in a transaction; runs statements of `pipeline.database.queries` by name, rows are named tuples."""

    def __init__(
        self, driver: extensions.connection, begin: str, command: Callable[[str], str], bounded: Callable[[], _Block]
    ) -> None:
        self.command = command  # returns a command line of ours for this environment
        self._driver, self._bounded = driver, bounded
        self._queued = begin.encode()
        self._is_begun = False
        self._streams = itertools.count(1)
        #: The server's process id as sent when the connection was opened; a pooler sends its own.
        self.named_backend = driver.get_backend_pid()

    def execute(self, name: str, /, **parameters: object) -> Sequence[Any]:
        """Run a statement and return its rows."""
        cursor = self._send(_text(name), parameters)
        return cursor.fetchall() if cursor.description else []

    def one(self, name: str, /, **parameters: object) -> Any:
        """Run a statement and return its only row."""
        (row,) = self.execute(name, **parameters)
        return row

    def enqueue(self, name: str, /, **parameters: object) -> None:
        """Send a statement in one message with the next statement or the commit; its rows are discarded."""
        with translated(self.command):
            self._queued += self._driver.cursor().mogrify(_text(name), parameters) + b";\n"

    def stream(self, name: str, /, **parameters: object) -> Iterator[Any]:
        """Run a statement with a server-side cursor and yield its rows, fetched a thousand at a time."""
        stream = f"stream{next(self._streams)}"
        self._send(f"DECLARE {stream} NO SCROLL CURSOR FOR {_text(name)}", parameters)
        while rows := self._send(f"FETCH 1000 FROM {stream}").fetchall():
            yield from rows

    def run_script(self, text: str) -> None:
        """Run the statements of a text without parameters."""
        self._send(text)

    def copy_in(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
        """COPY rows, each of values that `line_of` takes, into a table; return their number."""
        return self.copy_lines(table, columns, map(line_of, rows))

    def copy_lines(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> int:
        """COPY lines in the text format of COPY, UTF-8, one or several an item; return the number of rows."""
        source = CopySource(lines)
        if self._queued:
            self._send("")
        cursor = self._driver.cursor()
        try:
            with self._bounded():
                cursor.copy_expert(f"COPY {table} ({', '.join(columns)}) FROM STDIN", source, size=CopySource.CHUNK)
        except psycopg2.Error as exc:
            if source.failure is not None:  # the driver keeps only its message
                raise source.failure from exc
            raise
        return cursor.rowcount

    def _send(self, text: str, parameters: Mapping[str, object] | None = None) -> NamedTupleCursor:
        """Send statements in one message, after the queued ones; return the cursor of the last one."""
        # After the end of the transaction, the statements would run outside of one.
        if self._is_begun and self._driver.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE:
            raise DatabaseUnavailable("The transaction was ended by PostgreSQL.", "Run the same command again.")
        with translated(self.command), self._bounded():
            cursor = self._driver.cursor(cursor_factory=NamedTupleCursor)
            message = self._queued + (cursor.mogrify(text, parameters) if text else b"")
            self._queued, self._is_begun = b"", True
            cursor.execute(message)  # type: ignore[no-untyped-call]
        return cursor

    def commit(self) -> None:
        """Commit; raise DatabaseError if the server rolled back because an ignored statement had failed."""
        if self._send("COMMIT").statusmessage != "COMMIT":
            raise DatabaseError("PostgreSQL rolled the transaction back.", "Look for an error above.")


def _roll_back(driver: extensions.connection) -> None:
    if driver.info.transaction_status != extensions.TRANSACTION_STATUS_IDLE:
        driver.cursor().execute("ROLLBACK")


def _end_overdue(closed: threading.Event, deadlines: Mapping[extensions.connection, float]) -> None:
    """End the connection of a statement past its deadline: the server, which ends it in time, is silent."""
    while not closed.wait(_LOOK):
        for driver, deadline in list(deadlines.items()):
            if time.monotonic() > deadline:
                # libpq sees the end of its connection.
                with suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(driver.fileno())) as door:
                    door.shutdown(socket.SHUT_RDWR)


@cache
def _text(name: str) -> str:
    """Return a statement with its parameters in the syntax of the driver."""
    return str(sqlalchemy.text(statement(name)).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]


def _begin(timeout: float, *, read_only: bool) -> str:
    settings = {"statement_timeout": str(int(timeout * 1000)), **_LOCAL_SETTINGS}
    calls = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"BEGIN{' ISOLATION LEVEL REPEATABLE READ READ ONLY' if read_only else ''};\nSELECT {calls};\n"


class Database:
    """A pool of connections, opened at the first use, and transactions with retries."""

    def __init__(self, settings: Settings, application: str = "pipeline") -> None:
        self._settings, self._application = settings, application
        self.command = settings.command  # returns a command line of ours that works with this database
        self.connections = settings.tuning.connection_pool_size
        self._pool: QueuePool | None = None
        self._pid = 0
        self._broke = 0.0
        self._opened: weakref.WeakKeyDictionary[extensions.connection, float] = weakref.WeakKeyDictionary()
        self._deadlines: dict[extensions.connection, float] = {}  # of statements that run
        self._closed = threading.Event()

    def pool(self) -> QueuePool:
        """Return the pool of this process; one inherited through a fork is neither used nor closed."""
        if self._pool is None or self._pid != os.getpid():
            create, events = cast(Any, self._connect), [(self._on_checkout, "checkout"), (self._on_reset, "reset")]
            self._pool = QueuePool(create, self.connections, max_overflow=0, reset_on_return=None, events=events)
            self._pid, self._closed, self._deadlines = os.getpid(), threading.Event(), {}
            arguments = self._closed, self._deadlines
            threading.Thread(target=_end_overdue, args=arguments, name="statements", daemon=True).start()
        return self._pool

    @contextmanager
    def _bounded(self, driver: extensions.connection, seconds: float) -> Iterator[None]:
        """Limit how long a statement of the block is waited for."""
        self._deadlines[driver] = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadlines.pop(driver, None)

    def _on_checkout(self, driver: Any, *_: object) -> None:
        if self._opened[driver] <= self._broke:
            raise sqlalchemy.exc.DisconnectionError  # the pool then reconnects

    def _on_reset(self, _: object, record: ConnectionPoolEntry, __: object) -> None:
        """Roll back a transaction that is still open when its connection is returned, as after two interrupts."""
        _roll_back(cast(extensions.connection, record.driver_connection))

    def _connect(self) -> extensions.connection:
        dsn, _ = split_parameters(self._settings.database_url.reveal())
        ours: dict[str, Any] = {**_NUMBERS, "client_encoding": "UTF8", "application_name": self._application}
        try:
            for name, value in extensions.parse_dsn(dsn).items():
                if name in _NUMBERS and not re.fullmatch(r"\s*[-+]?\d+\s*", value):  # which libpq does not see
                    raise psycopg2.OperationalError(f'invalid integer value "{value}" for connection option "{name}"')
            connection: extensions.connection = psycopg2.connect(dsn, **ours)
        except psycopg2.ProgrammingError as exc:
            raise malformed_url(exc, dsn) from None
        except psycopg2.OperationalError as exc:
            raise connection_error(exc, dsn, self._settings.environment) from exc
        connection.autocommit = True  # `Connection` manages transactions
        self._opened[connection] = time.monotonic()
        return connection

    def close(self) -> None:
        """Close the connections of this process."""
        if self._pool is not None and self._pid == os.getpid():
            self._closed.set()
            self._pool.dispose()
        self._pool = None

    def cancel_statements(self) -> None:
        """Cancel the running statements, from another thread: Python handles no signal while libpq waits."""
        for connection in list(self._opened):
            if not connection.closed:
                with suppress(psycopg2.Error):  # the statement has ended
                    connection.cancel()

    @contextmanager
    def transaction(self, timeout: float = 60.0, *, read_only: bool = False, keep: bool = True) -> Iterator[Connection]:
        """Begin a transaction and commit it at the end of the block, or roll it back when the block raises.

        The timeout is for a statement, in seconds; 0 for none. With `read_only`, all statements see the same snapshot;
        without `keep`, the transaction is rolled back at the end. Raises DatabaseUnavailable without a connection and
        after a transient error (the outcome of a commit is then unknown), DatabaseError if a statement is refused.
        """
        with translated(self.command), closing(self.pool().connect()) as pooled:
            driver = cast(extensions.connection, pooled.driver_connection)
            bounded = partial(self._bounded, driver, timeout + _MARGIN if timeout else _LONGEST_STATEMENT)
            connection = Connection(driver, _begin(timeout, read_only=read_only), self.command, bounded)
            try:
                yield connection
                if keep:
                    connection.commit()
                else:
                    _roll_back(driver)
            except BaseException:
                try:
                    with self._bounded(driver, _MARGIN):
                        _roll_back(driver)
                except psycopg2.Error:
                    # The connection is broken: report the error of the block instead. Most often the others are broken
                    # too, so none that was opened before is used again.
                    self._broke = time.monotonic()
                    pooled.invalidate()
                raise

    def run(
        self, work: Callable[[Connection], Result], timeout: float = 60.0, *, read_only: bool = False, keep: bool = True
    ) -> Result:
        """Run `work` in a transaction, and again after a transient error, also of the commit: it finds its marker."""
        tuning = self._settings.tuning

        @backoff.on_exception(
            backoff.expo,
            DatabaseUnavailable,
            max_tries=tuning.retry_max_attempts + 1,
            on_backoff=lambda one: logger.warning("%s Trying again in %.1f s.", one["exception"].message, one["wait"]),
            jitter=backoff.full_jitter,
            logger=None,
            base=tuning.retry_backoff_factor,
            max_value=_LONGEST_WAIT,
        )
        def attempt() -> Result:
            with self.transaction(timeout, read_only=read_only, keep=keep) as connection:
                return work(connection)

        return attempt()

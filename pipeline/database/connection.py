"""Connections to PostgreSQL, and transactions.

Nothing here lives longer than a transaction on the server: settings are local, and there is no session-level lock and
no named prepared statement, because the database may be behind a pooler in transaction mode. A pool belongs to the
process that made it, because a connection does not survive a fork.

A round trip takes longer than most statements. So the driver is in autocommit mode and transactions are managed here:
BEGIN and the settings are sent with the first statement, the marker with COMMIT, each in one message (PostgreSQL
manual, Message Flow, Multiple Statements in a Simple Query).
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import Any, TypeVar, cast

import backoff
import psycopg2
import psycopg2.extensions
import sqlalchemy
import sqlalchemy.event
import sqlalchemy.exc
from psycopg2.extensions import (
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
)
from psycopg2.extras import NamedTupleCursor
from sqlalchemy.dialects.postgresql import psycopg2 as postgresql
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from pipeline.config import Settings
from pipeline.database.copy import CopySource, line_of
from pipeline.database.errors import connection_error, connection_string, malformed_url, translated
from pipeline.database.queries import statement
from pipeline.errors import DatabaseError, DatabaseUnavailable
from pipeline.observe.logger import get_logger

logger = get_logger(__name__)

Result = TypeVar("Result")

MINIMUM_VERSION = 140000
_LONGEST_WAIT = 60.0

_LOCAL_SETTINGS = {
    "lock_timeout": "60s",
    "idle_in_transaction_session_timeout": "0",
    # A client whose machine has vanished in a transaction keeps its locks from everybody else until the server notices,
    # which with most systems' defaults takes two hours. A server that is reached by a socket of its machine ignores it.
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}

_IN_TRANSACTION = (TRANSACTION_STATUS_INTRANS, TRANSACTION_STATUS_INERROR)


class Connection:
    """A connection in a transaction; `execute` takes the name of a statement of `pipeline.database.queries`.

    Rows are named tuples.
    """

    def __init__(self, driver: psycopg2.extensions.connection, begin: str) -> None:
        self._driver = driver
        self._begin = begin.encode()
        self._is_begun = False
        self._queued = b""
        self._streams = itertools.count(1)

    @property
    def named_backend(self) -> int:
        """Return the server's process as the protocol named it when the connection began; a pooler names its own."""
        return int(self._driver.get_backend_pid())

    def execute(self, name: str, /, **parameters: object) -> Sequence[Any]:
        """Run the statement `name` and return its rows, an empty list when it returns none."""
        with self._run(name, parameters) as cursor:
            return cursor.fetchall() if cursor.description else []

    def one(self, name: str, /, **parameters: object) -> Any:
        """Run the statement `name`, which returns exactly one row."""
        (row,) = self.execute(name, **parameters)
        return row

    def count(self, name: str, /, **parameters: object) -> int:
        """Run the statement `name` and return how many rows it affected."""
        with self._run(name, parameters) as cursor:
            return int(cursor.rowcount)

    def enqueue(self, name: str, /, **parameters: object) -> None:
        """Put the statement `name`, whose rows nobody needs, into the message of what comes next, be it the commit."""
        with translated(), self._driver.cursor() as cursor:
            self._queued += cursor.mogrify(_text(name), parameters) + b";\n"

    def stream(self, name: str, /, **parameters: object) -> Iterator[Any]:
        """Run the statement `name` through a cursor of the server and yield its rows, a thousand at a time."""
        stream = f"stream{next(self._streams)}"
        self._send(f"DECLARE {stream} NO SCROLL CURSOR FOR {_text(name)}", parameters).close()
        while True:
            with self._send(f"FETCH 1000 FROM {stream}") as cursor:
                rows = cursor.fetchall()
            if not rows:
                break
            yield from rows
        self._send(f"CLOSE {stream}").close()

    def run_script(self, text: str) -> None:
        """Run statements as they are, without parameters."""
        self._send(text).close()

    def copy_in(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
        """COPY rows into a table from an iterable, without holding them; return their number.

        A value is None, str, bytes (a text in UTF-8), int, float, bool, or a list or tuple of such, bytes excepted (an
        array).
        """
        return self.copy_lines(table, columns, map(line_of, rows))

    def copy_lines(self, table: str, columns: Sequence[str], lines: Iterable[bytes]) -> int:
        """COPY what is in the text format of COPY already, UTF-8, one line or several at a time; return the rows."""
        source = CopySource(lines)
        if self._queued or not self._is_begun:
            self._send("").close()
        with self._driver.cursor() as cursor:
            try:
                cursor.copy_expert(f"COPY {table} ({', '.join(columns)}) FROM STDIN", source, size=CopySource.CHUNK)
            except psycopg2.Error as exc:
                if source.failure is not None:  # of which the driver keeps only the words
                    raise source.failure from exc
                raise
            return int(cursor.rowcount)

    def _run(self, name: str, parameters: Mapping[str, object]) -> NamedTupleCursor:
        return self._send(_text(name), parameters)

    def _send(self, text: str, parameters: Mapping[str, object] | None = None) -> NamedTupleCursor:
        """Send statements in one message with what is queued, BEGIN before the first; give the cursor of the last.

        Raises:
            DatabaseUnavailable: the transaction has ended without us; what came now would be in none.
        """
        if self._is_begun and self._driver.info.transaction_status not in _IN_TRANSACTION:
            raise DatabaseUnavailable("The transaction was ended by PostgreSQL.", "Run the same command again.")
        with translated():
            cursor = self._driver.cursor(cursor_factory=NamedTupleCursor)
            try:
                bound = cursor.mogrify(text, parameters) if text else b""
                message = (b"" if self._is_begun else self._begin) + self._queued + bound
                self._queued, self._is_begun = b"", True
                cursor.execute(message)  # type: ignore[no-untyped-call]
            except BaseException:
                cursor.close()
                raise
        return cursor

    def commit(self) -> None:
        """End the transaction; nothing is sent where nothing was.

        Raises:
            DatabaseError: the server rolled it back, as after a failed statement whose error was passed over.
        """
        if not self._is_begun and not self._queued:
            return
        with self._send("COMMIT") as cursor:
            if cursor.statusmessage != "COMMIT":
                raise DatabaseError("PostgreSQL rolled the transaction back.", "Look for an error above.")

    def roll_back(self) -> None:
        """End the transaction and undo what it did."""
        self._queued = b""
        _end(self._driver)


def _end(driver: psycopg2.extensions.connection) -> None:
    """Roll a transaction back, if there is one."""
    if driver.info.transaction_status != TRANSACTION_STATUS_IDLE:
        with driver.cursor() as cursor:
            cursor.execute("ROLLBACK")


@cache
def _text(name: str) -> str:
    """Return a statement with its parameters as the driver writes them."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return str(sqlalchemy.text(statement(name)).compile(dialect=dialect))


def _begin(timeout: float, *, read_only: bool) -> str:
    """Return the statements that begin a transaction; `set_config` for all settings is one, and local."""
    settings = {"statement_timeout": str(int(timeout * 1000)), **_LOCAL_SETTINGS}
    calls = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"BEGIN{' ISOLATION LEVEL REPEATABLE READ READ ONLY' if read_only else ''};\nSELECT {calls};\n"


class Database:
    """The database of a run; cheap to make, connects at the first use."""

    def __init__(self, settings: Settings, application: str = "pipeline") -> None:
        self._settings = settings
        self._application = application
        self._pool: QueuePool | None = None
        self._pid = 0
        self._broke = 0.0
        self._opened: weakref.WeakSet[psycopg2.extensions.connection] = weakref.WeakSet()

    @property
    def connections(self) -> int:
        """Return how many connections this process may have at once."""
        return self._settings.tuning.connection_pool_size

    def pool(self) -> QueuePool:
        """Return the pool of this process; one that was inherited through a fork is neither used nor closed."""
        if self._pool is None or self._pid != os.getpid():
            self._pool = QueuePool(
                cast(Any, self._connect), pool_size=self.connections, max_overflow=0, reset_on_return=None
            )
            sqlalchemy.event.listen(self._pool, "connect", self._on_connect)
            sqlalchemy.event.listen(self._pool, "checkout", self._on_checkout)
            sqlalchemy.event.listen(self._pool, "reset", self._on_reset)
            self._pid = os.getpid()
        return self._pool

    def _on_connect(self, driver: psycopg2.extensions.connection, record: ConnectionPoolEntry) -> None:
        driver.autocommit = True  # transactions are managed by `Connection`
        record.info["since"] = time.monotonic()

    def _on_checkout(self, _: object, record: ConnectionPoolEntry, __: object) -> None:
        if record.info["since"] <= self._broke:
            raise sqlalchemy.exc.DisconnectionError  # the pool then connects anew

    def _on_reset(self, driver: Any, *_: object) -> None:
        """End a transaction that is still open when its connection is returned, as after two interrupts."""
        _end(getattr(driver, "driver_connection", driver))

    def _connect(self) -> psycopg2.extensions.connection:
        dsn = connection_string(self._settings.database_url.reveal())
        try:
            connection = psycopg2.connect(
                dsn,
                connect_timeout=10,
                application_name=self._application,
                keepalives_idle=30,
                keepalives_interval=10,
                keepalives_count=3,
                tcp_user_timeout=60_000,
                client_encoding="UTF8",  # of the lines for COPY, whatever the address or PGCLIENTENCODING says
            )
        except psycopg2.ProgrammingError as exc:
            raise malformed_url(exc) from exc
        except psycopg2.OperationalError as exc:
            raise connection_error(exc, dsn, self._settings.environment) from exc
        self._opened.add(connection)
        return connection

    def close(self) -> None:
        """Close the connections of this process."""
        if self._pool is not None and self._pid == os.getpid():
            self._pool.dispose()
        self._pool = None

    def cancel_statements(self) -> None:
        """Cancel what runs in PostgreSQL, from another thread: Python handles no signal while libpq waits."""
        for connection in list(self._opened):
            if not connection.closed:
                with suppress(psycopg2.Error):  # it ended meanwhile
                    connection.cancel()

    @contextmanager
    def transaction(self, timeout: float = 60.0, *, read_only: bool = False, keep: bool = True) -> Iterator[Connection]:
        """Begin a transaction and commit it at the end of the block, or roll it back when the block raises.

        Arguments:
            timeout: seconds that one statement may take; 0 for no bound.
            read_only: refuse writes, and see one moment of the database throughout.
            keep: commit; else the block only finds out what it would do, and is rolled back.

        Raises:
            DatabaseUnavailable: no connection, or an error that may go away; the outcome of a commit is then unknown.
            DatabaseError: the statement is refused.
        """
        with translated(), closing(self.pool().connect()) as pooled:
            driver = pooled.driver_connection
            assert driver is not None
            connection = Connection(driver, _begin(timeout, read_only=read_only))
            try:
                yield connection
                if keep:
                    connection.commit()
                else:
                    connection.roll_back()
            except BaseException:
                try:
                    connection.roll_back()
                except psycopg2.Error:
                    # A connection that broke has nothing to roll back; the error of the block is what counts. Most
                    # often the others broke in the same moment, so those of the pool are not used again.
                    self._broke = time.monotonic()
                    pooled.invalidate()
                raise

    def run(
        self, work: Callable[[Connection], Result], timeout: float = 60.0, *, read_only: bool = False, keep: bool = True
    ) -> Result:
        """Run `work` in a transaction, and again from its start after a transient error.

        An error at the commit leaves open whether it happened: `work` looks for its own traces first (a marker).
        """
        tuning = self._settings.tuning

        def attempt() -> Result:
            with self.transaction(timeout, read_only=read_only, keep=keep) as connection:
                return work(connection)

        try:
            return attempt()
        except DatabaseUnavailable as exc:
            failed: list[DatabaseUnavailable] = [exc]  # most calls succeed at once, and need no retry to be set up

        def again() -> Result:
            if failed:
                raise failed.pop()
            return attempt()

        retry = backoff.on_exception(
            backoff.expo,
            DatabaseUnavailable,
            max_tries=tuning.retry_max_attempts + 1,
            on_backoff=_log_retry,
            jitter=backoff.full_jitter,
            logger=None,
            base=tuning.retry_backoff_factor,
            max_value=_LONGEST_WAIT,
        )
        result: Result = retry(again)()
        return result


def _log_retry(details: Any) -> None:
    logger.warning("%s Trying again in %.1f s (%d).", details["exception"].message, details["wait"], details["tries"])

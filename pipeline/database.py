"""The one door to PostgreSQL: connections, transactions, COPY, and what an error means.

Nothing here lives longer than a transaction on the server: local settings only, no session-level lock, no named
prepared statement, for the database may sit behind a pooler in transaction mode. Engines belong to the process that
made them (keyed by its pid), because a connection does not survive a fork.

A round trip takes longer than most statements, so the driver is told to leave transactions alone: BEGIN and the
settings go with the first statement, the marker with COMMIT, each in one message (PostgreSQL manual, Message Flow,
Multiple Statements in a Simple Query).
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import unquote

import psycopg2
import psycopg2.extensions
import sqlalchemy
import sqlalchemy.exc
from psycopg2.extensions import (
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
)
from psycopg2.extras import NamedTupleCursor
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2

from pipeline import sql
from pipeline.config import Settings, redact
from pipeline.errors import (
    AccessDenied,
    DatabaseError,
    DatabaseUnavailable,
    PipelineError,
    RefusedError,
    SettingsError,
)
from pipeline.logger import get_logger

logger = get_logger(__name__)

Result = TypeVar("Result")

#: SQLSTATE of our own refusals, raised by ingest.refuse_referenced().
REFERENCED = "IN001"
MINIMUM_VERSION = 140000

# SQLSTATE classes and codes that may go away unchanged (PostgreSQL manual, appendix A).
_TRANSIENT_CLASSES = ("08",)
_TRANSIENT_CODES = frozenset(
    {"40001", "40P01", "53300", "53400", "55P03", "57P01", "57P02", "57P03", "57P05", "25P03", "25P04"}
)
# Parameters that other tools put into DATABASE_URL and libpq does not know (Prisma, node-postgres).
_FOREIGN_PARAMETERS = frozenset(
    {"pgbouncer", "connection_limit", "pool_timeout", "schema", "statement_cache_size", "prepared_statements"}
)


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

#: The connections that this process, or the one it was forked from, has opened.
_opened: weakref.WeakSet[psycopg2.extensions.connection] = weakref.WeakSet()


class Connection:
    """A connection in a transaction; `execute` takes the name of a file in `pipeline/sql`.

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
        """Run the statement `name` and return how many rows it touched."""
        with self._run(name, parameters) as cursor:
            return int(cursor.rowcount)

    def enqueue(self, name: str, /, **parameters: object) -> None:
        """Put the statement `name`, whose rows nobody needs, into the message of what comes next, be it the commit."""
        with _translated(), self._driver.cursor() as cursor:
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
        source = _CopySource(lines)
        if self._queued or not self._is_begun:
            self._send("").close()
        with self._driver.cursor() as cursor:
            try:
                cursor.copy_expert(f"COPY {table} ({', '.join(columns)}) FROM STDIN", source, size=_CopySource.CHUNK)
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
        with _translated():
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


class _CopySource:
    """A readable file over lines in the text format of COPY (PostgreSQL manual, COPY, File Formats)."""

    #: What libpq sends at once: while the server is at it, the next lines are made.
    CHUNK = 1 << 13

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self.failure: BaseException | None = None

    def read(self, size: int = CHUNK) -> bytes:
        """Return whole lines of about `size` bytes together, nothing at the end; psycopg2 takes longer ones too."""
        try:
            return self._read(size)
        except BaseException as exc:
            self.failure = exc
            raise

    def _read(self, size: int) -> bytes:
        lines = []
        length = 0
        for line in self._lines:
            lines.append(line)
            length += len(line)
            if length >= size:
                break
        return b"".join(lines)

    def readline(self, size: int = CHUNK) -> bytes:
        """Return the same as `read`: the driver asks for a file, and uses `read` only."""
        return self.read(size)


def line_of(row: Sequence[object]) -> bytes:
    """Return a row, of values that `copy_in` takes, as a line for `copy_lines`."""
    return b"\t".join([_FORMATS[value.__class__](value) for value in row]) + b"\n"


def _escaped(text: bytes) -> bytes:
    # Most texts need nothing, and to look for a letter is many times cheaper than translate().
    if b"\\" in text:
        text = text.replace(b"\\", b"\\\\")
    if b"\t" in text:
        text = text.replace(b"\t", b"\\t")
    if b"\n" in text:
        text = text.replace(b"\n", b"\\n")
    if b"\r" in text:
        text = text.replace(b"\r", b"\\r")
    return text


def _array(values: Sequence[object]) -> bytes:
    return _escaped(f"{{{','.join(map(_element, values))}}}".encode())


class _Formats(dict[type, Callable[[Any], bytes]]):
    """What makes a field of a value, by its type: looked up for every value, and found out for the first of a type."""

    def __missing__(self, kind: type) -> Callable[[Any], bytes]:
        made = next((self[known] for known in (str, list, tuple) if issubclass(kind, known)), _plain)
        self[kind] = made
        return made


def _plain(value: object) -> bytes:
    return str(value).encode()


_FORMATS = _Formats()
_FORMATS[str] = lambda text: _escaped(text.encode())
_FORMATS[bytes] = _escaped
_FORMATS[int] = lambda number: b"%d" % number
_FORMATS[type(None)] = lambda _: rb"\N"
_FORMATS[list] = _FORMATS[tuple] = _array


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


class Dialect(PGDialect_psycopg2):
    """PostgreSQL through psycopg2, without the five questions that SQLAlchemy asks over a process's first connection.

    It would need the answers for SQL that it writes itself; all of ours is written in `pipeline/sql`.
    """

    supports_statement_cache = True

    def initialize(self, connection: sqlalchemy.Connection) -> None:
        """Fill in what is true of every server that we take."""
        self.default_schema_name = "public"
        self.default_isolation_level = "READ COMMITTED"
        self._backslash_escapes = False

    def do_rollback(self, dbapi_connection: Any) -> None:
        """End a transaction that is open still when its connection goes back to the pool, as after two interrupts."""
        _end(getattr(dbapi_connection, "driver_connection", dbapi_connection))


registry.register("postgresql.pipeline", __name__, Dialect.__name__)


@cache
def _text(name: str) -> str:
    """Return a statement with its parameters as the driver writes them."""
    dialect = Dialect()  # type: ignore[no-untyped-call]
    return str(sqlalchemy.text(sql.statement(name)).compile(dialect=dialect))


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
        self._engine: sqlalchemy.Engine | None = None
        self._pid = 0
        self._broke = 0.0

    @property
    def connections(self) -> int:
        """Return how many connections this process may have at once."""
        return self._settings.tuning.connection_pool_size

    def engine(self) -> sqlalchemy.Engine:
        """Return the engine of this process; the one inherited through a fork is left alone, never used or closed."""
        if self._engine is None or self._pid != os.getpid():
            self._engine = sqlalchemy.create_engine(
                "postgresql+pipeline://",
                creator=self.connect,
                pool_size=self._settings.tuning.connection_pool_size,
                max_overflow=0,
                use_native_hstore=False,
            )
            sqlalchemy.event.listen(self._engine, "connect", self._connected)
            sqlalchemy.event.listen(self._engine, "checkout", self._checked_out)
            self._pid = os.getpid()
        return self._engine

    def _connected(self, driver: psycopg2.extensions.connection, record: sqlalchemy.pool.ConnectionPoolEntry) -> None:
        driver.autocommit = True  # which is to say: transactions are ours
        record.info["since"] = time.monotonic()

    def _checked_out(self, _: object, record: sqlalchemy.pool.ConnectionPoolEntry, __: object) -> None:
        if record.info["since"] <= self._broke:
            raise sqlalchemy.exc.DisconnectionError  # which has the pool connect anew in its place

    def connect(self) -> psycopg2.extensions.connection:
        """Open one connection outside the pool, with the errors of this module."""
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
                client_encoding="UTF8",  # COPY is written in it, whatever the address or PGCLIENTENCODING says
            )
            _opened.add(connection)
            return connection
        except psycopg2.ProgrammingError as exc:
            raise SettingsError(
                f"DATABASE_URL is not understood: {_sentence(exc)}", "Copy it again from Connect in the dashboard."
            ) from exc
        except psycopg2.OperationalError as exc:
            raise _connection_error(exc, dsn, self._settings.environment) from exc

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
        self._engine = None

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
        with _translated(), closing(self.engine().raw_connection()) as pooled:
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
                    # On a connection that broke there is nothing to roll back; the error of the block is what counts.
                    # Most often the others broke in the same moment, so those of the pool are not used again.
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
        attempt = 0
        while True:
            try:
                with self.transaction(timeout, read_only=read_only, keep=keep) as connection:
                    return work(connection)
            except DatabaseUnavailable as exc:
                if attempt >= tuning.retry_max_attempts:
                    raise
                ceiling = min(tuning.retry_backoff_factor**attempt, 60.0)
                wait = random.uniform(0, ceiling)
                attempt += 1
                logger.warning("%s Trying again in %.1f s (%d).", exc.message, wait, attempt)
                time.sleep(wait)


def cancel_statements() -> None:
    """Cancel what this process runs in PostgreSQL, from another thread: while libpq waits, Python gets no turn."""
    for connection in list(_opened):
        if not connection.closed:
            with suppress(psycopg2.Error):  # it ended meanwhile
                connection.cancel()


def connection_string(url: str) -> str:
    """Return the address for libpq: without the parameters that only other drivers know."""
    if not url.startswith("postgresql://"):
        return url
    # Cut by hand: urlunsplit drops an empty host. Left as it is written: libpq decodes %20 and not the plus sign.
    address, mark, query = url.partition("?")
    kept = [part for part in query.split("&") if unquote(part.partition("=")[0]) not in _FOREIGN_PARAMETERS]
    return address + mark + "&".join(kept)


def address_of(url: str) -> tuple[str, int, str]:
    """Return host, port and user of a DATABASE_URL, its first host; an empty one, or a path, is that of a socket.

    Raises:
        SettingsError: it is not understood.
    """
    try:
        parameters = psycopg2.extensions.parse_dsn(connection_string(url))
    except psycopg2.ProgrammingError as exc:
        raise SettingsError(
            f"DATABASE_URL is not understood: {_sentence(exc)}", "Copy it again from Connect in the dashboard."
        ) from exc
    host = parameters.get("host") or os.environ.get("PGHOST") or ""
    port = parameters.get("port") or os.environ.get("PGPORT") or "5432"
    return host.split(",")[0], int(port.split(",")[0]), parameters.get("user") or os.environ.get("PGUSER") or ""


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlalchemy.exc.TimeoutError as exc:
        raise DatabaseUnavailable(
            "No database connection became free in 30 seconds.", "Raise connection_pool_size in luigi.cfg."
        ) from exc
    except psycopg2.Error as exc:
        raise _error_of(exc) from exc


def _sentence(exc: BaseException) -> str:
    text = redact(" ".join(str(exc).split())).split(" Is the server running")[0]
    return text if text.endswith((".", "?")) else f"{text}."


def _error_of(error: psycopg2.Error) -> PipelineError:
    code = error.pgcode or ""
    message = (error.diag.message_primary or "") if error.diag is not None else ""
    message = redact(message) or _sentence(error)
    if code == REFERENCED:
        return RefusedError(
            f"Refused: {message}.", "Remove those rows, or keep this batch; what readers see was not changed."
        )
    if code == "23503":
        return RefusedError(
            f"Refused: {message}.", "A row of another table references it; what readers see was not changed."
        )
    if code.startswith(_TRANSIENT_CLASSES) or code in _TRANSIENT_CODES:
        waited = code == "55P03"
        hint = "Another transaction held what this one needs, such as the commit of a large batch." if waited else ""
        return DatabaseUnavailable(f"PostgreSQL: {message} ({code}).", f"{hint} Run the same command again.".strip())
    if not code and isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
        return DatabaseUnavailable(f"The connection to PostgreSQL broke: {message}", "Run the same command again.")
    return DatabaseError(f"PostgreSQL: {message} ({code or type(error).__name__}).", _hint(code, message), code)


def _hint(code: str, message: str) -> str:
    if code == "57014":
        return "The statement took longer than allowed: look for a lock held by another session."
    if code in ("42P01", "3F000", "42883", "42703"):
        return "The schema is not up to date: run `python -m pipeline migrate`."
    if code in ("42501", "0A000"):
        return "DATABASE_URL must name the owner of the tables, on Supabase the user postgres, not a restricted role."
    if code == "25006":
        return "The database is read-only: it may be a replica, or its disk is full."
    if code == "53100":
        return "The disk of the database is full."
    return ""


def _connection_error(exc: psycopg2.OperationalError, dsn: str, environment: str) -> PipelineError:
    """Tell why no connection came about, by looking at the way to the server instead of at the text."""
    parameters = psycopg2.extensions.parse_dsn(dsn)
    host = parameters.get("host") or os.environ.get("PGHOST") or ""
    port = int((parameters.get("port") or "5432").split(",")[0])
    hint = (
        "Start it with `python -m pipeline up`."
        if environment == "embedded"
        else "Check that it runs and that a firewall lets you through."
    )
    if host and not host.startswith("/"):
        try:
            addresses = socket.getaddrinfo(host.split(",")[0], port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as unknown:
            if isinstance(unknown, socket.gaierror) and unknown.errno == socket.EAI_AGAIN:
                return DatabaseUnavailable(f"The address of the database host {host} cannot be looked up now.", hint)
            return AccessDenied(
                f"The database host {host} is unknown.",
                "Check DATABASE_URL for a typing error; a paused Supabase project loses its name as well.",
            )
        if all(family == socket.AF_INET6 for family, *_ in addresses):
            hint = (
                f"{host} has only an IPv6 address, which this network may not reach: use the session pooler's "
                "address from Connect in the dashboard (…pooler.supabase.com:5432)."
            )
        reachable = _reachable(addresses)
    else:
        reachable = _reachable([(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", f"{host or '/tmp'}/.s.PGSQL.{port}")])
    message = _sentence(exc)
    # Once the server answers, only its sentence tells a refusal from a bad moment. It decides the exit code, no retry.
    refusals = (
        "authentication failed",
        "no pg_hba.conf entry",
        "does not exist",
        "not found",
        "no password supplied",
        "not permitted to log in",
    )
    if reachable and any(words in message for words in refusals):
        return AccessDenied(
            f"PostgreSQL refuses the login: {message}", "Check the user and the password in DATABASE_URL."
        )
    return DatabaseUnavailable(f"PostgreSQL cannot be reached: {message}", hint)


def _reachable(addresses: Sequence[tuple[Any, ...]]) -> bool:
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(3)
            try:
                probe.connect(address)
            except OSError:
                continue
            return True
    return False

"""What an error of PostgreSQL means. The SQLSTATE decides (PostgreSQL manual, appendix A), never the text."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import psycopg2
import psycopg2.extensions
import sqlalchemy.exc

from pipeline.config import redact
from pipeline.errors import (
    AccessDenied,
    DatabaseError,
    DatabaseUnavailable,
    DataError,
    PipelineError,
    RefusedError,
    SettingsError,
)

#: SQLSTATE of our own refusals, raised by ingest.refuse_referenced().
REFERENCED = "IN001"

_FOREIGN_KEY_VIOLATION = "23503"
#: data_exception and integrity_constraint_violation: the rows themselves are refused, today and tomorrow.
_DATA_CLASSES = ("22", "23")
#: connection_exception, insufficient_resources (disk full, out of memory) and system_error pass by themselves.
_TRANSIENT_CLASSES = ("08", "53", "58")
#: Serialization failure, deadlock, lock not available, server shutdown and restart, idle timeouts.
_TRANSIENT_CODES = frozenset({"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "57P05", "25P03", "25P04"})
_TRANSIENT_HINTS = {
    "53100": "The disk of the database is full: free some space.",
    "53200": "The server of the database is out of memory.",
    "53300": "The database takes no more connections: lower connection_pool_size, or use the pooler.",
    "55P03": "Another transaction holds what this one needs, such as the commit of a large batch.",
}
# Parameters that other tools put into DATABASE_URL and libpq does not know (Prisma, node-postgres).
_FOREIGN_PARAMETERS = frozenset(
    {"pgbouncer", "connection_limit", "pool_timeout", "schema", "statement_cache_size", "prepared_statements"}
)


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
        raise malformed_url(exc) from exc
    host = parameters.get("host") or os.environ.get("PGHOST") or ""
    port = parameters.get("port") or os.environ.get("PGPORT") or "5432"
    return host.split(",")[0], int(port.split(",")[0]), parameters.get("user") or os.environ.get("PGUSER") or ""


@contextmanager
def translated() -> Iterator[None]:
    """Raise the errors of the driver and of the pool in the block as errors of the pipeline."""
    try:
        yield
    except sqlalchemy.exc.TimeoutError as exc:
        raise DatabaseUnavailable(
            "No database connection became free in 30 seconds.", "Raise connection_pool_size in luigi.cfg."
        ) from exc
    except psycopg2.Error as exc:
        raise error_of(exc) from exc


def sentence_of(exc: BaseException) -> str:
    """Return the text of an error as one sentence without secrets."""
    text = redact(" ".join(str(exc).split())).split(" Is the server running")[0]
    return text if text.endswith((".", "?")) else f"{text}."


def malformed_url(exc: psycopg2.ProgrammingError) -> SettingsError:
    """Return the error for a DATABASE_URL that libpq does not parse."""
    return SettingsError(
        f"DATABASE_URL is not understood: {sentence_of(exc)}", "Copy it again from Connect in the dashboard."
    )


def error_of(error: psycopg2.Error) -> PipelineError:
    """Return the error of the pipeline that an error of the driver means."""
    code = error.pgcode or ""
    message = (error.diag.message_primary or "") if error.diag is not None else ""
    message = redact(message) or sentence_of(error)
    if code == REFERENCED:
        return RefusedError(
            f"Refused: {message}.", "Remove those rows, or keep this batch; what readers see was not changed."
        )
    if code == _FOREIGN_KEY_VIOLATION:
        return RefusedError(
            f"Refused: {message}.", "A row of another table references it; what readers see was not changed."
        )
    if code.startswith(_TRANSIENT_CLASSES) or code in _TRANSIENT_CODES:
        hint = _TRANSIENT_HINTS.get(code, "")
        return DatabaseUnavailable(f"PostgreSQL: {message} ({code}).", f"{hint} Run the same command again.".strip())
    if not code and isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
        return DatabaseUnavailable(f"The connection to PostgreSQL broke: {message}", "Run the same command again.")
    kind = DataError if code.startswith(_DATA_CLASSES) else DatabaseError
    return kind(f"PostgreSQL: {message} ({code or type(error).__name__}).", _hint(code), code)


def _hint(code: str) -> str:
    if code == "57014":
        return "The statement took longer than allowed: look for a lock held by another session."
    if code in ("42P01", "3F000", "42883", "42703"):
        return "The schema is not up to date: run `python -m pipeline migrate`."
    if code in ("42501", "0A000"):
        return "DATABASE_URL must name the owner of the tables, on Supabase the user postgres, not a restricted role."
    if code == "25006":
        return "The database is read-only: it may be a replica, or its disk is full."
    return ""


def connection_error(exc: psycopg2.OperationalError, dsn: str, environment: str) -> PipelineError:
    """Return why no connection was made: the address and a probe of it decide, the text only between two exit codes."""
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
    message = sentence_of(exc)
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

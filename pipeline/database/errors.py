"""The pipeline's error for an error of PostgreSQL: the SQLSTATE decides (PostgreSQL manual, appendix A)."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2
import sqlalchemy.exc

from pipeline.config import command_line, redact
from pipeline.database.address import address_of, sentence_of
from pipeline.database.login import login_refusal
from pipeline.errors import AccessDenied, DatabaseError, DatabaseUnavailable, DataError, PipelineError, RefusedError

#: Of ingest.refuse_referenced(), and foreign_key_violation.
_REFERENCED, _FOREIGN_KEY_VIOLATION = "IN001", "23503"
#: data_exception and integrity_constraint_violation.
_DATA_CLASSES = ("22", "23")
#: connection_exception, insufficient_resources (disk full, out of memory) and system_error.
_TRANSIENT_CLASSES = ("08", "53", "58")
#: Serialization failure, deadlock, lock not available, server shutdown and restart, idle timeouts.
_TRANSIENT_CODES = frozenset({"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "57P05", "25P03", "25P04"})
#: What Supavisor sends for most of its refusals, at the first statement as well (internal_error, protocol_violation).
_OF_POOLERS = ("XX000", "08P01")
#: The file of the server that raises disk_full or out_of_memory where a segment of shared memory is what is full.
_SHARED_MEMORY = "dsm_impl.c"
#: How libpq shows what a server answers to a login: the severity is in the language of the server.
_ANSWER = re.compile(r" failed: \w+:  ")
_OURS = "ingest."  # the schema of all functions of the pipeline
_NOT_MIGRATED = "The schema is not up to date: run `{migrate}`."
_NOT_OWNER = "DATABASE_URL must name the owner of the tables, on Supabase the user postgres, not a restricted role."
_HINTS = {
    "53100": "The disk of the database is full: free some space.",
    _SHARED_MEMORY: "Enlarge /dev/shm on the database's server (Docker: --shm-size), or lower max_parallel_workers.",
    "53200": "The server of the database is out of memory.",
    "53300": "The database takes no more connections: lower connection_pool_size, or use the pooler.",
    "55P03": "Another transaction holds what this one needs, such as the commit of a large batch.",
    "57014": "The statement took longer than allowed: look for a lock held by another session.",
    **dict.fromkeys(("42P01", "3F000", "42883", "42703"), _NOT_MIGRATED),
    **dict.fromkeys(("42501", "0A000"), _NOT_OWNER),
    "25006": "The database is read-only: it may be a replica, or its disk is full.",
}


@contextmanager
def translated(command: Callable[[str], str]) -> Iterator[None]:
    """Raise errors of the driver and of the pool as errors of the pipeline."""
    try:
        yield
    except sqlalchemy.exc.TimeoutError as exc:
        hint = "Raise connection_pool_size in luigi.cfg."
        raise DatabaseUnavailable("No database connection became free in 30 seconds.", hint) from exc
    except psycopg2.Error as exc:
        raise _error_of(exc, command) from exc


@contextmanager
def references_refused() -> Iterator[None]:
    """Raise RefusedError where a statement of the block would delete a row that another table references."""
    try:
        yield
    except DataError as exc:
        if exc.code != _FOREIGN_KEY_VIOLATION or not isinstance(exc.__cause__, psycopg2.Error):
            raise
        hint = "A row of another table references it; what readers see was not changed."
        raise RefusedError(f"Refused: {_message_of(exc.__cause__)}.", hint) from exc


def _message_of(error: psycopg2.Error) -> str:
    return redact(error.diag.message_primary or "") or sentence_of(error)


def _error_of(error: psycopg2.Error, command: Callable[[str], str]) -> PipelineError:
    code, message = error.pgcode or "", _message_of(error)
    if code == _REFERENCED:
        hint = "Remove those rows, or keep this batch; what readers see was not changed."
        return RefusedError(f"Refused: {message}.", hint)
    # An error of the app, such as of a trigger, has a context.
    if code in _OF_POOLERS and not error.diag.context and (refusal := login_refusal(message)) is not None:
        return refusal
    hint = _HINTS.get(error.diag.source_file or "") or _HINTS.get(code, "").format(migrate=command("migrate"))
    if code.startswith(_TRANSIENT_CLASSES) or code in _TRANSIENT_CODES:
        return DatabaseUnavailable(f"PostgreSQL: {message} ({code}).", f"{hint} Run the same command again.".strip())
    if not code and isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
        return DatabaseUnavailable(f"The connection to PostgreSQL broke: {message}", "Run the same command again.")
    if function := _foreign_function(error.diag.context or ""):
        hint = f"The function {function} of the database, which is not one of the pipeline's, fails: correct it."
    kind = DataError if code.startswith(_DATA_CLASSES) else DatabaseError
    return kind(f"PostgreSQL: {message} ({code or type(error).__name__}).", hint, code)


def _foreign_function(context: str) -> str:
    """Return the innermost function of an error's context if it is not ours, such as a trigger function of the app.

    The lines are `PL/pgSQL function name(types) line 1 at …` in the language of the server, and quoted statements.
    """
    name = r'(?:"[^"]+"|\w+)'
    found = re.finditer(rf'((?:{name}\.)?{name})\(|"[^"]*"', context)
    function = next((one[1] for one in found if one[1]), "")
    return "" if function.startswith(_OURS) else function


def connection_error(exc: psycopg2.Error, dsn: str, environment: str) -> PipelineError:
    """Return the error for a connection that failed, by the text of libpq or the server, else by a lookup."""
    message = sentence_of(exc)
    if (refusal := login_refusal(message, is_answer=_ANSWER.search(str(exc)) is not None)) is not None:
        return refusal
    host, port, _ = address_of(dsn)
    hint = "Check that it runs and that a firewall lets you through."
    if environment == "embedded":
        hint = f"Start it with `{command_line('up')}`."
    if host and not host.startswith("/"):
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as unknown:
            if isinstance(unknown, socket.gaierror) and unknown.errno == socket.EAI_AGAIN:
                return DatabaseUnavailable(f"The address of the database host {host} cannot be looked up now.", hint)
            hint = "Check DATABASE_URL for a typing error; a paused Supabase project loses its name as well."
            return AccessDenied(f"The database host {host} is unknown.", hint)
        if ":" not in host and all(family == socket.AF_INET6 for family, *_ in addresses):
            hint = (
                f"{host} has only an IPv6 address, which this network may not reach: use the session pooler's "
                "address from Connect in the dashboard (…pooler.supabase.com:5432)."
            )
    return DatabaseUnavailable(f"PostgreSQL cannot be reached: {message}", hint)

"""The database: its network, a pooler, the role, the schema, limits, and unfinished batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import list_recorded
from pipeline.batches.resolve import next_step
from pipeline.batches.state import Batch
from pipeline.config import Settings, command_line
from pipeline.database import Connection, Database, address_of
from pipeline.database.migrate import pending
from pipeline.doctor.alarms import look_finding
from pipeline.doctor.clock import offset_of
from pipeline.doctor.facts import Facts
from pipeline.doctor.finding import PROBLEM, Finding, of_error, ok, problem, warning
from pipeline.doctor.network import SAMPLES, examine_route, latency_finding
from pipeline.doctor.obstacles import find_obstacles
from pipeline.errors import DatabaseError, DatabaseUnavailable, PipelineError, RefusedError
from pipeline.units import counted, duration, size

#: Time limit of a statement.
_SECONDS = 10.0
#: Time limit for a second connection, which a pooler may not have.
_WAIT_SECONDS = 5.0
_OLD = timedelta(days=7)
_SHOWN = 5
_TRANSACTION_PORT = 6543
_MINIMUM_VERSION = 140000
_APPLICATION = "pipeline doctor"
_OWNER = "DATABASE_URL must name the owner of the tables, on Supabase the user postgres."


def examine_database(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Yield findings about the database; only one problem if it does not respond."""
    try:
        host, port, _ = address_of(settings.database_url.reveal())
    except PipelineError as exc:
        yield of_error("database", exc)
        return
    # Without a host, libpq takes it from a service file or a default socket: the connection shows it.
    for finding in examine_route("the database", host, port, settings.environment == "embedded") if host else ():
        yield finding
        if finding.level == PROBLEM:
            return
    # A pool of one connection, so that all transactions use the same one.
    settings = replace(settings, tuning=replace(settings.tuning, connection_pool_size=1, retry_max_attempts=0))
    with closing(Database(settings, application=_APPLICATION)) as database:
        try:
            yield from _examine(settings, database, facts, port)
        except PipelineError as exc:
            yield of_error("database", exc)


def _examine(settings: Settings, database: Database, facts: Facts, port: int) -> Iterator[Finding]:
    server = database.run(lambda connection: connection.one("examine_server"), _SECONDS, read_only=True)
    yield version_finding(server.version)
    yield latency_finding("the database", database.run(lambda one: _ask(one, facts), _SECONDS, read_only=True))
    yield writable_finding(server.replica, server.read_only)
    tables = database.run(lambda connection: connection.execute("examine_tables"), _SECONDS, read_only=True)
    yield role_finding(server.role, server.temporary, tables)
    missing: Sequence[str] | None = None
    try:
        missing = database.run(lambda one: [m.label for m in pending(one)], _SECONDS, read_only=True)
        if missing and not (server.replica or server.read_only):
            yield from find_obstacles(database)
        yield migrations_finding(missing, settings.is_production)
    except (DatabaseError, RefusedError) as exc:
        yield of_error("migrations", exc)
    yield connections_finding(_room(server), facts.pool_size)
    yield timeouts_finding(server.statement_timeout, server.transaction_timeout)
    yield ok("size", f"The database holds {size(server.bytes)}.")
    if missing is not None:
        find = partial(_find_older_photo, migrated=not missing)
        facts.older_photo = database.run(find, _SECONDS, read_only=True)
    if missing == []:
        yield from _examine_batches(settings, database, facts)
    # Last, since it needs a second connection, which may not be available.
    try:
        yield pooler_finding(_observe_pooling(settings, database, port))
    except PipelineError as exc:
        yield of_error("pooler", exc)


def _ask(connection: Connection, facts: Facts) -> list[float]:
    """Return response times; take the clock's offset from the fastest response."""
    seconds: list[float] = []
    for _ in range(SAMPLES):
        sent, started = time.time(), time.perf_counter()
        now: datetime = connection.one("now").now
        taken = time.perf_counter() - started
        if not seconds or taken < min(seconds):
            facts.offsets["the database"] = offset_of(now.timestamp(), sent, sent + taken)
        seconds.append(taken)
    return seconds


def version_finding(version: int) -> Finding:
    """Return a finding about a server's version, such as 140005."""
    text = f"PostgreSQL {version // 10000}.{version % 10000}"
    if version < _MINIMUM_VERSION:
        return problem("version", f"The server is {text}.", f"Use PostgreSQL {_MINIMUM_VERSION // 10000} or newer.")
    return ok("version", f"The server is {text}.")


@dataclass(frozen=True)
class Pooling:
    """The server processes that served two connections.

    Attributes:
        named: the process id in the protocol's BackendKeyData; a pooler sends one of its own.
        processes: the process of each transaction of the first connection.
        others: those of a second connection, while the first one was open.
        application: the application_name that the server sees.
        port: of the address.
        second: the second connection was served at the same time.
        waited: the first connection had to wait while the second one was in a transaction.
    """

    named: int
    processes: tuple[int, ...]
    application: str
    port: int
    others: tuple[int, ...] = ()
    second: bool = True
    waited: bool = False


def _observe_pooling(settings: Settings, first: Database, port: int) -> Pooling:
    """Query the server process of one connection before and while another one is in a transaction.

    A pooler in transaction mode assigns server processes in turn, which the first queries detect, or assigns the one
    that became free last, which the second connection then gets.
    """
    held, over = threading.Event(), threading.Event()
    errors: list[PipelineError] = []
    others: list[int] = []

    def ask(connection: Connection) -> tuple[int, int, str]:
        behind = connection.one("examine_backend")
        return connection.named_backend, behind.pid, behind.application

    def hold() -> None:
        try:
            with closing(Database(settings, application=_APPLICATION)) as second:
                others.append(second.run(ask, _SECONDS, read_only=True)[1])
                found.append(first.run(ask, _SECONDS, read_only=True))
                with second.transaction(_SECONDS, read_only=True) as connection:
                    others.append(ask(connection)[1])
                    held.set()
                    over.wait(_SECONDS)
        except PipelineError as exc:
            errors.append(exc)
            held.set()

    found = [first.run(ask, _SECONDS, read_only=True) for _ in range(2)]

    def ask_again() -> None:
        with suppress(PipelineError):  # only the waiting matters
            found.append(first.run(ask, _SECONDS, read_only=True))

    holder, asker = (threading.Thread(target=work, name="pooler", daemon=True) for work in (hold, ask_again))
    holder.start()
    waited, second = False, held.wait(_WAIT_SECONDS)
    if second and not errors:
        asker.start()
        asker.join(_WAIT_SECONDS)
        waited = asker.is_alive()
        over.set()
        asker.join(_SECONDS)
    over.set()
    if errors:
        raise errors[0]
    named, _, application = found[0]
    return Pooling(named, tuple(pid for _, pid, _ in found), application, port, tuple(others), second, waited)


def pooler_finding(pooling: Pooling) -> Finding:
    """Return whether the connection is direct or goes through a pooler, and in which mode."""
    shared = set(pooling.processes) & set(pooling.others)
    by_behaviour = bool(shared) or len(set(pooling.processes)) > 1 or pooling.waited
    direct = pooling.named == pooling.processes[0] and not pooling.application.startswith("Supavisor")
    in_transactions = by_behaviour or (not direct and pooling.port == _TRANSACTION_PORT)
    if not pooling.second or pooling.waited:
        return problem(
            "pooler",
            f"The pooler before the database, in {'transaction' if in_transactions else 'session'} mode, has no second "
            f"server connection within {_WAIT_SECONDS:.0f} s; the lock of a run takes one alone.",
            "Raise the pooler's pool size, or close other clients; or use another address from Connect.",
            DatabaseUnavailable,
        )
    if in_transactions:
        detected = "by its behaviour" if by_behaviour else f"by its port, {_TRANSACTION_PORT}"
        return ok(
            "pooler",
            f"The database is behind a pooler in transaction mode ({detected}), which a load supports; the lock of a "
            "run and each COPY use one of the pooler's server connections.",
        )
    if direct:
        return ok("pooler", "The connection to the database is direct, without a pooler.")
    return ok(
        "pooler",
        "The database is behind a pooler in session mode: each connection of a load uses one of its server "
        "connections.",
    )


def writable_finding(replica: bool, read_only: bool) -> Finding:
    """Return whether the database accepts writes."""
    if replica:
        return problem("writes", "The server is a read replica.", "Use the address of the primary in DATABASE_URL.")
    if read_only:
        return problem(
            "writes",
            "Transactions are read-only by default; on Supabase, the project's disk may be full.",
            "Free space or enlarge the disk; else ALTER ROLE … SET default_transaction_read_only = off.",
            DatabaseError,
        )
    return ok("writes", "The database takes writes.")


def role_finding(role: str, temporary: bool, tables: Sequence[Any]) -> Finding:
    """Return which privileges of a load the role lacks: owning the tables, COPY, creating temporary tables."""
    wrong = []
    if not temporary:
        wrong.append("may not create temporary tables")
    for name, bad in (
        ("does not own", [table.name for table in tables if not table.owned]),
        ("may not COPY past the row-level security of", [table.name for table in tables if table.filtered]),
        ("may not write", [table.name for table in tables if not table.writable]),
    ):
        if bad:
            more = f" and {counted(len(bad) - 1, 'more table')}" if len(bad) > 1 else ""
            wrong.append(f"{name} {bad[0]}{more}")
    if wrong:
        return problem("role", f"The role {role} {', '.join(wrong)}.", _OWNER)
    return ok("role", f"The role {role} may do all that a load does.")


def migrations_finding(missing: Sequence[str], production: bool) -> Finding:
    """Return whether the schema is up to date."""
    if not missing:
        return ok("migrations", "The schema is up to date.")
    return problem(
        "migrations",
        f"{counted(len(missing), 'migration is', 'migrations are')} pending, the first is {missing[0]}.",
        f"Run `{command_line('migrate', production)}`.",
    )


def _room(server: Any) -> list[tuple[str, int, int]]:
    """Return the connection limits of server, role and database: name, limit, and connections in use."""
    bounds = [("server", server.server_slots, server.server_used)]
    for name in ("role", "database"):
        slots = getattr(server, f"{name}_slots")
        if slots is not None and slots >= 0:
            bounds.append((name, slots, getattr(server, f"{name}_used")))
    return bounds


def connections_finding(bounds: Sequence[tuple[str, int, int]], pool_size: int) -> Finding:
    """Return the number of worker processes that the strictest connection limit allows."""
    name, slots, used = min(bounds, key=lambda bound: bound[1] - bound[2])
    workers = max(0, (slots - used) // pool_size)  # the doctor's own connection is left for the lock of the run
    message = f"Of the {slots} connections that the {name} takes, {used} {'is' if used == 1 else 'are'} in use"
    if not workers:
        return warning(
            "connections",
            f"{message}: too few for one worker, which opens up to {pool_size}, and the lock of its run.",
            "Lower connection_pool_size, close idle clients, or use the pooler's address.",
        )
    room = counted(workers, "worker")
    return ok("connections", f"{message}: there is room for {room} of up to {counted(pool_size, 'connection')}.")


def timeouts_finding(statement: int | None, transaction: int | None) -> Finding:
    """Return how the server's time limits, in ms, affect a load; transaction_timeout is new in PostgreSQL 17."""
    if transaction:
        return warning(
            "timeouts",
            f"transaction_timeout ends every transaction after {duration(transaction / 1000)}: the lock of a run, and "
            "the commit of a large batch, take longer.",
            "ALTER ROLE … SET transaction_timeout = 0, for the role of DATABASE_URL.",
        )
    if statement:
        return ok(
            "timeouts",
            f"statement_timeout is {duration(statement / 1000)}; each transaction of a load sets its own in its place.",
        )
    return ok("timeouts", "No statement_timeout and no transaction_timeout bounds a load.")


def _find_older_photo(connection: Connection, *, migrated: bool) -> str:
    """Return the key of a photo that another tool stored, and that no batch has on record; empty without one."""
    if not connection.one("has_images").there:
        return ""
    rows = connection.execute("find_unadopted_photo" if migrated else "find_older_photo")
    return str(rows[0].key) if rows else ""


def _examine_batches(settings: Settings, database: Database, facts: Facts) -> Iterator[Finding]:
    def ask(connection: Connection) -> tuple[datetime, list[tuple[Batch, bool]]]:
        facts.recorded = list_recorded(connection, settings.bucket)
        batches = [Batch(**row._asdict()) for row in connection.execute("list_unfinished")]
        # A run holds the lock of its batch; the end of this transaction releases a lock that was free.
        found = [(batch, not batch_state.try_lock(connection, batch.id)) for batch in batches[:_SHOWN]]
        facts.unfinished = len(batches)
        return connection.one("now").now, found

    looks = database.run(lambda connection: connection.execute("list_looks"), _SECONDS, read_only=True)
    yield look_finding(looks, facts.max_age)
    now, batches = database.run(ask, _SECONDS, read_only=True)
    others = database.run(
        lambda one: one.execute("list_other_buckets", bucket=settings.bucket), _SECONDS, read_only=True
    )
    for one in others:
        there = counted(one.batches, "finished batch is", "finished batches are")
        message = f"{there} in the bucket {one.bucket}, not in {settings.bucket}, for example {one.batch_id}."
        remedy = f"Set STORAGE_BUCKET={one.bucket}, unless the app reads photos from both buckets."
        yield warning("batches", message, remedy)
    if not batches:
        yield ok("batches", "No batch is unfinished.")
    for batch, running in batches:
        yield batch_finding(batch, now, running=running, production=settings.is_production)
    if facts.unfinished > len(batches):
        more = facts.unfinished - len(batches)
        yield warning(
            "batches",
            f"{counted(more, 'more batch is', 'more batches are')} unfinished.",
            f"`{settings.command('status')}` lists them all.",
        )


def batch_finding(batch: Batch, now: datetime, *, running: bool, production: bool) -> Finding:
    """Return a finding about an unfinished batch."""
    age = now - batch.created_at
    days = f"{age.days} days ago" if age.days > 1 else "less than two days ago"
    message = f"Batch {batch.id} is {batch.state}, started {days}"
    if running:
        return ok("batches", f"{message}, and a run is in progress.")
    step = next_step({**vars(batch), "batch_id": batch.id}, production)
    if batch.state == "held":
        return warning("batches", f"{message}. {batch.held_reason}", step)
    remedy = f"Finish it: {step}"
    if batch.state == "loading" and age > _OLD:
        remedy += f", or remove it: {command_line(f'reset --batch-id {batch.id}', production)}"
        message += "; it holds its recognitions, and its objects are in the bucket"
    return warning("batches", f"{message}.", remedy)

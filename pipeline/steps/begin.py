"""Begin: which batch is meant, may it be loaded now, and is this run the only one of it."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline import batch_state
from pipeline.batch_state import KIND_LOAD, KIND_QWEN, LOAD, Batch
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.dataset import MAXIMUM_BIGINT, find_source
from pipeline.errors import DatabaseError, DatabaseUnavailable, Interrupted, RefusedError, SettingsError, UsageError
from pipeline.logger import get_logger
from pipeline.migrate import pending
from pipeline.qwen import find_annotations
from pipeline.storage import Storage

logger = get_logger(__name__)

_LEASE_SECONDS = 2.0
# SQLSTATE: undefined_table, invalid_schema_name
_NO_SCHEMA = ("42P01", "3F000")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Wish:
    """What the user asks for, before it is known which batch that is."""

    batch_id: str | None = None
    source: str | None = None
    limit: int | None = None
    force: bool = False
    kind: str = KIND_LOAD


@dataclass(frozen=True)
class Begun:
    """The batch that is meant: its id, its source as an absolute path, and how far it is.

    Attributes:
        done: it counts; at most its summary is missing.
        marked: nothing is missing.
    """

    batch_id: str
    source: str
    done: bool
    marked: bool = False


def check_batch_id(batch_id: str) -> None:
    """Raise UsageError unless the id can be part of an object key."""
    if not _ID.fullmatch(batch_id) or ".." in batch_id:
        raise UsageError(
            f"The batch id {batch_id!r} is not valid.",
            "Use 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first, and no '..'.",
        )


def begin_load(settings: Settings, database: Database, wish: Wish, *, dry_run: bool = False) -> Begun:
    """Find the batch that a load means: the one named, the newest unfinished one like it, or a new one.

    For a batch with photos that is not done, both services are checked as well, and the bucket is made when it is
    missing, so that a wrong setting is told before anything is written; a `dry_run` makes nothing.

    Raises:
        UsageError: a wrong id, limit or source; migrations are pending; a service refuses us.
        RefusedError: the batch is another kind, was begun with other parameters, or is being reset.
    """
    if wish.batch_id is not None:
        check_batch_id(wish.batch_id)
    if wish.limit is not None and not 1 <= wish.limit <= MAXIMUM_BIGINT:
        raise UsageError(f"--limit is {wish.limit}.", "Use a number from 1, or leave it out for no limit.")
    try:
        begun = database.run(lambda connection: _resolve(connection, settings, wish))
    except DatabaseError as exc:
        if exc.code in _NO_SCHEMA:
            database.run(require_schema)
        raise
    if not begun.done and not dry_run and wish.kind == KIND_LOAD:
        storage = Storage(settings)
        try:
            storage.ensure_bucket()
        finally:
            storage.close()
    return begun


def _resolve(connection: Connection, settings: Settings, wish: Wish) -> Begun:
    require_schema(connection, there=True)
    if wish.batch_id is not None:
        batch = batch_state.find_batch(connection, wish.batch_id)
        if batch is not None and batch.state != "reset":
            begun = _resume(batch, settings, wish)
            return replace(begun, marked=begun.done and batch_state.is_done(connection, batch.id, LOAD))
        return Begun(wish.batch_id, _source(settings, wish), False)
    source = _source(settings, wish)
    rows = connection.execute(
        "find_unfinished",
        kind=wish.kind,
        source=source,
        force=wish.force,
        recognition_limit=wish.limit,
        bucket=settings.bucket,
    )
    if rows:
        return Begun(rows[0].id, source, False)
    return Begun(_new_id(connection, "batch" if wish.kind == KIND_LOAD else "qwen"), source, False)


def _source(settings: Settings, wish: Wish) -> str:
    if wish.kind == KIND_LOAD:
        return str(find_source(wish.source, settings.dataset_dir))
    return str(find_annotations(wish.source, settings.qwen_annotations, settings.dataset_dir))


def require_schema(connection: Connection, *, there: bool | None = None) -> None:
    """Raise SettingsError when a migration is pending; `there` as for `pending`."""
    missing = pending(connection, there=there)
    if missing:
        raise SettingsError(
            f"{len(missing)} {'migration is' if len(missing) == 1 else 'migrations are'} pending, the first is "
            f"{missing[0].version}_{missing[0].name}.",
            "Run `python -m pipeline migrate` first.",
        )


def _resume(batch: Batch, settings: Settings, wish: Wish) -> Begun:
    if batch.kind != wish.kind:
        holds = "a dataset" if batch.kind == KIND_LOAD else "Qwen annotations"
        raise RefusedError(f"Batch {batch.id} holds {holds}.", "Choose another --batch-id.")
    if batch.state == "resetting":
        raise RefusedError(
            f"Batch {batch.id} is being reset.",
            f"Finish that first: `{reset_command(batch.id, settings.environment == 'production')}`.",
        )
    differences = []
    if wish.source is not None and _absolute(wish.source) != batch.source:
        differences.append(f"{'--source' if batch.kind == KIND_LOAD else '--file'} {batch.source}")
    if wish.limit != batch.limit:
        differences.append(f"--limit {batch.limit}" if batch.limit is not None else "no --limit")
    if wish.force != batch.force:
        differences.append("--force" if batch.force else "no --force")
    if settings.bucket != batch.bucket and batch.kind == KIND_LOAD:
        differences.append(f"STORAGE_BUCKET {batch.bucket}")
    if differences:
        raise RefusedError(
            f"Batch {batch.id} was begun with {', '.join(differences)}.",
            "Repeat the command with the same parameters, or choose another --batch-id.",
        )
    done = batch.state == "done"
    if not done:
        _source(settings, replace(wish, source=batch.source))
    return Begun(batch.id, batch.source, done)


def _absolute(source: str) -> str:
    """Return a source as it is on record; the folder need not be there any more."""
    try:
        return str(Path(source).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):
        return source


def _new_id(connection: Connection, prefix: str) -> str:
    moment = datetime.now()
    while True:
        batch_id = f"{prefix}_{moment:%Y%m%d_%H%M%S}"
        if batch_state.find_batch(connection, batch_id) is None:
            return batch_id
        moment += timedelta(seconds=1)


def resume_command(batch_id: str, kind: str, limit: int | None, force: bool, production: bool) -> str:
    """Return the command that goes on with a batch; its source is on record."""
    parts = ["python -m pipeline", "load-qwen" if kind == KIND_QWEN else "load", f"--batch-id {batch_id}"]
    parts += [f"--limit {limit}"] if limit is not None else []
    parts += ["--force"] if force else []
    parts += ["--production"] if production else []
    return " ".join(parts)


def reset_command(batch_id: str, production: bool) -> str:
    """Return the command that takes a batch out."""
    return f"python -m pipeline reset --batch-id {batch_id}{' --production' if production else ''}"


class Lease:
    """The lock of a run: a transaction that stays open, and whose lock dies with the last process that holds it.

    A forked worker inherits the connection, so a run whose parent was killed still counts as running until its last
    worker has ended. The lock spares work and gives a clear message; that nothing counts twice, the steps see to.
    """

    def __init__(self, settings: Settings, batch_id: str, patience: float = 10.0) -> None:
        """Take the lock, waiting `patience` seconds for another run to end.

        Raises:
            RefusedError: another run of this batch goes on.
            DatabaseUnavailable: the database stays away that long.
        """
        self._settings, self._batch_id, self._patience = settings, batch_id, patience
        self._stack = ExitStack()
        self._connection: Connection | None = None
        self._backend: dict[str, Any] | None = None
        self._application = f"pipeline lock {batch_id}"[:63]  # as PostgreSQL cuts it
        self._looked = 0.0
        self._take()

    def _take(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                if self._try():
                    return
            except DatabaseUnavailable:
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"Another run of batch {self._batch_id} is going on.",
                    "Wait for it, or stop it; nothing was changed.",
                )
            time.sleep(0.2)

    def _try(self) -> bool:
        if self._connection is None:
            database = Database(self._settings, application=self._application)
            self._stack.callback(database.close)
            try:
                connection = self._stack.enter_context(database.transaction())
                if self._backend is not None:
                    connection.execute("end_backend", application=self._application, **self._backend)
                self._backend = connection.one("find_backend")._asdict()
            except BaseException:
                self.release()
                raise
            self._connection = connection
        try:
            return batch_state.try_lock(self._connection, self._batch_id)
        except BaseException:
            self.release()
            raise

    def keep(self) -> None:
        """Make sure now and then that the lock is still held; a connection that broke is replaced.

        Raises:
            RefusedError: another run has taken the batch meanwhile.
            DatabaseUnavailable: the database stays away.
        """
        if self._connection is None or time.monotonic() - self._looked < _LEASE_SECONDS:
            return
        try:
            self._connection.one("now")
        except DatabaseUnavailable:
            logger.warning("lock: the connection that held the lock of batch %s broke", self._batch_id)
            self.release()
            self._take()
        self._looked = time.monotonic()

    def release(self) -> None:
        """Give the lock back; when its connection broke, the server did that already."""
        self._connection = None
        # Rolled back, as after an error: there is nothing to commit, and a connection that broke could not.
        self._stack.__exit__(Interrupted, Interrupted("the lock is given back"), None)

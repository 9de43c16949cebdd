"""Find the batch that a load request means, and refuse a request that contradicts what is on record."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.looks import OPTIONS, Look, find_look
from pipeline.batches.state import COPY, KIND_LOAD, KIND_QWEN, UPLOAD, Batch
from pipeline.config import Settings, command_line
from pipeline.database import Connection, Database
from pipeline.database.migrate import pending
from pipeline.dataset.annotations import find_annotations
from pipeline.dataset.frame import PIXELS, frame_of
from pipeline.dataset.layout import find_source
from pipeline.dataset.records import MAXIMUM_BIGINT
from pipeline.errors import RefusedError, SettingsError, SourceUnavailable, UsageError
from pipeline.units import counted

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class LoadRequest:
    """The parameters of a load whose batch is not resolved yet."""

    batch_id: str | None = None
    source: str | None = None
    limit: int | None = None
    force: bool = False
    changed: bool = False
    kind: str = KIND_LOAD
    coordinates: str = PIXELS
    exif_turned: bool = False

    @classmethod
    def of(cls, batch: Batch) -> LoadRequest:
        """Return the request that made a batch, with its id."""
        return cls.read({**vars(batch), "batch_id": batch.id})

    @classmethod
    def read(cls, batch: Mapping[str, Any]) -> LoadRequest:
        """Return the request that made a batch, with its id, of the summary or the status."""
        return cls(**{name: batch[name] for name in ("batch_id", "source", "kind", *OPTIONS)})

    def options(self, other: LoadRequest) -> list[str]:
        """Return the options of this request that are different in another one."""
        shown = []
        for name in OPTIONS:
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value != getattr(other, name):
                shown.append(f"no {flag}" if value in (None, False) else flag if value is True else f"{flag} {value}")
        return shown

    def command(self, production: bool) -> str:
        """Return the command that resumes the batch; its source is on record."""
        name = "load-qwen" if self.kind == KIND_QWEN else "load"
        words = [name, f"--batch-id {self.batch_id}", *self.options(LoadRequest())]
        return command_line(" ".join(words), production)


@dataclass(frozen=True)
class ResolvedBatch:
    """The batch that a request means; `done` if it is committed, `marked` if its summary exists, too.

    `resumed` says what earlier runs did of a batch that is not done, empty for a new one.
    """

    batch_id: str
    source: str
    done: bool = False
    marked: bool = False
    resumed: str = ""


def check_batch_id(batch_id: str) -> None:
    """Raise UsageError unless the id can be part of an object key."""
    if not _ID.fullmatch(batch_id) or ".." in batch_id:
        hint = "Use 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first, and no '..'."
        raise UsageError(f"The batch id {batch_id!r} is not valid.", hint)


def resolve_batch(
    settings: Settings, database: Database, request: LoadRequest, taken: Collection[str] = ()
) -> ResolvedBatch:
    """Return the batch that a request means: the named, newest unfinished matching or a new one.

    A new one gets none of the ids `taken` by requests that are not on record yet. Raises UsageError if the id, limit,
    source or schema is not valid, RefusedError if the batch is of other kind or parameters, or is being reset,
    HeldError if it is held.
    """
    if request.batch_id is not None:
        check_batch_id(request.batch_id)
    if request.limit is not None and not 1 <= request.limit <= MAXIMUM_BIGINT:
        raise UsageError(f"--limit is {request.limit}.", "Use a number from 1, or leave it out for no limit.")

    if request.force and request.changed:
        raise UsageError("--force and --changed exclude each other.", "--force loads all of it, changed or not.")
    frame_of(request.coordinates)

    def resolve(connection: Connection) -> ResolvedBatch:
        require_schema(connection)
        if request.batch_id is not None:
            batch = batch_state.find_batch(connection, request.batch_id)
            if batch is None or batch.state == "reset":
                look = find_look(connection, request.batch_id)
                if look is None or look.batch_made:
                    return ResolvedBatch(request.batch_id, _source(settings, request))
                made = LoadRequest.read({**look._asdict(), **look.seen})
                _require_same(made, look.bucket, settings, request)
                return ResolvedBatch(look.batch_id, look.source, True, True)
            if batch.state == "held" and batch.kind == request.kind:
                raise batch_state.held_error(connection, batch.id)
            if batch.state == "resetting":
                command = connection.command(f"reset --batch-id {batch.id}")
                raise RefusedError(f"Batch {batch.id} is being reset.", f"Finish that first: `{command}`.")
            _require_same(LoadRequest.of(batch), batch.bucket, settings, request)
            if batch.state != "done" and batch.released_at is None:
                _require_there(settings, replace(request, source=batch.source))
            done = batch.state == "done"
            resumed = "" if done else _describe_resumed(connection, batch.id, request.kind)
            return ResolvedBatch(batch.id, batch.source, done, batch.marked, resumed)
        source = _source(settings, request)
        for row in connection.execute("find_unfinished", **{**vars(request), "source": source}, bucket=settings.bucket):
            resumed = _describe_resumed(connection, row.id, request.kind)
            return ResolvedBatch(row.id, source, resumed=resumed)
        return ResolvedBatch(_new_id(connection, request.kind, taken), source)

    return database.run(resolve)


def _describe_resumed(connection: Connection, batch_id: str, kind: str) -> str:
    step, word = (UPLOAD, "uploaded") if kind == KIND_LOAD else (COPY, "read")
    total, done = batch_state.progress(connection, batch_id, step)
    return f"{done} of {counted(total, 'recognition')} were {word} before"


def find_newest_done(settings: Settings, database: Database, request: LoadRequest) -> Look | None:
    """Return the last look of a request like this one; where it made a batch, the last whose batch is done."""

    def find(connection: Connection) -> Look | None:
        require_schema(connection)
        options = json.dumps({name: getattr(request, name) for name in OPTIONS})
        source, bucket = _source(settings, request), settings.bucket
        rows = connection.execute("find_newest_done", kind=request.kind, source=source, bucket=bucket, options=options)
        return Look(**rows[0]._asdict()) if rows else None

    return database.run(find)


def _source(settings: Settings, request: LoadRequest) -> str:
    if request.kind == KIND_LOAD:
        return str(find_source(request.source, settings.dataset_dir))
    return str(find_annotations(request.source, settings.qwen_annotations, settings.dataset_dir))


def _require_there(settings: Settings, request: LoadRequest) -> None:
    """Raise SourceUnavailable if the source of a batch on record is gone."""
    try:
        _source(settings, request)
    except UsageError as exc:
        hint = "Mount or restore it, then run the same command again; nothing was rejected."
        raise SourceUnavailable(exc.message, hint) from exc


def require_schema(connection: Connection) -> None:
    """Raise SettingsError if a migration is pending."""
    if missing := pending(connection):
        count = counted(len(missing), "migration is", "migrations are")
        hint = f"Run `{connection.command('migrate')}` first."
        raise SettingsError(f"{count} pending, the first is {missing[0].label}.", hint)


def _require_same(made: LoadRequest, bucket: str, settings: Settings, request: LoadRequest) -> None:
    """Raise RefusedError if a request has other parameters than the one that made a batch in a bucket."""
    is_load = made.kind == KIND_LOAD
    if made.kind != request.kind:
        holds = "a dataset" if is_load else "Qwen annotations"
        raise RefusedError(f"Batch {made.batch_id} holds {holds}.", "Choose another --batch-id.")
    differences = []
    if request.source is not None and made.source not in (request.source, _absolute(request.source)):
        differences.append(f"{'--source' if is_load else '--file'} {made.source}")
    differences += made.options(request)
    if settings.bucket != bucket and is_load:
        differences.append(f"STORAGE_BUCKET {bucket}")
    if differences:
        message = f"Batch {made.batch_id} was started with {', '.join(differences)}."
        raise RefusedError(message, "Repeat the command with the same parameters, or choose another --batch-id.")


def _absolute(source: str) -> str:
    """Return a source as an absolute path, as recorded; the folder need not exist."""
    try:
        return str(Path(source).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):
        return source


def _new_id(connection: Connection, kind: str, taken: Collection[str]) -> str:
    prefix, moment = "batch" if kind == KIND_LOAD else "qwen", datetime.now()
    while True:
        batch_id = f"{prefix}_{moment:%Y%m%d_%H%M%S}"
        if batch_id not in taken and not is_taken(connection, batch_id):
            return batch_id
        moment += timedelta(seconds=1)


def is_taken(connection: Connection, batch_id: str) -> bool:
    """Return whether a batch or a look has the id."""
    return bool(connection.one("is_taken", batch_id=batch_id).taken)


def next_step(batch: Mapping[str, Any], production: bool) -> str:
    """Return the command that finishes a batch of the summary or the status, or what to decide about one that is held.

    It is empty for a batch with nothing to do.
    """
    if batch["state"] == "loading":
        return LoadRequest.read(batch).command(production)
    if batch["state"] == "held":
        usable = batch.get("recognitions", batch.get("recognitions_processed")) != 0
        return batch_state.held_hint(batch["batch_id"], partial(command_line, production=production), usable=usable)
    if batch["state"] == "resetting":
        return command_line(f"reset --batch-id {batch['batch_id']}", production)
    return ""

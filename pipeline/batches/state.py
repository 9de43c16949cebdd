"""Batches and markers: a step is done if its marker is committed. Every function takes a connection."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.database import Connection
from pipeline.dataset.records import Notice, Reject
from pipeline.errors import HeldError, RefusedError, UsageError

#: The steps.
DISCOVER, UPLOAD, COPY, TRANSFORM = "discover", "upload", "copy", "transform"
LOAD, RESET = "load", "reset"  # the whole of a batch

#: The content of a batch: photos with their documents, or annotations of loaded photos.
KIND_LOAD, KIND_QWEN = "load", "qwen"

#: The lock of a batch: of a run, shared by the processes of an array, or against both.
RUN, ARRAY, ALONE = "run", "array", "alone"

WHOLE = 0  # the shard number of a marker that stands for the whole batch


@dataclass(frozen=True)
class Batch:
    """What steps need of a row of ingest.batches.

    `limit` is None for no limit, `marked` says that the load is done, and `now` is the time by the database's clock.
    """

    id: str
    kind: str
    state: str
    source: str
    limit: int | None
    force: bool
    changed: bool
    bucket: str
    bucket_created_at: datetime | None
    coordinates: str
    exif_turned: bool
    shards: int
    recognitions: int
    photos: int
    created_at: datetime
    reset_at: datetime | None
    held_reason: str | None
    released_at: datetime | None
    adopted: bool
    metrics: dict[str, Any]
    marked: bool
    now: datetime


def find_batch(connection: Connection, batch_id: str) -> Batch | None:
    """Return the batch, None if it does not exist."""
    rows = connection.execute("find_batch", batch_id=batch_id)
    return Batch(**rows[0]._asdict()) if rows else None


def require_batch(connection: Connection, batch_id: str) -> Batch:
    """Return the batch; raise UsageError if it does not exist."""
    if batch := find_batch(connection, batch_id):
        return batch
    raise UsageError(f"There is no batch {batch_id}.", f"See `{connection.command('status')}` for a list.")


def hold(connection: Connection, batch_id: str, *, state: str = "loading", created_at: datetime | None = None) -> Batch:
    """Lock the batch's row in shared mode until the transaction ends.

    Raises RefusedError if it has another state, or was started at another time than `created_at`, after a reset;
    HeldError if it is held.
    """
    connection.enqueue("hold_batch", batch_id=batch_id)
    batch = find_batch(connection, batch_id)
    found = batch.state if batch is not None else "unknown"
    if batch is not None and created_at not in (None, batch.created_at):
        found = "started anew"
    if found == "held":
        raise held_error(connection, batch_id)
    if batch is None or found != state:
        message = f"Batch {batch_id} is {found}, not {state}: nothing of this run was recorded."
        raise RefusedError(message, f"Look at it with `{connection.command('status')}`.")
    return batch


def hold_unpublished(connection: Connection, batch_id: str) -> Batch | None:
    """Lock the batch as `hold` does; return None where another process has published it meanwhile."""
    connection.enqueue("hold_batch", batch_id=batch_id)  # first, since it waits for the commit that publishes
    return None if is_done(connection, batch_id, TRANSFORM) else hold(connection, batch_id)


def held_error(connection: Connection, batch_id: str) -> HeldError:
    """Return the error of a batch that is held."""
    batch = require_batch(connection, batch_id)
    message = f"Batch {batch_id} is held, readers do not see it. {batch.held_reason}"
    return HeldError(message, held_hint(batch_id, connection.command, usable=batch.recognitions > 0))


def held_hint(batch_id: str, command: Callable[[str], str], *, usable: bool) -> str:
    """Return what to do about a held batch, of which something is usable; `command` makes a command line of ours."""
    publish, reset = (command(f"{name} --batch-id {batch_id}") for name in ("publish", "reset"))
    if not usable:
        return f"Remove it, correct options or input, then load again: `{reset}`."
    return (
        f"If options or input were wrong, remove it, then load again with them corrected: `{reset}`. "
        f"If not, publish it as it is: `{publish}`."
    )


def is_gone(connection: Connection, batch_id: str, created_at: datetime) -> bool:
    """Lock the batch's row and return whether the batch that was created then was reset."""
    connection.enqueue("hold_batch", batch_id=batch_id)
    batch = find_batch(connection, batch_id)
    return batch is not None and batch.created_at == created_at and batch.state in ("resetting", "reset")


def try_lock(connection: Connection, batch_id: str, mode: str = ALONE) -> bool:
    """Try to take the batch's lock until the transaction ends, in a mode above; return whether it was free."""
    return bool(connection.one(f"try_lock_{mode}", batch_id=batch_id).locked)


def hold_step(
    connection: Connection, batch_id: str, step: str, shard: int, *, created_at: datetime | None = None
) -> Batch | None:
    """Lock the batch and the step of a shard as `hold` and `await_step` do; return None if the marker exists."""
    held = hold(connection, batch_id, created_at=created_at)
    return None if await_step(connection, batch_id, step, shard) else held


def await_step(connection: Connection, batch_id: str, step: str, shard: int = WHOLE) -> bool:
    """Lock a step until the transaction ends, and return whether its marker exists.

    Another transaction that holds the lock may be an earlier attempt of this process whose commit is in progress.
    """
    connection.enqueue("lock_step", batch_id=batch_id, step=step, shard=shard)
    return is_done(connection, batch_id, step, shard)


def is_done(connection: Connection, batch_id: str, step: str, shard: int = WHOLE) -> bool:
    """Return whether the marker exists."""
    return bool(connection.one("find_marker", batch_id=batch_id, step=step, shard=shard).done)


def mark(
    connection: Connection, batch_id: str, step: str, shard: int, started_at: datetime, metrics: Mapping[str, Any]
) -> None:
    """Insert the marker, in one message with the next statement or the commit; the primary key rejects a second one."""
    parent = multiprocessing.parent_process()  # of a process that a run has forked
    worker = f"{socket.gethostname()}:{f'{parent.pid}/' if parent else ''}{os.getpid()}"
    marker = {"batch_id": batch_id, "step": step, "shard": shard, "started_at": started_at, "worker": worker}
    connection.enqueue("insert_marker", **marker, metrics=json.dumps(metrics))


def progress(connection: Connection, batch_id: str, step: str) -> tuple[int, int]:
    """Return how many recognitions a batch has, and how many of them are in shards with the marker of a step."""
    row = connection.one("count_marked", batch_id=batch_id, step=step)
    return int(row.total), int(row.marked)


def pending_shards(connection: Connection, batch_id: str, step: str, shards: Iterable[int]) -> list[int]:
    """Return those of the shards that have no marker of a step, ascending."""
    rows = connection.execute("list_pending_shards", batch_id=batch_id, step=step, shards=list(shards))
    return [row.shard for row in rows]


def list_marked(connection: Connection, batch_id: str) -> list[tuple[str, int]]:
    """Return step and shard of every marker of a batch."""
    return [(row.step, row.shard) for row in connection.execute("list_marked", batch_id=batch_id)]


def add_inputs(
    connection: Connection, batch_id: str, step: str, shard: int, inputs: Sequence[Reject] | Sequence[Notice]
) -> None:
    """Record rejects or notices."""
    if inputs:
        table = "ingest.rejects" if isinstance(inputs[0], Reject) else "ingest.notices"
        columns = ("batch_id", "recognition_id", "path", "code", "message", "step", "shard")
        rows = ((batch_id, one.recognition_id, one.path, one.code, one.message, step, shard) for one in inputs)
        connection.copy_in(table, columns, rows)

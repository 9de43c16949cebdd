"""Reset: take one batch out, as if it had never been loaded. First what would go, then, if that is wanted, the deed.

The order of writes: domain and raw rows in one transaction, after which no reader sees the batch; then its objects;
then its manifest and markers. Stopped anywhere, the same command finishes it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.resolve import check_batch_id, require_schema
from pipeline.batches.state import KIND_LOAD, Batch
from pipeline.batches.summary import summarise
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import RefusedError, StorageError
from pipeline.observe.logger import get_logger
from pipeline.observe.progress import ProgressCounter
from pipeline.storage import PAGE, Storage
from pipeline.units import size

logger = get_logger(__name__)

_AT_ONCE = 4
_ROUNDS = 3


@dataclass(frozen=True)
class Reference:
    """How many rows of a table that is not ours reference rows of one of ours that would go."""

    table: str
    target: str
    rows: int


@dataclass(frozen=True)
class Plan:
    """What a reset would do.

    Attributes:
        batch: the batch as it is now.
        rows: table to the number of its rows that go, where there are any.
        objects: objects in the bucket that go.
        bytes: their size.
        returning: earlier batch to the number of recognitions that readers then see in its version.
        blocking: what stands in the way.
    """

    batch: Batch
    rows: dict[str, int]
    objects: int
    bytes: int
    returning: dict[str, int]
    blocking: tuple[Reference, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        return {
            "batch_id": self.batch.id,
            "kind": self.batch.kind,
            "rows": self.rows,
            "objects": self.objects,
            "bytes": self.bytes,
            "returning": self.returning,
            "blocking": [asdict(one) for one in self.blocking],
        }


def find_batch_to_reset(connection: Connection, batch_id: str) -> Batch:
    """Return the batch that is to be reset.

    Raises:
        UsageError: there is none of that id, or migrations are pending.
    """
    check_batch_id(batch_id)
    require_schema(connection)
    return batch_state.require_batch(connection, batch_id)


def plan_reset(database: Database, settings: Settings, batch_id: str) -> Plan:
    """Find out what a reset would do; nothing is changed.

    Raises:
        UsageError: there is no such batch.
    """

    def work(connection: Connection) -> Plan:
        batch = find_batch_to_reset(connection, batch_id)
        if batch.state in ("resetting", "reset"):
            return Plan(batch, {}, 0, 0, {}, ())
        connection.execute("plan_reset", batch_id=batch_id)
        raw = connection.one("count_raw", batch_id=batch_id)._asdict()
        rows = {f"raw.{name}": count for name, count in raw.items()}
        rows.update({row.name: row.going for row in connection.execute("list_stale")})
        returning = connection.execute("list_returning", kind=batch.kind)
        return Plan(
            batch,
            {name: count for name, count in rows.items() if count},
            0,
            0,
            {row.batch_id: row.recognitions for row in returning},
            tuple(Reference(row.app, row.target, row.referencing) for row in connection.execute("find_references")),
        )

    plan = database.run(work, timeout=0, keep=False)
    if plan.batch.kind != KIND_LOAD or plan.batch.state == "reset":
        return plan
    with closing(Storage(_settings_of(settings, plan.batch))) as storage:
        objects = total = 0
        for found in storage.list_objects(_prefix(batch_id)):
            objects += 1
            total += found.size
    return replace(plan, objects=objects, bytes=total)


def describe_reset(plan: Plan) -> str:
    """Return a plan for people."""
    batch = plan.batch
    if batch.state == "reset":
        return f"Batch {batch.id} was reset before; nothing of it is left."
    lines = [f"Reset of batch {batch.id}, {batch.kind}, {batch.state}, begun {batch.created_at:%Y-%m-%d %H:%M:%S}:"]
    if batch.state == "resetting":
        lines.append("  its rows are gone already; the rest is finished now")
    lines += [f"  {name}: {rows} rows go" for name, rows in sorted(plan.rows.items())]
    if batch.kind == KIND_LOAD:
        lines.append(f"  bucket {batch.bucket}: {plan.objects} objects go, {size(plan.bytes)}")
    what = "the former annotations of" if batch.kind != KIND_LOAD else "the former version of"
    lines += [f"  batch {name}: {what} {count} recognitions comes back" for name, count in plan.returning.items()]
    lines += [
        f"  blocked by {one.table}: {one.rows} rows reference {one.target} that would go" for one in plan.blocking
    ]
    return "\n".join(lines)


def reset_batch(database: Database, settings: Settings, batch_id: str, counter: ProgressCounter | None = None) -> None:
    """Take a batch out; nothing happens when that was done before.

    Arguments:
        counter: told of the photos that are gone, of how many.

    Raises:
        RefusedError: a table that is not ours references what would go; nothing was changed.
        StorageError: Storage does not delete what it was told to.
    """
    batch = database.run(lambda connection: _unpublish(connection, batch_id), timeout=0)
    if batch is None:
        return
    if batch.kind == KIND_LOAD:
        counter = counter or ProgressCounter()
        counter.start(batch.photos, 0)
        with closing(Storage(_settings_of(settings, batch))) as storage:
            _remove_objects(database, storage, batch, counter.start_shard(1))
    database.run(lambda connection: _forget(connection, batch_id), timeout=0)
    logger.info("reset: batch %s is reset", batch_id)


def _settings_of(settings: Settings, batch: Batch) -> Settings:
    """Return settings with the bucket that the batch was loaded into, whichever it is today."""
    return replace(settings, bucket=batch.bucket)


def _prefix(batch_id: str) -> str:
    return f"{batch_id}/recognitions/"


def _unpublish(connection: Connection, batch_id: str) -> Batch | None:
    """Remove the batch's rows from public and raw, unless that is done; return None when all of it is reset."""
    connection.execute("lock_batch", batch_id=batch_id)
    connection.execute("lock_commits")
    batch = find_batch_to_reset(connection, batch_id)
    if batch.state == "reset":
        return None
    if batch.state != "resetting":
        if not batch.metrics:
            # What an unfinished batch did is told by its markers, which will be gone.
            summary = json.dumps(summarise(connection, batch_id), ensure_ascii=False)
            connection.execute("update_batch_metrics", batch_id=batch_id, metrics=summary)
        connection.execute("plan_reset", batch_id=batch_id)
        removed = connection.one("execute_reset", batch_id=batch_id).removed
        connection.execute("mark_resetting", batch_id=batch_id)
        logger.info("reset: %d rows of public and raw", removed)
    return batch


def _remove_objects(database: Database, storage: Storage, batch: Batch, progress: Callable[[int], None]) -> None:
    """Remove whatever the bucket holds below the batch's prefix, until nothing is listed there any more.

    Every page goes under the batch's row: a reset that was cut off takes nothing from a later load of the same id.
    """

    def remove(page: Sequence[str]) -> None:
        def work(connection: Connection) -> None:
            if not batch_state.is_gone(connection, batch.id, batch.created_at):
                raise RefusedError(
                    f"Batch {batch.id} was begun anew meanwhile: this reset removes nothing more.",
                    "Look at it with `python -m pipeline status`.",
                )
            storage.remove(page)

        database.run(work, timeout=0)
        progress(len(page))

    for _ in range(_ROUNDS):
        listed = 0
        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(min(_AT_ONCE, database.connections), thread_name_prefix="remove") as executor:
            try:
                for page in _pages(storage, _prefix(batch.id)):
                    listed += len(page)
                    pending.append(executor.submit(remove, page))
                    if len(pending) > 2 * _AT_ONCE:
                        pending.popleft().result()
                while pending:
                    pending.popleft().result()
            except BaseException:
                storage.stop()
                executor.shutdown(wait=True, cancel_futures=True)
                raise
        logger.info("reset: %d objects", listed)
        if not listed:
            return
    if next(storage.list_objects(_prefix(batch.id)), None) is not None:
        raise StorageError(
            f"Storage still holds objects of batch {batch.id} after {_ROUNDS} rounds of deleting.",
            "Look at the Storage server's log; is another machine still uploading?",
        )


def _pages(storage: Storage, prefix: str) -> Iterator[Sequence[str]]:
    page: list[str] = []
    for found in storage.list_objects(prefix):
        page.append(found.key)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page


def _forget(connection: Connection, batch_id: str) -> None:
    """Remove manifest, markers and rejects, and write down when."""
    connection.execute("lock_batch", batch_id=batch_id)
    batch = find_batch_to_reset(connection, batch_id)
    if batch.state != "resetting":
        return
    for statement in ("delete_manifest", "delete_markers", "delete_rejects", "mark_reset"):
        connection.execute(statement, batch_id=batch_id)

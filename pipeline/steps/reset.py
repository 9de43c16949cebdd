"""Reset: plan, then execute the removal of one batch, as if it had never been loaded.

The order of writes: domain and raw rows in one transaction, after which no reader sees the batch; then its objects;
then its manifest and markers. After an interruption at any point, the same command completes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import KEY_FORM, prove_bucket
from pipeline.batches.resolve import check_batch_id, require_schema
from pipeline.batches.state import KIND_LOAD, Batch
from pipeline.batches.summary import summarise
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.database.errors import references_refused
from pipeline.errors import RefusedError, StorageError
from pipeline.observe.logger import say
from pipeline.observe.progress import ProgressCounter
from pipeline.steps.parallel import in_threads, pages
from pipeline.storage import PAGE, Storage, StoredObject
from pipeline.units import counted, listed, size

logger = logging.getLogger(__name__)

_THREADS = 4
_ROUNDS = 3
_HINT = "Look at the Storage server's log; is another machine still uploading?"


@dataclass(frozen=True)
class Plan:
    """What a reset would do: rows (by table) and objects to delete, and the references that prevent it (see its query).

    `returning` are the recognitions whose earlier version readers see again, by the batch of that version. `lost` are
    those that others loaded anew or took over, and whose images name objects of the batch: they prevent it, too.
    """

    batch: Batch
    rows: dict[str, int]
    objects: int
    bytes: int
    returning: dict[str, int]
    blocking: list[dict[str, Any]]
    lost: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        facts = {name: value for name, value in vars(self).items() if name != "batch"}
        return {"batch_id": self.batch.id, "kind": self.batch.kind, **facts}


def find_batch_to_reset(connection: Connection, batch_id: str) -> Batch:
    """Return the batch to reset; raise UsageError if it does not exist, or if migrations are pending."""
    check_batch_id(batch_id)
    require_schema(connection)
    return batch_state.require_batch(connection, batch_id)


def plan_reset(database: Database, settings: Settings, batch_id: str) -> Plan:
    """Return what a reset would do; change nothing."""

    def work(connection: Connection) -> Plan:
        batch = find_batch_to_reset(connection, batch_id)
        if batch.state in ("resetting", "reset"):
            return Plan(batch, {}, 0, 0, {}, [], [])
        connection.execute("plan_reset", batch_id=batch_id, locks=False)
        raw = connection.one("count_raw", batch_id=batch_id)._asdict()
        rows = {f"raw.{name}": count for name, count in raw.items() if count}
        rows.update({row.name: row.going for row in connection.execute("list_stale")})
        returning = {row.batch_id: row.recognitions for row in connection.execute("list_returning", batch_id=batch_id)}
        blocking = [row._asdict() for row in connection.execute("find_references")]
        objects, total = connection.one("count_objects", batch_id=batch_id) if batch.adopted else (0, 0)
        return Plan(batch, rows, objects, total, returning, blocking, _list_lost(connection, batch_id))

    plan = database.run(work, timeout=0, keep=False)
    if plan.batch.kind != KIND_LOAD or plan.batch.state == "reset":
        return plan
    count = total = 0
    with closing(Storage(settings, bucket=plan.batch.bucket)) as storage:
        prove_bucket(storage, {batch_id: plan.batch.bucket_created_at})
        if plan.batch.adopted:
            return plan
        for found in _list_objects(storage, batch_id):
            count, total = count + 1, total + found.size
    return replace(plan, objects=count, bytes=total)


def describe_reset(plan: Plan) -> str:
    """Return a plan as text."""
    batch = plan.batch
    if batch.state == "reset":
        return f"Batch {batch.id} was reset before; nothing of it is left."
    is_load = batch.kind == KIND_LOAD
    command, what, verb = "load-qwen", "the former annotations of", "are"
    if is_load:
        command, what, verb = "load", "the former version of", "is"
    lines = [f"Reset of batch {batch.id}, {command}, {batch.state}, started {batch.created_at:%Y-%m-%d %H:%M:%S}:"]
    if batch.adopted:
        lines.append("  another tool loaded it: the pipeline cannot load again what is deleted")
    if batch.state == "resetting":
        lines.append("  its rows are deleted already; the rest is removed now")
    lines += [f"  {name}: {counted(rows, 'row is', 'rows are')} deleted" for name, rows in sorted(plan.rows.items())]
    if not (any(plan.rows.values()) or plan.objects or batch.photos):
        lines.append("  nothing is stored for it")
    elif is_load:
        objects = counted(plan.objects, "object is", "objects are")
        more = f"; {counted(batch.photos, 'photo is', 'photos are')} on record" if plan.objects < batch.photos else ""
        lines.append(f"  bucket {batch.bucket}: {objects} deleted, {size(plan.bytes)}{more}")
    for name, count in plan.returning.items():
        lines.append(f"  batch {name}: {what} {counted(count, 'recognition')} {verb} restored")
    for one in plan.blocking:
        rows = counted(one["rows"], "row references", "rows reference")
        lines.append(f"  blocked by {one['table']}: {rows} rows of {one['target']} that would be deleted")
    if plan.lost:
        lines.append(f"  blocked by {_describe_lost(plan.lost)}")
    return "\n".join(lines)


def reset_batch(database: Database, settings: Settings, batch_id: str, counter: ProgressCounter | None = None) -> None:
    """Remove a batch; do nothing if it was reset before. `counter` counts the deleted photos.

    Raises RefusedError if a foreign table references rows to delete, if images of others name objects to delete, or if
    the bucket is another one, and AccessDenied if the key does not see it; nothing was changed.
    """
    batch = database.run(lambda connection: find_batch_to_reset(connection, batch_id))
    if batch.kind == KIND_LOAD and batch.state != "reset":
        with closing(Storage(settings, bucket=batch.bucket)) as storage:
            prove_bucket(storage, {batch_id: batch.bucket_created_at})
    with references_refused():
        going = database.run(lambda connection: _unpublish(connection, batch_id), timeout=0)
    if going is None:
        return
    if going.kind == KIND_LOAD:
        counter = counter or ProgressCounter()
        counter.start("reset", going.photos)
        with closing(Storage(settings, bucket=going.bucket)) as storage:
            _remove_objects(database, storage, going, counter.start_shard(1))
        counter.finish()
    database.run(lambda connection: _delete_manifest(connection, batch_id), timeout=0)
    logger.info("reset: batch %s is reset", batch_id)


def _unpublish(connection: Connection, batch_id: str) -> Batch | None:
    """Delete the batch's rows from public and raw, unless that is done; return None if the batch is reset."""
    connection.execute("lock_batch", batch_id=batch_id)
    connection.execute("lock_commits")
    batch = batch_state.require_batch(connection, batch_id)
    if batch.state == "reset":
        return None
    if batch.state != "resetting":
        if not batch.metrics:
            # The summary of an unfinished batch comes from its markers, which a reset deletes.
            summary = json.dumps(summarise(connection, batch_id), ensure_ascii=False)
            connection.execute("update_batch_metrics", batch_id=batch_id, metrics=summary)
        connection.execute("plan_reset", batch_id=batch_id, locks=True)
        if lost := _list_lost(connection, batch_id):
            raise lost_error(batch_id, lost)
        removed = connection.one("execute_reset", batch_id=batch_id).removed
        connection.execute("mark_resetting", batch_id=batch_id)
        logger.info("reset: %s of public and raw", counted(removed, "row"))
    return batch


def _list_lost(connection: Connection, batch_id: str) -> list[int]:
    """Return the recognitions of `Plan.lost`."""
    return [row.recognition_id for row in connection.execute("list_lost", batch_id=batch_id)]


def _describe_lost(lost: Sequence[int]) -> str:
    which = f"{counted(len(lost), 'recognition')} that others loaded anew or took over"
    return f"images of {which} name objects that would be deleted: {listed(lost)}"


def lost_error(batch_id: str, lost: Sequence[int]) -> RefusedError:
    """Return the error of a reset that would delete objects which images of others name."""
    hint = "Give them the batch_id again that they had, or adopt what another tool loaded; nothing was changed."
    return RefusedError(f"Batch {batch_id} is not reset: {_describe_lost(lost)}.", hint)


def _list_objects(storage: Storage, batch_id: str) -> Iterator[StoredObject]:
    """Yield the objects that a batch may have sent, and no other object below its prefix."""
    return (found for found in storage.list_objects(f"{batch_id}/recognitions/") if KEY_FORM.fullmatch(found.key))


def _remove_objects(database: Database, storage: Storage, batch: Batch, progress: Callable[[int], None]) -> None:
    """Delete the objects of the manifest by their keys, then what Storage lists besides, until it lists none.

    Raises StorageError if objects remain. Each page is deleted under a lock of the batch's row: a stalled reset must
    not delete objects of a new load.
    """

    def remove(keys: Sequence[str]) -> int:
        def work(connection: Connection) -> int:
            if not batch_state.is_gone(connection, batch.id, batch.created_at):
                message = f"Batch {batch.id} was started anew in the meantime: this reset removes nothing more."
                raise RefusedError(message, f"Look at it with `{connection.command('status')}`.")
            return storage.remove_all(keys)

        missing = database.run(work, timeout=0)
        progress(len(keys))
        return missing

    threads = min(_THREADS, database.connections)
    missing = sum(in_threads(storage, threads, remove, pages(_list_keys(database, batch.id, sent=True), PAGE)))
    if missing:
        gone = f"{counted(missing, 'object')} of batch {batch.id} {'was' if missing == 1 else 'were'}"
        say(f"{gone} missing from the bucket already.", logging.WARNING)
    sum(in_threads(storage, threads, remove, pages(_list_keys(database, batch.id, sent=False), PAGE)))
    if batch.adopted:
        return  # it sent nothing: what is below its prefix is of others
    for _ in range(_ROUNDS):
        if next(_list_objects(storage, batch.id), None) is None:
            return
        listed = pages((found.key for found in _list_objects(storage, batch.id)), PAGE)
        late = sum(in_threads(storage, threads, remove, listed))
        logger.info("reset: %d listed objects were gone before their delete", late)
    message = f"Storage still holds objects of batch {batch.id} after {_ROUNDS} rounds of deleting."
    raise StorageError(message, _HINT)


def _list_keys(database: Database, batch_id: str, *, sent: bool) -> Iterator[str]:
    """Yield the keys of the manifest: of the shards whose upload is marked, or of the others."""
    after: int | None = -1
    while after is not None:
        work = methodcaller("execute", "list_keys", batch_id=batch_id, sent=sent, after=after, count=PAGE)
        rows = database.run(work, read_only=True)
        yield from (key for row in rows for key in row.keys_of_photos)
        after = rows[-1].recognition_id if rows else None


def _delete_manifest(connection: Connection, batch_id: str) -> None:
    """Delete manifest, markers and rejects, and record the time of the reset."""
    connection.execute("lock_batch", batch_id=batch_id)
    if batch_state.require_batch(connection, batch_id).state == "resetting":
        connection.execute("delete_records", batch_id=batch_id)

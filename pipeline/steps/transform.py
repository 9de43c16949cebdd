"""Transform: publish the batch in the domain tables, in one transaction with its marker and its state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from operator import methodcaller

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import prove_bucket
from pipeline.batches.held import MAXIMUM_REJECTS, find_claimed, find_reason
from pipeline.batches.state import COPY, KIND_LOAD, TRANSFORM, UPLOAD, WHOLE
from pipeline.database import Connection, Database
from pipeline.database.errors import references_refused
from pipeline.errors import ClaimedError, HeldError, PipelineError, RefusedError, UnfinishedError
from pipeline.observe.metrics import Metrics
from pipeline.steps.in_use import set_aside
from pipeline.storage import Storage
from pipeline.units import counted

logger = logging.getLogger(__name__)


def transform_batch(
    database: Database,
    storage: Storage,
    batch_id: str,
    metrics: Metrics,
    report: Callable[[str], None] = lambda _: None,
    *,
    max_rejects: str = MAXIMUM_REJECTS,
) -> None:
    """Publish the batch's raw rows in the domain and finish the batch; do nothing if the marker exists.

    `report` is called with a description of each part before it starts, and of the result. Raises UnfinishedError if a
    shard is not copied yet, HeldError if the batch is held instead, for example because of `max_rejects`, ClaimedError
    if other batches have all that is new, and then forgets the batch, RefusedError if the batch is not being loaded or
    another table references a row to delete. A batch that has nothing which is not on record is forgotten as well: its
    look completes the load.
    """

    forgotten: list[ClaimedError | None] = []  # why, also if the answer to the commit is lost

    def work(connection: Connection) -> HeldError | ClaimedError | bool | None:
        report("waiting for the commits of other batches")
        connection.enqueue("lock_batch", batch_id=batch_id)
        connection.enqueue("lock_commits")
        if forgotten and batch_state.find_batch(connection, batch_id) is None:
            return forgotten[0]
        held = batch_state.hold_unpublished(connection, batch_id)
        if held is None:
            return None
        # A marker of COPY implies that of the upload: it is written after it, and deleted with it.
        if missing := held.shards - connection.one("count_markers", batch_id=batch_id, step=COPY).done:
            message = f"Batch {batch_id}: {missing} of {held.shards} shards are not copied yet."
            raise UnfinishedError(message, "Run the same command again.")
        if connection.one("has_rejected", batch_id=batch_id).there:  # by another process, or before a lost response
            return True
        connection.execute("settle_rejected", batch_id=batch_id)
        weight = connection.one("count_usable", batch_id=batch_id)
        claimed = find_claimed(connection, weight)
        if claimed or not (weight.listed or weight.rejected or weight.transient or weight.held_reason):
            forgotten[:] = [claimed]
            _forget(connection, batch_id, "empty_look" if claimed is None else "delete_look")
            return claimed
        if reason := find_reason(connection, batch_id, weight, max_rejects):
            connection.execute("update_batch_complete", batch_id=batch_id, state="held", reason=reason)
            return batch_state.held_error(connection, batch_id)
        report("publishing the rows of the batch, all in one transaction")
        parts, numbers = [], metrics.copy()
        with numbers.timed("transform"):
            with numbers.timed("transform_plan"):
                if set_aside(connection, batch_id):
                    return True
            for row in connection.execute("transform_batch", batch_id=batch_id):
                numbers.add(row.operation, row.seconds)
                parts.append(f"{row.operation}: {counted(row.rows_written, 'row')} in {row.seconds:.2f} s")
                logger.info("transform: %s", parts[-1])
        report("committing")
        connection.execute("mark_over_known", batch_id=batch_id)
        connection.execute("delete_claims", batch_id=batch_id)
        done = connection.one("update_batch_complete", batch_id=batch_id, state="done", reason=None)
        batch_state.mark(connection, batch_id, TRANSFORM, WHOLE, held.now, numbers.as_dict())
        logger.info("transform: batch %s is done, %s", batch_id, counted(done.recognitions, "recognition"))
        report("\n".join([counted(done.recognitions, "recognition"), *parts]))
        return None

    outcome: HeldError | ClaimedError | bool | None = True
    while outcome is True:
        report("removing what was rejected")
        _remove_rejected(database, storage, batch_id)
        with references_refused():
            outcome = database.run(work, timeout=0)
    if isinstance(outcome, PipelineError):
        raise outcome


def _forget(connection: Connection, batch_id: str, look: str) -> None:
    """Delete a batch of which nothing is published, and empty or delete its look."""
    for statement in (look, "forget_batch"):
        connection.execute(statement, batch_id=batch_id)


def withdraw_lost_shards(database: Database, storage: Storage, batch_id: str) -> list[int]:
    """Compare the bucket with what was sent, once before the commit; return the shards that lost objects.

    Their uploads and copies are forgotten, so that both can be done again.
    """
    batch = database.run(lambda connection: batch_state.require_batch(connection, batch_id))
    if batch.kind != KIND_LOAD or batch.state == "done":
        return []
    _remove_rejected(database, storage, batch_id)
    prove_bucket(storage, {batch_id: batch.bucket_created_at}, RefusedError)
    stored = storage.list_objects(f"{batch_id}/recognitions/")
    found = next(stored, None)
    lost = []
    for shard in range(1, batch.shards + 1):
        work = methodcaller("execute", "list_sent", batch_id=batch_id, shard=shard)
        differ = 0
        for wanted in database.run(work, read_only=True):
            while found is not None and found.key < wanted.key:
                found = next(stored, None)
            is_there = found is not None and (found.key, found.size) == (wanted.key, wanted.size)
            differ += not (is_there and found is not None and found.md5 in (None, wanted.md5))
        is_withdrawn: bool | None = False
        while differ and (is_withdrawn := database.run(partial(_withdraw, batch_id, shard))) is None:
            _remove_rejected(database, storage, batch_id)
        if is_withdrawn:
            logger.warning("transform: shard %d lost objects (%d) and is sent again", shard, differ)
            lost.append(shard)
    return lost


def _withdraw(batch_id: str, shard: int, connection: Connection) -> bool | None:
    """Forget that a shard was sent and copied; return False where another process has published the batch.

    The result is None while objects are to be removed first.
    """
    if batch_state.hold_unpublished(connection, batch_id) is None:
        return False
    if connection.one("has_rejected", batch_id=batch_id).there:
        return None
    for step in (UPLOAD, COPY):
        batch_state.await_step(connection, batch_id, step, shard)
    connection.execute("withdraw_shard", batch_id=batch_id, shard=shard)
    return True


def _remove_rejected(database: Database, storage: Storage, batch_id: str) -> None:
    """Remove recognitions that were rejected after their upload: objects, then rows of the manifest."""

    def work(connection: Connection) -> bool:
        if batch_state.hold_unpublished(connection, batch_id) is None:
            return False
        rows = connection.execute("list_rejected_keys", batch_id=batch_id)
        storage.remove_all([key for row in rows for key in row.keys_of_photos])
        ids = [row.recognition_id for row in rows]
        connection.execute("delete_manifest_rejected", batch_id=batch_id, recognition_ids=ids)
        return bool(rows)

    while database.run(work):
        pass

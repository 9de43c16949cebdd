"""Prove that the key sees the bucket of a batch, and that it is the bucket of the earlier runs.

Row-level security hides a bucket and its objects from a key without rights, so nothing follows from an empty list. The
time at which the bucket was created tells it from one with the same name in another project, or made anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.database import Connection, Database
from pipeline.errors import AccessDenied, PipelineError, RefusedError
from pipeline.storage import Storage

#: The keys of objects that batches send; others in a bucket are left alone.
KEY_FORM = re.compile(r"[^/]+/recognitions/[0-9]+/camera[12]\.jpg")
_HINT = "Check NEXT_PUBLIC_SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY: both must be of the project of these batches."
_OTHER_HINT = (
    "Set NEXT_PUBLIC_SUPABASE_URL and the key to the project that the batch was started in. "
    "If its bucket was deleted, see docs/reference/storage-answers.md."
)


def prove_bucket(
    storage: Storage, recorded: Mapping[str, str | None], missing: type[PipelineError] = AccessDenied
) -> dict[str, Any] | None:
    """Return the settings of the bucket, None if there is none and no batch needs it.

    `recorded` has the time at which the bucket was created, if that is known, by batches that sent objects there.
    Raises AccessDenied (`missing`) if the key does not see the bucket, and RefusedError if it is another one than that
    of every batch.
    """
    if not recorded:
        return storage.find_bucket()
    storage.require_service_key()
    found = storage.find_bucket()
    times = {batch_id: time for batch_id, time in recorded.items() if time is not None}
    batch_id, time = next(iter((times or recorded).items()))
    if found is None:
        message = f"The key does not see the bucket {storage.bucket}, which has objects of batch {batch_id}."
        raise missing(message, _HINT)
    if times and created_at(found) not in times.values():
        message = f"The bucket {storage.bucket} was created at {created_at(found)}, that of batch {batch_id} at {time}"
        raise RefusedError(f"{message}: it is another bucket.", _OTHER_HINT)
    return found


def created_at(bucket: Mapping[str, Any]) -> str | None:
    """Return the time at which Storage created a bucket, as it writes it."""
    return str(bucket["created_at"]) if bucket.get("created_at") else None


def open_bucket(database: Database, storage: Storage, batch_id: str) -> str | None:
    """Create the first batch's bucket, or prove that it is that of this batch or of others; return its creation time.

    Raises RefusedError if it is another one, and what `Storage.ensure_bucket` raises.
    """

    def recorded(connection: Connection) -> Mapping[str, str | None]:
        batch = batch_state.find_batch(connection, batch_id)
        if batch is not None and batch.state != "reset":
            return {batch_id: batch.bucket_created_at}
        return list_recorded(connection, storage.bucket)

    prove_bucket(storage, database.run(recorded, read_only=True), RefusedError)
    storage.ensure_bucket()
    found = storage.find_bucket()
    return created_at(found) if found is not None else None


def record_bucket(connection: Connection, batch_id: str, bucket: Mapping[str, Any]) -> None:
    """Record the bucket of a batch, unless that is done."""
    connection.execute("record_bucket", batch_id=batch_id, bucket_created_at=created_at(bucket))


def list_recorded(connection: Connection, bucket: str) -> dict[str, str | None]:
    """Return a batch for each bucket of a name that objects were sent to, and the time of its creation."""
    rows = connection.execute("list_recorded_buckets", bucket=bucket)
    return {row.id: row.bucket_created_at for row in rows}

"""Prove that the key sees the bucket of a batch, and that it is the bucket of the earlier runs.

Row-level security hides a bucket and its objects from a key without rights, so nothing follows from an empty list. The
time at which the bucket was created tells it from one with the same name in another project, or made anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import AccessDenied, PipelineError, RefusedError
from pipeline.storage import Storage

#: The keys of objects that batches send; others in a bucket are left alone.
KEY_FORM = re.compile(r"[^/]+/recognitions/[0-9]+/camera[12]\.jpg")
#: The prefix of the objects of adopted batches.
ADOPTED_PREFIX = "recognitions/"
#: Photos of others that are looked for until one is found: a row may name an object that is nowhere.
_PROBES = 3
_HINT = (
    "NEXT_PUBLIC_SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY must be of the project that the batch was started in. "
    "If its bucket was deleted, docs/reference/storage-answers.md says how to go on."
)
_ANOTHER_HINT = "Set STORAGE_BUCKET to the bucket of those photos; `status --check` finds it."


def prove_bucket(
    storage: Storage, recorded: Mapping[str, datetime | None], missing: type[PipelineError] = AccessDenied
) -> dict[str, Any] | None:
    """Return the settings of the bucket, None if there is none and no batch needs it.

    Raises AccessDenied for a key from which Storage hides objects, and what `check_bucket` raises.
    """
    storage.require_service_key()
    found = storage.find_bucket()
    check_bucket(storage.bucket, found, recorded, missing)
    return found


def check_bucket(
    name: str,
    found: Mapping[str, Any] | None,
    recorded: Mapping[str, datetime | None],
    missing: type[PipelineError] = AccessDenied,
) -> None:
    """Compare the bucket that the key sees with that of batches which sent objects there.

    `recorded` has the time at which it was created, if that is known, by batch. Raises AccessDenied (`missing`) if the
    key does not see the bucket, and RefusedError if it is another one than that of any batch.
    """
    for batch_id, time in recorded.items():
        if found is None:
            message = f"The key does not see the bucket {name}, or it was deleted: batch {batch_id} has objects in it."
            raise missing(message, _HINT)
        if time not in (None, found["created_at"]):
            message = f"The bucket {name} was created at {found['created_at']}, that of batch {batch_id} at {time}"
            raise RefusedError(f"{message}: it is another bucket.", _HINT)


def open_bucket(database: Database, settings: Settings, batch_id: str) -> datetime:
    """Create the first batch's bucket, or prove that it is that of this batch or of others; return its creation time.

    Raises RefusedError if it is another one, if it does not exist although the project has photos, or if the photos
    that other tools stored are in another bucket; and what `Storage.ensure_bucket` raises.
    """

    def ask(connection: Connection) -> tuple[Mapping[str, datetime | None], list[str]]:
        others = [row.key for row in connection.execute("list_photos_of_others", count=_PROBES)]
        batch = batch_state.find_batch(connection, batch_id)
        if batch is not None and batch.state != "reset":
            return {batch_id: batch.bucket_created_at}, others
        return list_recorded(connection, settings.bucket), others

    recorded, others = database.run(ask, read_only=True)
    with closing(Storage(settings)) as storage:
        if prove_bucket(storage, recorded, RefusedError) is None:
            for photo in database.run(lambda connection: connection.execute("find_photo"), read_only=True):
                message = f"There is no bucket {storage.bucket}, but the project has photos already"
                raise RefusedError(f"{message}, such as {photo.key}.", _ANOTHER_HINT)
        for key in others:
            found = find_bucket_of(storage, settings, key)
            if found not in (None, settings.bucket):
                message = f"The photos that the project has already are in the bucket {found}, not in {settings.bucket}"
                raise RefusedError(f"{message}, for example {key}.", f"Set STORAGE_BUCKET={found}.")
            if found is not None:
                break
        created_at: datetime = storage.ensure_bucket()["created_at"]
    return created_at


def find_bucket_of(storage: Storage, settings: Settings, key: str) -> str | None:
    """Return the bucket that has an object, that of `storage` if several do; None if none has it."""
    if storage.find(key) is not None:
        return storage.bucket
    for name in storage.list_buckets():
        if name != storage.bucket:
            with closing(Storage(settings, bucket=name)) as other:
                if other.find(key) is not None:
                    return name
    return None


def list_recorded(connection: Connection, bucket: str) -> dict[str, datetime | None]:
    """Return a batch for each bucket of a name that objects were sent to, and the time of its creation."""
    rows = connection.execute("list_recorded_buckets", bucket=bucket)
    return {row.id: row.bucket_created_at for row in rows}

"""Adopt: put on record what another tool loaded, as finished batches; no row of the app and no object is touched.

The list of the bucket and the tables are compared in one transaction, which writes to the schema `ingest` alone: after
an interruption nothing is on record, and what is on record already is not adopted again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from pipeline.batches.bucket import ADOPTED_PREFIX, list_recorded, prove_bucket
from pipeline.batches.resolve import require_schema
from pipeline.database import Connection, Database
from pipeline.errors import RefusedError, UnfinishedError, UsageError
from pipeline.steps.discover import shard_size
from pipeline.storage import Storage
from pipeline.units import counted, listed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adoption:
    """What is adopted: counts, and for each batch its id, its recognitions, and its former id (None without one).

    A photo is missing where an image names no object of the expected key; an object without row is left alone.
    """

    bucket: str
    recognitions: int
    photos: int
    photos_missing: int
    rows_without_photo: int
    objects_without_row: int
    batches: list[dict[str, Any]]

    def describe(self) -> str:
        """Return it as text."""
        if not self.recognitions:
            return "Nothing to adopt: every recognition is on record."
        photos = counted(self.photos, "photo")
        lines = [f"Adopt {counted(self.recognitions, 'recognition')} with {photos} in the bucket {self.bucket}:"]
        lines += _list_batches(self.batches)
        lines.append(f"  photos with a row and without an object: {self.photos_missing} (noticed)")
        lines.append(f"  photos without a row: {self.rows_without_photo} (noticed)")
        lines.append(f"  objects that no row names: {self.objects_without_row} (left alone)")
        return "\n".join(lines)


def adopt(database: Database, storage: Storage, *, keep: bool) -> Adoption:
    """Put recognitions on record that no batch has; return what they are. Without `keep`, change nothing.

    Raises UsageError if the bucket does not exist, RefusedError if it has none of the photos, UnfinishedError if the
    reset of an adopted batch was interrupted.
    """
    made: list[Adoption] = []

    def work(connection: Connection) -> Adoption:
        require_schema(connection)
        found = prove_bucket(storage, list_recorded(connection, storage.bucket), RefusedError)
        if found is None:
            hint = "Set STORAGE_BUCKET to the bucket of the older script; `status --check` looks for it."
            raise UsageError(f"There is no bucket {storage.bucket}.", hint)
        # The list comes first, since it takes longest: until then no table of the app is locked.
        connection.execute("create_listed")
        stored = ((one.key, one.size, one.md5) for one in storage.list_objects(ADOPTED_PREFIX))
        connection.copy_in("pg_temp.listed", ("key", "size", "md5"), stored)
        connection.enqueue("lock_commits")
        connection.execute("create_adopting")
        counts = connection.one("count_adopting")._asdict()
        batches = [row._asdict() for row in connection.execute("list_adopted_batches")]
        if counts["photos_missing"] and not counts["photos"]:
            hint = f"Set STORAGE_BUCKET: `{connection.command('status --check')}` looks for the bucket that has them."
            raise RefusedError(f"The bucket {storage.bucket} has no photo of what is to be adopted.", hint)
        if left := connection.execute("find_resetting"):
            raise _unfinished(connection, left[0].id)
        bucket = {"bucket": storage.bucket, "bucket_created_at": found["created_at"]}
        largest = max((one["recognitions"] for one in batches), default=0)
        connection.execute("insert_adopted", **bucket, shard_size=shard_size(largest, 100))
        if batches or not made:  # else an earlier attempt made them, whose commit was not answered
            made[:] = [Adoption(storage.bucket, batches=batches, **counts)]
        return made[0]

    adoption = database.run(work, timeout=0, keep=keep)
    if keep:
        logger.info("adopt: %s", counted(adoption.recognitions, "recognition"))
    return adoption


@dataclass(frozen=True)
class Forgotten:
    """Adopted batches that are no longer on record, as in `Adoption`."""

    batches: list[dict[str, Any]]

    def describe(self) -> str:
        """Return it as text."""
        if not self.batches:
            return "No batch is adopted."
        title = f"Forget {counted(len(self.batches), 'adopted batch', 'adopted batches')}; rows and objects stay:"
        return "\n".join([title, *_list_batches(self.batches)])


def forget(database: Database, *, keep: bool) -> Forgotten:
    """Forget all adopted batches, and delete nothing else; return which they were. Without `keep`, change nothing.

    Raises RefusedError while batches of ours have recognitions of theirs, UnfinishedError while one is being reset.
    """
    made: list[Forgotten] = []

    def work(connection: Connection) -> Forgotten:
        require_schema(connection)
        connection.enqueue("lock_commits")
        if over := [row.id for row in connection.execute("find_over_adopted")]:
            message = f"Adopted recognitions were loaded or annotated again since, by {listed(over)}."
            hint = f"First give them back as they were: `{connection.command(f'reset --batch-id {over[0]}')}`."
            raise RefusedError(message, hint)
        if left := connection.execute("find_adopted_resetting"):
            raise _unfinished(connection, left[0].id)
        batches = [row._asdict() for row in connection.execute("list_adopted")]
        connection.execute("forget_adopted")
        if batches or not made:
            made[:] = [Forgotten(batches)]
        return made[0]

    return database.run(work, timeout=0, keep=keep)


def _unfinished(connection: Connection, batch_id: str) -> UnfinishedError:
    hint = f"Finish it first: `{connection.command(f'reset --batch-id {batch_id}')}`."
    return UnfinishedError(f"The reset of the adopted batch {batch_id} was interrupted.", hint)


def _list_batches(batches: list[dict[str, Any]]) -> list[str]:
    lines = []
    for one in batches:
        former = "without a batch id" if one["former_id"] is None else f"batch_id {one['former_id']}"
        known = "" if one["former_id"] == one["id"] else f", {former}"
        lines.append(f"  batch {one['id']}: {counted(one['recognitions'], 'recognition')}{known}")
    return lines

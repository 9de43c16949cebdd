"""Upload a shard: send its photos, compare the bucket with what was read, and write the marker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from os.path import commonprefix
from pathlib import Path

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import KEY_FORM, prove_bucket
from pipeline.batches.state import COPY, KIND_LOAD, UPLOAD, Batch
from pipeline.database import Connection, Database
from pipeline.dataset.records import File, Recognition, Reject
from pipeline.errors import DatabaseUnavailable, DataError, Interrupted, PipelineError, RefusedError, StorageError
from pipeline.observe.metrics import Metrics
from pipeline.steps.read import Facts
from pipeline.steps.send import Entry, ShardTransfer, UploadThreads
from pipeline.steps.source import require_source
from pipeline.storage import PAGE, Storage, StoredObject
from pipeline.units import counted

logger = logging.getLogger(__name__)

_ROUNDS = 3
_LOOKED_AHEAD = 64  # shards among which the next one without a marker is started ahead
_LISTED_HINT = "Look at what is between this machine and Storage."

#: Called with a shard and its number of recognitions; returns what is called with 1 for each completed one.
ProgressOf = Callable[[int, int], Callable[[int], None]]


@dataclass(frozen=True)
class _StartedShard:
    """A shard whose upload is in progress."""

    batch_id: str
    shard: int
    held: Batch
    entries: Sequence[Entry]
    storage: Storage
    metrics: Metrics
    transfer: ShardTransfer


class Uploader:
    """Upload shards to one bucket, one after another, with the same threads and connections.

    With `ahead`, the next shard starts before a shard is complete: only for a process that loads the batch alone, since
    two would send the same photos. Without `may_reject`, this host rejects no files; see `require_source`.
    """

    def __init__(self, database: Database, storage: Storage, *, ahead: bool = False, may_reject: bool = True) -> None:
        self._database, self._storage = database, storage
        self._starts_ahead, self._may_reject = ahead, may_reject
        self._threads = UploadThreads(storage.threads)
        self._next: _StartedShard | None = None
        self._proved: tuple[str, datetime] | None = None

    def upload(self, batch_id: str, shard: int, progress_of: ProgressOf = lambda *_: lambda _: None) -> None:
        """Upload the photos of a shard and write its marker; do nothing if the marker exists.

        Raises DataError, after which the objects of the shard are removed, or RefusedError or HeldError if the batch is
        not being loaded. After StorageError, StorageUnavailable or SourceUnavailable the objects stay. After any of
        them, and where the marker exists in the end, those are removed that the batch does not have: another run has
        rejected them, or the batch was reset.
        """
        if self._next is not None and (self._next.batch_id, self._next.shard) != (batch_id, shard):
            self._abandon_next()
        started, self._next = self._next or self._start(batch_id, (shard,), progress_of), None
        if started is None:
            return
        try:
            if self._starts_ahead:
                last = min(started.held.shards, shard + _LOOKED_AHEAD)
                self._start_next(batch_id, range(shard + 1, last + 1), progress_of)
            self._finish(started)
        except BaseException as exc:  # an interrupt included
            started.transfer.stop()
            if isinstance(exc, PipelineError) and not isinstance(exc, (Interrupted, DatabaseUnavailable)):
                invalid = started.held.created_at if isinstance(exc, DataError) else None
                _clean_up(self._database, self._storage, batch_id, shard, started.entries, invalid)
            raise

    def close(self) -> None:
        """Stop the shard that was started ahead, and end the threads."""
        self._abandon_next()
        self._threads.executor.shutdown()

    def _start(self, batch_id: str, shards: Sequence[int], progress_of: ProgressOf) -> _StartedShard | None:
        """Start the first of `shards` without a marker; return None if all have one."""

        def work(connection: Connection) -> tuple[int, Batch, list[Entry]] | None:
            held = batch_state.hold(connection, batch_id)
            pending = batch_state.pending_shards(connection, batch_id, UPLOAD, shards)
            if not pending:
                return None
            if held.bucket != self._storage.bucket:
                message = f"Batch {batch_id} goes into the bucket {held.bucket}, not into {self._storage.bucket}."
                raise RefusedError(message, "Set STORAGE_BUCKET to the former value.")
            return pending[0], held, _entries(connection, batch_id, pending[0])

        found = self._database.run(work)
        if found is None:
            return None
        shard, held, entries = found
        if self._proved != (batch_id, held.created_at):  # before the first object is sent
            prove_bucket(self._storage, {batch_id: held.bucket_created_at}, RefusedError)
            self._proved = batch_id, held.created_at
        metrics = Metrics()
        storage = self._storage.part(metrics)
        present = {one.key: one for one in _stored_range(storage, entries)}
        progress = progress_of(shard, len(entries))
        transfer = ShardTransfer(self._threads, storage, Path(held.source), entries, present, metrics, progress)
        return _StartedShard(batch_id, shard, held, entries, storage, metrics, transfer)

    def _start_next(self, batch_id: str, shards: Sequence[int], progress_of: ProgressOf) -> None:
        try:
            self._next = self._start(batch_id, shards, progress_of)
        except PipelineError as exc:  # the shard's own task will report it
            logger.debug("upload: the next shard is not started ahead: %s", exc.message)

    def _abandon_next(self) -> None:
        """Stop a shard that was started ahead; keep for a later run what the batch has of its objects."""
        started, self._next = self._next, None
        if started is None:
            return
        started.transfer.stop()
        try:
            with self._database.transaction() as connection:  # without retries, so that stopping takes no time
                _remove_late(connection, self._storage, started.batch_id, started.shard, started.entries)
        except PipelineError as exc:
            logger.info("upload: cannot find out what batch %s has: %s", started.batch_id, exc.message)

    def _finish(self, started: _StartedShard) -> None:
        """Wait for the photos, verify and mark the shard."""
        source, entries, transfer = Path(started.held.source), started.entries, started.transfer
        results: dict[int, Facts | Reject] = {}
        for attempt in range(_ROUNDS + 1):
            if attempt:
                transfer = ShardTransfer(self._threads, started.storage, source, entries, {}, started.metrics)
            for entry, result in zip(entries, transfer.results(), strict=True):
                results[entry.recognition.recognition_id] = result
            rejects = [result for result in results.values() if isinstance(result, Reject)]
            require_source(source, rejects, may_reject=self._may_reject)
            facts = [result for result in results.values() if isinstance(result, Facts)]
            wrong = self._verify_and_mark(started, facts, rejects)
            if not wrong:
                loaded, left_out = counted(len(facts), "recognition"), counted(len(rejects), "reject")
                logger.info("upload: shard %d: %s, %s", started.shard, loaded, left_out)
                return
            logger.warning("upload: %d objects in the bucket differ from what was sent", len(wrong))
            started.metrics.count("objects_resent", len(wrong))
            entries = [replace(one, former={}) for one in started.entries if wrong.intersection(one.keys)]
        objects = counted(len(wrong), "object differs", "objects differ")
        message = f"Storage does not keep what it was sent: {objects} after {_ROUNDS} more rounds."
        raise StorageError(message, "Look at the Storage server's log and disk.")

    def _verify_and_mark(self, started: _StartedShard, facts: list[Facts], rejects: list[Reject]) -> set[str]:
        """Compare the bucket with what was sent, and mark the shard if they agree; return the keys that differ.

        Under the lock of the step: of two runs that upload the same shard, only the first one here records anything.
        What the manifest has lost, because a run before rejected it, is removed.
        """
        batch_id, shard, storage, created_at = started.batch_id, started.shard, started.storage, started.held.created_at
        keys = {entry.recognition.recognition_id: entry.keys for entry in started.entries}

        def work(connection: Connection) -> set[str]:
            batch_state.hold(connection, batch_id, created_at=created_at)
            connection.enqueue("lock_step", batch_id=batch_id, step=UPLOAD, shard=shard)
            found = connection.one("find_upload", batch_id=batch_id, shard=shard)
            listed = set(found.recognition_ids)
            if found.marked:
                storage.remove_all([key for number, pair in keys.items() if number not in listed for key in pair])
                return set()
            usable = [one for one in facts if one.recognition.recognition_id in listed]
            wanted = {
                key: StoredObject(key, file.size, photo.md5)
                for one in usable
                for key, file, photo in zip(
                    keys[one.recognition.recognition_id], one.recognition.photos, one.photos, strict=True
                )
            }
            stored = {one.key: one for one in _stored_range(storage, started.entries)}
            # Storage may not report an MD5.
            wrong = {key for key, one in wanted.items() if stored.get(key) not in (one, replace(one, md5=None))}
            if wrong:
                return wrong
            storage.remove_all([key for key in stored if key not in wanted])
            _record(connection, batch_id, shard, usable, [one for one in rejects if one.recognition_id in listed])
            storage.limiter.report(started.metrics)
            batch_state.mark(connection, batch_id, UPLOAD, shard, started.held.now, started.metrics.as_dict())
            return set()

        return self._database.run(work)


def roll_back_upload(database: Database, storage: Storage, batch_id: str, shard: int) -> None:
    """Undo the upload of a shard whose COPY failed permanently, unless another run copied it."""

    def work(connection: Connection) -> tuple[list[Entry], datetime] | None:
        held = batch_state.hold_step(connection, batch_id, COPY, shard)
        if held is None or held.kind != KIND_LOAD:
            return None
        # Before the objects, so that a crash in between leaves no marker without objects.
        connection.execute("delete_marker", batch_id=batch_id, step=UPLOAD, shard=shard)
        return _entries(connection, batch_id, shard), held.created_at

    try:
        found = database.run(work)
    except PipelineError as exc:
        logger.warning("copy: the objects of a failed shard remain: %s", exc.message)
        return
    if found is not None:
        _clean_up(database, storage, batch_id, shard, *found)


def _clean_up(
    database: Database, storage: Storage, batch_id: str, shard: int, entries: Sequence[Entry], invalid: datetime | None
) -> None:
    """Try to do what `_remove_late` does, after a shard failed."""
    try:
        database.run(lambda connection: _remove_late(connection, storage, batch_id, shard, entries, invalid))
    except PipelineError as exc:
        logger.warning("upload: the objects of a failed shard remain: %s", exc.message)


def _remove_late(
    connection: Connection,
    storage: Storage,
    batch_id: str,
    shard: int,
    entries: Sequence[Entry],
    invalid: datetime | None = None,
) -> None:
    """Remove the objects of entries that the batch of this id does not have.

    It rejected them, was reset or forgotten, or was started anew without them. A batch that was started at the time
    `invalid` has none of a shard without a marker. Until the transaction ends, no other run marks the shard, makes the
    batch or starts it anew.
    """
    connection.enqueue("hold_batch", batch_id=batch_id)
    connection.enqueue("lock_absent", batch_id=batch_id)
    connection.enqueue("lock_step", batch_id=batch_id, step=UPLOAD, shard=shard)
    given = {"batch_id": batch_id, "shard": shard, "invalid": invalid}
    ids = [entry.recognition.recognition_id for entry in entries]
    kept = {key for row in connection.execute("list_kept", recognition_ids=ids, **given) for key in row.object_keys}
    storage.remove_all([key for entry in entries for key in entry.keys if key not in kept])


def _entries(connection: Connection, batch_id: str, shard: int) -> list[Entry]:
    entries = []
    for row in connection.execute("list_manifest", batch_id=batch_id, shard=shard):
        first, second = map(File, row.photo_paths, row.photo_sizes, row.photo_mtimes)
        menu = File(row.menu_path, row.menu_size, row.menu_mtime) if row.menu_path is not None else None
        receipt = File(row.receipt_path, row.receipt_size, row.receipt_mtime) if row.receipt_path is not None else None
        recognition = Recognition(row.recognition_id, (first, second), menu, receipt, None)
        former = zip(row.former_sha256s + row.former_md5s, 2 * row.former_keys, strict=True) if row.former_keys else ()
        entries.append(Entry(recognition, (row.object_keys[0], row.object_keys[1]), dict(former)))
    return entries


def _stored_range(storage: Storage, entries: Sequence[Entry]) -> Iterator[StoredObject]:
    """Yield the objects of the batch from the shard's first key to its last; a shard is a range of keys.

    Raises StorageError if they are far more than the shard has.
    """
    if not entries:
        return
    first, last = entries[0].keys[0], entries[-1].keys[1]
    prefix = commonprefix((first, last))  # noqa: RUF071 (any prefix of the keys, not a folder)
    listed = storage.list_objects(prefix, after=first.removesuffix("camera1.jpg"), last=last)
    most = 2 * len(entries) + PAGE
    for count, one in enumerate(one for one in listed if KEY_FORM.fullmatch(one.key)):
        if count > most:
            raise StorageError(f"Storage lists far more objects below {prefix} than were sent.", _LISTED_HINT)
        yield one


def _record(connection: Connection, batch_id: str, shard: int, facts: list[Facts], rejects: list[Reject]) -> None:
    """Add the upload's facts to the manifest, and delete what it rejected."""
    connection.execute("create_facts")
    rows = [
        (
            fact.recognition.recognition_id,
            [photo.dimensions.width for photo in fact.photos],
            [photo.dimensions.height for photo in fact.photos],
            [photo.dimensions.orientation for photo in fact.photos],
            [photo.sha256 for photo in fact.photos],
            [photo.md5 for photo in fact.photos],
            fact.menu_sha256,
            fact.receipt_sha256,
        )
        for fact in facts
    ]
    pairs = ("widths", "heights", "orientations", "sha256s", "md5s")
    connection.copy_in("pg_temp.facts", ("recognition_id", *pairs, "menu_sha256", "receipt_sha256"), rows)
    connection.enqueue("update_manifest_facts", batch_id=batch_id, shard=shard)
    connection.enqueue("delete_upload_notices", batch_id=batch_id, shard=shard)
    notices = [notice for fact in facts for notice in fact.notices]
    batch_state.add_inputs(connection, batch_id, UPLOAD, shard, notices)
    if rejects:
        ids = [reject.recognition_id for reject in rejects]
        batch_state.add_inputs(connection, batch_id, UPLOAD, shard, rejects)
        connection.execute("note_rejected", batch_id=batch_id, step=UPLOAD, shard=shard)
        connection.execute("delete_manifest_rejected", batch_id=batch_id, recognition_ids=ids)
        connection.execute("delete_claims_rejected", batch_id=batch_id, kind=KIND_LOAD, recognition_ids=ids)

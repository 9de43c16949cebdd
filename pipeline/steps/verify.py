"""Verify: compare manifest and tables with the bucket, in both directions, and check the database for consistency.

Manifest and bucket yield keys in the same order, so that one merge finds all differences. Transactions are short, so a
load or a reset may change a batch in the meantime; a difference counts only if its batch did not change.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import ADOPTED_PREFIX, KEY_FORM, prove_bucket
from pipeline.batches.state import KIND_LOAD
from pipeline.database import Connection, Database
from pipeline.errors import (
    BadInput,
    ObjectNotFound,
    RefusedError,
    StorageError,
    StorageUnavailable,
    UnfinishedError,
    UsageError,
)
from pipeline.steps.parallel import in_threads, pages
from pipeline.steps.read import BUDGET, Budget, read_up_to
from pipeline.storage import PAGE, Storage, StoredObject
from pipeline.units import counted

#: The kinds of findings, and the sign that a line begins with. A missing object is `dangling` if readers see a row that
#: names it, and `missing` if they see another version; a row that contradicts others is `inconsistent`.
SIGNS = {"equal": "=", "missing": "-", "dangling": "-", "damaged": "*", "orphan": "+", "inconsistent": "*"}
EQUAL, MISSING, DANGLING, DAMAGED, ORPHAN, INCONSISTENT = SIGNS

#: Queries for rows that violate a guarantee of docs/explanation/architecture.md: what, message, batch_id.
CHECKS = [f"check_{what}" for what in ("versions", "images", "raw", "receipts", "annotations", "menus", "markers")]

#: How often what was read is recorded: an interruption forgets no more.
_RECORD_SECONDS = 1.0
_KNOWN = "a batch has it on record, or an image names it"


@dataclass(frozen=True)
class Finding:
    """The state of the object or the row that `key` names.

    An object without a photo on record has no `path` (in the batch's source) and `sha256`; its `size` is its own. The
    `sha256` of an adopted object is None until it is read.
    """

    kind: str
    key: str
    message: str = ""
    batch_id: str | None = None
    path: str = ""
    size: int = 0
    sha256: str | None = ""

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{SIGNS[self.kind]} {self.key}" + (f" {self.kind}: {self.message}" if self.message else "")


class Verification:
    """A comparison of a database, or one batch of it, with a bucket.

    A `deep` one reads every object and compares its SHA-256, not only its size and the MD5 that Storage lists. What was
    read, and when, is on record (ingest.proofs).
    """

    def __init__(
        self, database: Database, storage: Storage, *, batch_id: str | None = None, deep: bool = False
    ) -> None:
        """List the batches, and prove that the key sees their bucket.

        Raises UsageError if there is no such batch, UnfinishedError if it is not finished, and what `prove_bucket`
        raises.
        """
        self._database, self._storage, self.bucket = database, storage, storage.bucket
        self._batch_id, self._deep = batch_id, deep
        self._filters = {"bucket": self.bucket, "batch_id": batch_id}
        self._batches = self._list_batches()
        self._equal = self._foreign = 0
        self._is_complete = False
        #: How many objects `read_longest_unread` has read.
        self.read = 0
        #: Batches that are skipped, since they are not finished.
        self.unfinished = [one.id for one in self._batches.values() if one.state in ("loading", "held", "resetting")]
        #: Finished batches whose objects are in other buckets, by bucket.
        self.elsewhere: dict[str, list[str]] = {}
        if batch_id is not None:
            batch = self._batches.get(batch_id)
            if batch is None or (batch.kind == KIND_LOAD and batch.bucket != self.bucket):
                hint = f"See `{database.command('status')}` for the batches there are."
                raise UsageError(f"There is no batch {batch_id} with objects in the bucket {self.bucket}.", hint)
            if batch_id in self.unfinished:
                message = f"Batch {batch_id} is {batch.state}: only a finished batch can be verified."
                raise UnfinishedError(message, f"Finish it first: `{database.command('status')}` has the command.")
        here = [one for one in self._batches.values() if self._is_here(one) and batch_id in (None, one.id)]
        prove_bucket(storage, {one.id: one.bucket_created_at for one in here if one.state != "reset"})
        for one in self._batches.values():
            if batch_id is None and one.kind == KIND_LOAD and one.state == "done" and one.bucket != self.bucket:
                self.elsewhere.setdefault(one.bucket, []).append(one.id)

    def _list_batches(self) -> dict[str, Any]:
        return {row.id: row for row in self._rows("list_verifiable")}

    def run(self) -> Iterator[Finding]:
        """Yield a finding for every expected or stored object, then for every inconsistency."""
        findings = self._compare()
        if self._deep:
            findings = in_threads(self._storage, self._storage.threads, self._read, findings)
        for page in pages(findings, PAGE, _RECORD_SECONDS if self._deep else math.inf):
            if self._deep:
                self._record(page)
            for finding in self._confirmed(page):
                self._equal += finding.kind == EQUAL
                self._foreign += finding.kind == ORPHAN and finding.batch_id is None
                yield finding
        yield from self._inconsistencies()
        self._is_complete = True

    def read_longest_unread(self, deadline: float) -> Iterator[Finding]:
        """Read objects until a time of the monotonic clock, the longest unread first.

        Yield those that differ in a way that `run` does not see without reading.
        """
        for rows in self._unread():
            read = partial(self._read_row, deadline=deadline)
            results = in_threads(self._storage, self._storage.threads, read, rows)
            for page in pages(filter(None, results), PAGE, _RECORD_SECONDS):
                self._record([finding for finding, _ in page])
                self.read += len(page)
                yield from self._confirmed([finding for finding, is_new in page if is_new])
            if time.monotonic() >= deadline:
                return

    def _unread(self) -> Iterator[Sequence[Any]]:
        """Yield rows of list_expected in pages: of objects that were never read, then of those read the longest ago.

        Each page is to be read and recorded before the next.
        """
        before = self._rows("now")[0].now
        for batch in self._rows("list_unproven", **self._filters):
            after = -1
            while page := self._rows("list_never_read", batch_id=batch.id, after=after, count=PAGE // 2):
                after = page[-1].recognition_id
                yield page
        while page := self._rows("list_oldest_read", before=before, count=PAGE, **self._filters):
            yield page

    def _rows(self, statement: str, **parameters: object) -> Sequence[Any]:
        def work(connection: Connection) -> Sequence[Any]:
            connection.enqueue("prefer_indexes")
            return connection.execute(statement, **parameters)

        return self._database.run(work, timeout=0, read_only=True)

    def _read_row(self, row: Any, deadline: float) -> tuple[Finding, bool] | None:
        """Read an object and return whether it differs in a way that `run` does not see; None after the deadline."""
        if time.monotonic() >= deadline:
            return None
        finding = self._read(Finding(EQUAL, row.key, "", row.batch_id, row.path, row.size, row.sha256))
        is_new = finding.kind != EQUAL and _found(row, self._storage.find(row.key)).kind == EQUAL
        return finding, is_new

    def _record(self, page: Iterable[Finding]) -> None:
        """Record which objects were read and are equal, and that the others are not proven."""
        known = [finding for finding in page if finding.batch_id is not None]
        for statement, is_equal in (("record_reads", True), ("delete_proofs_of", False)):
            found = [one for one in known if (one.kind == EQUAL) == is_equal]
            values = {"batch_ids": [one.batch_id for one in found], "keys": [one.key for one in found]}
            values["digests"] = [one.sha256 for one in found]
            if found:
                self._database.run(methodcaller("execute", statement, **values))

    def _compare(self) -> Iterator[Finding]:
        """Merge the expected keys with the stored ones; each source is sorted."""
        prefix = ""
        if self._batch_id is not None:
            prefix = ADOPTED_PREFIX if self._batches[self._batch_id].adopted else f"{self._batch_id}/"
        stored = self._storage.list_objects(prefix)
        merged = heapq.merge(self._expected(), self._expected_adopted(), stored, key=attrgetter("key"))
        for _, same in itertools.groupby(merged, key=attrgetter("key")):
            first, *stored_too = same  # of an expected key and its object, the key comes first
            if not isinstance(first, StoredObject):
                yield _found(first, *stored_too)
            elif finding := self._unexpected(first):
                yield finding

    def _expected(self) -> Iterator[Any]:
        for batch in self._batches.values():
            if self._is_wanted(batch) and not batch.adopted:
                for shard in range(1, batch.shards + 1):
                    yield from self._rows("list_expected", batch_id=batch.id, shard=shard)

    def _expected_adopted(self) -> Iterator[Any]:
        after = ""
        if any(self._is_wanted(one) and one.adopted for one in self._batches.values()):
            while rows := self._rows("list_expected_adopted", after=after, count=PAGE, **self._filters):
                after = str(rows[-1].recognition_id)
                yield from (row for row in rows if row.key is not None)

    def _is_here(self, batch: Any) -> bool:
        """Return whether a batch, if there is one, has its objects in this bucket."""
        return batch is not None and batch.kind == KIND_LOAD and batch.bucket == self.bucket

    def _is_wanted(self, batch: Any) -> bool:
        """Return whether the objects of a batch are expected in this bucket."""
        return self._is_here(batch) and batch.state == "done" and self._batch_id in (None, batch.id)

    def _unexpected(self, stored: StoredObject) -> Finding | None:
        """Return a finding for an object that no finished batch names; None if another one may, or somebody else."""
        if not KEY_FORM.fullmatch(stored.key):
            return None
        batch = self._batches.get(stored.key.partition("/")[0])
        owner = None
        if batch is None or batch.kind != KIND_LOAD:
            message = "of no batch on record"
        elif batch.bucket != self.bucket:
            message = f"of a batch that is in the bucket {batch.bucket}"
        elif batch.id in self.unfinished:
            return None
        else:
            owner, message = batch.id, "that no row names"
        return Finding(ORPHAN, stored.key, f"{counted(stored.size, 'byte')}, {message}", owner, size=stored.size)

    def _read(self, finding: Finding) -> Finding:
        """Read an object that seems equal and compare its content."""
        if finding.kind != EQUAL:
            return finding
        size = 0
        for _ in range(2):  # a proxy may have responded with a page of its own
            try:
                size, digest = self._storage.digest(finding.key, finding.size)
            except (StorageError, StorageUnavailable) as exc:
                self._storage.find_bucket()  # raises if Storage as a whole is the problem
                return replace(finding, kind=DAMAGED, message=f"it is listed and cannot be read: {exc.message}")
            if size == finding.size and finding.sha256 in (None, digest):
                return replace(finding, sha256=digest)
        return replace(finding, kind=DAMAGED, message=f"its content differs, {counted(size, 'byte')}")

    def _request(self, finding: Finding) -> Finding:
        """Request an object that the list lacks by its key."""
        if finding.kind in (MISSING, DANGLING) and (stored := self._storage.find(finding.key)) is not None:
            kind = EQUAL if stored.size == finding.size else DAMAGED
            return replace(finding, kind=kind, message="" if kind == EQUAL else f"{stored.size} bytes")
        return finding

    def _confirmed(self, page: Sequence[Finding]) -> Iterator[Finding]:
        """Yield findings, without the differences of batches that a load or a reset changed in the meantime."""
        if any(finding.kind in (MISSING, DANGLING) for finding in page):
            page = list(in_threads(self._storage, self._storage.threads, self._request, page))
        differs = any(finding.kind != EQUAL for finding in page)
        now = self._list_batches() if differs else self._batches
        for finding in page:
            if finding.kind == EQUAL or self._batches.get(_batch_of(finding)) == now.get(_batch_of(finding)):
                yield finding

    def _inconsistencies(self) -> Iterator[Finding]:
        # The findings can be many, and the transaction may be retried, so they are spooled to a file.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:

            def work(connection: Connection, check: str) -> None:
                spool.seek(0)
                spool.truncate()
                for row in connection.stream(check):
                    if self._batch_id in (None, row.batch_id):
                        spool.write(json.dumps([row.what, row.message, row.batch_id]) + "\n")

            for check in CHECKS:
                self._database.run(partial(work, check=check), timeout=0, read_only=True)
                spool.seek(0)
                for line in spool:
                    yield Finding(INCONSISTENT, *json.loads(line))

    def repair(self, findings: Iterator[Finding]) -> Iterator[tuple[Finding, str]]:
        """Upload missing and damaged objects again from their source, and remove orphans.

        Yield each finding with the reason why it was not repaired, empty if it was. Each batch is repaired under its
        run lock, and only if it did not change since it was verified. Raises RefusedError if the bucket seems to belong
        to another database: there are objects of no batch on record, and `run`, read to its end, found none equal.
        """
        if not self._is_complete:
            raise ValueError("read run() to its end first")
        if self._batch_id is not None and not self._equal:  # see whether the first page has objects of any batch
            first = list(itertools.islice(self._storage.list_objects(""), PAGE))
            is_ours = any(self._is_here(self._batches.get(stored.key.partition("/")[0])) for stored in first)
            self._foreign = 0 if is_ours else len(first)
        if self._foreign and not self._equal:
            held = f"{counted(self._foreign, 'object')} of no batch on record, and none that this database has loaded"
            hint = "Check that DATABASE_URL and NEXT_PUBLIC_SUPABASE_URL belong together; nothing was changed."
            raise RefusedError(f"The bucket holds {held}.", hint)
        for page in pages(findings, PAGE):
            rows = [finding for finding in page if finding.kind == INCONSISTENT]
            objects = [finding for finding in page if finding.kind != INCONSISTENT]
            yield from ((finding, "reset the batch and load it again to repair rows") for finding in rows)
            for batch_id, group in itertools.groupby(objects, key=_batch_of):
                yield from self._repair_batch(batch_id, list(group))

    def _repair_batch(self, batch_id: str, group: Sequence[Finding]) -> list[tuple[Finding, str]]:
        """Repair the objects below the prefix of one batch, on record or not."""

        def work(connection: Connection) -> list[tuple[Finding, str]]:
            if not batch_state.try_lock(connection, batch_id):
                return [(finding, f"a run of batch {batch_id} is going on") for finding in group]
            batch, before = batch_state.find_batch(connection, batch_id), self._batches.get(batch_id)
            if (batch and (batch.state, batch.created_at)) != (before and (before.state, before.created_at)):
                return [(finding, f"batch {batch_id} was changed in the meantime") for finding in group]
            is_here = before is not None and before.bucket == self.bucket
            keys = [finding.key for finding in group]
            rows = connection.execute("list_known_keys", batch_id=batch_id, is_here=is_here, keys=keys)
            known = {row.key for row in rows}
            orphans = [one.key for one in group if one.kind == ORPHAN and one.key not in known]
            kept = {key for key in self._storage.remove(orphans) if self._storage.find(key) is not None}
            reasons = dict.fromkeys(known, _KNOWN) | dict.fromkeys(kept, "Storage does not delete it")
            source = Path(before.source if before is not None else "")
            repair = partial(self._repair_object, source, Budget(BUDGET), reasons)
            repaired = in_threads(self._storage, min(8, self._storage.threads), repair, group)
            return list(zip(group, repaired, strict=True))

        return self._database.run(work, timeout=0)

    def _repair_object(self, source: Path, budget: Budget, reasons: Mapping[str, str], finding: Finding) -> str:
        """Upload an object again; return the reason why it is not repaired, empty if it is.

        `reasons` are those of orphans, by their keys.
        """
        if finding.kind == ORPHAN:
            return reasons.get(finding.key, "")
        if not finding.path:
            return f"batch {finding.batch_id} was adopted, so that its source is not known"
        path = source / finding.path
        with budget.reserved(finding.size):
            try:
                content, _ = read_up_to(str(path), finding.size + 1, "photo", "it was loaded")
                if hashlib.sha256(content).hexdigest() != finding.sha256:
                    return f"{path} is no longer what was loaded"
                self._storage.upload(finding.key, content)
                if self._storage.digest(finding.key, finding.size) == (finding.size, finding.sha256):
                    return ""
            except BadInput as exc:
                return f"{path}: {exc.message}"
            except ObjectNotFound:
                pass
            except StorageError as exc:
                return f"Storage refuses it: {exc.message}"
        return "Storage does not keep what it is sent"


def _batch_of(finding: Finding) -> str:
    """Return the batch of a finding, on record or not."""
    return finding.batch_id or finding.key.partition("/")[0]


def _found(wanted: Any, stored: StoredObject | None = None) -> Finding:
    """Compare an expected object, a row of list_expected, with the stored one."""
    kind, message = EQUAL, ""
    if stored is None and wanted.named:
        kind, message = DANGLING, "readers see its row, and there is no object"
    elif stored is None:
        kind, message = MISSING, "the object of a version that a later one superseded"
    elif stored.size != wanted.size:
        kind, message = DAMAGED, f"{counted(stored.size, 'byte')} instead of {wanted.size}"
    elif stored.md5 != wanted.md5 and None not in (stored.md5, wanted.md5):
        kind, message = DAMAGED, "its MD5 differs"
    return Finding(kind, wanted.key, message, wanted.batch_id, wanted.path, wanted.size, wanted.sha256)

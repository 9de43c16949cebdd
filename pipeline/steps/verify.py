"""Verify: hold manifest and domain against the bucket, in both directions, streamed; and the database against itself.

Keys come in the same order from both sides, from the manifest shard by shard, from the bucket page by page, so that one
pass of a merge finds what is on one side only. No transaction is open for long. What a running load or reset changes
meanwhile is told apart by looking at its batch once more before a difference is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from operator import methodcaller
from pathlib import Path

from pipeline.batches import state as batch_state
from pipeline.batches.state import KIND_LOAD
from pipeline.database import Connection, Database
from pipeline.errors import (
    ObjectNotFound,
    RefusedError,
    StorageError,
    StorageUnavailable,
    UnfinishedError,
    UsageError,
)
from pipeline.storage import PAGE, Storage, StoredObject

EQUAL, MISSING, DANGLING, DAMAGED, ORPHAN, INCONSISTENT = (
    "equal",
    "missing",
    "dangling",
    "damaged",
    "orphan",
    "inconsistent",
)
#: The sign that a line begins with.
SIGNS = {EQUAL: "=", MISSING: "-", DANGLING: "-", DAMAGED: "*", ORPHAN: "+", INCONSISTENT: "*"}

#: Each finds rows that break a promise of docs/explanation/architecture.md: what, message, batch_id.
CHECKS = (
    "check_versions",
    "check_images",
    "check_raw",
    "check_receipts",
    "check_annotations",
    "check_menus",
    "check_markers",
)


@dataclass(frozen=True)
class Finding:
    """What is the matter with an object, or with a row.

    Attributes:
        kind: `equal`, `missing` (the object of a version that no reader sees), `dangling` (a row that readers see has
            no object), `damaged`, `orphan`, `inconsistent` (the database contradicts itself).
        key: the object's key, or the row.
        message: a sentence; empty when all is well.
        batch_id: the batch whose it is, None for a stranger.
        path: the photo in the batch's source.
        size: bytes of the photo, of the object where there is no photo.
        sha256: of the photo.
    """

    kind: str
    key: str
    message: str = ""
    batch_id: str | None = None
    path: str = ""
    size: int = 0
    sha256: str = ""

    def line(self) -> str:
        """Return the line that tells of it."""
        return f"{SIGNS[self.kind]} {self.key}" + (f" {self.kind}: {self.message}" if self.message else "")


@dataclass(frozen=True)
class _Batch:
    id: str
    kind: str
    state: str
    source: str
    bucket: str
    shards: int
    created_at: datetime


@dataclass(frozen=True)
class _Expected:
    """An object that has to be there."""

    key: str
    batch_id: str
    path: str
    size: int
    sha256: str
    md5: str
    named: bool

    def finding(self, kind: str, message: str = "") -> Finding:
        """Return what is the matter with it."""
        return Finding(kind, self.key, message, self.batch_id, self.path, self.size, self.sha256)


class Verification:
    """One comparison of a database with a bucket.

    Arguments:
        batch_id: look at this batch only.
        deep: read every object and compare its SHA-256, too; else size, and the MD5 that the bucket has on record.
    """

    def __init__(
        self, database: Database, storage: Storage, bucket: str, *, batch_id: str | None = None, deep: bool = False
    ) -> None:
        """Look which batches there are.

        Raises:
            UsageError: there is no such batch.
            UnfinishedError: it is not finished, so that nothing can be said of it.
        """
        self._database, self._storage, self._bucket = database, storage, bucket
        self._batch_id, self._deep = batch_id, deep
        self._batches = self._list_batches()
        if batch_id is not None:
            batch = self._batches.get(batch_id)
            if batch is None or (batch.kind == KIND_LOAD and batch.bucket != bucket):
                raise UsageError(
                    f"There is no batch {batch_id} with objects in the bucket {bucket}.",
                    "See `python -m pipeline status` for the batches there are.",
                )
            if batch.state in ("loading", "resetting"):
                raise UnfinishedError(
                    f"Batch {batch_id} is {batch.state}: only what is finished can be verified.",
                    "Finish it first: `python -m pipeline status` has the command.",
                )
        #: Batches that are not looked at, since they are not finished.
        self.unfinished = [one.id for one in self._batches.values() if one.state in ("loading", "resetting")]
        #: Finished batches whose objects are in other buckets, by bucket.
        self.elsewhere: dict[str, list[str]] = {}
        for one in self._batches.values():
            if one.kind == KIND_LOAD and one.state == "done" and one.bucket != bucket and batch_id is None:
                self.elsewhere.setdefault(one.bucket, []).append(one.id)

    def _list_batches(self) -> dict[str, _Batch]:
        rows = self._database.run(methodcaller("execute", "list_verifiable"), read_only=True)
        return {row.id: _Batch(*row) for row in rows}

    def run(self) -> Iterator[Finding]:
        """Yield a finding for every object that is or should be there, then for every inconsistency."""
        findings = self._deepened(self._compare()) if self._deep else self._compare()
        while page := list(itertools.islice(findings, PAGE)):
            yield from self._believed(page)
        yield from self._inconsistencies()

    def _compare(self) -> Iterator[Finding]:
        """Merge the keys that have to be there with those that are."""
        expected = self._expected()
        prefix = f"{self._batch_id}/" if self._batch_id is not None else ""
        wanted = next(expected, None)
        for stored in self._storage.list_objects(prefix):
            while wanted is not None and wanted.key < stored.key:
                yield _lost(wanted)
                wanted = next(expected, None)
            if wanted is not None and wanted.key == stored.key:
                yield _compared(wanted, stored)
                wanted = next(expected, None)
            elif (finding := self._stranger(stored)) is not None:
                yield finding
        while wanted is not None:
            yield _lost(wanted)
            wanted = next(expected, None)

    def _expected(self) -> Iterator[_Expected]:
        for batch in self._batches.values():
            if batch.kind != KIND_LOAD or batch.state != "done" or batch.bucket != self._bucket:
                continue
            if self._batch_id not in (None, batch.id):
                continue
            for shard in range(1, batch.shards + 1):
                yield from self._database.run(self._expected_of(batch.id, shard), timeout=0, read_only=True)

    def _expected_of(self, batch_id: str, shard: int) -> Callable[[Connection], list[_Expected]]:
        def work(connection: Connection) -> list[_Expected]:
            rows = connection.execute("list_expected", batch_id=batch_id, shard=shard)
            return [_Expected(row.key, batch_id, row.path, row.size, row.sha256, row.md5, row.named) for row in rows]

        return work

    def _stranger(self, stored: StoredObject) -> Finding | None:
        """Return what an object is that no finished batch names; None when an unfinished one may."""
        batch = self._batches.get(stored.key.partition("/")[0])
        if batch is None or batch.kind != KIND_LOAD:
            return Finding(ORPHAN, stored.key, f"{stored.size} bytes, of no batch on record", size=stored.size)
        if batch.bucket != self._bucket:
            message = f"{stored.size} bytes, of a batch that is in the bucket {batch.bucket}"
            return Finding(ORPHAN, stored.key, message, size=stored.size)
        if batch.state in ("loading", "resetting"):
            return None
        return Finding(ORPHAN, stored.key, f"{stored.size} bytes, that no row names", batch.id, size=stored.size)

    def _deepened(self, findings: Iterator[Finding]) -> Iterator[Finding]:
        """Read what seems to be equal, several objects at once, in the order of the findings."""
        pending: deque[Finding | Future[Finding]] = deque()
        with ThreadPoolExecutor(self._storage.threads, thread_name_prefix="verify") as executor:
            try:
                for finding in findings:
                    pending.append(executor.submit(self._read, finding) if finding.kind == EQUAL else finding)
                    if len(pending) > 4 * self._storage.threads:
                        yield _settled(pending.popleft())
                while pending:
                    yield _settled(pending.popleft())
            except BaseException:
                self._storage.stop()
                executor.shutdown(wait=True, cancel_futures=True)
                raise

    def _read(self, finding: Finding) -> Finding:
        size = 0
        for _ in range(2):  # once more, for on the way anything may answer with a page of its own
            try:
                size, digest = self._storage.digest(finding.key)
            except (StorageError, StorageUnavailable) as exc:
                self._storage.find_bucket()  # fails as well where it is not the object that is to blame
                return replace(finding, kind=DAMAGED, message=f"it is listed and cannot be read: {exc.message}")
            if (size, digest) == (finding.size, finding.sha256):
                return finding
        return replace(finding, kind=DAMAGED, message=f"its content is another, of {size} bytes")

    def _believed(self, page: Sequence[Finding]) -> Iterator[Finding]:
        """Yield findings without the differences of batches that a load or a reset changed meanwhile."""
        if all(finding.kind == EQUAL for finding in page):
            yield from page
            return
        now = self._list_batches()
        for finding in page:
            before, after = self._batches.get(_owner(finding)), now.get(_owner(finding))
            if finding.kind == EQUAL or before == after:
                yield finding

    def _inconsistencies(self) -> Iterator[Finding]:
        # A file keeps what is found until its transaction is over: it may be long, and may have to be tried again.
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

    # Repair

    def repair(self, findings: Iterator[Finding]) -> Iterator[tuple[Finding, str]]:
        """Send what is missing or damaged again from its source, remove orphans; yield each with why it was not mended.

        The reason is empty when it was. Whatever is done is done under the lock of the batch's runs, and only when the
        batch is still what it was.

        Raises:
            RefusedError: the bucket holds strangers, and no object of this database: it may be another one's.
        """
        while page := list(itertools.islice(findings, PAGE)):
            rows = [finding for finding in page if finding.kind == INCONSISTENT]
            yield from ((finding, _BY_HAND) for finding in rows)
            objects = [finding for finding in page if finding.kind != INCONSISTENT]
            for batch_id, group in itertools.groupby(objects, key=_owner):
                yield from self._mended(batch_id, list(group))

    def _mended(self, batch_id: str, group: Sequence[Finding]) -> list[tuple[Finding, str]]:
        """Mend what is the matter below the prefix of one batch, on record or not."""

        def work(connection: Connection) -> list[tuple[Finding, str]]:
            if not batch_state.try_lock(connection, batch_id):
                return [(finding, f"a run of batch {batch_id} is going on") for finding in group]
            batch, before = batch_state.find_batch(connection, batch_id), self._batches.get(batch_id)
            if (batch and (batch.state, batch.created_at)) != (before and (before.state, before.created_at)):
                return [(finding, f"batch {batch_id} was changed meanwhile") for finding in group]
            known: set[str] = set()
            if before is not None and before.bucket == self._bucket:
                keys = [finding.key for finding in group]
                known = {row.key for row in connection.execute("list_known_keys", batch_id=batch_id, keys=keys)}
            self._storage.remove([one.key for one in group if one.kind == ORPHAN and one.key not in known])
            source = Path(before.source if before is not None else "")
            with ThreadPoolExecutor(min(8, self._storage.threads), thread_name_prefix="repair") as executor:
                reasons = executor.map(lambda one: self._mend(source, one, one.key in known), group)
                return list(zip(group, reasons, strict=True))

        return self._database.run(work, timeout=0)

    def _mend(self, source: Path, finding: Finding, known: bool) -> str:
        """Send an object again; return why it is not mended, nothing when it is."""
        if finding.kind == ORPHAN:
            return f"batch {_owner(finding)} has it on record" if known else ""
        try:
            content = (source / finding.path).read_bytes()
        except OSError as exc:
            return f"{source / finding.path} cannot be read: {exc.strerror}"
        if hashlib.sha256(content).hexdigest() != finding.sha256:
            return f"{source / finding.path} is no longer what was loaded"
        self._storage.upload(finding.key, content)
        with contextlib.suppress(ObjectNotFound):
            if self._storage.digest(finding.key) == (finding.size, finding.sha256):
                return ""
        return "Storage does not keep what it is sent"


_BY_HAND = "rows are mended by resetting the batch and loading it again"


def _owner(finding: Finding) -> str:
    """Return the batch whose a finding is, on record or not."""
    return finding.batch_id or finding.key.partition("/")[0]


def _lost(wanted: _Expected) -> Finding:
    if wanted.named:
        return wanted.finding(DANGLING, "readers see its row, and there is no object")
    return wanted.finding(MISSING, "the object of a version that a later one superseded")


def _compared(wanted: _Expected, stored: StoredObject) -> Finding:
    if stored.size != wanted.size:
        return wanted.finding(DAMAGED, f"{stored.size} bytes instead of {wanted.size}")
    if stored.md5 not in (None, wanted.md5):
        return wanted.finding(DAMAGED, "its MD5 is another")
    return wanted.finding(EQUAL)


def _settled(finding: Finding | Future[Finding]) -> Finding:
    return finding if isinstance(finding, Finding) else finding.result()


def refuse_foreign_bucket(equal: int, strangers: int) -> None:
    """Raise when a repair would empty a bucket that shows no sign of being this database's.

    Raises:
        RefusedError: there are objects of no batch on record, and not one that is as it should be.
    """
    if strangers and not equal:
        raise RefusedError(
            f"The bucket holds {strangers} objects of no batch on record, and none that this database has loaded.",
            "Check that DATABASE_URL and NEXT_PUBLIC_SUPABASE_URL belong together; nothing was changed.",
        )

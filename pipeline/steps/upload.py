"""Upload a shard: read each photo once, check it, hash it, send it; then hold the bucket against what was read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import batch_state
from pipeline.batch_state import COPY, KIND_LOAD, UPLOAD, Hold
from pipeline.database import Connection, Database
from pipeline.dataset import File, Recognition, Reject, check_menu, check_receipt, modified
from pipeline.errors import BadInput, PermanentError, PipelineError, RefusedError, StorageError
from pipeline.logger import get_logger
from pipeline.metrics import Metrics
from pipeline.photo import Dimensions, check_photo
from pipeline.storage import Storage, StoredObject

logger = get_logger(__name__)

#: Bytes of photos that one process holds at most; a recognition larger than that goes alone.
BUDGET = 64 << 20
_ROUNDS = 3
_KNOWN_MENUS = 256


@dataclass(frozen=True)
class Photo:
    """A photo that was read and checked: its content, dimensions and digests (hex)."""

    content: bytes
    dimensions: Dimensions
    sha256: str
    md5: str


@dataclass(frozen=True)
class Facts:
    """What the upload learned of a recognition, for the manifest; pairs are camera 1 and 2."""

    recognition_id: int
    dimensions: tuple[Dimensions, Dimensions]
    sha256s: tuple[str, str]
    md5s: tuple[str, str]
    menu_sha256: str | None
    receipt_sha256: str | None


@dataclass(frozen=True)
class Entry:
    """A line of the manifest: a recognition and the keys of its photos."""

    recognition: Recognition
    keys: tuple[str, str]


class Budget:
    """Bound the bytes in memory: wait until there is room, always letting at least one through."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes for the block."""
        with self._condition:
            self._condition.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._condition:
                self._used -= size
                self._condition.notify_all()


# Decoding is work for a processor: more threads at it than processors would only hold memory.
_decoders = threading.BoundedSemaphore(max(1, os.cpu_count() or 1))
# A day's menu is the same file again and again: its digest is remembered once it was found good.
_good_menus: OrderedDict[str, None] = OrderedDict()
_good_menus_lock = threading.Lock()


def upload_shard(
    database: Database,
    storage: Storage,
    batch_id: str,
    shard: int,
    metrics: Metrics,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Upload the photos of a shard and write its marker; nothing happens when the marker is there.

    Raises:
        RefusedError: the batch is not being loaded.
        StorageError: the bucket does not hold what was sent; the shard's objects were removed again.
        StorageUnavailable: Storage does not answer; what was sent is found again at the next try.
    """

    def begin(connection: Connection) -> tuple[Hold, list[Entry]] | None:
        held = batch_state.hold(connection, batch_id)
        if batch_state.is_done(connection, batch_id, UPLOAD, shard):
            return None
        if held.bucket != storage.bucket:
            raise RefusedError(
                f"Batch {batch_id} goes into the bucket {held.bucket}, not into {storage.bucket}.",
                "Set STORAGE_BUCKET to the former value.",
            )
        return held, [_entry(row) for row in connection.execute("list_manifest", batch_id=batch_id, shard=shard)]

    begun = database.run(begin)
    if begun is None:
        return
    held, entries = begun
    source = Path(held.source)
    try:
        present = {found.key: found for found in _stored_range(storage, entries)}
        facts, rejects = _send(storage, source, entries, present, metrics, progress)
        for again in range(_ROUNDS + 1):
            sent = _Sent(batch_id, shard, held, entries, facts, rejects)
            wrong = _settle(database, storage, sent, metrics)
            if not wrong:
                break
            if again == _ROUNDS:
                raise StorageError(
                    f"Storage does not keep what it was sent: {len(wrong)} objects differ after {_ROUNDS} more rounds.",
                    "Look at the Storage server's log and disk.",
                )
            logger.warning("upload: %d objects are not in the bucket as they were sent; sending them again", len(wrong))
            metrics.count("objects_resent", len(wrong))
            damaged = [entry for entry in entries if wrong.intersection(entry.keys)]
            resent, rejected = _send(storage, source, damaged, {}, metrics, lambda _: None)
            ids = {entry.recognition.recognition_id for entry in damaged}
            facts = [fact for fact in facts if fact.recognition_id not in ids] + resent
            rejects += rejected
    except (PermanentError, RefusedError):
        _roll_back(database, storage, batch_id, shard, held.created_at, _keys(entries))
        raise
    logger.info("upload: shard %d: %d recognitions, %d rejects", shard, len(facts), len(rejects))


@dataclass(frozen=True)
class _Sent:
    """A shard whose objects are in the bucket, if the bucket is to be believed."""

    batch_id: str
    shard: int
    held: Hold
    entries: Sequence[Entry]
    facts: Sequence[Facts]
    rejects: Sequence[Reject]


def _settle(database: Database, storage: Storage, sent: _Sent, metrics: Metrics) -> set[str]:
    """Hold the bucket against what was sent, and mark the shard when they agree; return the keys that differ.

    Looking, removing what does not belong, and marking happen under the lock of the step: of two runs that do the
    same shard, be it that one of them stalled for an hour, only the first to come here changes anything.
    """

    def work(connection: Connection) -> set[str]:
        begun = sent.held.created_at
        if batch_state.hold_step(connection, sent.batch_id, UPLOAD, sent.shard, created_at=begun) is None:
            return set()
        wanted = _wanted(sent.entries, sent.facts)
        stored = {found.key: found for found in _stored_range(storage, sent.entries)}
        wrong = {key for key, (size, md5) in wanted.items() if not _is_same(stored.get(key), size, md5)}
        if wrong:
            return wrong
        storage.remove_all([key for key in stored if key not in wanted])
        _record(connection, sent.batch_id, sent.shard, sent.facts, sent.rejects)
        batch_state.mark(connection, sent.batch_id, UPLOAD, sent.shard, sent.held.now, metrics.as_dict())
        return set()

    return database.run(work)


def _entry(row: Any) -> Entry:
    menu = File(row.menu_path, row.menu_size, row.menu_mtime) if row.menu_path is not None else None
    receipt = File(row.receipt_path, row.receipt_size, row.receipt_mtime) if row.receipt_path is not None else None
    first, second = (
        File(path, size, mtime)
        for path, size, mtime in zip(row.photo_paths, row.photo_sizes, row.photo_mtimes, strict=True)
    )
    recognition = Recognition(row.recognition_id, (first, second), menu, receipt, None)
    return Entry(recognition, (row.object_keys[0], row.object_keys[1]))


def _send(
    storage: Storage,
    source: Path,
    entries: Sequence[Entry],
    present: dict[str, StoredObject],
    metrics: Metrics,
    progress: Callable[[int], None],
) -> tuple[list[Facts], list[Reject]]:
    facts: list[Facts] = []
    rejects: list[Reject] = []
    budget = Budget(BUDGET)

    def work(entry: Entry) -> Facts | Reject:
        with budget.hold(size_of(entry.recognition)):
            result = _send_recognition(storage, source, entry, present, metrics)
        progress(1)
        return result

    executor = ThreadPoolExecutor(storage.threads, thread_name_prefix="upload")
    try:
        for result in executor.map(work, entries):
            if isinstance(result, Facts):
                facts.append(result)
            else:
                rejects.append(result)
    except BaseException:
        # Whatever stopped us, Ctrl-C included: what has not begun does not begin.
        storage.stop()
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    executor.shutdown(wait=True)
    return facts, rejects


def _send_recognition(
    storage: Storage, source: Path, entry: Entry, present: dict[str, StoredObject], metrics: Metrics
) -> Facts | Reject:
    read = read_recognition(source, entry.recognition, metrics)
    if isinstance(read, Reject):
        return read
    photos, menu_sha256, receipt_sha256 = read
    for photo, key, file in zip(photos, entry.keys, entry.recognition.photos, strict=True):
        found = present.get(key)
        if found is not None and found.md5 == photo.md5 and found.size == len(photo.content):
            metrics.count("objects_found")
            continue
        try:
            storage.upload(key, photo.content)
        except StorageError as exc:
            if exc.code != "EntityTooLarge":
                raise
            return Reject(
                entry.recognition.recognition_id,
                file.path,
                "photo_too_large",
                f"the file has {len(photo.content)} bytes, more than the bucket takes",
            )
    first, second = photos
    return Facts(
        entry.recognition.recognition_id,
        (first.dimensions, second.dimensions),
        (first.sha256, second.sha256),
        (first.md5, second.md5),
        menu_sha256,
        receipt_sha256,
    )


def read_recognition(
    source: Path, recognition: Recognition, metrics: Metrics | None = None
) -> tuple[tuple[Photo, Photo], str | None, str | None] | Reject:
    """Read and check everything of a recognition, documents first: its photos, the digests of menu and receipt."""
    metrics = metrics or Metrics()
    path = ""
    try:
        menu_sha256 = receipt_sha256 = None
        if recognition.menu is not None:
            path = recognition.menu.path
            menu_sha256 = _check_menu(read_file(source, recognition.menu, "json"))
        if recognition.receipt is not None:
            path = recognition.receipt.path
            content = read_file(source, recognition.receipt, "json")
            check_receipt(content)
            receipt_sha256 = hashlib.sha256(content).hexdigest()
        photos = []
        for file in recognition.photos:
            path = file.path
            with metrics.timed("photo_read"):
                content = read_file(source, file, "photo")
            with _decoders, metrics.timed("photo_check"):
                dimensions = check_photo(content)
                digests = hashlib.sha256(content).hexdigest(), hashlib.md5(content, usedforsecurity=False).hexdigest()
            photos.append(Photo(content, dimensions, *digests))
    except BadInput as exc:
        return Reject(recognition.recognition_id, path, exc.code, exc.message)
    return (photos[0], photos[1]), menu_sha256, receipt_sha256


def size_of(recognition: Recognition) -> int:
    """Return the bytes of all files of a recognition."""
    files = (*recognition.photos, recognition.menu, recognition.receipt)
    return sum(file.size for file in files if file is not None)


def read_file(source: Path, file: File, kind: str) -> bytes:
    """Read a file that must still be the one that discovery saw.

    Raises:
        BadInput: `<kind>_vanished`, `<kind>_changed` or `<kind>_unreadable`.
    """
    try:
        with open(source / file.path, "rb") as stream:
            facts = os.fstat(stream.fileno())
            if (facts.st_size, modified(facts)) != (file.size, file.mtime):
                raise BadInput(f"{kind}_changed", "the file changed since discovery")
            content = stream.read(file.size + 1)
    except FileNotFoundError as exc:
        raise BadInput(f"{kind}_vanished", "the file vanished since discovery") from exc
    except OSError as exc:
        raise BadInput(f"{kind}_unreadable", f"the file cannot be read: {exc.strerror}") from exc
    if len(content) != file.size:
        raise BadInput(f"{kind}_changed", "the file changed while it was read")
    return content


def _check_menu(content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with _good_menus_lock:
        if digest in _good_menus:
            _good_menus.move_to_end(digest)
            return digest
    check_menu(content)
    with _good_menus_lock:
        _good_menus[digest] = None
        if len(_good_menus) > _KNOWN_MENUS:
            _good_menus.popitem(last=False)
    return digest


def _wanted(entries: Sequence[Entry], facts: Sequence[Facts]) -> dict[str, tuple[int, str]]:
    """Return key -> (bytes, MD5) of every object that the shard must have."""
    by_id = {entry.recognition.recognition_id: entry for entry in entries}
    return {
        key: (file.size, md5)
        for fact in facts
        for key, file, md5 in zip(
            by_id[fact.recognition_id].keys, by_id[fact.recognition_id].recognition.photos, fact.md5s, strict=True
        )
    }


def _is_same(stored: StoredObject | None, size: int, md5: str) -> bool:
    return stored is not None and stored.size == size and stored.md5 in (None, md5)


def _stored_range(storage: Storage, entries: Sequence[Entry]) -> Iterator[StoredObject]:
    """Yield what the bucket holds between the shard's first key and its last; shards are ranges of keys."""
    if not entries:
        return
    first, last = entries[0].keys[0], entries[-1].keys[1]
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    yield from storage.list_objects(first[:same], after=first.removesuffix("camera1.jpg"), last=last)


def take_back(database: Database, storage: Storage, batch_id: str, shard: int) -> None:
    """Undo the upload of a shard whose COPY failed for good, unless another run copied it: marker first, then objects.

    In the other order a crash in between would leave a marker that promises objects.
    """

    def work(connection: Connection) -> tuple[datetime, list[Entry]] | None:
        held = batch_state.hold_step(connection, batch_id, COPY, shard)
        if held is None or held.kind != KIND_LOAD:
            return None
        batch_state.unmark(connection, batch_id, UPLOAD, shard)
        rows = connection.execute("list_manifest", batch_id=batch_id, shard=shard)
        return held.created_at, [_entry(row) for row in rows]

    try:
        found = database.run(work)
    except PipelineError as exc:
        logger.warning("copy: the objects of a failed shard remain: %s", exc.message)
        return
    if found is not None:
        _roll_back(database, storage, batch_id, shard, found[0], _keys(found[1]))


def _keys(entries: Sequence[Entry]) -> list[str]:
    return [key for entry in entries for key in entry.keys]


def _roll_back(
    database: Database, storage: Storage, batch_id: str, shard: int, created_at: datetime, keys: Sequence[str]
) -> None:
    """Remove the objects of a shard that failed for good, as far as Storage still lets us, unless they count by now.

    Where the batch was reset meanwhile, nobody else will remove what this run sent after that.
    """
    storage.resume()

    def work(connection: Connection) -> None:
        if (
            batch_state.is_gone(connection, batch_id, created_at)
            or batch_state.hold_step(connection, batch_id, UPLOAD, shard, created_at=created_at) is not None
        ):
            storage.remove_all(keys)

    try:
        database.run(work)
    except PipelineError as exc:
        logger.warning("upload: the objects of a failed shard remain: %s", exc.message)


def _record(
    connection: Connection, batch_id: str, shard: int, facts: Sequence[Facts], rejects: Sequence[Reject]
) -> None:
    """Complete the manifest with what the upload learned, and take out what it rejected."""
    connection.execute("create_facts")
    connection.copy_in(
        "pg_temp.facts",
        (
            "recognition_id",
            "widths",
            "heights",
            "orientations",
            "sha256s",
            "md5s",
            "menu_sha256",
            "receipt_sha256",
        ),
        (
            (
                fact.recognition_id,
                [one.width for one in fact.dimensions],
                [one.height for one in fact.dimensions],
                [one.orientation for one in fact.dimensions],
                fact.sha256s,
                fact.md5s,
                fact.menu_sha256,
                fact.receipt_sha256,
            )
            for fact in facts
        ),
    )
    connection.execute("update_manifest_facts", batch_id=batch_id)
    if rejects:
        ids = [reject.recognition_id for reject in rejects]
        connection.execute("delete_manifest_rejected", batch_id=batch_id, recognition_ids=ids)
        connection.execute("delete_claims_rejected", batch_id=batch_id, kind=KIND_LOAD, recognition_ids=ids)
        batch_state.add_rejects(connection, batch_id, UPLOAD, shard, rejects)

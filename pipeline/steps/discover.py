"""Discover: inspect the dataset or the annotations, select new inputs, and write the manifest in one transaction."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline.batches import state as batch_state
from pipeline.batches.held import find_claimed
from pipeline.batches.state import COPY, DISCOVER, KIND_LOAD, WHOLE
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.dataset.frame import PIXELS
from pipeline.dataset.layout import list_folders
from pipeline.dataset.passed import Below, count_below, uncounted
from pipeline.dataset.recognition import inspect_copies
from pipeline.dataset.records import (
    FILE_CLASSES,
    NOT_TAKEN,
    UNCHANGED,
    Inspected,
    Recognition,
    Reject,
    describe_codes,
)
from pipeline.errors import RefusedError, UsageError, printable
from pipeline.observe.metrics import Metrics
from pipeline.steps.annotations import Staged, copy_found, stage_annotations
from pipeline.steps.in_use import leave_in_use, not_adopted
from pipeline.steps.read import BUDGET, DECODERS, Budget, ValidMenus, check_photos, read_files, size_of
from pipeline.steps.source import require_source
from pipeline.units import counted

logger = logging.getLogger(__name__)

#: Keeps a batch below a thousand tasks: two per shard and three per batch.
MAXIMUM_SHARDS = 490
_PAGE = 2000
#: Folders inspected to measure whether the file system is slow.
_TRIED = 20
_SHOWN_REJECTS = 50

_SHOWN_NEAR = 3

Result = TypeVar("Result")

#: Called with the total and the number done.
Progress = Callable[[int, int], None]

_STAGED = ("recognition_id", "captured_on", "photo_paths", "photo_sizes", "photo_mtimes")
_STAGED_DOCUMENTS = ("menu_path", "menu_size", "menu_mtime", "receipt_path", "receipt_size", "receipt_mtime")


@dataclass(frozen=True)
class Request:
    """The parameters of a load; `source` is the absolute path of a folder or an annotations file."""

    batch_id: str
    source: str
    bucket: str
    kind: str = KIND_LOAD
    limit: int | None = None
    force: bool = False
    strict: bool = False
    coordinates: str = PIXELS
    exif_turned: bool = False
    batch_size: int = 100
    threads: int = 16
    bucket_created_at: datetime | None = None

    @classmethod
    def of(cls, settings: Settings, batch_id: str, source: str, **options: Any) -> Request:
        """Return a request with the settings' values; `options` are other fields by name."""
        size, threads = settings.tuning.batch_size, settings.tuning.thread_count
        return cls(batch_id, source, settings.bucket, batch_size=size, threads=threads, **options)


@dataclass(frozen=True)
class Discovery:
    """What discovery found; counts are recognitions unless the name says otherwise.

    Of annotations, found, already_loaded, held_elsewhere and superseded_copies are photos.
    """

    batch_id: str
    source: str
    found: int
    already_loaded: int
    held_elsewhere: int
    held_by: list[str]
    superseded_copies: int
    beyond_limit: int
    recognitions: int
    photos: int
    bytes: int
    shards: int
    rejects: dict[str, int]
    notices: dict[str, int]
    files: dict[str, int]


def discover(
    database: Database, request: Request, *, dry_run: bool = False, progress: Progress = lambda *_: None
) -> Discovery | None:
    """Write the batch, its manifest and its rejects; return what was found, None if the marker exists.

    A `dry_run` rolls back instead of committing. `progress` counts recognitions, or bytes of an annotations file.
    Raises UsageError if the dataset cannot be read or is empty, RefusedError if another run started the batch or
    `strict` is set and there is a reject, ClaimedError if other batches have all that is new, and SourceUnavailable if
    the dataset became unavailable.
    """

    def work(connection: Connection) -> Discovery | None:
        if dry_run:
            return _discover(connection, request, progress)
        if batch_state.await_step(connection, request.batch_id, DISCOVER):
            return None
        found = _discover(connection, request, progress)
        if not found.recognitions and found.held_elsewhere:
            claimed = find_claimed(connection, connection.one("count_usable", batch_id=request.batch_id))
            if claimed is not None:
                raise claimed
        return found

    return database.run(work, timeout=0, keep=not dry_run)


def _discover(connection: Connection, request: Request, progress: Progress) -> Discovery:
    connection.enqueue("prefer_indexes")
    now = connection.one("now").now
    metrics = Metrics()
    batch_id, is_load, beyond = request.batch_id, request.kind == KIND_LOAD, 0
    staged: Staged | None = None
    files = Counter(dict.fromkeys(FILE_CLASSES, 0))
    if is_load:
        found, beyond = _stage_dataset(connection, request, metrics, progress, files)
    else:
        with metrics.timed("discover_annotations"):
            staged = stage_annotations(
                connection,
                Path(request.source),
                batch_id,
                force=request.force,
                coordinates=request.coordinates,
                exif_turned=request.exif_turned,
                progress=progress,
            )
        found = staged.counts
    rejects = {row.code: row.rejects for row in connection.execute("count_found_rejects")}
    notices = {row.code: row.notices for row in connection.execute("count_found_notices")}
    if request.strict and rejects:
        _refuse(connection, rejects)

    with metrics.timed("discover_manifest"):
        if not connection.execute("insert_batch", **asdict(request), **found._asdict(), beyond_limit=beyond):
            raise RefusedError(f"Another run started batch {batch_id} in the meantime.", "Run the same command again.")
        connection.execute("analyze_staged")
        connection.execute("insert_claims", batch_id=batch_id, kind=request.kind)
        drop_late = "drop_late_claims" if is_load else "drop_late_annotations"
        connection.execute(drop_late, batch_id=batch_id, force=request.force)
        lost = connection.one("add_lost", batch_id=batch_id, kind=request.kind)
        claimed = connection.one("count_claims", batch_id=batch_id).claims
        insert_manifest = "insert_manifest" if is_load else "insert_manifest_annotations"
        connection.execute(insert_manifest, batch_id=batch_id, shard_size=shard_size(claimed, request.batch_size))
        connection.execute("insert_found_rejects", batch_id=batch_id)
        connection.execute("insert_found_notices", batch_id=batch_id)
        counts = connection.one("update_batch_counts", batch_id=batch_id, files=json.dumps(files))
        if staged is not None:
            connection.execute("insert_annotation_notices", batch_id=batch_id, step=DISCOVER)
            batch_state.add_inputs(connection, batch_id, DISCOVER, WHOLE, staged.notices)
            if staged.held_reason:
                batch_state.set_held_reason(connection, batch_id, staged.held_reason)
    connection.execute("insert_look", batch_id=batch_id, rejected=sum(rejects.values()))
    if not is_load and counts.shards:
        copied_at, copied = connection.one("now").now, Metrics()
        with copied.timed("db_bulk_copy"):
            connection.execute("insert_annotations", batch_id=batch_id)
        batch_state.mark(connection, batch_id, COPY, 1, copied_at, copied.as_dict())
    batch_state.mark(connection, batch_id, DISCOVER, WHOLE, now, metrics.as_dict())
    numbers = {**found._asdict(), **lost._asdict(), **counts._asdict()}
    numbers |= {"rejects": rejects, "notices": notices}
    return Discovery(batch_id=batch_id, source=request.source, beyond_limit=beyond, **numbers)


def _stage_dataset(
    connection: Connection, request: Request, metrics: Metrics, progress: Progress, files: Counter[str]
) -> tuple[Any, int]:
    """Fill pg_temp.staged with the inputs to load, and add the files below the source by class.

    Return the row of counts, and the number beyond the limit.
    """
    source = Path(request.source)
    with metrics.timed("discover_walk"):
        connection.execute("create_found")
        copy_found(connection, list_folders(source, files))
        connection.execute("analyze_found")
        connection.execute("create_candidates", batch_id=request.batch_id, force=request.force)
        connection.execute("index_candidates")
        found = connection.one("count_found")
        rejected = {row.code for row in connection.execute("count_found_rejects")}
        if not found.found and not rejected:
            _refuse_empty(connection, source)
        connection.execute("add_not_adopted", message=not_adopted(connection.command))
        connection.execute("add_vanished", source=request.source)
    with metrics.timed("discover_inspect"), ThreadPoolExecutor(min(8, request.threads)) as executor:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(found.found, done)

        last = _stage(connection, request, executor, advance, files)
        if request.force:
            leave_in_use(connection, request.batch_id, source)
        _count_left(connection, source, last, executor, advance, files)
        return found, connection.one("count_beyond", after=last).beyond


def _refuse_empty(connection: Connection, source: Path) -> NoReturn:
    hint = "A recognition is a folder `recognition_<digits>` or `<digits>`, in the source or an export below it."
    near = connection.execute("list_near_notices", count=_SHOWN_NEAR)
    hint = "\n".join([hint, *(printable(f"{row.path}: {row.message}.") for row in near)])
    raise UsageError(f"The dataset {source} holds no recognition.", hint)


def shard_size(recognitions: int, batch_size: int) -> int:
    """Return the recognitions per shard: `batch_size`, or more if there would be too many shards."""
    return max(batch_size, -(-recognitions // MAXIMUM_SHARDS))


def _stage(
    connection: Connection,
    request: Request,
    executor: Executor,
    advance: Callable[[int], None],
    files: Counter[str],
) -> int:
    """Inspect candidates, lowest id first, until the limit is reached; return the last id inspected, or -1."""
    connection.execute("create_staged")
    source = Path(request.source)
    wanted = sys.maxsize if request.limit is None else request.limit
    strictly = partial(_inspect_strictly, source, Budget(BUDGET), threading.Semaphore(DECODERS), ValidMenus())
    last = -1
    # No page is larger than the rest of the limit, so that no recognition is inspected needlessly.
    while page := connection.execute("list_candidates", after=last, count=min(_PAGE, wanted)):
        last = page[-1].recognition_id
        found = list(
            executor.map(strictly, page) if request.strict else _spread(partial(_inspect, source), page, executor)
        )
        usable = [one.result for one in found if isinstance(one.result, Recognition)]
        rejects = [one.result for one in found if isinstance(one.result, Reject)]
        require_source(source, rejects)
        connection.copy_in("pg_temp.staged", (*_STAGED, *_STAGED_DOCUMENTS), map(_staged_row, usable))
        copy_found(connection, [*rejects, *(notice for one in found for notice in one.notices)])
        for one in found:
            files.update(one.files)
        advance(len(page))
        wanted -= len(usable)
    return last


def _count_left(
    connection: Connection,
    source: Path,
    last: int,
    executor: Executor,
    advance: Callable[[int], None],
    files: Counter[str],
) -> None:
    """Add the files of recognitions that are loaded, held by another batch, or beyond the limit."""

    def count(one: tuple[int, str, str]) -> Below:
        return count_below(source, *one[1:])

    after = -1
    while page := connection.execute("list_left", after=after, last=last, count=_PAGE):
        after = page[-1].recognition_id
        folders = []
        for row in page:
            unchanged = next((path for path in row.paths if (row.photo or "").startswith(f"{path}/")), row.paths[0])
            for path in row.paths:
                folders.append((row.recognition_id, path, UNCHANGED if row.loaded and path == unchanged else NOT_TAKEN))
        notices = []
        for (number, path, _), below in zip(folders, _spread(count, folders, executor), strict=True):
            files.update(below.files)
            notices += uncounted(number, path, below)
        copy_found(connection, notices)
        advance(len(page))


def _spread(work: Callable[[Any], Result], items: Sequence[Any], executor: Executor) -> Iterator[Result]:
    """Look at folders, in order; use threads only if the file system is slow.

    On a local disk, switching the GIL between threads takes longer than inspecting a folder.
    """
    begin, worked = time.perf_counter(), time.thread_time()
    yield from map(work, items[:_TRIED])
    seconds, worked = time.perf_counter() - begin, time.thread_time() - worked
    yield from (map if worked > seconds / 2 else executor.map)(work, items[_TRIED:])


def _inspect(source: Path, row: Any) -> Inspected:
    return inspect_copies(source, row.recognition_id, row.paths)


def _inspect_strictly(
    source: Path, budget: Budget, decoders: threading.Semaphore, valid_menus: ValidMenus, row: Any
) -> Inspected:
    """Inspect a folder; also read and check its files, which otherwise the upload does."""
    found = _inspect(source, row)
    if isinstance(found.result, Reject):
        return found
    with budget.reserved(size_of(found.result)):
        files = read_files(source, found.result, Metrics(), valid_menus)
        if isinstance(files, Reject):
            return replace(found, result=files)
        with decoders:
            photos = check_photos(found.result, files, Metrics())
    return replace(found, result=photos) if isinstance(photos, Reject) else found


def _staged_row(recognition: Recognition) -> Sequence[object]:
    photos = recognition.photos
    row: list[object] = [recognition.recognition_id, recognition.captured_on]
    row += ([photo.path for photo in photos], [photo.size for photo in photos], [photo.mtime for photo in photos])
    for document in (recognition.menu, recognition.receipt):
        row += (document.path, document.size, document.mtime) if document else (None, None, None)
    return row


def _refuse(connection: Connection, rejects: dict[str, int]) -> None:
    total = sum(rejects.values())
    shown = connection.execute("list_found_rejects", count=_SHOWN_REJECTS)
    lines = [printable(f"  {row.code}: {row.path}: {row.message}") for row in shown]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more")
    what = f"{counted(total, 'input is', 'inputs are')} not usable ({describe_codes(rejects)})"
    message = "\n".join([f"--strict refuses the batch, {what}:", *lines])
    raise RefusedError(message, "Correct or remove them, or load without --strict, which leaves them out.")

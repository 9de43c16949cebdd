"""Discover: inspect the dataset or the annotations, select new inputs, and write the manifest in one transaction."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.state import COPY, DISCOVER, KIND_LOAD, KIND_QWEN, WHOLE
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.dataset.layout import inspect_folder, list_folders
from pipeline.dataset.records import Folder, Recognition, Reject
from pipeline.errors import RefusedError, UsageError
from pipeline.observe.logger import get_logger, printable
from pipeline.observe.metrics import Metrics
from pipeline.steps.annotations import copy_found, stage_annotations
from pipeline.steps.read import BUDGET, DECODERS, Budget, check_photos, read_files, size_of
from pipeline.steps.source import require_source

logger = get_logger(__name__)

#: Keeps a batch below a thousand tasks: two per shard and three per batch.
MAXIMUM_SHARDS = 490
_PAGE = 2000
#: Folders inspected to measure whether the file system is slow.
_TRIED = 20
_SHOWN_REJECTS = 50

#: Called with the total and the number done.
Progress = Callable[[int, int], None]

_STAGED = (
    "recognition_id",
    "captured_on",
    "photo_paths",
    "photo_sizes",
    "photo_mtimes",
    "menu_path",
    "menu_size",
    "menu_mtime",
    "receipt_path",
    "receipt_size",
    "receipt_mtime",
)


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
    batch_size: int = 100
    threads: int = 16

    @classmethod
    def of(cls, settings: Settings, batch_id: str, source: str, **options: Any) -> Request:
        """Return a request with the settings' values; `options` are kind, limit, force and strict."""
        tuning = settings.tuning
        return cls(
            batch_id, source, settings.bucket, batch_size=tuning.batch_size, threads=tuning.thread_count, **options
        )


@dataclass(frozen=True)
class Discovery:
    """What discovery found; counts are recognitions unless the name says otherwise."""

    batch_id: str
    source: str
    found: int
    already_loaded: int
    held_elsewhere: int
    held_by: tuple[str, ...]
    superseded_copies: int
    beyond_limit: int
    recognitions: int
    photos: int
    bytes: int
    shards: int
    rejects: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "held_by": list(self.held_by)}


#: By kind of batch: the statements that drop claims of committed batches, and that insert the manifest.
_STATEMENTS = {
    KIND_LOAD: ("drop_late_claims", "insert_manifest"),
    KIND_QWEN: ("drop_late_annotations", "insert_manifest_annotations"),
}


def discover(
    database: Database, request: Request, *, dry_run: bool = False, progress: Progress = lambda *_: None
) -> Discovery | None:
    """Write the batch, its manifest and its rejects; return what was found, None if the marker exists.

    Arguments:
        dry_run: roll back instead of committing.
        progress: called with the total and the amount inspected: recognitions of a dataset, or bytes of an
            annotations file.

    Raises:
        UsageError: the dataset cannot be read, or contains no recognition.
        RefusedError: the batch exists already, or `strict` is set and there is a reject.
        SourceUnavailable: the dataset became unavailable during the inspection.
    """

    def work(connection: Connection) -> Discovery | None:
        if not dry_run and batch_state.await_step(connection, request.batch_id, DISCOVER):
            return None
        return _discover(connection, request, progress)

    return database.run(work, timeout=0, keep=not dry_run)


def _discover(connection: Connection, request: Request, progress: Progress) -> Discovery:
    connection.enqueue("prefer_indexes")
    now = connection.one("now").now
    metrics = Metrics()
    stage = _stage_dataset if request.kind == KIND_LOAD else _stage_annotations
    found, beyond = stage(connection, request, metrics, progress)
    rejects = {row.code: row.rejects for row in connection.execute("count_found_rejects")}
    if request.strict and rejects:
        _refuse(connection, rejects)

    drop_late, insert_manifest = _STATEMENTS[request.kind]
    with metrics.timed("discover_manifest"):
        if not connection.execute(
            "insert_batch",
            batch_id=request.batch_id,
            kind=request.kind,
            source=request.source,
            recognition_limit=request.limit,
            force=request.force,
            strict=request.strict,
            bucket=request.bucket,
            found=found.found,
            already_loaded=found.already_loaded,
            held_elsewhere=found.held_elsewhere,
            held_by=list(found.held_by),
            superseded_copies=found.superseded_copies,
            beyond_limit=beyond,
        ):
            raise RefusedError(
                f"Another run started batch {request.batch_id} in the meantime.", "Run the same command again."
            )
        connection.execute("analyze_staged")
        connection.execute("insert_claims", batch_id=request.batch_id, kind=request.kind)
        connection.execute(drop_late, batch_id=request.batch_id, force=request.force)
        lost = connection.one("add_lost", batch_id=request.batch_id, kind=request.kind)
        claimed = connection.one("count_claims", batch_id=request.batch_id).claims
        size = shard_size(claimed, request.batch_size)
        connection.execute(insert_manifest, batch_id=request.batch_id, shard_size=size)
        connection.execute("insert_found_rejects", batch_id=request.batch_id)
        counts = connection.one("update_batch_counts", batch_id=request.batch_id)
    if request.kind == KIND_QWEN and counts.shards:
        _copy_annotations(connection, request.batch_id)
    batch_state.mark(connection, request.batch_id, DISCOVER, WHOLE, now, metrics.as_dict())
    return Discovery(
        batch_id=request.batch_id,
        source=request.source,
        found=found.found,
        already_loaded=lost.already_loaded,
        held_elsewhere=lost.held_elsewhere,
        held_by=tuple(lost.held_by),
        superseded_copies=found.superseded_copies,
        beyond_limit=beyond,
        recognitions=counts.recognitions,
        photos=counts.photos,
        bytes=counts.bytes,
        shards=counts.shards,
        rejects=rejects,
    )


def _stage_dataset(connection: Connection, request: Request, metrics: Metrics, progress: Progress) -> tuple[Any, int]:
    """Fill pg_temp.staged with the inputs to load; return the row of counts, and the number beyond the limit."""
    source = Path(request.source)
    with metrics.timed("discover_walk"):
        found = _find(connection, request, source)
    with metrics.timed("discover_inspect"):
        candidates = found.found - found.already_loaded - found.held_elsewhere
        last = _stage(connection, request, source, partial(progress, candidates))
        beyond = connection.one("count_beyond", after=last).beyond if last is not None else 0
    return found, beyond


def _stage_annotations(
    connection: Connection, request: Request, metrics: Metrics, progress: Progress
) -> tuple[Any, int]:
    source = Path(request.source)
    with metrics.timed("discover_annotations"):
        return stage_annotations(connection, source, request.batch_id, force=request.force, progress=progress), 0


def _copy_annotations(connection: Connection, batch_id: str) -> None:
    """Insert the selected detections into the schema raw, and mark the only shard."""
    now = connection.one("now").now
    metrics = Metrics()
    with metrics.timed("db_bulk_copy"):
        connection.execute("insert_annotations", batch_id=batch_id)
    batch_state.mark(connection, batch_id, COPY, 1, now, metrics.as_dict())


def shard_size(recognitions: int, batch_size: int) -> int:
    """Return the recognitions per shard: `batch_size`, or more if there would be too many shards."""
    return max(batch_size, -(-recognitions // MAXIMUM_SHARDS))


def _find(connection: Connection, request: Request, source: Path) -> Any:
    """Copy the folders' names into a temporary table, and select the candidates there."""
    connection.execute("create_found")
    if not copy_found(connection, list_folders(source)):
        raise UsageError(
            f"The dataset {source} holds no recognition.",
            "A recognition is a folder `recognition_<digits>` or `<digits>`, in the source or in an export below it.",
        )
    connection.execute("analyze_found")
    found = connection.one("count_found", batch_id=request.batch_id, force=request.force)
    connection.execute("create_candidates", batch_id=request.batch_id, force=request.force)
    connection.execute("index_candidates")
    return found


def _stage(connection: Connection, request: Request, source: Path, progress: Callable[[int], None]) -> int | None:
    """Inspect candidates, lowest id first, until the limit is reached; return the last id inspected, if any."""
    connection.execute("create_staged")
    wanted = request.limit
    strict = _Strict() if request.strict else None
    after = -1
    last = None
    inspected = 0
    with ThreadPoolExecutor(min(8, request.threads)) as executor:
        while wanted is None or wanted > 0:
            # No page is larger than the rest of the limit, so that no recognition is inspected needlessly.
            count = _PAGE if wanted is None else min(_PAGE, wanted)
            page = connection.execute("list_candidates", after=after, count=count)
            if not page:
                break
            after = last = page[-1].recognition_id
            folders = [Folder(row.recognition_id, row.path) for row in page]
            results = _inspect(source, folders, executor, strict)
            usable: list[Recognition] = []
            rejects: list[Reject] = []
            for result in results:
                (usable if isinstance(result, Recognition) else rejects).append(result)  # type: ignore[arg-type]
            require_source(source, rejects)
            connection.copy_in("pg_temp.staged", _STAGED, map(_staged_row, usable))
            copy_found(connection, rejects)
            inspected += len(page)
            progress(inspected)
            if wanted is not None:
                wanted -= len(usable)
    return last


def _inspect(
    source: Path, folders: Sequence[Folder], executor: Executor, strict: _Strict | None
) -> Iterator[Recognition | Reject]:
    """Inspect folders, in order; use threads only if the file system is slow.

    On a local disk, switching the GIL between threads takes longer than inspecting a folder.
    """
    if strict is not None:
        yield from executor.map(partial(strict.inspect, source), folders)
        return
    inspect = partial(inspect_folder, source)
    begin, worked = time.perf_counter(), time.thread_time()
    yield from map(inspect, folders[:_TRIED])
    seconds, worked = time.perf_counter() - begin, time.thread_time() - worked
    yield from (map if worked > seconds / 2 else executor.map)(inspect, folders[_TRIED:])


class _Strict:
    """Also read and check the files of a recognition, which otherwise the upload does."""

    def __init__(self) -> None:
        self._budget, self._decoders, self._metrics = Budget(BUDGET), threading.Semaphore(DECODERS), Metrics()
        self._valid_menus: set[str] = set()

    def inspect(self, source: Path, folder: Folder) -> Recognition | Reject:
        """Return the recognition in a folder, or the reason to reject it."""
        result = inspect_folder(source, folder)
        if isinstance(result, Reject):
            return result
        with self._budget.reserved(size_of(result)):
            files = read_files(source, result, self._metrics, self._valid_menus)
            if isinstance(files, Reject):
                return files
            with self._decoders:
                photos = check_photos(result, files, self._metrics)
        return photos if isinstance(photos, Reject) else result


def _staged_row(recognition: Recognition) -> Sequence[object]:
    menu, receipt = recognition.menu, recognition.receipt
    return (
        recognition.recognition_id,
        recognition.captured_on,
        [photo.path for photo in recognition.photos],
        [photo.size for photo in recognition.photos],
        [photo.mtime for photo in recognition.photos],
        *((menu.path, menu.size, menu.mtime) if menu else (None, None, None)),
        *((receipt.path, receipt.size, receipt.mtime) if receipt else (None, None, None)),
    )


def _refuse(connection: Connection, rejects: dict[str, int]) -> None:
    total = sum(rejects.values())
    lines = [
        printable(f"  {row.code}: {row.path}: {row.message}")
        for row in connection.execute("list_found_rejects", count=_SHOWN_REJECTS)
    ]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more")
    raise RefusedError(
        f"--strict refuses the batch, {total} of its inputs {'is' if total == 1 else 'are'} not usable "
        f"({describe_rejects(rejects)}):\n" + "\n".join(lines),
        "Correct or remove them, or load without --strict, which leaves them out.",
    )


def describe_rejects(rejects: dict[str, int]) -> str:
    """Return counts by code as one line, the most frequent first."""
    return ", ".join(f"{code} {count}" for code, count in Counter(rejects).most_common())

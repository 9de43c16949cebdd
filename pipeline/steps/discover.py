"""Discover: inspect the dataset or the annotations, select new inputs, and write the manifest in one transaction."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline.batches import state as batch_state
from pipeline.batches.held import claimed_error
from pipeline.batches.looks import record_look
from pipeline.batches.state import COPY, DISCOVER, KIND_LOAD, WHOLE
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.dataset.frame import PIXELS
from pipeline.dataset.layout import list_folders
from pipeline.dataset.recognition import inspect_copies
from pipeline.dataset.records import NOT_TAKEN, USED, Inspected, Recognition, Reject, describe_codes
from pipeline.errors import RefusedError, UsageError, printable
from pipeline.observe.metrics import Metrics
from pipeline.steps.annotations import stage_annotations
from pipeline.steps.changed import look_at_left
from pipeline.steps.in_use import leave_in_use, not_adopted
from pipeline.steps.parallel import spread
from pipeline.steps.read import Checker, size_of
from pipeline.steps.source import require_source
from pipeline.steps.staging import Progress, Seen, copy_found, copy_staged
from pipeline.units import counted

logger = logging.getLogger(__name__)

#: Keeps a batch below a thousand tasks: two per shard and three per batch. An array of processes may have more.
MAXIMUM_SHARDS = 490
_PAGE = 2000
_SHOWN_REJECTS = 50
_SHOWN_NEAR = 3


@dataclass(frozen=True)
class Request:
    """The parameters of a load; `source` is the absolute path of a folder or an annotations file."""

    batch_id: str
    source: str
    bucket: str
    kind: str = KIND_LOAD
    limit: int | None = None
    force: bool = False
    changed: bool = False
    strict: bool = False
    coordinates: str = PIXELS
    exif_turned: bool = False
    batch_size: int = 100
    threads: int = 16
    bucket_created_at: datetime | None = None
    maximum_shards: int = MAXIMUM_SHARDS

    @classmethod
    def of(cls, settings: Settings, batch_id: str, source: str, **options: Any) -> Request:
        """Return a request with the settings' values; `options` are other fields by name."""
        size, threads = settings.tuning.batch_size, settings.tuning.thread_count
        return cls(batch_id, source, settings.bucket, batch_size=size, threads=threads, **options)


@dataclass(frozen=True)
class Discovery:
    """What discovery found; counts are recognitions unless the name says otherwise.

    Of annotations, found, already_loaded, changed_since_load, held_elsewhere and superseded_copies are photos. Without
    anything to load, no batch is made. Rejects and notices are those that no earlier look recorded. `retried` are those
    to load that an earlier upload or copy rejected for a limit that may have been raised since.
    """

    batch_id: str
    source: str
    found: int
    already_loaded: int
    changed_since_load: int
    held_elsewhere: int
    held_by: list[str]
    superseded_copies: int
    beyond_limit: int
    rejects: dict[str, int]
    known_rejects: int
    notices: dict[str, int]
    files: dict[str, int]
    newest: date | None
    batch_made: bool
    recognitions: int = 0
    photos: int = 0
    bytes: int = 0
    retried: int = 0
    retried_bytes: int = 0
    shards: int = 0


def discover(
    database: Database, request: Request, *, dry_run: bool = False, progress: Progress = lambda *_: None
) -> Discovery | None:
    """Write the batch, its manifest and its rejects; return what was found, None if that is on record.

    Where there is nothing to load, only the look is recorded. A `dry_run` rolls back instead of committing. `progress`
    counts recognitions, or bytes of an annotations file. Raises UsageError if the dataset cannot be read or is empty,
    RefusedError if another run started the batch or `strict` is set and there is a reject, ClaimedError if other
    batches have all that is new, and SourceUnavailable if the dataset became unavailable.
    """

    def work(connection: Connection) -> Discovery | None:
        # A dry run does not wait for a run of the batch.
        is_done = batch_state.is_done if dry_run else batch_state.await_step
        if is_done(connection, request.batch_id, DISCOVER):
            return None
        found = _discover(connection, request, progress)
        if found.held_elsewhere and not (dry_run or found.recognitions or found.rejects):
            raise claimed_error(connection, found.held_by)
        return found

    return database.run(work, timeout=0, keep=not dry_run)


def _discover(connection: Connection, request: Request, progress: Progress) -> Discovery:
    connection.enqueue("prefer_indexes")
    now, metrics, held_reason = connection.one("now").now, Metrics(), ""
    seen = Seen(connection, Path(request.source), progress, request.force, request.changed)
    if request.kind == KIND_LOAD:
        _stage_dataset(request, metrics, seen)
    else:
        with metrics.timed("discover_annotations"):
            held_reason = stage_annotations(
                seen, request.batch_id, request.coordinates, exif_turned=request.exif_turned
            )
    if request.strict and (rejects := dict(connection.execute("count_found_rejects"))):
        _refuse(connection, rejects)
    connection.execute("mark_over", kind=request.kind, source=request.source)
    known = connection.one("drop_known", force=request.force).rejects
    seen.changed += connection.one("drop_not_taken").changed
    rejects = dict(connection.execute("count_found_rejects"))
    notices = dict(connection.execute("count_found_notices"))
    is_made = bool(rejects or connection.one("count_staged").staged)
    numbers = seen.counts()
    if request.kind == KIND_LOAD:
        numbers |= connection.one("count_retried")._asdict()
    if is_made:
        with metrics.timed("discover_manifest"):
            numbers |= _write_batch(connection, request, seen, held_reason)
        if request.kind != KIND_LOAD and numbers["shards"]:
            copied_at, copied = connection.one("now").now, Metrics()
            with copied.timed("db_bulk_copy"):
                connection.execute("insert_annotations", batch_id=request.batch_id)
            batch_state.mark(connection, request.batch_id, COPY, 1, copied_at, copied.as_dict())
        batch_state.mark(connection, request.batch_id, DISCOVER, WHOLE, now, metrics.as_dict())
    else:
        numbers["already_loaded"] += seen.changed if request.changed else 0
        files = {**seen.files, USED: 0, NOT_TAKEN: seen.files[NOT_TAKEN] + seen.files[USED]}
        numbers["files"] = files if request.kind == KIND_LOAD else {}  # of what could be used, nothing is taken
    connection.execute("insert_found_notices", batch_id=request.batch_id)
    found = Discovery(
        batch_id=request.batch_id,
        source=request.source,
        changed_since_load=seen.changed,
        rejects=rejects,
        known_rejects=known,
        notices=notices,
        newest=seen.newest,
        batch_made=is_made,
        **numbers,
    )
    record_look(connection, request, found)
    return found


def _write_batch(connection: Connection, request: Request, seen: Seen, held_reason: str) -> dict[str, Any]:
    """Write the batch, its claims, its manifest and its rejects; return its counts."""
    batch_id, is_load = request.batch_id, request.kind == KIND_LOAD
    if not connection.execute("insert_batch", **asdict(request), **seen.counts(), held_reason=held_reason or None):
        raise RefusedError(f"Another run started batch {batch_id} in the meantime.", "Run the same command again.")
    connection.execute("insert_claims", batch_id=batch_id, kind=request.kind)
    drop_late = "drop_late_claims" if is_load else "drop_late_annotations"
    claimed = connection.one(drop_late, batch_id=batch_id, force=request.force).claims
    size = shard_size(claimed, request.batch_size, request.maximum_shards)
    insert_manifest = "insert_manifest" if is_load else "insert_manifest_annotations"
    connection.execute(insert_manifest, batch_id=batch_id, shard_size=size)
    connection.execute("insert_found_rejects", batch_id=batch_id)
    files = json.dumps(seen.files)
    counts = connection.one("update_batch_counts", batch_id=batch_id, kind=request.kind, files=files)
    if not is_load:
        connection.execute("insert_annotation_notices", batch_id=batch_id, step=DISCOVER)
    return dict(counts._asdict())


def _stage_dataset(request: Request, metrics: Metrics, seen: Seen) -> None:
    """Fill pg_temp.staged with the inputs to load, and add up what else is there."""
    connection, source = seen.connection, seen.source
    with metrics.timed("discover_walk"):
        connection.execute("create_found")
        copy_found(connection, list_folders(source, seen.files))
        connection.execute("create_candidates", batch_id=request.batch_id, force=request.force)
        seen.found = connection.one("count_found")
        if not seen.found.found and not connection.execute("count_found_rejects"):
            _refuse_empty(connection, source)
        connection.execute("add_found", message=not_adopted(connection.command), source=request.source)
    with metrics.timed("discover_inspect"), ThreadPoolExecutor(min(8, request.threads)) as executor:
        check = partial(_inspect_strictly, source, Checker()) if request.strict else None
        last = _stage(seen, request.limit, executor, check)
        look_at_left(seen, last, executor, check)
        staged = connection.one("count_changed")
        seen.changed = staged.changed
        if request.force or request.changed:
            leave_in_use(connection, request.batch_id, source)
            connection.execute("add_other_source", source=request.source)
        connection.execute("create_passed_by", last=last, changed=request.changed)
        if staged.changed and not request.changed:
            seen.files.update({USED: -staged.files, NOT_TAKEN: staged.files})
            connection.execute("drop_changed")
        seen.beyond_limit = connection.one("count_beyond", after=last).beyond


def _refuse_empty(connection: Connection, source: Path) -> NoReturn:
    hint = "A recognition is a folder `recognition_<digits>` or `<digits>`, in the source or an export below it."
    near = connection.execute("list_near_notices", count=_SHOWN_NEAR)
    hint = "\n".join([hint, *(printable(f"{row.path}: {row.message}.") for row in near)])
    raise UsageError(f"The dataset {source} holds no recognition.", hint)


def shard_size(recognitions: int, batch_size: int, maximum_shards: int = MAXIMUM_SHARDS) -> int:
    """Return the recognitions per shard: `batch_size`, or more if there would be too many shards."""
    return max(batch_size, -(-recognitions // maximum_shards))


def _stage(seen: Seen, limit: int | None, executor: Executor, check: Callable[[Any], Inspected] | None) -> int:
    """Inspect candidates, lowest id first, until the limit is reached; return the last id inspected, or -1."""
    connection, wanted, last = seen.connection, sys.maxsize if limit is None else limit, -1
    connection.execute("create_staged")
    # No page is larger than the rest of the limit, so that no recognition is inspected needlessly.
    while page := connection.execute("list_candidates", after=last, count=min(_PAGE, wanted)):
        before, last = last, page[-1].recognition_id
        found = list(executor.map(check, page) if check else spread(partial(_inspect, seen.source), page, executor))
        usable = [one.result for one in found if isinstance(one.result, Recognition)]
        rejects = [one.result for one in found if isinstance(one.result, Reject)]
        require_source(seen.source, rejects)
        copy_staged(connection, usable)
        copy_found(connection, [*rejects, *(notice for one in found for notice in one.notices)])
        for one in found:
            seen.files.update(one.files)
        seen.advance(one.result.captured_on if isinstance(one.result, Recognition) else None for one in found)
        wanted -= len(usable) - (seen.drop_known(before) if usable else 0)
    return last


def _inspect(source: Path, row: Any) -> Inspected:
    return inspect_copies(source, row.recognition_id, row.paths)


def _inspect_strictly(source: Path, checker: Checker, row: Any) -> Inspected:
    """Inspect a folder; also read and check its files, which otherwise the upload does."""
    found = _inspect(source, row)
    if isinstance(found.result, Reject):
        return found
    with checker.budget.reserved(size_of(found.result)):
        checked = checker.check(source, found.result, Metrics())
    return replace(found, result=checked) if isinstance(checked, Reject) else found


def _refuse(connection: Connection, rejects: dict[str, int]) -> None:
    total = sum(rejects.values())
    shown = connection.execute("list_found_rejects", count=_SHOWN_REJECTS)
    lines = [printable(f"  {row.code}: {row.path}: {row.message}") for row in shown]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more")
    what = f"{counted(total, 'input is', 'inputs are')} not usable ({describe_codes(rejects)})"
    message = "\n".join([f"--strict refuses the batch, {what}:", *lines])
    raise RefusedError(message, "Correct or remove them, or load without --strict, which leaves them out.")

"""Annotations: find out what the file has, for discovery, and read each shard's stretch of it, for COPY."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.batches import state as batch_state
from pipeline.batches.state import KIND_QWEN
from pipeline.database import Connection
from pipeline.dataset.annotations import Entry, read_entries, read_value
from pipeline.dataset.detections import Detection, detections_of, photo_of
from pipeline.dataset.records import Reject
from pipeline.errors import BadInput, UnfinishedError
from pipeline.steps.source import not_as_discovered

_PAGE = 2000
_ENTRIES = ("recognition_id", "camera_number", "path", "position", "size", "md5", "detections")
_LONGEST_PATH = 300


def stage_annotations(connection: Connection, path: Path, batch_id: str, *, force: bool) -> Any:
    """Read the file once; leave pg_temp.staged, what is to be loaded, and the rejects in pg_temp.found.

    Returns a row with what was found: found, already_loaded, held_elsewhere, held_by, superseded_copies.

    Raises:
        UsageError: the file as a whole is broken.
        UnfinishedError: it cannot be read any more.
    """
    connection.execute("create_found")
    connection.execute("create_entries")
    rows: list[Sequence[object]] = []
    rejects: list[Reject] = []

    def flush() -> None:
        connection.copy_in("pg_temp.entries", _ENTRIES, rows)
        connection.copy_in(
            "pg_temp.found",
            ("recognition_id", "path", "code", "message"),
            ((r.recognition_id, r.path, r.code, r.message) for r in rejects),
        )
        rows.clear()
        rejects.clear()

    with _opened(path) as stream:
        for entry in read_entries(stream):
            row, problems = _row_of(entry)
            del entry  # or it would be in memory beside the next one
            rows += [row] if row is not None else []
            rejects += problems
            if len(rows) + len(rejects) >= _PAGE:
                flush()
    flush()
    connection.execute("analyze_entries")
    connection.execute("create_annotated", batch_id=batch_id, force=force)
    connection.execute("index_annotated")
    connection.execute("analyze_annotated")
    connection.execute("drop_skipped_rejects")
    connection.execute("add_unknown")
    connection.execute("create_staged_annotations", force=force)
    return connection.one("count_annotated")


def _row_of(entry: Entry) -> tuple[Sequence[object] | None, list[Reject]]:
    """Return the row of an entry in pg_temp.entries, None where its key is of no use, and what is wrong with it."""
    shown = entry.key.encode(errors="replace").decode().replace("\0", "�")[:_LONGEST_PATH]
    try:
        recognition_id, camera = photo_of(entry.key)
    except BadInput as exc:
        return None, [Reject(None, shown, exc.code, exc.message)]
    usable: int | None = None
    try:
        if entry.problem is not None:
            raise entry.problem
        detections, problems = detections_of(entry.value)
        usable = len(detections)
    except BadInput as exc:
        problems = [exc]
    digest = hashlib.md5(entry.content, usedforsecurity=False).hexdigest()
    row = (recognition_id, camera, entry.key, entry.position, len(entry.content), digest, usable)
    return row, [Reject(recognition_id, shown, exc.code, exc.message) for exc in problems]


def copy_annotations(
    connection: Connection, batch_id: str, shard: int, source: Path, rows: Sequence[Any], *, may_reject: bool = True
) -> tuple[int, int]:
    """Copy the detections of a shard; return how many recognitions it has and how many inputs were rejected.

    A value that is no longer the one discovery saw makes its recognition a reject, where this host `may_reject`.
    """
    rejects: list[Reject] = []
    with _opened(source) as stream:
        columns = ("batch_id", "recognition_id", "camera_number", "detection", "label", "x1", "y1", "x2", "y2")
        connection.copy_lines("raw.detections", columns, _lines(batch_id, stream, rows, rejects))
    if rejects and not may_reject:
        raise not_as_discovered(source)
    lost = [reject.recognition_id for reject in rejects if reject.recognition_id is not None]
    batch_state.reject_copied(connection, batch_id, KIND_QWEN, shard, rejects, lost)
    return len(rows), len(rejects)


def _lines(batch_id: str, stream: BinaryIO, rows: Sequence[Any], rejects: list[Reject]) -> Iterator[bytes]:
    """Yield the detections of each photo in the text format of COPY; none of their fields needs an escape there."""
    for row in rows:
        for camera, detections in _read(stream, row, rejects):
            photo = f"{batch_id}\t{row.recognition_id}\t{camera}\t"
            yield "".join(
                [
                    f"{photo}{number}\t{label}\t{x1}\t{y1}\t{x2}\t{y2}\n"
                    for number, (label, x1, y1, x2, y2) in enumerate(detections, 1)
                ]
            ).encode()


def _read(stream: BinaryIO, row: Any, rejects: list[Reject]) -> list[tuple[int, list[Detection]]]:
    """Return the detections by camera of a row of the manifest; nothing, and a reject, when a value changed."""
    found = []
    places = zip(row.cameras, row.paths, row.positions, row.sizes, row.md5s, strict=True)
    for camera, path, position, size, md5 in places:
        stream.seek(position)
        content = stream.read(size)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            message = "the annotations file changed since discovery"
            rejects.append(Reject(row.recognition_id, path[:_LONGEST_PATH], "json_changed", message))
            return []
        # What is wrong with single detections was told at discovery.
        found.append((camera, detections_of(read_value(content))[0]))
    return found


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as exc:
        raise UnfinishedError(
            f"The annotations file {path} cannot be read: {exc.strerror}.", "Bring it back, then run the command again."
        ) from exc

"""Stage the annotations: stream the file once, and COPY its usable detections into temporary tables.

Discovery inserts the detections of the selected photos into the schema raw, in the same transaction.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.database import Connection
from pipeline.dataset.annotations import Entry, read_entries
from pipeline.dataset.detections import Detection, detections_of, photo_of
from pipeline.dataset.records import Folder, Reject
from pipeline.errors import BadInput, UnfinishedError

#: Maximum number of buffered entries and rejects, and bytes of buffered detections.
_PAGE = 2000
_PAGE_BYTES = 4 << 20
_ENTRIES = ("number", "recognition_id", "camera_number", "path", "size", "detections")
_DETECTIONS = ("number", "detection", "label", "x1", "y1", "x2", "y2")
_LONGEST_PATH = 300


def stage_annotations(
    connection: Connection,
    path: Path,
    batch_id: str,
    *,
    force: bool,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Any:
    """Read the file; fill pg_temp.entries, pg_temp.detections, pg_temp.staged (the selection) and pg_temp.found.

    Return a row of counts: found, already_loaded, held_elsewhere, held_by, superseded_copies.

    Arguments:
        progress: called with the size of the file and the bytes read so far.

    Raises:
        UsageError: the file is not one JSON object.
        UnfinishedError: the file cannot be read.
    """
    connection.execute("create_found")
    connection.execute("create_entries")
    connection.execute("create_detections")
    rows: list[Sequence[object]] = []
    lines: list[bytes] = []
    rejects: list[Reject] = []
    size = 0

    def flush() -> None:
        connection.copy_in("pg_temp.entries", _ENTRIES, rows)
        connection.copy_lines("pg_temp.detections", _DETECTIONS, lines)
        copy_found(connection, rejects)
        rows.clear()
        lines.clear()
        rejects.clear()

    with _opened(path) as stream:
        total = os.fstat(stream.fileno()).st_size
        numbers = itertools.count()
        for entry in read_entries(stream):
            row, detections, problems = _read(next(numbers), entry)
            # Free this entry before the next one is parsed; enumerate() would keep it.
            del entry
            rows += [row] if row is not None else []
            lines.append(detections)
            rejects += problems
            size += len(detections)
            if len(rows) + len(rejects) >= _PAGE or size >= _PAGE_BYTES:
                flush()
                progress(total, stream.tell())
                size = 0
    flush()
    connection.execute("analyze_entries")
    connection.execute("create_annotated", batch_id=batch_id, force=force)
    connection.execute("index_annotated")
    connection.execute("analyze_annotated")
    connection.execute("drop_skipped_rejects")
    connection.execute("add_unknown")
    connection.execute("create_staged_annotations", force=force)
    return connection.one("count_annotated")


def copy_found(connection: Connection, inputs: Iterable[Folder | Reject]) -> int:
    """Copy folders and rejects to pg_temp.found; return their number."""
    return connection.copy_in(
        "pg_temp.found",
        ("recognition_id", "path", "code", "message"),
        ((i.recognition_id, i.path, getattr(i, "code", None), getattr(i, "message", None)) for i in inputs),
    )


def _read(number: int, entry: Entry) -> tuple[Sequence[object] | None, bytes, list[Reject]]:
    """Return an entry's row (None if its key names no photo), its detections as COPY lines, and its rejects."""
    shown = entry.key.encode(errors="replace").decode().replace("\0", "�")[:_LONGEST_PATH]
    try:
        recognition_id, camera = photo_of(entry.key)
    except BadInput as exc:
        return None, b"", [Reject(None, shown, exc.code, exc.message)]
    usable: int | None = None
    lines = b""
    try:
        if entry.problem is not None:
            raise entry.problem
        detections, problems = detections_of(entry.value)
        usable, lines = len(detections), _lines(number, detections)
    except BadInput as exc:
        problems = [exc]
    row = (number, recognition_id, camera, entry.key, entry.size, usable)
    return row, lines, [Reject(recognition_id, shown, exc.code, exc.message) for exc in problems]


def _lines(number: int, detections: Sequence[Detection]) -> bytes:
    """Return detections in the text format of COPY; no field needs escaping."""
    return "".join(
        [
            f"{number}\t{position}\t{label}\t{x1}\t{y1}\t{x2}\t{y2}\n"
            for position, (label, x1, y1, x2, y2) in enumerate(detections, 1)
        ]
    ).encode()


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as exc:
        raise UnfinishedError(
            f"The annotations file {path} cannot be read: {exc.strerror}.", "Restore it, then run the command again."
        ) from exc

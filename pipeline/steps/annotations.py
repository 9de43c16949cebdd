"""Stage the annotations: read the file once as a stream, and COPY its usable detections into a temporary table.

Discovery inserts those of the chosen photos into the schema raw, in the same transaction.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.database import Connection, line_of
from pipeline.dataset.annotations import Entry, read_entries
from pipeline.dataset.detections import Detection, detections_of, photo_of
from pipeline.dataset.records import Reject
from pipeline.errors import BadInput, UnfinishedError

#: Entries and rejects, and bytes of lines for COPY, that are in memory at most.
_PAGE = 2000
_PAGE_BYTES = 4 << 20
_ENTRIES = ("number", "recognition_id", "camera_number", "path", "size", "labels", "x1", "y1", "x2", "y2")
_LONGEST_PATH = 300
_UNUSABLE = (None,) * 5


def stage_annotations(
    connection: Connection,
    path: Path,
    batch_id: str,
    *,
    force: bool,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Any:
    """Read the file; leave its entries in pg_temp.entries, the choice in pg_temp.staged, rejects in pg_temp.found.

    Returns a row with what was found: found, already_loaded, held_elsewhere, held_by, superseded_copies.

    Arguments:
        progress: called with the size of the file and how much of it was read, in bytes.

    Raises:
        UsageError: the file as a whole is broken.
        UnfinishedError: the file cannot be read.
    """
    connection.execute("create_found")
    connection.execute("create_entries")
    lines: list[bytes] = []
    rejects: list[Reject] = []
    size = 0

    def flush() -> None:
        connection.copy_lines("pg_temp.entries", _ENTRIES, lines)
        connection.copy_in(
            "pg_temp.found",
            ("recognition_id", "path", "code", "message"),
            ((r.recognition_id, r.path, r.code, r.message) for r in rejects),
        )
        lines.clear()
        rejects.clear()

    with _opened(path) as stream:
        total = os.fstat(stream.fileno()).st_size
        numbers = itertools.count()
        for entry in read_entries(stream):
            line, problems = _line_of(next(numbers), entry)
            # The next entry is parsed without this one in memory; enumerate() would keep it.
            del entry
            lines.append(line)
            rejects += problems
            size += len(line)
            if len(lines) + len(rejects) >= _PAGE or size >= _PAGE_BYTES:
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


def _line_of(number: int, entry: Entry) -> tuple[bytes, list[Reject]]:
    """Return the line of an entry for pg_temp.entries, empty when its key names no photo, and its rejects."""
    shown = entry.key.encode(errors="replace").decode().replace("\0", "�")[:_LONGEST_PATH]
    try:
        recognition_id, camera = photo_of(entry.key)
    except BadInput as exc:
        return b"", [Reject(None, shown, exc.code, exc.message)]
    arrays: Sequence[str | None] = _UNUSABLE
    try:
        if entry.problem is not None:
            raise entry.problem
        detections, problems = detections_of(entry.value)
        arrays = _arrays(detections)
    except BadInput as exc:
        problems = [exc]
    line = line_of((number, recognition_id, camera, entry.key, entry.size, *arrays))
    return line, [Reject(recognition_id, shown, exc.code, exc.message) for exc in problems]


def _arrays(detections: Sequence[Detection]) -> list[str]:
    """Return labels, x1, y1, x2 and y2 as array literals; none of their elements needs quotes."""
    columns = zip(*detections, strict=True) if detections else ((),) * 5
    return [f"{{{','.join(map(str, column))}}}" for column in columns]


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as exc:
        raise UnfinishedError(
            f"The annotations file {path} cannot be read: {exc.strerror}.", "Restore it, then run the command again."
        ) from exc

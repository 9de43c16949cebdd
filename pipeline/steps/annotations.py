"""Stage the annotations: stream the file once, and COPY its usable detections into temporary tables.

Discovery inserts the detections of the selected photos into the schema raw, in the same transaction.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pipeline.database import Connection
from pipeline.dataset.annotations import Entry, read_entries
from pipeline.dataset.detections import detections_of, photo_of, rank_of
from pipeline.dataset.frame import LARGE, contradiction, frame_of
from pipeline.dataset.records import Deviation, Notice, Reject
from pipeline.errors import BadInput, UnfinishedError, UsageError
from pipeline.steps.in_use import not_adopted
from pipeline.steps.staging import Seen, copy_found

#: Maximum number of buffered entries and rejects, and bytes of buffered detections.
_PAGE = 2000
_PAGE_BYTES = 4 << 20
_ENTRIES = ("number", "recognition_id", "camera_number", "path", "rank", "size", "digest", "detections")
_DETECTIONS = ("number", "detection", "label", "x1", "y1", "x2", "y2")
_FOUND = ("number", "recognition_id", "path", "code", "message")
_LONGEST_PATH = 300  # the end of a key names the photo


def stage_annotations(seen: Seen, batch_id: str, coordinates: str, *, exif_turned: bool) -> str:
    """Read the file; fill pg_temp.boxes, pg_temp.staged (the selected photos) and pg_temp.found (rejects).

    Returns why the batch is to be held, empty if it is not. `seen` has counts of photos, and its `progress` is called
    with the size of the file and the bytes read so far. Raises UsageError if the file is not one JSON object, and
    UnfinishedError if it cannot be read.
    """
    connection, path, progress = seen.connection, seen.source, seen.progress
    for statement in ("create_found", "create_entries"):
        connection.execute(statement)
    rows: list[Sequence[object]] = []
    lines: list[bytes] = []
    rejects: list[Sequence[object]] = []
    forms: set[Deviation] = set()

    def flush() -> None:
        connection.copy_in("pg_temp.entries", _ENTRIES, rows)
        connection.copy_lines("pg_temp.detections", _DETECTIONS, lines)
        connection.copy_in("pg_temp.found", _FOUND, rejects)
        for buffer in (rows, lines, rejects):
            buffer.clear()

    with _opened(path) as stream:
        total, size, numbers = os.fstat(stream.fileno()).st_size, 0, itertools.count()
        for entry in _entries(path, stream, forms):
            number = next(numbers)
            row, detections, problems = _read(number, entry, forms, f"{coordinates} {exif_turned}")
            # Free this entry before the next one is parsed; enumerate() would keep it.
            del entry
            rows += row
            lines.append(detections)
            rejects += ((number, one.recognition_id, one.path, one.code, one.message) for one in problems)
            size += len(detections)
            if len(rows) + len(rejects) >= _PAGE or size >= _PAGE_BYTES:
                flush()
                progress(total, stream.tell())
                size = 0
    flush()
    progress(total, total)
    connection.execute("create_photos", batch_id=batch_id, force=seen.is_forced)
    width, height = frame_of(coordinates)
    connection.execute("create_boxes", exif_turned=exif_turned, frame_width=width, frame_height=height)
    connection.execute("find_changed_photos", changed=seen.is_taken)
    for camera in (1, 2):
        connection.execute("remember_seen_photos", camera=camera)
    connection.execute("add_unusable", message=not_adopted(connection.command), exif_turned=exif_turned)
    connection.execute("create_staged_annotations", force=seen.is_forced)
    held_reason, notices = _check_frame(connection, path, coordinates)
    notices += [Notice(None, str(path), *one) for one in sorted(forms)]
    copy_found(connection, notices)
    differ = connection.one("count_changed_photos", changed=seen.is_taken)
    seen.found, seen.changed, seen.held = connection.one("count_annotated"), differ.changed, differ.held
    return held_reason


def _check_frame(connection: Connection, path: Path, coordinates: str) -> tuple[str, list[Notice]]:
    """Return why the batch is to be held, empty if it is not, and notices on what the file has."""
    seen, notices = connection.one("weigh_frame", large=LARGE), []
    if seen.empty:
        message = f"photos that the file has without any detection: {seen.empty}"
        notices.append(Notice(None, str(path), "annotations_empty", message))
    if not seen.free or seen.farthest is None:
        return "", notices
    why, is_certain = contradiction(coordinates, seen.farthest, seen.boxes, seen.photos)
    if is_certain:
        return f"The boxes of {path} contradict --coordinates {coordinates}: {why}.", notices
    return "", notices + ([Notice(None, str(path), "coordinates_suspect", why)] if why else [])


def _read(
    number: int, entry: Entry, forms: set[Deviation], options: str
) -> tuple[list[Sequence[object]], bytes, list[Reject]]:
    """Return the row (none if the key names no photo), the detections as COPY lines, and the rejects of an entry."""
    shown = entry.key.encode(errors="replace").decode().replace("\0", "�")[-_LONGEST_PATH:]
    try:
        recognition_id, camera = photo_of(entry.key)
    except BadInput as exc:
        # A line that cannot be read names no photo, either.
        return [], b"", [_reject(None, shown or "(empty)", entry.problem or exc)]
    usable: int | None = None
    lines: list[str] = []
    try:
        if entry.problem is not None:
            raise entry.problem
        detections, problems = detections_of(entry.value, forms)
        usable = len(detections) if detections or not problems else None
        # The text format of COPY; no field needs escaping.
        lines = [
            f"\t{position}\t{label}\t{x1}\t{y1}\t{x2}\t{y2}\n"
            for position, (label, x1, y1, x2, y2) in enumerate(detections, 1)
        ]
    except BadInput as exc:
        problems = [exc.with_traceback(None)]  # a traceback keeps this frame, and so the entry
    digest = hashlib.sha256("".join((options, *lines)).encode()).hexdigest()
    row = (number, recognition_id, camera, entry.key, rank_of(entry.key), entry.size, digest, usable)
    rejects = [_reject(recognition_id, shown, one) for one in problems]
    return [row], "".join([f"{number}{line}" for line in lines]).encode(), rejects


def _reject(recognition_id: int | None, shown: str, one: BadInput) -> Reject:
    return Reject(recognition_id, shown, one.code, one.message)


def _entries(path: Path, stream: BinaryIO, forms: set[Deviation]) -> Iterator[Entry]:
    """Yield the entries of a file; an error names it, since it may be one that was found in a usual place."""
    try:
        yield from read_entries(stream, forms)
    except UsageError as exc:
        raise UsageError(exc.message, f"The file is {path}. {exc.hint}") from exc
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _unreadable(path: Path, exc: OSError) -> UnfinishedError:
    message = f"The annotations file {path} cannot be read: {exc.strerror}."
    return UnfinishedError(message, "Restore it, then run the command again.")

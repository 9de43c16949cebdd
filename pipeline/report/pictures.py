"""Read the pictures of the page: sampled photos from Storage, rejected photos from the source folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.batches.state import KIND_LOAD
from pipeline.database import Connection, Database
from pipeline.dataset.jpeg import END
from pipeline.dataset.layout import MAXIMUM_PHOTO_BYTES
from pipeline.dataset.names import is_photo
from pipeline.errors import ObjectNotFound, PipelineError, StorageError, TransientError, UsageError
from pipeline.report.thumbnail import Thumbnail, thumbnail
from pipeline.report.trays import Photo, Tray, tray_of
from pipeline.storage import Storage

#: Pixels of the longer side of a thumbnail.
_PHOTO, _REJECT = 720, 240
#: Recognitions per query.
_CHUNK = 10
MAXIMUM_ITEMS = 100
MAXIMUM_BOXES = 200


@dataclass
class Report:
    """Describe the written file and count the recognitions and photos in it.

    `unavailable` is the error that stopped reading photos from Storage, empty if there was none.
    """

    batch_id: str
    state: str
    file: str
    bytes: int = 0
    recognitions: int = 0
    photos: int = 0
    unavailable: str = ""


def read_rejects(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rejects with thumbnails of rejected photos, read one at a time while the page is written."""
    source = Path(summary["source"])
    is_load = summary["kind"] == KIND_LOAD
    there = is_load and os.path.isdir(source)
    note = ""
    if is_load and not there:
        note = "The source folder does not exist on this machine, so there are no pictures of rejects."
    pictures = (
        {
            **one,
            "is_photo": is_load and is_photo(one["path"]),
            "picture": _damaged(source, one["path"]) if there else None,
        }
        for one in summary["rejected_inputs"]
    )

    def by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
        return sorted(counts.items(), key=lambda one: (-one[1], one[0]))

    return {
        "reject_counts": by_count(summary["rejects"]),
        "notice_counts": by_count(summary.get("notices", {})),  # earlier versions recorded none
        "rejects": pictures,
        "notices": [{**one, "is_photo": False, "picture": None} for one in summary.get("noticed_inputs", ())],
        "source_note": note,
    }


def _damaged(source: Path, path: str) -> Thumbnail | None:
    """Return a thumbnail of what decodes of a rejected photo; None for a file outside the source folder."""
    if not is_photo(path):
        return None
    try:
        file = (source / path).resolve(strict=True)
        if not file.is_relative_to(source.resolve(strict=True)):
            return None
        # Without O_NONBLOCK, opening a named pipe would block.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(descriptor, "rb") as opened:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAXIMUM_PHOTO_BYTES:
                return None
            content = opened.read(MAXIMUM_PHOTO_BYTES)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return thumbnail(content, _REJECT, damaged=True)


class Trays:
    """Read recognitions with their photos, as the page iterates over them."""

    def __init__(self, database: Database, storage: Storage, report: Report) -> None:
        self._database, self._storage, self._report = database, storage, report

    def read(self, chosen: Sequence[int]) -> Iterator[Tray]:
        """Yield the trays of the recognitions; skip those that were reset in the meantime."""
        for start in range(0, len(chosen), _CHUNK):
            wanted = list(chosen[start : start + _CHUNK])
            photos, items, boxes = self._database.run(partial(self._query, wanted=wanted), read_only=True)
            for recognition_id in wanted:
                own = [one for one in photos if one.recognition_id == recognition_id]
                if own:
                    self._report.recognitions += 1
                    pictures = [self._photo(one, [box for box in boxes if box.image_id == one.image_id]) for one in own]
                    on_tray = [one for one in items if one.recognition_id == recognition_id]
                    yield tray_of(recognition_id, self._note(own), pictures, on_tray)

    def _query(self, connection: Connection, wanted: Sequence[int]) -> tuple[Sequence[Any], ...]:
        photos = connection.execute("list_sample_photos", batch_id=self._report.batch_id, recognition_ids=wanted)
        images = [one.image_id for one in photos if one.image_id is not None]
        shown = sorted({one.recognition_id for one in photos if one.image_id is not None})
        items = connection.execute("list_sample_items", recognition_ids=shown, count=MAXIMUM_ITEMS)
        boxes = connection.execute("list_sample_boxes", image_ids=images, count=MAXIMUM_BOXES)
        return photos, items, boxes

    def _note(self, photos: Sequence[Any]) -> str:
        others = {one.shown_batch_id for one in photos if one.image_id is None and one.shown_batch_id is not None}
        return (
            f"Readers see another version, of batch {min(others)}; the boxes belong to that version." if others else ""
        )

    def _photo(self, row: Any, boxes: Sequence[Any]) -> Photo:
        picture, note = self._picture(row)
        notes = [note] if note else []
        if picture is not None and (row.orientation or 1) != 1:
            notes.append(f"EXIF orientation {row.orientation} is not applied, to the photo or its boxes.")
        if boxes and boxes[0].boxes > len(boxes):
            notes.append(f"The first {len(boxes)} of {boxes[0].boxes} boxes.")
        return Photo(row.camera_number, picture, " ".join(notes), boxes)

    def _picture(self, row: Any) -> tuple[Thumbnail | None, str]:
        """Return a thumbnail of the stored object and a note about it, or None and the reason."""
        if row.object_key is None:
            return None, "This photo is no longer loaded."
        if self._report.unavailable:
            return None, "Storage was not available."
        try:
            content = self._storage.read(row.object_key, MAXIMUM_PHOTO_BYTES)
        except (TransientError, UsageError) as exc:
            try:
                self._storage.find_bucket()
            except PipelineError:  # every further read would fail alike
                self._report.unavailable = exc.message
                return None, "Storage was not available."
            return None, f"Reading it from the bucket failed: {exc.message}"
        except ObjectNotFound:
            return None, "The bucket has no object for this photo."
        except StorageError as exc:
            return None, f"Reading it from the bucket failed: {exc.message}"
        differs = row.sha256 is not None and hashlib.sha256(content).hexdigest() != row.sha256
        picture = thumbnail(content if differs else content + END, _PHOTO)  # a photo that was loaded may lack its end
        if picture is None:
            return None, "The stored object cannot be decoded as a picture."
        self._report.photos += 1
        return (
            picture,
            "The stored object differs from the loaded photo: its SHA-256 does not match." if differs else "",
        )

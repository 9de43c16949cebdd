"""Fill the temporary tables of a discovery: what was found in the dataset, and what of it is to be loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from pipeline.database import Connection
from pipeline.dataset.records import FILE_CLASSES, REJECTED, USED, Folder, Notice, Recognition, Reject

_STAGED = ("recognition_id", "captured_on", "identity", "photo_paths", "photo_sizes", "photo_mtimes")
_STAGED_DOCUMENTS = ("menu_path", "menu_size", "menu_mtime", "receipt_path", "receipt_size", "receipt_mtime")

#: Called with the total and the number done.
Progress = Callable[[int, int], None]


@dataclass
class Seen:
    """A look at a source, and what it adds up; the last three are recognitions or photos.

    Attributes:
        is_taken: whether what changed is loaded anew.
        found: the row of counts of the source.
        files: number of files below the source, by class.
        newest: the last day on which a recognition was captured.
        beyond_limit: what is new, and not taken.
        changed: what is no longer as it was loaded.
        held: what changed and would be taken, and other batches hold.
    """

    connection: Connection
    source: Path
    progress: Progress
    is_forced: bool
    is_taken: bool
    found: Any = None
    files: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FILE_CLASSES, 0)))
    newest: date | None = None
    beyond_limit: int = 0
    changed: int = 0
    held: int = 0
    _done: int = 0

    def counts(self) -> dict[str, Any]:
        """Return the counts of the source, as the columns of a batch; what changed and is taken is not loaded."""
        counts: dict[str, Any] = self.found._asdict()
        counts["already_loaded"] -= self.held + (self.changed if self.is_taken else 0)
        counts["held_elsewhere"] += self.held
        return {**counts, "held_by": sorted(counts["held_by"]), "beyond_limit": self.beyond_limit}

    def advance(self, days: Iterable[date | None]) -> None:
        """Count recognitions, of which these are the days on which they were captured."""
        known = list(days)
        self._done += len(known)
        self.newest = max(filter(None, (self.newest, *known)), default=None)
        self.progress(self.found.found, self._done)

    def drop_known(self, after: int) -> int:
        """Reject what an earlier upload or copy rejected and did not change, of a page of pg_temp.staged.

        The page is what has larger ids than `after`. Return the number of rejects.
        """
        if self.is_forced:
            return 0
        known = self.connection.one("drop_known_staged", after=after)
        self.files.update({USED: -known.files, REJECTED: known.files})
        return int(known.recognitions)


def copy_found(connection: Connection, inputs: Iterable[Folder | Reject | Notice], *, is_taken: bool = True) -> None:
    """Copy folders, rejects and notices to pg_temp.found; without `is_taken`, rejects of what stays as it is."""
    columns = ("recognition_id", "path", "code", "message", "is_notice", "rank", "taken")
    rows = (
        (one.recognition_id, one.path, None, None, False, one.rank, is_taken)
        if isinstance(one, Folder)
        else (one.recognition_id, one.path, one.code, one.message, isinstance(one, Notice), 0, is_taken)
        for one in inputs
    )
    connection.copy_in("pg_temp.found", columns, rows)


def copy_staged(
    connection: Connection, recognitions: Iterable[Recognition], changed: Mapping[int, str | None] | None = None
) -> None:
    """Copy recognitions to pg_temp.staged; `changed` has the batch in which each of them is loaded, if they are."""
    rows = ([*_staged_row(one), changed is not None, (changed or {}).get(one.recognition_id)] for one in recognitions)
    connection.copy_in("pg_temp.staged", (*_STAGED, *_STAGED_DOCUMENTS, "changed", "former"), rows)


def _staged_row(recognition: Recognition) -> list[object]:
    photos = recognition.photos
    row: list[object] = [recognition.recognition_id, recognition.captured_on, recognition.identity]
    row += ([photo.path for photo in photos], [photo.size for photo in photos], [photo.mtime for photo in photos])
    for document in (recognition.menu, recognition.receipt):
        row += (document.path, document.size, document.mtime) if document else (None, None, None)
    return row

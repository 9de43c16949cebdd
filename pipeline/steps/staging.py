"""Fill the temporary tables of a discovery: what was found in the dataset, and what of it is to be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.database import Connection
from pipeline.dataset.records import Folder, Notice, Recognition, Reject

_STAGED = ("recognition_id", "captured_on", "identity", "photo_paths", "photo_sizes", "photo_mtimes")
_STAGED_DOCUMENTS = ("menu_path", "menu_size", "menu_mtime", "receipt_path", "receipt_size", "receipt_mtime")


def copy_found(connection: Connection, inputs: Iterable[Folder | Reject | Notice]) -> None:
    """Copy folders, rejects and notices to pg_temp.found."""
    columns = ("recognition_id", "path", "code", "message", "is_notice", "rank")
    rows = (
        (one.recognition_id, one.path, None, None, False, one.rank)
        if isinstance(one, Folder)
        else (one.recognition_id, one.path, one.code, one.message, isinstance(one, Notice), 0)
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

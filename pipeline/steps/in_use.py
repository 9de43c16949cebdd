"""Recognitions that stay as they are: people's work depends on them, or no batch has them on record.

Discovery leaves out what it knows of, so that it is not uploaded; the commit looks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.database import Connection, line_of
from pipeline.dataset.documents import check_receipt, json_of
from pipeline.dataset.records import File
from pipeline.errors import BadInput
from pipeline.steps.read import read_file

_PAGE = 2000
_IN_USE = "the recognition stays as it is, since rows of others reference what would be deleted: "


def not_adopted(command: Callable[[str], str]) -> str:
    """Return the sentence about a recognition that is there, and that no finished batch has."""
    return f"the recognition stays as it is, since no batch has it on record: `{command('adopt')}` puts it there"


def leave_in_use(connection: Connection, batch_id: str, source: Path) -> None:
    """Take recognitions out of pg_temp.staged whose new receipt or photos would delete rows that others reference."""
    after = -1
    while page := connection.execute("list_present", after=after, count=_PAGE):
        after = page[-1].recognition_id
        columns = ("batch_id", "recognition_id", "receipt")
        connection.copy_lines("raw.receipts", columns, _receipts(batch_id, source, page))
    if after >= 0:
        connection.execute("drop_in_use", batch_id=batch_id, in_use=_IN_USE)


def set_aside(connection: Connection, batch_id: str) -> bool:
    """Plan the commit, and leave out recognitions that are to stay as they are; return whether there are any.

    They are removed with what was rejected, after this transaction and before the one that publishes the rest.
    """
    reasons = {"in_use": _IN_USE, "not_adopted": not_adopted(connection.command)}
    if not connection.one("plan_batch", batch_id=batch_id, **reasons).recognitions:
        return False
    connection.execute("set_aside", batch_id=batch_id)
    return True


def _receipts(batch_id: str, source: Path, rows: Iterable[Any]) -> Iterator[bytes]:
    """Yield lines of raw.receipts; the upload rejects what cannot be read."""
    for row in rows:
        with suppress(BadInput):
            file = File(row.receipt_path, row.receipt_size, row.receipt_mtime) if row.receipt_path is not None else None
            yield line_of((batch_id, row.recognition_id, read_document(source, file, check_receipt)))


def read_document(source: Path, file: File | None, check: Callable[[bytes], object]) -> bytes | None:
    """Return the JSON of a document, None if there is no file; raise BadInput if it cannot be read or is not valid."""
    if file is None:
        return None
    content = read_file(source, file, "json")
    check(content)
    return json_of(content)

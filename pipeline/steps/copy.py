"""COPY a shard's documents from their files into the schema raw, with the marker in the same transaction."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.state import COPY, KIND_LOAD
from pipeline.config import Settings
from pipeline.database import Connection, Database, line_of
from pipeline.dataset.documents import json_of
from pipeline.dataset.records import Reject
from pipeline.errors import BadInput, DataError, RefusedError, UnfinishedError
from pipeline.observe.metrics import Metrics
from pipeline.steps.read import read_up_to
from pipeline.steps.source import require_source
from pipeline.steps.upload import roll_back_upload
from pipeline.storage import Storage
from pipeline.units import counted

logger = logging.getLogger(__name__)

_TIMEOUT = 600.0
_AHEAD = 1 << 20  # maximum bytes of a shard's receipts that are read while PostgreSQL copies its photos and menus


def copy_shard(
    database: Database,
    settings: Settings,
    batch_id: str,
    shard: int,
    report: Callable[[str], None] = lambda _: None,
    *,
    may_reject: bool = True,
) -> None:
    """Copy the rows of a shard and write its marker; do nothing if the marker exists.

    A document that changed since its check makes its recognition a reject; for `may_reject`, see `require_source`.
    `report` is called with a sentence about the result. Raises RefusedError if the batch is not being loaded,
    UnfinishedError if the shard is not uploaded, SourceUnavailable, or DataError after rolling back the upload.
    """

    def work(connection: Connection) -> None:
        begin = time.perf_counter()
        # One message to the server; list_documents still sees what was committed while the locks were awaited.
        connection.enqueue("prefer_indexes")
        connection.enqueue("hold_batch", batch_id=batch_id)
        connection.enqueue("lock_step", batch_id=batch_id, step=COPY, shard=shard)
        rows = connection.execute("list_documents", batch_id=batch_id, shard=shard)
        if not rows or rows[0].state != "loading":
            batch_state.hold(connection, batch_id)  # raises RefusedError
        batch, *listed = rows
        if batch.kind != KIND_LOAD:
            hint = f"Look at it with `{connection.command('status')}`."
            raise RefusedError(f"Batch {batch_id} was reset and started anew with annotations.", hint)
        if batch.copied:
            return
        if not batch.uploaded:
            raise UnfinishedError(f"Shard {shard} of batch {batch_id} is not uploaded.", "Run the same command again.")
        rejects = _copy_documents(connection, batch_id, shard, batch.source, listed, may_reject=may_reject)
        numbers = Metrics()
        numbers.add("db_bulk_copy", time.perf_counter() - begin)
        batch_state.mark(connection, batch_id, COPY, shard, batch.now, numbers.as_dict())
        logger.info("copy: shard %d: %s, %s", shard, counted(len(listed), "recognition"), counted(rejects, "reject"))
        report(f"{counted(len(listed), 'recognition')} copied, {counted(rejects, 'reject')}")

    try:
        database.run(work, timeout=_TIMEOUT)
    except DataError:
        with closing(Storage(settings)) as storage:
            roll_back_upload(database, storage, batch_id, shard)
        raise


def _copy_documents(
    connection: Connection, batch_id: str, shard: int, source: str, rows: list[Any], *, may_reject: bool
) -> int:
    """Copy the menus and receipts of a shard; return its number of rejects."""
    rejects: list[Reject] = []
    unread: list[Reject] = []
    receipts = _receipts(batch_id, source, rows, unread)
    is_small = sum(row.receipt_size or 0 for row in rows) <= _AHEAD
    with ThreadPoolExecutor(1) as executor:
        ahead = executor.submit(list, receipts if is_small else ())
        known = {row.sha256 for row in connection.execute("copy_known", batch_id=batch_id, shard=shard)}
        new = [row for row in rows if row.menu_sha256 is not None and row.menu_sha256 not in known]
        if new:
            menus = ((batch_id, shard, *menu) for menu in _menus(source, new, rejects))
            connection.copy_in("raw.menus", ("batch_id", "shard", "sha256", "content"), menus)
        lost = {reject.recognition_id for reject in rejects}
        lines = (line for number, line in chain(ahead.result(), receipts) if number not in lost)
        connection.copy_lines("raw.receipts", ("batch_id", "recognition_id", "receipt", "menu_sha256"), lines)
    rejects += [reject for reject in unread if reject.recognition_id not in lost]
    require_source(Path(source), rejects, may_reject=may_reject)
    connection.enqueue("notice_prices", batch_id=batch_id, shard=shard)
    if rejects:
        batch_state.add_inputs(connection, batch_id, COPY, shard, rejects)
        connection.execute("note_rejected", batch_id=batch_id, step=COPY, shard=shard)
        ids = [reject.recognition_id for reject in rejects]
        connection.execute("leave_out_copy", batch_id=batch_id, recognition_ids=ids)
    return len(rejects)


def _menus(source: str, rows: list[Any], rejects: list[Reject]) -> Iterator[tuple[str, bytes]]:
    """Yield (SHA-256 of the file, JSON) of each distinct menu; fill `rejects` if no unchanged copy is left."""
    digest_of = attrgetter("menu_sha256")
    for digest, sharing in groupby(sorted(rows, key=digest_of), digest_of):
        lost: list[Reject] = []
        for row in sharing:
            menu = _read(source, row.recognition_id, row.menu_path, row.menu_size, digest)
            if isinstance(menu, bytes):
                yield digest, menu
                break  # one unchanged copy is enough for all recognitions that had the same menu
            lost.append(menu)
        else:
            rejects += lost


def _receipts(batch_id: str, source: str, rows: list[Any], rejects: list[Reject]) -> Iterator[tuple[int, bytes]]:
    """Yield (recognition id, line of raw.receipts); fill `rejects` for receipts that cannot be read."""
    for row in rows:
        receipt = None
        if row.receipt_path is not None:
            receipt = _read(source, row.recognition_id, row.receipt_path, row.receipt_size, row.receipt_sha256)
        if isinstance(receipt, Reject):
            rejects.append(receipt)
        else:
            yield row.recognition_id, line_of((batch_id, row.recognition_id, receipt, row.menu_sha256))


def _read(source: str, recognition_id: int, path: str, size: int, digest: str) -> bytes | Reject:
    """Return the JSON of a document if its SHA-256 is still the one that the upload checked."""
    try:
        # One extra byte detects a file that grew, without reading all of it.
        content, _ = read_up_to(f"{source}/{path}", size + 1, "json", "it was checked")
        if hashlib.sha256(content).hexdigest() != digest:
            raise BadInput("json_changed", "the file changed since it was checked")
        return json_of(content)
    except BadInput as exc:
        return Reject(recognition_id, path, exc.code, exc.message)

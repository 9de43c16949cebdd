"""COPY a shard into the schema raw: rows streamed from manifest and documents, the marker in the same transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import batch_state
from pipeline.batch_state import COPY, KIND_LOAD, UPLOAD
from pipeline.database import Connection, Database
from pipeline.dataset import Reject, check_menu, check_receipt
from pipeline.errors import BadInput, PermanentError, UnfinishedError
from pipeline.logger import get_logger
from pipeline.metrics import Metrics
from pipeline.steps.annotations import copy_annotations
from pipeline.steps.upload import take_back
from pipeline.storage import Storage

logger = get_logger(__name__)

_TIMEOUT = 600.0


def copy_shard(database: Database, storage: Storage, batch_id: str, shard: int, metrics: Metrics) -> None:
    """Copy the rows of a shard and write its marker; nothing happens when the marker is there.

    A document that is no longer the one the upload checked makes its recognition a reject.

    Raises:
        RefusedError: the batch is not being loaded.
        UnfinishedError: the shard's upload is not done, or was taken back.
        DatabaseUnavailable: nothing was written.
        DatabaseError: nothing was written, and the shard's objects were removed.
    """

    def work(connection: Connection) -> None:
        held = batch_state.hold_step(connection, batch_id, COPY, shard)
        if held is None:
            return
        if held.kind == KIND_LOAD and not batch_state.is_done(connection, batch_id, UPLOAD, shard):
            raise UnfinishedError(f"Shard {shard} of batch {batch_id} is not uploaded.", "Run the same command again.")
        copy = _copy_photos if held.kind == KIND_LOAD else copy_annotations
        with metrics.timed("db_bulk_copy"):
            recognitions, rejects = copy(connection, batch_id, shard, Path(held.source))
        batch_state.mark(connection, batch_id, COPY, shard, held.now, metrics.as_dict())
        logger.info("copy: shard %d: %d recognitions, %d rejects", shard, recognitions, rejects)

    try:
        database.run(work, timeout=_TIMEOUT)
    except PermanentError:
        take_back(database, storage, batch_id, shard)
        raise


def _copy_photos(connection: Connection, batch_id: str, shard: int, source: Path) -> tuple[int, int]:
    """Copy a shard of a dataset; return how many recognitions it has and how many inputs were rejected."""
    rows = connection.execute("list_manifest_facts", batch_id=batch_id, shard=shard)
    rejects: dict[int, Reject] = {}
    connection.copy_in(
        "raw.menus",
        ("batch_id", "shard", "sha256", "content"),
        ((batch_id, shard, digest, text) for digest, text in _menus(source, rows, rejects)),
    )
    connection.copy_in(
        "raw.recipes",
        ("batch_id", "recognition_id", "receipt", "menu_sha256"),
        ((batch_id, row.recognition_id, text, row.menu_sha256) for row, text in _receipts(source, rows, rejects)),
    )
    connection.copy_in(
        "raw.recognition_files",
        (
            "batch_id",
            "recognition_id",
            "camera_number",
            "captured_on",
            "source_path",
            "object_key",
            "width",
            "height",
            "orientation",
            "byte_size",
            "sha256",
        ),
        (
            (
                batch_id,
                row.recognition_id,
                camera + 1,
                row.captured_on,
                row.photo_paths[camera],
                row.object_keys[camera],
                row.widths[camera],
                row.heights[camera],
                row.orientations[camera],
                row.photo_sizes[camera],
                row.sha256s[camera],
            )
            for row in rows
            if row.recognition_id not in rejects
            for camera in (0, 1)
        ),
    )
    # Their photos are in the bucket already; the commit takes them out.
    batch_state.reject_copied(connection, batch_id, KIND_LOAD, shard, list(rejects.values()), list(rejects))
    return len(rows), len(rejects)


def _menus(source: Path, rows: Sequence[Any], rejects: dict[int, Reject]) -> Iterator[tuple[str, str]]:
    """Yield (SHA-256 of the file, JSON text) of each distinct menu; fill `rejects` where no copy of it is left."""
    by_digest: dict[str, list[Any]] = {}
    for row in rows:
        if row.menu_sha256 is not None:
            by_digest.setdefault(row.menu_sha256, []).append(row)
    for digest, sharing in by_digest.items():
        for row in sharing:
            try:
                text = check_menu(_read(source, row.menu_path, digest))
            except BadInput as exc:
                rejects[row.recognition_id] = Reject(row.recognition_id, row.menu_path, exc.code, exc.message)
                continue
            # One whole copy serves all that had the same content when they were checked.
            for other in sharing:
                rejects.pop(other.recognition_id, None)
            yield digest, text
            break


def _receipts(source: Path, rows: Sequence[Any], rejects: dict[int, Reject]) -> Iterator[tuple[Any, str | None]]:
    for row in rows:
        if row.recognition_id in rejects:
            continue
        text = None
        if row.receipt_path is not None:
            try:
                text = check_receipt(_read(source, row.receipt_path, row.receipt_sha256))
            except BadInput as exc:
                rejects[row.recognition_id] = Reject(row.recognition_id, row.receipt_path, exc.code, exc.message)
                continue
        yield row, text


def _read(source: Path, path: str, digest: str) -> bytes:
    try:
        content = (source / path).read_bytes()
    except FileNotFoundError as exc:
        raise BadInput("json_vanished", "the file vanished since it was checked") from exc
    except OSError as exc:
        raise BadInput("json_unreadable", f"the file cannot be read: {exc.strerror}") from exc
    if hashlib.sha256(content).hexdigest() != digest:
        raise BadInput("json_changed", "the file changed since it was checked")
    return content

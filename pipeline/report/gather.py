"""Write the report of a batch: read its records, compute the sections, and replace the file atomically."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipeline.batches.bucket import list_recorded, prove_bucket
from pipeline.batches.resolve import require_schema
from pipeline.batches.state import COPY, KIND_LOAD, UPLOAD
from pipeline.batches.summary import summarise
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import PipelineError, SettingsError
from pipeline.files import replacing
from pipeline.report.page import write_page
from pipeline.report.pictures import Report, Trays, read_rejects
from pipeline.report.sections import how_to_go_on, no_trays, numbers, requests, time, trays_words
from pipeline.report.timeline import Span
from pipeline.storage import Storage


def write_report(
    settings: Settings,
    database: Database,
    batch_id: str,
    path: Path,
    sample: int,
) -> Report:
    """Write the page about a batch atomically; photos are read one at a time.

    A missing source folder or photo, or an unavailable Storage, is noted in the page and is not an error.

    Arguments:
        sample: number of recognitions to show with their photos.

    Raises:
        UsageError: the batch does not exist.
        SettingsError: the file cannot be written.
    """

    def gather(connection: Connection) -> tuple[Any, ...]:
        require_schema(connection)
        summary = summarise(connection, batch_id)
        spans = [
            Span(one.step, one.shard, one.worker, one.started_at.timestamp(), one.finished_at.timestamp(), one.metrics)
            for one in connection.execute("list_markers", batch_id=batch_id)
        ]
        sizes = {one.shard: one.recognitions for one in connection.execute("count_shards", batch_id=batch_id)}
        step = UPLOAD if summary["kind"] == KIND_LOAD else COPY
        chosen = connection.execute("list_sample", batch_id=batch_id, step=step, count=sample)
        recorded = list_recorded(connection, summary["bucket"])
        return summary, spans, sizes, [one.recognition_id for one in chosen], recorded

    summary, spans, sizes, chosen, recorded = database.run(gather, read_only=True)
    report = Report(batch_id, summary["state"], str(path))
    # STORAGE_BUCKET may have changed since the load; the photos are in the bucket on record.
    with closing(Storage(settings, bucket=summary["bucket"])) as storage:
        trays = Trays(database, storage, report)
        try:
            if chosen:
                prove_bucket(storage, recorded)
        except PipelineError as exc:  # the photos may be there, hidden from the key
            report.unavailable = exc.message
        page = {
            **numbers(summary, spans),
            **time(summary, spans, sizes),
            **requests(summary, spans),
            **read_rejects(summary),
            "trays": trays.read(chosen),
            "trays_words": trays_words(summary, len(chosen)),
            "no_trays": no_trays(summary, sample),
            "next_step": how_to_go_on(summary, settings.is_production),
            "made_at": datetime.now(timezone.utc).isoformat(),
        }
        try:
            with replacing(path) as out:
                write_page(out, page)
        except OSError as exc:
            message = f"The report cannot be written to {path}: {exc.strerror}."
            raise SettingsError(message, "Name another file with --out.") from exc
    report.bytes = path.stat().st_size
    return report

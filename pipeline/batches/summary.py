"""What is on record of a batch and of all batches, as JSON and as text: the summary and the status."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import list_recorded, prove_bucket
from pipeline.batches.proofs import describe_proofs, find_proofs
from pipeline.batches.resolve import LoadRequest, reset_command
from pipeline.batches.state import KIND_QWEN, held_hint
from pipeline.config import Settings, command_line
from pipeline.database import Connection, Database
from pipeline.database.migrate import pending
from pipeline.dataset.records import describe_codes, describe_files
from pipeline.errors import PipelineError, printable
from pipeline.observe.metrics import merge
from pipeline.storage import Storage
from pipeline.units import counted, duration, moment, size

_LISTED_REJECTS, _LISTED_BATCHES = 100, 10  # in a summary and in the status; the tables have them all


def summarise(connection: Connection, batch_id: str) -> dict[str, Any]:
    """Return the numbers of a batch; durations in seconds, sizes in bytes. Raises UsageError if it does not exist."""
    found = batch_state.require_batch(connection, batch_id)
    if found.metrics:  # stored when the batch was done, since a reset deletes its markers
        reset_at = found.reset_at.isoformat() if found.reset_at is not None else None
        return {**found.metrics, "state": found.state, "reset_at": reset_at}
    batch = _as_json(connection.one("describe_batch", batch_id=batch_id))
    markers = connection.execute("list_markers", batch_id=batch_id)
    total: dict[str, Any] = {}
    for marker in markers:
        merge(total, marker.metrics)
    done = Counter(marker.step for marker in markers)
    seconds = active_seconds([(marker.started_at, marker.finished_at) for marker in markers])
    counters, operations, gauges = (total.get(name, {}) for name in ("counters", "operations", "gauges"))
    rejects = {row.code: row.rejects for row in connection.execute("count_rejects", batch_id=batch_id)}
    shown = connection.execute("list_rejects", batch_id=batch_id, count=_LISTED_REJECTS)
    notices = {row.code: row.notices for row in connection.execute("count_notices", batch_id=batch_id)}
    noticed = connection.execute("list_notices", batch_id=batch_id, count=_LISTED_REJECTS)
    detections = batch.pop("detections_processed")
    counts = {name: batch[name] for name in ("recognitions_processed", "images_processed")}
    if batch["kind"] == KIND_QWEN:
        counts["detections_processed"] = detections
    else:
        counts["bytes_uploaded"] = counters.get("bytes_uploaded", 0)

    def timing(ops: int, seconds: float) -> dict[str, Any]:
        average = round(seconds / max(1, ops), 6)
        return {"ops": ops, "average_seconds": average, "total_seconds": round(seconds, 6)}

    rates = {name: round(count / seconds, 2) if seconds > 0 else 0.0 for name, count in counts.items()}
    return {
        **batch,
        "shards_done": {step: done[step] for step in (batch_state.UPLOAD, batch_state.COPY)},
        "rejected": sum(rejects.values()),
        "rejects": rejects,
        "rejected_inputs": [row._asdict() for row in shown],
        "noticed": sum(notices.values()),
        "notices": notices,
        "noticed_inputs": [row._asdict() for row in noticed],
        **counts,
        "total_seconds": round(seconds, 3),
        "throughput": {name: {"count": count, "per_second": rates[name]} for name, count in counts.items()},
        "operations": {name: timing(int(one["ops"]), one["seconds"]) for name, one in sorted(operations.items())},
        "counters": counters,
        "gauges": {name: {"last": entry["last"], "max": entry["max"]} for name, entry in sorted(gauges.items())},
    }


def _as_json(row: Any) -> dict[str, Any]:
    return {name: one.isoformat() if isinstance(one, datetime) else one for name, one in row._asdict().items()}


def active_seconds(intervals: Sequence[tuple[datetime, datetime]]) -> float:
    """Return the seconds in which at least one step ran: the union of the intervals, without pauses between runs."""
    total = 0.0
    end: datetime | None = None
    for begin, finish in sorted(intervals):
        total += max(0.0, (finish - max(begin, end or begin)).total_seconds())
        end = max(finish, end or finish)
    return total


def performance_metrics(summary: Mapping[str, Any]) -> str:
    """Return the block `Performance Metrics:` of a summary."""
    lines = ["Performance Metrics:", f"  Total time: {duration(summary['total_seconds'])}", "  Throughput:"]
    for name, entry in summary["throughput"].items():
        if name.startswith("bytes"):
            lines.append(f"    {name}: {size(entry['count'])} ({size(entry['per_second'])}/s)")
        else:
            lines.append(f"    {name}: {entry['count']} ({entry['per_second']:.1f}/s)")
    lines.append("  Operation timings:")
    for name, entry in summary["operations"].items():
        average, total = entry["average_seconds"] * 1000, entry["total_seconds"]
        lines.append(f"    {name}: {entry['ops']} ops, avg {average:.2f} ms, total {total:.2f} s")
    if in_flight := summary.get("gauges", {}).get("requests_in_flight"):  # earlier versions did not record it
        refused = summary["counters"].get("requests_refused", 0)
        lines.append(f"  Requests in flight: {in_flight['last']} (peak {in_flight['max']}), {refused} refused")
    return "\n".join(lines)


def headline(summary: Mapping[str, Any], rejects: int = 10, *, was_done: bool = False) -> str:
    """Return the result of a batch in a few lines, at most `rejects` rejects; for 0 their number is omitted as well.

    `was_done` says that the batch was done before this run, which loaded nothing.
    """
    state, qwen = summary["state"], summary["kind"] == KIND_QWEN
    verb = ", it had" if state == "reset" else ":"
    if was_done and state == "done":
        verb = f" already, since {moment(summary['finished_at'])}: nothing was loaded. It has"
    content = counted(summary["detections_processed"], "detection") if qwen else size(summary["bytes"])
    photos = counted(summary["images_processed"], "photo")
    found = f"{counted(summary['recognitions_processed'], 'recognition')}, {photos}, {content}"
    lines = [f"Batch {summary['batch_id']} is {state}{verb} {found}."]
    if summary.get("adopted"):
        former = summary["adopted_from"]
        lines.append(f"Adopted: another tool loaded it, {f'as {former}' if former else 'without an id'}.")
    if reason := summary.get("held_reason"):  # earlier versions held no batch
        released_at = summary["released_at"]
        then = f", until it was released at {moment(released_at)}" if released_at else ""
        lines.append(printable(f"Held{then}: {reason}"))
    skipped = []

    unit = partial(counted, noun="photo") if qwen else str
    if summary["already_loaded"]:
        skipped.append(f"{unit(summary['already_loaded'])} already {'annotated' if qwen else 'loaded'}")
    if summary["held_elsewhere"]:
        skipped.append(f"{unit(summary['held_elsewhere'])} held by unfinished {', '.join(summary['held_by'])}")
    if summary["beyond_limit"]:
        skipped.append(f"{summary['beyond_limit']} beyond the limit")
    if skipped:
        lines.append(f"Skipped: {'; '.join(skipped)}.")
    if summary["superseded_copies"]:
        twice = "Several keys name the same photo: the one that sorts last"
        if not qwen:
            twice = "Several folders hold the same recognition: the newest with two photos"
        copies = counted(summary["superseded_copies"], "earlier copy was", "earlier copies were")
        lines.append(f"{twice} was taken, {copies} left.")
    if files := summary.get("files"):  # earlier versions did not count them
        lines.append(f"Files: {describe_files(files)}.")
    lines += _inputs(summary, rejects) if rejects else ()
    return "\n".join(lines)


def _inputs(summary: Mapping[str, Any], limit: int) -> Iterator[str]:
    """Yield lines about rejects and notices, and the first of them."""
    for what, table in (("rejected", "rejects"), ("noticed", "notices")):
        total = summary.get(what, 0)  # earlier versions recorded no notices
        if not total:
            continue
        yield f"{what.capitalize()}: {total} ({describe_codes(summary[table])})."
        shown = summary[f"{what}_inputs"][:limit]
        yield from (printable(f"  {one['code']}: {one['path']}: {one['message']}") for one in shown)
        if len(shown) < total and summary["state"] != "reset":  # which empties the table
            yield f"  … and {total - len(shown)} more, in the table ingest.{table}"


def read_status(settings: Settings, database: Database) -> tuple[dict[str, Any], list[PipelineError]]:
    """Return the state of services and batches, and the errors of services that failed; latencies in ms."""
    result: dict[str, Any] = {"environment": settings.environment, "url": settings.url, "bucket": settings.bucket}
    failures = []

    def examine(name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            result[name] = {"ok": True, **work()}
        except PipelineError as exc:
            failures.append(exc)
            result[name] = {"ok": False, "error": exc.message, "hint": exc.hint}

    recorded: dict[str, datetime | None] = {}
    examine("database", lambda: database.run(_examine_database, read_only=True))
    if result["database"]["ok"] and not result["database"]["migrations_pending"]:
        result.update(database.run(partial(_read_tables, bucket=settings.bucket), read_only=True))
        recorded = database.run(partial(list_recorded, bucket=settings.bucket), read_only=True)
    examine("storage", lambda: _examine_storage(settings, recorded))
    return result, failures


def _examine_storage(settings: Settings, recorded: Mapping[str, datetime | None]) -> dict[str, Any]:
    with closing(Storage(settings)) as storage:
        storage.find_bucket()  # opens the connection, so that the second call measures only the response
        started = time.perf_counter()
        bucket = prove_bucket(storage, recorded)
    latency = round((time.perf_counter() - started) * 1000, 2)
    public = bool(bucket and bucket.get("public"))
    return {"latency_ms": latency, "bucket_exists": bucket is not None, "bucket_public": public}


def _examine_database(connection: Connection) -> dict[str, Any]:
    started = time.perf_counter()
    version = connection.one("now").version
    return {
        "latency_ms": round((time.perf_counter() - started) * 1000, 2),
        "version": f"{version // 10000}.{version % 10000}",
        "migrations_pending": [one.label for one in pending(connection)],
    }


def _read_tables(connection: Connection, bucket: str) -> dict[str, Any]:
    rows = connection.one("count_rows")._asdict()
    proofs = find_proofs(connection, bucket).as_dict()
    batches = connection.execute("list_batches", unfinished=False, count=_LISTED_BATCHES)
    unfinished = connection.execute("list_batches", unfinished=True, count=None)
    return {
        "rows": rows,
        "proofs": proofs,
        "batches": list(map(_as_json, batches)),
        "unfinished": list(map(_as_json, unfinished)),
    }


def status_text(result: Mapping[str, Any], production: bool) -> str:
    """Return the state as text."""
    lines = [f"Environment: {result['environment']} ({result['url']})"]
    storage, database = result["storage"], result["database"]
    if storage["ok"]:
        bucket = "exists" if storage["bucket_exists"] else "does not exist yet"
        public = ", PUBLIC" if storage["bucket_public"] else ""
        lines.append(f"Storage: ok, {storage['latency_ms']} ms, bucket {result['bucket']} {bucket}{public}")
    else:
        lines.append(f"Storage: {storage['error']} {storage['hint']}")
    if not database["ok"]:
        return "\n".join([*lines, f"Database: {database['error']} {database['hint']}"])
    lines.append(f"Database: ok, {database['latency_ms']} ms, PostgreSQL {database['version']}")
    if missing := database["migrations_pending"]:
        command = command_line("migrate", production)
        return "\n".join([*lines, f"Migrations: {len(missing)} pending ({', '.join(missing)}): run `{command}`"])
    lines.append("Migrations: up to date")
    lines.append("Rows: " + ", ".join(f"{name} {count}" for name, count in result["rows"].items()))
    if proofs := describe_proofs(result["proofs"], production):
        lines.append(f"Proofs: {proofs}")
    lines.append("Batches, the last changed first:" if result["batches"] else "No batch was loaded yet.")
    width = max((len(batch["batch_id"]) for batch in result["batches"]), default=0)
    for batch in result["batches"]:
        changed = moment(batch["reset_at"] or batch["finished_at"] or batch["created_at"])
        content = counted(batch["detections"], "detection") if batch["kind"] == KIND_QWEN else size(batch["bytes"])
        content = f"{counted(batch['recognitions'], 'recognition')}, {content}"
        lines.append(f"  {batch['batch_id']:<{width}}  {batch['state']:<9}  {changed}  {content}")
    if result["unfinished"]:
        lines.append("Unfinished:")
    command_of = partial(command_line, production=production)
    for batch in result["unfinished"]:
        if batch["state"] == "held":
            command = f"{batch['held_reason']} {held_hint(batch['batch_id'], command_of)}"
        elif batch["state"] == "resetting":
            command = reset_command(batch["batch_id"], production)
        else:
            names = ("batch_id", "kind", "limit", "force", "coordinates", "exif_turned")
            command = LoadRequest(**{name: batch[name] for name in names}).command(production)
        lines.append(f"  {batch['batch_id']} is {batch['state']}: {command}")
    return "\n".join(lines)

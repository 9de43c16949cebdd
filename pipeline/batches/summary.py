"""Summaries of a batch from its markers, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.state import KIND_QWEN
from pipeline.database import Connection
from pipeline.observe.logger import printable
from pipeline.observe.metrics import merge
from pipeline.units import duration, moment, size

#: Rejects that a summary lists; the table has them all.
_LISTED_REJECTS = 100
_PARAMETERS = ("kind", "state", "source", "limit", "force", "strict", "bucket", "version")
_TIMES = ("created_at", "finished_at", "reset_at")
_COUNTS = ("shards", "found", "already_loaded", "held_elsewhere", "held_by", "superseded_copies", "beyond_limit")


def summarise(connection: Connection, batch_id: str) -> dict[str, Any]:
    """Return the numbers of a batch, finished or not; durations in seconds, sizes in bytes.

    Raises:
        UsageError: there is no such batch.
    """
    batch = batch_state.require_batch(connection, batch_id)
    if batch.metrics:  # stored when the batch was done, since a reset deletes its markers
        return {**batch.metrics, **batch.as_dict("state", "reset_at")}
    markers = connection.execute("list_markers", batch_id=batch_id)
    total: dict[str, Any] = {}
    for marker in markers:
        merge(total, marker.metrics)
    done = Counter(marker.step for marker in markers)
    seconds = active_seconds([(marker.started_at, marker.finished_at) for marker in markers])
    counters, operations, gauges = (total.get(name, {}) for name in ("counters", "operations", "gauges"))
    rejects = {row.code: row.rejects for row in connection.execute("count_rejects", batch_id=batch_id)}
    shown = connection.execute("list_rejects", batch_id=batch_id, count=_LISTED_REJECTS)
    counts = {"recognitions_processed": batch.recognitions, "images_processed": batch.photos}
    if batch.kind == KIND_QWEN:
        counts["detections_processed"] = batch.detections
    else:
        counts["bytes_uploaded"] = counters.get("bytes_uploaded", 0)
    rates = {name: round(count / seconds, 2) if seconds > 0 else 0.0 for name, count in counts.items()}
    return {
        **batch.as_dict(*_PARAMETERS, *_TIMES, *_COUNTS),
        "shards_done": {step: done[step] for step in (batch_state.UPLOAD, batch_state.COPY)},
        "rejected": sum(rejects.values()),
        "rejects": rejects,
        "rejected_inputs": [row._asdict() for row in shown],
        **counts,
        "bytes": batch.bytes,
        "total_seconds": round(seconds, 3),
        "throughput": {name: {"count": count, "per_second": rates[name]} for name, count in counts.items()},
        "operations": {
            name: {
                "ops": int(entry["ops"]),
                "average_seconds": round(entry["seconds"] / max(1, entry["ops"]), 6),
                "total_seconds": round(entry["seconds"], 6),
            }
            for name, entry in sorted(operations.items())
        },
        "counters": counters,
        "gauges": {name: {"last": entry["last"], "max": entry["max"]} for name, entry in sorted(gauges.items())},
    }


def active_seconds(intervals: Sequence[tuple[datetime, datetime]]) -> float:
    """Return the seconds in which at least one step ran: the union of the intervals, without pauses between runs."""
    total = 0.0
    end: datetime | None = None
    for begin, finish in sorted(intervals):
        if end is None or finish > end:
            total += (finish - max(begin, end or begin)).total_seconds()
            end = finish
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
        lines.append(
            f"    {name}: {entry['ops']} ops, avg {entry['average_seconds'] * 1000:.2f} ms, "
            f"total {entry['total_seconds']:.2f} s"
        )
    in_flight = summary.get("gauges", {}).get("requests_in_flight")  # earlier versions did not record it
    if in_flight is not None:
        refused = summary["counters"].get("requests_refused", 0)
        lines.append(f"  Requests in flight: {in_flight['last']} (peak {in_flight['max']}), {refused} refused")
    return "\n".join(lines)


def headline(summary: Mapping[str, Any], rejects: int = 10, *, was_done: bool = False) -> str:
    """Return the result of a batch in a few lines.

    Arguments:
        rejects: how many rejects to list; 0 to omit their number as well.
        was_done: the batch was done before this run, which loaded nothing.
    """
    state, qwen = summary["state"], summary["kind"] == KIND_QWEN
    verb = ", it had" if state == "reset" else ":"
    if was_done and state == "done":
        verb = f" already, since {moment(summary['finished_at'])}: nothing was loaded. It has"
    content = f"{summary['detections_processed']} detections" if qwen else size(summary["bytes"])
    lines = [
        f"Batch {summary['batch_id']} is {state}{verb} "
        f"{summary['recognitions_processed']} recognitions, {summary['images_processed']} photos, {content}."
    ]
    skipped = []
    if summary["already_loaded"]:
        skipped.append(f"{summary['already_loaded']} already {'annotated' if qwen else 'loaded'}")
    if summary["held_elsewhere"]:
        skipped.append(f"{summary['held_elsewhere']} held by unfinished {', '.join(summary['held_by'])}")
    if summary["beyond_limit"]:
        skipped.append(f"{summary['beyond_limit']} beyond the limit")
    if skipped:
        lines.append(f"Skipped: {'; '.join(skipped)}.")
    if summary["superseded_copies"]:
        twice = "Several keys name the same photo" if qwen else "Several exports hold the same recognition"
        lines.append(
            f"{twice}: the one that sorts last was taken, {summary['superseded_copies']} earlier copies were left."
        )
    if summary["rejected"] and rejects:
        codes = ", ".join(f"{code} {count}" for code, count in summary["rejects"].items())
        lines.append(f"Rejected: {summary['rejected']} ({codes}).")
        shown = summary["rejected_inputs"][:rejects]
        lines += [printable(f"  {one['path']}: {one['message']}") for one in shown]
        if len(shown) < summary["rejected"] and state != "reset":  # which empties the table
            lines.append(f"  … and {summary['rejected'] - len(shown)} more, in the table ingest.rejects")
    return "\n".join(lines)

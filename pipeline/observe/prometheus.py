"""Write the metrics of a command as a file for the textfile collector of Prometheus, with names by its conventions.

The labels of a series are the same every night: only `pipeline_batch_info` has the id of a batch as a label.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from pipeline.observe.logger import say


class Family(NamedTuple):
    """A metric: its name and description, and its value; or the name of a label, and values by it."""

    name: str
    about: str
    values: Any
    label: str = ""


def write_metrics(path: Path, command: str, families: Iterable[Family]) -> None:
    """Write metrics, atomically because the collector may read at any time; a failure is a warning.

    Every series has the label `command`.
    """
    registry = CollectorRegistry()
    for name, about, values, label in families:
        gauge = Gauge(f"pipeline_{name}", about, ("command", *([label] if label else [])), registry=registry)
        for key, value in values.items() if label else [("", values)]:
            gauge.labels(command, *([key] if label else [])).set(value)
    try:
        write_to_textfile(str(path), registry)
    except OSError as exc:
        why = f"{exc.strerror}. The command itself is not affected."
        say(f"The metrics cannot be written to {path}: {why}", logging.WARNING)


def run_metrics(exit_code: int, seconds: float) -> Iterator[Family]:
    """Yield what there is to say of every run."""
    yield Family("last_run_timestamp_seconds", "When the command last ended, and wrote this file.", time.time())
    yield Family("last_run_exit_code", "Exit code of that run.", exit_code)
    yield Family("last_run_duration_seconds", "How long that run took.", seconds)


def look_metrics(looks: Iterable[Any]) -> Iterator[Family]:
    """Yield when sources were looked at and how new their data is, by the rows of list_looks."""
    rows = list(looks)
    looked = {row.kind: row.looked_at.timestamp() for row in rows}
    yield Family("last_look_timestamp_seconds", "When a source of this kind was last looked at.", looked, "kind")
    days = {row.kind: datetime.combine(row.newest, datetime.min.time(), timezone.utc) for row in rows if row.newest}
    newest = {kind: day.timestamp() for kind, day in days.items()}
    yield Family("newest_data_timestamp_seconds", "Begin of the last day that sources have data of.", newest, "kind")


def verify_metrics(totals: Mapping[str, int], repaired: int, remaining: int, *, deep: bool) -> Iterator[Family]:
    """Yield the result of a verification."""
    yield Family("verify_findings", "Objects and rows by what was found.", totals, "finding")
    yield Family("verify_repaired", "Differences that were repaired.", repaired)
    yield Family("verify_differences", "Differences that remain.", remaining)
    yield Family("verify_deep", "1 if every object was read.", deep)


def batch_metrics(summary: Mapping[str, Any]) -> Iterator[Family]:
    """Yield the numbers of the batch that the command worked at."""
    operations, gauges = summary["operations"], summary.get("gauges", {})  # earlier versions had no gauges
    states = {state: state == summary["state"] for state in ("loading", "held", "done", "resetting", "reset")}
    yield Family("batch_info", "1; the last batch is the value of its label.", {summary["batch_id"]: 1}, "batch_id")
    yield Family("batch_state", "1 for the state of the batch, 0 for the others.", states, "state")
    yield Family("batch_active_seconds", "How long at least one step was running.", summary["total_seconds"])
    yield Family("batch_recognitions", "Recognitions of the batch.", summary["recognitions_processed"])
    yield Family("batch_images", "Photos of the batch.", summary["images_processed"])
    yield Family("batch_size_bytes", "Size of the photos of the batch.", summary["bytes"])
    if "detections_processed" in summary:
        yield Family("batch_detections", "Detections of the batch.", summary["detections_processed"])
    yield Family("batch_shards", "Shards of the batch.", summary["shards"])
    yield Family("batch_shards_done", "Shards with the marker of a step.", summary["shards_done"], "step")
    yield Family("batch_already_loaded", "Recognitions that earlier batches loaded.", summary["already_loaded"])
    yield Family("batch_rejects", "Rejected inputs, by reason.", summary["rejects"], "code")
    yield Family("batch_counts", "Counters of the steps, such as bytes_uploaded.", summary["counters"], "counter")
    in_flight = {name: entry["last"] for name, entry in gauges.items()}
    yield Family("batch_latest", "Latest gauges of the steps, such as requests_in_flight.", in_flight, "gauge")
    ops = {name: entry["ops"] for name, entry in operations.items()}
    yield Family("batch_operations", "Number of operations.", ops, "operation")
    seconds = {name: entry["total_seconds"] for name, entry in operations.items()}
    about = "Total duration; concurrent operations each count in full."
    yield Family("batch_operation_seconds", about, seconds, "operation")

"""Write the metrics of a batch as a file for the textfile collector of Prometheus, with names by its conventions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from pipeline.errors import SettingsError


def require_writable(path: Path) -> None:
    """Raise SettingsError if no file can be created at the path; called before the load starts."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"The metrics cannot be written to {path}.", "Name a file in an existing, writable folder.")


def write_metrics(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the metrics, atomically because the collector may read at any time; raise SettingsError if that fails."""
    registry = CollectorRegistry()
    batch = {"batch_id": summary["batch_id"], "kind": summary["kind"]}
    for name, about, label, values in _families(summary):
        gauge = Gauge(f"pipeline_{name}", about, (*batch, *([label] if label else [])), registry=registry)
        for key, value in values.items() if label else [("", values)]:
            gauge.labels(**batch, **({label: key} if label else {})).set(value)
    try:
        write_to_textfile(str(path), registry)
    except OSError as exc:
        message = f"The metrics cannot be written to {path}: {exc.strerror}."
        raise SettingsError(message, "The load itself is not affected.") from exc


def _families(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield name, description, and value of each family; or a label besides those of the batch, and values by it."""
    operations, gauges = summary["operations"], summary.get("gauges", {})  # earlier versions had no gauges
    states = {state: state == summary["state"] for state in ("loading", "held", "done", "resetting", "reset")}
    yield "last_run_timestamp_seconds", "When this file was written.", "", time.time()
    yield "batch_state", "1 for the state of the batch, 0 for the others.", "state", states
    yield "batch_active_seconds", "How long at least one step was running.", "", summary["total_seconds"]
    yield "batch_recognitions", "Recognitions of the batch.", "", summary["recognitions_processed"]
    yield "batch_images", "Photos of the batch.", "", summary["images_processed"]
    yield "batch_size_bytes", "Size of the photos of the batch.", "", summary["bytes"]
    if "detections_processed" in summary:
        yield "batch_detections", "Detections of the batch.", "", summary["detections_processed"]
    yield "batch_shards", "Shards of the batch.", "", summary["shards"]
    yield "batch_shards_done", "Shards with the marker of a step.", "step", summary["shards_done"]
    yield "batch_already_loaded", "Recognitions that earlier batches loaded.", "", summary["already_loaded"]
    yield "batch_rejects", "Rejected inputs, by reason.", "code", summary["rejects"]
    yield "batch_counter", "Counters of the steps, such as bytes_uploaded.", "counter", summary["counters"]
    in_flight = {name: entry["last"] for name, entry in gauges.items()}
    yield "batch_gauge", "Latest gauges of the steps, such as requests_in_flight.", "gauge", in_flight
    ops = {name: entry["ops"] for name, entry in operations.items()}
    yield "batch_operations", "Number of operations.", "operation", ops
    seconds = {name: entry["total_seconds"] for name, entry in operations.items()}
    yield "batch_operation_seconds", "Total duration; concurrent operations each count in full.", "operation", seconds

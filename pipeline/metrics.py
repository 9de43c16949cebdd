"""Counts, durations of operations and gauges, gathered by threads, kept as JSON with each marker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Operations = dict[str, dict[str, float]]
Gauges = dict[str, dict[str, float]]


class Metrics:
    """Durations by operation, plain counters, and gauges; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: Operations = {}
        self._counters: dict[str, int] = {}
        self._gauges: Gauges = {}

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the duration of the block, when it succeeds, to the operation."""
        started = time.perf_counter()
        yield
        self.add(operation, time.perf_counter() - started)

    def add(self, operation: str, seconds: float, ops: int = 1) -> None:
        """Add `ops` operations that took `seconds` together."""
        with self._lock:
            entry = self._operations.setdefault(operation, {"ops": 0, "seconds": 0.0})
            entry["ops"] += ops
            entry["seconds"] += seconds

    def count(self, counter: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[counter] = self._counters.get(counter, 0) + by

    def gauge(self, gauge: str, value: int, most: int | None = None) -> None:
        """Set a gauge; `most` is its highest value so far, where that was higher."""
        most = value if most is None else max(value, most)
        with self._lock:
            _merge_gauge(self._gauges, gauge, {"last": value, "max": most, "at": round(time.time(), 3)})

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers.

        They are `{"operations": {name: {"ops", "seconds"}}, "counters": {name: n}, "gauges": {name: {"last", "max",
        "at"}}}`, `at` being when the last value was set, in seconds since 1970.
        """
        with self._lock:
            return {
                "operations": {
                    name: {"ops": int(entry["ops"]), "seconds": round(entry["seconds"], 6)}
                    for name, entry in sorted(self._operations.items())
                },
                "counters": dict(sorted(self._counters.items())),
                "gauges": {name: dict(entry) for name, entry in sorted(self._gauges.items())},
            }


def merge(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the metrics of a marker to a total of the same shape: sums, and of a gauge the highest and the latest value.

    A gauge belongs to one process; those of several processes are not added up.
    """
    for name, entry in part.get("operations", {}).items():
        into = total.setdefault("operations", {}).setdefault(name, {"ops": 0, "seconds": 0.0})
        into["ops"] += entry["ops"]
        into["seconds"] += entry["seconds"]
    for name, value in part.get("counters", {}).items():
        counters = total.setdefault("counters", {})
        counters[name] = counters.get(name, 0) + value
    for name, entry in part.get("gauges", {}).items():
        _merge_gauge(total.setdefault("gauges", {}), name, entry)


def _merge_gauge(gauges: Gauges, name: str, entry: Mapping[str, float]) -> None:
    former = gauges.get(name, entry)
    latest = entry if entry["at"] >= former["at"] else former
    gauges[name] = {"last": latest["last"], "max": max(former["max"], entry["max"]), "at": latest["at"]}

"""Counts and durations of operations, gathered by threads, kept as JSON with each marker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Operations = dict[str, dict[str, float]]


class Metrics:
    """Durations by operation and plain counters; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: Operations = {}
        self._counters: dict[str, int] = {}

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

    def as_dict(self) -> dict[str, Any]:
        """Return `{"operations": {name: {"ops", "seconds"}}, "counters": {name: n}}`."""
        with self._lock:
            return {
                "operations": {
                    name: {"ops": int(entry["ops"]), "seconds": round(entry["seconds"], 6)}
                    for name, entry in sorted(self._operations.items())
                },
                "counters": dict(sorted(self._counters.items())),
            }


def merge(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the metrics of a marker to a total of the same shape."""
    for name, entry in part.get("operations", {}).items():
        into = total.setdefault("operations", {}).setdefault(name, {"ops": 0, "seconds": 0.0})
        into["ops"] += entry["ops"]
        into["seconds"] += entry["seconds"]
    for name, value in part.get("counters", {}).items():
        counters = total.setdefault("counters", {})
        counters[name] = counters.get(name, 0) + value

"""Counters, gauges and durations of operations, collected by threads and stored as JSON with each marker.

Durations have a histogram with four buckets per doubling: bucket b counts durations over 2 ** ((b - 1) / 4) seconds, up
to 2 ** (b / 4). The outermost buckets also count everything beyond them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

BUCKETS_PER_DOUBLING = 4  # each bound is 19 % above the one before
#: 60 microseconds and 17 minutes.
SHORTEST, LONGEST = -14 * BUCKETS_PER_DOUBLING, 10 * BUCKETS_PER_DOUBLING


class Metrics:
    """Durations by operation, counters and gauges; thread-safe.

    Their shape is `{"operations": {name: {"ops", "seconds", "histogram": {bucket: n}}}, "counters": {name: n},
    "gauges": {name: {"last", "max", "at"}}}`; a bucket is a decimal string, `at` in seconds since 1970.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total: dict[str, Any] = {"operations": {}, "counters": {}, "gauges": {}}

    def copy(self) -> Metrics:
        """Return metrics with the same numbers, for an attempt that may be repeated."""
        copied = Metrics()
        copied._merge(self.as_dict())
        return copied

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the duration of the block to the operation, unless it raises."""
        started = time.perf_counter()
        yield
        self.add(operation, time.perf_counter() - started)

    def add(self, operation: str, seconds: float) -> None:
        """Add an operation."""
        histogram = {str(bucket_of(seconds)): 1}
        self._merge({"operations": {operation: {"ops": 1, "seconds": seconds, "histogram": histogram}}})

    def count(self, counter: str, by: int = 1) -> None:
        """Add to a counter."""
        self._merge({"counters": {counter: by}})

    def gauge(self, gauge: str, value: int, most: int = 0) -> None:
        """Set a gauge; `most` is its maximum so far."""
        self._merge({"gauges": {gauge: {"last": value, "max": max(value, most), "at": round(time.time(), 3)}}})

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of the numbers."""
        with self._lock:
            return deepcopy(self._total)

    def _merge(self, part: Mapping[str, Any]) -> None:
        with self._lock:
            merge(self._total, part)


def merge(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the metrics of a marker (of an earlier version without histogram) to a total of the same shape.

    Of a gauge, which describes a single process, the total has the latest value and the maximum.
    """
    for name, entry in part.get("operations", {}).items():
        into = total.setdefault("operations", {}).setdefault(name, {"ops": 0, "seconds": 0.0, "histogram": {}})
        into["ops"] += entry["ops"]
        into["seconds"] = round(into["seconds"] + entry["seconds"], 6)
        for bucket, n in entry.get("histogram", {}).items():
            into["histogram"][bucket] = into["histogram"].get(bucket, 0) + n
    for name, value in part.get("counters", {}).items():
        counters = total.setdefault("counters", {})
        counters[name] = counters.get(name, 0) + value
    for name, entry in part.get("gauges", {}).items():
        former = total.setdefault("gauges", {}).get(name, entry)
        latest = entry if entry["at"] >= former["at"] else former
        total["gauges"][name] = {**latest, "max": max(former["max"], entry["max"])}


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration."""
    if seconds <= 0:
        return SHORTEST
    return min(max(math.ceil(math.log2(seconds) * BUCKETS_PER_DOUBLING), SHORTEST), LONGEST)

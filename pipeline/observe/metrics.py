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
from typing import Any

Gauges = dict[str, dict[str, float]]
#: Bucket number, as a decimal string because it is a key in JSON -> count; without empty buckets.
Histogram = dict[str, int]

#: Each bound is 19 % above the one before.
_BUCKETS_PER_DOUBLING = 4
#: 60 microseconds and 17 minutes.
SHORTEST, LONGEST = -14 * _BUCKETS_PER_DOUBLING, 10 * _BUCKETS_PER_DOUBLING


class _Operation:
    __slots__ = ("buckets", "ops", "seconds")

    def __init__(self) -> None:
        self.ops = 0
        self.seconds = 0.0
        self.buckets: dict[int, int] = {}


class Metrics:
    """Durations by operation, counters and gauges; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: dict[str, _Operation] = {}
        self._counters: dict[str, int] = {}
        self._gauges: Gauges = {}

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the duration of the block to the operation, unless it raises."""
        started = time.perf_counter()
        yield
        self.add(operation, time.perf_counter() - started)

    def add(self, operation: str, seconds: float, ops: int = 1) -> None:
        """Add `ops` operations that took `seconds` in total; the histogram counts only single operations."""
        bucket = bucket_of(seconds)
        with self._lock:
            entry = self._operations.get(operation)
            if entry is None:
                entry = self._operations[operation] = _Operation()
            entry.ops += ops
            entry.seconds += seconds
            if ops == 1:
                entry.buckets[bucket] = entry.buckets.get(bucket, 0) + 1

    def count(self, counter: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[counter] = self._counters.get(counter, 0) + by

    def gauge(self, gauge: str, value: int, most: int | None = None) -> None:
        """Set a gauge; `most` is its maximum so far, by default the value itself."""
        most = value if most is None else max(value, most)
        with self._lock:
            _merge_gauge(self._gauges, gauge, {"last": value, "max": most, "at": round(time.time(), 3)})

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of the numbers.

        Its shape is `{"operations": {name: {"ops", "seconds", "histogram": {bucket: n}}}, "counters": {name: n},
        "gauges": {name: {"last", "max", "at"}}}`; `at` is the time of the last value in seconds since 1970.
        """
        with self._lock:
            return {
                "operations": {
                    name: {
                        "ops": entry.ops,
                        "seconds": round(entry.seconds, 6),
                        "histogram": {str(bucket): n for bucket, n in sorted(entry.buckets.items())},
                    }
                    for name, entry in sorted(self._operations.items())
                },
                "counters": dict(sorted(self._counters.items())),
                "gauges": {name: dict(entry) for name, entry in sorted(self._gauges.items())},
            }


def merge(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the metrics of a marker to a total of the same shape.

    Counters and operations are summed. Of a gauge, which describes a single process, the total has the latest value
    and the maximum. Markers of earlier versions have no histogram.
    """
    for name, entry in part.get("operations", {}).items():
        into = total.setdefault("operations", {}).setdefault(name, {"ops": 0, "seconds": 0.0})
        into["ops"] += entry["ops"]
        into["seconds"] += entry["seconds"]
        buckets = into.setdefault("histogram", {})
        for bucket, n in entry.get("histogram", {}).items():
            buckets[bucket] = buckets.get(bucket, 0) + n
    for name, value in part.get("counters", {}).items():
        counters = total.setdefault("counters", {})
        counters[name] = counters.get(name, 0) + value
    for name, entry in part.get("gauges", {}).items():
        _merge_gauge(total.setdefault("gauges", {}), name, entry)


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration."""
    if seconds <= 0:
        return SHORTEST
    return min(max(math.ceil(math.log2(seconds) * _BUCKETS_PER_DOUBLING), SHORTEST), LONGEST)


def bound_of(bucket: float) -> float:
    """Return the upper bound of a bucket in seconds."""
    return float(2 ** (bucket / _BUCKETS_PER_DOUBLING))


def quantile(histogram: Mapping[str, int], share: float) -> float:
    """Return the duration that a share of the durations in a non-empty histogram does not exceed.

    Within a bucket, durations are assumed to be evenly distributed on the logarithmic scale.
    """
    wanted = share * sum(histogram.values())
    seen = 0
    buckets = sorted((int(bucket), n) for bucket, n in histogram.items() if n)
    for bucket, n in buckets:
        if seen + n >= wanted:
            return bound_of(bucket - 1 + (wanted - seen) / n)
        seen += n
    return bound_of(buckets[-1][0])


def _merge_gauge(gauges: Gauges, name: str, entry: Mapping[str, float]) -> None:
    former = gauges.get(name, entry)
    latest = entry if entry["at"] >= former["at"] else former
    gauges[name] = {"last": latest["last"], "max": max(former["max"], entry["max"]), "at": latest["at"]}

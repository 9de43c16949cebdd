"""Counts, durations of operations and gauges, gathered by threads, kept as JSON with each marker.

Of durations the distribution is kept as well, as a histogram with four buckets to each doubling: bucket b counts those
of more than 2 ** ((b - 1) / 4) seconds and at most 2 ** (b / 4). What is shorter or longer than the outermost buckets
is in them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Gauges = dict[str, dict[str, float]]
#: The buckets that count something, by their number in decimal, as JSON has it.
Histogram = dict[str, int]

#: Buckets to each doubling of a duration: 19 % from one bound to the next.
_FINENESS = 4
#: 60 microseconds and 17 minutes.
SHORTEST, LONGEST = -14 * _FINENESS, 10 * _FINENESS


class _Operation:
    __slots__ = ("buckets", "ops", "seconds")

    def __init__(self) -> None:
        self.ops = 0
        self.seconds = 0.0
        self.buckets: dict[int, int] = {}


class Metrics:
    """Durations by operation, plain counters, and gauges; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: dict[str, _Operation] = {}
        self._counters: dict[str, int] = {}
        self._gauges: Gauges = {}

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the duration of the block, when it succeeds, to the operation."""
        started = time.perf_counter()
        yield
        self.add(operation, time.perf_counter() - started)

    def add(self, operation: str, seconds: float, ops: int = 1) -> None:
        """Add `ops` operations that took `seconds` together; of several at once none is in the histogram."""
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
        """Set a gauge; `most` is its highest value so far, where that was higher."""
        most = value if most is None else max(value, most)
        with self._lock:
            _merge_gauge(self._gauges, gauge, {"last": value, "max": most, "at": round(time.time(), 3)})

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers.

        They are `{"operations": {name: {"ops", "seconds", "histogram": {bucket: n}}}, "counters": {name: n}, "gauges":
        {name: {"last", "max", "at"}}}`, `at` being when the last value was set, in seconds since 1970.
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
    """Add the metrics of a marker to a total of the same shape: sums, and of a gauge the highest and the latest value.

    A gauge belongs to one process; those of several processes are not added up. Markers of former versions have no
    histogram.
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
    """Return the bucket that a duration belongs to."""
    if seconds <= 0:
        return SHORTEST
    return min(max(math.ceil(math.log2(seconds) * _FINENESS), SHORTEST), LONGEST)


def bound_of(bucket: float) -> float:
    """Return the upper bound of a bucket in seconds; the lower one is that of the bucket before."""
    return float(2 ** (bucket / _FINENESS))


def quantile(histogram: Mapping[str, int], share: float) -> float:
    """Return the duration that a share of those in a histogram, which is not empty, do not exceed.

    Within a bucket they are taken as spread evenly, on the scale of the buckets.
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

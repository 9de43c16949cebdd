"""Arrange the markers of a batch on a time axis without long pauses. Pure: no I/O."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

#: A pause is cut out if it is longer than this in seconds and than this share of the busy time.
_SHORTEST_PAUSE, _PAUSE_SHARE = 5.0, 0.25
#: Width of a cut-out pause, as a share of the busy time.
_PAUSE_WIDTH = 0.02


@dataclass(frozen=True)
class Span:
    """A finished step of a batch or of one of its shards; `begin` and `end` are Unix times."""

    step: str
    shard: int
    worker: str
    begin: float
    end: float
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Return the duration of the step."""
        return self.end - self.begin

    def counter(self, name: str) -> int:
        """Return the value of a counter, 0 if absent."""
        return int(self.metrics.get("counters", {}).get(name, 0))

    @property
    def retries(self) -> int:
        """Return the number of retried requests."""
        counters = self.metrics.get("counters", {})
        return int(sum(count for name, count in counters.items() if name.startswith("retries_")))


@dataclass(frozen=True)
class Pause:
    """A cut-out pause: its position on the clock and its real duration, in seconds."""

    at: float
    seconds: float


class Clock:
    """Seconds since the first step began, without long pauses."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._stretches: list[tuple[float, float, float]] = []  # begin, end, clock value at begin
        self.pauses: list[Pause] = []
        busy = union((span.begin, span.end) for span in spans)
        at_work = sum(end - begin for begin, end in busy)
        now = 0.0
        for begin, end in busy:
            if self._stretches:
                gap = begin - self._stretches[-1][1]
                if gap > max(_SHORTEST_PAUSE, _PAUSE_SHARE * at_work):
                    width = _PAUSE_WIDTH * at_work
                    self.pauses.append(Pause(now + width / 2, gap))
                    now += width
                else:
                    now += gap
            self._stretches.append((begin, end, now))
            now += end - begin
        self.total = now
        self._begins = [begin for begin, *_ in self._stretches]

    def __call__(self, moment: float) -> float:
        """Return the clock value at a Unix time at which a step was running."""
        begin, end, at = self._stretches[max(0, bisect_right(self._begins, moment) - 1)]
        return at + max(0.0, min(moment, end) - begin)


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge overlapping intervals; return them in ascending order."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


@dataclass(frozen=True)
class Row:
    """The steps of one worker, in as many lanes as ran concurrently; `run` is the number of its run, from 1."""

    worker: str
    lanes: Sequence[Sequence[Span]]
    run: int

    @cached_property
    def spans(self) -> list[Span]:
        """Return its steps by start time."""
        return sorted((span for lane in self.lanes for span in lane), key=lambda span: span.begin)

    @property
    def busy(self) -> float:
        """Return the seconds in which at least one step was running."""
        return sum(end - begin for begin, end in union((span.begin, span.end) for span in self.spans))

    @property
    def retries(self) -> int:
        """Return the number of requests it retried."""
        return sum(span.retries for span in self.spans)


def runs(spans: Iterable[Span]) -> dict[str, int]:
    """Return the number of the run, from 1, that each worker was part of.

    A worker is `host:pid` of a run, or `host:pid/pid` of a process that it forked. Runs of a batch never overlap, since
    each holds its lock: processes that worked at the same time, on other hosts as well, were of one run.
    """
    times: dict[str, list[float]] = {}
    for span in spans:
        times.setdefault(span.worker.partition("/")[0], []).extend((span.begin, span.end))
    stretches = union((min(moments), max(moments)) for moments in times.values())
    begins = [begin for begin, _ in stretches]
    return {span.worker: bisect_right(begins, min(times[span.worker.partition("/")[0]])) for span in spans}


def rows(spans: Sequence[Span]) -> list[Row]:
    """Return a row per worker, by its first step."""
    by_worker: dict[str, list[list[Span]]] = {}
    numbers = runs(spans)
    for span in sorted(spans, key=lambda one: (one.begin, one.end)):
        lanes = by_worker.setdefault(span.worker, [])
        free = next((lane for lane in lanes if lane[-1].end <= span.begin), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    found = [Row(worker, lanes, numbers[worker]) for worker, lanes in by_worker.items()]
    return sorted(found, key=lambda row: row.run)


def rates(clock: Clock, amounts: Iterable[tuple[Span, float]], bins: int) -> tuple[list[float], list[float]]:
    """Return the bounds of equal bins of the clock, and the amount per second in each bin.

    The amount of a span is distributed evenly over its duration.
    """
    width = clock.total / bins
    if width <= 0:
        return [], []
    sums = [0.0] * bins
    for span, amount in amounts:
        begin, end = clock(span.begin), clock(span.end)
        first, last = (min(int(at / width), bins - 1) for at in (begin, end))
        if end <= begin:
            sums[first] += amount
            continue
        for number in range(first, last + 1):
            inside = min(end, (number + 1) * width) - max(begin, number * width)
            sums[number] += amount * inside / (end - begin)
    return [number * width for number in range(bins + 1)], [one / width for one in sums]

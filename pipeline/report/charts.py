"""Compute charts from the timeline and the metrics of a batch, as shapes in SVG user units. Pure: no I/O.

chart.html draws them. Each step is a CSS class, and page.css sets its colour for the light and the dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from typing import ClassVar

from pipeline.batches.state import COPY, DISCOVER, LOAD, TRANSFORM, UPLOAD
from pipeline.errors import printable
from pipeline.report.quantiles import bound_of, quantile
from pipeline.report.texts import WIDTH, Text, fit, width_of
from pipeline.report.timeline import Clock, Row, Span, rates
from pipeline.units import counted, duration, size

STEPS = (DISCOVER, UPLOAD, COPY, TRANSFORM, LOAD)
#: Workers shown in the timeline and in the table.
MAXIMUM_ROWS = 48
#: Fewest durations for a distribution or a quantile.
FEWEST = 5

#: Margins around the plot in user units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 54
_LANE = 20
_BINS = 120
_TICKS = [step * 10**decade for decade in range(-4, 4) for step in (1, 2, 5)]
#: Minimum width of a bar, as a share of the plot, so that short steps stay visible.
_THINNEST = 1 / 600
_QUANTILES = (("50 %", 0.5), ("95 %", 0.95), ("99 %", 0.99))


@dataclass(frozen=True)
class Bar:
    """A rectangle; `kind` is its CSS class and `text` its tooltip."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Line:
    """A polyline; `points` has the SVG syntax `x,y x,y …`, `name` is its tooltip, `area` fills the plot below it."""

    kind: str
    name: str
    points: str
    area: bool = False


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its position along the axis and its text; `grid` draws a line across the plot."""

    at: float
    text: str
    grid: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart and a caption that describes it.

    Attributes:
        name: id of the SVG element.
        height, left: height of the SVG and left edge of the plot.
        width, right, top, bottom: width of the SVG and the other edges of the plot.
        x_ticks, y_ticks: ticks at the bottom and at the left.
        marks: x of vertical dotted lines.
        legend: CSS class and name of each colour.
    """

    name: str
    title: str
    words: str
    height: float
    left: float
    x_title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    bars: Sequence[Bar] = ()
    lines: Sequence[Line] = ()
    marks: Sequence[float] = ()
    labels: Sequence[Text] = ()
    legend: Sequence[tuple[str, str]] = ()
    width: ClassVar[float] = WIDTH
    right: ClassVar[float] = WIDTH - _RIGHT
    top: ClassVar[float] = _TOP

    @property
    def bottom(self) -> float:
        """Return the bottom edge of the plot."""
        return self.height - _BOTTOM

    @property
    def x_texts(self) -> list[Text]:
        """Return the texts of the ticks at the bottom, those that there is room for."""
        return fit(Text(tick.at, self.bottom + 24, tick.text) for tick in self.x_ticks)


def _left_of(ticks: Sequence[Tick]) -> int:
    """Return the left edge of a plot that has room for the texts of its ticks."""
    return max(_LEFT, round(16 + max((width_of(tick.text) for tick in ticks), default=0)))


class _Scale:
    """A linear scale from values to user units."""

    def __init__(self, least: float, most: float, first: float, last: float) -> None:
        self.least, self.most = least, most
        self._first, self._pixels = first, (last - first) / ((most - least) or 1)

    def __call__(self, value: float) -> float:
        return round(self._first + (value - self.least) * self._pixels, 2)

    def ticks(self, count: int) -> list[float]:
        """Return round values within the scale, about `count` at most."""
        step = next((one for one in _steps() if (self.most - self.least) / one <= count), 1)
        first = math.ceil(self.least / step)
        return [number * step for number in range(first, math.floor(self.most / step) + 1)]


def _steps() -> Iterable[float]:
    for decade in range(-3, 300):
        for step in (1, 2, 5):
            yield step * 10.0**decade


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def timeline(rows: Sequence[Row], clock: Clock) -> Chart:
    """Return a Gantt chart: a row per worker, with a lane for each step that ran concurrently."""
    shown = rows[:MAXIMUM_ROWS]
    lanes = [lane for row in shown for lane in row.lanes]
    unit = _Unit(clock.total)
    names = short_names(rows)
    middles, at = [], 0
    for row in shown:
        middles.append(Tick(_TOP + _LANE * (at + len(row.lanes) / 2), names[row.worker], grid=False))
        at += len(row.lanes)
    left = _left_of(middles)
    x = _Scale(0, clock.total, left, WIDTH - _RIGHT)
    thinnest = (WIDTH - _RIGHT - left) * _THINNEST
    bars = []
    for number, lane in enumerate(lanes):
        y = _TOP + _LANE * (number + 0.1)
        for span in lane:
            begin, end = x(clock(span.begin)), x(clock(span.end))
            width = round(max(thinnest, end - begin), 2)
            begin = round(min(begin, WIDTH - _RIGHT - width), 2)
            bars.append(Bar(span.step, begin, round(y, 1), width, 0.8 * _LANE, _text_of(span)))
    height = _TOP + _LANE * len(lanes) + _BOTTOM
    done = {bar.kind for bar in bars}
    return Chart(
        "timeline",
        "Shards by worker",
        _timeline_words(rows, clock),
        height,
        left,
        unit.title,
        _time_ticks(x, unit),
        middles,
        bars=bars,
        marks=[x(pause.at) for pause in clock.pauses],
        labels=fit(Text(x(pause.at), _TOP - 6, f"{duration(pause.seconds)} later") for pause in clock.pauses),
        legend=[(step, step) for step in STEPS if step in done],
    )


def _time_ticks(x: _Scale, unit: _Unit) -> list[Tick]:
    axis = _Scale(0, x.most / unit.seconds, 0, 1)
    return [Tick(x(tick * unit.seconds), _number(tick)) for tick in axis.ticks(8)]


def _text_of(span: Span) -> str:
    begin, end = (datetime.fromtimestamp(at, timezone.utc).strftime("%H:%M:%S") for at in (span.begin, span.end))
    parts = [f"{span.step}, shard {span.shard}" if span.shard else span.step, span.worker]
    parts.append(f"{begin} to {end} UTC, {duration(span.seconds)}")
    if span.counter("bytes_uploaded"):
        parts.append(f"{counted(span.counter('objects_uploaded'), 'photo')}, {size(span.counter('bytes_uploaded'))}")
    if span.retries:
        parts.append(counted(span.retries, "retry", "retries"))
    return "; ".join(parts)


def _timeline_words(rows: Sequence[Row], clock: Clock) -> str:
    runs = max((row.run for row in rows), default=0)
    workers = f"{counted(runs, 'run')}, {counted(len(rows), 'worker')}, over {duration(clock.total)}"
    words = [f"{workers}; hover over a bar for its times in UTC."]
    if clock.pauses:
        pauses = duration(sum(pause.seconds for pause in clock.pauses))
        words.append(f"{pauses} without a running step are cut out at the dotted lines.")
    if len(rows) > MAXIMUM_ROWS:
        words.append(f"The first {MAXIMUM_ROWS} are shown.")
    words.append("Gaps are time without a marker: a wait, or an attempt that failed.")
    return " ".join(words)


def short_names(rows: Sequence[Row]) -> dict[str, str]:
    """Return short names of workers, with the number of the run if there are several.

    The host is left out if all share it, else truncated. Of a process that a run forked, its own pid is left.
    """
    hosts = _short_hosts({row.worker.rpartition(":")[0] for row in rows})
    several = len({row.run for row in rows}) > 1
    names = {}
    for row in rows:
        host, _, pid = row.worker.rpartition(":")
        pid = pid.rpartition("/")[2]
        name = f"pid {pid}" if len(hosts) == 1 else f"{hosts[host]}:{pid}"
        names[row.worker] = f"run {row.run}, {name}" if several else name
    return names


def _short_hosts(hosts: Iterable[str]) -> dict[str, str]:
    """Return hosts truncated at their end, at their beginning or between, whichever leaves the names different."""
    printed = {host: printable(host) for host in hosts}
    for first, last in ((11, 0), (0, 11), (5, 6)):
        short = {
            host: name if len(name) <= 12 else f"{name[:first]}…{name[len(name) - last :]}"
            for host, name in printed.items()
        }
        if len(set(short.values())) == len(short):
            break
    return short


def throughput(clock: Clock, spans: Sequence[Span], recognitions: Mapping[int, int]) -> list[Chart]:
    """Return charts over time: the rate of upload, or of COPY without uploads, and the recognitions done."""
    charts = []
    sent = [(span, span.counter("bytes_uploaded") / 1e6) for span in spans if span.step == UPLOAD]
    copied = [(span, float(recognitions.get(span.shard, 0))) for span in spans if span.step == COPY]
    step, unit, title, amounts = COPY, "recognitions/s", "Recognitions copied per second", copied
    if sent:
        step, unit, title, amounts = UPLOAD, "MB/s", "Megabytes uploaded per second", sent
    bounds, rate = rates(clock, amounts, _BINS)
    if any(rate):
        stairs = [point for at, one in enumerate(rate) for point in ((bounds[at], one), (bounds[at + 1], one))]
        words = f"At most {max(rate):.1f} {unit}. The work of a shard is assumed to be even over its duration."
        charts.append(_over_time("rate", title, words, clock, [(step, unit, stairs)], area=True))
    lines = []
    for step in (UPLOAD, COPY):
        bounds, rate = rates(clock, [(one, recognitions.get(one.shard, 0)) for one in spans if one.step == step], _BINS)
        if any(rate):
            width = bounds[1] - bounds[0]
            done = [0.0, *accumulate(one * width for one in rate)]
            lines.append((step, step, list(zip(bounds, done, strict=True))))
    if lines:
        words = "A flat line: no shard was in that step. A growing distance: COPY is slower than upload."
        charts.append(_over_time("done", "Recognitions done", words, clock, lines))
    return charts


def _over_time(
    name: str,
    title: str,
    words: str,
    clock: Clock,
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    area: bool = False,
) -> Chart:
    """Return a chart of lines, each given as CSS class, name and points (seconds, value)."""
    unit, height = _Unit(clock.total), 220
    y = _Scale(0, max(value for *_, points in lines for _, value in points), height - _BOTTOM, _TOP)
    y_ticks = [Tick(y(tick), _number(tick)) for tick in y.ticks(5)]
    left = _left_of(y_ticks)
    x = _Scale(0, clock.total, left, WIDTH - _RIGHT)
    return Chart(
        name,
        title,
        words,
        height,
        left,
        unit.title,
        _time_ticks(x, unit),
        y_ticks,
        lines=[
            Line(kind, label, " ".join(f"{x(at)},{y(value)}" for at, value in points), area)
            for kind, label, points in lines
        ],
        marks=[x(pause.at) for pause in clock.pauses],
        legend=[(kind, label) for kind, label, _ in lines],
    )


def latency(title: str, about: str, histogram: Mapping[str, int], ops: int) -> Chart | None:
    """Return the histogram of an operation's durations, None if fewer than `FEWEST` are known."""
    counted = sum(histogram.values())
    if counted < FEWEST:
        return None
    counts = {int(bucket): n for bucket, n in histogram.items() if n}
    first, last = min(counts), max(counts)
    ticks = [seconds for seconds in _TICKS if first - 1 <= _place(seconds) <= last]
    if len(ticks) > 6:
        ticks = ticks[::3]
    quantiles = [(name, quantile(histogram, share)) for name, share in _QUANTILES]
    listed = ", ".join(f"{name} within {milliseconds(seconds)}" for name, seconds in quantiles)
    words = f"{listed}, all within {milliseconds(bound_of(last))}. {about}"
    if counted < ops:
        words += f" The durations of {counted} of {ops} are known; markers of earlier versions have none."
    height = 240
    y = _Scale(0, max(counts.values()), height - _BOTTOM, _TOP)
    y_ticks = [Tick(y(tick), _number(tick)) for tick in y.ticks(5)]
    left = _left_of(y_ticks)
    # On this axis, bucket b spans from b - 1 to b.
    x = _Scale(first - 1.5, last + 0.5, left, WIDTH - _RIGHT)
    bars = []
    for bucket in range(first, last + 1):
        count, begin, top = counts.get(bucket, 0), x(bucket - 0.97), y(counts.get(bucket, 0))
        text = f"{count} from {milliseconds(bound_of(bucket - 1))} to {milliseconds(bound_of(bucket))}"
        bars.append(Bar(UPLOAD, begin, top, round(x(bucket - 0.03) - begin, 2), round(y(0) - top, 2), text))
    return Chart(
        "latency",
        title,
        words,
        height,
        left,
        "duration, logarithmic scale",
        [Tick(x(_place(seconds)), milliseconds(seconds)) for seconds in ticks],
        y_ticks,
        bars=bars,
        marks=[x(_place(seconds)) for _, seconds in quantiles],
        labels=fit(
            [
                Text(
                    x(_place(seconds)) + (4 if name == "99 %" else -4),
                    _TOP - 6,
                    name,
                    "start" if name == "99 %" else "end",
                )
                for name, seconds in reversed(quantiles)
            ],
            left,
        ),
    )


def _place(seconds: float) -> float:
    """Return the position of a duration on the axis of bucket numbers."""
    return math.log2(seconds) / math.log2(bound_of(1))


def milliseconds(seconds: float) -> str:
    """Format a duration as `0.4 ms`, `12 ms` or `1.25 s`; from 10 s on as `duration` does."""
    if seconds >= 10:
        return duration(seconds)
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


class _Unit:
    """The unit of a time axis."""

    def __init__(self, total: float) -> None:
        self.seconds, name = (1, "seconds") if total < 180 else (60, "minutes") if total < 10_800 else (3600, "hours")
        self.title = f"{name} since the start"

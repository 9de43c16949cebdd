"""The timeline of a batch and its metrics -> charts, as shapes in the coordinates of an SVG picture.

Colours are classes of page.css, one a step, so a chart follows the colour scheme of its reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate

from pipeline.batches.state import COPY, DISCOVER, LOAD, TRANSFORM, UPLOAD
from pipeline.observe.metrics import bound_of, quantile
from pipeline.report.timeline import Clock, Row, Span, rates
from pipeline.units import duration, size

STEPS = (DISCOVER, UPLOAD, COPY, TRANSFORM, LOAD)
#: Rows of the timeline; the text below it counts the others.
MAXIMUM_ROWS = 48
#: Durations that a distribution needs at least.
FEWEST = 5

#: Pixels of every picture, and of the margins around its plot.
WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 44
_NAMES = 150
_LANE = 26
_BINS = 120
_TICKS = [step * 10**decade for decade in range(-4, 4) for step in (1, 2, 5)]
#: A step of an instant has this share of the width at least, so that it can be seen.
_THINNEST = 1 / 600
_QUANTILES = (("Half", 0.5), ("95 %", 0.95), ("99 %", 0.99))


@dataclass(frozen=True)
class Bar:
    """A rectangle with the text that it shows when it is pointed at."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line through points, `x,y x,y …`, with its name in the legend; `area` fills what is below it."""

    kind: str
    name: str
    points: str
    area: bool = False


@dataclass(frozen=True)
class Text:
    """A text at a point, `start`, `middle` or `end` of it there."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Chart:
    """A picture, and what it shows in words.

    Attributes:
        name: its id in the page.
        left, top, bottom: the bounds of its plot; `WIDTH - 12` is the right one.
        x_ticks, y_ticks: labels of the axes; each has a grid line.
        marks: x of upright dotted lines.
        legend: class and name of what has a colour.
    """

    name: str
    title: str
    words: str
    height: float
    left: float
    x_title: str
    x_ticks: Sequence[Text]
    y_ticks: Sequence[Text]
    bars: Sequence[Bar] = ()
    lines: Sequence[Line] = ()
    marks: Sequence[float] = ()
    labels: Sequence[Text] = ()
    legend: Sequence[tuple[str, str]] = ()
    y_title: str = ""

    @property
    def right(self) -> float:
        """Return the right bound of the plot."""
        return WIDTH - _RIGHT

    @property
    def top(self) -> float:
        """Return the upper bound of the plot."""
        return _TOP

    @property
    def bottom(self) -> float:
        """Return the lower bound of the plot."""
        return self.height - _BOTTOM


class _Scale:
    """Values of an axis -> pixels."""

    def __init__(self, least: float, most: float, first: float, last: float) -> None:
        self.least, self.most = least, most
        self._first, self._pixels = first, (last - first) / ((most - least) or 1)

    def __call__(self, value: float) -> float:
        return round(self._first + (value - self.least) * self._pixels, 2)

    def ticks(self, count: int) -> list[float]:
        """Return round values within the axis, at most about so many."""
        step = next((one for one in _steps() if (self.most - self.least) / one <= count), 1)
        first = math.ceil(self.least / step)
        return [number * step for number in range(first, math.floor(self.most / step) + 1)]


def _steps() -> Iterable[float]:
    for decade in range(-3, 13):
        for step in (1, 2, 5):
            yield step * 10.0**decade


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def timeline(rows: Sequence[Row], clock: Clock) -> Chart:
    """Return which worker did what when: a row for each worker, with a lane for each thing that it did at once."""
    shown = rows[:MAXIMUM_ROWS]
    lanes = [lane for row in shown for lane in row.lanes]
    unit = _Unit(clock.total)
    x = _Scale(0, clock.total, _NAMES, WIDTH - _RIGHT)
    thinnest = (WIDTH - _RIGHT - _NAMES) * _THINNEST
    bars = []
    for number, lane in enumerate(lanes):
        y = _TOP + _LANE * (number + 0.1)
        for span in lane:
            begin, end = x(clock(span.begin)), x(clock(span.end))
            width = round(max(thinnest, end - begin), 2)
            bars.append(Bar(span.step, begin, round(y, 1), width, 0.8 * _LANE, _text_of(span)))
    names = short_names([row.worker for row in rows])
    middles, at = [], 0
    for row in shown:
        middles.append(Text(_NAMES - 8, _TOP + _LANE * (at + len(row.lanes) / 2) + 4, names[row.worker], "end"))
        at += len(row.lanes)
    height = _TOP + _LANE * len(lanes) + _BOTTOM
    done = {bar.kind for bar in bars}
    return Chart(
        "timeline",
        "Shards by worker",
        _timeline_words(rows, clock),
        height,
        _NAMES,
        unit.title,
        _time_ticks(x, unit, height),
        middles,
        bars=bars,
        marks=[x(pause.at) for pause in clock.pauses],
        labels=[Text(x(pause.at), height - _BOTTOM - 4, f"{duration(pause.seconds)} later") for pause in clock.pauses],
        legend=[(step, step) for step in STEPS if step in done],
    )


def _time_ticks(x: _Scale, unit: _Unit, height: float) -> list[Text]:
    axis = _Scale(0, x.most / unit.seconds, 0, 1)
    return [Text(x(tick * unit.seconds), height - _BOTTOM + 16, _number(tick)) for tick in axis.ticks(10)]


def _text_of(span: Span) -> str:
    begin, end = (datetime.fromtimestamp(at, timezone.utc).strftime("%H:%M:%S") for at in (span.begin, span.end))
    parts = [f"{span.step}, shard {span.shard}" if span.shard else span.step, span.worker]
    parts.append(f"{begin} to {end} UTC, {duration(span.seconds)}")
    if span.counter("bytes_uploaded"):
        parts.append(f"{span.counter('objects_uploaded')} photos, {size(span.counter('bytes_uploaded'))}")
    if span.retries:
        parts.append(f"{span.retries} retries")
    return "; ".join(parts)


def _timeline_words(rows: Sequence[Row], clock: Clock) -> str:
    workers = f"{len(rows)} worker{'s' if len(rows) != 1 else ''}"
    words = [f"{workers} over {duration(clock.total)}; each bar shows its times, in UTC, when it is pointed at."]
    if clock.pauses:
        pauses = duration(sum(pause.seconds for pause in clock.pauses))
        words.append(f"{pauses} without any step are cut out, at the dotted lines.")
    if len(rows) > MAXIMUM_ROWS:
        words.append(f"The first {MAXIMUM_ROWS} are shown.")
    words.append("An empty stretch is time without a marker: waiting, or an attempt that failed.")
    return " ".join(words)


def short_names(workers: Sequence[str]) -> dict[str, str]:
    """Return the workers, `host:pid`, without the host where all have the same, else with a short one."""
    hosts = {worker.rpartition(":")[0] for worker in workers}
    names = {}
    for worker in workers:
        host, _, pid = worker.rpartition(":")
        host = host if len(host) <= 12 else f"{host[:11]}…"
        names[worker] = f"pid {pid}" if len(hosts) == 1 else f"{host}:{pid}"
    return names


def throughput(clock: Clock, spans: Sequence[Span], recognitions: Mapping[int, int]) -> list[Chart]:
    """Return what was sent a second, or copied where nothing is sent, and how far each step was, over time."""
    charts = []
    sent = [(span, span.counter("bytes_uploaded") / 1e6) for span in spans if span.step == UPLOAD]
    copied = [(span, float(recognitions.get(span.shard, 0))) for span in spans if span.step == COPY]
    step, unit, title, amounts = COPY, "recognitions/s", "Recognitions copied a second", copied
    if sent:
        step, unit, title, amounts = UPLOAD, "MB/s", "Megabytes sent a second", sent
    bounds, rate = rates(clock, amounts, _BINS)
    if any(rate):
        stairs = [point for at, one in enumerate(rate) for point in ((bounds[at], one), (bounds[at + 1], one))]
        words = f"At most {max(rate):.1f} {unit}. The work of a shard is spread evenly over its time."
        charts.append(_over_time("rate", title, words, unit, clock, [(step, unit, stairs)], area=True))
    lines = []
    for step in (UPLOAD, COPY):
        bounds, rate = rates(clock, [(one, recognitions.get(one.shard, 0)) for one in spans if one.step == step], _BINS)
        if any(rate):
            width = bounds[1] - bounds[0]
            done = [0.0, *accumulate(one * width for one in rate)]
            lines.append((step, step, list(zip(bounds, done, strict=True))))
    if lines:
        words = (
            "Where a line is flat, no shard made progress with that step."
            " Where two lines are far apart, one step waits for the other."
        )
        charts.append(_over_time("done", "Recognitions done", words, "recognitions", clock, lines))
    return charts


def _over_time(
    name: str,
    title: str,
    words: str,
    y_title: str,
    clock: Clock,
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    area: bool = False,
) -> Chart:
    """Return a chart of lines, each with its class, its name and its points (seconds, value)."""
    unit, height = _Unit(clock.total), 260
    x = _Scale(0, clock.total, _LEFT, WIDTH - _RIGHT)
    y = _Scale(0, max(value for *_, points in lines for _, value in points), height - _BOTTOM, _TOP)
    return Chart(
        name,
        title,
        words,
        height,
        _LEFT,
        unit.title,
        _time_ticks(x, unit, height),
        [Text(_LEFT - 8, y(tick) + 4, _number(tick), "end") for tick in y.ticks(5)],
        lines=[
            Line(kind, label, " ".join(f"{x(at)},{y(value)}" for at, value in points), area)
            for kind, label, points in lines
        ],
        marks=[x(pause.at) for pause in clock.pauses],
        legend=[(kind, label) for kind, label, _ in lines],
        y_title=y_title,
    )


def latency(title: str, about: str, histogram: Mapping[str, int], ops: int) -> Chart | None:
    """Return how long single operations took, None where the times of too few are known."""
    counted = sum(histogram.values())
    if counted < FEWEST:
        return None
    counts = {int(bucket): n for bucket, n in histogram.items() if n}
    first, last = min(counts), max(counts)
    ticks = [seconds for seconds in _TICKS if first - 1 <= _place(seconds) <= last]
    if len(ticks) > 8:
        ticks = ticks[::3]
    quantiles = [(name, quantile(histogram, share)) for name, share in _QUANTILES]
    listed = ", ".join(f"{name} within {milliseconds(seconds)}" for name, seconds in quantiles)
    words = f"{listed}, all within {milliseconds(bound_of(last))}. {about}"
    if counted < ops:
        words += f" Of {ops} the times of {counted} are known; markers of former versions have none."
    height = 290
    # On this axis a bucket b reaches from b - 1 to b.
    x = _Scale(first - 1.5, last + 0.5, _LEFT, WIDTH - _RIGHT)
    y = _Scale(0, max(counts.values()), height - _BOTTOM, _TOP)
    bars = []
    for bucket in range(first, last + 1):
        count, left, top = counts.get(bucket, 0), x(bucket - 0.97), y(counts.get(bucket, 0))
        text = f"{count} from {milliseconds(bound_of(bucket - 1))} to {milliseconds(bound_of(bucket))}"
        bars.append(Bar(UPLOAD, left, top, round(x(bucket - 0.03) - left, 2), round(y(0) - top, 2), text))
    return Chart(
        "latency",
        title,
        words,
        height,
        _LEFT,
        "on a logarithmic scale",
        [Text(x(_place(seconds)), height - _BOTTOM + 16, milliseconds(seconds)) for seconds in ticks],
        [Text(_LEFT - 8, y(tick) + 4, _number(tick), "end") for tick in y.ticks(5)],
        bars=bars,
        marks=[x(_place(seconds)) for _, seconds in quantiles],
        labels=[
            Text(
                x(_place(seconds)) + (4 if name == "99 %" else -4), _TOP - 6, name, "start" if name == "99 %" else "end"
            )
            for name, seconds in quantiles
        ],
        y_title="times",
    )


def _place(seconds: float) -> float:
    """Return where a duration is on the scale of the buckets."""
    return math.log2(seconds) / math.log2(bound_of(1))


def milliseconds(seconds: float) -> str:
    """Return a duration as `0.4 ms`, `12 ms`, `1.25 s` or as `duration` has it."""
    if seconds >= 10:
        return duration(seconds)
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


class _Unit:
    """The unit of an axis of time."""

    def __init__(self, total: float) -> None:
        self.seconds, name = (1, "seconds") if total < 180 else (60, "minutes") if total < 10_800 else (3600, "hours")
        self.title = f"{name} since the start"

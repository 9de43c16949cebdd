"""Pure: the timeline of a batch and its metrics -> figures for plotly, in the JSON that its library in the page reads.

A colour is the name of one in page.css, `var(--upload)`; page.js puts in what it is by day or by night.
"""

from __future__ import annotations

import html
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from typing import Any

from pipeline.batches.state import COPY, DISCOVER, LOAD, TRANSFORM, UPLOAD
from pipeline.observe.logger import printable
from pipeline.observe.metrics import bound_of, quantile
from pipeline.report.timeline import Clock, Row, Span, rates
from pipeline.units import duration, size

STEPS = (DISCOVER, UPLOAD, COPY, TRANSFORM, LOAD)
#: Rows of the timeline; the workers beyond are told in words.
MAXIMUM_ROWS = 48
_BINS = 120
#: Bars to a lane up to which each has an edge; on a phone the edges of more would hide them.
_SPACIOUS = 20
#: Pixels above a figure, where it has a legend or labels.
_HEAD = 34
#: Durations that a distribution is told of.
FEWEST = 5
_TICKS = [step * 10**decade for decade in range(-4, 4) for step in (1, 2, 5)]
#: A step that took an instant is to be seen as well: this share of the width at least.
_THINNEST = 1 / 600
_QUANTILES = (("Half", 0.5), ("95 %", 0.95), ("99 %", 0.99))


@dataclass(frozen=True)
class Chart:
    """A figure: its name in the page, what it shows in words, and data and layout for plotly."""

    name: str
    title: str
    words: str
    figure: Mapping[str, Any]


def plotly_script() -> str:
    """Return plotly's library, which goes into the page as a whole."""
    script = pkgutil.get_data("plotly", "package_data/plotly.min.js")
    assert script is not None
    return script.decode("utf-8")


def timeline(rows: Sequence[Row], clock: Clock) -> Chart:
    """Return who did what when: a row for each worker, in which what it did at once is below each other."""
    shown = rows[:MAXIMUM_ROWS]
    lanes = [lane for row in shown for lane in row.lanes]
    unit = _Unit(clock.total)
    data = []
    for step in STEPS:
        bars = [(at, span) for at, lane in enumerate(lanes) for span in lane if span.step == step]
        if bars:
            data.append(_bars(step, bars, clock, unit, edge=0.5 if len(bars) <= _SPACIOUS * len(lanes) else 0))
    middles, at = [], 0
    for row in shown:
        middles.append(at + (len(row.lanes) - 1) / 2)
        at += len(row.lanes)
    names = short_names([row.worker for row in rows])
    layout: dict[str, Any] = {
        "height": 110 + 26 * len(lanes),
        "barmode": "overlay",
        "xaxis": {"title": {"text": unit.title}, "range": [0, clock.total / unit.seconds], "zeroline": False},
        "yaxis": {
            "tickvals": middles,
            "ticktext": [_text(names[row.worker]) for row in shown],
            "range": [len(lanes) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        "shapes": [_mark(pause.at / unit.seconds) for pause in clock.pauses],
        "annotations": [_later(pause.at / unit.seconds, pause.seconds) for pause in clock.pauses],
    }
    return Chart("timeline", "Shards by worker", _timeline_words(rows, clock), {"data": data, "layout": layout})


def _bars(step: str, bars: Sequence[tuple[int, Span]], clock: Clock, unit: _Unit, edge: float) -> dict[str, Any]:
    begins = [clock(span.begin) / unit.seconds for _, span in bars]
    thinnest = clock.total * _THINNEST / unit.seconds
    lengths = [
        max(thinnest, clock(span.end) / unit.seconds - begin) for begin, (_, span) in zip(begins, bars, strict=True)
    ]
    return {
        "type": "bar",
        "orientation": "h",
        "name": step,
        "y": [lane for lane, _ in bars],
        "base": [round(begin, 4) for begin in begins],
        "x": [round(length, 4) for length in lengths],
        "width": 0.8,
        "marker": {"color": f"var(--{step})", "line": {"width": edge, "color": "var(--page)"}},
        "hovertext": [_told(span) for _, span in bars],
        "hoverinfo": "text",
    }


def _told(span: Span) -> str:
    begin, end = (datetime.fromtimestamp(at, timezone.utc).strftime("%H:%M:%S") for at in (span.begin, span.end))
    lines = [f"{span.step}, shard {span.shard}" if span.shard else span.step, _text(span.worker)]
    lines.append(f"{begin} to {end} UTC, {duration(span.seconds)}")
    if span.counter("bytes_uploaded"):
        lines.append(f"{span.counter('objects_uploaded')} photos, {size(span.counter('bytes_uploaded'))}")
    if span.retries:
        lines.append(f"{span.retries} retries")
    return "<br>".join(lines)


def _timeline_words(rows: Sequence[Row], clock: Clock) -> str:
    workers = f"{len(rows)} worker{'s' if len(rows) != 1 else ''}"
    words = [f"{workers} over {duration(clock.total)}; each bar tells its times, in UTC."]
    if clock.pauses:
        away = duration(sum(pause.seconds for pause in clock.pauses))
        words.append(f"{away} in which nothing was at work are cut out, at the dotted lines.")
    if len(rows) > MAXIMUM_ROWS:
        words.append(f"The first {MAXIMUM_ROWS} are shown.")
    words.append("An empty stretch is time without a marker: waiting, or a try that failed.")
    return " ".join(words)


def short_names(workers: Sequence[str]) -> dict[str, str]:
    """Return the workers, `host:pid`, without the host where all have the same, else with the end of it left out."""
    hosts = {worker.rpartition(":")[0] for worker in workers}
    names = {}
    for worker in workers:
        host, _, pid = worker.rpartition(":")
        host = host if len(host) <= 12 else f"{host[:11]}…"
        names[worker] = f"pid {pid}" if len(hosts) == 1 else f"{host}:{pid}"
    return names


def throughput(clock: Clock, spans: Sequence[Span], recognitions: Mapping[int, int]) -> list[Chart]:
    """Return how much was sent a second, or copied where nothing is sent, and how far each step was, over time."""
    unit = _Unit(clock.total)
    charts = []
    sent = [(span, span.counter("bytes_uploaded") / 1e6) for span in spans if span.step == UPLOAD]
    copied = [(span, float(recognitions.get(span.shard, 0))) for span in spans if span.step == COPY]
    step, name, title, amounts = COPY, "recognitions/s", "Recognitions copied a second", copied
    if sent:
        step, name, title, amounts = UPLOAD, "MB/s", "Megabytes sent a second", sent
    bounds, rate = rates(clock, amounts, _BINS)
    if any(rate):
        line = {**_line(name, f"var(--{step})", bounds, [*rate, rate[-1]], unit), "fill": "tozeroy"}
        line["line"]["shape"] = "hv"
        words = f"At most {max(rate):.1f} {name}. What a shard did is spread evenly over its time."
        charts.append(Chart("rate", title, words, _over_time([line], name, clock, unit)))
    lines = []
    for step in (UPLOAD, COPY):
        bounds, rate = rates(clock, [(one, recognitions.get(one.shard, 0)) for one in spans if one.step == step], _BINS)
        if any(rate):
            width = bounds[1] - bounds[0]
            lines.append(_line(step, f"var(--{step})", bounds, [0, *accumulate(one * width for one in rate)], unit))
    if lines:
        figure = _over_time(lines, "recognitions", clock, unit)
        words = "Where a line is flat, no shard got on with that step; two lines far apart: one waits for the other."
        charts.append(Chart("done", "Recognitions done", words, figure))
    return charts


def _line(name: str, colour: str, bounds: Sequence[float], values: Sequence[float], unit: _Unit) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [round(bound / unit.seconds, 4) for bound in bounds],
        "y": [round(one, 3) for one in values],
        "line": {"width": 2, "color": colour},
        "hovertemplate": "%{y:.1f}",
    }


def _over_time(lines: list[dict[str, Any]], title: str, clock: Clock, unit: _Unit) -> dict[str, Any]:
    layout = {
        "height": 220 + _HEAD * (len(lines) > 1),
        "margin": {"t": _HEAD if len(lines) > 1 else 8},
        "hovermode": "x unified",
        "showlegend": len(lines) > 1,
        "xaxis": {"title": {"text": unit.title}, "range": [0, clock.total / unit.seconds]},
        "yaxis": {"title": {"text": title}, "rangemode": "tozero", "fixedrange": True},
        "shapes": [_mark(pause.at / unit.seconds) for pause in clock.pauses],
    }
    return {"data": lines, "layout": layout}


def latency(title: str, about: str, histogram: Mapping[str, int], ops: int) -> Chart | None:
    """Return how long single operations took, None where that is known of too few."""
    counted = sum(histogram.values())
    if counted < FEWEST:
        return None
    buckets = [(int(bucket), n) for bucket, n in histogram.items() if n]
    first, last = min(bucket for bucket, _ in buckets), max(bucket for bucket, _ in buckets)
    counts = dict(buckets)
    every = range(first, last + 1)
    ticks = [seconds for seconds in _TICKS if first - 1 <= _place(seconds) <= last]
    if len(ticks) > 8:
        ticks = ticks[::3]
    at = [(name, quantile(histogram, share)) for name, share in _QUANTILES]
    told = ", ".join(f"{name} within {milliseconds(seconds)}" for name, seconds in at)
    words = f"{told}, all within {milliseconds(bound_of(last))}. {about}"
    if counted < ops:
        words += f" Of {ops} the times of {counted} are known; markers of former versions have none."
    layout = {
        "height": 260,
        "bargap": 0.06,
        "xaxis": {
            "title": {"text": "on a logarithmic scale"},
            # A bucket b is from b - 1 to b on this axis.
            "tickvals": [_place(seconds) for seconds in ticks],
            "ticktext": [milliseconds(seconds) for seconds in ticks],
            "range": [first - 1.5, last + 0.5],
            "zeroline": False,
        },
        "yaxis": {"title": {"text": "times"}, "rangemode": "tozero", "fixedrange": True},
        "shapes": [_mark(_place(seconds)) for _, seconds in at],
        "annotations": [
            {**_label(_place(seconds), name), "xanchor": "left" if name == "99 %" else "right"} for name, seconds in at
        ],
    }
    bars = {
        "type": "bar",
        "x": [bucket - 0.5 for bucket in every],
        "y": [counts.get(bucket, 0) for bucket in every],
        "marker": {"color": "var(--upload)"},
        "hovertext": [
            f"{counts.get(bucket, 0)} from {milliseconds(bound_of(bucket - 1))} to {milliseconds(bound_of(bucket))}"
            for bucket in every
        ],
        "hoverinfo": "text",
    }
    return Chart("latency", title, words, {"data": [bars], "layout": layout})


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


def _mark(at: float) -> dict[str, Any]:
    """Return an upright dotted line."""
    line = {"color": "var(--quiet)", "width": 1.5, "dash": "dot"}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _label(at: float, text: str) -> dict[str, Any]:
    return {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text, "showarrow": False}


def _later(at: float, seconds: float) -> dict[str, Any]:
    """Return the label of a pause: below, for the legend is above."""
    return {**_label(at, f"{duration(seconds)} later"), "y": 0, "bgcolor": "var(--page)"}


def _text(text: str) -> str:
    """Return a name for plotly, which reads tags and entities in every text."""
    return html.escape(printable(text), quote=False)


class _Unit:
    """The unit of an axis of time."""

    def __init__(self, total: float) -> None:
        self.seconds, name = (1, "seconds") if total < 180 else (60, "minutes") if total < 10_800 else (3600, "hours")
        self.title = f"{name} since the start"

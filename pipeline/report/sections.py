"""Compute the values of the page's sections from the summary and the markers of a batch. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.batches.resolve import next_step
from pipeline.batches.state import COPY, KIND_LOAD, KIND_QWEN, UPLOAD
from pipeline.dataset.records import describe_files
from pipeline.observe.metrics import merge
from pipeline.report import charts
from pipeline.report.quantiles import quantile
from pipeline.report.timeline import Clock, Span, rows, runs, union
from pipeline.units import duration, size

_QUANTILES = (0.5, 0.95, 0.99)
#: Per kind of batch: the operation whose durations are charted, the title of the chart, and a note below it.
_UPLOADS = (
    "storage_upload",
    "Photos by the duration of their upload",
    "Includes the wait for a free connection, retries and the delays between them.",
)
_COPIES = ("db_bulk_copy", "Shards by the duration of their COPY", "")


@dataclass(frozen=True)
class Card:
    """A headline figure; `link` is the section that it leads to, and `kind` a CSS class."""

    name: str
    value: str
    beside: str = ""
    link: str = ""
    kind: str = ""


def numbers(summary: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, Any]:
    """Return the headline figures and the facts about the batch."""
    seconds = summary["total_seconds"]
    is_qwen = summary["kind"] == KIND_QWEN
    found = f"of {_grouped(summary['found'])} in the source" if summary["found"] else ""  # photos of annotations
    throughput, photos = summary["throughput"], _grouped(summary["images_processed"])
    cards = [Card("Recognitions", _grouped(summary["recognitions_processed"]), "" if is_qwen else found)]
    cards.append(Card("Photos", photos, found if is_qwen else "" if "planned" in summary else size(summary["bytes"])))
    if is_qwen:
        cards.append(Card("Detections", _grouped(summary["detections_processed"])))
    else:
        sent = f"{size(throughput['bytes_uploaded']['per_second'])}/s"
        cards.append(Card("Uploaded", size(summary["bytes_uploaded"]), sent))
    rate = throughput["recognitions_processed"]["per_second"] if seconds else 0
    cards.append(Card("Busy", duration(seconds), f"{rate:.1f} recognitions/s"))
    if retries := sum(count for _, count in _retries(summary)):
        cards.append(Card("Retries", _grouped(retries)))
    rejected, noticed = summary["rejected"], summary.get("noticed", 0)  # earlier versions recorded no notices
    about, kind = (f"input{'s' if rejected != 1 else ''} left out", "bad") if rejected else ("", "")
    cards.append(Card("Rejected", _grouped(rejected), about, "rejects", kind))
    if noticed:
        cards.append(
            Card("Noticed", _grouped(noticed), f"input{'s' if noticed != 1 else ''} to look at", "notices", "odd")
        )
    return {"summary": summary, "cards": cards, "facts": list(_facts(summary, spans)), "spans": spans}


def _grouped(number: int) -> str:
    return f"{number:,}"


def _facts(summary: Mapping[str, Any], spans: Sequence[Span]) -> Iterator[tuple[str, str]]:
    yield "Source", summary["source"]
    yield "Bucket", summary["bucket"]
    for name in ("created_at", "finished_at", "reset_at"):
        if summary.get(name):  # a look that made no batch has none
            yield name.replace("_at", "").capitalize(), summary[name]
    if reason := summary.get("held_reason"):
        published = summary.get("released_at")
        yield "Held", f"{reason} Published at {published}." if published else reason
    if summary.get("version") is not None:
        yield "Version", str(summary["version"])
    options = [name for name in ("force", "changed", "strict") if summary.get(name)]
    if summary.get("limit") is not None:
        options.append(f"limit {summary['limit']}")
    if options:
        yield "Options", ", ".join(options)
    if spans:
        yield "Runs", str(max(runs(spans).values()))
    done = ", ".join(f"{count} {step}" for step, count in summary["shards_done"].items() if count)
    yield "Shards", f"{summary['shards']}{f', done: {done}' if done else ''}"
    for name in ("already_loaded", "held_elsewhere", "superseded_copies", "beyond_limit", "known_rejects"):
        if summary.get(name):
            yield name.replace("_", " ").capitalize(), _grouped(summary[name])
    if files := summary.get("files"):  # earlier versions did not count them
        yield "Files", describe_files(files)
    if summary["held_by"]:
        yield "Held by", ", ".join(summary["held_by"])


def time(summary: Mapping[str, Any], spans: Sequence[Span], sizes: Mapping[int, int]) -> dict[str, Any]:
    """Return the timeline, the throughput charts and the tables of steps and workers."""
    clock = Clock(spans)
    workers = rows(spans)
    busiest = sorted(workers, key=lambda row: row.busy, reverse=True)
    return {
        "clock_total": clock.total,
        "timeline": charts.timeline(workers, clock) if spans else None,
        "throughput": charts.throughput(clock, spans, sizes),
        "steps": list(_steps(summary, spans)),
        "workers": busiest[: charts.MAXIMUM_ROWS],
        "workers_in_all": len(workers),
        "runs": max((row.run for row in workers), default=0),
    }


@dataclass(frozen=True)
class _Step:
    """A row of the table of steps; times in seconds."""

    step: str
    done: int
    of: int
    busy: float
    together: float
    longest: Span


def _steps(summary: Mapping[str, Any], spans: Sequence[Span]) -> Iterator[_Step]:
    for step in charts.STEPS:
        own = [span for span in spans if span.step == step]
        if own:
            busy = sum(end - begin for begin, end in union((span.begin, span.end) for span in own))
            of = summary["shards"] if step in (UPLOAD, COPY) else 0
            together = sum(span.seconds for span in own)
            yield _Step(step, len(own), of, busy, together, max(own, key=lambda span: span.seconds))


def requests(summary: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, Any]:
    """Return the latency chart, the operations and the retries by code."""
    total: dict[str, Any] = {}
    for span in spans:
        merge(total, span.metrics)
    # A reset deletes the markers. The summary stored with the batch remains, but it has no histograms.
    histograms = {name: entry["histogram"] for name, entry in total.get("operations", {}).items()}
    operations = [
        {
            "name": name,
            "ops": entry["ops"],
            "average": entry["average_seconds"],
            "total": entry["total_seconds"],
            "quantiles": _quantiles(histograms.get(name, {})),
        }
        for name, entry in sorted(summary["operations"].items(), key=lambda one: -one[1]["total_seconds"])
    ]
    shown, title, about = _UPLOADS if summary["kind"] == KIND_LOAD else _COPIES
    ops = summary["operations"].get(shown, {}).get("ops", 0)
    in_flight = summary.get("gauges", {}).get("requests_in_flight")
    refused = summary["counters"].get("requests_refused", 0)
    return {
        "latency": charts.latency(title, about, histograms.get(shown, {}), ops),
        "operations": operations,
        "averages_only": bool(operations) and not histograms.get(shown),
        "retries": _retries(summary),
        "in_flight": f"Requests in flight: {in_flight['last']} at the end, {in_flight['max']} at most; "
        f"{refused} refused by an overloaded server."
        if in_flight
        else "",
    }


def _quantiles(histogram: Mapping[str, int]) -> list[float | None]:
    known = sum(histogram.values()) >= charts.FEWEST
    return [quantile(histogram, share) if known else None for share in _QUANTILES]


def _retries(summary: Mapping[str, Any]) -> list[tuple[str, int]]:
    counters = summary["counters"].items()
    retries = [(name.removeprefix("retries_"), count) for name, count in counters if name.startswith("retries_")]
    return sorted(retries, key=lambda one: (-one[1], one[0]))


def how_to_go_on(summary: Mapping[str, Any], production: bool) -> str:
    """Return what to do about a batch that is not done, commands in backticks; empty for one that is."""
    step = next_step(summary, production)
    if summary["state"] == "held":
        return f"Readers do not see this batch. {summary['held_reason']} {step}"
    what = "This batch" if summary["state"] == "loading" else "The reset of this batch"
    return f"{what} is unfinished. To go on: `{step}`" if step else ""


def trays_words(summary: Mapping[str, Any], chosen: int) -> str:
    """Return the text above the trays, empty when there are none."""
    if not chosen:
        return ""
    total = summary["recognitions_processed"]
    words = f"{chosen} of {_grouped(total)} recognition{'s' if total != 1 else ''}, spread over the shards, "
    words += "annotated ones first. Photos are shown as stored, without applying their EXIF orientation."
    if summary["state"] != "done":
        is_load = summary["kind"] == KIND_LOAD
        words += " This batch is not done: readers do not see "
        words += "it yet, so it has no boxes." if is_load else "its boxes yet; those here are of a batch before it."
    return words


def no_trays(summary: Mapping[str, Any], sample: int) -> str:
    """Return why no trays are shown."""
    if not sample:
        return "--sample 0: no trays were requested."
    if summary["state"] == "reset":
        gone = "photos" if summary["kind"] == KIND_LOAD else "annotations"
        return f"This batch was reset: its {gone} are gone."
    if not summary["shards"]:
        return "This batch has no recognitions."
    return "No shard of this batch is done yet, so there is nothing to show."

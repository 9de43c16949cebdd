"""Report: a page about one batch, finished or not, for people: where its time went, and what its photos look like."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.batches.resolve import require_schema
from pipeline.batches.state import COPY, KIND_LOAD, KIND_QWEN, UPLOAD
from pipeline.batches.summary import summarise
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.dataset.layout import MAXIMUM_PHOTO_BYTES
from pipeline.errors import AccessDenied, ObjectNotFound, SettingsError, StorageError, TransientError
from pipeline.observe.metrics import merge, quantile
from pipeline.report import charts
from pipeline.report.page import write_page
from pipeline.report.thumbnail import Thumbnail, thumbnail
from pipeline.report.timeline import Clock, Span, rows, union
from pipeline.report.trays import Photo, Tray, tray_of
from pipeline.storage import Storage
from pipeline.units import duration, size

#: Pixels of the longer side of a photo in the page.
_PHOTO, _REJECT = 720, 240
#: Recognitions that are asked for at once.
_CHUNK = 10
MAXIMUM_ITEMS = 100
MAXIMUM_BOXES = 200
_QUANTILES = (0.5, 0.95, 0.99)
#: The operation whose times are drawn, a title, and what is to be known of it.
_UPLOADS = (
    "storage_upload",
    "How long the upload of a photo took",
    "Counted from when it lined up for a free connection until Storage had answered, retries and their waits included.",
)
_COPIES = ("db_bulk_copy", "How long the COPY of a shard took", "")


@dataclass
class Report:
    """What was written: the file, and how many recognitions and pictures are in it.

    `unavailable` says why no more photos were read from Storage, and is empty where nothing kept them away.
    """

    batch_id: str
    state: str
    file: str
    bytes: int = 0
    recognitions: int = 0
    photos: int = 0
    unavailable: str = ""


def write_report(
    settings: Settings,
    database: Database,
    batch_id: str,
    path: Path,
    sample: int,
) -> Report:
    """Write the page about a batch, whole or not at all; photos are read one at a time.

    What is not there, such as the source folder, a photo or all of Storage, is told in the page and does not stop it.

    Arguments:
        sample: recognitions to show with their photos.

    Raises:
        UsageError: there is no such batch.
        SettingsError: the file cannot be written.
    """

    def gather(connection: Connection) -> tuple[dict[str, Any], list[Span], dict[int, int], list[int]]:
        require_schema(connection)
        summary = summarise(connection, batch_id)
        spans = [
            Span(one.step, one.shard, one.worker, one.started_at.timestamp(), one.finished_at.timestamp(), one.metrics)
            for one in connection.execute("list_markers", batch_id=batch_id)
        ]
        sizes = {one.shard: one.recognitions for one in connection.execute("count_shards", batch_id=batch_id)}
        step = UPLOAD if summary["kind"] == KIND_LOAD else COPY
        chosen = connection.execute("list_sample", batch_id=batch_id, step=step, count=sample)
        return summary, spans, sizes, [one.recognition_id for one in chosen]

    summary, spans, sizes, chosen = database.run(gather, read_only=True)
    report = Report(batch_id, summary["state"], str(path))
    # Reading from the batch's own bucket is safe, whatever STORAGE_BUCKET is by now.
    with closing(Storage(replace(settings, bucket=summary["bucket"]))) as storage:
        trays = _Trays(database, storage, report)
        page = {
            **_numbers(summary, spans),
            **_time(summary, spans, sizes),
            **_requests(summary, spans),
            **_rejects(summary),
            "trays": trays.read(chosen),
            "trays_words": _trays_words(summary, len(chosen)),
            "no_trays": _no_trays(summary, sample),
            "made_at": datetime.now(timezone.utc).isoformat(),
        }
        _write(path, page)
    report.bytes = path.stat().st_size
    return report


def _write(path: Path, page: Mapping[str, Any]) -> None:
    """Write beside the file, and put it in its place at the end."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as out:
                write_page(out, page)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as exc:
        raise SettingsError(
            f"The report cannot be written to {path}: {exc.strerror}.", "Name another file with --out."
        ) from exc


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# The numbers


def _numbers(summary: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, Any]:
    seconds = summary["total_seconds"]
    cards = [("Recognitions", _grouped(summary["recognitions_processed"]), _found(summary))]
    throughput = summary["throughput"]
    if summary["kind"] == KIND_QWEN:
        cards.append(("Detections", _grouped(summary["detections_processed"]), ""))
    else:
        cards.append(("Photos", _grouped(summary["images_processed"]), size(summary["bytes"])))
        cards.append(("Sent", size(summary["bytes_uploaded"]), f"{size(throughput['bytes_uploaded']['per_second'])}/s"))
    rate = throughput["recognitions_processed"]["per_second"] if seconds else 0
    cards.append(("At work", duration(seconds), f"{rate:.1f} recognitions/s"))
    retries = sum(count for _, count in _retries(summary))
    cards.append(("Retries", _grouped(retries), ""))
    cards.append(("Rejected", _grouped(summary["rejected"]), ""))
    return {"summary": summary, "cards": cards, "facts": list(_facts(summary)), "spans": spans}


def _found(summary: Mapping[str, Any]) -> str:
    return f"of {_grouped(summary['found'])} in the source" if summary["found"] else ""


def _grouped(number: int) -> str:
    return f"{number:,}"


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Source", summary["source"]
    yield "Bucket", summary["bucket"]
    for name in ("created_at", "finished_at", "reset_at"):
        if summary[name]:
            yield name.replace("_at", "").capitalize(), summary[name]
    if summary["version"] is not None:
        yield "Version", str(summary["version"])
    wishes = [name for name in ("force", "strict") if summary[name]]
    if summary["limit"] is not None:
        wishes.append(f"limit {summary['limit']}")
    if wishes:
        yield "Asked for", ", ".join(wishes)
    done = ", ".join(f"{count} {step}" for step, count in summary["shards_done"].items() if count)
    yield "Shards", f"{summary['shards']}{f', done: {done}' if done else ''}"
    for name in ("already_loaded", "held_elsewhere", "superseded_copies", "beyond_limit"):
        if summary[name]:
            yield name.replace("_", " ").capitalize(), _grouped(summary[name])
    if summary["held_by"]:
        yield "Held by", ", ".join(summary["held_by"])


# Time


def _time(summary: Mapping[str, Any], spans: Sequence[Span], sizes: Mapping[int, int]) -> dict[str, Any]:
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
    }


@dataclass(frozen=True)
class _Step:
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


# Requests


def _requests(summary: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for span in spans:
        merge(total, span.metrics)
    # A reset takes the markers away; then the summary that was kept with the batch is all there is.
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


# Rejects


def _rejects(summary: Mapping[str, Any]) -> dict[str, Any]:
    source = Path(summary["source"])
    is_load = summary["kind"] == KIND_LOAD
    there = is_load and source.is_dir()
    note = ""
    if is_load and not there:
        note = "The source folder is not there any more, or not on this machine, so there are no pictures."
    pictures = (
        {
            **one,
            "is_photo": is_load and _is_photo(one["path"]),
            "picture": _broken(source, one["path"]) if there else None,
        }
        for one in summary["rejected_inputs"]
    )
    return {
        "reject_counts": sorted(summary["rejects"].items(), key=lambda one: (-one[1], one[0])),
        "rejects": pictures,
        "source_note": note,
    }


def _is_photo(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg"))


def _broken(source: Path, path: str) -> Thumbnail | None:
    """Return what can be decoded of a photo that was left out; never of a file outside the source."""
    if not _is_photo(path):
        return None
    try:
        file = (source / path).resolve(strict=True)
        if not file.is_relative_to(source.resolve(strict=True)):
            return None
        # A named pipe would be waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(descriptor, "rb") as opened:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAXIMUM_PHOTO_BYTES:
                return None
            content = opened.read(MAXIMUM_PHOTO_BYTES)
    except (OSError, ValueError):  # a NUL in a name is a ValueError
        return None
    return thumbnail(content, _REJECT, damaged=True)


# Trays


def _trays_words(summary: Mapping[str, Any], chosen: int) -> str:
    if not chosen:
        return ""
    words = f"{chosen} of {_grouped(summary['recognitions_processed'])} recognitions, spread over all that is loaded, "
    words += "annotated ones first. Photos are shown as they are stored, and boxes in their pixels."
    if summary["state"] != "done":
        is_load = summary["kind"] == KIND_LOAD
        words += " This batch is not done: readers do not see "
        words += "it yet, so it has no boxes." if is_load else "its boxes yet; those here are of a batch before it."
    return words


def _no_trays(summary: Mapping[str, Any], sample: int) -> str:
    if not sample:
        return "None were asked for."
    if summary["state"] == "reset":
        gone = "photos" if summary["kind"] == KIND_LOAD else "annotations"
        return f"This batch was reset: its {gone} are gone."
    if not summary["recognitions_processed"]:
        return "This batch has no recognition."
    return "No shard of this batch is done yet, so there is nothing to show."


class _Trays:
    """Recognitions with their photos, read when they are asked for."""

    def __init__(self, database: Database, storage: Storage, report: Report) -> None:
        self._database, self._storage, self._report = database, storage, report

    def read(self, chosen: Sequence[int]) -> Iterator[Tray]:
        """Yield the trays of some recognitions; those that were reset meanwhile are left out."""
        for start in range(0, len(chosen), _CHUNK):
            wanted = list(chosen[start : start + _CHUNK])
            photos, items, boxes = self._database.run(partial(self._ask, wanted=wanted), read_only=True)
            for recognition_id in wanted:
                own = [one for one in photos if one.recognition_id == recognition_id]
                if own:
                    self._report.recognitions += 1
                    pictures = [self._photo(one, [box for box in boxes if box.image_id == one.image_id]) for one in own]
                    on_tray = [one for one in items if one.recognition_id == recognition_id]
                    yield tray_of(recognition_id, self._note(own), pictures, on_tray)

    def _ask(self, connection: Connection, wanted: Sequence[int]) -> tuple[Sequence[Any], ...]:
        photos = connection.execute("list_sample_photos", batch_id=self._report.batch_id, recognition_ids=wanted)
        images = [one.image_id for one in photos if one.image_id is not None]
        shown = sorted({one.recognition_id for one in photos if one.image_id is not None})
        items = connection.execute("list_sample_items", recognition_ids=shown, count=MAXIMUM_ITEMS)
        boxes = connection.execute("list_sample_boxes", image_ids=images, count=MAXIMUM_BOXES)
        return photos, items, boxes

    def _note(self, photos: Sequence[Any]) -> str:
        others = {one.shown_batch_id for one in photos if one.image_id is None and one.shown_batch_id is not None}
        return f"Readers see another version of it, of batch {min(others)}; boxes are with that." if others else ""

    def _photo(self, row: Any, boxes: Sequence[Any]) -> Photo:
        picture, note = self._picture(row)
        if picture is not None and (row.orientation or 1) != 1:
            note = f"Its EXIF data wants it turned (orientation {row.orientation}); here neither photo nor boxes are."
        if boxes and boxes[0].boxes > len(boxes):
            note = f"{note} The first {len(boxes)} of {boxes[0].boxes} boxes.".strip()
        return Photo(row.camera_number, picture, note, boxes)

    def _picture(self, row: Any) -> tuple[Thumbnail | None, str]:
        """Return the photo as the bucket has it and what is to be said of it, or why there is none."""
        if row.object_key is None:
            return None, "This photo is not loaded any more."
        if self._report.unavailable:
            return None, "Storage could not be asked."
        try:
            content = self._storage.read(row.object_key, MAXIMUM_PHOTO_BYTES)
        except (TransientError, AccessDenied) as exc:  # so it would go with every other photo
            self._report.unavailable = exc.message
            return None, "Storage could not be asked."
        except ObjectNotFound:
            return None, "The bucket does not hold this photo."
        except StorageError as exc:
            return None, f"Not to be had from the bucket: {exc.message}"
        picture = thumbnail(content, _PHOTO)
        if picture is None:
            return None, "What the bucket holds is not a picture."
        self._report.photos += 1
        differs = row.sha256 is not None and hashlib.sha256(content).hexdigest() != row.sha256
        return picture, "This is not what was loaded: its SHA-256 is another." if differs else ""

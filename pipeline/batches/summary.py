"""What is on record of a batch and of all batches, as JSON and as text: the summary and the status."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import date, datetime
from functools import partial
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.bucket import list_recorded, prove_bucket
from pipeline.batches.looks import Look, describe_changed, describe_known, find_look
from pipeline.batches.proofs import describe_proofs
from pipeline.batches.resolve import next_step
from pipeline.batches.state import COPY, KIND_LOAD, KIND_QWEN, UPLOAD
from pipeline.config import Settings, command_line
from pipeline.database import Connection, Database
from pipeline.database.migrate import pending
from pipeline.dataset.records import describe_codes, describe_files
from pipeline.errors import PipelineError, printable
from pipeline.observe.metrics import merge
from pipeline.storage import Storage
from pipeline.units import counted, duration, moment, size

#: The throughputs, in their order, and the timings that are shown of every load.
_THROUGHPUTS = ("recognitions_processed", "images_processed", "detections_processed", "bytes_uploaded")
_TIMINGS = ("storage_upload", "db_bulk_copy")
_SHARD_STEPS = (UPLOAD, COPY)
_LISTED_INPUTS, _LISTED_BATCHES = 100, 10  # in a summary and in the status; the tables have them all


def summarise(connection: Connection, batch_id: str) -> dict[str, Any]:
    """Return the numbers of a batch; durations in seconds, sizes in bytes. Raises UsageError if it does not exist."""
    found = batch_state.find_batch(connection, batch_id)
    if found is None or found.state == "reset":
        look = find_look(connection, batch_id)
        if look is not None and not look.batch_made:
            return _summarise_look(connection, look)
    found = found or batch_state.require_batch(connection, batch_id)
    if found.metrics:  # stored when the batch was done, since a reset deletes its markers
        reset_at = found.reset_at.isoformat() if found.reset_at is not None else None
        return {**found.metrics, "state": found.state, "reset_at": reset_at}
    batch = _as_json(connection.one("describe_batch", batch_id=batch_id))
    markers = connection.execute("list_markers", batch_id=batch_id)
    total: dict[str, Any] = {}
    for marker in markers:
        merge(total, marker.metrics)
    done = Counter(marker.step for marker in markers)
    seconds = active_seconds([(marker.started_at, marker.finished_at) for marker in markers])
    detections = batch.pop("detections_processed")
    if batch["state"] == "loading":  # what the manifest has is not done yet
        shards = {row.step: row for row in connection.execute("count_processed", batch_id=batch_id)}
        batch["planned"] = {"recognitions": batch["recognitions_processed"], "images": batch["images_processed"]}
        batch["recognitions_done"] = {step: shards[step].recognitions if step in shards else 0 for step in _SHARD_STEPS}
        batch["recognitions_processed"] = batch["recognitions_done"][COPY]
        batch["images_processed"] = shards[COPY].images if COPY in shards else 0
    if batch["changed"] and batch["kind"] == KIND_LOAD:
        batch["new_versions"] = connection.one("count_new_versions", batch_id=batch_id).recognitions
    shards_done = {step: done[step] for step in _SHARD_STEPS}
    measured = _measured(batch, detections, seconds, total)
    return {**batch, "shards_done": shards_done, **_list_inputs(connection, batch_id), **measured}


def _summarise_look(connection: Connection, look: Look) -> dict[str, Any]:
    """Return a look that made no batch in the form of the summary of a batch, into which nothing was loaded."""
    nothing = {"kind": look.kind, "recognitions_processed": 0, "images_processed": 0}
    return {
        **{name: value for name, value in _as_json(look).items() if name not in ("seen", "changed")},
        **look.seen,
        "state": "done",
        "changed_since_load": look.changed,
        **_list_inputs(connection, look.batch_id),
        "bytes": 0,
        "shards": 0,
        "shards_done": {},
        **_measured(nothing, 0, 0.0, {}),
    }


def _list_inputs(connection: Connection, batch_id: str) -> dict[str, Any]:
    """Return how many rejects and notices there are, also by code, and the first of them."""
    found: dict[str, Any] = {}
    for what, table in (("rejected", "rejects"), ("noticed", "notices")):
        found[table] = dict(connection.execute(f"count_{table}", batch_id=batch_id))
        found[what] = sum(found[table].values())
        shown = connection.execute(f"list_{table}", batch_id=batch_id, count=_LISTED_INPUTS) if found[what] else ()
        found[f"{what}_inputs"] = [row._asdict() for row in shown]
    return found


def _measured(batch: Mapping[str, Any], detections: int, seconds: float, total: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was processed in so many seconds, and the metrics of all markers."""
    counters, operations, gauges = (total.get(name, {}) for name in ("counters", "operations", "gauges"))
    counts = {name: batch[name] for name in ("recognitions_processed", "images_processed")}
    if batch["kind"] == KIND_QWEN:
        counts["detections_processed"] = detections
    else:
        counts["bytes_uploaded"] = counters.get("bytes_uploaded", 0)

    def timing(ops: int, seconds: float) -> dict[str, Any]:
        average = round(seconds / max(1, ops), 6)
        return {"ops": ops, "average_seconds": average, "total_seconds": round(seconds, 6)}

    rates = {name: round(count / seconds, 2) if seconds > 0 else 0.0 for name, count in counts.items()}
    return {
        **counts,
        "total_seconds": round(seconds, 3),
        "throughput": {name: {"count": count, "per_second": rates[name]} for name, count in counts.items()},
        "operations": {name: timing(int(one["ops"]), one["seconds"]) for name, one in sorted(operations.items())},
        "counters": counters,
        "gauges": {name: {"last": entry["last"], "max": entry["max"]} for name, entry in sorted(gauges.items())},
    }


def keep_summary(connection: Connection, batch_id: str) -> dict[str, Any]:
    """Keep the numbers of a batch that is done with it, mark the load, and return them."""
    batch_state.hold(connection, batch_id, state="done")
    if not batch_state.await_step(connection, batch_id, batch_state.LOAD):
        batch_state.mark(connection, batch_id, batch_state.LOAD, batch_state.WHOLE, connection.one("now").now, {})
    summary = summarise(connection, batch_id)
    connection.execute("update_batch_metrics", batch_id=batch_id, metrics=json.dumps(summary, ensure_ascii=False))
    return summary


def _as_json(row: Any) -> dict[str, Any]:
    return {name: one.isoformat() if isinstance(one, date) else one for name, one in row._asdict().items()}


def active_seconds(intervals: Sequence[tuple[datetime, datetime]]) -> float:
    """Return the seconds in which at least one step ran: the union of the intervals, without pauses between runs."""
    total = 0.0
    end: datetime | None = None
    for begin, finish in sorted(intervals):
        total += max(0.0, (finish - max(begin, end or begin)).total_seconds())
        end = max(finish, end or finish)
    return total


def performance_metrics(summary: Mapping[str, Any], *, everything: bool = False) -> str:
    """Return the block `Performance Metrics:` of a summary: what every load has, or `everything`, longest first."""
    lines = ["Performance Metrics:", f"  Total time: {duration(summary['total_seconds'])}", "  Throughput:"]
    throughput, operations = summary["throughput"], summary["operations"]
    for name in (one for one in _THROUGHPUTS if one in throughput):  # jsonb keeps no order
        count, rate = throughput[name]["count"], throughput[name]["per_second"]
        numbers = f"{size(count)} ({size(rate)}/s)" if name.startswith("bytes") else f"{count} ({rate:.1f}/s)"
        lines.append(f"    {name}: {numbers}")
    timed = [name for name in operations if everything or name in _TIMINGS]
    lines += ["  Operation timings:"] if timed else []
    for name in sorted(timed, key=lambda name: (-operations[name]["total_seconds"], name)):
        ops, average, total = (operations[name][key] for key in ("ops", "average_seconds", "total_seconds"))
        lines.append(f"    {name}: {counted(ops, 'op')}, avg {average * 1000:.2f} ms, total {total:.2f} s")
    in_flight = summary["gauges"].get("requests_in_flight")  # of annotations there are none
    if everything and in_flight:
        refused = summary["counters"].get("requests_refused", 0)
        lines.append(f"  Requests in flight: {in_flight['last']} (peak {in_flight['max']}), {refused} refused")
    return "\n".join(lines)


def headline(summary: Mapping[str, Any], rejects: int = 10, *, was_done: bool = False) -> str:
    """Return the result of a batch in a few lines, at most `rejects` rejects; for 0 their number is omitted as well.

    `was_done` says that the batch was done before this run, which loaded nothing: that is the only line.
    """
    if not summary.get("batch_made", True):
        return "\n".join([*_describe_look(summary), *_describe_rest(summary, rejects)])
    state, qwen = summary["state"], summary["kind"] == KIND_QWEN
    verb = ", it had" if state == "reset" else ":"
    was_done = was_done and state == "done"
    if was_done:
        verb = f" already, since {moment(summary['finished_at'])}: nothing was loaded. It has"
    content = counted(summary["detections_processed"], "detection") if qwen else size(summary["bytes"])
    photos = counted(summary["images_processed"], "photo")
    found = f"{counted(summary['recognitions_processed'], 'recognition')}, {photos}, {content}"
    lines = [f"Batch {summary['batch_id']} is {state}{verb} {found}."]
    if planned := summary.get("planned"):
        done = summary["recognitions_done"]
        steps = f"{'' if qwen else f'{done[UPLOAD]} uploaded, '}{done[COPY]} copied"
        found = f"{counted(planned['recognitions'], 'recognition')} with {counted(planned['images'], 'photo')}"
        lines = [f"Batch {summary['batch_id']} is unfinished: {found} planned, {steps}."]
    if was_done:
        return lines[0]
    if summary.get("adopted"):
        former = summary["adopted_from"]
        lines.append(f"Adopted: another tool loaded it, {f'as {former}' if former else 'without an id'}.")
    if reason := summary["held_reason"]:
        released_at = summary["released_at"]
        then = f", until it was published at {moment(released_at)}" if released_at else ""
        lines.append(printable(f"Held{then}: {reason}"))
    return "\n".join([*lines, *_describe_rest(summary, rejects)])


def describe(summary: Mapping[str, Any], rejects: int = 10, *, was_done: bool = False, everything: bool = False) -> str:
    """Return the headline and, unless nothing was loaded, the performance metrics; see both for the arguments."""
    text = headline(summary, rejects, was_done=was_done)
    if was_done or not summary.get("batch_made", True):
        return text
    return f"{text}\n{performance_metrics(summary, everything=everything)}"


def _describe_look(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about a look that found nothing to load."""
    unit = partial(counted, noun="photo" if summary["kind"] == KIND_QWEN else "recognition")
    yield f"{nothing_to_load(summary['source'], unit(summary['found']))} No batch was made."
    yield f"Looked at {moment(summary['looked_at'])}, on record as {summary['batch_id']}."


def nothing_to_load(source: str, found: str) -> str:
    """Return a sentence about a source that has nothing new."""
    return printable(f"Nothing to load: {source} has {found}.")


def _describe_rest(summary: Mapping[str, Any], rejects: int) -> list[str]:
    """Return lines about what the source has besides the batch."""
    qwen, lines, skipped = summary["kind"] == KIND_QWEN, [], []
    unit = partial(counted, noun="photo") if qwen else str
    if summary["already_loaded"]:
        skipped.append(f"{unit(summary['already_loaded'])} already {'annotated' if qwen else 'loaded'}")
    if summary["held_elsewhere"]:
        skipped.append(f"{unit(summary['held_elsewhere'])} held by unfinished {', '.join(summary['held_by'])}")
    elif summary["held_by"]:
        skipped.append(f"unfinished {', '.join(summary['held_by'])}, which loads some of it anew")
    if summary["beyond_limit"]:
        skipped.append(f"{summary['beyond_limit']} beyond the limit")
    if skipped:
        lines.append(f"Skipped: {'; '.join(skipped)}.")
    if summary["superseded_copies"]:
        twice = "Several keys name the same photo: the one that sorts last"
        if not qwen:
            twice = "Several folders hold the same recognition: the newest with two photos"
        copies = counted(summary["superseded_copies"], "earlier copy was", "earlier copies were")
        lines.append(f"{twice} was taken, {copies} left.")
    if changed := summary.get("changed_since_load"):
        if (versions := summary.get("new_versions")) and summary["state"] == "done":
            new = counted(versions, "loaded recognition is a new version", "loaded recognitions are new versions")
            lines.append(f"{new} of what changed.")
        else:
            lines.append(describe_changed(summary["kind"], changed, summary["changed"]))
    if known := summary.get("known_rejects"):
        lines.append(describe_known(known))
    if files := summary["files"]:
        lines.append(f"Files: {describe_files(files)}.")
    return [*lines, *(_inputs(summary, rejects) if rejects else ())]


def _inputs(summary: Mapping[str, Any], limit: int) -> Iterator[str]:
    """Yield lines about rejects and notices, and the first of them."""
    for what, table in (("rejected", "rejects"), ("noticed", "notices")):
        total = summary[what]
        if not total:
            continue
        yield f"{what.capitalize()}: {total} ({describe_codes(summary[table])})."
        shown = summary[f"{what}_inputs"][:limit]
        yield from (printable(f"  {one['code']}: {one['path']}: {one['message']}") for one in shown)
        if len(shown) < total and summary["state"] != "reset":  # which empties the table
            yield f"  … and {total - len(shown)} more, in the table ingest.{table}"


def read_status(
    settings: Settings, database: Database, *, lists_all: bool = False
) -> tuple[dict[str, Any], list[PipelineError]]:
    """Return the state of services and batches, and the errors of services that failed; latencies in ms.

    Without `lists_all`, the batches are those that changed last, and those that are unfinished.
    """
    result: dict[str, Any] = {"environment": settings.environment, "url": settings.url, "bucket": settings.bucket}
    failures = []

    def examine(name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            result[name] = {"ok": True, **work()}
        except PipelineError as exc:
            failures.append(exc)
            result[name] = {"ok": False, "error": exc.message, "hint": exc.hint}

    recorded: dict[str, datetime | None] = {}
    examine("database", lambda: database.run(_examine_database, read_only=True))
    if result["database"]["ok"] and not result["database"]["migrations_pending"]:
        read = partial(_read_tables, bucket=settings.bucket, lists_all=lists_all)
        result.update(database.run(read, read_only=True))
        recorded = database.run(partial(list_recorded, bucket=settings.bucket), read_only=True)
    examine("storage", lambda: _examine_storage(settings, recorded))
    return result, failures


def _examine_storage(settings: Settings, recorded: Mapping[str, datetime | None]) -> dict[str, Any]:
    with closing(Storage(settings)) as storage:
        storage.find_bucket()  # opens the connection, so that the second call measures only the response
        started = time.perf_counter()
        bucket = prove_bucket(storage, recorded)
    latency = round((time.perf_counter() - started) * 1000, 2)
    public = bool(bucket and bucket.get("public"))
    return {"latency_ms": latency, "bucket_exists": bucket is not None, "bucket_public": public}


def _examine_database(connection: Connection) -> dict[str, Any]:
    started = time.perf_counter()
    version = connection.one("now").version
    return {
        "latency_ms": round((time.perf_counter() - started) * 1000, 2),
        "version": f"{version // 10000}.{version % 10000}",
        "migrations_pending": [one.label for one in pending(connection)],
    }


def _read_tables(connection: Connection, *, bucket: str, lists_all: bool) -> dict[str, Any]:
    batches = connection.execute("list_batches", unfinished=False, count=None if lists_all else _LISTED_BATCHES)
    unfinished = connection.execute("list_batches", unfinished=True, count=None)
    newest = connection.one("describe_newest")
    return {
        "rows": connection.one("count_rows")._asdict(),
        "newest": {name: one and one.isoformat() for name, one in newest._asdict().items() if name != "batches"},
        "proofs": _as_json(connection.one("count_proofs", bucket=bucket, batch_id=None)),
        "last_looks": list(map(_as_json, connection.execute("list_looks"))),
        "last_loads": list(map(_as_json, connection.execute("list_last_loads"))),
        "batches": list(map(_as_json, batches)),
        "more_batches": newest.batches - len(batches),
        "unfinished": list(map(_as_json, unfinished)),
    }


def status_text(result: Mapping[str, Any], production: bool) -> str:
    """Return the state as text."""
    lines = [f"Environment: {result['environment']} ({result['url']})"]
    storage, database = result["storage"], result["database"]
    if storage["ok"]:
        bucket = "exists" if storage["bucket_exists"] else "does not exist yet"
        public = ", PUBLIC" if storage["bucket_public"] else ""
        lines.append(f"Storage: ok, {storage['latency_ms']} ms, bucket {result['bucket']} {bucket}{public}")
    else:
        lines.append(f"Storage: {storage['error']} {storage['hint']}")
    if not database["ok"]:
        return "\n".join([*lines, f"Database: {database['error']} {database['hint']}"])
    lines.append(f"Database: ok, {database['latency_ms']} ms, PostgreSQL {database['version']}")
    if missing := database["migrations_pending"]:
        command = command_line("migrate", production)
        return "\n".join([*lines, f"Migrations: {len(missing)} pending ({', '.join(missing)}): run `{command}`"])
    lines.append("Migrations: up to date")
    lines.append("Rows: " + ", ".join(f"{name} {count}" for name, count in result["rows"].items()))
    lines += _describe_nights(result)
    if proofs := describe_proofs(result["proofs"], production):
        lines.append(f"Content checks: {proofs}")
    lines.append("Batches, the last changed first:" if result["batches"] else "No batch was loaded yet.")
    width = max((len(batch["batch_id"]) for batch in result["batches"]), default=0)
    for batch in result["batches"]:
        changed = moment(batch["reset_at"] or batch["finished_at"] or batch["created_at"])
        content = counted(batch["detections"], "detection") if batch["kind"] == KIND_QWEN else size(batch["bytes"])
        content = f"{counted(batch['recognitions'], 'recognition')}, {content}{', adopted' if batch['adopted'] else ''}"
        lines.append(f"  {batch['batch_id']:<{width}}  {batch['state']:<9}  {changed}  {content}")
    if more := result["more_batches"]:
        lines.append(f"  and {more} more: {command_line('status --all', production)}")
    if result["unfinished"]:
        lines.append("Unfinished:")
    for batch in result["unfinished"]:
        reason = f"{batch['held_reason']} " if batch["state"] == "held" else ""
        lines.append(f"  {batch['batch_id']} is {batch['state']}: {reason}{next_step(batch, production)}")
    return "\n".join(lines)


def _describe_nights(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about the last look and the last load of each kind, and the age of the data."""
    for look in result["last_looks"]:
        name, unit = ("load-qwen", "photo") if look["kind"] == KIND_QWEN else ("load", "recognition")
        made = f"batch {look['batch_id']}" if look["batch_made"] else "nothing to load"
        found = counted(look["found"], unit)
        yield printable(f"Last look ({name}): {moment(look['looked_at'])}, {found} in {look['source']}, {made}")
    for load in result["last_loads"]:
        name = "load-qwen" if load["kind"] == KIND_QWEN else "load"
        loaded = counted(load["recognitions"], "recognition")
        yield f"Last load ({name}): {moment(load['finished_at'])}, {loaded}, batch {load['batch_id']}"
    if captured_on := result["newest"]["captured_on"]:
        yield f"Newest data: captured on {captured_on}"
    elif finished_at := result["newest"]["finished_at"]:
        yield f"Newest data: loaded {moment(finished_at)}, no photo says when it was captured"

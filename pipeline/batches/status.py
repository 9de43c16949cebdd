"""Status: the environment, both services, and the batches."""

from __future__ import annotations

import time
from typing import Any

from pipeline.batches.resolve import reset_command, resume_command
from pipeline.batches.state import KIND_QWEN, batch_from
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.database.migrate import pending
from pipeline.errors import PipelineError
from pipeline.storage import Storage
from pipeline.units import size

_NEWEST = 10


def status(settings: Settings, database: Database) -> tuple[dict[str, Any], list[PipelineError]]:
    """Return the state of services and batches, and the errors of services that failed; latencies in ms."""
    failures: list[PipelineError] = []
    result: dict[str, Any] = {"environment": settings.environment, "url": settings.url, "bucket": settings.bucket}
    result["storage"] = _storage(settings, failures)
    result["database"] = _database(database, failures)
    if result["database"]["ok"] and not result["database"]["migrations_pending"]:
        result.update(database.run(_tables, read_only=True))
    return result, failures


def _storage(settings: Settings, failures: list[PipelineError]) -> dict[str, Any]:
    storage = Storage(settings)
    try:
        storage.find_bucket()  # opens the connection, so that the second call measures only the response
        started = time.perf_counter()
        bucket = storage.find_bucket()
        latency = (time.perf_counter() - started) * 1000
    except PipelineError as exc:
        failures.append(exc)
        return {"ok": False, "error": exc.message, "hint": exc.hint}
    finally:
        storage.close()
    return {
        "ok": True,
        "latency_ms": round(latency, 2),
        "bucket_exists": bucket is not None,
        "bucket_public": bool(bucket and bucket.get("public")),
    }


def _database(database: Database, failures: list[PipelineError]) -> dict[str, Any]:
    def ask(connection: Connection) -> tuple[float, int, list[str]]:
        started = time.perf_counter()
        version = connection.one("now").version
        latency = (time.perf_counter() - started) * 1000
        return latency, version, [f"{one.version}_{one.name}" for one in pending(connection)]

    try:
        latency, version, missing = database.run(ask, read_only=True)
    except PipelineError as exc:
        failures.append(exc)
        return {"ok": False, "error": exc.message, "hint": exc.hint}
    return {
        "ok": True,
        "latency_ms": round(latency, 2),
        "version": f"{version // 10000}.{version % 10000}",
        "migrations_pending": missing,
    }


def _tables(connection: Connection) -> dict[str, Any]:
    counts = connection.one("count_rows")._asdict()
    newest = [_batch(batch_from(row)) for row in connection.execute("list_batches", count=_NEWEST)]
    unfinished = [_batch(batch_from(row)) for row in connection.execute("list_unfinished")]
    return {"rows": counts, "batches": newest, "unfinished": unfinished}


def _batch(batch: Any) -> dict[str, Any]:
    return {
        "batch_id": batch.id,
        "kind": batch.kind,
        "state": batch.state,
        "source": batch.source,
        "limit": batch.limit,
        "force": batch.force,
        "recognitions": batch.recognitions,
        "bytes": batch.bytes,
        "detections": batch.detections,
        "created_at": batch.created_at.isoformat(),
        "finished_at": batch.finished_at.isoformat() if batch.finished_at else None,
        "reset_at": batch.reset_at.isoformat() if batch.reset_at else None,
    }


def _command(batch: dict[str, Any], production: bool) -> str:
    """Return the command that finishes an unfinished batch."""
    if batch["state"] == "resetting":
        return reset_command(batch["batch_id"], production)
    return resume_command(batch["batch_id"], batch["kind"], batch["limit"], batch["force"], production)


def _content(batch: dict[str, Any]) -> str:
    return f"{batch['detections']} detections" if batch["kind"] == KIND_QWEN else size(batch["bytes"])


def as_text(result: dict[str, Any], production: bool) -> str:
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
        lines.append(f"Database: {database['error']} {database['hint']}")
        return "\n".join(lines)
    lines.append(f"Database: ok, {database['latency_ms']} ms, PostgreSQL {database['version']}")
    missing = database["migrations_pending"]
    if missing:
        lines.append(f"Migrations: {len(missing)} pending ({', '.join(missing)}): run `python -m pipeline migrate`")
        return "\n".join(lines)
    lines.append("Migrations: up to date")
    lines.append("Rows: " + ", ".join(f"{name} {count}" for name, count in result["rows"].items()))
    if result["batches"]:
        lines.append("Newest batches:")
        width = max(len(batch["batch_id"]) for batch in result["batches"])
        for batch in result["batches"]:
            when = batch["reset_at"] or batch["finished_at"] or batch["created_at"]
            lines.append(
                f"  {batch['batch_id']:<{width}}  {batch['state']:<9}  {when[:19].replace('T', ' ')}  "
                f"{batch['recognitions']} recognitions, {_content(batch)}"
            )
    else:
        lines.append("No batch was loaded yet.")
    if result["unfinished"]:
        lines.append("Unfinished:")
        for batch in result["unfinished"]:
            lines.append(f"  {batch['batch_id']} is {batch['state']}: {_command(batch, production)}")
    return "\n".join(lines)

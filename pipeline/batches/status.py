"""Status: the environment, both services, and the batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from pipeline.batches.resolve import reset_command, resume_command
from pipeline.batches.state import KIND_QWEN, Batch
from pipeline.config import Settings, command_line
from pipeline.database import Connection, Database
from pipeline.database.migrate import pending
from pipeline.errors import PipelineError
from pipeline.storage import Storage
from pipeline.units import moment, size

_SHOWN = 10
_FIELDS = ("kind", "state", "source", "limit", "force", "recognitions", "bytes", "detections")
_TIMES = ("created_at", "finished_at", "reset_at")


def status(settings: Settings, database: Database) -> tuple[dict[str, Any], list[PipelineError]]:
    """Return the state of services and batches, and the errors of services that failed; latencies in ms."""
    result: dict[str, Any] = {"environment": settings.environment, "url": settings.url, "bucket": settings.bucket}
    failures = []
    services: Mapping[str, Callable[[], dict[str, Any]]] = {
        "storage": lambda: _examine_storage(settings),
        "database": lambda: database.run(_examine_database, read_only=True),
    }
    for name, examine in services.items():
        try:
            result[name] = {"ok": True, **examine()}
        except PipelineError as exc:
            failures.append(exc)
            result[name] = {"ok": False, "error": exc.message, "hint": exc.hint}
    if result["database"]["ok"] and not result["database"]["migrations_pending"]:
        result.update(database.run(_read_tables, read_only=True))
    return result, failures


def _examine_storage(settings: Settings) -> dict[str, Any]:
    with closing(Storage(settings)) as storage:
        storage.find_bucket()  # opens the connection, so that the second call measures only the response
        started = time.perf_counter()
        bucket = storage.find_bucket()
        latency = round((time.perf_counter() - started) * 1000, 2)
    public = bool(bucket and bucket.get("public"))
    return {"latency_ms": latency, "bucket_exists": bucket is not None, "bucket_public": public}


def _examine_database(connection: Connection) -> dict[str, Any]:
    started = time.perf_counter()
    version = connection.one("now").version
    return {
        "latency_ms": round((time.perf_counter() - started) * 1000, 2),
        "version": f"{version // 10000}.{version % 10000}",
        "migrations_pending": [f"{one.version}_{one.name}" for one in pending(connection)],
    }


def _read_tables(connection: Connection) -> dict[str, Any]:
    def batches(statement: str, **parameters: object) -> list[dict[str, Any]]:
        rows = connection.execute(statement, **parameters)
        return [Batch(**row._asdict()).as_dict(*_FIELDS, *_TIMES) for row in rows]

    return {
        "rows": connection.one("count_rows")._asdict(),
        "batches": batches("list_batches", count=_SHOWN),
        "unfinished": batches("list_unfinished"),
    }


def as_text(result: Mapping[str, Any], production: bool) -> str:
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
    missing = database["migrations_pending"]
    if missing:
        command = command_line("migrate", production)
        return "\n".join([*lines, f"Migrations: {len(missing)} pending ({', '.join(missing)}): run `{command}`"])
    lines.append("Migrations: up to date")
    lines.append("Rows: " + ", ".join(f"{name} {count}" for name, count in result["rows"].items()))
    lines.append("Batches, the last changed first:" if result["batches"] else "No batch was loaded yet.")
    width = max((len(batch["batch_id"]) for batch in result["batches"]), default=0)
    for batch in result["batches"]:
        changed = moment(batch["reset_at"] or batch["finished_at"] or batch["created_at"])
        content = f"{batch['detections']} detections" if batch["kind"] == KIND_QWEN else size(batch["bytes"])
        lines.append(
            f"  {batch['batch_id']:<{width}}  {batch['state']:<9}  {changed}  "
            f"{batch['recognitions']} recognitions, {content}"
        )
    if result["unfinished"]:
        lines.append("Unfinished:")
    for batch in result["unfinished"]:
        if batch["state"] == "resetting":
            command = reset_command(batch["batch_id"], production)
        else:
            command = resume_command(batch["batch_id"], batch["kind"], batch["limit"], batch["force"], production)
        lines.append(f"  {batch['batch_id']} is {batch['state']}: {command}")
    return "\n".join(lines)

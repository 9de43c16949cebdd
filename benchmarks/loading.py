"""What a whole load costs at several sizes, each beside the smallest, and what it asks of the services."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import MEDIUM, Bench, Run, World, empty
from benchmarks.rows import Row
from pipeline.batches.summary import active_seconds

LIMIT_MB = 250
WORKERS = 4
_STEPS = ("discover", "upload", "copy", "transform")


def loading(place: Bench, sizes: tuple[int, ...], counted: int) -> list[Row]:
    """Load datasets of several sizes with four workers; then one through relays that count."""
    rows: list[Row] = []
    smallest: tuple[int, Run] | None = None
    for recognitions in sizes:
        dataset = place.dataset(recognitions, MEDIUM)
        with place.world() as world:
            run = world.load(dataset, "--workers", str(WORKERS))
            smallest = smallest or (recognitions, run)
            rows += _size(world, dataset, recognitions, run, smallest)
        empty(dataset)
    return rows + _counted(place, counted)


def _size(world: World, dataset: Path, recognitions: int, run: Run, smallest: tuple[int, Run]) -> list[Row]:
    first, other = smallest
    whole = run.seconds / recognitions * 1000
    rows = [
        Row(f"{recognitions:,} recognitions: time of one / at {first:,}", whole, other.seconds / first * 1000, "ms")
    ]
    for step in _STEPS:
        spent = _step_seconds(world, dataset.name, step) / recognitions * 1000
        rows.append(Row(f"  at least one {step} at work / whole", spent, whole, "ms"))
    for name, seconds in {"the loader": run.processor, **run.services}.items():
        rows.append(Row(f"  processor, {name} / all", seconds, run.all_processor, "s"))
    return [
        *rows,
        Row("  processors, the slowest resource: busy / always", run.busy, 1.0, ""),
        Row(
            f"  processor of one / at {first:,}",
            run.all_processor / recognitions * 1000,
            other.all_processor / first * 1000,
            "ms",
        ),
        Row(f"  largest process / at {first:,}", run.megabytes, other.megabytes, "MB"),
        Row("  largest process / limit", run.megabytes, LIMIT_MB, "MB"),
    ]


def _step_seconds(world: World, batch_id: str, step: str) -> float:
    rows = world.query(
        "SELECT started_at, finished_at FROM ingest.batch_state WHERE batch_id = %s AND step = %s", batch_id, step
    )
    return active_seconds([(started, finished) for started, finished in rows])


def _counted(place: Bench, recognitions: int) -> list[Row]:
    dataset = place.dataset(recognitions, MEDIUM)
    with place.world() as world, world.database_relay() as database, world.storage_relay() as storage:
        world.through(database, storage).load(dataset, "--workers", str(WORKERS))
        ((markers,),) = world.query("SELECT count(*) FROM ingest.batch_state WHERE batch_id = %s", dataset.name)
    empty(dataset)
    statements = sum(database.statements.values())
    return [
        Row(f"{recognitions:,} recognitions: SQL statements / tasks", statements, markers, ""),
        Row("  SQL statements / recognitions", statements, recognitions, ""),
        Row("  connections to PostgreSQL / tasks", database.connections, markers, ""),
        Row("  HTTP requests / photos", storage.turns, 2 * recognitions, ""),
    ]

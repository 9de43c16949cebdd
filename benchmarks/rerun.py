"""A load that has nothing to do, beside the start of the interpreter with the libraries; how much SQL it takes."""

from __future__ import annotations

from statistics import median

from benchmarks.bench import SMALL, Bench
from benchmarks.processes import cost_of
from benchmarks.rows import Row

_LIMIT_SECONDS = 1.0
_SHARD = 10
IMPORTS = "import luigi, sqlalchemy"


def rerun(place: Bench, sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """Load batches of several sizes, in shards of ten, and then again."""
    rows: list[Row] = []
    sent: dict[int, tuple[int, int]] = {}
    for recognitions in sizes:
        dataset = place.dataset(recognitions, SMALL)
        with place.world() as fresh:
            world = fresh.tuned(batch_size=_SHARD)
            world.load(dataset)
            again, imports = [], []
            for _ in range(repeats):
                imports.append(cost_of(IMPORTS)[0])
                again.append(world.load(dataset).seconds)
            with world.database_relay() as database:
                world.through(database).load(dataset)
        beyond = median(again) - median(imports)
        sent[recognitions] = statements, turns = sum(database.statements.values()), database.turns
        least = sent[sizes[0]]
        rows += [
            Row(f"{recognitions} recognitions: beyond the imports / limit", beyond, _LIMIT_SECONDS, "s"),
            Row("  whole command / imports", median(again), median(imports), "s"),
            Row(f"  SQL statements / at {sizes[0]}", statements, least[0], ""),
            Row(f"  round trips / at {sizes[0]}", turns, least[1], ""),
        ]
    return rows

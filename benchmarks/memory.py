"""The largest resident memory of any process of a load, beside the limit of 250 MB."""

from __future__ import annotations

from benchmarks.bench import REAL, Bench, empty
from benchmarks.loading import LIMIT_MB
from benchmarks.rows import Row


def memory(place: Bench, sizes: tuple[int, ...]) -> list[Row]:
    """Load photos of about 120 kB, in one process and with four workers."""
    rows = []
    for recognitions in sizes:
        dataset = place.dataset(recognitions, REAL)
        for workers in (1, 4):
            with place.world() as world:
                run = world.load(dataset, "--workers", str(workers))
            what = f"{recognitions:,} recognitions, workers: {workers} / limit"
            rows.append(Row(what, run.megabytes, LIMIT_MB, "MB"))
        empty(dataset)
    return rows

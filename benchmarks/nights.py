"""The look of a night on which there is nothing to load, beside one that only counts the files."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import SMALL, Bench
from benchmarks.rows import Row, middle
from pipeline.database import Database
from pipeline.dataset.passed import count_below
from pipeline.dataset.records import UNCHANGED
from pipeline.steps import changed
from pipeline.steps.discover import Request, discover


def nights(place: Bench, recognitions: int, repeats: int) -> list[Row]:
    """Load a dataset, then look at it with `--changed`, in this process, and without any comparison of files."""
    dataset = place.dataset(recognitions, SMALL)
    with place.world() as world:
        world.load(dataset)
        quiet = world.run("load", "--source", str(dataset), "--changed", "--local-scheduler", "--json")
        corrected = sorted(dataset.rglob("*_AM.json"))[::1000]
        for path in corrected:
            path.write_bytes(path.read_bytes() + b"\n")
        found = world.run("load", "--source", str(dataset), "--local-scheduler", "--dry-run", "--json")
        with closing(Database(world.settings)) as database:
            request = Request.of(world.settings, "night", str(dataset), changed=True)
            look = partial(_seconds, database, request)
            pairs = [(look(), look(compares=False)) for _ in range(repeats)]
    differ = found.result["changed_since_load"]
    return [
        middle(f"{recognitions} recognitions: look / the same without comparing files", pairs, "s"),
        Row("  whole command / limit", quiet.seconds, max(1.0, recognitions / 4000), "s"),
        Row("  changed recognitions found / corrected menus", differ, len(corrected), ""),
    ]


def _seconds(database: Database, request: Request, *, compares: bool = True) -> float:
    """Return the seconds of a look."""
    compare = changed._count_untouched
    if not compares:
        changed._count_untouched = _count  # as a load did before it compared files
    begin = time.perf_counter()
    try:
        discover(database, request, dry_run=True)
    finally:
        changed._count_untouched = compare
    return time.perf_counter() - begin


def _count(source: str, row: Any) -> int:
    return count_below(Path(source), row.paths[0], UNCHANGED).files.total()

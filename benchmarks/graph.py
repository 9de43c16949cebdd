"""What Luigi and the questions for markers cost a task, beside the same functions called in a loop."""

from __future__ import annotations

from benchmarks.bench import MEDIUM, SMALL, Bench
from benchmarks.rows import Row, middle

_WORKERS = 4
_SHARD = 100


def graph(place: Bench, tasks: tuple[int, ...], repeats: int, loaded: int) -> list[Row]:
    """Load shards of one small recognition each; then relate what a task costs to a load of real shards.

    Arguments:
        tasks: how many, an upload and a copy for each shard; a batch has 490 shards at most.
        loaded: recognitions of the load that tells what one costs, with four workers.
    """
    rows = []
    overhead = {1: 0.0, _WORKERS: 0.0}
    for number in tasks:
        shards = min(number // 2, 490)
        dataset = place.dataset(shards, SMALL)
        for workers in overhead:
            pairs = []
            for turn in range(repeats):
                pair = {}
                for ours in (True, False) if turn % 2 else (False, True):
                    with place.world() as fresh:
                        world = fresh.tuned(batch_size=1)
                        options = ("--workers", str(workers))
                        identity = (str(dataset), "--batch-id", dataset.name)
                        pair[ours] = (
                            world.load(dataset, *options)
                            if ours
                            else world.run(*identity, *options, module="benchmarks.direct")
                        )
                pairs.append((pair[True].seconds, pair[False].seconds))
            row = middle(f"{2 * shards} tasks, {_people(workers)}: load / bare functions", pairs, "s")
            overhead[workers] = (row.ours - row.reference) / (2 * shards)
            rows += [row, Row("  of it for each task / a task of the load", *_each(row, 2 * shards), "ms")]
    return rows + _share(place, loaded, overhead[_WORKERS])


def _each(row: Row, tasks: int) -> tuple[float, float]:
    return (row.ours - row.reference) / tasks * 1000, row.ours / tasks * 1000


def _people(workers: int) -> str:
    return "1 process" if workers == 1 else f"{workers} processes"


def _share(place: Bench, recognitions: int, overhead: float) -> list[Row]:
    dataset = place.dataset(recognitions, MEDIUM)
    with place.world() as world:
        one = world.load(dataset, "--workers", str(_WORKERS)).seconds / recognitions
    return [
        Row(
            f"a recognition's share of two tasks for {_SHARD}, {_people(_WORKERS)} / its load",
            overhead * 2 / _SHARD * 1000,
            one * 1000,
            "ms",
        )
    ]

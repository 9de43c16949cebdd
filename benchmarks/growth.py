"""What a recognition costs on top of many that are there already, beside an empty database."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.bench import SMALL, Bench, Run
from benchmarks.rows import Row, middle
from benchmarks.seeding import seed


def growth(place: Bench, loaded: tuple[int, ...], template: int, added: int, repeats: int) -> list[Row]:
    """Load the same small photos into an empty database and on top of others, taking turns.

    Arguments:
        loaded: how many are there already; multiples of `template`.
        template: recognitions that are loaded, of which the others are copies.
        added: recognitions that come.
    """
    rows: list[Row] = []
    with ExitStack() as stack:
        origin = place.dataset(template, SMALL)
        worlds = {}
        for there in loaded:
            worlds[there] = stack.enter_context(place.world())
            seed(worlds[there], origin, there // template - 1)
        runs: dict[int, list[tuple[Run, Run]]] = {there: [] for there in loaded}
        for turn in range(repeats):
            dataset = place.dataset(added, SMALL)
            order = sorted(loaded, reverse=bool(turn % 2))
            for there in order:
                with place.world() as empty:
                    before = empty.load(dataset)
                runs[there].append((worlds[there].load(dataset), before))
    for there, pairs in runs.items():
        what = f"{added:,} more on top of {there:,} / on nothing: "
        for name, seconds in (
            ("whole load", lambda run: run.seconds),
            ("discovery", lambda run: _seconds(run, "discover")),
            ("COPY", lambda run: _seconds(run, "db_bulk_copy")),
            ("transform", lambda run: run.result["operations"]["transform"]["total_seconds"]),
        ):
            each = [(seconds(ours) / added * 1000, seconds(before) / added * 1000) for ours, before in pairs]
            rows.append(middle(what + name, each, "ms"))
    return rows


def _seconds(run: Run, prefix: str) -> float:
    operations = run.result["operations"]
    return float(sum(entry["total_seconds"] for name, entry in operations.items() if name.startswith(prefix)))

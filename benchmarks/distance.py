"""A database that is far away: what the same load takes there, and how often it waits for an answer."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import MEDIUM, Bench
from benchmarks.processes import cost_of
from benchmarks.rerun import IMPORTS
from benchmarks.rows import Row

_COMMITS = 2


def distance(place: Bench, recognitions: int, delay: float = 0.025) -> list[Row]:
    """Load beside the database, and `delay` seconds each way away from it, with one worker."""
    dataset = place.dataset(recognitions, MEDIUM)
    with place.world() as world:
        near = world.load(dataset).seconds
    with place.world() as world, world.database_relay(delay) as relay:
        run = world.through(relay).load(dataset)
        far, turns, shards = run.seconds, relay.turns, int(run.result["shards"])
        relay.forget()
        again = world.through(relay).load(dataset).seconds - cost_of(IMPORTS)[0]
        turns_again, connections_again = relay.turns, relay.connections
    more_turns, more_shards = _more_shards(place, dataset, max(1, recognitions // (2 * shards)))
    round_trip = 2 * delay
    return [
        Row(f"whole load, {delay * 1000:.0f} ms each way / none", far, near, "s"),
        Row("  waiting for the database, were it one by one / whole", turns * round_trip, far, "s"),
        Row(
            "round trips of one more shard / its commits",
            (more_turns - turns) / (more_shards - shards),
            _COMMITS,
            "",
        ),
        Row("  round trips of the load / shards", turns, shards, ""),
        Row("no-op re-run, beyond the imports / limit", again, 1.0, "s"),
        Row(
            "  round trips and connections / the time they take",
            (turns_again + connections_again) * round_trip,
            again,
            "s",
        ),
    ]


def _more_shards(place: Bench, dataset: Path, batch_size: int) -> tuple[int, int]:
    with place.world() as world, world.database_relay() as relay:
        run = world.through(relay).tuned(batch_size=batch_size).load(dataset)
        return relay.turns, int(run.result["shards"])

"""What annotations cost on top of many that are there already, beside a database without any."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.annotating import write_annotations
from benchmarks.bench import SMALL, Bench, Run, World
from benchmarks.rows import Row, middle
from benchmarks.seeding import seed


def annotated(place: Bench, template: int, copies: int, added: int, repeats: int) -> list[Row]:
    """Load annotations of equally many recognitions into two databases, taking turns.

    Arguments:
        template: recognitions that are loaded, of which the others are copies.
        copies: copies of the template that have annotations in the one database before.
        added: copies of the template whose annotations come in a turn.
        repeats: turns.
    """
    origin = place.dataset(template, SMALL)

    def annotate(world: World, span: range) -> Run:
        path = place.folder / "annotated.json"
        write_annotations(path, origin, template, span)
        identity = ("--file", str(path), "--batch-id", f"a{span.start}")
        run = world.run("load-qwen", *identity, "--local-scheduler", "--json")
        path.unlink()
        return run

    with ExitStack() as stack:
        full, none = (stack.enter_context(place.world()) for _ in range(2))
        seed(full, origin, copies + added * repeats - 1)
        seed(none, origin, added * repeats - 1)
        before = annotate(full, range(copies))
        full.maintain("VACUUM (ANALYZE)")  # which autovacuum would do during the turns
        pairs = []
        for first in range(0, added * repeats, added):
            beside = annotate(none, range(first, first + added))
            pairs.append((annotate(full, range(copies + first, copies + first + added)), beside))
    there, more = (run.result["detections_processed"] for run in (before, pairs[0][0]))
    one, other = (run.seconds * 1e6 / run.result["detections_processed"] for run in (before, pairs[0][1]))
    seconds = [(ours.seconds, beside.seconds) for ours, beside in pairs]
    return [
        middle(f"{more:,} detections more on top of {there:,} / on none", seconds, "s"),
        Row(f"  one batch of {there:,} / of {more:,}", one, other, "us each"),
    ]

"""One large dataset through every command: loaded, annotated, changed, verified and reset, beside a small one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bench import SMALL, Bench, World, empty
from benchmarks.loading import LIMIT_MB
from benchmarks.processes import Watch
from benchmarks.rows import Row
from pipeline.sample.writer import ANNOTATIONS

_WORKERS = 2
#: One recognition in so many gets another receipt, and one in ten of those another photo.
_CHANGED = 100
_TENTHS = """
SELECT sum(b.finished_at - b.started_at) / sum(b.recognitions)
FROM (
    SELECT extract(epoch FROM s.started_at)::float AS started_at,
        extract(epoch FROM s.finished_at)::float AS finished_at, ntile(10) OVER (ORDER BY s.shard) AS tenth,
        (SELECT count(*) FROM ingest.manifest m WHERE m.batch_id = s.batch_id AND m.shard = s.shard) AS recognitions
    FROM ingest.batch_state s
    WHERE s.batch_id = %s AND s.step = %s
) b
GROUP BY b.tenth ORDER BY b.tenth
"""
_TABLES = """
SELECT n.nspname || '.' || c.relname, pg_total_relation_size(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname IN ('ingest', 'raw', 'public')
ORDER BY 2 DESC LIMIT 12
"""
_LEFT = """
SELECT (SELECT count(*) FROM public.recognitions) + (SELECT count(*) FROM public.initial_annotations)
    + (SELECT count(*) FROM raw.receipts) + (SELECT count(*) FROM raw.detections)
    + (SELECT count(*) FROM ingest.manifest)
"""


@dataclass
class _Found:
    """What one size came to.

    Attributes:
        milliseconds: of a recognition, by command.
        megabytes: of the largest process in any command, by role.
        tenths: milliseconds of a recognition in each tenth of the shards, by step.
        tables: bytes of a recognition in the largest tables.
    """

    milliseconds: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)
    tenths: dict[str, list[float]] = field(default_factory=dict)
    tables: dict[str, float] = field(default_factory=dict)


def large(place: Bench, sizes: tuple[int, int]) -> list[Row]:
    """Take a small and a large dataset through every command.

    Raises:
        SystemExit: a command failed, or what it left is not what it should have left.
    """
    small, whole = (_take_through(place, size) for size in sizes)
    of, at = f"{sizes[1]:,} recognitions", f"at {sizes[0]:,}"
    rows = [
        Row(f"{of}: {name} / {at}", ours, small.milliseconds[name], "ms each")
        for name, ours in whole.milliseconds.items()
    ]
    for step, tenths in whole.tenths.items():
        rows += [Row(f"{step}, tenth {n} / first", ours, tenths[0], "ms each") for n, ours in enumerate(tenths, 1)]
    for name, ours in whole.megabytes.items():
        rows.append(Row(f"largest process, {name} / limit", ours, LIMIT_MB, "MB"))
    total = sum(whole.tables.values())
    return rows + [Row(f"{name} / all of these", ours, total, "bytes each") for name, ours in whole.tables.items()]


def _take_through(place: Bench, recognitions: int) -> _Found:
    found, dataset = _Found(), place.dataset(recognitions, SMALL)
    common = ("--workers", str(_WORKERS), "--local-scheduler", "--json")
    load = ("load", "--source", str(dataset), *common)
    with place.world() as world:

        def run(name: str, *command: str, expected: dict[str, object]) -> None:
            with _watched(world) as services:
                ended = world.run(*command)
            got = {key: ended.result.get(key) for key in expected}
            if got != expected:
                raise SystemExit(f"{name}: expected {expected}, got {got}")
            found.milliseconds[name] = ended.seconds / recognitions * 1000
            for role, peak in {"loader": ended.megabytes, **services}.items():
                found.megabytes[role] = max(found.megabytes.get(role, 0.0), peak)

        run("load", *load, "--batch-id", "first", expected={"recognitions_processed": recognitions})
        for step in ("upload", "copy"):
            found.tenths[step] = [seconds * 1000 for (seconds,) in world.query(_TENTHS, "first", step)]
        run("load, nothing new", *load, "--batch-id", "none", expected={"recognitions_processed": 0})
        annotations = ("--file", str(dataset / ANNOTATIONS), "--batch-id", "boxes")
        run("load-qwen", "load-qwen", *annotations, *common, expected={"state": "done"})
        number = _change(dataset)
        changed = (*load, "--batch-id", "second", "--changed")
        run("load --changed", *changed, expected={"recognitions_processed": number})
        run("verify", "verify", "--json", expected={"differences": []})
        found.tables = {name: size / recognitions for name, size in world.query(_TABLES)}
        for batch in ("second", "boxes", "first"):
            run(f"reset {batch}", "reset", "--batch-id", batch, "--confirm", "--json", expected={"state": "reset"})
        if left := world.query(_LEFT)[0][0]:
            raise SystemExit(f"{left} rows are left after the resets")
        run("verify, nothing left", "verify", "--json", expected={"differences": []})
    empty(dataset)
    return found


@contextmanager
def _watched(world: World) -> Iterator[dict[str, float]]:
    """Watch the services; give, after the block, the MB that the largest process of each had for itself."""
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        watches = {name: stack.enter_context(Watch(pid, "RssAnon")) for name, pid in world.processes.items()}
        yield peaks
    peaks |= {name: watch.peak for name, watch in watches.items()}


def _change(dataset: Path) -> int:
    """Add a line to one receipt in a hundred, and take another photo for one recognition in a thousand."""
    receipts = sorted(dataset.rglob("*_correct_dishes.json"))[::_CHANGED]
    others = [next(path.parent.glob("photos/*_Main.jpg")).read_bytes() for path in receipts[-2:]]
    for number, path in enumerate(receipts):
        lines = json.loads(path.read_bytes().decode("utf-8-sig"))
        lines.append({"Count": 1, "Dishes": [{"Name": "added later", "ExternalId": "added"}]})
        path.write_text(json.dumps(lines), encoding="utf-8")
        if number % 10 == 0 and number < len(receipts) - 2:
            photo = next(path.parent.glob("photos/*_Main.jpg"))
            os.unlink(photo)
            photo.write_bytes(others[number // 10 % 2])
    return len(receipts)

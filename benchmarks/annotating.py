"""Detections a second of an annotations file, beside a plain pass of the JSON parser over it and a COPY of its rows."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from benchmarks.adopting import APP
from benchmarks.bench import SMALL, Bench
from benchmarks.domain import copy, export
from benchmarks.loading import LIMIT_MB
from benchmarks.rows import Row
from benchmarks.seeding import seed
from pipeline.sample.writer import ANNOTATIONS
from pipeline.storage import Storage

#: The rows that a load of annotations adds.
_TABLES = {
    "initial_tray_items": "SELECT t.* FROM public.initial_tray_items t JOIN ingest.manifest m USING (recognition_id)"
    " WHERE m.batch_id = 'a' AND t.source = 'MODEL'",
    "initial_annotations": "SELECT t.* FROM public.initial_annotations t JOIN public.images i ON i.id = t.image_id"
    " JOIN ingest.manifest m USING (recognition_id) WHERE m.batch_id = 'a'",
}


def annotating(place: Bench, megabytes: tuple[int, ...], template: int, copied: int) -> list[Row]:
    """Load annotations of several sizes for recognitions that were made with SQL.

    Arguments:
        megabytes: sizes of the file.
        template: recognitions that are loaded, of which the others are copies.
        copied: megabytes of the file whose rows are copied to compare, in an empty project and in an app's.
    """
    origin = place.dataset(template, SMALL)
    rows = [_compare(place, origin, template, copied, project) for project in (None, APP)]
    smallest = 0.0
    for size in megabytes:
        path = place.folder / f"annotations{size}.json"
        copies = _write(path, origin, template, size * 1_000_000)
        with place.world() as world:
            seed(world, origin, copies)
            run = world.run("load-qwen", "--file", str(path), "--batch-id", path.stem, "--local-scheduler", "--json")
            whole = world.run(str(path), module="benchmarks.parse")
            stream = world.run(str(path), "--stream", module="benchmarks.parse")
        path.unlink()
        detections = run.result["detections_processed"]
        smallest = smallest or run.megabytes
        rate = detections / run.seconds
        rows += [
            Row(f"{size} MB: load-qwen / json.load", rate, detections / whole.result["seconds"], "detections/s"),
            Row("  load-qwen / plain pass of our parser", rate, detections / stream.result["seconds"], "detections/s"),
            *(
                Row(f"  {name} / whole", entry["total_seconds"], run.seconds, "s")
                for name, entry in run.result["operations"].items()
                if name in ("discover_annotations", "discover_manifest", "db_bulk_copy", "transform")
            ),
            Row("  processors busy / always", run.busy, 1.0, ""),
            Row("  largest process / limit", run.megabytes, LIMIT_MB, "MB"),
            Row(f"  largest process / at {megabytes[0]} MB", run.megabytes, smallest, "MB"),
            Row("  largest process / json.load", run.megabytes, whole.megabytes, "MB"),
        ]
    return rows


def _compare(place: Bench, origin: Path, template: int, megabytes: int, project: Path | None) -> Row:
    """Load annotations, then copy the rows that were added."""
    path = place.folder / "annotations.json"
    copies = _write(path, origin, template, megabytes * 1_000_000)
    with place.world(project=project) as world:
        with closing(Storage(world.settings)) as storage:
            storage.ensure_bucket()
        seed(world, origin, copies)
        run = world.run("load-qwen", "--file", str(path), "--batch-id", "a", "--local-scheduler", "--json")
        files = export(world, place.folder, _TABLES)
        world.run("reset", "--batch-id", "a", "--confirm", "--json")
        world.maintain("VACUUM (ANALYZE)")
        detections = run.result["detections_processed"]
        where = "an app's project" if project else "an empty project"
        what = f"{megabytes} MB in {where}: load-qwen / COPY of its rows"
        return Row(what, detections / run.seconds, detections / copy(world, files), "detections/s")


def write_annotations(path: Path, origin: Path, recognitions: int, copies: range) -> None:
    """Write the annotations of a dataset once for each of these copies of its recognitions."""
    content = json.loads((origin / ANNOTATIONS).read_text(encoding="utf-8"))
    entries = [
        (key, key.split("recognition_", 1)[1].split("/", 1)[0], json.dumps(value)) for key, value in content.items()
    ]
    with open(path, "w", encoding="utf-8") as file:
        separator = "{\n"
        for copy_number in copies:
            for key, number, value in entries:
                fresh = key.replace(number, str(int(number) + copy_number * recognitions))
                file.write(f"{separator}{json.dumps(fresh)}: {value}")
                separator = ",\n"
        file.write("\n}\n")


def _write(path: Path, origin: Path, recognitions: int, size: int) -> int:
    """Write the annotations of a dataset and of its copies, at least so many bytes; return how many copies."""
    copies = -(-size // (origin / ANNOTATIONS).stat().st_size)
    write_annotations(path, origin, recognitions, range(copies))
    return copies - 1

"""Discovery of very many folders, and the look of `--changed` over them, beside a plain walk over the same folders."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.bench import SMALL, Bench
from benchmarks.loading import LIMIT_MB
from benchmarks.rows import Row

#: Seconds for a million folders.
_DISCOVERY, _LOOK = 120, 180
#: A batch whose files are on record as if they were loaded; a look reads no other rows of public and raw.
_DONE = (
    "UPDATE ingest.batches SET state = 'done', version = 1, finished_at = clock_timestamp()",
    "DELETE FROM ingest.claims",
    "INSERT INTO public.recognitions (id, batch_id) SELECT recognition_id, batch_id FROM ingest.manifest",
)


def million(place: Bench, folders: int, template: int) -> list[Row]:
    """Discover folders whose files are links to those of a template, and look at them again.

    Raises:
        SystemExit: a command failed, or found another number of recognitions.
    """
    dataset = _multiply(place.dataset(template, SMALL), place.folder / "folders", folders)
    begin = time.perf_counter()
    files = sum(len(names) for _, _, names in os.walk(dataset))
    walk = time.perf_counter() - begin
    source = ("--source", str(dataset), "--json")
    with place.world() as world:
        found = world.run("discover", "--batch-id", "discovered", *source)
        world.transact(_DONE, {})
        world.maintain("ANALYZE")
        look = world.run("load", "--batch-id", "none", "--changed", "--local-scheduler", *source)
        [(count,)] = world.query("SELECT count(*) FROM public.recognitions")
    if (count, look.result["recognitions_processed"]) != (folders, 0):
        raise SystemExit(f"{count} of {folders} recognitions were found: {look.result}")
    return [
        Row(f"discovery of {folders:,} folders / limit", found.seconds, _DISCOVERY * folders / 1e6, "s"),
        Row(f"  the same / a walk over their {files:,} files", found.seconds, walk, "s"),
        Row("  largest process / limit", found.megabytes, LIMIT_MB, "MB"),
        Row("look of --changed / limit", look.seconds, _LOOK * folders / 1e6, "s"),
        Row("  the same / a walk", look.seconds, walk, "s"),
        Row("  largest process / limit", look.megabytes, LIMIT_MB, "MB"),
    ]


def _multiply(origin: Path, target: Path, folders: int) -> Path:
    """Make folders of as many recognitions from links to the files of a dataset; return where they are."""
    originals = sorted(origin.glob("*/recognition_*"))
    first = int(originals[0].name.removeprefix("recognition_"))
    files = [[path.relative_to(one) for path in one.rglob("*") if path.is_file()] for one in originals]
    for nth in range(folders):
        original, number = originals[nth % len(originals)], str(first + nth)
        former = original.name.removeprefix("recognition_")
        folder = target / original.parent.name / f"recognition_{number}"
        (folder / "photos").mkdir(parents=True)
        for path in files[nth % len(originals)]:
            os.link(original / path, folder / str(path).replace(former, number))
    return target

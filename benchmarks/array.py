"""What a shard costs a process of an array beyond its upload and its COPY, and whether that grows with their number."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.bench import SMALL, Bench, World
from benchmarks.processes import processor_seconds
from benchmarks.rows import Row
from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import Request, discover
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage

_PROCESSES = 4


def array(place: Bench, shards: Sequence[int]) -> list[Row]:
    """Load shards of one small recognition each with `xargs -P 4`, beside the functions of the steps in a loop.

    Both have as many processes, each with a range of the shards. The start of the processes is measured with shards
    that are done, and subtracted. Where other programs use the processors, look at the processor's time.
    """
    rows: list[Row] = []
    first: dict[str, float] = {}
    for number in shards:
        dataset = place.dataset(number, SMALL)
        with place.world() as world:
            work = _measured(world, partial(_in_a_loop, world.settings, dataset, number))
        with place.world() as fresh:
            world = fresh.tuned(batch_size=1)
            world.run("discover", "--source", str(dataset), "--batch-id", "a1", "--json")
            whole = _measured(world, partial(_with_xargs, world, number))
            start = _measured(world, partial(_with_xargs, world, number))
            world.run("finish", "--batch-id", "a1", "--json")
        what = f"{number} shards, {_PROCESSES} processes without their start / in a loop"
        rows.append(Row(what, whole.seconds - start.seconds, work.seconds, "s"))
        for name in ("seconds", "processor", "postgres"):
            each = (getattr(whole, name) - getattr(start, name)) / number * 1000
            beyond = each - getattr(work, name) / number * 1000
            first.setdefault(name, each)
            rows.append(Row(f"  {name}, of a shard beyond its work / a shard", beyond, each, "ms"))
            rows.append(Row(f"  {name}, a shard / one of {shards[0]}", each, first[name], "ms"))
        rows.append(Row("  the start of the processes / all of it", start.seconds, whole.seconds, "s"))
    return rows


@dataclass(frozen=True)
class _Cost:
    """Seconds by the clock, of the processor in the processes that did the work, and in PostgreSQL."""

    seconds: float
    processor: float
    postgres: float


def _measured(world: World, work: Callable[[], None]) -> _Cost:
    def now() -> tuple[float, float, float]:
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = of_children.ru_utime + of_children.ru_stime
        return time.perf_counter(), processor, processor_seconds(world.processes["PostgreSQL"])

    before = now()
    work()
    return _Cost(*(after - former for after, former in zip(now(), before, strict=True)))


def _with_xargs(world: World, number: int) -> None:
    command = [sys.executable, "-m", "pipeline", "shard", "--batch-id", "a1", "--of", str(number), "--index"]
    xargs = ["xargs", "-P", str(_PROCESSES), "-n", str(-(-number // _PROCESSES)), *command]
    indices = "\n".join(map(str, range(number)))
    done = subprocess.run(
        xargs, input=indices, cwd=world.folder, env=world.environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(xargs)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def _in_a_loop(settings: Settings, dataset: Path, number: int) -> None:
    """Call the functions of the steps in as many processes, each for a range of shards."""
    with closing(Database(settings)) as database, closing(Storage(settings)) as storage:
        storage.ensure_bucket()
        source = resolve_batch(settings, database, LoadRequest("a1", str(dataset))).source
        discover(database, Request("a1", source, settings.bucket, batch_size=1, maximum_shards=number))
    ranges = [range(number * part // _PROCESSES, number * (part + 1) // _PROCESSES) for part in range(_PROCESSES)]
    with ProcessPoolExecutor(_PROCESSES, get_context("fork")) as executor:
        list(executor.map(_work, [settings] * _PROCESSES, ranges))


def _work(settings: Settings, numbers: Sequence[int]) -> None:
    with (
        closing(Database(settings)) as database,
        closing(Storage(settings)) as storage,
        closing(Uploader(database, storage)) as uploader,
    ):
        for number in numbers:
            uploader.upload("a1", number + 1)
            copy_shard(database, settings, "a1", number + 1)

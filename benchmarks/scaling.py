"""How far it goes: what luigid costs a task, what a second worker brings, and the bytes and seconds of a recognition.

python -m benchmarks scaling             measure
python -m benchmarks.scaling 100         what that comes to for 100 million recognitions
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from luigi.rpc import RemoteScheduler

from benchmarks.bench import REPOSITORY, SMALL, Bench, World
from benchmarks.rows import Row
from benchmarks.seeding import seed
from embedded_supabase.files import end_process, wait_until
from pipeline.graph.luigid import answers

_SECONDS = 30.0
_LATENCIES = (200, 42)
_SIZES = """
SELECT n.nspname, sum(pg_relation_size(c.oid)) FILTER (WHERE c.relkind <> 'i')::bigint,
    sum(pg_relation_size(c.oid)) FILTER (WHERE c.relkind = 'i')::bigint
FROM (
    SELECT oid, relkind, relnamespace FROM pg_class WHERE relkind IN ('r', 'i')
    UNION ALL
    SELECT t.oid, t.relkind, c.relnamespace FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid
) AS c
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('ingest', 'raw', 'public')
GROUP BY n.nspname ORDER BY n.nspname
"""


def scaling(place: Bench, tasks: tuple[int, ...], shared: int, seeded: int, listed: tuple[int, ...]) -> list[Row]:
    """Measure what bounds a larger load.

    Arguments:
        tasks: shards that luigid hands out, two tasks each, with nothing to do in them.
        shared: recognitions that one worker, and then two, load to a Storage 200 ms away; more to a nearer one.
        seeded: recognitions whose rows are weighed.
        listed: recognitions whose objects are verified.
    """
    return [
        *_scheduling(place.folder, tasks),
        # As many as take equally long, so that the second worker has begun before they are loaded.
        *(_sharing(place, shared * _LATENCIES[0] // latency, latency) for latency in _LATENCIES),
        *_weighing(place, seeded),
        *_looking(place, listed),
        _holding(place, listed[-1]),
    ]


@contextmanager
def _luigid(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    (folder / "luigi.cfg").write_text(
        text.replace("scheduler_port = 8082", f"scheduler_url = {url}/"), encoding="utf-8"
    )
    command = [sys.executable, "-c", "import luigi.cmdline; luigi.cmdline.luigid()", "--address", "127.0.0.1"]
    command += ["--port", url.rpartition(":")[2], "--state-path", str(folder / "luigid.state")]
    with open(folder / "luigid.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        if not wait_until(lambda: answers(url), _SECONDS):
            raise SystemExit("luigid did not start")
        yield url
    finally:
        end_process(process, _SECONDS)
        (folder / "luigi.cfg").unlink()


def _scheduling(folder: Path, sizes: tuple[int, ...]) -> list[Row]:
    """Let luigid take and hand out the tasks of shards: what is paid for a task, beside the smallest number of them."""
    costs = {}
    for shards in sizes:
        with _luigid(folder) as url:
            luigid: Any = RemoteScheduler(url)
            begin = time.perf_counter()
            for shard in range(shards):
                upload, copy = f"UploadShard_{shard}", f"CopyShard_{shard}"
                luigid.add_task(worker="w", task_id=copy, deps=[upload], family="CopyShard", params={})
                luigid.add_task(worker="w", task_id=upload, family="UploadShard", params={})
            while (task_id := luigid.get_work(worker="w", host="h", current_tasks=[])["task_id"]) is not None:
                luigid.add_task(worker="w", task_id=task_id, status="DONE")
            costs[shards] = (time.perf_counter() - begin) / (2 * shards) * 1000
    least = costs[sizes[0]]
    return [Row(f"luigid, a task of {2 * n:,} / of {2 * sizes[0]:,}", cost, least, "ms") for n, cost in costs.items()]


def _sharing(place: Bench, recognitions: int, latency: int) -> Row:
    """Load from a Storage that takes its time, alone and with a second worker, four requests each in flight."""
    seconds = []
    dataset = place.dataset(recognitions, SMALL)
    for helpers in (0, 1):
        with ExitStack() as stack:
            world = stack.enter_context(place.world("--latency", str(latency)))
            world = world.tuned(thread_count=4, batch_size=10)
            stack.enter_context(_luigid(world.folder))
            started = [stack.enter_context(_helper(world)) for _ in range(helpers)]
            result = world.run("load", "--batch-id", dataset.name, "--source", str(dataset), "--json").result
            assert result["state"] == "done"
            assert all(one.poll() is None for one in started)
            seconds.append(world.step_seconds(dataset.name, "upload"))
            workers = world.query("SELECT count(DISTINCT worker) FROM ingest.batch_state WHERE step = 'upload'")
            assert workers == [(helpers + 1,)]
    alone, together = (recognitions / one for one in seconds)
    return Row(f"upload at {latency} ms, two workers / one", together, alone, "recognitions/s")


@contextmanager
def _helper(world: World) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "worker", "--idle", "600"],
        cwd=world.folder,
        env=world.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        end_process(process, _SECONDS)


def _weighing(place: Bench, seeded: int) -> list[Row]:
    """Weigh the rows of finished batches: bytes of a recognition, tables and indexes."""
    with place.world() as world:
        origin = place.dataset(seeded if seeded < 1000 else 1000, SMALL)
        count = seed(world, origin, max(0, seeded // 1000 - 1))
        sizes = world.query(_SIZES)
        total = sum(tables + indexes for _, tables, indexes in sizes) / count
    rows = []
    for schema, tables, indexes in sizes:
        rows.append(Row(f"{count:,} recognitions: {schema}, tables / all", tables / count, total, "bytes each"))
        rows.append(Row(f"{count:,} recognitions: {schema}, indexes / all", indexes / count, total, "bytes each"))
    return rows


def _looking(place: Bench, sizes: tuple[int, ...]) -> list[Row]:
    """Discover and verify: seconds of a thousand recognitions, beside those of the smallest number."""
    found: dict[int, tuple[float, float, float]] = {}
    for size in sizes:
        with place.world() as world:
            dataset = place.dataset(size, SMALL)
            begin = time.perf_counter()
            world.load(dataset, "--workers", "2")
            loaded = time.perf_counter() - begin
            discovered = world.step_seconds(dataset.name, "discover")
            verified = world.run("verify", "--quiet", "--json").seconds
            found[size] = tuple(one / size * 1000 for one in (discovered, verified, loaded))  # type: ignore[assignment]
    least = found[sizes[0]]
    names = ("discovery", "verify, whole command", "load, whole command")
    return [
        Row(f"{size:,} recognitions: {name} / at {sizes[0]:,}", ours, reference, "s a thousand")
        for size, each in found.items()
        for name, ours, reference in zip(names, each, least, strict=True)
    ]


def _holding(place: Bench, recognitions: int) -> Row:
    """Load everything as one shard, and in shards of a hundred: a process holds what it has to know of a shard."""
    megabytes = []
    for batch_size in (recognitions, 100):
        with place.world() as world:
            megabytes.append(world.tuned(batch_size=batch_size).load(place.dataset(recognitions, SMALL)).megabytes)
    return Row(f"largest process, one shard of {recognitions:,} / of 100", megabytes[0], megabytes[1], "MB")


def reckon(results: Path, millions: int) -> str:
    """Return what the measured bytes and seconds of a recognition come to, were each of so many like those measured."""
    questions = json.loads(results.read_text(encoding="utf-8"))["questions"]
    rows = next(one["rows"] for one in questions if one["name"] == "scaling")
    lines = [f"{millions} million recognitions, reckoned from those measured:"]
    total = 0.0
    for row in rows:
        what = row["what"].split(": ")[-1].split(" / ")[0]
        if row["unit"] == "bytes each":
            total += row["ours"] * millions / 1000
            lines.append(f"  {what}: {row['ours'] * millions / 1000:,.1f} GB")
        elif row["unit"] == "s a thousand":
            lines.append(f"  {what}, as at {row['what'].split(' ')[0]}: {row['ours'] * millions * 1000 / 3600:,.1f} h")
    lines.append(f"  all tables and indexes: {total:,.1f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reckon(REPOSITORY / "benchmarks" / "results.json", int(sys.argv[1])))

"""Measure what the project claims, each number beside a peer or a limit of the same run.

    python -m benchmarks                  all of them, small enough for a coffee
    python -m benchmarks upload           photos/s of a load, beside a bare loop of uploads that checks nothing
    python -m benchmarks growth           seconds a recognition on top of many, beside an empty database
    python -m benchmarks memory           peak memory of a load at several sizes, beside the limit of 250 MB
    python -m benchmarks rerun            a load that has nothing to do, beside the start of the interpreter
    python -m benchmarks sample           recognitions/s of the generator, beside bare JPEG encoding

Services and datasets are made in a temporary folder and removed. Nothing passes or fails here: machines are noisy,
so look at the ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from dotenv import dotenv_values
from PIL import Image

from pipeline.embedded import services
from pipeline.sample import write_sample

LIMIT_MB = 250
REPEATS = 5
SMALL = (160, 120)
REAL = (1280, 720)


@dataclass(frozen=True)
class Run:
    """One command: seconds by the clock, the largest resident memory of its processes in MB, its JSON."""

    seconds: float
    megabytes: float
    result: dict[str, Any]


class Bench:
    """A folder with services of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {**os.environ, "PIPELINE_HOME": str(folder / "home")}
        for name in ("NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL", "STORAGE_BUCKET"):
            self._environment.pop(name, None)
        self._datasets = 0

    def start(self) -> None:
        """Start the services with an empty database and an empty bucket."""
        self.stop()
        shutil.rmtree(self.folder / "home", ignore_errors=True)
        self.run("up", parse=False)

    def stop(self) -> None:
        """Stop the services."""
        services.down(self.folder / "home")

    def dataset(self, recognitions: int, size: tuple[int, int]) -> Path:
        """Write a dataset with ids that no other has."""
        self._datasets += 1
        path = self.folder / f"dataset{self._datasets}"
        write_sample(path, recognitions, self._datasets, first_id=self._datasets * 1_000_000, size=size)
        return path

    def run(self, *arguments: str, parse: bool = True) -> Run:
        """Run one command of the pipeline to its end."""
        begin = time.perf_counter()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *arguments], cwd=self.folder, env=self._environment, stdout=output
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - begin
            if process.returncode:
                raise SystemExit(f"pipeline {' '.join(arguments)} ended with {process.returncode}")
            output.seek(0)
            result = json.load(output) if parse else {}
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return Run(seconds, usage.ru_maxrss / unit, result)

    def load(self, dataset: Path, *options: str) -> Run:
        """Load a dataset in a batch of its name."""
        identity = ("--batch-id", dataset.name, "--source", str(dataset))
        return self.run("load", *identity, "--local-scheduler", "--json", *options)

    def settings(self) -> dict[str, str]:
        """Return the settings of the services."""
        return {name: value or "" for name, value in dotenv_values(self.folder / "home" / "env").items()}


@contextmanager
def bench() -> Iterator[Bench]:
    """Give a folder with services of its own, and take both away."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-bench-", dir="/tmp"))
    folder.chmod(0o711)
    place = Bench(folder)
    try:
        place.start()
        yield place
    finally:
        place.stop()
        shutil.rmtree(folder)


def table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print rows of (what, number) below a title."""
    print(f"\n{title}")
    width = max(len(what) for what, _ in rows)
    for what, number in rows:
        print(f"  {what:<{width}}  {number}")


def upload(place: Bench, recognitions: int) -> None:
    """Compare a load with a loop that only sends the bytes, 16 threads each, to the same server."""
    loads, bare = [], []
    for _ in range(REPEATS):
        dataset = place.dataset(recognitions, REAL)
        photos = sorted(dataset.rglob("*.jpg"))
        bare.append(len(photos) / _send_bare(place, photos))
        loads.append(place.load(dataset).result["throughput"]["images_processed"]["per_second"])
    rate, peer = statistics.median(loads), statistics.median(bare)
    table(
        f"upload: {recognitions} recognitions, {REAL[0]}x{REAL[1]}, median of {REPEATS}",
        [
            ("load, all steps, photos checked and hashed", f"{rate:.0f} photos/s"),
            ("bare loop of POST, 16 threads, nothing checked", f"{peer:.0f} photos/s"),
            ("ratio", f"{rate / peer:.2f}"),
        ],
    )


def _send_bare(place: Bench, photos: Sequence[Path]) -> float:
    settings = place.settings()
    base = f"{settings['NEXT_PUBLIC_SUPABASE_URL']}/storage/v1"
    headers = {"Authorization": f"Bearer {settings['SUPABASE_SERVICE_ROLE_KEY']}"}
    requests.post(f"{base}/bucket", json={"name": "bare"}, headers=headers, timeout=60)
    local = threading.local()

    def send(number: int, path: Path) -> None:
        if not hasattr(local, "session"):
            local.session = requests.Session()
            local.session.trust_env = False
        answer = local.session.post(
            f"{base}/object/bare/{number}.jpg",
            data=path.read_bytes(),
            headers={**headers, "Content-Type": "image/jpeg", "x-upsert": "true"},
            timeout=60,
        )
        answer.raise_for_status()

    begin = time.perf_counter()
    with ThreadPoolExecutor(16) as executor:
        list(executor.map(send, range(len(photos)), photos))
    return time.perf_counter() - begin


def growth(place: Bench, loaded: int, added: int) -> None:
    """Compare what a recognition costs on an empty database with what it costs on top of many, taking turns."""
    place.start()
    place.load(place.dataset(loaded, SMALL), "--workers", "2")
    empty, full = [], []
    with bench() as other:
        for _ in range(REPEATS):
            dataset = place.dataset(added, SMALL)
            other.start()
            empty.append(other.load(dataset))
            full.append(place.load(dataset))
    rows = []
    for what, seconds in (
        ("whole load", lambda run: run.result["total_seconds"]),
        ("discovery, walk to manifest", lambda run: _operations(run, "discover")),
        ("COPY", lambda run: _operations(run, "db_bulk_copy")),
        ("transform", lambda run: run.result["operations"]["transform"]["total_seconds"]),
    ):
        before = [seconds(run) / added * 1000 for run in empty]
        after = [seconds(run) / added * 1000 for run in full]
        ratio = statistics.median(one / other for one, other in zip(after, before, strict=True))
        middle = f"{statistics.median(before):.3f} ms empty, {statistics.median(after):.3f} ms on top"
        rows.append((what, f"{middle}, ratio {ratio:.2f}"))
    table(f"growth: {added} recognitions on top of {loaded}, each, median of {REPEATS}", rows)


def _operations(run: Run, prefix: str) -> float:
    operations = run.result["operations"]
    return float(sum(entry["total_seconds"] for name, entry in operations.items() if name.startswith(prefix)))


def memory(place: Bench, sizes: Sequence[int]) -> None:
    """Show the largest resident memory of any process of a load."""
    rows = []
    for recognitions in sizes:
        dataset = place.dataset(recognitions, REAL)
        for workers in ("1", "4"):
            place.start()
            run = place.load(dataset, "--workers", workers)
            share = run.megabytes / LIMIT_MB
            rows.append(
                (f"{recognitions} recognitions, {workers} workers", f"{run.megabytes:.0f} MB, {share:.2f} of the limit")
            )
        shutil.rmtree(dataset)
    table(f"memory: peak of any process, limit {LIMIT_MB} MB", rows)


def rerun(place: Bench, recognitions: int) -> None:
    """Compare a load that has nothing to do with the start of the interpreter and the imports."""
    dataset = place.dataset(recognitions, SMALL)
    place.load(dataset)
    noop = statistics.median(place.load(dataset).seconds for _ in range(5))
    imports = statistics.median(_start("import pipeline.cli") for _ in range(5))
    bare = statistics.median(_start("pass") for _ in range(5))
    table(
        f"rerun: a finished batch of {recognitions} recognitions, median of 5",
        [
            ("load again", f"{noop:.2f} s"),
            ("interpreter and imports", f"{imports:.2f} s"),
            ("interpreter", f"{bare:.2f} s"),
            ("beyond the imports", f"{noop - imports:.2f} s, limit 1 s"),
        ],
    )


def _start(program: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - begin


def sample(place: Bench, recognitions: int) -> None:
    """Compare the generator with nothing but the encoding of as many photos of the same size."""
    begin = time.perf_counter()
    done = write_sample(place.folder / "drawn", recognitions, 99)
    rate = recognitions / (time.perf_counter() - begin)
    with Image.open(next((place.folder / "drawn").rglob("*.jpg"))) as image:
        image.load()
        pixels = image.copy()

    def encode(_: int) -> None:
        pixels.save(io.BytesIO(), "JPEG", quality=85)

    begin = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(encode, range(done.photos)))
    peer = recognitions / (time.perf_counter() - begin)
    table(
        f"sample: {recognitions} recognitions",
        [
            ("sample, drawn and written", f"{rate:.0f} recognitions/s"),
            ("bare JPEG encoding of one picture", f"{peer:.0f} recognitions/s"),
            ("ratio", f"{rate / peer:.2f}"),
        ],
    )


def main() -> None:
    """Run the measurements that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    names = ("upload", "growth", "memory", "rerun", "sample")
    parser.add_argument("which", nargs="*", choices=[*names, []], help="all by default")
    parser.add_argument("--recognitions", type=int, default=500, help="for upload, rerun and sample (500)")
    parser.add_argument("--loaded", type=int, default=5000, help="for growth: how many are there already (5000)")
    parser.add_argument("--added", type=int, default=1000, help="for growth: how many come (1000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000], help="for memory (500 2000)")
    options = parser.parse_args()
    chosen = options.which or names
    with bench() as place:
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors")
        if "upload" in chosen:
            upload(place, options.recognitions)
        if "growth" in chosen:
            growth(place, options.loaded, options.added)
        if "memory" in chosen:
            memory(place, options.sizes)
        if "rerun" in chosen:
            rerun(place, options.recognitions)
        if "sample" in chosen:
            sample(place, options.recognitions)


if __name__ == "__main__":
    main()

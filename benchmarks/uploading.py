"""Photos a second of the upload, beside what 16 threads can do at best and beside a bare loop; what it costs."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks.bench import REAL, Bench, Run, World
from benchmarks.processes import cost_of
from benchmarks.rows import Row, middle

_THREADS = 16
_FAR_MS = 42
_NEAR_MS = (5, 0)
_CAPACITY = 8
_GOAL_MS = 1.9


def uploading(place: Bench, recognitions: int, far: int, repeats: int) -> list[Row]:
    """Load photos of about 120 kB through Storage servers that are far, near, and narrow.

    Arguments:
        far: recognitions for the server that is far, where the first tenth of a second goes by with few requests.
    """
    rows = _far(place, place.dataset(far, REAL), 2 * far)
    dataset = place.dataset(recognitions, REAL)
    photos = 2 * recognitions
    for latency in _NEAR_MS:
        rows += _near(place, dataset, photos, latency, repeats)
    return rows + _narrow(place, dataset, photos)


def _rate(world: World, dataset: Path, photos: int) -> float:
    return photos / world.step_seconds(dataset.name, "upload")


def _far(place: Bench, dataset: Path, photos: int) -> list[Row]:
    with place.world("--latency", str(_FAR_MS)) as world:
        run = world.load(dataset)
        rate = _rate(world, dataset, photos)
        bare = photos / world.run(str(dataset), module="benchmarks.bare").result["seconds"]
    ideal = _THREADS / (_FAR_MS / 1000)
    return [
        Row(f"upload step at {_FAR_MS} ms / {_THREADS} threads that only wait", rate, ideal, "photos/s"),
        Row("  whole command / the same", photos / run.seconds, ideal, "photos/s"),
        Row(f"  upload step / bare loop, {_THREADS} threads", rate, bare, "photos/s"),
    ]


def _near(place: Bench, dataset: Path, photos: int, latency: int, repeats: int) -> list[Row]:
    steps: list[tuple[float, float]] = []
    wholes: list[tuple[float, float]] = []
    costs: list[tuple[float, float]] = []
    parts: dict[str, float] = {}
    for turn in range(repeats):
        with place.world("--latency", str(latency)) as world:
            runs: dict[str, Run] = {}
            for which in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                runs[which] = (
                    world.load(dataset) if which == "ours" else world.run(str(dataset), module="benchmarks.bare")
                )
            peer = photos / runs["bare"].result["seconds"]
            steps.append((_rate(world, dataset, photos), peer))
            wholes.append((photos / runs["ours"].seconds, peer))
            costs.append((runs["ours"].processor / photos * 1000, runs["bare"].processor / photos * 1000))
            if not latency and not parts:
                parts = world.run(str(dataset), "--split", module="benchmarks.bare").result
    rows = [
        middle(f"upload step at {latency} ms / bare loop, {_THREADS} threads each", steps, "photos/s"),
        middle("  whole command / the same", wholes, "photos/s"),
        middle("  processor of the loader a photo / bare loop", costs, "ms"),
        Row(f"  loader processor time a photo / {_GOAL_MS} ms", median(ours for ours, _ in costs), _GOAL_MS, "ms"),
    ]
    return rows + _parts(parts, rows[-1].ours, photos) if parts else rows


def _parts(parts: dict[str, float], whole: float, photos: int) -> list[Row]:
    """Split the processor time of a photo by what it goes to; each part was measured alone, on the same photos."""
    spent = {name: seconds / photos * 1000 for name, seconds in parts.items()}
    spent["start and imports"] = median(cost_of("import pipeline.cli")[1] for _ in range(3)) / photos * 1000
    spent["rest: rows, other steps, waiting for each other"] = whole - sum(spent.values())
    return [Row(f"    {name} / of it", milliseconds, whole, "ms") for name, milliseconds in spent.items()]


def _narrow(place: Bench, dataset: Path, photos: int) -> list[Row]:
    far = ("--latency", str(_FAR_MS))
    with place.world(*far) as world:
        world.tuned(thread_count=_CAPACITY).load(dataset)
        peer = _rate(world, dataset, photos)
    with place.world(*far, "--capacity", str(_CAPACITY)) as world:
        counters = world.load(dataset).result["counters"]
        rate = _rate(world, dataset, photos)
    refused = sum(count for name, count in counters.items() if name.startswith("retries_"))
    return [
        Row(f"{_THREADS} threads, at most {_CAPACITY} served at once / {_CAPACITY} threads", rate, peer, "photos/s"),
        Row("  requests refused / requests", refused, photos + refused, "requests"),
    ]

"""Measure what the project claims, each number beside a peer or a limit of the same run.

    python -m benchmarks                  every question, in twenty minutes on two processors
    python -m benchmarks --small          the same in about two minutes, with more noise
    python -m benchmarks growth qwen      some of them

Services and datasets are made in a temporary folder and removed; the numbers are written as JSON as well. Nothing
passes or fails here: machines are noisy, so look at the ratios.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.adopting import adopting
from benchmarks.annotated import annotated
from benchmarks.annotating import annotating
from benchmarks.array import array
from benchmarks.bench import REPOSITORY, Bench, bench
from benchmarks.copying import copying
from benchmarks.distance import distance
from benchmarks.graph import graph
from benchmarks.growth import growth
from benchmarks.large import large
from benchmarks.loading import loading
from benchmarks.memory import memory
from benchmarks.million import million
from benchmarks.nights import nights
from benchmarks.rerun import rerun
from benchmarks.rows import Row, as_table, machine, write_json
from benchmarks.sampling import sampling
from benchmarks.scaling import scaling
from benchmarks.uploading import uploading


@dataclass(frozen=True)
class Question:
    """What is asked, who answers, and with which arguments in each size."""

    title: str
    answer: Callable[..., list[Row]]
    small: dict[str, Any]
    full: dict[str, Any]


QUESTIONS: dict[str, Question] = {
    "upload": Question(
        "Upload at distance: photos of 120 kB",
        uploading,
        {"recognitions": 40, "far": 30, "repeats": 1},
        {"recognitions": 800, "far": 1400, "repeats": 5},
    ),
    "copy": Question(
        "COPY: rows of a load",
        copying,
        {"recognitions": 100, "repeats": 1},
        {"recognitions": 4000, "repeats": 5},
    ),
    "load": Question(
        "Whole load: 4 workers, photos of 30 kB",
        loading,
        {"sizes": (50, 200), "counted": 50},
        {"sizes": (1000, 16_000), "counted": 1000},
    ),
    "distance": Question(
        "Database at distance: 25 ms each way, one process",
        distance,
        {"recognitions": 20},
        {"recognitions": 400},
    ),
    "adopt": Question(
        "An app's project: adopting trays, and a load into its tables",
        adopting,
        {"trays": 100, "entries": 20, "added": 20, "repeats": 1},
        {"trays": 3000, "entries": 200, "added": 500, "repeats": 5},
    ),
    "rerun": Question(
        "No-op re-run",
        rerun,
        {"sizes": (50,), "repeats": 1},
        {"sizes": (100, 2000), "repeats": 7},
    ),
    "night": Question(
        "A night without anything to load: the look at what is loaded",
        nights,
        {"recognitions": 200, "repeats": 1},
        {"recognitions": 16_000, "repeats": 5},
    ),
    "graph": Question(
        "Graph: shards of one small recognition",
        graph,
        {"tasks": (10,), "repeats": 1, "loaded": 50},
        {"tasks": (100, 1000), "repeats": 1, "loaded": 1000},
    ),
    "array": Question(
        "Array: shards of one small recognition, xargs -P 4",
        array,
        {"shards": (10, 40)},
        {"shards": (100, 1500)},
    ),
    "growth": Question(
        "Growth: small photos, one process",
        growth,
        {"loaded": (500,), "template": 50, "added": 50, "repeats": 1},
        {"loaded": (200_000,), "template": 1000, "added": 1000, "repeats": 5},
    ),
    "qwen": Question(
        "Qwen: annotations of a vision model",
        annotating,
        {"megabytes": (1,), "template": 50, "copied": 1},
        {"megabytes": (10, 50), "template": 1000, "copied": 5},
    ),
    "scaling": Question(
        "Scaling: luigid, a second worker, bytes and seconds of a recognition",
        scaling,
        {"tasks": (5, 20), "shared": 30, "seeded": 50, "listed": (20, 40)},
        {"tasks": (50, 490), "shared": 150, "seeded": 6000, "listed": (500, 2000)},
    ),
    "memory": Question(
        "Memory: the largest process, photos of 120 kB",
        memory,
        {"sizes": (50,)},
        {"sizes": (500, 1500)},
    ),
    "large": Question(
        "Large: one dataset through every command, two workers",
        large,
        {"sizes": (100, 200)},
        {"sizes": (2_000, 200_000)},
    ),
    "annotated": Question(
        "Annotations on top of many",
        annotated,
        {"template": 100, "copies": 10, "added": 1, "repeats": 1},
        {"template": 1000, "copies": 500, "added": 10, "repeats": 5},
    ),
    "million": Question(
        "A million folders: discovery, and the look of a night",
        million,
        {"folders": 1000, "template": 100},
        {"folders": 1_000_000, "template": 1000},
    ),
    "sample": Question(
        "Sample: the generator of datasets",
        sampling,
        {"recognitions": 100},
        {"recognitions": 500},
    ),
}


#: They are measured where they are named: each takes longer than all the others.
ALONE = ("annotated", "large", "million")


def ask(place: Bench, name: str, size: str) -> tuple[str, list[Row]]:
    """Answer one question and print its table; return its title and rows."""
    question = QUESTIONS[name]
    begin = time.perf_counter()
    rows = question.answer(place, **(question.small if size == "small" else question.full))
    print(f"\n{as_table(question.title, rows, time.perf_counter() - begin)}", flush=True)
    return question.title, rows


def main() -> None:
    """Answer the questions that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="QUESTION", help=f"{', '.join(QUESTIONS)}; all but {', '.join(ALONE)} by default"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", dest="size", action="store_const", const="small", help="about two minutes in all")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="twenty minutes (the default)")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks" / "results.json", metavar="FILE")
    parser.set_defaults(size="full")
    options = parser.parse_args()
    unknown = set(options.names) - set(QUESTIONS)
    if unknown:
        parser.error(f"there is no question {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    of = machine()
    print(f"Python {of['python']}, {of['system']}, {of['processors']} processors, {of['memory_gb']} GB, {options.size}")
    answers: list[tuple[str, str, list[Row]]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that services and files are removed then, too
    with bench() as place:
        for name in options.names or (name for name in QUESTIONS if name not in ALONE):
            answers.append((name, *ask(place, name, options.size)))
            write_json(options.json, options.size, answers)


if __name__ == "__main__":
    main()

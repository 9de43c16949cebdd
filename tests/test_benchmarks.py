"""The measurements, in their tiniest form: each yields rows that can be read and compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import QUESTIONS
from benchmarks.bench import Bench, bench
from benchmarks.relay import split_statements
from benchmarks.rows import Row, as_table, machine, middle, write_json
from benchmarks.seeding import seed
from pipeline.database import Connection, Database
from pipeline.steps.verify import CHECKS
from tests.services import REPOSITORY

TINY: dict[str, dict[str, Any]] = {
    "upload": {"recognitions": 8, "far": 8, "repeats": 1},
    "copy": {"recognitions": 4, "repeats": 1},
    "annotated": {"template": 20, "copies": 2, "added": 1, "repeats": 1},
    "large": {"sizes": (2, 4)},
    "million": {"folders": 30, "template": 4},
    "load": {"sizes": (4, 8), "counted": 4},
    "distance": {"recognitions": 4, "delay": 0.001},
    "adopt": {"trays": 4, "entries": 2, "added": 4, "repeats": 1},
    "rerun": {"sizes": (4,), "repeats": 1},
    "night": {"recognitions": 4, "repeats": 1},
    "graph": {"tasks": (4,), "repeats": 1, "loaded": 4},
    "array": {"shards": (4,)},
    "growth": {"loaded": (40,), "template": 4, "added": 4, "repeats": 1},
    "qwen": {"megabytes": (1,), "template": 20, "copied": 1},
    "scaling": {"tasks": (2, 4), "shared": 40, "seeded": 4, "listed": (4,)},
    "memory": {"sizes": (4,)},
    "sample": {"recognitions": 4},
}


@pytest.fixture(scope="module")
def place(short_folder: Path) -> Iterator[Bench]:
    with bench(short_folder) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", list(QUESTIONS))
def test_every_question_is_answered(place: Bench, name: str) -> None:
    question = QUESTIONS[name]
    rows = question.answer(place, **TINY[name])
    assert rows
    for row in rows:
        assert math.isfinite(row.ratio), row  # the difference of two times may be less than nothing
    assert len(as_table(question.title, rows, 1.0).splitlines()) == len(rows) + 2


def test_both_sizes_and_this_test_give_the_same_arguments() -> None:
    for name, question in QUESTIONS.items():
        assert set(question.small) == set(question.full) == set(TINY[name]) - {"delay"}


@pytest.mark.slow
def test_recognitions_made_with_sql_are_as_finished_batches_leave_them(place: Bench) -> None:
    dataset = place.dataset(3)
    with place.world() as world:
        assert seed(world, dataset, 30) == 93
        assert world.query("SELECT count(*), count(DISTINCT menu_id) > 30 FROM public.recognitions") == [(93, True)]
        assert world.query("SELECT count(DISTINCT version) FROM ingest.batches WHERE state = 'done'") == [(3,)]

        def problems(connection: Connection) -> list[object]:
            return [row for check in CHECKS for row in connection.execute(check)]

        with closing(Database(world.settings)) as database:
            assert database.run(problems) == []


def test_the_relay_delays_both_ways_and_counts(place: Bench) -> None:
    with place.world() as world, world.database_relay(0.05) as relay:
        far = world.through(relay)
        begin = time.monotonic()
        assert far.query("SELECT 1") == [(1,)]
        assert time.monotonic() - begin >= 0.1 * 5  # connection, start-up, BEGIN, query, COMMIT
        assert relay.connections == 1
        assert dict(relay.statements) == {"BEGIN": 1, "SELECT 1": 1, "COMMIT": 1}
        assert relay.turns >= 4


def test_statements_are_told_apart_by_semicolons_outside_of_strings_and_comments() -> None:
    one = """SELECT ';', E'\\';', '\\', "a;b", 1-2 -- the server's; or ours
"""
    assert split_statements(f"BEGIN;\n{one};COMMIT") == ["BEGIN", one.strip(), "COMMIT"]
    assert split_statements("") == []


def test_a_row_of_pairs_is_the_one_with_the_median_ratio() -> None:
    assert middle("x", [(1, 1), (8, 2), (9, 3)], "s") == Row("x", 9, 3, "s")


def test_results_are_json(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", "small", [("upload", "Upload", [Row("x", 1.0, 2.0, "s")])])
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["machine"] == machine()
    rows = [{"what": "x", "ours": 1.0, "reference": 2.0, "unit": "s", "ratio": 0.5}]
    assert content["questions"] == [{"name": "upload", "title": "Upload", "rows": rows}]


def test_an_unknown_question_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "nonsense"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no question nonsense" in done.stderr

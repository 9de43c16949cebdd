"""`status --check --max-age`, and what the doctor says of alarms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import Alarms, Secret, Settings
from pipeline.doctor.alarms import alarm_findings
from pipeline.doctor.finding import OK, WARNING
from tests import annotating, world
from tests.annotating import Run
from tests.services import MakeDataset

run = annotating.run


def look(run: Run, *options: str) -> tuple[int, str]:
    """Return the exit code, and what is said of the last look."""
    done = run("status", "--check", "--json", *options)
    (found,) = [one["message"] for one in json.loads(done.out)["findings"] if one["check"] == "look"]
    return done.code, found


def test_silence_is_a_problem_after_so_many_hours(
    run: Run, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    dataset, dsn = small_dataset(3), settings.database_url.reveal()
    source = ("--source", str(dataset))
    assert look(run, *source) == (0, "No source was looked at yet.")
    assert look(run, *source, "--max-age", "36") == (3, "No source was looked at yet.")
    annotations = str(dataset / "qwen_annotations.json")
    for command, *options in (("load", *source), ("load-qwen", "--file", annotations)):
        assert run(command, *options).code == 0
        code, message = look(run, *source, "--max-age", "0.1")
        assert (code, "More than" in message) == (0, False)
        assert ("an annotations file" in message) == (command == "load-qwen")
        assert " The newest data is of 20" in message
        world.query(dsn, "UPDATE ingest.looks SET looked_at = looked_at - interval '40 hours'")
        code, message = look(run, *source, "--max-age", "36")
        assert (code, " More than 36 h ago: a dataset" in message) == (3, True)
        assert "a dataset 40h 0" in message or "a dataset 80h 0" in message
        assert look(run, *source, "--max-age", "81")[0] == 0
    assert run("load", *source).code == 0  # a night without new data is a look
    assert look(run, *source, "--max-age", "1")[0] == 0  # the annotations were a single file


def test_what_is_looked_at_regularly_is_expected_again(
    run: Run, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    dataset, dsn = small_dataset(3), settings.database_url.reveal()
    commands = {
        "a dataset": ("load", "--source", str(dataset)),
        "an annotations file": ("load-qwen", "--file", str(dataset / "qwen_annotations.json")),
    }
    for late in commands:
        for _ in range(3):
            for command in commands.values():
                assert run(*command).code == 0
            world.query(dsn, "UPDATE ingest.looks SET looked_at = looked_at - interval '24 hours'")
        assert look(run, "--source", str(dataset), "--max-age", "36")[0] == 0
        world.query(dsn, "UPDATE ingest.looks SET looked_at = looked_at - interval '24 hours'")
        for name in commands.keys() - {late}:
            assert run(*commands[name]).code == 0
        code, message = look(run, "--source", str(dataset), "--max-age", "36")
        assert (code, message.endswith(f" More than 36 h ago: {late}.")) == (3, True)


@pytest.mark.parametrize(
    ("ages", "code"),
    [
        ([72, 120, 144, 168, 192, 216], 3),  # every night but one, and then no more
        ([40, 40.1], 0),  # twice by hand
        ([40, 64], 0),
        ([40, 40.1, 40.2, 40.3, 200], 0),
        ([40, 64, 88], 3),
        ([40, 240, 440], 0),
    ],
)
def test_the_last_looks_say_whether_another_one_is_expected(
    ages: list[float], code: int, run: Run, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    dataset, dsn = small_dataset(3), settings.database_url.reveal()
    assert run("load", "--source", dataset).code == 0
    assert run("load-qwen", "--file", dataset / "qwen_annotations.json").code == 0
    changes = "jsonb_build_object('batch_id', 'k' || age, 'looked_at', now() - age * interval '1 hour')"
    rows = f"(jsonb_populate_record(l, {changes})).* FROM ingest.looks l, unnest(%s::float8[]) age"
    world.query(dsn, f"INSERT INTO ingest.looks SELECT {rows} WHERE l.kind = 'qwen'", (ages,))
    world.query(dsn, "DELETE FROM ingest.looks WHERE kind = 'qwen' AND looked_at > now() - interval '1 hour'")
    assert look(run, "--source", str(dataset), "--max-age", "36")[0] == code


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_maximum_age_is_a_number_of_hours(hours: str, run: Run) -> None:
    done = run("status", "--check", f"--max-age={hours}")
    assert (done.code, "argument --max-age: " in done.err) == (2, True)


def test_a_maximum_age_belongs_to_the_check(run: Run) -> None:
    done = run("status", "--max-age", "36")
    assert (done.code, "--max-age belongs to --check." in done.err) == (2, True)


@pytest.mark.parametrize(
    ("ping", "urls", "told"),
    [
        (None, None, [(OK, "PING_URL is not set")]),
        ("https://hc-ping.com/key", None, [(OK, "PING_URL is set")]),
        ("hc-ping.com/key", None, [(WARNING, "not an http or https URL")]),
        ("https://[hc/key", None, [(WARNING, "not an http or https URL")]),
        (
            "http://hc/key?create=1",
            "json://hc mailto://a:b@c.example nothing://key-of-ours",
            [(OK, "set"), (WARNING, "1 entry of"), (OK, "2 services")],
        ),
        (None, "key-of-ours", [(OK, "not set"), (WARNING, "1 entry of")]),
    ],
)
def test_the_doctor_says_where_alarms_go(ping: str | None, urls: str | None, told: list[tuple[str, str]]) -> None:
    alarms = Alarms(Secret(ping) if ping else None, Secret(urls) if urls else None, Path())
    found = list(alarm_findings(alarms))
    assert [one.level for one in found] == [level for level, _ in told]
    assert [text in one.message for one, (_, text) in zip(found, told, strict=True)] == [True] * len(told)
    assert not any("key" in one.message or "a:b" in one.message for one in found)

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
        is_second = command == "load-qwen"  # the first look is old by then
        assert (code, message.endswith(" More than 0.1 h ago: a dataset.")) == ((3, True) if is_second else (0, False))
        assert ("an annotations file" in message) == is_second
        assert " The newest data is of 20" in message
        world.query(dsn, "UPDATE ingest.looks SET looked_at = looked_at - interval '40 hours'")
        code, message = look(run, *source, "--max-age", "36")
        assert (code, " More than 36 h ago: a dataset" in message) == (3, True)
        assert "a dataset 40h 0" in message or "a dataset 80h 0" in message
        assert look(run, *source, "--max-age", "81")[0] == 0
    assert run("load", *source).code == 0  # a night without new data is a look
    code, message = look(run, *source, "--max-age", "1")
    assert (code, message.endswith(" More than 1 h ago: an annotations file.")) == (3, True)
    assert look(run, *source, "--max-age", "41")[0] == 0


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

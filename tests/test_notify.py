"""NOTIFY_URLS: who is told of what, once, and what is remembered of it."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import psycopg2
import pytest

from pipeline.batches import alarm
from pipeline.batches.alarm import Memory, in_words, news, problem_of
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.errors import ClaimedError, DatabaseUnavailable, HeldError, RefusedError, SettingsError, UnfinishedError
from pipeline.observe import notify
from tests import annotating, world
from tests.annotating import Run, ids_of
from tests.listeners import Listener, listening, mail_server
from tests.services import MakeDataset, RunPipeline
from tests.test_held import strip

run = annotating.run
dsn = annotating.dsn

SECRET = "hunter2-of-the-team"


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Somebody whom NOTIFY_URLS names."""
    with listening() as listener:
        monkeypatch.setenv("NOTIFY_URLS", f"json://me:{SECRET}@127.0.0.1:{listener.port}/told")
        monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "0")
        yield listener


def fail_uploads(dsn: str, *, on: bool) -> None:
    constraint = "ADD CONSTRAINT never CHECK (step <> 'upload') NOT VALID" if on else "DROP CONSTRAINT never"
    world.query(dsn, f"ALTER TABLE ingest.batch_state {constraint}")


def heads(listener: Listener) -> list[str]:
    """Return what was told, without the name of this machine."""
    return [title.rpartition(" on ")[0].removeprefix("pipeline ") for title in listener.titles()]


def test_people_hear_of_a_problem_once_and_of_its_end(
    run: Run, small_dataset: MakeDataset, team: Listener, dsn: str, settings: Settings
) -> None:
    load = ("load", "--source", small_dataset(3))
    assert run(*load, "--batch-id", "b1").code == 0
    assert heads(team) == []
    fail_uploads(dsn, on=True)
    for told in (["load failed with exit code 3"], [], []):
        done = run(*load, "--force", "--verbose")
        assert done.code == 3
        for heard in team.heard:
            message = json.loads(heard.body)["message"]
            assert "Target: local" in message
            assert "Hint: To go on: " in message
            assert settings.key.reveal() not in heard.body
            assert SECRET not in heard.body + done.err + done.out
        assert heads(team) == told
    for told in (["load failed with exit code 2"], []):  # another problem, and the first is not over
        assert run("load", "--source", "gone").code == 2
        assert heads(team) == told
        assert run(*load, "--force").code == 3
        assert heads(team) == []
    fail_uploads(dsn, on=False)
    assert run(*load, "--force").code == 0
    assert "Over: unfinished: data error\n" in json.loads(team.heard[0].body)["message"]
    assert heads(team) == ["load succeeds again"]
    assert run(*load).code == 0
    assert heads(team) == []
    fail_uploads(dsn, on=True)  # once more after it was over
    assert run(*load, "--force").code == 3
    assert heads(team) == ["load failed with exit code 3"]


def test_people_hear_of_new_differences_only(run: Run, small_dataset: MakeDataset, team: Listener, dsn: str) -> None:
    assert run("load", "--source", small_dataset(3), "--batch-id", "b1").code == 0
    world.query(dsn, "UPDATE public.images SET byte_size = byte_size + 1 WHERE camera_number = 1")
    for told in (["verify found differences"], []):
        assert run("verify", "--quiet").code == 5
        assert heads(team) == told
    world.query(dsn, "UPDATE public.images SET byte_size = byte_size + 1 WHERE camera_number = 2")
    assert run("verify", "--quiet", "--json").code == 5
    assert "6 inconsistent" in world.query(dsn, "SELECT string_agg(problem, '') FROM ingest.notifications")[0][0]
    assert heads(team) == ["verify found differences"]
    world.query(dsn, "UPDATE public.images SET byte_size = byte_size - 1")
    assert run("load", "--source", small_dataset(3)).code == 0  # of another command
    assert heads(team) == []
    assert run("verify").code == 0
    assert heads(team) == ["verify succeeds again"]


def test_a_held_batch_is_told_once_until_somebody_decides(
    run: Run, own_dataset: MakeDataset, team: Listener, dsn: str
) -> None:
    dataset = own_dataset(16)
    strip(dataset, ids_of(dataset)[:10])
    load = ("load", "--source", dataset)
    assert run(*load, "--batch-id", "b1").code == 6
    assert heads(team) == ["load holds a batch back"]
    assert run(*load, "--batch-id", "b1").code == 6
    assert run(*load, "--batch-id", "b2").code == 3  # all is claimed by b1
    assert run("load", "--source", own_dataset(2, seed=1, first_id=900_000), "--batch-id", "b3").code == 0
    assert heads(team) == []
    assert run("publish", "--batch-id", "b1").code == 0
    assert run(*load).code == 0
    assert heads(team) == ["load succeeds again"]


@pytest.mark.parametrize("state", ["loading", "resetting"])
def test_a_batch_that_nobody_finishes_is_told_beside_one_that_is_held(
    state: str, run: Run, own_dataset: MakeDataset, team: Listener, dsn: str
) -> None:
    dataset = own_dataset(16)
    strip(dataset, ids_of(dataset)[:10])
    load = ("load", "--source", dataset)
    assert run(*load, "--batch-id", "b1", "--limit", "4").code == 6
    assert heads(team) == ["load holds a batch back"]
    assert run("discover", *load[1:], "--batch-id", "b2").code == 0
    world.query(dsn, f"UPDATE ingest.batches SET state = '{state}' WHERE id = 'b2'")
    for titles in (["load failed with exit code 3"], []):
        assert run(*load, "--batch-id", "b3").code == 3
        assert heads(team) == titles


def test_a_database_that_is_away_is_told_once_too(
    run: Run, small_dataset: MakeDataset, team: Listener, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, told = ("load", "--source", small_dataset(3)), settings.home / "told.json"
    with monkeypatch.context() as patch:
        patch.setenv("DATABASE_URL", "postgresql://postgres:postgres@127.0.0.1:9/postgres")
        for titles in (["load failed with exit code 3"], []):
            assert run(*load).code == 3
            assert heads(team) == titles
        assert json.loads(told.read_text(encoding="utf-8")) == {"load": ["DatabaseUnavailable"]}
        told.write_text("spoiled", encoding="utf-8")
        assert run(*load).code == 3
        assert heads(team) == ["load failed with exit code 3"]
        patch.setenv("SUPABASE_SERVICE_ROLE_KEY", "a key")  # settings that cannot be read
        for titles in (["verify failed with exit code 2"], []):
            assert run("verify").code == 2
            assert heads(team) == titles
    assert run(*load).code == 0
    assert heads(team) == ["load succeeds again"]
    assert [*json.loads(told.read_text(encoding="utf-8"))["load"]] == []
    assert run(*load).code == 0
    assert heads(team) == []


def test_what_nobody_took_is_told_again(
    run: Run, team: Listener, monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    team.statuses = [500]
    assert "1 of 1 notifications were not taken" in run("load", "--source", "gone").err
    team.statuses = [200]
    monkeypatch.setenv("NOTIFY_URLS", f"json://127.0.0.1:9/{SECRET}, unknown://{SECRET} json://127.0.0.1:{team.port}")
    team.heard.clear()
    done = run("load", "--source", "gone", "--verbose")
    assert heads(team) == ["load failed with exit code 2"]
    assert "1 of NOTIFY_URLS cannot be used by apprise" in done.err
    assert "1 of 2 notifications were not taken" in done.err
    assert SECRET not in done.err
    run("load", "--source", "gone")
    assert heads(team) == []


def test_a_mail_has_the_cause(run: Run, monkeypatch: pytest.MonkeyPatch, settings: Settings, workdir: Path) -> None:
    with mail_server() as (port, mails):
        url = f"mailto://127.0.0.1:{port}?from=loader@example.org&to=team@example.org"
        monkeypatch.setenv("NOTIFY_URLS", url)
        done = run("load", "--source", "gone")
        assert done.code == 2
        assert "notifications" not in done.err
    (mail,) = mails
    assert "Subject: pipeline load failed with exit code 2 on " in mail
    assert "To: team@example.org" in mail
    assert "gone" in mail
    assert settings.key.reveal() not in mail


def test_without_the_extra_the_load_goes_on(
    run: Run, small_dataset: MakeDataset, team: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    done = run("load", "--source", small_dataset(3))
    assert done.code == 0
    assert "`pip install '.[notify]'`" in done.err
    assert run("load", "--source", "gone").code == 2
    assert heads(team) == []


def test_a_problem_has_the_same_name_every_night() -> None:
    def name(error: Exception | None, code: int = 3, detail: str = "") -> str:
        return problem_of(code, error, detail)  # type: ignore[arg-type]

    assert name(None, 0) == ""
    assert name(UnfinishedError("Batch a is unfinished: 1 task failed.", "", "StorageUnavailable")) == name(
        UnfinishedError("Batch b is unfinished: 3 tasks failed.", "", "StorageUnavailable")
    )
    assert name(RefusedError("--strict refuses the batch, 2 inputs are bad:\n  a: b")) == name(
        RefusedError("--strict refuses the batch, 13 inputs are bad:\n  c: d")
    )
    others = [
        name(RefusedError("--strict refuses the batch, 2 inputs are bad:")),
        name(RefusedError("Batch batch_20261129_021500 is being reset.")),
        name(UnfinishedError("Batch a is unfinished: 1 task failed.", "", "DatabaseUnavailable")),
        name(UnfinishedError("Batch a is unfinished: 1 task failed.")),
        name(SettingsError("Not set: DATABASE_URL.")),
        name(SettingsError("Not set: SUPABASE_SERVICE_ROLE_KEY.")),
        name(None, 5, "3 dangling"),
        name(None, 5, "2 dangling"),
        name(None, 130),
        name(DatabaseUnavailable("Away.", "", "57P03")),
        name(HeldError("Batch a is held.")),
        name(ClaimedError("All is claimed.")),
    ]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("UnfinishedError StorageUnavailable", "unfinished: storage unavailable"),
        ("HeldError", "held"),
        ("SettingsError Not set: DATABASE_URL.", "settings error: Not set: DATABASE_URL."),
        ("DatabaseUnavailable 57P03", "database unavailable: 57P03"),
        ("held batch_20261130_021500", "held batch_20261130_021500"),
        ("exit code 5 2 dangling", "exit code 5 2 dangling"),
    ],
)
def test_a_problem_is_told_in_words(problem: str, words: str) -> None:
    assert in_words(problem) == words


@pytest.mark.parametrize(
    ("problem", "told", "held", "new", "over"),  # `others` after the held ones: one that is not held is unfinished
    [
        ("", "", "", "", ""),
        ("a", "", "", "a", ""),
        ("a", "a", "", "", ""),
        ("b", "a", "", "b", ""),
        ("a", "a b", "", "", ""),
        ("", "a b", "", "", "a b"),
        ("HeldError", "", "x", "held x", ""),
        ("HeldError", "held_x", "x y", "held y", ""),
        ("ClaimedError", "held_x", "x", "", ""),
        ("ClaimedError", "", "", "ClaimedError", ""),
        ("ClaimedError", "held_x", "x others", "ClaimedError", ""),
        ("ClaimedError", "held_x ClaimedError", "x others", "", ""),
        ("ClaimedError", "held_x held_y", "x y others", "ClaimedError", ""),
        ("HeldError", "held_x", "x others", "", ""),
        ("", "held_x ClaimedError", "x", "", "ClaimedError"),
        ("", "held_x a", "x", "", "a"),
        ("", "held_x held_y", "y", "", "held_x"),
        ("a", "held_x", "x", "a", ""),
    ],
)
def test_only_news_are_told(problem: str, told: str, held: str, new: str, over: str) -> None:
    def names(text: str) -> frozenset[str]:
        return frozenset(one.replace("_", " ") for one in text.replace("held ", "held_").split())

    memory = Memory(names(told), frozenset(held.split()) - {"others"}, "others" in held)
    assert news(problem, memory) == (names(new), names(over))


def test_a_usage_error_of_a_cron_table_is_told(
    run: Run, run_pipeline: RunPipeline, team: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for titles in (["load failed with exit code 2"], []):
        assert run_pipeline("load", "--sources", "x").returncode == 2
        assert heads(team) == titles
    for command in (("--help",), ("load", "--help"), ("lod",), ("status", "--nothing")):
        run_pipeline(*command)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # somebody types
    assert run("load", "--batch", "b1", "--nothing").code == 2
    assert heads(team) == []


def test_a_database_that_is_silent_keeps_no_news_back(
    workdir: Path, team: Listener, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(alarm, "_ANSWER_SECONDS", 0.2)
    over = threading.Event()

    class Silent(Database):
        def _connect(self) -> NoReturn:
            over.wait(60)
            raise DatabaseUnavailable("There is no answer.")

    with closing(Silent(settings)) as database:
        for told in (["load failed with exit code 3"], []):
            alarm.Alarm("load", False, lambda: database).finish(3, DatabaseUnavailable("There is no answer."))
            assert heads(team) == told
        over.set()
        for thread in threading.enumerate():
            if thread.name == "alarm-database":
                thread.join(60)


def test_what_hangs_or_breaks_does_not_hold_up_the_command(
    run: Run, team: Listener, settings: Settings, monkeypatch: pytest.MonkeyPatch, small_dataset: MakeDataset
) -> None:
    assert run("load", "--source", small_dataset(3)).code == 0
    monkeypatch.setattr(notify, "_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("NOTIFY_URLS", f"json://127.0.0.1:{silent.getsockname()[1]}")
        done = run("load", "--source", "gone")
        assert (done.code, "1 of 1 notifications were not taken within" in done.err) == (2, True)
    monkeypatch.setattr(alarm, "_NEWS_SECONDS", 0.5)
    dsn = settings.database_url.reveal()
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE ingest.notifications IN ACCESS EXCLUSIVE MODE")
        done = run("load", "--source", "gone")
        assert (done.code, "Nobody was notified within" in done.err) == (2, True)
    # What hung goes on now, and its log needs the streams of this test.
    for thread in threading.enumerate():
        if thread.name in ("alarm", "alarm-database", "notify"):
            thread.join(60)
            assert not thread.is_alive()
    monkeypatch.undo()

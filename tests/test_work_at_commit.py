"""Work that begins while a batch commits: one of the two waits for the other, and then sees a whole state."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS
from tests import world
from tests.reset_support import WAITING
from tests.runner import ForkServer, Runner, Running
from tests.services import MakeDataset, fresh_database

pytestmark = pytest.mark.slow

SECONDS = 60
WORK = "INSERT INTO public.validation_work_log (recognition_id) VALUES (%s)"
#: The last writes of a commit and of a reset wait for whoever holds this lock.
GATE = """
    CREATE FUNCTION public.wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END $$;
    CREATE TRIGGER gate AFTER INSERT ON ingest.batch_state FOR EACH ROW
        WHEN (NEW.step = 'transform') EXECUTE FUNCTION public.wait_at_gate();
    CREATE TRIGGER gate AFTER DELETE ON raw.photos FOR EACH STATEMENT EXECUTE FUNCTION public.wait_at_gate();
"""
FIRST = 100_024


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, app_template: str) -> Iterator[str]:
    with fresh_database(postgres_server.dsn, f"app_{uuid.uuid4().hex}", app_template) as url:
        yield url


@pytest.fixture
def runner(workdir: Path, fork_server: ForkServer) -> Runner:
    return Runner(fork_server, workdir, {"PIPELINE_THREAD_COUNT": "1"})


@pytest.fixture
def commands(runner: Runner, small_dataset: MakeDataset, settings: Settings) -> dict[str, tuple[str | Path, ...]]:
    """Two trays that are loaded and annotated, and what changes both."""
    former, latter = small_dataset(2), small_dataset(2, seed=1, first_id=FIRST)
    both = (
        ("load", "--source", former, "--batch-id", "b1", "--local-scheduler"),
        ("load-qwen", "--file", former / ANNOTATIONS, "--batch-id", "q1", "--local-scheduler"),
    )
    for command in (("migrate",), *both):
        ended = runner(*command)
        assert ended.code == 0, ended.stderr
    return {
        "load": ("load", "--source", latter, "--batch-id", "b2", "--force", "--local-scheduler"),
        "load-qwen": ("load-qwen", "--file", latter / ANNOTATIONS, "--batch-id", "q2", "--force", "--local-scheduler"),
        "reset": ("reset", "--batch-id", "b2", "--confirm"),
    }


def state(dsn: str, number: int) -> str:
    """Return all that the domain has of a recognition."""
    texts = [
        f"SELECT t::text FROM public.{name} t WHERE {world.recognition_of(f'public.{name}')} = {number} ORDER BY 1"
        for name in world.DOMAIN
        if name not in ("menus", "menu_items")
    ]
    return json.dumps(world.queries(dsn, texts))


def assert_whole(dsn: str, number: int, *, annotated: bool) -> None:
    """The copy that the app's trigger made is all that there is of a recognition."""
    for copied, there, is_some in (
        (
            f"SELECT initial_item_id FROM public.work_items WHERE recognition_id = {number} ORDER BY 1",
            f"SELECT id FROM public.initial_tray_items WHERE recognition_id = {number} ORDER BY 1",
            True,
        ),
        (
            "SELECT w.initial_annotation_id, w.bbox::text FROM public.work_annotations w"
            f" JOIN public.images i ON i.id = w.image_id WHERE i.recognition_id = {number} ORDER BY 1",
            "SELECT a.id, a.bbox::text FROM public.initial_annotations a"
            f" JOIN public.images i ON i.id = a.image_id WHERE i.recognition_id = {number} ORDER BY 1",
            annotated,
        ),
    ):
        found = world.query(dsn, copied)
        assert found == world.query(dsn, there)
        assert bool(found) == is_some


def await_waiting(dsn: str, count: int, running: Running) -> None:
    assert wait_until(lambda: world.query(dsn, WAITING) == [(count,)] or running.wait(0), SECONDS)
    assert not running.wait(0), running.finish()


@pytest.mark.parametrize("kind", ["load", "load-qwen", "reset"])
def test_work_that_begins_during_a_commit_waits_and_sees_the_new_state(
    kind: str, runner: Runner, commands: dict[str, tuple[str | Path, ...]], settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    if kind == "reset":
        assert runner(*commands["load"]).code == 0
    world.query(dsn, GATE)
    before = state(dsn, FIRST)
    errors: list[psycopg2.Error] = []

    def work() -> None:
        try:
            world.query(dsn, WORK, (FIRST,))
        except psycopg2.Error as exc:
            errors.append(exc)

    with closing(psycopg2.connect(dsn)) as holder, holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(42)")
        running = runner.start(*commands[kind])
        await_waiting(dsn, 1, running)
        app = threading.Thread(target=work)
        app.start()
        await_waiting(dsn, 2, running)
        assert state(dsn, FIRST) == before
        holder.rollback()
    ended = running.finish()
    app.join(SECONDS)
    assert (ended.code, errors) == (0, []), ended
    assert state(dsn, FIRST) != before
    assert_whole(dsn, FIRST, annotated=kind != "load")  # its photos are others
    assert world.inconsistencies(settings) == []


@pytest.mark.parametrize("kind", ["load", "load-qwen", "reset"])
def test_a_commit_waits_for_work_that_has_begun_and_leaves_it_as_it_is(
    kind: str, runner: Runner, commands: dict[str, tuple[str | Path, ...]], settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    if kind == "reset":
        assert runner(*commands["load"]).code == 0
    before, neighbour = state(dsn, FIRST), state(dsn, FIRST + 1)
    with closing(psycopg2.connect(dsn)) as app, app.cursor() as cursor:
        cursor.execute(WORK, (FIRST,))
        running = runner.start(*commands[kind])
        await_waiting(dsn, 1, running)
        app.commit()
    ended = running.finish()
    assert ended.code == (4 if kind == "reset" else 0), ended
    assert state(dsn, FIRST) == before
    assert (state(dsn, FIRST + 1) == neighbour) == (kind == "reset")
    assert_whole(dsn, FIRST, annotated=kind != "reset")
    notices = world.query(dsn, "SELECT DISTINCT recognition_id FROM ingest.notices WHERE code = 'in_use'")
    assert notices == ([] if kind == "reset" else [(FIRST,)])
    assert world.inconsistencies(settings) == []

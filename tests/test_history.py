"""Which migrations are applied: two histories, the app's repository, and the same file under another version."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.database.migrate import export, migrate, migrations
from pipeline.errors import UsageError
from tests import annotating, histories, world
from tests.annotating import Run
from tests.histories import APP, CLI, OWN, history, record, write_app
from tests.services import MakeDataset, fresh_database
from tests.test_app_project import catalogue

run = annotating.run
dsn = annotating.dsn

LABELS = [one.label for one in migrations()]
UP_TO_DATE = "The schema is up to date\n"
SECONDS = 30.0


@pytest.fixture
def has_photos() -> bool:
    return True


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The address of an empty database; each test says whose project it is."""
    with fresh_database(postgres_server.dsn, f"history_{uuid.uuid4().hex}") as url:
        yield url


@pytest.fixture
def app(dsn: str, tmp_path: Path) -> Path:
    """The app's project, and the folder of its migrations, all of which are recorded."""
    folder = write_app(tmp_path / "app" / "supabase" / "migrations")
    world.query(dsn, APP.read_text(encoding="utf-8"))
    record(dsn, folder)
    return folder


def own(dsn: str) -> list[tuple[object, ...]]:
    return world.query(dsn, f"SELECT version, name, checksum FROM {OWN} ORDER BY version")


def expected() -> list[tuple[object, ...]]:
    essence = str.maketrans("", "", " \t\r\n;")
    digests = {one: hashlib.sha256(one.text.translate(essence).encode()).hexdigest() for one in migrations()}
    return [(one.version, one.name, digest) for one, digest in digests.items()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Where it is recorded


def test_in_an_apps_project_the_history_of_the_cli_stays_as_it_is(run: Run, dsn: str, app: Path) -> None:
    before = history(dsn)
    assert len(before) == len(histories.VERSIONS) == 68
    done = run("migrate")
    assert (done.code, done.out.count("applied 2026")) == (0, len(LABELS)), done.err
    assert (history(dsn), own(dsn)) == (before, expected())
    rows = world.query(dsn, f"SELECT xmin::text, name FROM {OWN}")
    assert run("migrate").out == UP_TO_DATE
    assert world.query(dsn, f"SELECT xmin::text, name FROM {OWN}") == rows
    assert "Migrations: up to date" in run("status").out


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(("CREATE TABLE public.notes (n int)",), id="tables of an app without the CLI"),
        pytest.param(("CREATE VIEW public.today AS SELECT now()",), id="a view of an app"),
        pytest.param(
            ("CREATE SCHEMA supabase_migrations", f"CREATE TABLE {CLI} (version text PRIMARY KEY)",
             f"INSERT INTO {CLI} VALUES ('20250101000000')"),
            id="a history without names",
        ),
        pytest.param(
            ("CREATE SCHEMA supabase_migrations",
             f"CREATE TABLE {CLI} (version text PRIMARY KEY, statements text[], name text)",
             f"INSERT INTO {CLI} VALUES ('20260102000000', NULL, 'init')"),
            id="a version of ours that is an app's",
        ),
        pytest.param(
            ("CREATE SCHEMA supabase_migrations",
             f"CREATE TABLE {CLI} (version text PRIMARY KEY, statements text[], name text)",
             "CREATE TABLE public.notes (n int)"),
            id="an empty history beside an app's tables",
        ),
    ],
)  # fmt: skip
def test_ours_is_the_history_where_there_is_an_app(run: Run, dsn: str, statements: tuple[str, ...]) -> None:
    for statement in statements:
        world.query(dsn, statement)
    before = history(dsn)
    assert run("migrate").code == 0
    assert (history(dsn), own(dsn)) == (before, expected())
    assert run("migrate").out == UP_TO_DATE


@pytest.mark.parametrize(
    "statement",
    ["", "CREATE EXTENSION pg_stat_statements", "CREATE SCHEMA notes; CREATE TABLE notes.notes (n int)"],
    ids=["nothing", "an extension", "another schema"],
)
def test_the_history_of_the_cli_is_used_where_nobody_else_is(run: Run, dsn: str, statement: str) -> None:
    world.query(dsn, statement or "SELECT 1")
    assert run("migrate").code == 0
    assert [f"{version}_{name}" for version, _, name in history(dsn)] == LABELS
    assert own(dsn) == []
    assert run("migrate").out == UP_TO_DATE


def test_several_at_once_record_each_migration_once_beside_an_app(settings: Settings, dsn: str, app: Path) -> None:
    together = threading.Barrier(4)

    def apply(_: int) -> list[str]:
        with closing(Database(settings)) as database:
            together.wait(SECONDS)
            return [one.label for one in migrate(database)]

    with ThreadPoolExecutor(4) as pool:
        assert sorted(label for found in pool.map(apply, range(4)) for label in found) == LABELS
    assert own(dsn) == expected()


def test_a_reader_does_not_wait_behind_a_migration_that_waits(settings: Settings, dsn: str, app: Path) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with closing(psycopg2.connect(dsn)) as reader, reader.cursor() as cursor, closing(Database(settings)) as database:
        cursor.execute("SELECT FROM public.recognitions")
        with ThreadPoolExecutor(1) as pool:
            applied = pool.submit(migrate, database)
            assert wait_until(lambda: world.query(dsn, waiting) != [(0,)], SECONDS)
            world.query(dsn, "SET statement_timeout = '5s'; SELECT count(*) FROM public.recognitions")
            reader.rollback()
            assert [one.label for one in applied.result(SECONDS)] == LABELS


# The app's repository


def test_an_export_is_stamped_after_the_newest_file_in_our_order(run: Run, app: Path) -> None:
    before = {name: (app / name).read_bytes() for name in names(app)}
    done = run("migrate", "--export", app)
    stamps = [f"2026040210000{number}" for number in range(1, len(LABELS) + 1)]
    written = [f"{stamp}_{one.name}.sql" for stamp, one in zip(stamps, migrations(), strict=True)]
    assert done.code == 0
    assert done.out.splitlines()[:-1] == [f"exported {app / name}" for name in written]
    assert names(app) == sorted([*before, *written])
    assert {name: (app / name).read_bytes() for name in before} == before
    assert [(app / name).read_text(encoding="utf-8") for name in written] == [one.text for one in migrations()]
    after = {path: path.stat() for path in app.iterdir()}
    assert run("migrate", "--export", app).out == f"{app} has all migrations\n"
    assert {path: path.stat() for path in app.iterdir()} == after


@pytest.mark.parametrize(
    ("newest", "first"),
    [
        ("20261231235959", "20270101000000"),
        ("20280228235958", "20280228235959"),
        ("20269999999999", "20270000000000"),
        ("0007", "0008"),
        ("99991231235958", "99991231235959"),
    ],
)
def test_a_stamp_follows_whatever_the_newest_is(tmp_path: Path, newest: str, first: str) -> None:
    (tmp_path / f"{newest}_newest.sql").touch()
    (tmp_path / "0001_older.sql").touch()
    (tmp_path / "99999999999999_no_migration.txt").touch()
    assert export(tmp_path)[0].name.partition("_")[0] == first


def test_into_an_empty_folder_the_export_keeps_our_versions(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert run("migrate", "--export", folder).code == 0
    assert names(folder) == [f"{label}.sql" for label in LABELS]


def test_an_export_adds_what_a_newer_version_of_the_loader_has(app: Path) -> None:
    export(app)
    [last] = app.glob(f"*_{migrations()[-1].name}.sql")
    last.unlink()
    (app / "20260501000000_of_the_app.sql").touch()
    assert [path.name for path in export(app)] == [f"20260501000001_{migrations()[-1].name}.sql"]


def test_a_copy_that_was_changed_stops_the_export_before_it_writes(run: Run, app: Path) -> None:
    changed = app / f"20260402100001_{migrations()[-1].name}.sql"
    changed.write_text(migrations()[-1].text + "SELECT 1;\n", encoding="utf-8")
    before = names(app)
    done = run("migrate", "--export", app)
    assert (done.code, str(changed) in done.err) == (4, True)
    assert names(app) == before


def test_an_export_needs_a_folder_that_is_there(run: Run, app: Path) -> None:
    for folder in (app / "typing error", app / names(app)[0]):
        assert run("migrate", "--export", folder).code == 2
        with pytest.raises(UsageError, match=r"No such file or directory|Not a directory"):
            export(folder)


def test_exported_files_that_the_cli_applied_are_known(run: Run, dsn: str, app: Path, own_dataset: MakeDataset) -> None:
    for path in export(app):
        world.query(dsn, path.read_text(encoding="utf-8"))
    record(dsn, app)
    before = history(dsn)
    assert "Migrations: up to date" in run("status").out
    assert run("migrate").out == UP_TO_DATE
    assert (history(dsn), own(dsn)) == (before, [])
    assert run("load", "--source", own_dataset(2), "--batch-id", "b1").code == 0


def test_what_the_cli_has_not_applied_yet_is_applied_beside_it(run: Run, dsn: str, app: Path) -> None:
    for path in export(app)[1:]:
        path.unlink()
    world.query(dsn, migrations()[0].text)
    record(dsn, app)
    done = run("migrate")
    assert [line for line in done.out.splitlines() if " 2026" in line] == [f"applied {label}" for label in LABELS[1:]]
    assert own(dsn) == expected()[1:]


def test_once_an_app_is_there_what_is_new_is_recorded_beside_it(run: Run, dsn: str) -> None:
    assert run("migrate").code == 0
    world.query(dsn, f"DELETE FROM {CLI} WHERE name = %s", (migrations()[-1].name,))
    world.query(dsn, f"INSERT INTO {CLI} VALUES ('20260501000000', NULL, 'of_the_app')")
    before = history(dsn)
    assert f"applied {LABELS[-1]}" in run("migrate").out
    assert (history(dsn), own(dsn)) == (before, expected()[-1:])


# Twice


@pytest.mark.parametrize("project", ["app", "empty"])
def test_every_file_runs_twice_and_changes_nothing_more(
    run: Run, dsn: str, own_dataset: MakeDataset, project: str
) -> None:
    if project == "app":
        world.query(dsn, APP.read_text(encoding="utf-8"))
    assert run("migrate").code == 0
    dataset = own_dataset(2)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    before, owners = (
        catalogue(dsn),
        "SELECT oid, relname, relacl::text FROM pg_class WHERE relnamespace > 16384 ORDER BY 1",
    )
    functions = "SELECT oid, prosrc, proconfig, proacl::text FROM pg_proc WHERE pronamespace = 'ingest'::regnamespace"
    kept = [sorted(world.query(dsn, question), key=repr) for question in (owners, functions)]
    for migration in migrations():
        world.query(dsn, migration.text)
    assert catalogue(dsn) == before
    assert [sorted(world.query(dsn, question), key=repr) for question in (owners, functions)] == kept
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("verify").code == 0


def test_migrate_runs_again_after_its_record_was_lost(run: Run, dsn: str, app: Path) -> None:
    assert run("migrate").code == 0
    before = catalogue(dsn)
    world.query(dsn, f"DELETE FROM {OWN}")
    done = run("migrate")
    assert (done.code, catalogue(dsn), own(dsn)) == (0, before, expected()), done.err


def test_all_names_are_ours_at_a_glance() -> None:
    assert [one.name for one in migrations() if not one.name.startswith("pipeline_")] == []


# Another text


def change_own(dsn: str) -> None:
    world.query(dsn, f"UPDATE {OWN} SET checksum = repeat('0', 64) WHERE name = 'pipeline_domain'")


def change_cli(dsn: str) -> None:
    world.query(dsn, f"UPDATE {CLI} SET statements = statements || 'SELECT 1'::text WHERE name = 'pipeline_domain'")


@pytest.mark.parametrize(("with_app", "change"), [(True, change_own), (False, change_cli)], ids=["ours", "the CLI's"])
def test_another_text_of_the_same_name_is_refused_by_name(
    run: Run, dsn: str, tmp_path: Path, own_dataset: MakeDataset, with_app: bool, change: Callable[[str], None]
) -> None:
    if with_app:
        world.query(dsn, APP.read_text(encoding="utf-8"))
    assert run("migrate").code == 0
    change(dsn)
    before = catalogue(dsn)
    for command in (
        ("migrate",),
        ("migrate", "--release-history"),
        ("load", "--source", own_dataset(1)),
        ("status", "--check"),
    ):
        done = run(*command)
        assert (done.code, "pipeline_domain was applied with another text" in done.err + done.out) == (4, True), command
    assert catalogue(dsn) == before


@pytest.mark.parametrize(
    "change",
    ["statements", "array_replace(statements, statements[1], E'\\n\\n' || statements[1] || E'\\n;\\n')", "NULL"],
    ids=["none", "white space", "no statements"],
)
def test_a_record_without_another_meaning_is_the_same(run: Run, dsn: str, change: str) -> None:
    assert run("migrate").code == 0
    world.query(dsn, f"UPDATE {CLI} SET statements = {change}")
    assert run("migrate").out == UP_TO_DATE


# An app moves in


def test_a_history_is_released_once_and_completely(run: Run, dsn: str, tmp_path: Path) -> None:
    assert run("migrate").code == 0
    done = run("migrate", "--release-history")
    assert (done.code, done.out.splitlines()[:-1]) == (0, [f"released {label}" for label in LABELS])
    assert (history(dsn), own(dsn)) == ([], expected())
    assert run("migrate").out == UP_TO_DATE
    rows = world.query(dsn, f"SELECT * FROM {OWN}")
    done = run("migrate", "--release-history")
    assert (done.code, "no record of ours" in done.out) == (0, True)
    assert world.query(dsn, f"SELECT * FROM {OWN}") == rows


def test_the_records_of_an_app_and_of_its_copies_are_not_released(run: Run, dsn: str, app: Path) -> None:
    for path in export(app):
        world.query(dsn, path.read_text(encoding="utf-8"))
    record(dsn, app)
    for one in migrations()[:2]:
        world.query(dsn, f"INSERT INTO {CLI} VALUES (%s, %s, %s)", (one.version, [one.text], one.name))
    before = [row for row in history(dsn) if row[0] not in {one.version for one in migrations()}]
    assert run("migrate", "--release-history").code == 0
    assert (history(dsn), own(dsn)) == (before, expected()[:2])


@pytest.mark.parametrize("project", ["app", "empty"])
def test_without_a_record_of_ours_nothing_is_released(
    run: Run, dsn: str, project: str, request: pytest.FixtureRequest
) -> None:
    if project == "app":
        request.getfixturevalue("app")
    before = history(dsn)
    done = run("migrate", "--release-history")
    assert (done.code, history(dsn)) == (0, before)
    assert run("migrate", "--release-history", "--json").out == '{"released": []}\n'

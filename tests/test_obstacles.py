"""What stands in the way of the migrations is told before anything is changed, by the check and by `migrate`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import psycopg2
import pytest

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Secret, Settings
from pipeline.database import Database
from pipeline.database.migrate import migrations
from pipeline.doctor.obstacles import find_obstacles
from tests import annotating, world
from tests.annotating import Run
from tests.services import fresh_database
from tests.sweeps import sweep
from tests.test_app_project import catalogue

run = annotating.run
dsn = annotating.dsn


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, app_template: str) -> Iterator[str]:
    """The address of a database as the app has it, not migrated yet."""
    with fresh_database(postgres_server.dsn, f"obstacles_{uuid.uuid4().hex}", app_template) as url:
        world.query(url, "DROP VIEW public.annotation_export")  # which would keep others from changing its columns
        yield url


def obstacles(settings: Settings) -> list[str]:
    with closing(Database(settings)) as database:
        return [one.message for one in find_obstacles(database)]


TABLE = "needs a table of its own under that name"


@pytest.mark.parametrize(
    ("statement", "message"),
    sweep([
        ("ALTER TABLE public.images ALTER width TYPE text", "public.images.width is text, and the loader"),
        ("ALTER TABLE public.recipes ALTER raw_payload TYPE json", "raw_payload is json, and the loader needs jsonb"),
        ("ALTER TABLE public.recognition_active_menu_items ALTER price TYPE float", "price is double precision, and"),
        ("ALTER TABLE public.recognition_active_menu_items ALTER price TYPE numeric(6, 2)", "needs numeric(10,2)"),
        ("ALTER TABLE public.images ADD COLUMN sha256 bytea", "public.images.sha256 is bytea, and the loader"),
        ("ALTER TABLE public.recognitions ADD COLUMN menu_id uuid", "public.recognitions.menu_id is uuid"),
        ("ALTER TABLE public.initial_tray_items ALTER bottle_orientation TYPE text", "needs bottle_orientation"),
        ("ALTER TABLE public.images RENAME storage_path TO path", "public.images has no column storage_path (text)"),
        ("ALTER TABLE public.recognitions DROP COLUMN batch_id", "public.recognitions has no column batch_id (text)"),
        ("ALTER TABLE public.images ADD COLUMN lens text; UPDATE public.images SET lens = 'x';"
         "ALTER TABLE public.images ALTER lens SET NOT NULL", "The column public.images.lens needs a value"),
        ("ALTER TABLE public.images DROP CONSTRAINT images_recognition_id_camera_number_key", "(camera_number, recogn"),
        ("ALTER TABLE public.recipes DROP CONSTRAINT recipes_recognition_id_key", "recipes has no unique key (recogni"),
        ("ALTER TABLE public.recognition_active_menu_items DROP CONSTRAINT "
         "recognition_active_menu_items_recognition_id_external_id_key CASCADE", "no unique key (external_id, recogn"),
        ("ALTER TYPE public.item_type RENAME VALUE 'PLATE' TO 'DISH'", "The enum public.item_type has no label PLATE"),
        ("CREATE TABLE public.menus (day date)", f"public.menus is in the way: the loader {TABLE}"),
        ("CREATE VIEW public.menu_items AS SELECT 1 AS id", f"public.menu_items is in the way: the loader {TABLE}"),
        ("CREATE TABLE raw.photos (id int)", f"raw.photos is in the way: the loader {TABLE}"),
        ("CREATE TABLE raw.receipts (recognition_id bigint, payload jsonb)", "raw.receipts is in the way: the loader"),
        ("CREATE TYPE raw.menus AS ENUM ('a')", "The type raw.menus is in the way"),
        ("CREATE SCHEMA ingest; CREATE TABLE ingest.batches (id int)", "The table ingest.batches has no column kind"),
        ("CREATE SCHEMA ingest; CREATE SEQUENCE ingest.claims", f"ingest.claims is in the way: the loader {TABLE}"),
        ("CREATE SCHEMA ingest; CREATE FUNCTION ingest.line_of(label text) RETURNS text LANGUAGE sql AS 'SELECT label'",
         "The function ingest.line_of(text) is in the way"),
    ]),
)  # fmt: skip
def test_an_obstacle_is_named_before_anything_is_changed(
    run: Run, settings: Settings, dsn: str, statement: str, message: str
) -> None:
    world.query(dsn, statement)
    before = catalogue(dsn)
    checked, done = run("status", "--check"), run("migrate")
    assert (checked.code, message in checked.out) == (4, True), checked.out
    assert (done.code, message in done.err, "Nothing was changed" in done.err) == (4, True, True), done.err
    assert catalogue(dsn) == before


def test_a_type_of_another_kind_and_every_obstacle_are_named(run: Run, settings: Settings, dsn: str) -> None:
    world.query(dsn, "ALTER TABLE public.initial_tray_items DROP COLUMN bottle_orientation")
    world.query(dsn, "DROP TYPE public.bottle_orientation; CREATE DOMAIN public.bottle_orientation AS text")
    world.query(dsn, "CREATE TABLE public.menus (day date)")
    found = obstacles(settings)
    assert len(found) == 3
    assert any("The type public.bottle_orientation is not an enum" in one for one in found)
    assert [one for one in found if one not in run("migrate").err] == []


@pytest.mark.parametrize("applied", range(len(migrations()) + 1))
def test_nothing_is_in_the_way_of_what_fits(settings: Settings, dsn: str, applied: int) -> None:
    for migration in migrations()[:applied]:
        world.query(dsn, migration.text)
    assert obstacles(settings) == []


def test_nothing_is_in_the_way_of_an_empty_project(settings: Settings, empty_database_url: str) -> None:
    assert obstacles(replace(settings, database_url=Secret(empty_database_url))) == []


def test_what_an_app_may_add_is_no_obstacle(run: Run, settings: Settings, dsn: str) -> None:
    world.query(
        dsn,
        "ALTER TABLE public.images ADD COLUMN lens text, ADD COLUMN shown bigint NOT NULL DEFAULT 0;"
        "ALTER TABLE public.recipes ADD COLUMN twice numeric GENERATED ALWAYS AS (recognition_id * 2) STORED NOT NULL;"
        "ALTER TYPE public.item_type ADD VALUE 'CUP';"
        "CREATE TABLE public.cups (id int); CREATE TABLE raw.other (id int)",
    )
    assert obstacles(settings) == []
    assert run("migrate").code == 0


@pytest.fixture
def weak(settings: Settings, dsn: str) -> Iterator[Settings]:
    """These settings with a role that may do all in this project; a test takes something from it."""
    role, name = f"weak_{uuid.uuid4().hex}", dsn.split("?")[0].rpartition("/")[2]
    world.query(dsn, f"CREATE ROLE {role} LOGIN; GRANT CREATE, TEMPORARY ON DATABASE {name} TO {role}")
    world.query(dsn, f"GRANT ALL ON SCHEMA public, raw, supabase_migrations TO {role}")
    world.query(dsn, f"GRANT ALL ON ALL TABLES IN SCHEMA supabase_migrations TO {role}")
    for (table,) in world.query(dsn, "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' "
                                     "AND relnamespace IN ('public'::regnamespace, 'raw'::regnamespace)"):  # fmt: skip
        world.query(dsn, f"ALTER TABLE {table} OWNER TO {role}")
    try:
        yield replace(settings, database_url=Secret(dsn.replace("postgres@", f"{role}@")))
    finally:
        world.query(dsn, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("REVOKE CREATE ON DATABASE {database} FROM {role}", "may not create schemas in the database"),
        ("REVOKE CREATE ON SCHEMA public FROM {role}, PUBLIC", "may not create objects in the schema public"),
        ("REVOKE USAGE ON SCHEMA raw FROM {role}, PUBLIC", "may not create objects in the schema raw"),
        ("ALTER TABLE public.images OWNER TO postgres", "does not own the table public.images"),
    ],
)
def test_a_right_that_is_missing_is_named(weak: Settings, dsn: str, statement: str, message: str) -> None:
    assert obstacles(weak) == []
    role, database = (
        world.query(weak.database_url.reveal(), f"SELECT {one}")[0][0] for one in ("current_user", "current_database()")
    )
    world.query(dsn, statement.format(role=role, database=database))
    [found] = obstacles(weak)
    assert message in found


def test_the_check_does_not_wait_for_the_app_nor_stop_it(run: Run, settings: Settings, dsn: str) -> None:
    with closing(psycopg2.connect(dsn)) as app, app.cursor() as cursor:
        cursor.execute("LOCK TABLE public.images, public.initial_tray_items IN ACCESS EXCLUSIVE MODE")
        assert obstacles(settings) == []

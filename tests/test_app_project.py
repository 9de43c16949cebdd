"""In an app's project the loader is a guest: what is there stays as it is, and people's work is never deleted."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from tests import annotating, world
from tests.annotating import RECEIPT, Run, give_receipt, ids_of, key_of, value_of, write
from tests.services import MakeDataset, fresh_database

run = annotating.run
dsn = annotating.dsn

APP = Path(__file__).with_name("app_project.sql")
#: Tables of the app with the columns that they had before.
COLUMNS = """
    SELECT table_schema, table_name, column_name, data_type, is_nullable, column_default
    FROM information_schema.columns WHERE table_schema IN ('public', 'raw') ORDER BY 1, 2, ordinal_position
"""
CATALOGUE = {
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace IN ('public'::regnamespace, 'raw'::regnamespace) ORDER BY 1, 2""",
    "indexes": """
        SELECT schemaname, indexname, indexdef FROM pg_indexes WHERE schemaname IN ('public', 'raw') ORDER BY 1, 2""",
    "policies": "SELECT tablename, policyname, roles::text, qual, with_check FROM pg_policies ORDER BY 1, 2",
    "triggers": "SELECT tgrelid::regclass::text, tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    "security": """
        SELECT oid::regclass::text, relrowsecurity, relforcerowsecurity, relacl::text FROM pg_class
        WHERE relnamespace IN ('public'::regnamespace, 'raw'::regnamespace) AND relkind IN ('r', 'v') ORDER BY 1""",
    "types": """
        SELECT t.typname, e.enumlabel FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid
        ORDER BY 1, e.enumsortorder""",
    "functions": "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
}


def rows_of(dsn: str, columns: list[tuple[object, ...]]) -> dict[str, list[tuple[object, ...]]]:
    """Return the rows of tables, in these columns."""
    tables: dict[str, list[str]] = {}
    for schema, table, column, *_ in columns:
        tables.setdefault(f"{schema}.{table}", []).append(f'"{column}"')
    return {
        name: sorted(world.query(dsn, f"SELECT {', '.join(own)} FROM {name}"), key=str) for name, own in tables.items()
    }


def catalogue(dsn: str) -> dict[str, list[tuple[object, ...]]]:
    return {name: world.query(dsn, text) for name, text in CATALOGUE.items()}


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, app_template: str) -> Iterator[str]:
    """The address of a database as the app has it, not migrated yet."""
    with fresh_database(postgres_server.dsn, f"app_{uuid.uuid4().hex}", app_template) as url:
        yield url


def test_migrations_add_to_the_app_and_change_nothing(run: Run, dsn: str) -> None:
    columns = world.query(dsn, COLUMNS)
    before, rows = catalogue(dsn), rows_of(dsn, columns)
    assert run("migrate").code == 0
    now = world.query(dsn, COLUMNS)
    assert set(columns) <= set(now)
    assert {column[4] for column in set(now) - set(columns) if column[1] in {one[1] for one in columns}} == {"YES"}
    after = catalogue(dsn)
    for name, had in before.items():
        assert set(had) <= set(after[name]), name
    for name in ("policies", "triggers", "types", "functions"):
        assert after[name] == before[name]
    assert rows_of(dsn, columns) == rows
    done = run("migrate")
    assert (done.code, catalogue(dsn)) == (0, after)


def test_a_load_beside_the_trays_of_the_app_leaves_them_as_they_are(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    columns = world.query(dsn, COLUMNS)
    rows = rows_of(dsn, columns)
    assert run("migrate").code == 0
    dataset = own_dataset(3)
    done = run("load", "--source", dataset, "--batch-id", "b1")
    assert done.code == 0, done.err
    done = run("load-qwen", "--file", dataset / "qwen_annotations.json", "--batch-id", "q1")
    assert done.code == 0, done.err
    assert run("verify").code == 0
    assert world.inconsistencies(settings) == []
    menus = "SELECT count(*) FROM public.recognition_active_menu_items WHERE recognition_id = ANY (%s)"
    assert world.query(dsn, menus, (ids_of(dataset),))[0][0] > 100
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert rows_of(dsn, columns) == rows
    assert world.objects(settings) == {}


def test_what_people_work_on_stays_and_is_noticed(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    assert run("migrate").code == 0
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    for number in (first, second, third):
        give_receipt(dataset, number, RECEIPT)
    values = {key_of(number): value_of("dish_0", "plate") for number in (first, second, third)}
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    world.query(dsn, "INSERT INTO public.validation_work_log (recognition_id) VALUES (%s)", (first,))
    work = "SELECT * FROM public.work_items ORDER BY id"
    before = world.query(dsn, work)
    objects = world.objects(settings)
    for number in (first, second):
        give_receipt(dataset, number, RECEIPT[1:])
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.code == 0, done.err
    assert world.query(dsn, "SELECT recognition_id, code, message FROM ingest.notices WHERE code = 'in_use'") == [
        (
            first,
            "in_use",
            "the recognition stays as it is, since rows of others reference what would be deleted: "
            "public.work_items (4 rows)",
        )
    ]
    assert world.query(dsn, work) == before
    shown = "SELECT batch_id FROM public.recognitions WHERE id = ANY (%s) ORDER BY id"
    assert world.query(dsn, shown, ([first, second, third],)) == [("b1",), ("b2",), ("b2",)]
    kept = {key: digest for key, digest in world.objects(settings).items() if not key.startswith("b2/")}
    assert kept == objects
    assert not any(key.startswith(f"b2/recognitions/{first}/") for key in world.objects(settings))


def test_a_reset_that_would_delete_entries_of_others_is_refused(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    assert run("migrate").code == 0
    dataset = own_dataset(2)
    for path in dataset.rglob("*AM.json"):
        path.unlink()
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    table = "public.recognition_active_menu_items"
    world.query(
        dsn,
        f"CREATE TABLE public.entry_work (entry bigint REFERENCES {table} (id) ON DELETE CASCADE);"
        f"INSERT INTO {table} (recognition_id, external_id, name) VALUES (%s, '888', 'of the app')",
        (ids_of(dataset)[0],),
    )
    world.query(dsn, f"INSERT INTO public.entry_work SELECT id FROM {table} WHERE external_id = '888'")
    assert f"blocked by {table}: 1 row" in run("reset", "--batch-id", "b1", "--dry-run").out
    refused = run("reset", "--batch-id", "b1", "--confirm")
    assert (refused.code, f"{table} (1 row, to public.recognitions)" in refused.err) == (4, True)
    assert world.query(dsn, "SELECT count(*) FROM public.entry_work") == [(1,)]
    world.query(dsn, f"DELETE FROM {table} WHERE external_id = '888'")
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0

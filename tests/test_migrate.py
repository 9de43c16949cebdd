"""migrate.py: the real files on a real PostgreSQL, the history as the Supabase CLI keeps it, and who sees what then."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import pytest

from pipeline.database import Database
from pipeline.database.migrate import Migration, migrate, migrations, pending
from pipeline.errors import DatabaseError, PermanentError
from tests.services import REPOSITORY, StorageServer, execute, local_settings

DIRECTORY = REPOSITORY / "supabase" / "migrations"
HISTORY = "supabase_migrations.schema_migrations"
SECONDS = 30.0
SCHEMAS = ("public", "ingest", "raw")

# How the Supabase CLI makes its table: the columns came one after the other over the years.
CLI_TABLE = [
    "CREATE SCHEMA IF NOT EXISTS supabase_migrations",
    f"CREATE TABLE IF NOT EXISTS {HISTORY} (version text NOT NULL PRIMARY KEY)",
    f"ALTER TABLE {HISTORY} ADD COLUMN IF NOT EXISTS statements text[]",
    f"ALTER TABLE {HISTORY} ADD COLUMN IF NOT EXISTS name text",
]


def door(url: str) -> Database:
    return Database(local_settings(url, StorageServer("http://127.0.0.1:1", "", "none", Path()), "none", Path()))


@pytest.fixture
def database(empty_database_url: str) -> Iterator[Database]:
    with closing(door(empty_database_url)) as database:
        yield database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two migrations of a table of words."""
    write(tmp_path, "20260101000000_words.sql", "CREATE TABLE words (word text);\nINSERT INTO words VALUES ('one');\n")
    write(tmp_path, "20260101000001_more.sql", "INSERT INTO words VALUES ('two');")
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


def versions(found: Sequence[Migration]) -> list[str]:
    return [migration.version for migration in found]


def history(url: str) -> list[tuple[object, ...]]:
    return execute(url, f"SELECT version, name, statements FROM {HISTORY} ORDER BY version")


def words(url: str) -> list[object]:
    return [word for (word,) in execute(url, "SELECT word FROM words ORDER BY ctid")]


# The files


def test_every_file_is_named_as_the_supabase_cli_wants_it_and_no_two_share_a_version() -> None:
    names = sorted(path.name for path in DIRECTORY.iterdir())
    assert names
    assert [name for name in names if not re.fullmatch(r"\d{14}_[a-z0-9_]+\.sql", name)] == []
    assert len({name[:14] for name in names}) == len(names)
    assert [f"{migration.version}_{migration.name}.sql" for migration in migrations()] == names


def test_other_files_beside_the_migrations_are_left_alone(folder: Path) -> None:
    for name in ("README.md", "20260101000002_x.sql.bak", "seed.sql", ".20260101000003_x.sql"):
        write(folder, name, "SELECT 1 / 0")
    assert versions(migrations(folder)) == ["20260101000000", "20260101000001"]


def test_an_installation_without_migrations_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="missing"):
        migrations(tmp_path)


# Statements


@pytest.mark.parametrize(
    "value",
    [r"E'it\'s; x'", "$q1$ a; $$b;$$ $q1$", "'a;b'", "$$;$$", "U&'\\0041;'"],
)
def test_a_file_is_run_whole_whatever_its_strings_have_in_them(
    database: Database, empty_database_url: str, tmp_path: Path, value: str
) -> None:
    text = f"CREATE TABLE words (word text); /* ; /* ; */ */ INSERT INTO words SELECT {value}; -- ; '\n"
    write(tmp_path, "20260101000000_odd.sql", text)
    migrate(database, tmp_path)
    assert execute(empty_database_url, f"SELECT word = {value} FROM words") == [(True,)]
    assert [statements for *_, statements in history(empty_database_url)] == [[text]]


# Applying


def test_the_real_files_are_applied_in_order_once(database: Database, empty_database_url: str) -> None:
    applied = migrate(database)
    assert versions(applied) == sorted(versions(migrations()))
    before = execute(empty_database_url, f"SELECT xmin::text, version FROM {HISTORY} ORDER BY version")
    assert migrate(database) == []
    assert execute(empty_database_url, f"SELECT xmin::text, version FROM {HISTORY} ORDER BY version") == before
    with database.transaction() as connection:
        assert pending(connection) == []


def test_the_history_is_what_the_supabase_cli_would_have_written(database: Database, empty_database_url: str) -> None:
    migrate(database)
    columns = execute(
        empty_database_url,
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
        f"WHERE attrelid = '{HISTORY}'::regclass AND attnum > 0 ORDER BY attname",
    )
    assert columns == [("name", "text", False), ("statements", "text[]", False), ("version", "text", True)]
    key = execute(
        empty_database_url,
        f"SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = '{HISTORY}'::regclass AND contype = 'p'",
    )
    assert key == [("PRIMARY KEY (version)",)]
    rows = history(empty_database_url)
    assert [(version, name) for version, name, _ in rows] == [
        (path.name[:14], path.stem[15:]) for path in sorted(DIRECTORY.iterdir())
    ]
    for (_, _, statements), migration in zip(rows, migrations(), strict=True):
        assert statements == [migration.text]


def test_what_is_pending_is_told_without_any_change(database: Database, empty_database_url: str, folder: Path) -> None:
    with database.transaction(read_only=True) as connection:
        assert versions(pending(connection, folder)) == ["20260101000000", "20260101000001"]
    assert execute(empty_database_url, "SELECT FROM pg_namespace WHERE nspname = 'supabase_migrations'") == []
    migrate(database, folder)
    write(folder, "20260101000002_new.sql", "SELECT 1")
    with database.transaction(read_only=True) as connection:
        assert versions(pending(connection, folder)) == ["20260101000002"]


def test_a_history_that_the_supabase_cli_began_is_continued(
    database: Database, empty_database_url: str, folder: Path
) -> None:
    for statement in CLI_TABLE:
        execute(empty_database_url, statement)
    # The CLI applied our first migration, and splits a file into statements.
    execute(empty_database_url, "CREATE TABLE words (word text)")
    statements = ["CREATE TABLE words (word text)", "INSERT INTO words VALUES ('one')"]
    execute(
        empty_database_url,
        f"INSERT INTO {HISTORY} VALUES ('20260101000000', ARRAY[$${'$$, $$'.join(statements)}$$], 'words')",
    )
    assert versions(migrate(database, folder)) == ["20260101000001"]
    assert words(empty_database_url) == ["two"]
    assert history(empty_database_url) == [
        ("20260101000000", "words", statements),
        ("20260101000001", "more", ["INSERT INTO words VALUES ('two');"]),
    ]


def test_a_history_table_with_more_columns_is_as_good(
    database: Database, empty_database_url: str, folder: Path
) -> None:
    for statement in (*CLI_TABLE, f"ALTER TABLE {HISTORY} ADD COLUMN created_by text, ADD COLUMN rollback text[]"):
        execute(empty_database_url, statement)
    assert len(migrate(database, folder)) == 2


def test_a_history_table_of_an_early_cli_gets_the_columns_it_lacks(
    database: Database, empty_database_url: str, folder: Path
) -> None:
    for statement in CLI_TABLE[:2]:
        execute(empty_database_url, statement)
    migrate(database, folder)
    assert [version for version, *_ in history(empty_database_url)] == ["20260101000000", "20260101000001"]


def test_several_at_once_apply_every_migration_once(empty_database_url: str) -> None:
    together = threading.Barrier(4)

    def run(_: int) -> list[str]:
        with closing(door(empty_database_url)) as database:
            together.wait(SECONDS)
            return versions(migrate(database))

    with ThreadPoolExecutor(4) as pool:
        applied = [version for found in pool.map(run, range(4)) for version in found]
    assert sorted(applied) == versions(migrations())
    assert len(history(empty_database_url)) == len(applied)


def test_a_failing_migration_leaves_neither_its_tables_nor_its_record_and_those_before_it_stay(
    database: Database, empty_database_url: str, folder: Path
) -> None:
    bad = "20260101000002_bad.sql"
    write(folder, bad, "CREATE TABLE half (n int); INSERT INTO words VALUES ('half'); SELECT 1 / 0; CREATE TABLE x ()")
    write(folder, "20260101000003_later.sql", "INSERT INTO words VALUES ('later')")
    with pytest.raises(DatabaseError) as caught:
        migrate(database, folder)
    assert bad in caught.value.message
    assert caught.value.code == "22012"
    assert words(empty_database_url) == ["one", "two"]
    assert execute(empty_database_url, "SELECT to_regclass('half')") == [(None,)]
    assert [version for version, *_ in history(empty_database_url)] == ["20260101000000", "20260101000001"]

    write(folder, bad, "INSERT INTO words VALUES ('mended')")
    assert versions(migrate(database, folder)) == ["20260101000002", "20260101000003"]
    assert words(empty_database_url) == ["one", "two", "mended", "later"]


def test_a_first_migration_that_fails_leaves_no_trace(
    database: Database, empty_database_url: str, tmp_path: Path
) -> None:
    write(tmp_path, "20260101000000_bad.sql", "CREATE TABLE half (n int); SELEC 1;")
    with pytest.raises(DatabaseError):
        migrate(database, tmp_path)
    assert execute(empty_database_url, f"SELECT to_regclass('half'), to_regclass('{HISTORY}')") == [(None, None)]


def test_a_statement_means_what_it_says_to_the_server_whatever_characters_it_has(
    database: Database, empty_database_url: str, tmp_path: Path
) -> None:
    word = r"""'100% :name %s %(x)s {a,"b"} \ ''я''' || $$;$$"""
    text = f"CREATE TABLE words (word text); INSERT INTO words VALUES ({word});"
    write(tmp_path, "20260101000000_odd.sql", text)
    migrate(database, tmp_path)
    assert words(empty_database_url) == ["""100% :name %s %(x)s {a,"b"} \\ 'я';"""]
    assert [statements for *_, statements in history(empty_database_url)] == [[text]]


# Who sees what


@pytest.fixture
def supabase_url(empty_database_url: str, database: Database) -> str:
    """A migrated database whose defaults are those of a Supabase project, with a row here and there."""
    roles = "anon, authenticated, service_role"
    execute(empty_database_url, f"GRANT USAGE ON SCHEMA public TO {roles}")
    for objects in ("TABLES", "SEQUENCES", "FUNCTIONS"):
        execute(empty_database_url, f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON {objects} TO {roles}")
    migrate(database)
    for statement in (
        "INSERT INTO ingest.batches (id, kind, state, source, bucket) VALUES ('b', 'load', 'done', '/s', 'b')",
        "INSERT INTO ingest.claims VALUES ('load', 1, 'b')",
        "INSERT INTO raw.menus VALUES ('b', 1, 'x', '[]')",
        "INSERT INTO public.menus (content_sha256) VALUES ('x')",
        "INSERT INTO public.menu_items (menu_id, position, external_id, name) SELECT id, 1, '1', 'Borsch' FROM menus",
        "INSERT INTO public.recognitions (id, batch_id, menu_id) SELECT 1, 'b', id FROM menus",
    ):
        execute(empty_database_url, statement)
    return empty_database_url


FILLED = [
    "ingest.batches",
    "ingest.claims",
    "raw.menus",
    "public.menus",
    "public.menu_items",
    "public.recognitions",
    "public.recognition_active_menu_items",
]


def as_role(url: str, role: str, statement: str) -> list[tuple[Any, ...]] | str:
    """Return the rows that a role gets, or `denied`; nothing it does stays."""
    with ExitStack() as stack:
        connection = stack.enter_context(closing(psycopg2.connect(url)))
        cursor = stack.enter_context(connection.cursor())
        cursor.execute(f"SET ROLE {role}")
        try:
            cursor.execute(statement)
        except psycopg2.errors.InsufficientPrivilege:
            return "denied"
        return cursor.fetchall() if cursor.description else []


def relations(url: str, kinds: str) -> list[str]:
    names = execute(
        url,
        "SELECT format('%s.%s', nspname, relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        f"WHERE nspname IN {SCHEMAS} AND relkind::text = ANY ('{{{kinds}}}') ORDER BY 1",
    )
    return [str(name) for (name,) in names]


def test_row_level_security_is_on_for_every_table_and_no_policy_opens_it(database_url: str) -> None:
    tables = relations(database_url, "r,p")
    assert len(tables) >= 18
    protected = execute(
        database_url,
        "SELECT format('%s.%s', nspname, relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        f"WHERE nspname IN {SCHEMAS} AND relkind IN ('r', 'p') AND relrowsecurity ORDER BY 1",
    )
    assert [name for (name,) in protected] == tables
    assert execute(database_url, "SELECT * FROM pg_policies") == []


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_the_public_roles_see_and_change_nothing_even_with_the_grants_of_a_supabase_project(
    supabase_url: str, role: str
) -> None:
    for relation in relations(supabase_url, "r,p,v,m"):
        assert as_role(supabase_url, role, f"SELECT * FROM {relation}") in ([], "denied"), relation
        if relation.startswith(("ingest.", "raw.")):
            assert as_role(supabase_url, role, f"SELECT * FROM {relation}") == "denied", relation
    assert as_role(supabase_url, role, "INSERT INTO public.menus (content_sha256) VALUES ('y')") == "denied"
    assert as_role(supabase_url, role, "UPDATE public.recognitions SET batch_id = 'c' RETURNING id") in ([], "denied")
    assert as_role(supabase_url, role, "DELETE FROM public.menu_items RETURNING id") in ([], "denied")


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_the_view_is_closed_twice_by_its_grants_and_by_the_rights_of_whoever_reads_it(
    supabase_url: str, role: str
) -> None:
    # Either would do today; together they hold when an app grants a public role the view, or makes a policy.
    view = "public.recognition_active_menu_items"
    assert as_role(supabase_url, role, f"SELECT * FROM {view}") == "denied"
    execute(supabase_url, f"GRANT SELECT ON {view} TO {role}")
    assert as_role(supabase_url, role, f"SELECT * FROM {view}") == []


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_the_public_roles_may_not_call_the_functions_of_the_loader(supabase_url: str, role: str) -> None:
    functions = execute(
        supabase_url,
        "SELECT p.oid::regprocedure::text, prosecdef FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace "
        f"WHERE nspname IN {SCHEMAS} AND NOT (nspname = 'public' AND NOT prosecdef)",
    )
    assert functions
    assert [name for name, definer in functions if definer] == []
    allowed = execute(supabase_url, f"SELECT has_schema_privilege('{role}', 'ingest', 'USAGE')")
    assert allowed == [(False,)]


def test_the_service_role_reads_and_writes_everything(supabase_url: str) -> None:
    for relation in relations(supabase_url, "r,p,v,m"):
        rows = as_role(supabase_url, "service_role", f"SELECT * FROM {relation}")
        assert len(rows) == (1 if relation in FILLED else 0), relation
        assert rows != "denied", relation
    marker = "INSERT INTO ingest.batch_state (batch_id, step, started_at) VALUES ('b', 'x', now()) RETURNING step"
    assert as_role(supabase_url, "service_role", marker) == [("x",)]
    menu = "INSERT INTO public.menus (content_sha256) VALUES ('y') RETURNING content_sha256"
    assert as_role(supabase_url, "service_role", menu) == [("y",)]


def test_a_postgresql_without_the_roles_of_supabase_is_as_good(database: Database, tmp_path: Path) -> None:
    # The roles of the test server stay; the files see other names instead, which nobody has.
    suffix = uuid.uuid4().hex
    for migration in migrations():
        text = re.sub(r"'(anon|authenticated|service_role)'", rf"'\1_{suffix}'", migration.text)
        write(tmp_path, f"{migration.version}_{migration.name}.sql", text)
    assert versions(migrate(database, tmp_path)) == versions(migrations())

"""Histories of migrations in an app's project, as the Supabase CLI keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests import world

CLI, OWN = "supabase_migrations.schema_migrations", "ingest.schema_migrations"
APP = Path(__file__).with_name("app_project.sql")
#: What follows in that file is written by the CLI itself.
HISTORY = "-- The app's own migrations, as the Supabase CLI records them"
#: The versions of the app's migrations.
VERSIONS = [f"2025{month:02}{day:02}100000" for month in range(1, 12) for day in range(1, 7)] + [
    "20260301093000",
    "20260402100000",
]
#: Names that the app may have given to its own.
NAMES = ("publish", "domain", "adopt", "ingest_and_raw", "recognitions", "init")


def app_migrations() -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the app's migrations: the first makes everything, the others nothing."""
    for number, version in enumerate(VERSIONS):
        made = APP.read_text(encoding="utf-8").partition(HISTORY)[0]
        text = made if number == 0 else f"SELECT {number};\n"
        yield f"{version}_{NAMES[number % len(NAMES)]}.sql", text


def write_app(folder: Path) -> Path:
    """Write the app's migrations into a new folder and return it."""
    folder.mkdir(parents=True)
    for name, text in app_migrations():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def record(dsn: str, folder: Path) -> None:
    """Record the files of a folder that the history lacks, as if the CLI had applied them: as statements."""
    world.query(dsn, f"CREATE SCHEMA IF NOT EXISTS {CLI.split('.')[0]}")
    world.query(
        dsn, f"CREATE TABLE IF NOT EXISTS {CLI} (version text NOT NULL PRIMARY KEY, statements text[], name text)"
    )
    for path in sorted(folder.iterdir()):
        version, _, name = path.stem.partition("_")
        statements = [
            one.strip() for one in re.split(r";[ \t]*\n", path.read_text(encoding="utf-8") + "\n") if one.strip()
        ]
        world.query(dsn, f"INSERT INTO {CLI} VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", (version, statements, name))


def history(dsn: str) -> list[tuple[object, ...]]:
    """Return the CLI's history, nothing without its table."""
    if world.query(dsn, f"SELECT to_regclass('{CLI}')") == [(None,)]:
        return []
    return world.query(dsn, f"SELECT * FROM {CLI} ORDER BY version")

"""Apply `supabase/migrations/*.sql` and record them as the Supabase CLI does.

The history is `supabase_migrations.schema_migrations (version, name, statements)`, version the 14 digits of the file's
name, name the rest, statements an array (https://github.com/supabase/cli, pkg/migration). The CLI cuts a file into its
statements; PostgreSQL takes it whole, so the array has one element here. Either tool sees what the other applied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.database.connection import Connection, Database
from pipeline.errors import DatabaseError, PermanentError
from pipeline.observe.logger import get_logger

logger = get_logger(__name__)

_FILE = re.compile(r"(\d{14})_(.*)\.sql")


@dataclass(frozen=True)
class Migration:
    """One file: its 14 digits, its name, its text."""

    version: str
    name: str
    text: str


def migrations(directory: Path | None = None) -> list[Migration]:
    """Return the migrations in their order, those of the installed package or of the working copy.

    Raises:
        PermanentError: there is none, so this is not a whole installation.
    """
    found = []
    for entry in (directory or _directory()).iterdir():
        match = _FILE.fullmatch(entry.name)
        if match:
            found.append(Migration(match[1], match[2], entry.read_text(encoding="utf-8")))
    if not found:
        raise PermanentError("The migrations are missing from this installation.", "Install the package again.")
    return sorted(found, key=lambda migration: migration.version)


def _directory() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "supabase" / "migrations"


def migrate(database: Database, directory: Path | None = None) -> list[Migration]:
    """Apply what is pending, each with its record in one transaction, under a lock; return what was applied."""
    applied = []
    for migration in migrations(directory):
        try:
            new = database.run(partial(_apply, migration=migration), timeout=0)
        except DatabaseError as exc:
            raise DatabaseError(
                f"Migration {migration.version}_{migration.name}.sql failed and was rolled back: {exc.message}",
                exc.hint,
                exc.code,
            ) from exc
        if new:
            logger.info("migrate: %s_%s", migration.version, migration.name)
            applied.append(migration)
    return applied


def pending(connection: Connection, directory: Path | None = None, *, there: bool | None = None) -> list[Migration]:
    """Return the migrations that the history does not have; whether there is a history is asked unless it is known."""
    done: set[str] = set()
    if connection.one("find_history").there if there is None else there:
        done = {row.version for row in connection.execute("list_history")}
    return [migration for migration in migrations(directory) if migration.version not in done]


def _apply(connection: Connection, migration: Migration) -> bool:
    connection.one("lock_migrations")
    if not connection.one("find_history").there:
        connection.execute("create_history_schema")
        connection.execute("create_history")
    if connection.one("find_migration", version=migration.version).there:
        return False
    connection.execute("complete_history")
    connection.run_script(migration.text)
    connection.execute("record_migration", version=migration.version, name=migration.name, statements=[migration.text])
    return True

"""Apply `supabase/migrations/*.sql` and record them as the Supabase CLI does.

The history is `supabase_migrations.schema_migrations (version, name, statements)`: the 14 digits of the file's name,
the rest of it, and an array (https://github.com/supabase/cli, pkg/migration). The CLI splits a file into statements;
here it is run as a whole, so the array has one element. Each tool sees what the other applied.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.database.connection import Connection, Database
from pipeline.errors import DatabaseError, PermanentError

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(\d{14})_(.*)\.sql")


class Migration(NamedTuple):
    """One file."""

    version: str
    name: str
    text: str

    @property
    def label(self) -> str:
        """Return the name of the file without its suffix."""
        return f"{self.version}_{self.name}"


def migrations(directory: Path | None = None) -> list[Migration]:
    """Return the migrations in order, by default of the package or working copy; raise PermanentError without any."""
    installed = Path(__file__).parents[1] / "migrations"
    working_copy = Path(__file__).parents[2] / "supabase" / "migrations"
    entries = sorted((directory or (installed if installed.is_dir() else working_copy)).iterdir())
    found = [(entry, match) for entry in entries if (match := _FILE.fullmatch(entry.name))]
    if not found:
        raise PermanentError("The migrations are missing from this installation.", "Install the package again.")
    return [Migration(match[1], match[2], entry.read_text(encoding="utf-8")) for entry, match in found]


def migrate(database: Database, directory: Path | None = None) -> list[Migration]:
    """Apply the pending migrations, each with its record in one transaction; return them."""
    applied = []
    for migration in migrations(directory):
        try:
            new = database.run(partial(_apply, migration=migration), timeout=0)
        except DatabaseError as exc:
            message = f"Migration {migration.label}.sql failed and was rolled back: {exc.message}"
            raise DatabaseError(message, exc.hint, exc.code) from exc
        if new:
            logger.info("migrate: %s", migration.label)
            applied.append(migration)
    return applied


def pending(connection: Connection, directory: Path | None = None) -> list[Migration]:
    """Return the migrations that the history does not have."""
    history = connection.execute("list_history") if connection.one("find_history").there else []
    done = {row.version for row in history}
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

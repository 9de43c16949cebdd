"""Apply `supabase/migrations/*.sql` and record them as the Supabase CLI does.

The history is `supabase_migrations.schema_migrations (version, name, statements)`, version the 14 digits of the file's
name, name the rest, statements the file split at its semicolons
(https://github.com/supabase/cli, pkg/migration and pkg/parser). Either tool sees what the other applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.database import Connection, Database
from pipeline.errors import DatabaseError, PermanentError
from pipeline.logger import get_logger

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
    installed = Path(__file__).parent / "migrations"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "supabase" / "migrations"


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
    statements = list(split_statements(migration.text))
    for statement in statements:
        connection.run_script(statement)
    connection.execute("record_migration", version=migration.version, name=migration.name, statements=statements)
    return True


_TOKEN = re.compile(
    r"""
    --[^\n]* | /\*.*?\*/                                   # comments (nested ones are not used here)
    | '(?:[^']|'')*' | "(?:[^"]|"")*"                      # strings and quoted names
    | (?P<dollar>\$[A-Za-z_]*\$).*?(?P=dollar)             # dollar-quoted bodies
    | ;
    """,
    re.VERBOSE | re.DOTALL,
)


def split_statements(text: str) -> Iterator[str]:
    """Yield the statements of a script, trimmed and without their semicolons, as the Supabase CLI stores them."""
    start = 0
    for match in _TOKEN.finditer(text):
        if match[0] == ";":
            if statement := text[start : match.start()].strip():
                yield statement
            start = match.end()
    if (rest := text[start:].strip()) and _TOKEN.sub("", rest).strip():
        yield rest

"""Apply `supabase/migrations/*.sql`, export them to an app's repository, and know which are applied.

There are two histories. A migration is applied if one of them has its name and checksum, under whatever version:

    supabase_migrations.schema_migrations (version, name, statements)   of the Supabase CLI; ours unless an app is there
    ingest.schema_migrations (version, name, checksum, applied_at)      ours in an app's project

The CLI works only while it has a file for each version in its table (https://github.com/supabase/cli). It splits a file
into statements, without the semicolons and white space between them, so a checksum leaves these out.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.database.connection import Connection, Database
from pipeline.errors import DatabaseError, PermanentError, RefusedError, UsageError

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(\d+)_(.*)\.sql")  # as the CLI takes them
_STAMP = "%Y%m%d%H%M%S"


class Migration(NamedTuple):
    """One file."""

    version: str
    name: str
    text: str

    @property
    def label(self) -> str:
        """Return the name of the file without its suffix."""
        return f"{self.version}_{self.name}"

    @property
    def checksum(self) -> str:
        """Return the SHA-256 of the text without semicolons and white space, as the query `list_cli_history` does."""
        return hashlib.sha256(self.text.encode().translate(None, b" \t\r\n;")).hexdigest()


def migrations(directory: Path | None = None) -> list[Migration]:
    """Return the migrations in order, by default of the package or working copy; raise PermanentError without any."""
    installed = Path(__file__).parents[1] / "migrations"
    working_copy = Path(__file__).parents[2] / "supabase" / "migrations"
    found = _read(directory or (installed if installed.is_dir() else working_copy))
    if not found:
        raise PermanentError("The migrations are missing from this installation.", "Install the package again.")
    return found


def _read(folder: Path) -> list[Migration]:
    found = [(entry, match) for entry in sorted(folder.iterdir()) if (match := _FILE.fullmatch(entry.name))]
    return [Migration(match[1], match[2], entry.read_text("utf-8", "replace")) for entry, match in found]


def migrate(database: Database, directory: Path | None = None) -> list[Migration]:
    """Apply the pending migrations, each with its record in one transaction; return them."""
    applied = []
    while migration := database.run(partial(_apply_next, ours=migrations(directory)), timeout=0):
        logger.info("migrate: %s", migration.label)
        applied.append(migration)
    return applied


def pending(connection: Connection, directory: Path | None = None) -> list[Migration]:
    """Return the migrations that no history has; raise RefusedError if one has another text of the same name."""
    ours = migrations(directory)
    return _pending(ours, _records(connection, ours))


def release_history(database: Database, directory: Path | None = None) -> list[str]:
    """Move our records from the CLI's history to ours, for an app that moves in; return the labels of what was moved.

    A record under another version is of an exported copy, which the app's repository has: it stays.
    """

    def release(connection: Connection) -> list[str]:
        connection.one("lock_migrations")
        ours = migrations(directory)
        records = _records(connection, ours)
        _pending(ours, records)
        if not any(record.is_cli for record in records):
            return []
        versions, names, checksums = zip(*((one.version, one.name, one.checksum) for one in ours), strict=True)
        moved = connection.execute("release_history", versions=[*versions], names=[*names], checksums=[*checksums])
        return [f"{row.version}_{row.name}" for row in moved]

    return database.run(release)


def export(folder: Path, directory: Path | None = None) -> list[Path]:
    """Write the migrations that a folder of the Supabase CLI lacks, stamped after its newest file; return the files.

    Raises UsageError if the folder cannot be read or written, RefusedError if it has another text of the same name.
    """
    try:
        return _export(folder, migrations(directory))
    except OSError as exc:
        hint = "Name supabase/migrations of the app's repository."
        raise UsageError(f"{exc.filename}: {exc.strerror}.", hint) from exc


def _export(folder: Path, ours: Sequence[Migration]) -> list[Path]:
    def refusal(copy: Migration) -> RefusedError:
        hint = "Restore it from its repository; if it was never applied, delete it and export again."
        return RefusedError(f"{folder / copy.label}.sql has another text than this installation exports.", hint)

    theirs = _read(folder)
    stamp = max((one.version for one in theirs), key=int, default="")
    written = []
    for migration in _pending(ours, theirs, refusal):
        stamp = _after(stamp) if theirs else migration.version
        path = folder / f"{stamp}_{migration.name}.sql"
        with open(path, "x", encoding="utf-8", newline="\n") as file:
            file.write(migration.text)
        written.append(path)
    return written


def _after(stamp: str) -> str:
    try:
        return f"{datetime.strptime(stamp, _STAMP) + timedelta(seconds=1):{_STAMP}}"
    except (ValueError, OverflowError):  # no time, such as a plain number
        return f"{int(stamp) + 1:0{len(stamp)}}"


def _records(connection: Connection, ours: Sequence[Migration]) -> list[Any]:
    """Return what the histories have under our names: name, version, checksum (None if unknown), is_cli."""
    found = connection.one("find_histories")
    records = [*connection.execute("list_cli_history", names=[one.name for one in ours])] if found.has_names else []
    return [*records, *connection.execute("list_history")] if found.own else records


def _refusal(record: Any) -> RefusedError:
    hint = "Use the version of the loader that applied it; the guide to production says what else to do."
    return RefusedError(f"Migration {record.name} was applied with another text, as version {record.version}.", hint)


def _pending(
    ours: Sequence[Migration], found: Sequence[Any], refusal: Callable[[Any], RefusedError] = _refusal
) -> list[Migration]:
    missing = []
    for migration in ours:
        same = [one for one in found if one.name == migration.name]
        if same and all(one.checksum not in (None, migration.checksum) for one in same):
            raise refusal(same[0])
        if not same:
            missing.append(migration)
    return missing


def _apply_next(connection: Connection, ours: Sequence[Migration]) -> Migration | None:
    connection.one("lock_migrations")
    records = _records(connection, ours)
    missing = _pending(ours, records)
    if not missing:
        return None
    migration = missing[0]
    is_shared = _is_shared(connection, ours, records)
    connection.one("shorten_lock_waits")
    try:
        connection.run_script(migration.text)
    except DatabaseError as exc:
        message = f"Migration {migration.label}.sql failed and was rolled back: {exc.message}"
        raise DatabaseError(message, exc.hint, exc.code) from exc
    version, name = migration.version, migration.name
    if is_shared:
        connection.execute("record_migration", version=version, name=name, checksum=migration.checksum)
    else:
        connection.execute("create_cli_history")
        connection.execute("record_cli_migration", version=version, name=name, statements=[migration.text])
    return migration


def _is_shared(connection: Connection, ours: Sequence[Migration], records: Sequence[Any]) -> bool:
    """Return whether an app is there: the CLI's history has others' versions, or the project has tables before ours."""
    found = connection.one("find_histories")
    if found.cli and connection.one("find_others", names=[one.name for one in ours]).there:
        return True
    return not any(one.is_cli for one in records) and (bool(records) or found.is_used)

"""What in a project the migrations, or the loads after them, would fail on.

In a transaction that is rolled back, the migrations run under other names of their schemas, as in an empty project. The
catalogue then has what is needed beside what is there. No table of the project is locked.
"""

from __future__ import annotations

import re

from pipeline.database import Connection, Database
from pipeline.database.migrate import migrations, pending
from pipeline.doctor.finding import Finding, problem
from pipeline.errors import RefusedError

_SECONDS = 30.0
_REMEDIES = {
    "right": "Use the owner of the tables in DATABASE_URL, on Supabase the user postgres, or grant the right.",
    "name": "Rename it, or move it to another schema.",
    "type": "Change it in a migration of the app, or load into another project.",
    "column": "Add it in a migration of the app; if the table is for something else, rename the table.",
    "required": "Give it a default, or let it be null.",
    "key": "Add it in a migration of the app.",
    "label": "Add it in a migration of the app, with ALTER TYPE … ADD VALUE.",
}


def find_obstacles(database: Database) -> list[Finding]:
    """Return a problem for each object that stands in the way of the pending migrations."""
    rows = database.run(_find, _SECONDS, keep=False)
    return [problem("migrations", message, _REMEDIES[kind], RefusedError) for kind, message in rows]


def refuse_obstacles(database: Database) -> None:
    """Raise RefusedError if something stands in the way of the pending migrations."""
    if found := find_obstacles(database):
        lines = [f"{one.message} {one.remedy}" for one in found]
        raise RefusedError("\n".join(["The migrations do not fit this project:", *lines]), "Nothing was changed.")


def _find(connection: Connection) -> list[tuple[str, str]]:
    if not pending(connection):
        return []
    if missing := connection.execute("find_missing_rights"):
        return [("right", row.message) for row in missing]
    text = "\n".join(one.text for one in migrations())
    changes = re.findall(r"^ALTER TABLE (\S+)\s+(ADD COLUMN[^;]*);", text, re.MULTILINE)
    added = [
        f"{table}.{name}" for table, body in changes for name in re.findall(r"ADD COLUMN IF NOT EXISTS (\w+)", body)
    ]
    connection.run_script("CREATE SCHEMA shape_public;\n" + re.sub(r"\b(ingest|raw|public)\b", r"shape_\1", text))
    return [(row.kind, row.message) for row in connection.execute("find_obstacles", added=added)]

"""Write reference/database.md, the reference of the tables, from the catalogue of a migrated database: `make docs`.

Without an argument, it starts the embedded services in a temporary folder; `docs/database.py DSN` reads a database that
has all migrations.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("reference") / "database.md"

_HEAD = """# Database

`make docs` generates this page from the catalogue of a migrated database. [Your app's tables](../guides/your-app.md)
explains what an app reads, [architecture](../explanation/architecture.md#the-tables) what each schema is for.
"""
_SCHEMAS = ("public", "ingest", "raw")
_RELATIONS = """
SELECT c.oid, c.relname, c.relkind, c.relrowsecurity, coalesce(obj_description(c.oid, 'pg_class'), '')
FROM pg_class c
WHERE c.relnamespace = %s::regnamespace AND c.relkind IN ('r', 'v')
ORDER BY c.relkind, c.oid
"""
_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
    CASE a.attidentity WHEN '' THEN coalesce(pg_get_expr(d.adbin, d.adrelid), '') ELSE 'identity' END,
    coalesce(col_description(a.attrelid, a.attnum), '')
FROM pg_attribute a
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""
_CONSTRAINTS = """
SELECT pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = %s AND contype IN ('p', 'u', 'f', 'c')
ORDER BY array_position(ARRAY['p', 'u', 'f', 'c'], contype::text), conname
"""
_INDEXES = """
SELECT pg_get_indexdef(i.indexrelid)
FROM pg_index i
WHERE i.indrelid = %s AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid AND c.conrelid = %s)
ORDER BY i.indexrelid
"""
_FUNCTIONS = """
SELECT p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)
FROM pg_proc p
WHERE p.pronamespace = %s::regnamespace
ORDER BY 1, 2
"""


def page(dsn: str) -> str:
    """Return the page about a database that has all migrations."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        # With an empty search path every name is printed with its schema.
        cursor.execute("SET search_path = ''")
        lines = [_HEAD, *(line for schema in _SCHEMAS for line in _schema(cursor, schema))]
    return "\n".join(lines).rstrip("\n") + "\n"


def _rows(cursor: Any, statement: str, *values: object) -> list[tuple[Any, ...]]:
    cursor.execute(statement, values)
    return cursor.fetchall()  # type: ignore[no-any-return]


def _schema(cursor: Any, schema: str) -> Iterator[str]:
    yield f"## Schema {schema}\n"
    ((comment,),) = _rows(cursor, "SELECT coalesce(obj_description(%s::regnamespace, 'pg_namespace'), '')", schema)
    if comment and schema != "public":
        yield f"{comment}\n"
    for oid, name, kind, is_secured, about in _rows(cursor, _RELATIONS, schema):
        yield f"### {schema}.{name}\n"
        if kind == "v":
            yield "A view.\n"
        elif not is_secured:
            yield "Row-level security is off.\n"
        if about:
            yield f"{about}\n"
        yield from _columns(_rows(cursor, _COLUMNS, oid))
        rules = [rule for (rule,) in _rows(cursor, _CONSTRAINTS, oid)]
        rules += [index.split(" USING ", 1)[1] for (index,) in _rows(cursor, _INDEXES, oid, oid)]
        yield from (f"- `{_one_line(rule)}`" for rule in rules)
        if rules:
            yield ""
    functions = _rows(cursor, _FUNCTIONS, schema)
    if functions:
        yield f"### Functions of {schema}\n"
        yield from (f"- `{name}({_one_line(taken)})` returns `{given}`" for name, taken, given in functions)
        yield ""


def _columns(columns: list[tuple[Any, ...]]) -> Iterator[str]:
    yield "| column | type | null | default | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, kind, is_required, default, about in columns:
        null = "" if is_required else "yes"
        yield f"| `{name}` | {kind} | {null} | {f'`{default}`' if default else ''} | {_one_line(about)} |"
    yield ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _migrated_page() -> str:
    """Return the page about a database that is made for it in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="pipeline-docs-") as folder:
        # The server's user must be able to reach its socket.
        Path(folder).chmod(0o711)
        environment = {**os.environ, "PIPELINE_HOME": str(Path(folder, "home")), "PYTHONPATH": str(ROOT)}

        def run(command: str) -> None:
            subprocess.run([sys.executable, "-m", "pipeline", command], cwd=folder, env=environment, check=True)

        run("up")
        try:
            dsn = dotenv_values(Path(folder, "home", "env"))["DATABASE_URL"]
            assert dsn is not None
            return page(dsn)
        finally:
            run("down")


if __name__ == "__main__":
    PAGE.write_text(page(sys.argv[1]) if len(sys.argv) > 1 else _migrated_page(), encoding="utf-8")

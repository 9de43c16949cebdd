"""Rows of a load in the tables of the domain: written to files, and copied from them again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import psycopg2

from benchmarks.bench import World


def export(world: World, folder: Path, tables: Mapping[str, str]) -> dict[str, Path]:
    """Write what a query finds for each table into a file; return the files by table."""
    files = {}
    with closing(psycopg2.connect(world.database_url)) as connection, connection.cursor() as cursor:
        for table, query in tables.items():
            files[table] = folder / f"rows-{table}"
            with open(files[table], "wb") as file:
                cursor.copy_expert(f"COPY ({query}) TO STDOUT", file)
    return files


def copy(world: World, files: Mapping[str, Path]) -> float:
    """Copy the files into their tables, in their order and in one transaction; return the seconds."""
    with closing(psycopg2.connect(world.database_url)) as connection, connection.cursor() as cursor:
        begin = time.perf_counter()
        for table, path in files.items():
            with open(path, "rb") as file:
                cursor.copy_expert(f"COPY public.{table} FROM STDIN", file)
        connection.commit()
        return time.perf_counter() - begin

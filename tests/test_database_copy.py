"""COPY into the database, and rows read through a cursor."""

from __future__ import annotations

import gc
import tracemalloc
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.database import Database
from pipeline.errors import DatabaseError, PipelineError, StorageUnavailable
from tests import database_support
from tests.database_support import ask, door, numbers
from tests.services import execute, fresh_database

database = database_support.database


@pytest.fixture(scope="module")
def shared(postgres_server: EmbeddedPostgres) -> Iterator[Database]:
    """A door to an empty database for the many examples of a property."""
    with (
        fresh_database(postgres_server.dsn, f"shared_{uuid.uuid4().hex}") as url,
        closing(door(url)) as database,
    ):
        yield database


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
tricky = st.sampled_from(
    [r"\N", r"\.", "\\", "\t", "\n", "\r", "\r\n", '"', "'", "", " ", "NULL", "{}", "a,b", r"\x41", "\b\f\v", "я", "🍲"]
)
words = st.none() | texts | tricky | st.lists(tricky, max_size=4).map("".join)
ROWS = st.lists(
    st.tuples(
        words,
        st.none() | st.integers(-(2**63), 2**63 - 1),
        st.none() | st.floats(allow_nan=False),
        st.none() | st.booleans(),
        st.none() | st.lists(words, max_size=4),
        st.none() | st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple),
    ),
    max_size=8,
)
COLUMNS = ["word", "whole", "real", "truth", "words", "wholes"]
TYPES = ["text", "bigint", "double precision", "boolean", "text[]", "bigint[]"]


@settings(deadline=None)
@given(rows=ROWS)
def test_every_value_comes_back_as_it_went(shared: Database, rows: list[tuple[object, ...]]) -> None:
    definition = ", ".join(f"{name} {kind}" for name, kind in zip(COLUMNS, TYPES, strict=True))
    with shared.transaction() as connection:
        connection.run_script(
            f"CREATE TEMPORARY TABLE copied (number integer GENERATED ALWAYS AS IDENTITY, {definition}) ON COMMIT DROP"
        )
        assert connection.copy_in("pg_temp.copied", COLUMNS, iter(rows)) == len(rows)
        query = f"SELECT {', '.join(COLUMNS)} FROM copied ORDER BY number"
        with connection._send(query) as cursor:
            found = [tuple(row) for row in cursor.fetchall()]
    assert found == [tuple(list(value) if isinstance(value, tuple) else value for value in row) for row in rows]


class _Word(str):
    """A text of a type of its own, as SQLAlchemy has them."""


def test_values_of_other_types_are_written_as_text(database: Database, empty_database_url: str) -> None:
    values: list[object] = [_Word("a\tb"), date(2026, 1, 2), True, 1.5, [_Word("a\\b"), None], "ж\\\t\n".encode()]
    with database.transaction() as connection:
        connection.copy_in("numbers", ["n", "word"], enumerate(values))
    found = [word for (word,) in execute(empty_database_url, "SELECT word FROM numbers ORDER BY n")]
    assert found == ["a\tb", "2026-01-02", "True", "1.5", r'{"a\\b",NULL}', "ж\\\t\n"]


def test_no_rows_are_no_error(database: Database) -> None:
    with database.transaction() as connection:
        assert connection.copy_in("numbers", ["n"], []) == 0


def test_rows_are_streamed_not_held(database: Database, empty_database_url: str) -> None:
    count = 100_000

    def rows() -> Iterator[tuple[int, str]]:
        for number in range(count):
            yield number, "a word of some length, in every row"

    gc.collect()
    with database.transaction() as connection:
        connection.copy_in("numbers", ["n", "word"], [(-1, "the driver is warm")])
        tracemalloc.start()
        try:
            assert connection.copy_in("numbers", ["n", "word"], rows()) == count
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 2_000_000
    assert execute(empty_database_url, "SELECT count(*) FROM numbers") == [(count + 1,)]


def test_a_row_longer_than_a_chunk_is_taken_whole(database: Database, empty_database_url: str) -> None:
    with database.transaction() as connection:
        connection.copy_in("numbers", ["n", "word"], [(1, "ж\\" * 300_000), (2, "after")])
    assert execute(empty_database_url, "SELECT length(word) FROM numbers ORDER BY n") == [(600_000,), (5,)]


@pytest.mark.parametrize("at", [0, 1, 30_000])
def test_an_error_of_the_generator_leaves_nothing(database: Database, empty_database_url: str, at: int) -> None:
    def rows() -> Iterator[tuple[int, str]]:
        for number in range(at):
            yield number, "x" * 20
        raise StorageUnavailable("on purpose")

    with pytest.raises(PipelineError), database.transaction() as connection:
        connection.copy_in("numbers", ["n", "word"], rows())
    assert numbers(empty_database_url) == []
    with database.transaction() as connection:
        connection.copy_in("numbers", ["n"], [(1,)])
    assert numbers(empty_database_url) == [1]


@pytest.mark.parametrize("error", [StorageUnavailable, KeyError, KeyboardInterrupt])
def test_an_error_of_the_generator_gets_through_as_it_is(database: Database, error: type[BaseException]) -> None:
    def rows() -> Iterator[tuple[int]]:
        yield (1,)
        raise error("on purpose")

    with pytest.raises(error), database.transaction() as connection:
        connection.copy_in("numbers", ["n"], rows())


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ((1, "a\0b"), "22021"),
        ((1, "a", "b"), "22P04"),
        ((1,), "22P04"),
        (("one", "a"), "22P02"),
        ((None, "a"), "23502"),
    ],
)
def test_a_row_that_the_table_refuses_is_a_permanent_error_and_leaves_nothing(
    database: Database, empty_database_url: str, row: Sequence[object], code: str
) -> None:
    with pytest.raises(DatabaseError) as caught, database.transaction() as connection:
        connection.copy_in("numbers", ["n", "word"], [(7, "good"), row])
    assert caught.value.code == code
    assert numbers(empty_database_url) == []


def test_rows_are_read_through_a_cursor_that_ends_with_the_transaction(database_url: str) -> None:
    with closing(door(database_url)) as database:
        history = "ingest.schema_migrations"
        execute(database_url, f"INSERT INTO {history} SELECT n, n, '' FROM generate_series(1, 5000) n")
        with database.transaction() as connection:
            stream = connection.stream("list_history")
            first = next(stream).version
            assert ask(connection, "SELECT count(*) FROM pg_cursors") == 1
            assert 1 + sum(1 for _ in stream) == ask(connection, f"SELECT count(*) FROM {history}")
            assert first
        with database.transaction() as connection:
            assert ask(connection, "SELECT count(*) FROM pg_cursors") == 0


def test_two_streams_of_a_transaction_do_not_mix(database_url: str) -> None:
    execute(database_url, "INSERT INTO ingest.schema_migrations SELECT n, n, '' FROM generate_series(1, 3) n")
    with closing(door(database_url)) as database, database.transaction() as connection:
        whole = [row.version for row in connection.stream("list_history")]
        first = connection.stream("list_history")
        assert next(first).version == whole[0]
        assert [row.version for row in connection.stream("list_history")] == whole
        assert [row.version for row in first] == whole[1:]


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1251"])
def test_texts_are_utf_8_whatever_the_address_says(database: Database, empty_database_url: str, encoding: str) -> None:
    separator = "&" if "?" in empty_database_url else "?"
    url = f"{empty_database_url}{separator}client_encoding={encoding}"
    with closing(door(url)) as other, other.transaction() as connection:
        connection.copy_in("numbers", ["n", "word"], [(1, "é ж")])
        assert ask(connection, "SELECT word FROM numbers") == "é ж"
    assert execute(empty_database_url, "SELECT word FROM numbers") == [("é ж",)]

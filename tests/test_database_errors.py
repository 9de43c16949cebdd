"""Classification of database errors, and retries."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from pipeline.config import Secret
from pipeline.database import Connection, Database
from pipeline.database.errors import references_refused
from pipeline.errors import DatabaseError, DatabaseUnavailable, DataError, RefusedError, StorageUnavailable
from tests import database_support
from tests.database_support import PASSWORD, SECONDS, door, numbers
from tests.services import execute

database = database_support.database
waits = database_support.waits


def raising(code: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}'; END $$"


@pytest.mark.parametrize(
    "code",
    [
        "40001",
        "40P01",
        "53100",
        "53200",
        "53300",
        "53400",
        "58030",
        "55P03",
        "57P01",
        "57P02",
        "57P03",
        "57P05",
        "25P03",
        "08006",
        "08P01",
    ],
)
def test_work_is_tried_again_from_its_start_after_what_may_go_away(
    database: Database, empty_database_url: str, waits: list[tuple[float, float]], code: str
) -> None:
    tries = 0

    def work(connection: Connection) -> str:
        nonlocal tries
        tries += 1
        connection.run_script(f"INSERT INTO numbers VALUES ({tries})")
        if tries < 3:
            connection.run_script(raising(code))
        return "done"

    assert database.run(work) == "done"
    assert numbers(empty_database_url) == [3]
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("SELEC 1", "42601"),
        ("SELECT * FROM nowhere", "42P01"),
        ("INSERT INTO numbers VALUES (1), (1)", "23505"),
        ("INSERT INTO numbers VALUES (NULL)", "23502"),
        ("SELECT 1 / 0", "22012"),
        (raising("57014"), "57014"),
        (raising("42501"), "42501"),
        (raising("P0001"), "P0001"),
    ],
)
def test_work_is_not_tried_again_after_what_will_not_go_away(
    database: Database, waits: list[tuple[float, float]], statement: str, code: str
) -> None:
    tries = 0

    def work(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        connection.run_script(statement)

    with pytest.raises(DatabaseError) as caught:
        database.run(work)
    assert (tries, waits, caught.value.code) == (1, [], code)
    assert code in caught.value.message


def test_an_error_of_the_work_itself_is_not_tried_again(database: Database, waits: list[tuple[float, float]]) -> None:
    tries = 0

    def work(_: Connection) -> None:
        nonlocal tries
        tries += 1
        raise StorageUnavailable("not the database's business")

    with pytest.raises(StorageUnavailable):
        database.run(work)
    assert (tries, waits) == (1, [])


def test_tries_are_bounded_and_waits_double_up_to_a_minute(
    empty_database_url: str, waits: list[tuple[float, float]]
) -> None:
    tries = 0

    def work(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        connection.run_script(raising("57P03"))

    with closing(door(empty_database_url, retry_max_attempts=8, retry_backoff_factor=2.0)) as database:
        with pytest.raises(DatabaseUnavailable, match="57P03"):
            database.run(work)
        assert tries == 9
        assert waits == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 32), (0, 60), (0, 60)]
    with closing(door(empty_database_url, retry_max_attempts=0)) as database:
        with pytest.raises(DatabaseUnavailable):
            database.run(work)
        assert tries == 10


def test_two_transactions_in_a_deadlock_are_both_done_in_the_end(
    database: Database, empty_database_url: str, waits: list[tuple[float, float]]
) -> None:
    execute(empty_database_url, "INSERT INTO numbers VALUES (1, ''), (2, '')")
    both_hold_one = threading.Barrier(2)
    one_is_done = threading.Event()
    tries = [0, 0]

    def exchange(side: int) -> None:
        first, second = (1, 2) if side == 0 else (2, 1)

        def work(connection: Connection) -> None:
            tries[side] += 1
            if tries[side] > 1:  # at once, it might take its first row again before the other one has it
                assert one_is_done.wait(SECONDS)
            connection.run_script("SET LOCAL deadlock_timeout = '50ms'")
            connection.run_script(f"UPDATE numbers SET word = word || '{side}' WHERE n = {first}")
            if tries[side] == 1:
                both_hold_one.wait(SECONDS)
            connection.run_script(f"UPDATE numbers SET word = word || '{side}' WHERE n = {second}")

        database.run(work)
        one_is_done.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(exchange, (0, 1)))
    assert sum(tries) == 3
    assert len(waits) == 1
    words = [str(word) for (word,) in execute(empty_database_url, "SELECT word FROM numbers ORDER BY n")]
    assert [sorted(word) for word in words] == [["0", "1"], ["0", "1"]]


def test_a_row_that_others_reference_is_a_refusal(database: Database) -> None:
    with pytest.raises(RefusedError, match=r"^Refused: on purpose\.$"), database.transaction() as connection:
        connection.run_script(raising("IN001"))


def test_a_violated_foreign_key_is_a_refusal_only_where_rows_are_deleted(database: Database) -> None:
    with pytest.raises(DataError), database.transaction() as connection:
        connection.run_script(raising("23503"))
    with pytest.raises(RefusedError, match=r"^Refused: on purpose\.$") as caught, references_refused():
        database.run(lambda connection: connection.run_script(raising("23503")))
    assert caught.value.hint == "A row of another table references it; what readers see was not changed."
    with pytest.raises(DataError), references_refused(), database.transaction() as connection:
        connection.run_script(raising("23505"))


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("SELECT * FROM nowhere", "pipeline migrate"),
        ("SELECT nowhere.f()", "pipeline migrate"),
        (raising("42501"), "owner of the tables"),
        (raising("25006"), "read-only"),
        (raising("57014"), "longer than allowed"),
    ],
)
def test_an_error_that_has_a_known_remedy_names_it(database: Database, statement: str, hint: str) -> None:
    with pytest.raises(DatabaseError) as caught, database.transaction() as connection:
        connection.run_script(statement)
    assert hint in caught.value.hint


def test_no_password_is_in_the_error_of_a_statement(empty_database_url: str) -> None:
    Secret(PASSWORD)
    with closing(door(empty_database_url)) as database:
        with pytest.raises(DatabaseError) as caught, database.transaction() as connection:
            connection.run_script(f"DO $$ BEGIN RAISE EXCEPTION 'for {PASSWORD} and postgresql://u:pa55@h'; END $$")
        assert PASSWORD not in caught.value.message
        assert "pa55" not in caught.value.message


def test_a_statement_that_takes_too_long_is_stopped_and_not_tried_again(
    database: Database, waits: list[tuple[float, float]]
) -> None:
    with pytest.raises(DatabaseError) as caught:
        database.run(lambda connection: connection.run_script("SELECT pg_sleep(60)"), timeout=0.05)
    assert caught.value.code == "57014"
    assert "longer than allowed" in caught.value.hint
    assert waits == []

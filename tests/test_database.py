"""Transactions of the database, sessions behind a pooler, and forks."""

from __future__ import annotations

import gc
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest

from embedded_supabase.files import wait_until
from pipeline.database import Connection, Database
from pipeline.errors import DatabaseError, DatabaseUnavailable, StorageUnavailable
from tests import database_support
from tests.database_support import NO_STORAGE, SECONDS, ask, backend, door, numbers, transact
from tests.services import execute, local_settings

database = database_support.database


# Transactions


def test_a_transaction_commits_at_the_end_of_its_block(database: Database, empty_database_url: str) -> None:
    with database.transaction() as connection:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        connection.copy_in("numbers", ["n"], [(2,)])
        assert numbers(empty_database_url) == []
    assert numbers(empty_database_url) == [1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StorageUnavailable, SystemExit])
def test_an_error_in_the_middle_leaves_nothing_and_gets_through(
    database: Database, empty_database_url: str, error: type[BaseException]
) -> None:
    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        connection.run_script("CREATE TABLE made_on_the_way ()")
        raise error("on purpose")

    with pytest.raises(error):
        transact(database, work)
    assert numbers(empty_database_url) == []
    assert execute(empty_database_url, "SELECT to_regclass('made_on_the_way')") == [(None,)]


def test_a_second_interrupt_before_the_rollback_leaves_nothing_for_the_next_transaction(
    database: Database, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        monkeypatch.setattr("pipeline.database.connection._roll_back", interrupted)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transact(database, work)
    assert database.pool().checkedout() == 0
    transact(database, lambda connection: connection.run_script("INSERT INTO numbers VALUES (2)"))
    assert numbers(empty_database_url) == [2]


def test_nothing_is_sent_after_the_server_has_ended_the_transaction(
    database: Database, empty_database_url: str
) -> None:
    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        connection.run_script("ROLLBACK")
        connection.run_script("INSERT INTO numbers VALUES (2)")

    with pytest.raises(DatabaseUnavailable, match="ended by PostgreSQL"):
        transact(database, work)
    assert numbers(empty_database_url) == []


@pytest.mark.parametrize("word", ["\0", "\ud800"])
def test_a_value_that_cannot_be_sent_takes_nothing_from_the_transaction(
    database: Database, empty_database_url: str, word: str
) -> None:
    def work(connection: Connection) -> None:
        with pytest.raises(ValueError):
            connection.execute("find_batch", batch_id=word)
        connection.run_script("INSERT INTO numbers VALUES (1)")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        transact(database, work)
    assert numbers(empty_database_url) == []


def test_a_failed_statement_whose_error_was_passed_over_is_no_commit(
    database: Database, empty_database_url: str
) -> None:
    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        with suppress(DatabaseError):
            connection.run_script("INSERT INTO numbers VALUES (1)")

    with pytest.raises(DatabaseError, match="rolled the transaction back"):
        transact(database, work)
    assert numbers(empty_database_url) == []


def test_what_is_queued_goes_with_the_commit_and_not_with_a_rollback(database_url: str) -> None:
    def count(database: Database) -> Any:
        return database.run(lambda connection: ask(connection, "SELECT count(*) FROM ingest.claims"))

    values = {"batch_id": "b1", "kind": "load", "recognition_ids": [1]}
    with closing(door(database_url)) as database:
        execute(
            database_url,
            "INSERT INTO ingest.batches (id, kind, state, source, bucket) VALUES ('b1', 'load', 'loading', '/', 'b')",
        )
        execute(database_url, "INSERT INTO ingest.claims VALUES ('load', 1, 'b1')")
        database.run(lambda connection: connection.enqueue("delete_claims_rejected", **values), keep=False)
        assert count(database) == 1
        database.run(lambda connection: connection.enqueue("delete_claims_rejected", **values))
        assert count(database) == 0


def test_a_refused_statement_leaves_nothing_of_those_before_it(database: Database, empty_database_url: str) -> None:
    def work(connection: Connection) -> None:
        connection.copy_in("numbers", ["n"], [(1,), (2,)])
        connection.run_script("INSERT INTO numbers VALUES (2)")

    with pytest.raises(DatabaseError) as caught:
        transact(database, work)
    assert caught.value.code == "23505"
    assert numbers(empty_database_url) == []


def test_the_connection_is_as_good_as_new_after_an_error(database: Database, empty_database_url: str) -> None:
    sessions = []

    def work(connection: Connection) -> None:
        sessions.append(backend(connection))
        connection.run_script("SELECT 1 / 0")

    with pytest.raises(DatabaseError):
        transact(database, work)
    with database.transaction() as connection:
        assert sessions == [backend(connection)]
        connection.run_script("INSERT INTO numbers VALUES (1)")
    assert numbers(empty_database_url) == [1]


def test_a_reader_cannot_write_and_sees_one_moment(database: Database, empty_database_url: str) -> None:
    with database.transaction(read_only=True) as connection:
        before = ask(connection, "SELECT count(*) FROM numbers")
        execute(empty_database_url, "INSERT INTO numbers VALUES (1)")
        assert ask(connection, "SELECT count(*) FROM numbers") == before == 0
    with pytest.raises(DatabaseError) as caught, database.transaction(read_only=True) as connection:
        connection.run_script("INSERT INTO numbers VALUES (2)")
    assert caught.value.code == "25006"
    assert numbers(empty_database_url) == [1]


def test_the_statements_of_the_package_are_found_by_their_names(database_url: str) -> None:
    with closing(door(database_url)) as database, database.transaction() as connection:
        assert connection.execute("find_batch", batch_id="none") == []
        assert connection.one("find_histories").has_names is True
        assert connection.execute("delete_claims", batch_id="none") == []
        assert [row.version for row in connection.stream("list_history")] == [
            row.version for row in connection.execute("list_history")
        ]


# What a pooler in transaction mode would mix up


def every_kind_of_use(connection: Connection) -> int:
    connection.run_script("CREATE TEMPORARY TABLE used (n integer) ON COMMIT DROP")
    connection.copy_in("pg_temp.used", ["n"], [(1,), (2,)])
    for _ in range(12):
        connection.execute("find_batch", batch_id="none")
    list(connection.stream("list_history"))
    connection.one("lock_migrations")
    connection.execute("delete_claims", batch_id="none")
    return backend(connection)


LEFT_OVER = """
SELECT array_agg(what ORDER BY what) FROM (
    SELECT 'prepared statement ' || name AS what FROM pg_prepared_statements
    UNION ALL SELECT 'setting ' || name || ' = ' || setting FROM pg_settings WHERE source = 'session'
        AND name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable')
    UNION ALL SELECT 'lock ' || locktype || ' ' || mode FROM pg_locks WHERE pid = pg_backend_pid()
        AND locktype = 'advisory'
    UNION ALL SELECT 'cursor ' || name FROM pg_cursors
    UNION ALL SELECT 'listens ' || channel FROM pg_listening_channels() channel
    UNION ALL SELECT 'temporary table ' || relname FROM pg_class
        WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r'
) found
"""


def left_over(database: Database) -> tuple[int, Any]:
    """Return which session the pool gives, and what former transactions left on it."""
    raw = database.pool().connect()
    try:
        with closing(raw.cursor()) as cursor:
            cursor.execute(LEFT_OVER)
            found = cursor.fetchone()
            assert found
            cursor.execute("SELECT pg_backend_pid()")
            pid = cursor.fetchone()
            assert pid
            return int(pid[0]), found[0]
    finally:
        raw.close()


def test_nothing_is_left_on_a_session(database_url: str) -> None:
    with closing(door(database_url, connection_pool_size=1)) as database:
        pid = database.run(every_kind_of_use, timeout=7)
        assert left_over(database) == (pid, None)
        assert database.run(backend, read_only=True) == pid
        assert left_over(database) == (pid, None)
        assert fail_after_use(database) == pid
        assert left_over(database) == (pid, None)


def fail_after_use(database: Database) -> int:
    sessions = []

    def work(connection: Connection) -> None:
        sessions.append(every_kind_of_use(connection))
        raise KeyError

    with pytest.raises(KeyError):
        transact(database, work)
    return sessions[0]


def test_what_is_looked_for_on_a_session_would_be_found_there(database_url: str) -> None:
    with closing(door(database_url, connection_pool_size=1)) as database:
        with database.transaction() as connection:
            connection.run_script("SET statement_timeout = 5000")
            connection.run_script("PREPARE left_behind AS SELECT 1")
            connection.run_script("SELECT pg_advisory_lock(1)")
            connection.run_script("CREATE TEMPORARY TABLE left_too ()")
        assert len(left_over(database)[1]) == 4


def test_the_timeouts_hold_in_the_transaction_only(empty_database_url: str) -> None:
    with closing(door(empty_database_url, connection_pool_size=1)) as database:
        with database.transaction(timeout=5) as connection:
            pid = backend(connection)
            assert ask(connection, "SHOW statement_timeout") == "5s"
            assert ask(connection, "SHOW lock_timeout") == "1min"
        with database.transaction(timeout=0) as connection:
            assert ask(connection, "SHOW statement_timeout") == "0"
        with closing(database.pool().connect()) as raw, closing(raw.cursor()) as cursor:
            cursor.execute(
                "SELECT pg_backend_pid(), current_setting('statement_timeout'), current_setting('lock_timeout')"
            )
            assert cursor.fetchone() == (pid, "0", "0")


def test_a_writer_after_a_reader_on_the_same_session_may_write(database: Database, empty_database_url: str) -> None:
    with database.transaction(read_only=True) as connection:
        pid = backend(connection)
        assert ask(connection, "SHOW transaction_isolation") == "repeatable read"
    with database.transaction() as connection:
        assert backend(connection) == pid
        assert ask(connection, "SHOW transaction_isolation") == "read committed"
        connection.run_script("INSERT INTO numbers VALUES (1)")
    assert numbers(empty_database_url) == [1]


def test_the_session_bears_the_name_of_its_program(empty_database_url: str) -> None:
    settings = local_settings(empty_database_url, NO_STORAGE, "none", Path())
    with closing(Database(settings, "pipeline load")) as database, database.transaction() as connection:
        assert ask(connection, "SHOW application_name") == "pipeline load"


# Forks


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("busy", [True, False], ids=["in a transaction", "idle"])
def test_a_child_has_sessions_of_its_own_and_leaves_those_of_its_parent_alone(
    database: Database, empty_database_url: str, busy: bool
) -> None:
    context = multiprocessing.get_context("fork")

    def work(pipe: Pipe) -> None:
        with database.transaction() as connection:
            connection.run_script("INSERT INTO numbers VALUES (2)")
            pipe.send(backend(connection))
        database.close()

    def fork() -> int:
        receiver, sender = context.Pipe(duplex=False)
        with receiver, sender:
            child = context.Process(target=work, args=(sender,))
            child.start()
            assert receiver.poll(SECONDS)
            theirs = int(receiver.recv())
        child.join(SECONDS)
        assert child.exitcode == 0
        child.close()
        return theirs

    with ExitStack() as stack:
        connection = stack.enter_context(database.transaction())
        ours = backend(connection)
        connection.run_script("INSERT INTO numbers VALUES (1)")
        if not busy:
            stack.close()
        theirs = fork()
        if busy:
            assert backend(connection) == ours
    assert theirs != ours
    assert numbers(empty_database_url) == [1, 2]
    with database.transaction() as connection:
        assert backend(connection) == ours


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_that_only_ends_does_not_break_the_sessions_of_its_parent(database: Database) -> None:
    with database.transaction() as connection:
        ours = backend(connection)
    pid = os.fork()
    if pid == 0:
        try:
            database.close()
            del database
            gc.collect()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with database.transaction() as connection:
        assert backend(connection) == ours


def test_the_commit_of_another_batch_is_waited_for_beyond_the_limit_of_other_locks(empty_database_url: str) -> None:
    def take(waiting: Database) -> str:
        with waiting.transaction() as connection:
            connection.run_script("SET LOCAL lock_timeout = '50ms'")
            connection.execute("lock_commits")
            return str(ask(connection, "SHOW lock_timeout"))

    long = "now() - query_start > interval '1 s'"
    waited = f"SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND {long}"
    with closing(door(empty_database_url)) as waiting, ThreadPoolExecutor(1) as executor:
        with closing(door(empty_database_url)) as committing, committing.transaction() as connection:
            connection.execute("lock_commits")
            taken = executor.submit(take, waiting)
            assert wait_until(lambda: execute(empty_database_url, waited) == [(1,)], 30)
        assert taken.result() == "50ms"

"""database.py against a real PostgreSQL: transactions, retries, lost connections, COPY, what is left on a session."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import threading
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import date
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import backoff
import psycopg2
import psycopg2.extensions
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedded_supabase.files import wait_until
from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Secret
from pipeline.database import Connection, Database, connection_string
from pipeline.errors import (
    AccessDenied,
    DatabaseError,
    DatabaseUnavailable,
    PipelineError,
    RefusedError,
    SettingsError,
    StorageUnavailable,
)
from tests.services import StorageServer, execute, free_port, fresh_database, local_settings

SECONDS = 20.0
NO_STORAGE = StorageServer("http://127.0.0.1:1", "", "none", Path())
PASSWORD = "correct-horse-battery"


def door(url: str, environment: str = "local", **tuning: Any) -> Database:
    settings = local_settings(url, NO_STORAGE, "none", Path())
    return Database(replace(settings, environment=environment, tuning=replace(settings.tuning, **tuning)))


def ask(connection: Connection, query: str) -> Any:
    """Return the only value of a query, through the connection of a transaction."""
    with connection._send(query) as cursor:
        ((value,),) = cursor.fetchall()
    return value


def transact(database: Database, work: Callable[[Connection], object]) -> None:
    with database.transaction() as connection:
        work(connection)


def raising(code: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}'; END $$"


@pytest.fixture
def database(empty_database_url: str) -> Iterator[Database]:
    """A door to a database with a table of numbers and texts."""
    execute(empty_database_url, "CREATE TABLE numbers (n integer PRIMARY KEY, word text)")
    with closing(door(empty_database_url)) as database:
        yield database


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Take the place of waiting between tries: note the bounds that each wait is drawn from."""
    noted: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        noted.append((low, high))
        return 0.0

    monkeypatch.setattr(backoff, "full_jitter", lambda value: uniform(0, value))
    return noted


def numbers(url: str) -> list[int]:
    return [int(str(n)) for (n,) in execute(url, "SELECT n FROM numbers ORDER BY n")]


def backend(connection: Connection) -> int:
    return int(ask(connection, "SELECT pg_backend_pid()"))


def terminate(url: str, pid: int) -> None:
    """End a session as an administrator does, and wait until it is gone."""
    execute(url, f"SELECT pg_terminate_backend({pid})")
    assert wait_until(lambda: not execute(url, f"SELECT FROM pg_stat_activity WHERE pid = {pid}"), SECONDS)


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
    def interrupted(_: Connection) -> None:
        raise KeyboardInterrupt

    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "roll_back", interrupted)
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
        assert connection.one("find_history").there is True
        assert connection.count("delete_claims", batch_id="none") == 0
        assert [row.version for row in connection.stream("list_history")] == [
            row.version for row in connection.execute("list_history")
        ]


# What an error means, and when the work is tried again


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


@pytest.mark.parametrize("code", ["IN001", "23503"])
def test_a_row_that_others_reference_is_a_refusal(database: Database, code: str) -> None:
    with pytest.raises(RefusedError, match="on purpose"), database.transaction() as connection:
        connection.run_script(raising(code))


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


# Connections that break


def test_a_server_that_goes_away_in_the_middle_is_unavailable_and_nothing_stays(
    database: Database, empty_database_url: str
) -> None:
    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        terminate(empty_database_url, backend(connection))
        connection.run_script("INSERT INTO numbers VALUES (2)")

    with pytest.raises(DatabaseUnavailable):
        transact(database, work)
    assert numbers(empty_database_url) == []
    with database.transaction() as connection:
        connection.run_script("INSERT INTO numbers VALUES (3)")
    assert numbers(empty_database_url) == [3]


def test_a_server_that_goes_away_before_the_commit_is_unavailable(database: Database, empty_database_url: str) -> None:
    def work(connection: Connection) -> None:
        connection.run_script("INSERT INTO numbers VALUES (1)")
        terminate(empty_database_url, backend(connection))

    with pytest.raises(DatabaseUnavailable):
        transact(database, work)
    assert numbers(empty_database_url) == []


def test_an_error_of_ours_is_not_hidden_by_the_rollback_that_fails_after_it(
    database: Database, empty_database_url: str
) -> None:
    def work(connection: Connection) -> None:
        terminate(empty_database_url, backend(connection))
        raise StorageUnavailable("on purpose")

    with pytest.raises(StorageUnavailable):
        transact(database, work)
    with database.transaction() as connection:
        assert ask(connection, "SELECT 1") == 1


def test_a_server_that_goes_away_during_a_copy_is_unavailable_and_nothing_stays(
    database: Database, empty_database_url: str
) -> None:
    def work(connection: Connection) -> None:
        pid = backend(connection)

        def rows() -> Iterator[tuple[int, str]]:
            for number in range(50_000):
                if number == 10_000:
                    terminate(empty_database_url, pid)
                yield number, "x" * 100

        connection.copy_in("numbers", ["n", "word"], rows())

    with pytest.raises(DatabaseUnavailable):
        transact(database, work)
    assert numbers(empty_database_url) == []


def test_work_is_tried_again_on_a_new_connection(
    database: Database, empty_database_url: str, waits: list[tuple[float, float]]
) -> None:
    sessions = []

    def work(connection: Connection) -> None:
        sessions.append(backend(connection))
        connection.run_script("INSERT INTO numbers VALUES (1)")
        if len(sessions) == 1:
            terminate(empty_database_url, sessions[0])
            connection.run_script("SELECT 1")

    database.run(work)
    assert numbers(empty_database_url) == [1]
    assert len(set(sessions)) == 2
    assert len(waits) == 1


def test_one_new_try_is_enough_when_all_connections_of_the_pool_have_broken(
    empty_database_url: str, waits: list[tuple[float, float]]
) -> None:
    with closing(door(empty_database_url, retry_max_attempts=1)) as database:
        with ExitStack() as stack:
            pids = [backend(stack.enter_context(database.transaction())) for _ in range(3)]
        for pid in pids:
            terminate(empty_database_url, pid)
        assert database.run(lambda connection: ask(connection, "SELECT 1")) == 1
        assert len(waits) == 1


def test_a_connection_that_broke_makes_no_room_beyond_the_size_of_the_pool(empty_database_url: str) -> None:
    def work(connection: Connection) -> None:
        terminate(empty_database_url, backend(connection))
        with pytest.raises(DatabaseUnavailable):
            ask(connection, "SELECT 1")
        ask(connection, "SELECT 1")  # on a connection that is known to be closed

    with closing(door(empty_database_url, connection_pool_size=2)) as database, ExitStack() as stack:
        held = backend(stack.enter_context(database.transaction()))
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                transact(database, work)
        assert backend(stack.enter_context(database.transaction())) != held
        database.pool()._timeout = 0.05
        with pytest.raises(DatabaseUnavailable, match="became free"), database.transaction():
            pass


def test_threads_beyond_the_size_of_the_pool_take_turns(empty_database_url: str) -> None:
    with closing(door(empty_database_url, connection_pool_size=2)) as database, ThreadPoolExecutor(8) as pool:

        def work(_: int) -> int:
            return database.run(lambda connection: (ask(connection, "SELECT pg_sleep(0.005)"), backend(connection))[1])

        assert len(set(pool.map(work, range(40)))) <= 2


def test_a_pool_that_stays_exhausted_is_a_transient_error_with_its_remedy(empty_database_url: str) -> None:
    with closing(door(empty_database_url, connection_pool_size=1)) as database:
        database.pool()._timeout = 0.05
        with database.transaction(), pytest.raises(DatabaseUnavailable) as caught, database.transaction():
            pass
        assert "connection_pool_size" in caught.value.hint


def test_closing_ends_the_sessions_and_the_door_opens_again(empty_database_url: str) -> None:
    database = door(empty_database_url)
    with database.transaction() as connection:
        pid = backend(connection)
    database.close()
    database.close()
    query = f"SELECT FROM pg_stat_activity WHERE pid = {pid}"
    assert wait_until(lambda: not execute(empty_database_url, query), SECONDS)
    with closing(database), database.transaction() as connection:
        assert ask(connection, "SELECT 1") == 1


# Connections that do not come about


def connection_error(url: str, environment: str = "local") -> PipelineError:
    """Return the error of a connection after a look at its form; `PASSWORD` must not be in it."""
    Secret(url)
    with closing(door(url, environment)) as database:
        with pytest.raises(PipelineError) as caught, database.transaction():
            pass
        with pytest.raises(type(caught.value)):
            database.pool().connect()
    error = caught.value
    for text in (error.message, error.hint):
        assert PASSWORD not in text
        assert "\n" not in text
        assert text.endswith(".")
    return error


@contextmanager
def answering(reply: bytes | None) -> Iterator[int]:
    """Listen on loopback, answer every connection with some bytes, and close it; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer, suppress(ConnectionError):
                    if reply is not None and peer.recv(4096):
                        peer.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)


def test_a_refused_connection_is_transient() -> None:
    error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/postgres")
    assert isinstance(error, DatabaseUnavailable)
    assert "firewall" in error.hint


def test_embedded_services_that_do_not_run_are_to_be_started(tmp_path: Path) -> None:
    error = connection_error(f"postgresql://postgres@/postgres?host={tmp_path}", "embedded")
    assert isinstance(error, DatabaseUnavailable)
    assert "python -m pipeline up" in error.hint


@pytest.mark.parametrize("reply", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_that_is_no_postgresql_is_a_transient_error(reply: bytes | None) -> None:
    with answering(reply) as port:
        error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres?sslmode=disable")
    assert isinstance(error, DatabaseUnavailable)


@pytest.mark.parametrize(
    "host",
    [
        "db.abc.supabase.invalid",
        "a..b",
    ],
)
def test_an_unknown_host_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    look_up = socket.getaddrinfo

    def unknown(name: str, *arguments: Any, **options: Any) -> Any:
        if name.endswith(".invalid"):  # whatever name service this machine has, or has not
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(name, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = connection_error(f"postgresql://postgres:{PASSWORD}@{host}/postgres")
    assert isinstance(error, AccessDenied)
    assert host in error.message


def test_a_name_service_that_cannot_be_reached_is_a_bad_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    error = connection_error(f"postgresql://postgres:{PASSWORD}@db.abc.supabase.invalid/postgres")
    assert isinstance(error, DatabaseUnavailable)


def test_a_host_that_has_an_ipv6_address_only_comes_with_the_advice_to_use_the_pooler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = ("::1", free_port(), 0, 0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", address)])
    error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/postgres")
    assert isinstance(error, DatabaseUnavailable)
    assert "pooler" in error.hint


def test_an_unknown_database_is_a_wrong_setting(empty_database_url: str) -> None:
    error = connection_error(empty_database_url.replace("/empty_", "/no_"))
    assert isinstance(error, AccessDenied)
    assert "does not exist" in error.message


def test_an_unknown_user_is_a_wrong_setting(empty_database_url: str) -> None:
    error = connection_error(empty_database_url.replace("postgres@", f"nobody:{PASSWORD}@"))
    assert isinstance(error, AccessDenied)


@pytest.fixture
def role(empty_database_url: str) -> Iterator[str]:
    """A role that may do nothing."""
    name = f"role_{uuid.uuid4().hex}"
    execute(empty_database_url, f"CREATE ROLE {name} LOGIN PASSWORD 'the right password'")
    yield name
    execute(empty_database_url, f"DROP ROLE {name}")


def test_a_wrong_password_is_a_wrong_setting(
    postgres_server: EmbeddedPostgres, empty_database_url: str, role: str
) -> None:
    # The test server trusts everybody; for this role alone it asks for the password.
    rules = postgres_server.data_path / "pg_hba.conf"
    former = rules.read_text(encoding="utf-8")
    rules.write_text(f'local all "{role}" scram-sha-256\n{former}', encoding="utf-8")
    url = empty_database_url.replace("postgres@", f"{role}:{PASSWORD}@")
    try:
        execute(empty_database_url, "SELECT pg_reload_conf()")
        assert wait_until(lambda: refuses(url), SECONDS)
        error = connection_error(url)
        assert isinstance(error, AccessDenied)
        assert "password authentication failed" in error.message
        assert isinstance(connection_error(url.replace(f":{PASSWORD}@", "@")), AccessDenied)
    finally:
        rules.write_text(former, encoding="utf-8")
        execute(empty_database_url, "SELECT pg_reload_conf()")


def refuses(url: str) -> bool:
    try:
        psycopg2.connect(url).close()
    except psycopg2.OperationalError:
        return True
    return False


def test_a_role_that_may_not_log_in_is_a_wrong_setting(empty_database_url: str, role: str) -> None:
    execute(empty_database_url, f"ALTER ROLE {role} NOLOGIN")
    assert isinstance(connection_error(empty_database_url.replace("postgres@", f"{role}@")), AccessDenied)


def test_too_many_connections_are_a_bad_moment(empty_database_url: str, role: str) -> None:
    execute(empty_database_url, f"ALTER ROLE {role} CONNECTION LIMIT 0")
    error = connection_error(empty_database_url.replace("postgres@", f"{role}@"))
    assert isinstance(error, DatabaseUnavailable)


@pytest.mark.parametrize("rest", ["postgres?nonsense=1", "%zz"])
def test_an_address_that_libpq_does_not_understand_is_a_wrong_setting(rest: str) -> None:
    error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/{rest}")
    assert isinstance(error, SettingsError)


def test_no_connection_is_tried_again_as_often_as_the_tuning_says(waits: list[tuple[float, float]]) -> None:
    with closing(door(f"postgresql://postgres@127.0.0.1:{free_port()}/postgres", retry_max_attempts=2)) as database:
        with pytest.raises(DatabaseUnavailable):
            database.run(lambda connection: ask(connection, "SELECT 1"))
        assert len(waits) == 2


# The address for libpq


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p@h:6543/db?pgbouncer=true&connection_limit=1", {"host": "h", "port": "6543"}),
        ("postgresql://u:p@h/db?schema=x&sslmode=require&pool_timeout=0", {"sslmode": "require"}),
        ("postgresql://u:p%40%2F@h/db?statement_cache_size=0", {"password": "p@/"}),
        ("postgresql://u@h1:1,h2:2/db?target_session_attrs=any", {"host": "h1,h2", "port": "1,2"}),
        ("postgresql://u@/db?host=/var/run/postgresql&port=5433", {"host": "/var/run/postgresql", "port": "5433"}),
        ("postgresql://u@/db?application_name=a%2Bb", {"application_name": "a+b"}),
        ("host=h dbname=db password='two words'", {"host": "h", "password": "two words"}),
    ],
)
def test_libpq_gets_what_it_knows_and_nothing_of_other_drivers(url: str, expected: dict[str, str]) -> None:
    parameters = psycopg2.extensions.parse_dsn(connection_string(url))
    assert {name: parameters.get(name) for name in expected} == expected
    assert parameters["dbname"] == "db"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u@/db?host=/home/a%20b/.pipeline", {"host": "/home/a b/.pipeline"}),
        ("postgresql://u@h/db?options=-c%20search_path%3Dx", {"options": "-c search_path=x"}),
        ("postgresql://u@h/db?application_name=a+b&pgbouncer=true", {"application_name": "a+b"}),
        ("postgresql:///db?host=/tmp", {"host": "/tmp", "dbname": "db"}),
    ],
)
def test_spaces_and_an_empty_host_of_the_address_reach_libpq(url: str, expected: dict[str, str]) -> None:
    parameters = psycopg2.extensions.parse_dsn(connection_string(url))
    assert {name: parameters.get(name) for name in expected} == expected


# COPY


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
    count = 200_000

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
        history = "supabase_migrations.schema_migrations"
        execute(database_url, f"INSERT INTO {history} (version) SELECT 'v' || n FROM generate_series(1, 5000) n")
        with database.transaction() as connection:
            stream = connection.stream("list_history")
            first = next(stream).version
            assert ask(connection, "SELECT count(*) FROM pg_cursors") == 1
            assert 1 + sum(1 for _ in stream) == ask(connection, f"SELECT count(*) FROM {history}")
            assert first
        with database.transaction() as connection:
            assert ask(connection, "SELECT count(*) FROM pg_cursors") == 0


def test_two_streams_of_a_transaction_do_not_mix(database_url: str) -> None:
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


# What a pooler in transaction mode would mix up


def every_kind_of_use(connection: Connection) -> int:
    connection.run_script("CREATE TEMPORARY TABLE used (n integer) ON COMMIT DROP")
    connection.copy_in("pg_temp.used", ["n"], [(1,), (2,)])
    for _ in range(12):
        connection.execute("find_batch", batch_id="none")
    list(connection.stream("list_history"))
    connection.one("lock_migrations")
    connection.count("delete_claims", batch_id="none")
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

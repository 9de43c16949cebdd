"""Connections to the database: broken ones, failed ones, and the connection string."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.cli import main
from pipeline.config import Secret
from pipeline.database import Connection, Database
from pipeline.database import connection as database_connection
from pipeline.database.address import split_parameters
from pipeline.database.login import login_refusal
from pipeline.errors import (
    AccessDenied,
    DatabaseError,
    DatabaseUnavailable,
    PipelineError,
    SettingsError,
    StorageUnavailable,
)
from tests import database_support
from tests.database_support import PASSWORD, SECONDS, ask, backend, door, numbers, transact
from tests.services import execute

database = database_support.database
waits = database_support.waits


def terminate(url: str, pid: int) -> None:
    """End a session as an administrator does, and wait until it is gone."""
    execute(url, f"SELECT pg_terminate_backend({pid})")
    assert wait_until(lambda: not execute(url, f"SELECT FROM pg_stat_activity WHERE pid = {pid}"), SECONDS)


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


def select(connection: Connection) -> None:
    ask(connection, "SELECT 1")


def copy(connection: Connection) -> None:
    connection.copy_in("numbers", ["n", "word"], [(1, "one")])


@pytest.mark.parametrize("timeout", [0.2, 0])
@pytest.mark.parametrize("work", [select, copy])
def test_a_server_that_is_silent_ends_a_statement_after_its_timeout(
    work: Callable[[Connection], None], timeout: float, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_MARGIN", 0.1), ("_LONGEST_STATEMENT", 0.3), ("_LOOK", 0.05)):
        monkeypatch.setattr(database_connection, name, seconds)
    stopped = []

    def stop(connection: Connection) -> None:
        stopped.append(backend(connection))
        os.kill(stopped[0], signal.SIGSTOP)
        work(connection)

    with pytest.raises(DatabaseUnavailable):
        transact(database, stop, timeout)
    os.kill(stopped[0], signal.SIGCONT)
    with database.transaction() as connection:
        assert backend(connection) not in stopped


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


def test_a_literal_ipv6_address_comes_without_that_advice() -> None:
    error = connection_error(f"postgresql://postgres:{PASSWORD}@[::1]:{free_port()}/postgres")
    assert isinstance(error, DatabaseUnavailable)
    assert "pooler" not in error.hint


def test_parameters_of_other_tools_are_for_a_url_only() -> None:
    error = connection_error(f"host=127.0.0.1 dbname=postgres password={PASSWORD} pgbouncer=true")
    assert type(error) is SettingsError
    assert "pgbouncer" in error.message
    assert "a URL only" in error.hint


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


@pytest.mark.parametrize("rest", ["postgres?sslmode=%zz", "%zz"])
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
    parameters = psycopg2.extensions.parse_dsn(split_parameters(url)[0])
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
    parameters = psycopg2.extensions.parse_dsn(split_parameters(url)[0])
    assert {name: parameters.get(name) for name in expected} == expected


# Refused logins: real ones above; below what poolers and servers say in words (see pipeline/database/login.py)


def error_response(message: str, code: str = "XX000", severity: str = "FATAL") -> bytes:
    """Return an ErrorResponse of the protocol (PostgreSQL manual, Message Formats)."""
    fields = f"S{severity}\0VFATAL\0C{code}\0M{message}\0\0".encode()
    return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields


@pytest.mark.parametrize(
    ("code", "message", "kind", "hint"),
    [
        ("XX000", "Tenant or user not found", AccessDenied, "postgres.<project>"),
        ("XX000", "(ENOTFOUND) tenant/user postgres.abc not found", AccessDenied, "postgres.<project>"),
        ("XX000", "SSL connection is required", AccessDenied, "sslmode=require"),
        ("XX000", "(ESSLREQUIRED) SSL connection is required for user: postgres", AccessDenied, "sslmode=require"),
        (
            "28000",
            'no pg_hba.conf entry for host "192.0.2.1", user "u", database "d", no encryption',
            AccessDenied,
            "sslmode=require",
        ),
        (
            "28000",
            'no pg_hba.conf entry for host "192.0.2.1", user "u", database "d", SSL encryption',
            AccessDenied,
            "Network Restrictions",
        ),
        ("XX000", "Address not in tenant allow_list: {192, 0, 2, 1}", AccessDenied, "Network Restrictions"),
        ("28P01", 'password authentication failed for user "postgres"', AccessDenied, "password"),
        ("3D000", 'database "nowhere" does not exist', AccessDenied, "name of the database"),
        ("08P01", "no such database: nowhere", AccessDenied, "name of the database"),
        ("28000", 'role "carol" is not permitted to log in', AccessDenied, "LOGIN"),
        ("28000", 'role "carol" does not exist', AccessDenied, "user"),
        ("42501", 'permission denied for database "postgres"', AccessDenied, "GRANT CONNECT"),
        ("55000", 'database "d" is not currently accepting connections', AccessDenied, "ALLOW_CONNECTIONS"),
        ("53300", "sorry, too many clients already", DatabaseUnavailable, "connection_pool_size"),
        (
            "53300",
            "remaining connection slots are reserved for roles with the SUPERUSER attribute",
            DatabaseUnavailable,
            "connection_pool_size",
        ),
        ("XX000", "Max client connections reached", DatabaseUnavailable, "port 6543"),
        (
            "XX000",
            "MaxClientsInSessionMode: max clients reached - in Session mode max clients are limited to pool_size",
            DatabaseUnavailable,
            "port 6543",
        ),
        ("XX000", "(EMAXCONN) max client connections reached, limit: 200", DatabaseUnavailable, "port 6543"),
        ("08P01", "no more connections allowed (max_client_conn)", DatabaseUnavailable, "connection_pool_size"),
        ("XX000", "Circuit breaker open: Too many authentication errors", DatabaseUnavailable, "check the password"),
        (
            "XX000",
            "(ECIRCUITBREAKER) too many authentication failures, new connections are temporarily blocked",
            DatabaseUnavailable,
            "check the password",
        ),
        ("57P03", "the database system is starting up", DatabaseUnavailable, "started"),
        ("42704", 'unrecognized configuration parameter "foo"', SettingsError, "PGOPTIONS"),
        ("22023", 'invalid value for parameter "work_mem": "abc"', SettingsError, "PGOPTIONS"),
        ("42601", "invalid command-line argument for server process: junk", SettingsError, "PGOPTIONS"),
        ("08P01", "unsupported startup parameter: options", SettingsError, "PGOPTIONS"),
        ("08P01", "unsupported startup parameter in options: search_path", SettingsError, "PGOPTIONS"),
        ("28000", "connection is insecure (try using `sslmode=require`)", AccessDenied, "sslmode=require"),
        ("XX000", 'Authentication error, reason: "Wrong password"', AccessDenied, "password"),
        ("XX000", "There is no user 'postgres' in the database", AccessDenied, "user"),
        ("XX000", "(EAUTHQUERY) authentication query failed", AccessDenied, "user"),
        ("08P01", "auth failed", AccessDenied, "password"),
        ("XX000", "tenant identifier not found", AccessDenied, "postgres.<project>"),
        ("08P01", 'database "d" is disabled', AccessDenied, "database"),
        ("28000", 'certificate authentication failed for user "postgres"', AccessDenied, "sslcert"),
        ("53200", "out of memory", DatabaseUnavailable, "The server answers"),
        ("58P01", 'could not open file "global/pg_filenode.map"', DatabaseUnavailable, "The server answers"),
        ("28P01", "Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen", DatabaseUnavailable, "password"),
    ],
)
def test_a_refused_login_has_the_remedy_of_its_reason(
    code: str, message: str, kind: type[PipelineError], hint: str
) -> None:
    with answering(error_response(message, code)) as port:
        error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres?sslmode=disable")
    assert type(error) is kind
    assert message in error.message
    assert hint in error.hint
    assert "firewall" not in error.hint


@pytest.mark.parametrize("severity", ["FATAL", "ВАЖНО", "致命错误", "PANIC"])
def test_an_answer_in_another_language_is_no_outage_of_the_network(severity: str) -> None:
    with answering(error_response("роль не существует", "28000", severity)) as port:
        error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres?sslmode=disable")
    assert type(error) is DatabaseUnavailable
    assert "The server answers" in error.hint


@pytest.mark.parametrize("demand", ["read-only", "standby"])
def test_a_server_that_is_not_what_the_url_demands_is_a_wrong_setting(empty_database_url: str, demand: str) -> None:
    joint = "&" if "?" in empty_database_url else "?"
    error = connection_error(f"{empty_database_url}{joint}target_session_attrs={demand}")
    assert isinstance(error, AccessDenied)
    assert "demands" in error.hint


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PGSSLMODE", "no-verify"),
        ("PGTARGETSESSIONATTRS", "x"),
        ("PGSERVICE", "nosuch"),
        ("PGPORT", "abc"),
        ("PGHOSTADDR", "notanip"),
    ],
)
def test_a_wrong_value_of_the_environment_is_not_blamed_on_the_url(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1/postgres")
    assert type(error) is SettingsError
    assert value in error.message
    assert "DATABASE_URL" not in error.message
    assert "environment" in error.hint


def test_an_error_of_a_function_is_no_refused_login_whatever_its_words(database: Database) -> None:
    for words in ("the password of this tray is wrong", "Tenant or user not found", "certificate expired"):
        statement = f"DO $$ BEGIN RAISE EXCEPTION '{words}' USING ERRCODE = 'XX000'; END $$"
        with pytest.raises(DatabaseError, match=words), database.transaction() as connection:
            connection.run_script(statement)


@pytest.mark.parametrize(
    "message",
    [
        'connection to server at "password.certificate.example" (192.0.2.1), port 5432 failed: Connection refused',
        'could not translate host name "no-such-user.pg_hba.conf" to address: Name or service not known',
        'connection to server at "db.example" (192.0.2.1), port 5432 failed: timeout expired',
        "server closed the connection unexpectedly",
    ],
)
def test_an_outage_is_no_refusal_whatever_the_names_in_it(message: str) -> None:
    assert login_refusal(message) is None


def test_a_server_without_ssl_that_is_asked_for_it_is_a_wrong_setting() -> None:
    with answering(b"N") as port:
        error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres?sslmode=require")
    assert isinstance(error, AccessDenied)
    assert "Remove sslmode" in error.hint


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("sslmode=no-verify", "sslmode"),
        ("channel_binding=maybe", "channel_binding"),
        ("connect_timeout=abc", "connect_timeout"),
        ("target_session_attrs=x", "target_session_attrs"),
        ("keepalives_idle=soon", "keepalives_idle"),
        ("tcp_user_timeout=x", "tcp_user_timeout"),
        ("gssencmode=maybe", "gssencmode"),
        ("ssl_min_protocol_version=9", "ssl_min_protocol_version"),
        ("load_balance_hosts=x", "load_balance_hosts"),
        ("require_auth=magic", "require_auth"),
        ("sslnegotiation=direct&sslmode=prefer", "sslnegotiation"),
        ("port=1,2,3", "3 port numbers"),
        ("port=0", "port"),
        ("port=abc", "port"),
        ("port=5432%23x", "port"),
        ("hostaddr=notanip", "notanip"),
        ("service=nosuch", "nosuch"),
        ("SSLMODE=require", "SSLMODE"),
        ("ssl=no-verify", "ssl"),
        ("ssl=1", "ssl"),
    ],
)
def test_a_value_that_libpq_refuses_is_a_wrong_setting_and_is_named(parameter: str, named: str) -> None:
    error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/postgres?{parameter}")
    assert type(error) is SettingsError
    assert named in error.message
    assert "127.0.0.1" not in error.message


@pytest.mark.parametrize(
    "password",
    [
        "correct horse",
        "correct horse dbname=d",
        " correct  horse\tdbname=d",
        "correct battery horse user=u",
        "correct h=orse horse",
        "'correct' horse' dbname=d",
        "'correct'horse' dbname=d",
        "''correct horse'' dbname=d",
        '"correct horse" dbname=d',
        'correct ho"rse horse" dbname=d',
        "correct\\ battery horse dbname=d",
        "correct s3cr3t=horse dbname=d",
    ],
)
def test_no_word_of_an_unquoted_password_is_shown(
    password: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    for keyword in ("password=", "password = ", "sslpassword="):
        url = f"host=127.0.0.1 user=u {keyword}{password}"
        error = connection_error(url)
        assert type(error) is SettingsError
        monkeypatch.setenv("DATABASE_URL", url)
        assert main(["status", "--verbose"]) == 2
        assert main(["load", "--verbose"]) == 2
        written = "".join([error.message, *capsys.readouterr()])
        assert "DATABASE_URL is not understood" in written
        assert not re.search("correct|battery|s3cr3t|ho.?rse", written), written
    assert "needs quotes" in error.hint


def test_a_keyword_that_libpq_does_not_know_is_named() -> None:
    for keyword in ("pgbouncer", "SSLMODE"):
        for text in ("host=h {}=x", "password=secret host=h {}=x", "{}=x password=secret", "password='a b' {}=x"):
            assert f'"{keyword}"' in connection_error(text.format(keyword)).message


@pytest.mark.parametrize("parameter", ["sslmode=require", "sslmode=verify-full", "target_session_attrs=read-write"])
def test_a_value_that_libpq_takes_is_an_outage_where_nobody_answers(parameter: str) -> None:
    error = connection_error(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/postgres?{parameter}")
    assert isinstance(error, DatabaseUnavailable)


@pytest.mark.parametrize(
    ("query", "left_out", "kept"),
    [
        ("supa=base-pooler.x", ["supa"], {}),
        ("workaround=supabase-pooler.vercel&sslmode=require", ["workaround"], {"sslmode": "require"}),
        (
            "uselibpqcompat=true&sslaccept=strict&prepareThreshold=0",
            ["prepareThreshold", "sslaccept", "uselibpqcompat"],
            {},
        ),
        ("pool_max_conns=1&pgbouncer=true&schema=x&connection_limit=1", None, {}),
        ("ssl=true&nonsense=%zz&flag", ["flag", "nonsense"], {"sslmode": "require"}),
        ("ssl=false", ["ssl"], {}),
        ("&sslmode=require&&supa=x&", ["supa"], {"sslmode": "require"}),
        ("options=-c%20search_path%3Dx&connect_timeout=3", [], {"options": "-c search_path=x", "connect_timeout": "3"}),
    ],
)
def test_parameters_that_libpq_does_not_know_are_left_out_and_named(
    query: str, left_out: list[str] | None, kept: dict[str, str]
) -> None:
    url = f"postgresql://u@h/db?{query}"
    parameters = psycopg2.extensions.parse_dsn(split_parameters(url)[0])
    assert parameters == {"user": "u", "host": "h", "dbname": "db", **kept}
    names = sorted(part.partition("=")[0] for part in query.split("&")) if left_out is None else left_out
    assert split_parameters(url)[1] == names

"""doctor: each finding appears when something is wrong with what it is about, and is absent when nothing is."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.storage.auth import mint_key, sign
from pipeline import doctor
from pipeline.batches.lock import BatchLock
from pipeline.cli import main
from pipeline.config import Secret, Settings
from pipeline.dataset.passed import count_below
from pipeline.doctor import bucket as bucket_part
from pipeline.doctor import clock, machine, network, postgres
from pipeline.doctor.finding import OK, PROBLEM, WARNING, Finding
from pipeline.errors import AccessDenied, DatabaseError, SettingsError, TransientError, UsageError
from pipeline.units import counted
from tests.pooler import Pooler
from tests.services import MakeDataset, StorageServer, end, environment_file, execute, subprocess_environment
from tests.test_luigid import drips, server

#: Nobody listens there, so that a luigid of this machine is none of a test's.
NO_LUIGID = "http://127.0.0.1:1/"

Check = Callable[..., list[Finding]]
Told = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(settings: Settings, workdir: Path) -> Check:
    """Look at everything with these settings, some of them changed."""

    def look(source: Path | None = None, **changes: Any) -> list[Finding]:
        changed = replace(settings, **changes)
        return doctor.examine(changed, NO_LUIGID, str(source) if source is not None else None)

    return look


@pytest.fixture
def tell(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """Run `status --check --json`; return its exit code and what it printed."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        code = main(["status", "--check", "--json", *map(str, arguments)])
        return code, json.loads(capsys.readouterr().out)

    return run


def of(findings: list[Finding], name: str) -> list[Finding]:
    return [one for one in findings if one.check == name]


def only(findings: list[Finding], name: str) -> Finding:
    [finding] = of(findings, name)
    return finding


def problems(findings: list[Finding]) -> set[str]:
    return {one.check for one in findings if one.level == PROBLEM}


def write(workdir: Path, settings: Settings, **changes: Any) -> None:
    (workdir / ".env.local").write_text(environment_file(replace(settings, **changes)), encoding="utf-8")


def make_bucket(server: StorageServer, name: str, **options: Any) -> None:
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Authorization": f"Bearer {server.key}"}
        body = {"id": name, "name": name, "public": False, **options}
        session.post(f"{server.url}/storage/v1/bucket", headers=headers, json=body).raise_for_status()


@contextmanager
def scripted(
    answer: Callable[[str], tuple[int, object]], date: Callable[[], str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Answer requests by a script, as JSON or as text, under a clock of one's own; yield the address and the paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, value = answer(self.path)
            content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return date() if date is not None else super().date_time_string(timestamp)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def listening(family: socket.AddressFamily = socket.AF_INET, host: str = "127.0.0.1") -> Iterator[int]:
    """Listen, and never say a word."""
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((host, 0))
        server.listen()
        yield int(server.getsockname()[1])


# The whole


def test_nothing_is_wrong_where_all_is_well(
    tell: Told, storage_server: StorageServer, bucket: str, small_dataset: MakeDataset
) -> None:
    make_bucket(storage_server, bucket)
    code, told = tell("--source", small_dataset(3))
    levels = {(one["check"], one["level"]) for one in told["findings"]}
    names = "settings luigi.cfg network version latency pooler writes role migrations connections timeouts size batches"
    names += " luigid clock key dataset bucket disk"
    assert levels >= {(name, OK) for name in (*names.split(), "bucket types", "bucket limit")}
    assert (code, told["problems"]) == (0, 0)
    # A disk that is nearly full, or a luigid that others reach, is this machine's own affair.
    assert not [one for one in told["findings"] if one["remedy"] and one["check"] not in ("disk", "luigid")]
    assert [one["check"] for one in told["findings"]].count("network") == 2
    assert [one["check"] for one in told["findings"]].count("latency") == 2


def test_people_get_a_line_for_each_finding_and_its_remedy_below(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ok       settings: Environment local, from {workdir / '.env.local'}."
    missing = next(
        number for number, line in enumerate(lines) if line.startswith("warning  bucket: There is no bucket")
    )
    assert lines[missing + 1].startswith("         → Nothing if the name is right")
    remedies = sum(line.startswith("         → ") for line in lines)
    assert lines[-1] == f"{len(lines) - 1 - remedies} findings: 0 problems, {counted(remedies, 'warning')}."


def test_settings_that_cannot_be_read_are_a_finding_beside_what_needs_none(tell: Told, workdir: Path) -> None:
    (workdir / ".env.local").write_text("DATABASE_URL=postgresql://u:secret-pass@h/d\n", encoding="utf-8")
    code, told = tell()
    assert code == 2
    first = told["findings"][0]
    assert (first["check"], first["level"]) == ("settings", PROBLEM)
    assert "NEXT_PUBLIC_SUPABASE_URL" in first["message"]
    assert {one["check"] for one in told["findings"]} == {"settings", "luigi.cfg", "luigid", "disk", "alarms"}


def test_services_that_are_away_are_said_once_each_and_exit_with_3(
    tell: Told, workdir: Path, settings: Settings
) -> None:
    nobody = free_port()
    url = f"postgresql://postgres:geheim-42@127.0.0.1:{nobody}/x"
    write(workdir, settings, url=f"http://127.0.0.1:{nobody}", database_url=Secret(url))
    code, told = tell()
    wrong = [one for one in told["findings"] if one["level"] == PROBLEM]
    assert code == 3
    assert [one["check"] for one in wrong] == ["network", "network"]
    assert f"The database at 127.0.0.1, port {nobody}, cannot be reached (IPv4: " in wrong[0]["message"]
    assert f"Storage at 127.0.0.1, port {nobody}, cannot be reached" in wrong[1]["message"]
    assert all(one["remedy"] for one in wrong)
    assert "geheim-42" not in json.dumps(told)
    assert not {"version", "bucket"} & {one["check"] for one in told["findings"]}


def test_wrong_settings_go_before_a_service_that_is_away() -> None:
    away = Finding("network", PROBLEM, "away", "wait", TransientError)
    wrong = Finding("key", PROBLEM, "wrong", "mend", AccessDenied)
    assert isinstance(doctor.verdict([away, wrong]), AccessDenied)
    assert isinstance(doctor.verdict([away]), TransientError)
    assert doctor.verdict([Finding("disk", WARNING, "low", "mend"), Finding("size", OK, "small")]) is None


def test_no_secret_is_in_the_output(workdir: Path, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    address = settings.database_url.reveal().replace("postgres@", "postgres:a-password-%40-here@")
    key = sign("another secret, of at least 32 bytes too", {"role": "anon"}, -5)
    write(workdir, settings, database_url=Secret(address), key=Secret(key))
    for arguments in ([], ["--json"], ["--verbose"], ["--log-format", "json"]):
        assert main(["status", "--check", *arguments]) == 2
    said = "".join(capfd.readouterr())
    assert "Storage refuses the key" in said
    assert not any(secret in said for secret in (key, key.split(".")[1], "a-password-%40-here", "a-password-@-here"))


@pytest.mark.parametrize("arguments", [["--source", "/x"], ["--check", "--batch-id", "b1"]])
def test_options_that_do_not_go_together_are_wrong_usage(arguments: list[str], workdir: Path) -> None:
    try:
        code: object = main(["status", *arguments])
    except SystemExit as exc:
        code = exc.code
    assert code == 2


# Time


def test_a_part_that_does_not_come_to_an_end_is_cut_off_with_what_it_found() -> None:
    over = threading.Event()

    def endless() -> Iterator[Finding]:
        yield Finding("one", OK, "found")
        over.wait(60)

    def quick() -> Iterator[Finding]:
        yield Finding("two", OK, "found")

    try:
        found = doctor.gather({"The database": endless(), "Storage": quick()}, 0.2)
    finally:
        over.set()
    assert [one.check for one in found] == ["one", "the database", "two"]
    assert found[1].level == PROBLEM
    assert "within 0 s" in found[1].message
    assert issubclass(found[1].kind, TransientError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_one_part_is_told_beside_the_findings_of_the_others() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("one", OK, "found")
        raise RuntimeError("a defect")

    found = doctor.gather({"luigid": broken()}, 10)
    assert [(one.check, one.level) for one in found] == [("one", OK), ("luigid", PROBLEM)]


def test_services_that_take_a_connection_and_say_nothing_are_waited_for_for_a_time(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SERVICE_SECONDS", 0.5)
    with listening() as port:
        url = Secret(f"postgresql://postgres@127.0.0.1:{port}/x")
        found = check(url=f"http://127.0.0.1:{port}", database_url=url)
    assert problems(found) == {"the database", "storage"}
    assert isinstance(doctor.verdict(found), TransientError)


# The network


def test_a_name_with_only_an_ipv6_address_that_is_not_reached_has_the_pooler_for_a_remedy(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host != "db.project.supabase.co":
            return asked(host, port, *arguments, **options)
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", free_port(), 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = check(database_url=Secret("postgresql://postgres@db.project.supabase.co:5432/postgres"))
    (wrong,) = (one for one in of(found, "network") if one.level == PROBLEM)
    assert "only an IPv6 address" in wrong.message
    assert "pooler.supabase.com:5432" in wrong.remedy
    assert isinstance(doctor.verdict(found), TransientError)


def test_a_name_with_only_an_ipv6_address_that_is_reached_is_fine() -> None:
    with listening(socket.AF_INET6, "::1") as port:
        [finding] = network.examine_route("the database", "::1", port)
    assert finding.level == OK
    assert "over IPv6 in " in finding.message
    assert "no other address" in finding.message


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (socket.EAI_AGAIN, TransientError, "cannot be looked up now"),
        (socket.EAI_NONAME, AccessDenied, "has no address"),
    ],
)
def test_a_name_without_an_address_is_wrong_or_not_known_now(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(number, "no")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    [finding] = network.examine_route("Storage", "nowhere.invalid", 443)
    assert (finding.level, finding.kind) == (PROBLEM, kind)
    assert words in finding.message
    assert finding.remedy


def test_both_families_are_tried_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        addresses = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        [finding] = network.examine_route("Storage", "both.test", port)
    # A refusal comes at once, and costs nothing.
    assert finding.level == OK
    assert "over IPv4 in " in finding.message
    assert "not over IPv6: " in finding.message


def test_a_family_that_is_silent_makes_every_connection_wait() -> None:
    ways = [network.Route("IPv6", error="no answer in 3 s", silent=True), network.Route("IPv4", (0.01,))]
    silent, reached = network.route_findings("Storage", ways, "", pooled=False)
    assert (silent.level, reached.level) == (WARNING, OK)
    assert "only then tried over IPv4" in silent.message


def test_an_embedded_service_that_is_not_there_is_to_be_started(check: Check, tmp_path: Path) -> None:
    url = f"postgresql://postgres@/postgres?host={tmp_path}&port=5432"
    found = check(environment="embedded", database_url=Secret(url))
    (wrong,) = (one for one in of(found, "network") if one.level == PROBLEM)
    assert f"The database at {tmp_path}/.s.PGSQL.5432 cannot be reached" in wrong.message
    assert "pipeline up" in wrong.remedy


def test_the_latency_is_the_median_of_several_answers() -> None:
    assert network.latency_finding("Storage", [0.1, 9.0, 0.2]).level == OK
    assert "200.0 ms (median of 3)" in network.latency_finding("Storage", [0.1, 9.0, 0.2]).message
    slow = network.latency_finding("the database", [0.3, 0.1, 0.3])
    assert (slow.level, slow.message) == (WARNING, "The database answers in 300.0 ms (median of 3).")


# The database


def test_a_pooler_in_transaction_mode_is_told_by_its_behaviour(check: Check, settings: Settings) -> None:
    with Pooler(settings.database_url.reveal(), by_transaction=True) as pooler:
        found = check(database_url=Secret(pooler.url))
    finding = only(found, "pooler")
    assert finding.level == OK
    assert "behind a pooler in transaction mode (by its behaviour)" in finding.message
    assert not problems(found)


def test_a_pooler_in_session_mode_is_told_from_none(check: Check, settings: Settings) -> None:
    with Pooler(settings.database_url.reveal(), by_transaction=False) as pooler:
        assert "a pooler in session mode" in only(check(database_url=Secret(pooler.url)), "pooler").message
    assert "direct, without a pooler" in only(check(), "pooler").message


def test_nothing_of_the_examination_is_left_in_the_session(settings: Settings, workdir: Path) -> None:
    url = settings.database_url.reveal()
    with Pooler(url, by_transaction=True) as pooler:
        doctor.examine(replace(settings, database_url=Secret(pooler.url)), NO_LUIGID, None)
        with closing(psycopg2.connect(pooler.url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('statement_timeout'), current_setting('transaction_read_only')")
            assert cursor.fetchone() == ("0", "off")
            cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
            assert cursor.fetchone() == (0,)
            cursor.execute("SELECT count(*) FROM pg_prepared_statements")
            assert cursor.fetchone() == (0,)


@pytest.mark.parametrize(
    ("pooling", "level", "words"),
    [
        (postgres.Pooling(7, (8, 8), "Supavisor", 6543), OK, "(by its port, 6543)"),
        (postgres.Pooling(8, (8, 8), "Supavisor", 5432, (9, 9)), OK, "session mode"),
        (postgres.Pooling(7, (8, 8), "x", 5432, (9, 8)), OK, "(by its behaviour)"),
        (postgres.Pooling(7, (8, 9), "x", 5432), OK, "(by its behaviour)"),
        (postgres.Pooling(7, (8, 8), "x", 5432, waited=True), PROBLEM, "in transaction mode, has no second"),
        (postgres.Pooling(7, (8,), "x", 5432, second=False), PROBLEM, "in session mode, has no second"),
        (postgres.Pooling(8, (8, 8), "x", 6543), OK, "direct"),
    ],
)
def test_what_the_server_processes_say_of_a_pooler(pooling: postgres.Pooling, level: str, words: str) -> None:
    finding = postgres.pooler_finding(pooling)
    assert finding.level == level
    assert words in finding.message


def test_the_server_is_new_enough_or_not() -> None:
    assert postgres.version_finding(140000).level == OK
    old = postgres.version_finding(130014)
    assert (old.level, old.message) == (PROBLEM, "The server is PostgreSQL 13.14.")
    assert issubclass(old.kind, UsageError)


@pytest.fixture
def restricted(settings: Settings) -> Iterator[str]:
    """The address of the database as a role that may log in, and nothing else; it may have three connections."""
    url, name = settings.database_url.reveal(), f"restricted_{uuid.uuid4().hex}"
    database = url.split("?")[0].rpartition("/")[2]
    execute(url, f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 3")
    execute(url, f'REVOKE TEMPORARY ON DATABASE "{database}" FROM PUBLIC')
    try:
        yield url.replace("postgres@", f"{name}@")
    finally:
        execute(url, f"DROP OWNED BY {name}")
        execute(url, f"DROP ROLE {name}")


def test_a_restricted_role_is_told_all_that_it_may_not(check: Check, restricted: str) -> None:
    found = check(database_url=Secret(restricted))
    role = only(found, "role")
    assert role.level == PROBLEM
    assert re.search(r"may not create temporary tables, does not own ingest\.\w+ and \d\d more tables", role.message)
    assert "may not COPY past the row-level security of ingest." in role.message
    assert "the user postgres" in role.remedy
    assert only(found, "migrations").level == PROBLEM  # it may not see them
    assert isinstance(doctor.verdict(found), UsageError)


def test_connections_are_bounded_by_the_narrowest_of_server_role_and_database(check: Check, restricted: str) -> None:
    narrow = only(check(database_url=Secret(restricted)), "connections")
    assert narrow.level == WARNING
    assert "Of the 3 connections that the role takes, 1 is in use: too few for one worker" in narrow.message
    wide = postgres.connections_finding([("server", 97, 4), ("role", 60, 9), ("database", 90, 1)], 10)
    assert (wide.level, "there is room for 5 workers" in wide.message) == (OK, True)


def test_a_database_that_takes_no_writes(check: Check, settings: Settings) -> None:
    url = settings.database_url.reveal()
    name = url.split("?")[0].rpartition("/")[2]
    assert only(check(), "writes").level == OK
    execute(url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    finding = only(check(), "writes")
    assert (finding.level, "read-only by default" in finding.message) == (PROBLEM, True)
    assert finding.kind is DatabaseError, "as for a load, which may find the disk full in the middle"
    assert "replica" in postgres.writable_finding(replica=True, read_only=False).message


def test_migrations_that_are_pending(check: Check, empty_database_url: str) -> None:
    found = check(database_url=Secret(empty_database_url))
    finding = only(found, "migrations")
    assert finding.level == PROBLEM
    assert finding.remedy == "Run `python -m pipeline migrate`."
    assert not of(found, "batches")


def test_time_limits_of_the_server(check: Check, settings: Settings) -> None:
    url = settings.database_url.reveal()
    name = url.split("?")[0].rpartition("/")[2]
    assert "No statement_timeout" in only(check(), "timeouts").message
    execute(url, f"ALTER DATABASE \"{name}\" SET statement_timeout = '90s'")
    harmless = only(check(), "timeouts")
    assert (harmless.level, "statement_timeout is 1m 30s" in harmless.message) == (OK, True)
    execute(url, f"ALTER DATABASE \"{name}\" SET transaction_timeout = '1h'")
    harmful = only(check(), "timeouts")
    assert (harmful.level, "after 1h 00m" in harmful.message) == (WARNING, True)


def test_unfinished_batches_are_told_with_their_age_and_the_command_that_goes_on(
    check: Check, settings: Settings, small_dataset: MakeDataset, workdir: Path
) -> None:
    url = settings.database_url.reveal()
    assert [one.level for one in of(check(), "batches")] == [OK]
    execute(url, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    assert main(["load", "--source", str(small_dataset(3)), "--batch-id", "b1", "--local-scheduler"]) == 3
    stopped = only(check(), "batches")
    assert stopped.level == WARNING
    assert stopped.message == "Batch b1 is loading, started less than two days ago."
    assert stopped.remedy == "Finish it: python -m pipeline load --batch-id b1"
    lease = BatchLock(settings, "b1", print)
    try:
        running = only(check(), "batches")
    finally:
        lease.release()
    assert (running.level, "a run is in progress" in running.message) == (OK, True)
    execute(url, "UPDATE ingest.batches SET created_at = created_at - interval '9 days'")
    old = only(check(), "batches")
    assert "started 9 days ago; it holds its recognitions" in old.message
    assert "remove it: python -m pipeline reset --batch-id b1" in old.remedy


def test_an_address_that_is_no_address_of_a_database(check: Check) -> None:
    found = check(database_url=Secret("host=x port=y nonsense"))
    assert only(found, "database").kind is SettingsError


# The clocks and the key


def test_a_clock_that_differs_is_told_from_the_date_of_an_answer(
    check: Check, settings: Settings, storage_server: StorageServer
) -> None:
    def date() -> str:
        return format_datetime(datetime.now(timezone.utc) + timedelta(hours=2), usegmt=True)

    key = sign(storage_server.secret, {"role": "service_role"}, 3600)
    bucket = {"id": settings.bucket, "public": False, "created_at": "2026-01-02T12:00:00Z"}
    with scripted(lambda _: (200, bucket), date) as (url, asked):
        found = check(url=url, key=Secret(key))
    assert len(asked) > 3
    ahead = next(one for one in of(found, "clock") if "of Storage" in one.message)
    assert (ahead.level, "s ahead of this machine's" in ahead.message) == (WARNING, True)
    assert next(one for one in of(found, "clock") if "of the database" in one.message).level == OK
    # By our own clock that key is good for an hour.
    assert (only(found, "key").level, "has expired" in only(found, "key").message) == (PROBLEM, True)


def test_clocks_that_may_agree_are_not_complained_about() -> None:
    offsets = {"a": clock.offset_of(100.0, 99.0, 101.0), "b": clock.offset_of(107.0, 96.0, 104.0)}
    assert [one.level for one in clock.clock_findings(offsets)] == [OK, OK]
    behind = list(clock.clock_findings({"c": clock.offset_of(90.0, 100.0, 100.2)}))
    assert (behind[0].level, "10 s behind" in behind[0].message) == (WARNING, True)
    assert clock.offset_of_header("no date", 0, 0) is None


def test_a_key_that_the_service_refuses(tell: Told, workdir: Path, settings: Settings) -> None:
    write(workdir, settings, key=Secret(mint_key("another secret, of at least 32 bytes too")))
    code, told = tell()
    assert code == 2
    [wrong] = [one for one in told["findings"] if one["level"] == PROBLEM]
    assert "Storage refuses the key" in wrong["message"]
    assert "service role key" in wrong["remedy"]


def test_a_key_that_has_expired(check: Check, storage_server: StorageServer) -> None:
    found = check(key=Secret(sign(storage_server.secret, {"role": "service_role"}, -3600)))
    assert problems(found) == {"storage", "key"}
    assert "The key has expired" in only(found, "key").message
    assert isinstance(doctor.verdict(found), AccessDenied)


def token(claims: Mapping[str, object]) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).decode().rstrip("=") for one in ({"alg": "x"}, claims)]
    return f"{parts[0]}.{parts[1]}.c2ln"


@pytest.mark.parametrize(
    ("key", "level", "words"),
    [
        ("sb_secret_abc", OK, "new kind"),
        ("sb_publishable_abc", PROBLEM, "publishable"),
        ("something else", WARNING, "neither a JSON Web Token"),
        ("a.b.c", WARNING, "neither a JSON Web Token"),
        (token({"role": "anon", "exp": 9e9}), PROBLEM, "the role anon"),
        (token({}), PROBLEM, "a key without a role"),
        (token({"role": "service_role"}), OK, "has the role service_role and does not expire"),
        (token({"role": "service_role", "exp": 9e9}), OK, "valid until 2255-"),
        (token({"role": "service_role", "exp": 1e99}), OK, "valid until 9999-"),
        (token({"role": "service_role", "exp": 1000.0}), PROBLEM, "has expired, at 1970-01-01 00:16:40 UTC"),
        (token({"role": "service_role", "exp": 1000 + 86400 * 2}), WARNING, "expires at 1970-01-03"),
        (token({"role": "service_role", "nbf": 2000}), PROBLEM, "is not valid before"),
        (token({"role": "service_role", "iat": 2000}), WARNING, "was issued at"),
        (token({"role": "service_role", "iat": 900, "nbf": 900}), OK, "service_role"),
    ],
)
def test_what_a_key_says_of_itself(key: str, level: str, words: str) -> None:
    [finding] = bucket_part.key_findings(key, 1000.0)
    assert finding.level == level
    assert words in finding.message
    assert key not in finding.message


def test_settings_of_two_projects() -> None:
    url, key = "https://first.supabase.co", token({"ref": "first"})
    mixed = bucket_part.project_finding(url, key, "aws-0-eu.pooler.supabase.com", "postgres.second")
    assert mixed is not None
    assert (mixed.level, "DATABASE_URL second" in mixed.message) == (PROBLEM, True)
    one = bucket_part.project_finding(url, key, "db.first.supabase.co", "postgres")
    assert one is not None
    assert one.level == OK
    assert bucket_part.project_finding("http://127.0.0.1:54321", token({}), "127.0.0.1", "postgres") is None


# The bucket and the dataset


def test_a_bucket_that_takes_no_photo_of_that_size(
    check: Check, storage_server: StorageServer, bucket: str, small_dataset: MakeDataset
) -> None:
    source = small_dataset(3)
    largest = max(path.stat().st_size for path in source.rglob("*.jpg"))
    make_bucket(storage_server, bucket, file_size_limit=largest - 1)
    finding = only(check(source), "bucket limit")
    assert finding.level == PROBLEM
    assert "that the bucket takes: 1 of 6 photos; the largest" in finding.message
    assert "Raise the bucket's size limit" in finding.remedy
    assert "no dataset is there to compare" in only(check(), "bucket limit").message


def test_a_bucket_that_takes_the_largest_photo(
    check: Check, storage_server: StorageServer, bucket: str, small_dataset: MakeDataset
) -> None:
    source = small_dataset(3)
    largest = max(path.stat().st_size for path in source.rglob("*.jpg"))
    make_bucket(storage_server, bucket, file_size_limit=largest)
    assert only(check(source), "bucket limit").level == OK


@pytest.mark.parametrize(
    ("types", "level"), [(["image/png"], PROBLEM), (["image/*"], OK), (["image/png", "image/jpeg"], OK), (None, OK)]
)
def test_a_bucket_takes_photos_or_does_not(
    check: Check, storage_server: StorageServer, bucket: str, types: list[str] | None, level: str
) -> None:
    make_bucket(storage_server, bucket, allowed_mime_types=types)
    assert only(check(), "bucket types").level == level


def test_a_public_bucket(check: Check, storage_server: StorageServer, bucket: str) -> None:
    make_bucket(storage_server, bucket, public=True)
    assert only(check(), "bucket").level == WARNING
    assert only(check(), "bucket").message.startswith(f"The bucket {bucket} is public")


def test_a_bucket_that_is_missing_is_a_problem_once_photos_should_be_in_it(
    check: Check, settings: Settings, small_dataset: MakeDataset, storage_server: StorageServer, bucket: str
) -> None:
    assert only(check(), "bucket").level == WARNING
    assert main(["load", "--source", str(small_dataset(3)), "--batch-id", "b1", "--local-scheduler"]) == 0
    assert only(check(), "bucket").level == OK
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {storage_server.key}"
        session.post(f"{storage_server.url}/storage/v1/bucket/{bucket}/empty").raise_for_status()
        session.delete(f"{storage_server.url}/storage/v1/bucket/{bucket}").raise_for_status()
    gone = only(check(), "bucket")
    assert gone.level == PROBLEM
    assert gone.message.startswith(f"The key does not see the bucket {bucket}, or it was deleted: batch b1 has")


def test_a_storage_that_is_something_else(check: Check) -> None:
    with scripted(lambda _: (200, "<html>Welcome to this hotel</html>")) as (url, _):
        found = check(url=url)
    assert "something that is not JSON" in only(found, "storage").message
    assert not of(found, "bucket")


def test_a_dataset_is_looked_at_for_a_time(small_dataset: MakeDataset) -> None:
    source = small_dataset(3)
    whole = machine.look_at_dataset(source, None, 60)
    assert (whole.recognitions, whole.photos, whole.whole) == (3, 6, True)
    assert whole.bytes == sum(path.stat().st_size for path in source.rglob("*.jpg"))
    assert whole.largest == (source / whole.largest_path).stat().st_size
    assert machine.dataset_finding(whole).level == OK
    cut = machine.look_at_dataset(source, None, -1)
    assert (cut.photos, cut.whole) == (0, False)
    assert "there are more" in machine.dataset_finding(cut).message


def test_incomplete_recognitions_are_counted_until_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(100):
        (tmp_path / f"recognition_{number}").mkdir()
    whole = machine.look_at_dataset(tmp_path, None, 60)
    assert (whole.unusable, whole.whole) == (100, True)

    def count_slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return count_below(*arguments)

    monkeypatch.setattr(machine, "count_below", count_slowly)
    started = time.monotonic()
    cut = machine.look_at_dataset(tmp_path, None, 2)
    assert time.monotonic() - started < 10
    assert (cut.unusable < 100, cut.whole) == (True, False)
    assert "there are more" in machine.dataset_finding(cut).message


def test_the_time_limits_of_the_parts_add_up_to_less_than_a_minute() -> None:
    assert doctor.SERVICE_SECONDS + doctor.ADOPTION_SECONDS + doctor.DATASET_SECONDS < 55


def test_a_dataset_that_is_not_there_or_holds_nothing(tell: Told, tmp_path: Path) -> None:
    code, told = tell("--source", tmp_path / "nowhere")
    assert code == 2
    assert [one["message"] for one in told["findings"] if one["check"] == "dataset"] == [
        f"The dataset {tmp_path / 'nowhere'} does not exist."
    ]
    (tmp_path / "empty").mkdir()
    code, told = tell("--source", tmp_path / "empty")
    assert code == 2
    assert any("holds no usable recognition" in one["message"] for one in told["findings"])


# This machine


def test_settings_that_every_user_may_read(check: Check, workdir: Path) -> None:
    file = workdir / ".env.local"
    assert only(check(file=file), "settings").level == OK
    file.chmod(0o644)
    finding = only(check(file=file), "settings")
    assert (finding.level, finding.remedy) == (WARNING, f"chmod 600 {workdir / '.env.local'}")


def test_luigi_cfg_is_found_or_not(tmp_path: Path) -> None:
    assert "No luigi.cfg" in machine.luigi_finding(tmp_path, {}).message
    (tmp_path / "luigi.cfg").touch()
    assert machine.luigi_finding(tmp_path, {}).message == f"Luigi reads {tmp_path / 'luigi.cfg'}."
    missing = machine.luigi_finding(tmp_path, {"LUIGI_CONFIG_PATH": str(tmp_path / "other")})
    assert (missing.level, "does not exist" in missing.message) == (WARNING, True)
    environ = {"LUIGI_CONFIG_PARSER": "toml"}
    assert "No luigi.toml" in machine.luigi_finding(tmp_path, environ).message
    (tmp_path / "luigi.toml").touch()
    assert machine.luigi_finding(tmp_path, environ).message == f"Luigi reads {tmp_path / 'luigi.toml'}."


@contextmanager
def luigid(folder: Path, address: str) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-c", "import luigi.cmdline; luigi.cmdline.luigid()"]
    command += ["--address", address, "--port", str(port), "--state-path", str(folder / "state")]
    with open(folder / "luigid.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=subprocess_environment(), stdout=log, stderr=log)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert wait_until(lambda: answers() or process.poll() is not None, 30)
        yield port
    finally:
        end(process)


def test_a_luigid_of_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "own_addresses", lambda: ["127.0.0.2"])
    with luigid(tmp_path, "127.0.0.1") as port:
        [finding] = machine.examine_luigid(f"http://127.0.0.1:{port}/")
    assert finding.level == OK
    assert f"luigid answers at http://127.0.0.1:{port}/ (TornadoServer/" in finding.message


def test_a_luigid_that_listens_on_all_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "own_addresses", lambda: ["127.0.0.2"])
    with luigid(tmp_path, "0.0.0.0") as port:
        answers, everywhere = machine.examine_luigid(f"http://localhost:{port}/")
    assert (answers.level, everywhere.level) == (OK, WARNING)
    assert "on all interfaces: it answers at 127.0.0.2" in everywhere.message
    assert "--address 127.0.0.1" in everywhere.remedy


def test_a_luigid_that_is_reached_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_is_loopback", lambda host: False)
    with scripted(lambda _: (200, {"response": {"paused": False}})) as (url, asked):
        _, network_wide = machine.examine_luigid(url)
    assert (network_wide.level, "over the network" in network_wide.message) == (WARNING, True)
    assert asked == ["/api/is_paused"]


def test_no_luigid_and_what_is_none() -> None:
    [absent] = machine.examine_luigid(f"http://127.0.0.1:{free_port()}/")
    assert (absent.level, "No luigid answers" in absent.message) == (OK, True)
    for status, value in ((404, "no"), (200, "<html>"), (200, {"response": 1}), (200, [])):
        with scripted(lambda _, status=status, value=value: (status, value)) as (url, _):  # type: ignore[misc]
            [other] = machine.examine_luigid(url)
        assert (other.level, "is not a luigid" in other.message) == (WARNING, True)


@contextmanager
def speaking(words: bytes) -> Iterator[str]:
    """Say the same to each connection, whatever is asked, and close it."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(words)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize(
    "words",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"220 mail ESMTP\r\n",
        b"HTTP/1.1 2x OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"\xff\xfe\x00",
    ],
)
def test_a_service_that_does_not_speak_http_is_no_luigid(words: bytes) -> None:
    with speaking(words) as url:
        [finding] = doctor.gather({"luigid": machine.examine_luigid(url)}, 10)
    assert (finding.level, "is not a luigid" in finding.message) == (WARNING, True)


def test_a_server_that_sends_a_byte_now_and_then_is_no_luigid() -> None:
    with server(drips(b"HTTP/1.1 200 OK\r\n")) as url:
        [finding] = doctor.gather({"luigid": machine.examine_luigid(url)}, 10)
    assert (finding.level, "No luigid answers" in finding.message) == (OK, True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc/", "http://127.0.0.1:99999/", "http://[::1/", "http://[x]/"])
def test_an_address_of_luigid_that_is_no_url(url: str) -> None:
    [finding] = doctor.gather({"luigid": machine.examine_luigid(url)}, 10)
    assert (finding.level, "is not a URL" in finding.message) == (WARNING, True)
    assert "scheduler_url" in finding.remedy


def test_the_addresses_of_this_machine_are_not_its_loopback() -> None:
    assert not any(machine._is_loopback(address) for address in machine.own_addresses())


@pytest.mark.parametrize(
    ("free", "needed", "level"),
    [(1 << 20, 0, PROBLEM), (1 << 29, 0, WARNING), (1 << 33, 1 << 34, WARNING), (1 << 33, 1 << 32, OK)],
)
def test_a_disk_has_room_or_not(tmp_path: Path, free: int, needed: int, level: str) -> None:
    finding = machine.room_finding("photos", tmp_path, free, needed)
    assert finding.level == level
    assert bool(finding.remedy) == (level != OK)


def test_the_disks_of_the_embedded_services(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(list(machine.examine_disks(settings, None))) == 1
    embedded = replace(settings, environment="embedded")
    huge = machine.Dataset(tmp_path, bytes=1 << 60)
    temporary, home = machine.examine_disks(embedded, huge)
    assert (temporary.level, home.level) == (OK, WARNING)
    assert str(settings.home) in home.message
    assert "of the dataset's photos" in home.message
    monkeypatch.setattr(EmbeddedPostgres, "data_path", Path("/proc/data"))  # on another device
    assert len(list(machine.examine_disks(embedded, None))) == 3


def record(home: Path, text: str) -> None:
    (home / "postgres.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda home: record(home, ""), "is damaged"),
        (lambda home: record(home, "[]"), "is damaged"),
        (lambda home: record(home, '{"home": "/x"}'), "is damaged"),
        (lambda home: (home / "postgres.json").write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda home: ((home / "postgres.json").unlink(), (home / "postgres.json").mkdir()), "is damaged"),
        (lambda home: record(home, '{"home": "/", "base": "/elsewhere", "socket": "/s"}'), "is a copy of /"),
        (lambda home: home.chmod(0o777), "Other users can write"),
        pytest.param(
            lambda home: (home / "postgres.json").chmod(0),
            "belongs to another user",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything"),
        ),
        pytest.param(
            lambda home: os.chown(home, 65534, -1),
            "belongs to another user",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away"),
        ),
    ],
)
def test_an_embedded_postgresql_whose_record_cannot_be_used(
    settings: Settings, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    home = tmp_path / "home"
    home.mkdir(0o700)
    record(home, json.dumps({"home": str(home), "base": "/elsewhere", "socket": "/s"}))
    spoil(home)
    found = list(machine.examine_disks(replace(settings, environment="embedded", home=home), None))
    assert (found[-1].check, found[-1].level, words in found[-1].message) == ("disk", PROBLEM, True)
    assert found[-1].remedy


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("none")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    [finding] = machine.examine_disks(None, None)
    assert (finding.level, "TMPDIR" in finding.remedy) == (PROBLEM, True)

"""The doctor tells the modes of a real pooler, PgBouncer, before a real PostgreSQL."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg2.extensions import parse_dsn

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from pipeline import doctor
from pipeline.config import Secret, Settings
from pipeline.doctor.finding import OK, PROBLEM, Finding
from pipeline.errors import TransientError
from tests.services import end
from tests.system.conftest import require

pytestmark = pytest.mark.system

PGBOUNCER = "/usr/sbin/pgbouncer"


@contextmanager
def pgbouncer(folder: Path, dsn: str, mode: str, connections: int) -> Iterator[str]:
    """Run a PgBouncer before the database; yield the address of the same database behind it."""
    require(PGBOUNCER)
    port, parameters = free_port(), parse_dsn(dsn)
    database = parameters["dbname"]
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n{database} = host={parameters['host']} port={parameters.get('port', '5432')} "
        f"user={parameters['user']}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {mode}\ndefault_pool_size = {connections}\n",
        encoding="utf-8",
    )
    # It refuses to run as root.
    command = [PGBOUNCER, "--quiet", "pgbouncer.ini"]
    if os.geteuid() == 0:
        command[1:1] = ["--user", "postgres"]
    with open(folder / "pgbouncer.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert wait_until(lambda: answers() or process.poll() is not None, 30)
        assert process.poll() is None, (folder / "pgbouncer.log").read_text(encoding="utf-8")
        yield f"postgresql://{parameters['user']}@127.0.0.1:{port}/{database}"
    finally:
        end(process)


def look(settings: Settings, url: str) -> tuple[Finding, list[Finding]]:
    found = doctor.examine(replace(settings, database_url=Secret(url)), "http://127.0.0.1:1/", None)
    [pooler] = (one for one in found if one.check == "pooler")
    return pooler, [one for one in found if one.level == PROBLEM]


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_the_mode_of_a_pooler_is_told(mode: str, settings: Settings, workdir: Path, tmp_path: Path) -> None:
    with pgbouncer(tmp_path, settings.database_url.reveal(), mode, 5) as url:
        pooler, problems = look(settings, url)
    assert pooler.level == OK
    assert f"a pooler in {mode} mode" in pooler.message
    assert problems == []


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_of_one_connection_is_too_small(mode: str, settings: Settings, workdir: Path, tmp_path: Path) -> None:
    with pgbouncer(tmp_path, settings.database_url.reveal(), mode, 1) as url:
        pooler, problems = look(settings, url)
    assert problems == [pooler]
    assert f"in {mode} mode, has no second server connection" in pooler.message
    assert issubclass(pooler.kind, TransientError)

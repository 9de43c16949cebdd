"""`up` and `down`: both services or none, the same addresses every time, and no way to have two of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from dotenv import dotenv_values

from embedded_supabase import services
from embedded_supabase.errors import ServiceFailed, SetupError
from embedded_supabase.files import has_ended, make_folder, wait_until
from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.services import State, Stopped
from embedded_supabase.storage import process as storage_process
from pipeline.database.migrate import migrations
from tests.services import RunPipeline, Start, execute, give_data

#: They wait more than they compute.
pytestmark = pytest.mark.slow

NAMES = {"NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL"}


@pytest.fixture
def new_home(short_folder: Path, clean_environment: None) -> Iterator[Path]:
    """A home that does not exist yet; what runs in it at the end is stopped, and it is removed."""
    folder = short_folder / uuid.uuid4().hex[:8]
    make_folder(folder, 0o755)
    home = folder / "it's here"
    yield home
    services.down(home)
    shutil.rmtree(folder)


@pytest.fixture
def home(new_home: Path, made_data: Path) -> Path:
    """A home whose PostgreSQL was made, and has never run."""
    give_data(new_home, made_data)
    return new_home


def variables(home: Path) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(home / "env").items()}


def status_of(home: Path, path: str, key: str | None = None) -> int:
    """Ask the Storage server of a home for something, with the key of its `env` file unless another is given."""
    found = variables(home)
    with requests.Session() as session:
        session.trust_env = False
        url = f"{found['NEXT_PUBLIC_SUPABASE_URL']}/storage/v1/{path}"
        headers = {"Authorization": f"Bearer {key or found['SUPABASE_SERVICE_ROLE_KEY']}"}
        return session.get(url, headers=headers, timeout=10).status_code


def storage_pid(home: Path) -> int:
    pid = json.loads((home / "storage" / "server.json").read_text(encoding="utf-8"))["pid"]
    assert isinstance(pid, int)
    return pid


def test_up_starts_both_services_and_a_second_up_leaves_them_alone(home: Path) -> None:
    first = services.up(home)
    assert not first.postgres.was_running
    assert not first.storage.was_running
    assert execute(first.postgres.where, "SELECT 1") == [(1,)]
    roles = "SELECT rolname, rolbypassrls FROM pg_roles WHERE rolname !~ '^(pg_|postgres)' ORDER BY rolname"
    assert execute(first.postgres.where, roles) == [("anon", False), ("authenticated", False), ("service_role", True)]
    assert status_of(home, "bucket") == 200
    assert services.services_state(home) == State(first.postgres.where, first.storage.where)

    second = services.up(home)
    assert second.postgres.was_running
    assert second.storage.was_running
    assert (second.postgres.pid, second.storage.pid) == (first.postgres.pid, first.storage.pid)
    assert [line.count("already running") for line in second.describe().splitlines()] == [1, 1]
    assert status_of(home, "bucket") == 200


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_up_starts_both_services_so_that_they_survive_a_power_failure(home: Path) -> None:
    started = services.up(home)
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        assert execute(started.postgres.where, f"SHOW {name}") == [("on",)]
    command = Path(f"/proc/{started.storage.pid}/cmdline").read_bytes().split(b"\0")
    assert b"embedded_supabase.storage" in command
    assert b"--no-sync" not in command


def test_the_env_file_is_private_and_reads_the_same_for_sh_and_dotenv(home: Path) -> None:
    started = services.up(home)
    assert started.env == home / "env"
    read = variables(home)
    assert set(read) == NAMES
    assert read["NEXT_PUBLIC_SUPABASE_URL"] == started.storage.where
    assert read["DATABASE_URL"] == started.postgres.where
    script = 'set -a; . "$1"; exec "$2" -c "import json, os; print(json.dumps(dict(os.environ)))"'
    command = ["/bin/sh", "-c", script, "sh", str(started.env), sys.executable]
    shell = json.loads(subprocess.run(command, env={}, capture_output=True, check=True).stdout)
    assert {name: shell[name] for name in NAMES} == read
    for name in ("env", "jwt-secret", "storage.log", "postgres.json"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE((home / "storage").stat().st_mode) == 0o700
    for secret in (read["SUPABASE_SERVICE_ROLE_KEY"], (home / "jwt-secret").read_text(encoding="ascii").strip()):
        assert secret not in started.describe()


def test_down_keeps_data_addresses_and_keys_for_the_next_up(home: Path) -> None:
    first = services.up(home)
    before = variables(home)
    execute(first.postgres.where, "CREATE TABLE kept (n int)")
    pids = (first.postgres.pid, first.storage.pid)

    stopped = services.down(home)
    assert (stopped.postgres, stopped.storage) == (True, True)
    assert stopped.describe() == "PostgreSQL: stopped, data kept\nStorage: stopped, data kept"
    assert [pid for pid in pids if pid is None or not has_ended(pid)] == []
    assert services.services_state(home) == State(None, None)
    again = services.down(home)
    assert (again.postgres, again.storage) == (False, False)
    assert again.describe() == "PostgreSQL: not running\nStorage: not running"

    second = services.up(home)
    after = variables(home)
    assert after["NEXT_PUBLIC_SUPABASE_URL"] == before["NEXT_PUBLIC_SUPABASE_URL"]
    assert after["DATABASE_URL"] == before["DATABASE_URL"]
    assert status_of(home, "bucket", before["SUPABASE_SERVICE_ROLE_KEY"]) == 200
    assert execute(second.postgres.where, "SELECT count(*) FROM kept") == [(0,)]


def test_down_without_a_home_makes_none(new_home: Path) -> None:
    assert services.down(new_home) == Stopped(postgres=False, storage=False, seconds=0.0)
    assert services.services_state(new_home) == State(None, None)
    assert not new_home.exists()


def test_a_storage_server_that_was_killed_is_started_again_at_its_address(home: Path) -> None:
    first = services.up(home)
    pid = storage_pid(home)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: services.services_state(home).storage is None, 10)
    second = services.up(home)
    assert second.postgres.was_running
    assert not second.storage.was_running
    assert second.storage.where == first.storage.where
    assert second.storage.pid == storage_pid(home) != pid
    assert status_of(home, "bucket") == 200


def test_a_port_that_another_program_has_taken_is_left_to_it(home: Path) -> None:
    first = services.up(home)
    services.down(home)
    port = int(first.storage.where.rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        second = services.up(home)
    assert second.storage.where != first.storage.where
    assert variables(home)["NEXT_PUBLIC_SUPABASE_URL"] == second.storage.where
    assert status_of(home, "bucket") == 200


def test_a_lost_secret_makes_former_keys_worthless(home: Path) -> None:
    services.up(home)
    former = variables(home)["SUPABASE_SERVICE_ROLE_KEY"]
    (home / "jwt-secret").unlink()
    assert not services.up(home).storage.was_running
    assert status_of(home, "bucket") == 200
    assert status_of(home, "bucket", former) in (400, 401, 403)


def replace_interpreter(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let the Storage server be this shell script instead."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_storage_server_that_fails_takes_back_what_this_up_started_and_no_more(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgres(home)
    with monkeypatch.context() as patch:
        replace_interpreter(patch, tmp_path, "echo 'ImportError: no module' >&2; exit 7")
        with pytest.raises(ServiceFailed, match=r"ended with exit code 7: Error: no module") as caught:
            services.up(home)
        assert str(home / "storage.log") in caught.value.hint
        assert server.data_path.exists()
        assert not server.is_running()
        assert not (home / "env").exists()

        server.start()
        pid = server.pid
        with pytest.raises(ServiceFailed, match="exit code 7"):
            services.up(home)
        assert server.pid == pid
    started = services.up(home)
    assert (started.postgres.was_running, started.storage.was_running) == (True, False)


def test_a_storage_server_that_does_not_answer_is_ended(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_process, "_START_SECONDS", 0.3)
    replace_interpreter(monkeypatch, tmp_path, f"echo $$ >'{tmp_path}/pid'; exec sleep 600")
    with pytest.raises(ServiceFailed, match="does not respond"):
        services.up(home)
    assert has_ended(int((tmp_path / "pid").read_text(encoding="ascii")))
    assert services.services_state(home) == State(None, None)


def test_files_that_cannot_be_written_are_a_sentence_and_leave_nothing_running(home: Path) -> None:
    (home / "storage").write_text("in the way", encoding="utf-8")
    with pytest.raises(SetupError, match="storage File exists"):
        services.up(home)
    (home / "storage").unlink()
    assert services.services_state(home) == State(None, None)


# Through the commands


def test_two_commands_up_at_once_start_one_of_each(new_home: Path, start: Start) -> None:
    environment = {"PIPELINE_HOME": str(new_home)}
    commands = [start(sys.executable, "-m", "pipeline", "up", env=environment) for _ in range(2)]
    said = [command.communicate(timeout=60) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    lines = [output.splitlines() for output, _ in said]
    for service in (0, 1):
        how = sorted("already running" if "already running" in one[service] else "started" for one in lines)
        assert how == ["already running", "started"]
    counts = [re.fullmatch(r"Migrations: (\d+) applied", one[2]) for one in lines]
    assert sum(int(count[1]) for count in counts if count) == len(migrations())
    assert status_of(new_home, "bucket") == 200


def test_the_commands_up_status_and_down(home: Path, run_pipeline: RunPipeline) -> None:
    environment = {"PIPELINE_HOME": str(home), "PIPELINE_RETRY_MAX_ATTEMPTS": "0"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_pipeline(*arguments, cwd=home.parent, env=environment)

    before = run("status")
    assert before.returncode == 2
    assert "python -m pipeline up" in before.stderr

    first = run("up")
    assert first.returncode == 0, first.stderr
    postgres, storage, migrated, _ = first.stdout.splitlines()
    assert postgres.startswith("PostgreSQL 18.")
    assert "started in" in postgres
    assert storage.startswith("Storage ")
    assert "started in" in storage
    assert migrated.startswith("Migrations: ")
    assert migrated.endswith(" applied")
    assert first.stderr == ""
    assert variables(home)["SUPABASE_SERVICE_ROLE_KEY"] not in first.stdout

    status = run("status", "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["environment"] == "embedded"

    second = run("up")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("already running") == 2
    assert "Migrations: up to date" in second.stdout

    assert [run("down").returncode for _ in range(2)] == [0, 0]
    after = run("status")
    assert after.returncode == 3
    assert "python -m pipeline up" in after.stdout + after.stderr


def test_up_migrates_its_own_database_whatever_other_settings_there_are(
    home: Path, run_pipeline: RunPipeline, empty_database_url: str
) -> None:
    (home.parent / ".env.local").write_text(f"DATABASE_URL='{empty_database_url}'\n", encoding="utf-8")
    environment = {"PIPELINE_HOME": str(home), "DATABASE_URL": empty_database_url}
    done = run_pipeline("up", cwd=home.parent, env=environment)
    assert done.returncode == 0, done.stderr
    there = "SELECT to_regclass('public.recognitions') IS NOT NULL"
    assert execute(variables(home)["DATABASE_URL"], there) == [(True,)]
    assert execute(empty_database_url, there) == [(False,)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["postgres.json", "postgres/data/postmaster.pid", "storage.log"])
def test_up_that_is_killed_at_any_moment_is_finished_by_the_next(new_home: Path, start: Start, moment: str) -> None:
    killed = start(sys.executable, "-m", "pipeline", "up", env={"PIPELINE_HOME": str(new_home)})
    assert wait_until((new_home / moment).exists, 30)
    killed.kill()
    killed.wait()
    started = services.up(new_home)
    assert execute(started.postgres.where, "SELECT 1") == [(1,)]
    assert started.storage.pid == storage_pid(new_home)
    assert status_of(new_home, "bucket") == 200
    stopped = services.down(new_home)
    assert (stopped.postgres, stopped.storage) == (True, True)

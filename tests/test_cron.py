"""Run the lines of crontab.example as cron runs them, and check what they print, which cron would mail."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from pipeline.graph.luigid import answers
from pipeline.storage import Storage
from tests import crontab, processes, test_init, world
from tests.crontab import GIVEN, Line, Table
from tests.services import MakeDataset, end_group

pytestmark = pytest.mark.skipif(shutil.which("flock", path=GIVEN["PATH"]) is None, reason="needs flock of util-linux")


class Cron:
    """The user of a crontab; runs its lines as cron would."""

    def __init__(self, home: Path, table: Table, port: int) -> None:
        self.folder = Path(table.settings["PIPELINE"])
        self.table, self.port = table, port
        self._home = home
        self._started: list[subprocess.Popen[str]] = []

    def start(self, line: Line) -> subprocess.Popen[str]:
        """Start the command of a line in its own session, without a terminal, with the environment that cron sets."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", line.command],
            cwd=self._home,
            env={**GIVEN, "HOME": str(self._home), "LOGNAME": "somebody", **self.table.settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, line: Line) -> str:
        """Run a line to its end and return its output."""
        return self.start(line).communicate(timeout=120)[0]

    def set(self, **variables: str) -> None:
        """Add to .env.production."""
        with open(self.folder / ".env.production", "a", encoding="utf-8") as file:
            file.writelines(f"{name}='{value}'\n" for name, value in variables.items())

    @property
    def loads(self) -> list[Line]:
        """Return the lines of the nightly load and of its second run."""
        return self.table.line("pipeline load ")

    def log(self, name: str) -> str:
        """Return the concatenated logs of a name."""
        return "".join(
            path.read_text(encoding="utf-8") for path in sorted((self.folder / "logs").glob(f"{name}-*.log"))
        )

    def close(self) -> None:
        """Stop the commands that were started."""
        for process in self._started:
            end_group(process)


@pytest.fixture
def has_photos() -> bool:
    """The bucket exists, as after other nights: no load looks for photos in others, and waits for who locks them."""
    return True


@pytest.fixture
def dataset(small_dataset: MakeDataset) -> Path:
    return small_dataset(6)


@pytest.fixture
def cron(tmp_path: Path, settings: Settings, dataset: Path) -> Iterator[Cron]:
    """A crontab with its two paths changed; the name of the folder contains a space."""
    folder = tmp_path / "my pipeline"
    port = crontab.furnish(folder, settings)
    home = tmp_path / "home"
    home.mkdir()
    with closing(Cron(home, crontab.read(crontab.changed(folder, dataset, port)), port)) as cron:
        yield cron


def batches(settings: Settings) -> list[tuple[str, int]]:
    """Return state and recognitions of each batch, oldest first."""
    found = world.query(
        settings.database_url.reveal(), "SELECT state, recognitions FROM ingest.batches ORDER BY created_at"
    )
    return [(state, recognitions) for state, recognitions in found]


def first_batch(settings: Settings) -> str:
    found = world.query(settings.database_url.reveal(), "SELECT id FROM ingest.batches ORDER BY created_at LIMIT 1")
    return str(found[0][0])


def secrets(settings: Settings) -> tuple[str, str]:
    return settings.key.reveal(), settings.database_url.reveal()


def test_only_two_paths_have_to_be_changed() -> None:
    table = crontab.read(crontab.EXAMPLE.read_text(encoding="utf-8"))
    assert list(table.settings) == ["PIPELINE", "BIN", "DATASET_DIR"]
    assert [name for name, value in table.settings.items() if value.startswith("/")] == ["PIPELINE", "DATASET_DIR"]
    assert [line.when for line in table.lines] == ["@reboot", "15 2 * * *", "15 4 * * *", "40 6 * * *", "30 7 * * *"]
    for line in table.lines:
        assert line.command.startswith('cd "$PIPELINE" && ')
        assert not re.search(r"(^|[\s=>])/", line.command), "a path that is not below PIPELINE"
        assert len(line.written) < 999, "more than cron takes"
    first, second = table.line("pipeline load ")
    assert first.written == second.written, "the second run resumes the first"


def test_a_successful_night_sends_no_mail(cron: Cron, settings: Settings, dataset: Path) -> None:
    first, second = cron.loads
    assert cron.run(first) == ""
    assert cron.run(second) == ""
    assert batches(settings) == [("done", 6)]
    assert (cron.log("load").count("is done: "), cron.log("load").count("othing to load: ")) == (1, 1)
    world.check(settings, (dataset, first_batch(settings), None))
    assert cron.run(*cron.table.line("verify")) == ""
    assert "12 equal" in cron.log("verify")
    assert "Read 12 objects" in cron.log("verify")
    for name in ("load", "verify"):
        begun, target, *_, ended = cron.log(name).splitlines()
        assert target.startswith("Target: production, ")
        assert re.search(r"\d\d:\d\d:\d\d", begun)
        assert re.search(r"\d\d:\d\d:\d\d", ended)
    assert os.listdir(cron.folder.parent / "home") == []


@pytest.mark.slow
def test_a_failure_sends_its_cause_and_the_second_run_finishes_the_batch(
    cron: Cron, settings: Settings, dataset: Path
) -> None:
    dsn = settings.database_url.reveal()
    first, second = cron.loads
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    mail = cron.run(first)
    assert "Failed: CopyShard(" in mail
    assert 'violates check constraint "never"' in mail
    assert mail.splitlines()[-2].startswith("Error: Batch batch_")
    assert "is unfinished: 1 task failed." in mail
    assert mail.splitlines()[-1].startswith("Hint: To go on: python -m pipeline load --batch-id batch_")
    assert not re.search("[\r\x1b█░]", mail)
    assert not any(secret in mail for secret in secrets(settings))
    assert batches(settings) == [("loading", 6)]
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    assert cron.run(second) == ""
    assert batches(settings) == [("done", 6)]
    world.check(settings, (dataset, first_batch(settings), None))


def test_wrong_settings_and_a_missing_folder_are_mailed(cron: Cron, settings: Settings) -> None:
    first, _ = cron.loads
    os.truncate(cron.folder / ".env.production", 0)
    assert "Error: Not set in " in cron.run(first)
    (cron.folder / ".env.production").unlink()
    assert "Error: --production needs the file" in cron.run(first)
    cron.folder.rename(cron.folder.with_name("elsewhere"))
    assert "my pipeline" in cron.run(first)


@pytest.mark.slow
def test_two_loads_at_once_run_one_after_the_other(cron: Cron, settings: Settings, dataset: Path) -> None:
    cron.set(PIPELINE_BATCH_SIZE="2")
    first, second = cron.loads
    dsn = settings.database_url.reveal()
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.images IN EXCLUSIVE MODE")  # the transform waits for it
        one = cron.start(first)
        assert wait_until(lambda: waits(settings) or one.poll() is not None, 60)
        other = cron.start(second)
        assert wait_until(lambda: waits_for_the_lock(other) or other.poll() is not None, 30)
        assert batches(settings) == [("loading", 6)]
        connection.rollback()
    assert (one.communicate(timeout=60)[0], other.communicate(timeout=60)[0]) == ("", "")
    assert batches(settings) == [("done", 6)]
    world.check(settings, (dataset, first_batch(settings), None))


@pytest.mark.slow
def test_a_killed_load_leaves_no_lock_and_the_next_run_resumes_it(
    cron: Cron, settings: Settings, dataset: Path
) -> None:
    first, second = cron.loads
    with closing(psycopg2.connect(settings.database_url.reveal())) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.images IN EXCLUSIVE MODE")
        one = cron.start(first)
        assert wait_until(lambda: waits(settings) or one.poll() is not None, 60)
        other = cron.start(second)
        assert wait_until(lambda: waits_for_the_lock(other) or other.poll() is not None, 30)
        os.killpg(one.pid, signal.SIGKILL)
        connection.rollback()
    assert other.communicate(timeout=60)[0] == ""
    assert batches(settings) == [("done", 6)]
    world.check(settings, (dataset, first_batch(settings), None))


def waits(settings: Settings) -> bool:
    """Return whether the transform waits in PostgreSQL."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(world.query(settings.database_url.reveal(), waiting) == [(1,)])


def waits_for_the_lock(shell: subprocess.Popen[str]) -> bool:
    """Return whether flock, a child of a shell, waits."""
    return ("flock", "S") in map(processes.state, processes.children(shell.pid))


@pytest.mark.slow
def test_the_nightly_verify_mails_a_difference(cron: Cron, settings: Settings) -> None:
    assert cron.run(cron.loads[0]) == ""
    key = next(iter(world.objects(settings)))
    with closing(Storage(settings)) as storage:
        storage.remove([key])
    mail = cron.run(*cron.table.line("verify"))
    assert f"- {key} dangling" in mail
    assert "11 equal" in mail


@pytest.mark.slow
def test_luigid_listens_on_loopback_and_mails_why_it_fails(cron: Cron) -> None:
    [line] = cron.table.line("luigid")
    assert line.when == "@reboot"
    running = cron.start(line)
    url = f"http://127.0.0.1:{cron.port}"
    assert wait_until(lambda: answers(url) or running.poll() is not None, 30)
    assert running.poll() is None
    with socket.socket() as another, pytest.raises(ConnectionRefusedError):
        another.connect(("127.0.0.2", cron.port))  # a server on all addresses would accept this
    assert cron.run(cron.loads[0]) == ""
    mail = cron.run(line)  # its port is in use
    assert "Address already in use" in mail


@pytest.mark.slow
def test_the_commands_of_the_units_load_and_verify(cron: Cron, settings: Settings, dataset: Path) -> None:
    # As systemd runs them: in their folder, with little in the environment.
    given = {**GIVEN, "HOME": str(cron.folder.parent / "home"), "USER": "somebody"}
    written: list[str | Path] = [cron.folder / ".venv/bin/python", "-m", "pipeline", "init", "--production"]
    written += ["--systemd", "--non-interactive", "--source", dataset]
    subprocess.run(written, cwd=cron.folder, env=given, check=True, capture_output=True)
    for name in ("load", "verify"):
        service = test_init.unit(cron.folder / "systemd" / f"pipeline-{name}.service")["Service"]
        [variable] = shlex.split(service["Environment"][0])
        done = subprocess.run(
            shlex.split(service["ExecStart"][0]),
            cwd=service["WorkingDirectory"][0],
            env={**given, **dict([variable.split("=", 1)])},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("Target: production, ")
    assert "Read 12 objects" in done.stdout
    world.check(settings, (dataset, first_batch(settings), None))


def test_logs_older_than_30_days_are_deleted(cron: Cron) -> None:
    logs = cron.folder / "logs"
    [line] = cron.table.line("find")
    assert cron.run(line) == ""
    old = time.time() - 40 * 86400
    for name in ("load-2020-01-01-0215.log", "verify-2020-01-01-0640.log", "luigid.log", "load.lock"):
        (logs / name).touch()
        os.utime(logs / name, (old, old))
    (logs / "load-2020-01-31-0215.log").touch()
    assert cron.run(line) == ""
    assert sorted(os.listdir(logs)) == ["load-2020-01-31-0215.log", "load.lock", "luigid.log"]


def test_a_load_that_never_ends_is_mailed_the_next_day(cron: Cron) -> None:
    lock = cron.folder / "logs" / "load.lock"
    lock.parent.mkdir()
    line = cron.loads[0]
    assert "--wait 72000 " in line.written
    soon = Line(line.when, line.written.replace("--wait 72000 ", "--wait 0.1 "))
    with open(lock, "w", encoding="ascii") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cron.run(soon).endswith("\nflock: timeout while waiting to get lock\n")
    assert cron.run(soon) == ""

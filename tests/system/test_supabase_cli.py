"""The Supabase CLI works from the app's repository in the app's project, and from ours in ours, at each step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.database.migrate import export, migrations
from tests import annotating, world
from tests.annotating import Run
from tests.histories import CLI, OWN, history, write_app
from tests.proxies import DatabaseProxy
from tests.services import REPOSITORY, MakeDataset, fresh_database
from tests.system.conftest import require

pytestmark = pytest.mark.system

run = annotating.run
dsn = annotating.dsn

#: Where `install.sh` puts it.
SUPABASE = Path(sys.prefix) / "supabase" / "node_modules" / ".bin" / "supabase"
UP, PUSH = ("migration", "up"), ("db", "push")
REMOTE_VERSIONS = "Remote migration versions not found in local migrations directory"
LABELS = [one.label for one in migrations()]
UP_TO_DATE = "The schema is up to date\n"


class Supabase:
    """The CLI with one database; it takes no socket, and connects through a proxy."""

    def __init__(self, url: str, home: Path) -> None:
        self._url = f"{url}?sslmode=disable"
        quiet = ("DO_NOT_TRACK", "SUPABASE_TELEMETRY_DISABLED", "SUPABASE_NO_UPDATE_NOTIFIER")
        self._environment = {**os.environ, **dict.fromkeys(quiet, "1"), "HOME": str(home)}

    def __call__(self, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command from a repository."""
        command = [str(SUPABASE), *arguments, "--yes", "--workdir", str(repository), f"--remote={self._url}"]
        return subprocess.run(
            command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )

    def applied(self, repository: Path, command: tuple[str, ...]) -> list[str]:
        """Apply what is pending from a repository and return its labels; files and history are the same then."""
        done = self(repository, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        versions = sorted(path.name.partition("_")[0] for path in (repository / "supabase" / "migrations").iterdir())
        listed = self(repository, "migration", "list", "--output-format", "json")
        assert listed.returncode == 0, listed.stderr
        rows = json.loads(listed.stdout)["migrations"]
        assert [(row["local"], row["remote"]) for row in rows] == [(version, version) for version in versions]
        lines = (done.stdout + done.stderr).splitlines()
        return [line.split()[2].removesuffix(".sql...") for line in lines if line.startswith("Applying migration ")]


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The address of an empty database."""
    with fresh_database(postgres_server.dsn, f"cli_{uuid.uuid4().hex}") as url:
        yield url


@pytest.fixture
def has_photos() -> bool:
    return True


@pytest.fixture
def supabase(dsn: str, tmp_path: Path) -> Iterator[Supabase]:
    require("node", str(SUPABASE))
    (tmp_path / "home").mkdir()
    with DatabaseProxy(dsn) as proxy:
        yield Supabase(proxy.url, tmp_path / "home")


@pytest.fixture
def app(tmp_path: Path, supabase: Supabase) -> Path:
    """The app's repository, whose migrations the CLI applied to its project."""
    folder = write_app(tmp_path / "app" / "supabase" / "migrations")
    repository = folder.parents[1]
    assert len(supabase.applied(repository, UP)) == 68
    return repository


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A copy of our repository, as far as the CLI looks at it."""
    shutil.copytree(REPOSITORY / "supabase" / "migrations", tmp_path / "ours" / "supabase" / "migrations")
    return tmp_path / "ours"


def folder_of(repository: Path) -> Path:
    return repository / "supabase" / "migrations"


def add(repository: Path, version: str) -> str:
    """Add a migration of the app and return its label."""
    (folder_of(repository) / f"{version}_notes.sql").write_text(
        f"CREATE TABLE notes_{version} (n int);\n", encoding="utf-8"
    )
    return f"{version}_notes"


@pytest.mark.parametrize("command", [UP, PUSH], ids=" ".join)
def test_the_cli_works_from_the_apps_repository_after_each_step(
    run: Run, supabase: Supabase, app: Path, dsn: str, own_dataset: MakeDataset, command: tuple[str, ...]
) -> None:
    before = history(dsn)
    assert run("migrate").code == 0
    assert supabase.applied(app, command) == []
    assert history(dsn) == before
    newer = add(app, "20260501000000")
    assert supabase.applied(app, command) == [newer]
    assert run("migrate").out == UP_TO_DATE
    assert run("load", "--source", own_dataset(2), "--batch-id", "b1").code == 0

    # What `migrate` applied is exported later: the CLI runs it once more.
    assert run("migrate", "--export", folder_of(app)).code == 0
    copies = [path.stem for path in sorted(folder_of(app).iterdir())][-len(LABELS) :]
    assert supabase.applied(app, command) == copies
    assert run("migrate").out == UP_TO_DATE
    assert run("verify").code == 0

    newer = add(app, "20260601000000")
    assert supabase.applied(app, command) == [newer]
    assert run("migrate", "--export", folder_of(app)).out == f"{folder_of(app)} has all migrations\n"
    assert run("migrate", "--release-history").code == 0
    assert supabase.applied(app, command) == []
    assert run("load", "--source", own_dataset(4), "--batch-id", "b2").code == 0


@pytest.mark.parametrize("command", [UP, PUSH], ids=" ".join)
@pytest.mark.parametrize("newer_first", [False, True])
def test_what_the_cli_applied_from_the_apps_repository_is_known(
    run: Run,
    supabase: Supabase,
    app: Path,
    dsn: str,
    own_dataset: MakeDataset,
    newer_first: bool,
    command: tuple[str, ...],
) -> None:
    if newer_first:
        newer = add(app, "20260501000000")
        assert supabase.applied(app, command) == [newer]
    copies = [path.stem for path in export(folder_of(app))]
    assert supabase.applied(app, command) == copies
    assert run("migrate").out == UP_TO_DATE
    assert world.query(dsn, f"SELECT count(*) FROM {OWN}") == [(0,)]
    assert run("load", "--source", own_dataset(2), "--batch-id", "b1").code == 0
    newer = add(app, "20260601000000")
    assert supabase.applied(app, command) == [newer]
    assert export(folder_of(app)) == []


@pytest.mark.parametrize("command", [UP, PUSH], ids=" ".join)
def test_the_cli_and_migrate_know_each_others_records_in_our_project(
    run: Run, supabase: Supabase, ours: Path, dsn: str, command: tuple[str, ...]
) -> None:
    last = folder_of(ours) / f"{LABELS[-1]}.sql"
    text = last.read_text(encoding="utf-8")
    last.unlink()
    assert supabase.applied(ours, command) == LABELS[:-1]
    assert [line for line in run("migrate").out.splitlines() if " 2026" in line] == [f"applied {LABELS[-1]}"]
    last.write_text(text, encoding="utf-8")
    assert supabase.applied(ours, command) == []
    assert run("migrate").out == UP_TO_DATE
    assert [f"{version}_{name}" for version, _, name in history(dsn)] == LABELS


@pytest.mark.parametrize("command", [UP, PUSH], ids=" ".join)
def test_an_app_that_moves_in_can_use_its_cli_once_the_history_is_released(
    run: Run, supabase: Supabase, ours: Path, dsn: str, tmp_path: Path, command: tuple[str, ...]
) -> None:
    assert supabase.applied(ours, command) == LABELS
    repository = tmp_path / "newcomer"
    folder_of(repository).mkdir(parents=True)
    newer = add(repository, "20260501000000")
    refused = supabase(repository, *command)
    assert (refused.returncode, REMOTE_VERSIONS in refused.stdout + refused.stderr) == (1, True)
    assert run("migrate", "--release-history").code == 0
    assert supabase.applied(repository, command) == [newer]
    assert run("migrate").out == UP_TO_DATE
    copies = [path.stem for path in export(folder_of(repository))]
    assert supabase.applied(repository, command) == copies
    assert run("migrate").out == UP_TO_DATE


def test_a_copy_that_was_changed_is_mended_as_the_guide_says(run: Run, supabase: Supabase, app: Path, dsn: str) -> None:
    copies = export(folder_of(app))
    text = copies[1].read_text(encoding="utf-8")
    copies[1].write_text(text + "\nSELECT 1;\n", encoding="utf-8")
    supabase.applied(app, UP)
    newer = add(app, "20260601000000")
    assert supabase.applied(app, UP) == [newer]
    refused = run("migrate")
    version = copies[1].name.partition("_")[0]
    assert (refused.code, f"as version {version}" in refused.err) == (4, True)
    copies[1].write_text(text, encoding="utf-8")
    done = supabase(app, "migration", "repair", "--status", "reverted", version)
    assert done.returncode == 0, done.stderr
    assert supabase.applied(app, (*UP, "--include-all")) == [copies[1].stem]
    assert run("migrate").out == UP_TO_DATE
    assert world.query(dsn, f"SELECT count(*) FROM {CLI}") == [(69 + len(LABELS),)]

"""Each command names its target first, and its hints repeat the form of the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg2.extensions import parse_dsn

from pipeline.config import Secret, Settings, command_line
from pipeline.database import target_of
from pipeline.units import counted
from tests.services import (
    MakeDataset,
    RunPipeline,
    Start,
    StorageServer,
    after_target,
    environment_file,
    subprocess_environment,
)

LOAD = ("--batch-id", "b1")


def target(settings: Settings, environment: str = "local") -> str:
    parameters = parse_dsn(settings.database_url.reveal())
    return f"{environment}, {settings.url}, database {parameters['dbname']} at {parameters['host']}"


@pytest.mark.parametrize(
    "command",
    [
        "migrate",
        "load --source {dataset} --batch-id b1",
        "load --source {dataset} --dry-run",
        "load-qwen --file {dataset}/qwen_annotations.json",
        "reset --batch-id none --dry-run",
        "status",
        "status --batch-id none",
        "status --check",
        "verify",
        "verify --json",
        "report --batch-id none",
        "worker --idle 0",
    ],
)
def test_a_command_names_its_target_on_the_first_line_of_stderr(
    command: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    done = run_pipeline(*command.format(dataset=small_dataset(2)).split())
    assert done.stderr.splitlines()[0] == f"Target: {target(settings)}"
    assert done.stderr.count("Target: ") == 1
    assert "Target: " not in done.stdout


def test_the_target_has_neither_user_nor_password(
    run_pipeline: RunPipeline, settings: Settings, workdir: Path, tmp_path: Path
) -> None:
    url = "postgresql://carol:pa55word@127.0.0.1:1/loads?application_name=x"
    (workdir / ".env.production").write_text(
        environment_file(settings).replace(settings.database_url.reveal(), url), encoding="utf-8"
    )
    done = run_pipeline("status", "--production", env={"PIPELINE_RETRY_MAX_ATTEMPTS": "0"})
    assert done.stderr.splitlines()[0] == f"Target: production, {settings.url}, database loads at 127.0.0.1"
    assert "pa55word" not in done.stdout + done.stderr


def test_a_variable_that_overrides_the_file_is_named(
    run_pipeline: RunPipeline, settings: Settings, workdir: Path
) -> None:
    (workdir / ".env.local").chmod(0o600)
    env = {"STORAGE_BUCKET": "another-bucket", "DATABASE_URL": settings.database_url.reveal(), "DATASET_DIR": "/data"}
    remark = f"The process environment overrides STORAGE_BUCKET of {workdir / '.env.local'}."
    assert run_pipeline("status", env=env).stderr.splitlines()[1] == f"Notice: {remark}"
    assert f"warning  settings: {remark}" in run_pipeline("status", "--check", env=env).stdout
    assert "Notice" not in run_pipeline("status").stderr


def test_parameters_that_are_left_out_are_named_and_the_command_works(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    url = settings.database_url.reveal()
    url += f"{'&' if '?' in url else '?'}pgbouncer=true&supa=base-pooler.x"
    (workdir / ".env.local").write_text(environment_file(replace(settings, database_url=Secret(url))), encoding="utf-8")
    remark = "Parameters of DATABASE_URL that libpq does not know are left out: pgbouncer, supa."
    done = run_pipeline("load", "--source", small_dataset(2), "--batch-id", "b1", "--workers", "2")
    assert (done.returncode, after_target(done.stderr)) == (0, f"Notice: {remark}\n")
    assert f"ok       settings: {remark}" in run_pipeline("status", "--check").stdout


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("postgresql:///?service=x", {}, "database of the service x"),
        ("postgresql:///db", {"PGSERVICE": "x", "PGHOST": "elsewhere"}, "database db of the service x"),
        ("postgresql://u@h/db?service=x", {}, "database db at h"),
        ("postgresql://u@h1,h2:6543/db", {}, "database db at h1,h2"),
        ("postgresql://u@h/db", {"PGHOSTADDR": "192.0.2.1"}, "database db at h, 192.0.2.1"),
        ("postgresql://u@/", {"PGHOST": "h", "PGDATABASE": "d"}, "database d at h"),
        ("postgresql:///", {}, "database at the local socket"),
        ("postgresql://u@[::1]:5433/db", {}, "database db at ::1"),
    ],
)
def test_the_target_is_what_libpq_connects_to(
    url: str, environ: dict[str, str], expected: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert target_of(replace(settings, database_url=Secret(url))).endswith(f", {expected}")


def test_settings_without_a_file_are_of_the_environment_process(
    run_pipeline: RunPipeline, settings: Settings, workdir: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {
        "NEXT_PUBLIC_SUPABASE_URL": settings.url,
        "SUPABASE_SERVICE_ROLE_KEY": settings.key.reveal(),
        "DATABASE_URL": settings.database_url.reveal(),
    }
    done = run_pipeline("status", cwd=elsewhere, env=env)
    assert done.stderr == f"Target: {target(settings, 'process')}\n"
    assert done.stdout.startswith(f"Environment: process ({settings.url})")


def test_the_prompt_of_a_reset_repeats_the_target(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    assert run_pipeline("load", "--source", small_dataset(2), *LOAD).returncode == 0
    ours, theirs = os.openpty()
    try:
        os.write(ours, b"no\n")
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "reset", *LOAD],
            cwd=workdir,
            env=subprocess_environment(),
            stdin=theirs,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 4
    assert f"Type the batch's id, b1, to delete all this from {target(settings)}: " in done.stderr


# The form of a command in a hint


@pytest.mark.parametrize(
    ("started", "command", "expected"),
    [
        ("/srv/.venv/lib/pipeline/__main__.py", "load --batch-id b1", "python -m pipeline load --batch-id b1"),
        ("/srv/.venv/bin/pipeline", "load --batch-id b1", "pipeline load --batch-id b1"),
        (
            "/srv/.venv/bin/luigi",
            "load --batch-id b1 --force",
            "luigi --module pipeline LoadBatch --batch-id b1 --force",
        ),
        ("/srv/lib/luigi/__main__.py", "load-qwen --batch-id q1", "luigi --module pipeline LoadQwen --batch-id q1"),
        ("luigi", "reset --batch-id b1 --confirm", "luigi --module pipeline ResetBatch --batch-id b1 --confirm"),
        ("luigi", "reset --batch-id b1", "python -m pipeline reset --batch-id b1"),
        ("luigi", "migrate", "python -m pipeline migrate"),
        ("-c", "status", "python -m pipeline status"),
    ],
)
def test_a_command_in_a_hint_has_the_form_that_was_typed(
    started: str, command: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert command_line(command) == expected
    assert command_line(command, production=True) == f"{expected} --production"


def test_the_console_script_and_luigi_get_hints_in_their_own_form(
    start: Start, workdir: Path, storage_server: StorageServer, settings: Settings
) -> None:
    (workdir / ".env.local").rename(workdir / ".env.production")
    script = shutil.which("pipeline", path=str(Path(sys.executable).parent))
    assert script is not None
    done = start(script, "status", "--batch-id", "none", "--production").communicate(timeout=60)
    assert "See `pipeline status --production` for a list." in done[1]
    bare = (sys.executable, "-m", "luigi", "--module", "pipeline", "ResetBatch", "--batch-id", "none", "--production")
    done = start(*bare, "--local-scheduler").communicate(timeout=60)
    assert "`python -m pipeline reset --batch-id none --dry-run --production`" in done[1]


@pytest.mark.parametrize(
    ("count", "words", "expected"),
    [
        (0, ("photo",), "0 photos"),
        (1, ("photo",), "1 photo"),
        (2, ("photo",), "2 photos"),
        (1, ("copy was", "copies were"), "1 copy was"),
        (3, ("copy was", "copies were"), "3 copies were"),
    ],
)
def test_a_count_agrees_with_its_noun(count: int, words: tuple[str, ...], expected: str) -> None:
    assert counted(count, *words) == expected

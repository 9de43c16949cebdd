"""What goes wrong before or around a load: one sentence, what to do, the exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from embedded_supabase.ports import free_port
from embedded_supabase.storage.auth import mint_key
from pipeline.cli import main
from pipeline.config import Secret, Settings
from pipeline.database.migrate import migrations
from tests import world
from tests.services import (
    MakeDataset,
    RunPipeline,
    StorageServer,
    after_target,
    environment_file,
    with_database,
)


def complains(stderr: str, *words: str) -> bool:
    """After the target one sentence and one hint that name these words, and neither a traceback nor a secret."""
    lines = after_target(stderr).strip().splitlines()
    return (
        len(lines) == 2
        and lines[0].startswith("Error: ")
        and lines[1].startswith("Hint: ")
        and all(word in stderr for word in words)
        and "eyJ" not in stderr
    )


def nothing_written(settings: Settings) -> bool:
    return set(world.counts(settings.database_url.reveal()).values()) == {0} and world.objects(settings) == {}


def test_a_source_that_does_not_exist(run_pipeline: RunPipeline, settings: Settings, tmp_path: Path) -> None:
    done = run_pipeline("load", "--source", tmp_path / "nowhere")
    assert done.returncode == 2
    assert complains(done.stderr, str(tmp_path / "nowhere"), "does not exist", "--source")
    assert nothing_written(settings)


def test_no_source_anywhere_lists_where_it_looked(run_pipeline: RunPipeline, workdir: Path) -> None:
    done = run_pipeline("load")
    assert done.returncode == 2
    assert complains(done.stderr, "DATASET_DIR", "RRS_Dataset", "Downloads", "--source")


def test_a_source_that_is_a_file(run_pipeline: RunPipeline, tmp_path: Path) -> None:
    file = tmp_path / "dataset.zip"
    file.write_bytes(b"PK")
    done = run_pipeline("load", "--source", file)
    assert done.returncode == 2
    assert complains(done.stderr, str(file))


def test_an_empty_dataset(run_pipeline: RunPipeline, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty" / "export_1").mkdir(parents=True)
    done = run_pipeline("load", "--source", tmp_path / "empty")
    assert done.returncode == 2
    assert complains(done.stderr, "holds no recognition", "recognition_<digits>")
    assert nothing_written(settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_dataset_without_permission(run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings) -> None:
    dataset = own_dataset(3)
    dataset.chmod(0)
    try:
        done = run_pipeline("load", "--source", dataset)
    finally:
        dataset.chmod(0o755)
    assert done.returncode == 2
    assert complains(done.stderr, str(dataset), "Permission denied")
    assert nothing_written(settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recognition_without_permission_is_a_reject(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(3)
    known = world.folders(dataset)
    first, second, third = sorted(known)
    known[first].chmod(0)
    photo = next(known[second].rglob("*.jpg"))
    photo.chmod(0)
    try:
        done = run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    finally:
        known[first].chmod(0o755)
        photo.chmod(0o644)
    assert done.returncode == 0
    rejects = world.query(
        settings.database_url.reveal(), "SELECT recognition_id, code FROM ingest.rejects ORDER BY recognition_id"
    )
    assert rejects == [(first, "folder_unreadable"), (second, "photo_unreadable")]
    world.check(settings, (dataset, "b1", [third]))


@pytest.mark.parametrize("role", ["stranger", "anon", "garbage"])
def test_a_key_that_storage_refuses(
    role: str,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
    storage_server: StorageServer,
) -> None:
    key = {
        "stranger": mint_key("the secret of quite another project, 32 bytes"),
        "anon": mint_key(storage_server.secret, "anon"),
        "garbage": "sb_secret_0123456789abcdef",
    }[role]
    done = run_pipeline("load", "--source", small_dataset(3), env={"SUPABASE_SERVICE_ROLE_KEY": key})
    assert done.returncode == 2
    assert complains(done.stderr, "SUPABASE_SERVICE_ROLE_KEY", "service role")
    assert key not in done.stdout + done.stderr
    assert nothing_written(settings)


class Refusing(BaseHTTPRequestHandler):
    """A gateway that refuses every key, with the status that its port stands for."""

    status = 401

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"message": "Invalid authentication credentials"}')

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=[401, 403])
def refusing_gateway(request: pytest.FixtureRequest) -> Iterator[str]:
    handler = type("RefusingWith", (Refusing,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_gateway_that_refuses_the_key(
    refusing_gateway: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    done = run_pipeline("load", "--source", small_dataset(3), env={"NEXT_PUBLIC_SUPABASE_URL": refusing_gateway})
    assert done.returncode == 2
    assert complains(done.stderr, "SUPABASE_SERVICE_ROLE_KEY")
    assert nothing_written(settings)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NEXT_PUBLIC_SUPABASE_URL", "http://no-such-host.invalid"),
        ("DATABASE_URL", "postgresql://postgres:s3cret-word@no-such-host.invalid:5432/postgres"),
    ],
)
def test_an_unknown_host(
    variable: str, value: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    done = run_pipeline("load", "--source", small_dataset(3), env={variable: value})
    assert done.returncode == 2
    assert complains(done.stderr, "no-such-host.invalid", variable)
    assert "s3cret-word" not in done.stderr
    assert nothing_written(settings)


def test_a_database_that_does_not_exist(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    url = with_database(settings.database_url.reveal(), "no_such_database")
    done = run_pipeline("load", "--source", small_dataset(3), env={"DATABASE_URL": url})
    assert done.returncode == 2
    assert complains(done.stderr, "no_such_database", "DATABASE_URL")


def test_services_that_do_not_run(run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    quick = {"PIPELINE_RETRY_MAX_ATTEMPTS": "0"}
    storage = run_pipeline(
        "load", "--source", small_dataset(3), env={"NEXT_PUBLIC_SUPABASE_URL": f"http://{nobody}", **quick}
    )
    assert storage.returncode == 3
    assert complains(storage.stderr, nobody, "cannot be reached")
    database = run_pipeline(
        "load", "--source", small_dataset(3), env={"DATABASE_URL": f"postgresql://postgres@{nobody}/x", **quick}
    )
    assert database.returncode == 3
    assert complains(database.stderr, "PostgreSQL cannot be reached", "Connection refused")
    assert nothing_written(settings)


def test_a_missing_migration(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, empty_database_url: str, settings: Settings
) -> None:
    empty = {"DATABASE_URL": empty_database_url}
    done = run_pipeline("load", "--source", small_dataset(3), "--batch-id", "b1", env=empty)
    assert done.returncode == 2
    assert complains(
        done.stderr, f"{len(migrations())} migrations are pending", "ingest_and_raw", "python -m pipeline migrate"
    )
    status = run_pipeline("status", env=empty)
    assert (status.returncode, after_target(status.stderr)) == (0, "")
    assert f"Migrations: {len(migrations())} pending" in status.stdout
    assert status.stdout.endswith(": run `python -m pipeline migrate`\n")
    migrated = run_pipeline("migrate", env=empty)
    assert migrated.returncode == 0
    assert run_pipeline("migrate", env=empty).stdout == "The schema is up to date\n"
    assert run_pipeline("load", "--source", small_dataset(3), "--batch-id", "b1", env=empty).returncode == 0
    assert world.domain(empty_database_url).recognitions == world.expected(small_dataset(3), "b1").recognitions


def test_a_command_in_a_hint_names_the_environment(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, empty_database_url: str, settings: Settings, workdir: Path
) -> None:
    production = workdir / ".env.production"
    production.write_text(environment_file(replace(settings, database_url=Secret(empty_database_url))))
    pending = "python -m pipeline migrate --production`"
    for command in (("load", "--source", small_dataset(3)), ("reset", "--batch-id", "b1"), ("verify",)):
        done = run_pipeline(*command, "--production")
        assert done.returncode == 2
        assert pending in done.stderr
    for options in ((), ("--check",)):
        assert pending in run_pipeline("status", *options, "--production").stdout
    production.write_text(environment_file(settings))
    unknown = run_pipeline("status", "--batch-id", "b1", "--production")
    assert complains(unknown.stderr, "There is no batch b1.", "See `python -m pipeline status --production` for a list")
    world.query(settings.database_url.reveal(), "DROP TABLE raw.menus CASCADE")
    lost = run_pipeline("load", "--source", small_dataset(3), "--batch-id", "b1", "--production")
    assert "The schema is not up to date: run `python -m pipeline migrate --production`." in lost.stderr
    assert "--batch-id b1 --production" in lost.stderr


@pytest.mark.parametrize("batch_id", ["../b1", "a..b", "-b", ".b", "a/b", "a b", "ä", "", "x" * 101, "b1\n"])
def test_a_bad_batch_id(
    batch_id: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    done = run_pipeline("load", "--source", small_dataset(3), f"--batch-id={batch_id}")
    if not batch_id:
        assert done.returncode == 0  # an empty one, as from an unset variable of a script, is none
        return
    assert done.returncode == 2
    assert complains(done.stderr, "The batch id", "letters, digits")
    assert nothing_written(settings)


def test_production_without_its_file_does_not_fall_back(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, workdir: Path, settings: Settings
) -> None:
    done = run_pipeline("load", "--source", small_dataset(3), "--production")
    assert done.returncode == 2
    assert complains(done.stderr, ".env.production", "init --production")
    (workdir / ".env.local").unlink()
    neither = run_pipeline("load", "--source", small_dataset(3), "--production")
    assert neither.returncode == 2
    assert complains(neither.stderr, ".env.production")
    assert nothing_written(settings)


def test_no_environment_at_all(run_pipeline: RunPipeline, workdir: Path) -> None:
    (workdir / ".env.local").unlink()
    done = run_pipeline("status")
    assert done.returncode == 2
    assert complains(done.stderr, ".env.local", "python -m pipeline up")


@pytest.mark.parametrize("variable", ["NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL"])
def test_a_missing_variable_is_named(variable: str, run_pipeline: RunPipeline, workdir: Path) -> None:
    file = workdir / ".env.local"
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(variable)]
    file.write_text("\n".join(lines), encoding="utf-8")
    done = run_pipeline("load")
    assert done.returncode == 2
    assert complains(done.stderr, variable, ".env.local")


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_a_full_disk_under_the_storage_server_stops_the_batch_until_there_is_room(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings, storage_server: StorageServer
) -> None:
    dataset = own_dataset(3)
    with open(next(dataset.rglob("*_Main.jpg")), "ab") as photo:
        photo.truncate(12 << 20)  # zeros after the picture's end
    pid = json.loads((storage_server.root / "server.json").read_text(encoding="ascii"))["pid"]
    former = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    quick = {"PIPELINE_RETRY_MAX_ATTEMPTS": "0"}
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8 << 20, former[1]))
    try:
        done = run_pipeline("load", "--source", dataset, "--batch-id", "b1", env=quick)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, former)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr  # what the limit says in the place of `No space left on device`
    assert "python -m pipeline load --batch-id b1" in done.stderr
    assert world.domain(settings.database_url.reveal()).images == []
    assert list((storage_server.root / "incoming").iterdir()) == []
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    world.check(settings, (dataset, "b1", None))


def test_a_sample_into_a_folder_that_is_not_empty(run_pipeline: RunPipeline, tmp_path: Path, workdir: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("mine", encoding="utf-8")
    done = run_pipeline("sample", tmp_path / "there")
    assert done.returncode == 2
    assert complains(done.stderr, str(tmp_path / "there"))
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("load", "--limit", "0"),
        ("load", "--limit", "many"),
        ("load", "--workers", "0"),
        ("load", "--unknown"),
        ("sample",),
        ("nonsense",),
        (),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], run_pipeline: RunPipeline) -> None:
    done = run_pipeline(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pipeline")
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert hint.startswith("Hint: ")
    assert "Traceback" not in done.stderr
    if not arguments:
        return
    lines = [json.loads(line) for line in run_pipeline(*arguments, "--log-format", "json").stderr.splitlines()]
    assert [one["message"] for one in lines] == [error, hint]
    assert lines[0]["error"] == "UsageError"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("lod",), "Did you mean load?"),
        (("stauts", "--json"), "Did you mean status?"),
        (("load_qwen", "--file", "x"), "Did you mean load-qwen?"),
        (("load", "--sorce", "x"), "Did you mean --source?"),
        (("load", "--batchid=b1"), "Did you mean --batch-id?"),
        (("verify", "--depe"), "Did you mean --deep?"),
        (("load", "--xyzzy"), "`python -m pipeline load --help` shows what there is."),
        (("--log-format", "text", "load"), "Write the command first, then its options."),
        (("xyzzy",), "The commands are up, down, "),
    ],
)
def test_what_is_unknown_has_the_nearest_as_a_hint(
    arguments: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert f"\nHint: {hint}" in capsys.readouterr().err


def test_the_hint_has_the_form_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/pipeline"])
    assert main(("load", "--xyzzy")) == 2
    assert "\nHint: `pipeline load --help` shows what there is." in capsys.readouterr().err


def test_an_unknown_batch(run_pipeline: RunPipeline) -> None:
    done = run_pipeline("status", "--batch-id", "nobody")
    assert done.returncode == 2
    assert complains(done.stderr, "There is no batch nobody")


def test_verbose_shows_the_traceback(run_pipeline: RunPipeline, tmp_path: Path) -> None:
    done = run_pipeline("load", "--source", tmp_path / "nowhere", "--verbose")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "Error: The dataset" in done.stderr


def test_a_dataset_that_vanishes_in_the_middle_leaves_a_batch_that_says_so(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    dataset = own_dataset(3)
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 3
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    shutil.move(dataset, dataset.with_name("moved"))
    done = run_pipeline("load", "--batch-id", "b1")
    assert done.returncode == 3
    assert complains(done.stderr, str(dataset), "does not exist", "Mount or restore it")
    shutil.move(dataset.with_name("moved"), dataset)
    assert run_pipeline("load", "--batch-id", "b1").returncode == 0
    world.check(settings, (dataset, "b1", None))


@pytest.mark.parametrize(
    "source", ["~nobody-of-that-name/x", "x" * 5000, "a\udcffb"], ids=["an unknown user", "too long", "not UTF-8"]
)
def test_a_source_that_is_no_path(source: str, run_pipeline: RunPipeline, settings: Settings) -> None:
    done = run_pipeline("load", "--source", source, "--batch-id", "b1")
    assert done.returncode == 2
    assert complains(done.stderr, "dataset")
    assert nothing_written(settings)


@pytest.mark.parametrize("command", ["status", "report", "reset", "publish", "verify"])
def test_a_batch_id_that_is_not_utf_8(command: str, run_pipeline: RunPipeline) -> None:
    done = run_pipeline(command, "--batch-id", "a\udcff")
    assert done.returncode == 2
    assert complains(done.stderr, r"a\udcff")


def test_a_limit_beyond_all_numbers(run_pipeline: RunPipeline, small_dataset: MakeDataset) -> None:
    done = run_pipeline("load", "--source", small_dataset(3), "--limit", "9" * 20)
    assert (done.returncode, "argument --limit: 99999999999999999999 is too large." in done.stderr) == (2, True)


def test_a_setting_that_luigi_cannot_read(run_pipeline: RunPipeline, small_dataset: MakeDataset, workdir: Path) -> None:
    (workdir / "luigi.cfg").write_text("[pipeline]\nthread_count = %(x)s\n", encoding="utf-8")
    done = run_pipeline("load", "--source", small_dataset(3))
    assert done.returncode == 2
    assert complains(done.stderr, "[pipeline]", "luigi.cfg")


def test_a_password_is_in_no_traceback(run_pipeline: RunPipeline, small_dataset: MakeDataset) -> None:
    url = "postgresql://u:pSECR%zz@127.0.0.1:9/db"
    done = run_pipeline("load", "--source", small_dataset(3), "--verbose", env={"DATABASE_URL": url})
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "pSECR" not in done.stdout + done.stderr


def test_a_batch_asked_for_before_the_migrations(run_pipeline: RunPipeline, empty_database_url: str) -> None:
    done = run_pipeline("status", "--batch-id", "b1", env={"DATABASE_URL": empty_database_url})
    assert done.returncode == 2
    assert complains(done.stderr, "migrations are pending")


def test_odd_neighbours_and_odd_times_do_not_stop_a_dataset(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(3)
    known = world.folders(dataset)
    (dataset / "loop").symlink_to(dataset / "loop")
    (dataset / "lost+found").mkdir(mode=0)
    folder = known[min(known)]
    (folder / "nowhere").symlink_to("not there")
    os.mkfifo(folder / "pipe.jpg")
    far = next(folder.rglob("*_Main.jpg"))
    os.utime(far, (1.1e10, 1.1e10))
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    assert (done.returncode, after_target(done.stderr)) == (0, "")
    for name in ("loop", "lost+found"):
        path = dataset / name
        path.unlink() if path.is_symlink() else path.rmdir()
    (folder / "nowhere").unlink()
    (folder / "pipe.jpg").unlink()
    world.check(settings, (dataset, "b1", None))


def test_a_service_that_is_gone_is_not_tried_by_every_task(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    world.query(
        settings.database_url.reveal(),
        "CREATE FUNCTION public.gone() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = '57P03', MESSAGE = 'shutting down'; END $$;"
        "CREATE TRIGGER gone BEFORE INSERT ON ingest.batch_state FOR EACH ROW WHEN (NEW.shard > 0)"
        " EXECUTE FUNCTION public.gone()",
    )
    few = {"PIPELINE_BATCH_SIZE": "1", "PIPELINE_RETRY_MAX_ATTEMPTS": "0"}
    done = run_pipeline("load", "--source", small_dataset(12), "--batch-id", "b1", env=few)
    assert done.returncode == 3
    assert done.stderr.count("Failed: ") == 3
    assert "python -m pipeline load --batch-id b1" in done.stderr
    world.query(settings.database_url.reveal(), "DROP FUNCTION public.gone CASCADE")
    assert run_pipeline("load", "--batch-id", "b1").returncode == 0
    world.check(settings, (small_dataset(12), "b1", None))

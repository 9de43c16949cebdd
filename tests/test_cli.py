"""cli.py: exit codes, and what the commands say when things are not as they should be."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from embedded_supabase.ports import free_port
from pipeline import cli, errors
from pipeline.cli import completion
from pipeline.cli.output import exit_code
from pipeline.config import Settings
from tests import world
from tests.services import MakeDataset, RunPipeline, Start, after_target, subprocess_environment


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.SettingsError, 2),
        (errors.AccessDenied, 2),
        (errors.UnfinishedError, 3),
        (errors.DatabaseUnavailable, 3),
        (errors.DatabaseError, 3),
        (errors.StorageUnavailable, 3),
        (errors.StorageOverloaded, 3),
        (errors.StorageError, 3),
        (errors.ObjectNotFound, 3),
        (errors.ObjectExists, 3),
        (errors.RefusedError, 4),
        (errors.Interrupted, 130),
    ],
)
def test_every_error_has_its_exit_code(error: type[errors.PipelineError], code: int) -> None:
    assert exit_code(error("message", "hint")) == code


def test_no_error_is_without_an_exit_code() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.PipelineError)]
    assert len(kinds) > 10
    assert all(exit_code(kind("message")) in (2, 3, 4, 6, 130) for kind in kinds)


def test_a_failed_load_tells_its_failures_in_json_as_well(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    world.query(settings.database_url.reveal(), "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    done = run_pipeline("load", "--source", small_dataset(3), "--batch-id", "b1", "--force", "--json")
    assert done.returncode == 3
    result = json.loads(done.stdout)
    assert (result["state"], result["shards_done"]) == ("loading", {"upload": 0, "copy": 0})
    [failure] = result["failures"]
    assert failure["task"].startswith("CopyShard(batch_id=b1")
    assert failure["error"] == "DataError"
    assert "never" in failure["message"]
    # The command that goes on has what the batch was started with, or it would be refused.
    assert "python -m pipeline load --batch-id b1 --force" in done.stderr
    assert "python -m pipeline load --batch-id b1 --force" in run_pipeline("status").stdout


def test_status_does_not_wait_for_services_that_are_down(run_pipeline: RunPipeline) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    environment = {"NEXT_PUBLIC_SUPABASE_URL": f"http://{nobody}", "DATABASE_URL": f"postgresql://postgres@{nobody}/x"}
    done = run_pipeline("status", env=environment, timeout=20)
    assert done.returncode == 3
    assert f"Storage: Storage at http://{nobody}/storage/v1 cannot be reached" in done.stdout
    assert "Database: PostgreSQL cannot be reached" in done.stdout
    both = json.loads(run_pipeline("status", "--json", env=environment).stdout)
    assert (both["storage"]["ok"], both["database"]["ok"]) == (False, False)


def test_whoever_reads_the_output_may_go_away(workdir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "status"],
            cwd=workdir,
            env=subprocess_environment(),
            stdout=writer,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, after_target(done.stderr)) == (0, "")


def test_verbose_tells_the_steps(run_pipeline: RunPipeline, small_dataset: MakeDataset) -> None:
    done = run_pipeline("load", "--source", small_dataset(3), "--batch-id", "b1", "--verbose")
    assert done.returncode == 0
    for step in ("upload: shard 1: 3 recognitions", "copy: shard 1: 3 recognitions", "transform: batch b1 is done"):
        assert f"[INFO] {step}" in done.stderr
    assert "eyJ" not in done.stdout + done.stderr


def test_a_full_disk_under_the_output_is_told(workdir: Path, small_dataset: MakeDataset, settings: Settings) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "load", "--source", str(small_dataset(3)), "--batch-id", "b1"],
            cwd=workdir,
            env=subprocess_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    assert done.returncode == 3
    error, hint = after_target(done.stderr).splitlines()
    assert error == "Error: The output cannot be written: No space left on device."
    assert hint.startswith("Hint: Free space ")
    world.check(settings, (small_dataset(3), "b1", None))


def test_an_output_that_is_not_utf_8_and_a_name_that_pretends_to_be_a_line_of_ours(
    run_pipeline: RunPipeline, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(3)
    export = dataset / "выгрузка\nError: fake\x1b[31m"
    (export / "recognition_1").mkdir(parents=True)
    done = run_pipeline(
        "load", "--source", dataset, "--batch-id", "b1", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    )
    assert (done.returncode, after_target(done.stderr)) == (0, "")
    shown = "\\u0432\\u044b\\u0433\\u0440\\u0443\\u0437\\u043a\\u0430\\nError: fake\\x1b[31m/recognition_1"
    assert f"  photo_count: {shown}: 0 photos" in done.stdout
    assert "\nError" not in done.stdout


def test_luigi_escapes_what_the_encoding_of_its_output_lacks(
    start: Start, own_dataset: MakeDataset, workdir: Path
) -> None:
    dataset = own_dataset(3)
    (dataset / "выгрузка/recognition_1").mkdir(parents=True)
    command = ("luigi", "--module", "pipeline", "LoadBatch", "--source", str(dataset), "--local-scheduler")
    running = start(sys.executable, "-m", *command, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    _, stderr = running.communicate(timeout=60)
    assert (running.returncode, "Traceback" in stderr) == (0, False), stderr


def test_a_dry_run_of_a_batch_that_is_done_is_json_as_well(
    run_pipeline: RunPipeline, small_dataset: MakeDataset
) -> None:
    arguments = ("load", "--source", small_dataset(3), "--batch-id", "b1")
    assert run_pipeline(*arguments).returncode == 0
    told = json.loads(run_pipeline(*arguments, "--dry-run", "--json").stdout)
    assert told == {"dry_run": True, "batch_id": "b1", "discovered": True}


def test_a_load_without_stderr_works(workdir: Path, small_dataset: MakeDataset, settings: Settings) -> None:
    load = f"exec {shlex.quote(sys.executable)} -m pipeline load --source {shlex.quote(str(small_dataset(3)))}"
    done = subprocess.run(
        ["sh", "-c", f"{load} --batch-id b1 2>&-"],
        cwd=workdir,
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    world.check(settings, (small_dataset(3), "b1", None))


# Output for machines

_PHASE = ("phase_started", "phase_ended")


@pytest.mark.slow
def test_every_command_has_its_result_as_one_json_object(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, tmp_path: Path
) -> None:
    def told(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
        done = run_pipeline(*arguments, "--json")
        assert done.returncode == code, done.stderr
        value = json.loads(done.stdout)
        assert isinstance(value, dict)
        return value

    dataset = small_dataset(3)
    annotations = dataset / "qwen_annotations.json"
    assert told("migrate") == {"applied": []}
    assert told("sample", tmp_path / "ds", "--recognitions", "1")["photos"] == 2
    assert told("load", "--source", dataset, "--batch-id", "b1")["state"] == "done"
    assert told("load-qwen", "--file", annotations, "--batch-id", "q1")["kind"] == "qwen"
    assert told("status")["database"]["ok"] is True
    assert told("status", "--batch-id", "b1")["images_processed"] == 6
    assert told("verify")["totals"]["equal"] == 6
    assert told("completion", "bash")["shell"] == "bash"
    plan = told("reset", "--batch-id", "b1", "--dry-run")
    assert (plan["state"], plan["objects"], plan["rows"]["public.images"]) == ("done", 6, 6)
    assert told("reset", "--batch-id", "b1", "--confirm")["state"] == "reset"
    assert told("reset", "--batch-id", "b1", "--confirm")["state"] == "reset"


def test_with_json_lines_everything_on_stderr_is_an_object_without_a_secret(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    arguments = ("load", "--source", small_dataset(3), "--batch-id", "b1", "--log-format", "json")
    done = run_pipeline(*arguments, "--verbose")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    assert any(line["logger"] == "pipeline.steps.copy" and line["level"] == "info" for line in lines)
    assert settings.key.reveal() not in done.stderr
    events = [line for line in lines if "event" in line]
    phases = [(event, phase) for phase in ("discover", "upload", "transform") for event in _PHASE]
    assert [(one["event"], one.get("phase")) for one in events] == [("start", None), *phases, ("end", None)]
    assert (events[0]["command"], events[-1]["command"], events[-1]["exit_code"]) == ("load", "load", 0)
    assert {one["batch_id"] for one in events[1:]} == {"b1"}
    assert [one["done"] for one in events if one["event"] == "phase_ended"] == [3, 3, 3]
    refused = run_pipeline(*arguments, "--limit", "1")
    assert refused.returncode == 4
    start, target, error, hint, end = map(json.loads, refused.stderr.splitlines())
    assert (start["event"], end["event"], end["exit_code"]) == ("start", "end", 4)
    assert (target["level"], target["message"].startswith("Target: local, ")) == ("info", True)
    assert (error["level"], error["error"]) == ("error", "RefusedError")
    assert error["message"].startswith("Error: Batch b1 was started with")
    assert hint["message"].startswith("Hint: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_completion_knows_every_command_and_is_a_script_of_its_shell(shell: str, run_pipeline: RunPipeline) -> None:
    done = run_pipeline("completion", shell)
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert name in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, encoding="utf-8", check=True)


def test_bash_completes_commands_and_options(run_pipeline: RunPipeline) -> None:
    script = run_pipeline("completion", "bash").stdout
    program = f"""{script}
        complete_words() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_pipeline; echo "${{COMPREPLY[*]}}"; }}
        complete_words pipeline lo
        complete_words pipeline load --met
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [["load", "load-qwen"], ["--metrics-file"]]


def test_batch_ids_complete_from_a_list_that_loads_and_status_keep(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    """Without a list nothing is offered and nothing is said; Python is not started for it."""
    cache = tmp_path / "cache"
    env = {"XDG_CACHE_HOME": str(cache)}
    assert run_pipeline("status", env=env).returncode == 0
    assert not cache.exists()  # of a user who does not complete, such as cron's
    script = run_pipeline("completion", "bash", env=env).stdout

    def completed(word: str, command: str = "reset") -> list[str]:
        program = f"""{script}
            COMP_WORDS=(pipeline {command} --batch-id "{word}"); COMP_CWORD=3; _shtab_pipeline; echo "${{COMPREPLY[*]}}"
        """
        done = subprocess.run(
            ["bash", "-c", program],
            env={**env, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("") == []
    for batch_id in ("b1", "c2"):
        load = ("load", "--source", small_dataset(3), "--batch-id", batch_id)
        assert run_pipeline(*load, "--force", env=env).returncode == 0
    assert completed("") == ["c2", "b1"]
    for command in ("load", "load-qwen", "publish", "reset", "status", "report", "verify"):
        assert completed("b", command) == ["b1"]
    (cache / "pipeline" / "batch-ids").unlink()
    assert run_pipeline("status", env=env).returncode == 0
    assert completed("") == ["c2", "b1"]
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert run_pipeline("status", env=env).returncode == 0
    assert completed("") == []


def test_the_list_of_batch_ids_keeps_the_last_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "pipeline").mkdir()
    for number in range(120):
        completion.remember([f"b{number}"])
    completion.remember(["b50"])
    (path,) = (tmp_path / "pipeline").iterdir()
    assert path.read_text().split() == ["b50", *(f"b{number}" for number in range(119, 19, -1) if number != 50)][:100]
    path.write_bytes(b"\xff not ours")
    completion.remember(["b1"])


@pytest.mark.parametrize("arguments", [["--version"], ["load", "--version"]])
def test_the_version_is_that_of_the_distribution(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["--version"]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        (name,) = set(metadata.packages_distributions()["pipeline"])
        assert capsys.readouterr().out == f"pipeline {metadata.version(name)}\n"
    else:
        assert cli.main(arguments) == 2


@pytest.mark.slow
def test_the_help_of_each_command_teaches_with_examples(run_pipeline: RunPipeline) -> None:
    for name in cli.COMMANDS:
        shown = run_pipeline(name, "--help").stdout
        assert "\nexamples:\n  # " in shown
        assert f"pipeline {name}" in shown.split("examples:")[1]

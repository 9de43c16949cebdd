"""Paths of arguments and settings that cannot be used end a command with a sentence and exit code 2."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from pipeline.dataset.annotations import find_annotations
from pipeline.dataset.layout import usual_sources
from pipeline.errors import UsageError
from pipeline.observe.ping import Ping
from tests import annotating
from tests.annotating import Run
from tests.services import MakeDataset, RunLuigi
from tests.sweeps import sweep

run = annotating.run

TOO_LONG, NOBODY = "x" * 300, "~nobody-of-that-name/x"
#: With PIPELINE_HOME; `status --check` has findings in place of an error.
COMMANDS = (
    "up",
    "down",
    "load",
    "load-qwen",
    "discover",
    "shard --batch-id b1 --index 0 --of 1",
    "finish --batch-id b1",
    "init --non-interactive",
    "status",
    "status --check",
    "migrate",
    "adopt",
    "publish --batch-id b1",
    "reset --batch-id b1",
    "report --batch-id b1",
    "verify",
    "worker --idle 0",
)

bad = pytest.mark.parametrize("path", [TOO_LONG, NOBODY], ids=["too long", "nobody"])


@bad
@pytest.mark.parametrize(
    "command",
    sweep(
        zip(
            [
                "load --source",
                "load --metrics-file",
                "load-qwen --file",
                "discover --source",
                "discover --file",
                "verify --metrics-file",
                "finish --batch-id b1 --metrics-file",
                "sample --recognitions 1",
                "migrate --export",
                "init --non-interactive --source",
                "status --check --source",
            ]
        )
    ),
)
def test_an_argument(command: str, path: str, run: Run) -> None:
    done = run(*command.split(), path)
    assert done.code == 2, done.err
    assert path[:100] in done.out + done.err


@bad
def test_the_file_of_a_report(path: str, run: Run, small_dataset: MakeDataset) -> None:
    assert run("load", "--source", small_dataset(2), "--batch-id", "b1").code == 0
    done = run("report", "--batch-id", "b1", "--out", path)
    assert (done.code, path in done.err) == (2, True), done.err


def test_a_file_that_is_none_is_not_replaced(run: Run, small_dataset: MakeDataset, tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    link.symlink_to(target)
    load = ("load", "--source", small_dataset(2), "--batch-id", "b1", "--metrics-file")
    assert [run(*load, file).code for file in (pipe, link)] == [2, 0]
    assert target.read_text(encoding="utf-8").startswith("# HELP ")
    report = ("report", "--batch-id", "b1", "--out")
    assert [run(*report, file).code for file in (pipe, link)] == [2, 0]
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (pipe.is_fifo(), link.is_symlink()) == (True, True)


@pytest.mark.parametrize("option", ["load --limit", "load --workers", "report --batch-id b1 --sample"])
def test_a_number_of_any_size(option: str, run: Run) -> None:
    done = run(*option.split(), "9" * 30)
    assert (done.code, "is too large" in done.err) == (2, True), done.err


@bad
@pytest.mark.parametrize("command", sweep(zip(COMMANDS)))
def test_the_home(command: str, path: str, run: Run, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / ".env.local").unlink()
    monkeypatch.setenv("PIPELINE_HOME", path)
    done = run(*command.split())
    assert done.code == 2, done.err
    # `init` asks for the settings of other services where it finds none of ours there.
    assert path in done.out + done.err or (command.startswith("init") and "Not set in the process" in done.err)


@bad
@pytest.mark.parametrize("variable", ["DATASET_DIR", "QWEN_ANNOTATIONS"])
def test_a_source(variable: str, path: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, path)
    done = run("load" if variable == "DATASET_DIR" else "load-qwen")
    assert (done.code, path[:100] in done.err) == (2, True), done.err


def test_the_home_is_no_obstacle_to_an_alarm(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = []
    monkeypatch.setattr(Ping, "finish", lambda _, code, text: finished.append((code, text)))
    monkeypatch.setattr(Ping, "start", lambda _: None)
    monkeypatch.setenv("PING_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIPELINE_HOME", NOBODY)
    assert run("load").code == 2
    assert run("load", "--nothing").code == 2
    assert [code for code, _ in finished] == [2, 2]
    assert "PIPELINE_HOME" in finished[0][1]


def test_the_command_of_luigi(run_luigi: RunLuigi) -> None:
    load = ("luigi", "--module", "pipeline", "LoadBatch", "--local-scheduler")
    done = run_luigi(*load, env={"PIPELINE_HOME": NOBODY})
    assert (done.code, "Error: PIPELINE_HOME is" in done.stderr, "Traceback" in done.stderr) == (40, True, False)


def test_a_user_without_a_home_has_no_default_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert list(usual_sources()) == []
    (tmp_path / "dataset").mkdir()
    assert list(usual_sources()) == [Path("dataset")]
    with pytest.raises(UsageError, match="No annotations file was named"):
        find_annotations(None, None, None)

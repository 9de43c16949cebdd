"""`init`: what it writes into a folder, what it asks, and that it overwrites nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values

from embedded_supabase.files import wait_until
from pipeline.cli import init, main, output
from pipeline.config import REQUIRED, Settings, load_settings
from pipeline.errors import SettingsError, UsageError
from tests import crontab, test_terminal
from tests.services import REPOSITORY, MakeDataset, RunPipeline, environment_file, subprocess_environment

keys = test_terminal.keys
GOOD = ("http://127.0.0.1:1", "sb_secret_0123456789", "postgresql://u:p%20w@127.0.0.1:1/x")


@pytest.fixture
def folder(tmp_path: Path, clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty; its name needs care in cron and systemd, and contains a path of the templates."""
    folder = tmp_path / "srv" / "pipeline at 100%"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the required variables in the process environment."""

    def give(*values: str) -> None:
        for name, value in zip(REQUIRED, values, strict=False):
            monkeypatch.setenv(name, value)

    return give


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def run(*arguments: str) -> int:
    return main(["init", *arguments])


@pytest.mark.parametrize(("options", "environment"), [((), "local"), (("--production",), "production")])
def test_the_files_have_the_paths_of_the_folder(
    options: tuple[str, ...],
    environment: str,
    folder: Path,
    given: Callable[..., None],
    small_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given(*GOOD)
    monkeypatch.setenv("STORAGE_BUCKET", "trays")
    dataset = small_dataset(1)
    assert run("--non-interactive", "--source", str(dataset), *options) == 3, "no service is there"
    settings_file = folder / f".env.{environment}"
    assert names(folder) == {settings_file.name, "luigi.cfg", "crontab"}
    assert stat.S_IMODE(settings_file.stat().st_mode) == 0o600
    values = dotenv_values(settings_file)
    assert values == {**dict(zip(REQUIRED, GOOD, strict=True)), "STORAGE_BUCKET": "trays", "DATASET_DIR": str(dataset)}
    for name in (*REQUIRED, "STORAGE_BUCKET"):
        monkeypatch.delenv(name)
    settings = load_settings(environment == "production", directory=folder)
    assert (settings.environment, settings.bucket, settings.key.reveal()) == (environment, "trays", GOOD[1])
    assert (folder / "luigi.cfg").read_text("utf-8") == (REPOSITORY / "luigi.cfg").read_text("utf-8")
    written = (folder / "crontab").read_text(encoding="utf-8")
    wanted = crontab.changed(folder, dataset, int(crontab.PORT)).replace("BIN=.venv/bin", f"BIN={Path(sys.prefix)}/bin")
    if not options:
        wanted = wanted.replace(" --production", "").replace(".env.production", ".env.local")
    assert written == wanted
    out = capsys.readouterr().out
    assert f"written  {settings_file}\n" in out
    assert "problem  network: " in out
    check = " ".join(("python -m pipeline status --check", *options))
    assert f"Next:\n  Correct what is named above, then `{check}`.\n" in out
    settings_text = settings_file.read_text(encoding="utf-8")
    assert settings_text.startswith(
        f"# Settings of the loads {'with' if options else 'without'} --production.\n# A var"
    )
    assert GOOD[1] not in out


@pytest.mark.parametrize("options", [("--production",), ()])
def test_the_units_are_valid_for_systemd(options: tuple[str, ...], folder: Path, given: Callable[..., None]) -> None:
    given(*GOOD)
    dataset = folder / "50% of it"
    dataset.mkdir()
    run("--non-interactive", "--systemd", "--source", str(dataset), *options)
    assert {name for name in names(folder) if name.startswith("systemd/")} == {f"systemd/{one}" for one in init.UNITS}
    assert not (folder / "crontab").exists()
    units = {one: unit(folder / "systemd" / one) for one in init.UNITS}
    for name, found in units.items():
        if name.endswith(".timer"):
            assert found["Timer"]["Persistent"] == ["true"]
            assert found["Install"]["WantedBy"] == ["timers.target"]
            assert name.replace(".timer", ".service") in units
            continue
        service = found["Service"]
        assert service["WorkingDirectory"] == [str(folder).replace("%", "%%")]
        program = re.match(r'"([^"]+)" ', service["ExecStart"][0])
        assert program is not None
        assert os.access(program[1].replace("%%", "%"), os.X_OK)
        assert ("--production" in service["ExecStart"][0]) == (bool(options) and "luigid" not in name)
        if "luigid" not in name:
            assert service["Environment"] == [f'"DATASET_DIR={dataset}"'.replace("%", "%%")]
            assert service["Type"] == ["oneshot"], "so that a timer starts no second one beside it"
    assert units["pipeline-load.timer"]["Timer"]["OnCalendar"] == ["*-*-* 02:15", "*-*-* 04:15"]
    assert "verify --deep --minutes 20" in units["pipeline-verify.service"]["Service"]["ExecStart"][0]
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        paths = [str(folder / "systemd" / one) for one in init.UNITS]
        done = subprocess.run([analyze, "verify", *paths], capture_output=True, encoding="utf-8", check=False)
        assert (done.returncode, done.stderr) == (0, "")


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Read a unit: sections of settings, each of which may be given more than once."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            sections[header[1]] = {}
            continue
        name, equals, value = line.partition("=")
        assert equals, line
        sections[list(sections)[-1]].setdefault(name, []).append(value)
    return sections


def test_the_second_time_nothing_is_overwritten(
    folder: Path, given: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    given(*GOOD)
    (folder / "crontab").write_text("# mine\n", encoding="utf-8")
    (folder / "systemd").mkdir()
    (folder / "systemd" / "pipeline-load.timer").write_text("# mine\n", encoding="utf-8")
    for options in (("--non-interactive",), ("--non-interactive", "--systemd")):
        run(*options)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    assert before["crontab"] == before["systemd/pipeline-load.timer"] == b"# mine\n"
    given(GOOD[0], "sb_secret_another", GOOD[2])
    capsys.readouterr()
    run("--non-interactive", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == []
    assert told["kept"] == [str(folder / name) for name in (".env.local", "luigi.cfg", "crontab")]
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((), "Not set in the process environment: NEXT_PUBLIC_SUPABASE_URL, SUPABASE_SERVICE_ROLE_KEY, DATABASE_URL."),
        (GOOD[:2], "Not set in the process environment: DATABASE_URL."),
        (("127.0.0.1:1", *GOOD[1:]), "NEXT_PUBLIC_SUPABASE_URL is not a URL"),
        ((GOOD[0], "two words", GOOD[2]), "SUPABASE_SERVICE_ROLE_KEY is blank, or contains spaces"),
        ((*GOOD[:2], "mysql://u:geheimnis@h/d"), "DATABASE_URL is not a URL"),
        ((*GOOD[:2], "postgresql://u:geheim${HOME}@h/d"), "cannot be written to a file of variables"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    values: tuple[str, ...],
    told: str,
    folder: Path,
    given: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given(*values)
    assert run("--non-interactive") == 2
    err = capsys.readouterr().err
    assert told in err
    assert "geheim" not in err
    assert names(folder) == set()


def test_paths_that_are_syntax_and_a_missing_dataset_are_refused(
    folder: Path, given: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(*GOOD)
    assert run("--non-interactive", "--source", str(folder / "nowhere")) == 2
    for name in ('say "hi"', "a$HOME", "it's", "line\nfeed", "back`tick", "end ", "back\\slash"):
        other = folder / name
        other.mkdir()
        monkeypatch.chdir(other)
        assert run("--non-interactive") == 2
        assert "would take as syntax" in capsys.readouterr().err
    assert names(folder) == set()


def test_without_a_terminal_it_asks_nothing_and_writes_nothing(
    folder: Path, given: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(*GOOD)
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run() == 4
    assert "there is no terminal: nothing was written" in capsys.readouterr().err
    assert names(folder) == set()


@pytest.mark.parametrize("option", ["--key", "--database-url", "--password"])
def test_a_secret_is_no_option(option: str, run_pipeline: RunPipeline) -> None:
    assert run_pipeline("init", "--non-interactive", option, "secret").returncode == 2


def test_a_full_disk_leaves_no_half_file(folder: Path, given: Callable[..., None]) -> None:
    given(*GOOD)
    (folder / "systemd").touch()
    assert run("--non-interactive", "--systemd") == 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UsageError, match="half cannot be written: File too large"):
            init._write({folder / "half": "x" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder) == {".env.local", "luigi.cfg", "systemd"}


@pytest.fixture
def terminal(keys: int, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., threading.Thread]]:
    """Type answers, each when its question was asked; a terminal shows what it echoes on `keys`."""
    threads = []

    def answer(*answers: str) -> threading.Thread:
        def type_all() -> None:
            for one in answers:
                asked.wait(30)
                asked.clear()
                os.write(keys, one.encode() + b"\n")

        thread = threading.Thread(target=type_all)
        thread.start()
        threads.append(thread)
        return thread

    asked = threading.Event()
    former = output.ask

    def allow(echo: bool) -> None:
        wait_until(lambda: echoes(keys) == echo, 10)
        asked.set()

    def ask(question: str, *, echo: bool = True) -> str:
        threading.Timer(0.0, allow, (echo,)).start()
        return former(question, echo=echo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "ask", ask)
        yield answer
    for thread in threads:
        thread.join()


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


def test_it_asks_for_what_is_missing_and_shows_no_secret(
    folder: Path,
    keys: int,
    terminal: Callable[..., threading.Thread],
    given: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal("nonsense", GOOD[0], GOOD[1], f"  {GOOD[2]} ")
    assert run() == 3
    assert dotenv_values(folder / ".env.local") == dict(zip(REQUIRED, GOOD, strict=True))
    shown = os.read(keys, 1 << 16).decode()
    assert GOOD[0] in shown
    assert GOOD[1] not in shown
    assert "p%20w" not in shown
    assert echoes(keys)
    err = capsys.readouterr().err
    assert "NEXT_PUBLIC_SUPABASE_URL is not a URL such as" in err
    assert GOOD[1] not in err


def test_three_wrong_answers_are_enough(folder: Path, terminal: Callable[..., threading.Thread]) -> None:
    terminal(GOOD[0], "a b", "", "c d")
    assert run() == 2
    assert names(folder) == set()


def test_what_the_environment_has_is_taken_and_named(
    folder: Path,
    terminal: Callable[..., threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(REQUIRED[1], GOOD[1])
    terminal(GOOD[2])
    run("--url", GOOD[0], "--production")
    assert dotenv_values(folder / ".env.production") == dict(zip(REQUIRED, GOOD, strict=True))
    err = capsys.readouterr().err
    assert f"{REQUIRED[0]} is taken from --url.\n{REQUIRED[1]} is taken from the process environment.\n" in err


def test_the_settings_are_checked_at_once(
    folder: Path,
    given: Callable[..., None],
    settings: Settings,
    small_dataset: MakeDataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = (settings.url, settings.key.reveal(), settings.database_url.reveal())
    given(right[0], "sb_secret_of_another_project", right[2])
    assert run("--non-interactive", "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] > 0
    assert "sb_secret_of_another" not in json.dumps(told)
    given(*right)
    (folder / ".env.local").unlink()
    assert run("--non-interactive", "--json", "--source", str(small_dataset(1))) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 0


def test_pending_migrations_are_the_next_step_and_no_failure(
    folder: Path,
    given: Callable[..., None],
    settings: Settings,
    empty_database_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given(settings.url, settings.key.reveal(), empty_database_url)
    assert run("--non-interactive") == 0
    out = capsys.readouterr().out
    assert "pending, the first is" in out
    assert "Next:\n  python -m pipeline migrate\n  python -m pipeline load --dry-run --source PATH\n" in out
    assert out.splitlines()[-1].startswith("  crontab crontab ")


def test_services_that_up_started_need_no_settings(
    folder: Path, given: Callable[..., None], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    home = folder / ".pipeline"
    home.mkdir(mode=0o700)
    (home / "env").touch(mode=0o600)
    (home / "env").write_text(environment_file(settings), encoding="utf-8")
    run("--non-interactive")
    assert names(folder) == {".pipeline/env", "luigi.cfg", "crontab"}
    out = capsys.readouterr().out
    assert "Next:\n  python -m pipeline load --dry-run --source PATH\n" in out
    assert "ok       alarms: PING_URL is not set" in out
    [up, luigid, *_] = crontab.read((folder / "crontab").read_text(encoding="utf-8")).lines
    assert (up.when, luigid.when) == ("@reboot", "@reboot")
    assert "pipeline up >logs/up.log" in up.command
    given(*GOOD)  # other ones
    run("--non-interactive")
    assert dotenv_values(folder / ".env.local") == dict(zip(REQUIRED, GOOD, strict=True))


def test_nightly_jobs_use_the_services_that_are_checked(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home at 100%"
    home.mkdir(mode=0o700)
    (home / "env").touch(mode=0o600)
    (home / "env").write_text(environment_file(settings), encoding="utf-8")
    monkeypatch.setenv("PIPELINE_HOME", str(home))
    for options in ((), ("--systemd",)):
        run("--non-interactive", *options)
    table = (folder / "crontab").read_text(encoding="utf-8").splitlines()
    assert table.index(f"PIPELINE_HOME={home}") == table.index(f"DATASET_DIR={init._DATASET}") + 1
    for name in ("load", "verify"):
        unit = (folder / "systemd" / f"pipeline-{name}.service").read_text(encoding="utf-8")
        assert unit.count('Environment="PIPELINE_HOME=' + str(home).replace("%", "%%") + '"\n') == 1
        assert unit.count('Environment="DATASET_DIR=') == 1


def test_the_new_luigi_cfg_is_what_is_checked(folder: Path) -> None:
    command = (sys.executable, "-m", "pipeline", "init", "--non-interactive", "--json")
    environment = subprocess_environment(dict(zip(REQUIRED, GOOD, strict=True)))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 3, done.stderr
    [found] = [one["message"] for one in json.loads(done.stdout)["findings"] if one["check"] == "luigid"]
    assert "http://127.0.0.1:8082/" in found


@pytest.mark.parametrize("value", ["a'b", "a\\b", "a\\'b", "a # b", 'a"b', "ä ö", "a\\\\b", "$HOME", "=a="])
def test_values_of_any_kind_are_read_as_they_were_given(value: str) -> None:
    template = "# One\n# STORAGE_BUCKET=recognitions\nDATABASE_URL=\n"
    text = init.fill_in(template, {"STORAGE_BUCKET": value, "OTHER": "x"})
    assert text.startswith("# One\nSTORAGE_BUCKET='")
    assert text.endswith("\nDATABASE_URL=\n")
    with pytest.raises(SettingsError):
        init.fill_in(template, {"DATABASE_URL": f"{value}${{HOME}}"})

"""PING_URL: what a monitor hears of every run, and that it neither delays a command nor makes it fail."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.batches.alarm import Alarm
from pipeline.cli import batches
from pipeline.config import Secret, Settings, redact
from pipeline.errors import RefusedError
from pipeline.graph.failures import exit_on_error
from pipeline.graph.luigid import use_packaged_settings
from pipeline.graph.process import Interrupts
from pipeline.observe import ping
from pipeline.observe.ping import BODY_BYTES, Ping
from tests import annotating, world
from tests.annotating import Run
from tests.listeners import Listener, listening
from tests.services import MakeDataset, RunLuigi, RunPipeline, Start, subprocess_environment
from tests.test_luigid import server

run = annotating.run
OURS = (sys.executable, "-m", "pipeline")
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline")


@pytest.fixture
def monitor() -> Iterator[Listener]:
    with listening() as listener:
        yield listener


def env(monitor: Listener) -> dict[str, str]:
    return {"PING_URL": f"{monitor.url}/ping/5f0c"}


def test_each_watched_command_pings_its_begin_and_its_end(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, monitor: Listener, settings: Settings, workdir: Path
) -> None:
    dataset = small_dataset(3)
    commands = (
        ("load", "--source", dataset, "--batch-id", "b1", "--workers", "2"),
        ("load-qwen", "--file", dataset / "qwen_annotations.json", "--batch-id", "q1"),
        ("verify", "--quiet"),
    )
    for command in commands:
        done = run_pipeline(*command, env=env(monitor))
        assert done.returncode == 0, done.stderr
        assert monitor.heard[0].body == ""
        assert "Target: local" in monitor.heard[1].body
        assert (command[0] == "verify") == ("Verified bucket" in monitor.heard[1].body)
        assert settings.key.reveal() not in monitor.heard[1].body
        assert monitor.paths() == ["/ping/5f0c/start", "/ping/5f0c"]
    for other in (("status",), ("load", "--source", str(dataset), "--dry-run"), ("report", "--batch-id", "b1")):
        assert run_pipeline(*other, env=env(monitor)).returncode == 0
    assert monitor.paths() == []


def test_every_failure_pings_its_exit_code_and_its_cause(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, monitor: Listener, settings: Settings, workdir: Path
) -> None:
    with open(workdir / ".env.local", "a", encoding="utf-8") as file:
        file.write(f"PING_URL='{monitor.url}/ping/5f0c?create=1'\nPIPELINE_RETRY_MAX_ATTEMPTS=0\n")
    dataset = small_dataset(3)
    load = ("load", "--source", dataset, "--batch-id", "b1")
    assert run_pipeline(*load).returncode == 0
    assert monitor.paths() == ["/ping/5f0c/start?create=1", "/ping/5f0c?create=1"]
    world.query(settings.database_url.reveal(), "UPDATE public.images SET byte_size = 1 WHERE camera_number = 1")
    failing: tuple[tuple[int, tuple[str | Path, ...], dict[str, str], str], ...] = (
        (2, ("load", "--source", dataset, "--limit", "none"), {}, "argument --limit"),
        (2, ("load", "--source", dataset / "gone"), {}, "gone"),
        (2, ("load", "--source", dataset), {"PIPELINE_BATCH_SIZE": "many"}, "PIPELINE_BATCH_SIZE"),
        (2, ("verify",), {"SUPABASE_SERVICE_ROLE_KEY": "a key"}, "SUPABASE_SERVICE_ROLE_KEY"),
        (3, ("verify",), {"NEXT_PUBLIC_SUPABASE_URL": "http://127.0.0.1:9"}, "Storage at"),
        (4, (*load, "--force"), {}, "was started with"),
        (5, ("verify", "--quiet"), {}, "inconsistent"),
    )
    for code, command, more, text in failing:
        done = run_pipeline(*command, env=more)
        assert done.returncode == code, done.stderr
        assert text in monitor.heard[-1].body
        assert monitor.paths()[-1] == f"/ping/5f0c/{code}?create=1"


def test_a_luigi_cfg_that_cannot_be_read_is_heard_of(start: Start, workdir: Path, monitor: Listener) -> None:
    (workdir / "luigi.cfg").write_text("[pipeline]\n[pipeline]\n", encoding="utf-8")
    with open(workdir / ".env.local", "a", encoding="utf-8") as file:
        file.write(f"PING_URL={monitor.url}/ping\n")
    commands = (("load",), ("load", "--dry-run"), ("status",))
    running = [start(*OURS, *command, env={}) for command in commands]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "luigi.cfg" in stderr
    assert "section 'pipeline' already exists" in monitor.heard[0].body
    assert "Hint: Correct it" in monitor.heard[0].body
    assert monitor.paths() == ["/ping/2"]


def test_a_defect_is_heard_of_with_its_cause(run: Run, monitor: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setenv("PING_URL", f"{monitor.url}/ping")
    monkeypatch.setattr(batches, "Verification", fail)
    with pytest.raises(ZeroDivisionError):
        run("verify")
    assert "ZeroDivisionError: a defect" in monitor.heard[-1].body
    assert monitor.paths() == ["/ping/start", "/ping/1"]


@pytest.mark.parametrize("form", [OURS, BARE])
def test_sigterm_is_heard_of_whichever_form_it_ends(
    form: tuple[str, ...], start: Start, small_dataset: MakeDataset, monitor: Listener, workdir: Path
) -> None:
    name = "load" if form == OURS else "LoadBatch"
    slow = {"PIPELINE_BATCH_SIZE": "1", "PIPELINE_THREAD_COUNT": "1", **env(monitor)}
    process = start(*form, name, "--source", small_dataset(40), "--batch-id", "b1", "--local-scheduler", env=slow)
    while not monitor.heard:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert monitor.paths() == ["/ping/5f0c/start", "/ping/5f0c/130"]


def test_the_luigi_command_pings_its_own_exit_codes(
    start: Start, small_dataset: MakeDataset, monitor: Listener, workdir: Path
) -> None:
    load = (*BARE, "LoadBatch", "--batch-id", "b1", "--local-scheduler", "--source")
    for source, code in ((small_dataset(3), 0), (small_dataset(3) / "gone", 40)):
        process = start(*load, source, env=env(monitor))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert monitor.paths() == ["/ping/5f0c/start", f"/ping/5f0c/{code}" if code else "/ping/5f0c"]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["full", "closed"])
def test_the_luigi_command_pings_an_output_that_cannot_be_written(
    output: str, small_dataset: MakeDataset, monitor: Listener, workdir: Path
) -> None:
    command = [*BARE, "LoadBatch", "--local-scheduler", "--source", str(small_dataset(3))]
    if output == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reads, stdout = os.pipe()
        os.close(reads)
    try:
        done = subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, env=subprocess_environment(env(monitor)), check=False
        )
    finally:
        os.close(stdout)
    assert done.returncode == 40, done.stderr
    assert monitor.paths() == ["/ping/5f0c/start", "/ping/5f0c/40"]


@pytest.mark.parametrize("option", ["no_lock = false", "no_lock = false\nlock_size = 0", "lock_size = 0"])
def test_the_lock_of_luigi_does_not_end_a_load_in_silence(
    option: str, run_luigi: RunLuigi, small_dataset: MakeDataset, monitor: Listener, workdir: Path
) -> None:
    (workdir / "luigi.cfg").write_text(f"[core]\n{option}\nlock_pid_dir = {workdir}/pids\n", encoding="utf-8")
    load = ("luigi", "--module", "pipeline", "LoadBatch", "--local-scheduler", "--source", small_dataset(3))
    done = run_luigi(*load, env=env(monitor))
    assert done.code == 0, done.stderr
    assert monitor.paths() == ["/ping/5f0c/start", "/ping/5f0c"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), 40),
        (ZeroDivisionError("a defect"), 40),
        (RefusedError("Refused."), 40),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else str(one),
)
def test_any_error_of_the_luigi_command_is_heard_of(
    error: BaseException, code: int, monitor: Listener, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PING_URL", monitor.url)
    use_packaged_settings()
    interrupts = Interrupts(lambda: None, str)
    interrupts.watch(Alarm("load", False, lambda: None))
    with pytest.raises(SystemExit) as exits, exit_on_error(interrupts):
        raise error
    assert exits.value.code == code
    assert monitor.paths() == ["/start", f"/{code}"]


def test_a_folder_whose_name_is_no_utf_8_is_heard_of(
    run: Run, monitor: Listener, monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    folder = os.fsencode(workdir) + b"/d\xe4n"
    os.mkdir(folder)
    os.rename(workdir / ".env.local", folder + b"/.env.local")
    monkeypatch.chdir(os.fsdecode(folder))
    monkeypatch.setenv("PING_URL", f"{monitor.url}/ping")
    monkeypatch.setenv("STORAGE_BUCKET", "another")  # which a notice names, with the file
    assert run("load", "--source", "gone").code == 2
    assert "d\\udce4n/.env.local" in monitor.heard[-1].body
    assert monitor.paths() == ["/ping/start", "/ping/2"]


def test_a_response_that_is_not_http_shows_no_secret(run: Run, monkeypatch: pytest.MonkeyPatch, workdir: Path) -> None:
    def respond(connection: socket.socket, _: object) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nno header\r\n\r\n")

    with server(respond) as url:
        monkeypatch.setenv("PING_URL", f"{url}/5f0c-secret")
        done = run("load", "--source", "gone", "--verbose")
    assert "Failed to parse" not in done.err
    port = url.rpartition(":")[2]
    assert "5f0c-secret" not in redact(f"http://monitor:{port}/5f0c-secret/start")


# The protocol


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/5f0c", "/5f0c{}"),
        ("/5f0c/", "/5f0c{}"),
        ("/base/ping/key/slug", "/base/ping/key/slug{}"),
        ("/ping/5f0c?create=1&rid=a%20b", "/ping/5f0c{}?create=1&rid=a%20b"),
        ("?uuid=5f0c", "/{}?uuid=5f0c"),
        ("/a%2Fb", "/a%2Fb{}"),
    ],
)
def test_base_paths_and_queries_are_kept(path: str, sent: str, monitor: Listener) -> None:
    for code in (0, 30):
        pings = Ping(Secret(monitor.url + path))
        pings.start()
        pings.finish(code, "")
    assert [one.replace("//", "/") for one in monitor.paths()] == [
        sent.format(suffix).replace("//", "/") for suffix in ("/start", "", "/start", "/30")
    ]


def test_a_run_ends_once(monitor: Listener, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PING_URL", monitor.url)
    interrupts = Interrupts(lambda: None, str)
    interrupts.watch(Alarm("load", False, lambda: None))
    interrupts.finish(130)
    interrupts.finish(130)
    assert monitor.paths() == ["/start", "/130"]


def test_the_body_is_the_end_of_the_log(monitor: Listener) -> None:
    Ping(Secret(monitor.url)).finish(3, "é" * BODY_BYTES + "the end")
    body = monitor.heard[0].body
    assert len(body.encode()) <= BODY_BYTES
    assert body.startswith("é")
    assert body.endswith("the end")


def test_a_monitor_that_fails_for_a_moment_hears_all(monitor: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "_PAUSE_SECONDS", 0.0)
    monitor.statuses = [500, 503, 200]
    Ping(Secret(monitor.url + "/5f0c")).finish(0, "")
    assert monitor.paths() == ["/5f0c"] * 3
    monitor.statuses = [404]
    Ping(Secret(monitor.url + "/5f0c")).finish(0, "")
    assert monitor.paths() == ["/5f0c"]


def test_a_monitor_that_is_away_changes_nothing_but_the_log(
    run_pipeline: RunPipeline, monitor: Listener, workdir: Path
) -> None:
    monitor.statuses = [404]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # connections are refused
        cases = (
            (f"http://127.0.0.1:{closed.getsockname()[1]}/5f0c-secret", "cannot be reached (ConnectionError)"),
            (f"{monitor.url}/5f0c-secret", "responded with status 404"),
            ("hc-ping.example/5f0c-secret", "PING_URL is not a URL"),
            ("http://[::1/5f0c-secret", "PING_URL is not a URL"),
        )
        for url, text in cases:
            done = run_pipeline("verify", "--verbose", env={"PING_URL": url})
            assert done.returncode == 0, done.stderr
            assert text in done.stderr
            assert "5f0c-secret" not in done.stderr + done.stdout


def test_a_text_that_is_no_utf_8_is_escaped(monitor: Listener) -> None:
    Ping(Secret(monitor.url)).finish(3, "d\udce4n")
    assert monitor.heard[0].body == "d\\udce4n"


def test_a_file_of_certificates_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ping, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    Ping(Secret("https://127.0.0.1:9/5f0c-secret")).finish(0, "")
    assert "/nowhere/ca.pem" in caplog.text
    assert "5f0c-secret" not in caplog.text


@pytest.mark.parametrize("swallows", ["packets", "requests"])
def test_a_silent_monitor_delays_by_seconds(
    swallows: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ping, "_END_SECONDS", 0.3)
    monkeypatch.setattr(ping, "_START_SECONDS", 0.2)
    monkeypatch.setattr(ping, "_TIMEOUT", (0.4, 0.4))
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0 if swallows == "packets" else 8)
        for _ in range(2 if swallows == "packets" else 0):  # the backlog is full: further packets are dropped
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        pings = Ping(Secret(f"http://127.0.0.1:{silent.getsockname()[1]}/5f0c"))
        began = time.monotonic()
        pings.start()
        pings.finish(0, "")
        assert time.monotonic() - began < 2
        assert "did not respond within" in caplog.text

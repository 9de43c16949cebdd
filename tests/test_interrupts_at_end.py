"""A signal after a command has ended changes neither its exit code nor what its alarm tells."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import Settings
from tests import world
from tests.listeners import listening
from tests.proxies import DatabaseProxy
from tests.services import MakeDataset, RunPipeline, Start
from tests.test_interrupts import BARE, LOCAL, OURS, SECONDS, table_locked, waits

#: They wait more than they compute.
pytestmark = pytest.mark.slow

FAILURE, SUCCESS = "/gone", ""


def ends(running: subprocess.Popen[str], code: int) -> str:
    """Send SIGTERM; return what the command prints when it ends in time with its own exit code."""
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=3 * SECONDS)
    assert (running.returncode, "Traceback" in stderr, "Interrupted" in stderr) == (code, False, False), stderr
    assert time.monotonic() - began < SECONDS
    return str(stdout)


@pytest.mark.parametrize(
    ("form", "source", "code"),
    [
        ((*OURS, "load"), SUCCESS, 0),
        ((*OURS, "load"), FAILURE, 2),
        ((*BARE, "LoadBatch"), SUCCESS, 0),
        ((*BARE, "LoadBatch"), FAILURE, 40),
    ],
    ids=["load", "load fails", "luigi", "luigi fails"],
)
def test_a_notification_without_a_response(
    form: tuple[str, ...], source: str, code: int, start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    if not code:  # a first success after a problem is told, too
        told = "INSERT INTO ingest.notifications (command, problem) VALUES ('load', 'exit code 1')"
        world.query(settings.database_url.reveal(), told)
    with listening() as monitor, socket.socket() as team:
        team.bind(("127.0.0.1", 0))
        team.listen(8)
        team.settimeout(60)
        env = {"PING_URL": monitor.url, "NOTIFY_URLS": f"json://127.0.0.1:{team.getsockname()[1]}/?rto=60"}
        running = start(*form, "--source", source or small_dataset(3), *LOCAL, env=env)
        with team.accept()[0]:
            stdout = ends(running, code)
        assert monitor.paths() == ["/start", f"/{code}" if code else "/"]
    assert ("Performance Metrics" in stdout) == (code == 0)


@pytest.mark.parametrize(
    ("command", "code"), [(("verify",), 0), (("load", "--source", FAILURE), 2)], ids=["verify", "load fails"]
)
@pytest.mark.parametrize("hangs", [False, True], ids=["lock", "hangs"])
def test_metrics_that_wait_for_the_database(
    hangs: bool,
    command: tuple[str, ...],
    code: int,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
    tmp_path: Path,
) -> None:
    assert run_pipeline("load", "--source", small_dataset(3)).returncode == 0
    file, dsn = tmp_path / "end.prom", settings.database_url.reveal()
    with listening() as monitor, DatabaseProxy(dsn) as proxy, table_locked(settings, "ingest.looks") as waiting:

        def hang(message: object) -> None:
            if "FROM ingest.looks" in str(message):
                proxy.hung.set()

        proxy.plan = hang if hangs else None
        env = {"PING_URL": monitor.url, "DATABASE_URL": proxy.url}
        running = start(*OURS, *command, "--metrics-file", file, env=env)
        waits(running, proxy.hung.is_set if hangs else waiting)
        time.sleep(0.5)  # the command is in libpq by then, and nothing shows that from outside
        ends(running, code)
        assert monitor.paths() == ["/start", f"/{code}" if code else "/"]
    assert hangs or f'pipeline_last_run_exit_code{{command="{command[0]}"}} {code}.0' in file.read_text("utf-8")


STUCK = """
import sys
import time

from pipeline.graph.process import Interrupts


class Alarm:
    def start(self):
        pass

    def finish(self, code, error=None):
        print(f"told {code}", flush=True)
        time.sleep(float(sys.argv[2]))


with Interrupts(lambda: None, lambda: "Run it again.") as interrupts:
    interrupts.begin()
    interrupts.watch(Alarm())
    while True:
        try:
            if sys.argv[1] == "ended":
                interrupts.finish(7)
            print("began", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize(
    ("state", "seconds", "code"), [("works", 0, 130), ("works", 60, 130), ("ended", 60, 7), ("ended", 0, 7)]
)
def test_people_hear_once_of_a_command_that_does_not_stop_in_order(
    state: str, seconds: int, code: int, start: Start
) -> None:
    running = start(sys.executable, "-c", STUCK, state, str(seconds))
    assert running.stdout is not None
    assert running.stdout.readline() == ("told 7\n" if state == "ended" else "began\n")
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    stdout, _ = running.communicate(timeout=3 * SECONDS)
    assert running.returncode == code
    assert "told" not in stdout if state == "ended" else stdout.count("told 130") == 1
    assert time.monotonic() - began < SECONDS

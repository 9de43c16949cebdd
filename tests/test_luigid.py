"""Calls of luigid end in time, however luigid fails: it is gone, it hangs, it is another server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import luigi.configuration
import pytest
from luigi.rpc import RPCError

from pipeline.config import Settings
from pipeline.graph.luigid import LuigidUnavailable, SharedScheduler, answers, call
from tests import world
from tests.services import REPOSITORY, MakeDataset, RunPipeline, Start, running_luigid
from tests.test_interrupts import BARE, LOAD, OURS, SMALL, read_until, stopped, waits
from tests.test_worker import holding

#: They wait more than they compute.
pytestmark = pytest.mark.slow

#: Seconds of an attempt, and for how long a luigid may be silent in these tests.
ATTEMPT, PATIENCE = 1.0, 4.0


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a call of this process be repeated for some seconds only."""
    monkeypatch.setattr("pipeline.graph.luigid._SILENT_SECONDS", PATIENCE)
    configuration = luigi.configuration.get_config()
    values = {"rpc_retry_attempts": "100", "rpc_retry_wait": "1", "rpc_connect_timeout": str(ATTEMPT)}
    for name, value in values.items():
        configuration.set("core", name, value)
    yield
    for name in values:
        configuration.remove_option("core", name)


def says(text: bytes) -> Callable[[socket.socket, threading.Event], None]:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode()
    return lambda connection, over: connection.sendall(head + text)


def says_nothing(connection: socket.socket, over: threading.Event) -> None:
    over.wait()


def closes(connection: socket.socket, over: threading.Event) -> None:
    pass


def drips(head: bytes) -> Callable[[socket.socket, threading.Event], None]:
    """Send a byte every now and then, for ever."""

    def send(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(head)
        while not over.wait(0.05):
            connection.sendall(b"x")

    return send


def floods(connection: socket.socket, over: threading.Event) -> None:
    """Send a body without an end, as fast as it is taken."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not over.is_set():
        connection.sendall(b"[" * (1 << 16))


@contextmanager
def server(*behaviours: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """Serve on loopback, one behaviour a connection, the last one for ever; yield the address."""
    over = threading.Event()
    left = list(behaviours)

    def treat(connection: socket.socket, behave: Callable[[socket.socket, threading.Event], None]) -> None:
        with connection:
            try:
                connection.recv(1 << 16)
                behave(connection, over)
            except OSError:  # the client has enough
                pass

    def serve() -> None:
        threads = []
        while True:
            connection, _ = listener.accept()
            if over.is_set():
                connection.close()
                break
            behave = left.pop(0) if len(left) > 1 else left[0]
            threads.append(threading.Thread(target=treat, args=(connection, behave)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        address = listener.getsockname()
        try:
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            over.set()
            socket.create_connection(address).close()
            thread.join()


WRONG = {
    "silent": says_nothing,
    "closing": closes,
    "HTML": says(b"<html>Welcome</html>"),
    "JSON of another server": says(b"[1, 2]"),
    "half of a response": says(b'{"response": '),
    "drips headers": drips(b"HTTP/1.1 200 OK\r\n"),
    "drips a body": drips(b"HTTP/1.1 200 OK\r\n\r\n"),
    "floods": floods,
    "nests": says(b"[" * 100_000),
}


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    "behave",
    [value if name == "silent" else pytest.param(value, marks=pytest.mark.slow) for name, value in WRONG.items()],
    ids=WRONG,
)
def test_a_call_fails_once_luigid_has_been_silent_for_too_long(
    behave: Callable[[socket.socket, threading.Event], None],
) -> None:
    with server(behave) as url:
        scheduler = SharedScheduler(url)
        began = time.monotonic()
        with pytest.raises(RPCError, match=url):
            scheduler.get_work(worker="w")  # type: ignore[attr-defined]
        assert PATIENCE - 2 * ATTEMPT < time.monotonic() - began < PATIENCE + 2 * ATTEMPT


def test_a_call_ends_after_the_attempts_of_luigi_where_these_take_less() -> None:
    configuration = luigi.configuration.get_config()
    configuration.set("core", "rpc_retry_attempts", "2")
    configuration.set("core", "rpc_retry_wait", "0")
    try:
        with server(closes) as url, pytest.raises(RPCError, match=f"{url} has not responded for 0 s"):
            SharedScheduler(url).get_work(worker="w")  # type: ignore[attr-defined]
    finally:
        configuration.remove_option("core", "rpc_retry_attempts")
        configuration.remove_option("core", "rpc_retry_wait")


@pytest.mark.usefixtures("patience")
def test_a_luigid_that_comes_back_is_used_and_its_silence_forgotten() -> None:
    response = says(json.dumps({"response": {"rpc_messages": []}}).encode())
    with server(closes, closes, response, closes, closes, response) as url:
        scheduler = SharedScheduler(url)
        for _ in range(2):
            assert scheduler.get_work(worker="w") == {"rpc_messages": []}  # type: ignore[attr-defined]


@pytest.mark.parametrize("behave", WRONG.values(), ids=WRONG)
def test_a_call_whose_loss_does_no_harm_is_tried_once(
    behave: Callable[[socket.socket, threading.Event], None],
) -> None:
    with server(behave) as url:
        began = time.monotonic()
        with pytest.raises(LuigidUnavailable, match=url):
            call(url, "ping", 1.0, worker="w")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("behave", WRONG.values(), ids=WRONG)
def test_a_server_that_does_not_respond_within_a_second_is_no_luigid(
    behave: Callable[[socket.socket, threading.Event], None],
) -> None:
    with server(behave) as url:
        began = time.monotonic()
        assert not answers(url)
        assert time.monotonic() - began < 2


def test_a_response_without_an_end_is_read_up_to_a_bound() -> None:
    sent: list[int] = []

    def count(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not over.is_set():
            sent.append(connection.send(bytes(1 << 16)))

    with server(count) as url:
        assert not answers(url)
        assert sum(sent) < 1 << 23, "what is on its way included"
        with pytest.raises(LuigidUnavailable, match=r"more than 16\.8 MB"):
            call(url, "task_list")


# Commands


def configure(workdir: Path, url: str, *, attempts: int | None = 4) -> None:
    """Write a luigi.cfg with an address and retries, None for those that are ours by default."""
    text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    own = f"[core]\nscheduler_url = {url}/\n"
    if attempts is not None:
        own += f"rpc_retry_attempts = {attempts}\nrpc_retry_wait = 1\nrpc_connect_timeout = {ATTEMPT}\n"
    assert "[core]\n" in text
    (workdir / "luigi.cfg").write_text(text.replace("[core]\n", own), encoding="utf-8")


@pytest.mark.parametrize(("form", "code"), [(LOAD, 3), ((*BARE, "LoadBatch", "--batch-id", "b1"), 40)])
@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_load_whose_luigid_hangs_ends_unfinished_and_is_resumed(
    workers: str,
    form: tuple[str, ...],
    code: int,
    workdir: Path,
    tmp_path: Path,
    start: Start,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    arguments = ("--source", small_dataset(8), "--workers", workers)
    with running_luigid(tmp_path) as url, holding(settings.database_url.reveal(), 1, 2) as held:
        configure(workdir, url)
        running = start(*form, *arguments, env=SMALL)
        waits(running, lambda: world.objects(settings))
        with stopped(url):
            for shard in (1, 2):
                held.let_go(shard)
            began = time.monotonic()
            _, stderr = running.communicate(timeout=60)
            assert PATIENCE - 2 < time.monotonic() - began < PATIENCE + 15
        assert running.returncode == code, stderr
        assert f"luigid was lost: {url} has not responded for" in stderr
        typed = "luigi --module pipeline LoadBatch" if form is not LOAD else "python -m pipeline load"
        assert f"To go on: {typed} --batch-id b1" in stderr
        assert "Traceback" not in stderr
    # Without luigid, and with what was marked.
    done = run_pipeline("load", "--batch-id", "b1", *arguments)
    assert done.returncode == 0, done.stderr
    world.check(settings, (small_dataset(8), "b1", None))


def test_a_load_whose_luigid_hangs_from_the_start_uses_its_own_scheduler(
    workdir: Path, tmp_path: Path, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    with running_luigid(tmp_path) as url:
        configure(workdir, url)
        with stopped(url):
            done = run_pipeline("load", "--batch-id", "b1", "--source", small_dataset(3))
    assert done.returncode == 0, done.stderr
    world.check(settings, (small_dataset(3), "b1", None))


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGTERM"])
@pytest.mark.parametrize("idle", ["2", pytest.param("60", marks=pytest.mark.slow)])
def test_a_worker_whose_luigid_is_lost_between_two_questions_ends_with_3(
    idle: str, how: str, workdir: Path, tmp_path: Path, start: Start
) -> None:
    with running_luigid(tmp_path) as url:
        configure(workdir, url)
        running = start(*OURS, "worker", "--idle", idle, "--verbose")
        read_until(running, "Running Worker")
        if how == "SIGSTOP":
            with stopped(url):
                stdout, stderr = running.communicate(timeout=60)
    if how == "SIGTERM":
        stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout) == (3, ""), stderr
    assert f"Error: luigid was lost: {url} has not responded for" in stderr


@pytest.mark.slow
def test_with_the_settings_of_the_repository_a_silent_luigid_is_waited_for_a_minute(
    workdir: Path, tmp_path: Path, start: Start
) -> None:
    with running_luigid(tmp_path) as url:
        configure(workdir, url, attempts=None)
        running = start(*OURS, "worker", "--verbose")
        read_until(running, "Running Worker")
        with stopped(url):
            began = time.monotonic()
            _, stderr = running.communicate(timeout=120)
        assert running.returncode == 3, stderr
        assert 50 < time.monotonic() - began < 70

"""progress.py: the shape of the line, the bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedded_supabase.files import wait_until
from pipeline.config import Settings, load_settings
from pipeline.graph.status import StatusReporter
from pipeline.observe import progress
from pipeline.observe.logger import RedactingFormatter, configure_logging, get_logger
from pipeline.observe.progress import Counter, Progress, Report, Reporter, line

PLAIN = re.compile(r"Processing (\d+)% \| (\d+)/(\d+) \| (\d+)/s \| ETA: (\d+s|\d+m \d\ds|\d+h \d\dm|unknown)")
SHAPE = re.compile(r"Processing [█]*[░]* (\d+)% \| (\d+)/(\d+) \| (\d+)/s \| ETA: (\d+s|\d+m \d\ds|\d+h \d\dm|unknown)")


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    """A clock that the test moves, in the place of the module's."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Ticks:
    """The event that the thread waits for, which lets each redraw happen when the test says so."""

    def __init__(self, steps: list[tuple[float, int]], clock: Clock, counter: Counter) -> None:
        self._steps, self._clock, self._add = iter(steps), clock, counter.of(1)

    def wait(self, _: float) -> bool:
        step = next(self._steps, None)
        if step is None:
            return True
        seconds, done = step
        self._clock.now += seconds
        self._add(done)
        return False

    def set(self) -> None:
        pass


def shown(
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[float, int]],
    *,
    total: int = 100,
    before: int = 0,
    stream: io.TextIOBase | None = None,
    terminal: bool = False,
) -> str:
    """Return what is written when at each step so many seconds pass and so many recognitions are done."""
    clock, counter = Clock(), Counter()
    stream = stream or Stream(terminal)
    counter.start(total, before)
    monkeypatch.setattr(progress, "time", clock)
    shower = Progress(counter, stream)  # type: ignore[arg-type]
    monkeypatch.setattr(shower, "_finished", Ticks(steps, clock, counter))
    with shower:
        shower._thread.join()
    return stream.getvalue() if isinstance(stream, Stream) else ""


# The line


@pytest.mark.parametrize(
    ("done", "before", "total", "seconds", "text"),
    [
        (0, 0, 10000, 0.0, "░" * 24 + " 0% | 0/10000 | 0/s | ETA: unknown"),
        (8000, 0, 10000, 6.4, "█" * 19 + "░" * 5 + " 80% | 8000/10000 | 1250/s | ETA: 2s"),
        (8000, 0, 101750, 6.4, "█" + "░" * 23 + " 7% | 8000/101750 | 1250/s | ETA: 1m 15s"),
        (1, 0, 2, 1.0, "█" * 12 + "░" * 12 + " 50% | 1/2 | 1/s | ETA: 1s"),
        (100, 0, 6100, 1.0, "░" * 24 + " 1% | 100/6100 | 100/s | ETA: 1m 00s"),
        (1, 0, 7384, 1.0, "░" * 24 + " 0% | 1/7384 | 1/s | ETA: 2h 03m"),
        (9999, 0, 10000, 1.0, "█" * 23 + "░ 99% | 9999/10000 | 9999/s | ETA: 0s"),
        (10000, 0, 10000, 8.0, "█" * 24 + " 100% | 10000/10000 | 1250/s | ETA: 0s"),
        (0, 0, 0, 0.0, "█" * 24 + " 100% | 0/0 | 0/s | ETA: unknown"),
    ],
)
def test_the_line_is_shaped_as_promised(done: int, before: int, total: int, seconds: float, text: str) -> None:
    columns = len(f"Processing {text}")
    assert line(done, before, total, seconds, columns=columns) == f"Processing {text}"


def test_a_resumed_batch_shows_the_rate_of_this_run() -> None:
    assert line(6000, 5000, 10000, 10.0) == "Processing 60% | 6000/10000 | 100/s | ETA: 40s"


@given(st.integers(1, 10**7), st.floats(0, 1), st.floats(0, 1), st.just(0.0) | st.floats(1e-6, 1e6))
def test_the_line_keeps_its_shape_at_any_numbers(total: int, share: float, earlier: float, seconds: float) -> None:
    done = int(total * share)
    text = line(done, int(done * earlier), total, seconds, columns=110)
    match = SHAPE.fullmatch(text)
    assert match
    assert 0 <= int(match[1]) <= 100
    assert len(text) == 110


def test_a_narrow_terminal_gets_a_line_that_fits() -> None:
    for columns in (1, 10, 30, 45, 60):
        assert len(line(8000, 0, 10000, 6.4, columns=columns)) <= columns


# Where it is shown


def test_on_a_terminal_the_bar_is_drawn_over_itself_and_left_at_its_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch, [(0.2, 10), (0.2, 20), (0.2, 70)], terminal=True)
    assert written.endswith("\n")
    assert written.count("\n") == 1
    drawn = written[:-1].split("\r")[1:]
    assert [SHAPE.fullmatch(text.removesuffix("\x1b[K")) is not None for text in drawn] == [True] * 3
    assert [re.search(r"\d+/\d+ ", text)[0] for text in drawn] == ["10/100 ", "30/100 ", "100/100 "]  # type: ignore[index]


def test_elsewhere_a_plain_line_at_most_every_30_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch, [(1.0, 0)] * 95)
    assert "\r" not in written
    assert "\x1b" not in written
    lines = written.splitlines()
    assert len(lines) == 3
    assert all(PLAIN.fullmatch(text) for text in lines)
    assert written.isascii()  # whatever a mail takes its letters for


def test_an_hour_is_told_in_so_few_lines_that_a_mail_can_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, [(0.2, 1)] * (5 * 3600), total=10**6).splitlines()
    assert 100 <= len(lines) <= 120
    assert lines[-1].startswith("Processing 1% | 1")


def test_an_hour_of_trouble_is_told_in_as_few(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shard of a batch, and what it waits for, has to try again; another warning comes in between."""
    clock = Clock()
    monkeypatch.setattr("pipeline.observe.logger.time", clock)
    for verbose, most in ((False, 122), (True, 2000)):
        configure_logging(verbose)
        for shard in range(1000):
            clock.now += 3.6
            get_logger("pipeline.database").warning("%s Trying again in %.1f s (%d).", "It broke.", shard / 7, 1)
            get_logger("pipeline.steps.upload").warning("upload: %d objects differ", shard)
        lines = capsys.readouterr().err.splitlines()
        assert 100 <= len(lines) <= most
        assert len({line[20:].split(":")[0].split(" Trying")[0] for line in lines}) == 2
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler.formatter, RedactingFormatter):
            logging.getLogger().removeHandler(handler)


def test_a_terminal_that_was_closed_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hears, tells = os.pipe()
    os.close(hears)
    with open(tells, "w", encoding="utf-8") as stream:
        stream.isatty = lambda: True  # type: ignore[method-assign]
        shown(monkeypatch, [(0.2, 10)] * 3, stream=stream)  # which fails at its first write, and is let go
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


def test_a_short_run_without_a_terminal_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, [(5.0, 20)] * 5) == ""


@pytest.mark.parametrize("total", [0, 50])
def test_nothing_is_drawn_before_there_is_work_or_when_none_is_left(
    monkeypatch: pytest.MonkeyPatch, total: int
) -> None:
    assert shown(monkeypatch, [(0.2, 0)] * 3, total=total, before=total, terminal=True) == ""


def test_the_rate_counts_from_the_first_recognition_not_from_the_start_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, counter, stream = Clock(), Counter(), Stream(terminal=True)
    monkeypatch.setattr(progress, "time", clock)
    shower = Progress(counter, stream)
    clock.now += 500.0  # discovery
    counter.start(100, 40)
    monkeypatch.setattr(shower, "_finished", Ticks([(0.2, 0), (2.0, 20)], clock, counter))
    with shower:
        shower._thread.join()
    assert "60/100 | 10/s | ETA: 4s" in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251"])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_encoding_that_lacks_the_blocks_gets_others(
    monkeypatch: pytest.MonkeyPatch, encoding: str, terminal: bool
) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="") as stream:
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        shown(monkeypatch, [(0.2, 50), (31.0, 10)], stream=stream)
        stream.flush()
        text = raw.getvalue().decode(encoding)
    assert re.search(r"Processing #+\.+ 60% \| 60/100" if terminal else "Processing 60% \\| 60/100", text)
    assert "█" not in text
    assert "?" not in text


def test_an_error_of_the_block_ends_the_bar_and_gets_through() -> None:
    counter = Counter()
    counter.start(100, 0)
    shower = Progress(counter, Stream(terminal=False))
    with pytest.raises(KeyError), shower:
        raise KeyError
    assert not shower._thread.is_alive()


def test_leaving_the_block_is_quick() -> None:
    shower = Progress(Counter(), Stream(terminal=False))
    started = time.monotonic()
    with shower:
        pass
    assert time.monotonic() - started < 5.0
    assert not shower._thread.is_alive()


# The counter


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_counter_is_shared_with_forked_workers() -> None:
    counter = Counter()
    counter.start(1000, 100)
    context = multiprocessing.get_context("fork")

    def work(shard: int) -> None:
        add = counter.of(shard)
        for _ in range(100):
            add(2)

    workers = [context.Process(target=work, args=(shard,)) for shard in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read() == (700, 100, 1000)


def test_no_count_of_any_thread_of_a_shard_is_lost() -> None:
    counter = Counter()
    counter.start(8000, 0)
    add = counter.of(7)

    def work(_: int) -> None:
        for _ in range(1000):
            add(1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert counter.read() == (8000, 0, 8000)


def test_the_most_shards_a_batch_may_have_do_not_share_a_place() -> None:
    counter = Counter()
    counter.start(2000, 0)
    for shard in range(1, 1001):
        counter.of(shard)(2)
    assert counter.read() == (2000, 0, 2000)


def test_a_new_start_forgets_the_former_batch() -> None:
    counter = Counter()
    counter.start(10, 0)
    counter.of(3)(10)
    assert counter.read() == (10, 0, 10)
    counter.start(20, 5)
    assert counter.read() == (5, 5, 20)


def test_a_shard_that_is_tried_again_counts_from_none() -> None:
    counter = Counter()
    counter.start(10, 0)
    counter.of(3)(4)
    counter.of(4)(5)
    counter.of(3)(1)
    assert counter.read() == (6, 0, 10)


def test_each_shard_knows_how_far_it_is() -> None:
    counter = Counter()
    counter.start(10, 0)
    counter.of(3, 4)(3)
    counter.of(4)(5)
    assert (counter.read_shard(3), counter.read_shard(4), counter.read_shard(5)) == ((3, 4), (5, 0), (0, 0))
    counter.start(10, 0)
    assert counter.read_shard(3) == (0, 0)


# Whoever watches from far away


class Pauses:
    """The event that a reporter waits for: each pause ends when the test says so, and is noted."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.may_go = threading.Semaphore(0)
        self.over = False

    def wait(self, seconds: float) -> bool:
        self.asked.append(seconds)
        self.may_go.acquire()
        return self.over

    def set(self) -> None:
        self.over = True
        self.may_go.release()


def reporting(read: list[Report | None], *, last: bool = True) -> tuple[list[Report], Pauses]:
    """Return what a reporter tells that reads one after another, the last as the block ends; and its pauses."""
    told: list[Report] = []
    rest = iter(read)
    read_count = 0

    def next_one() -> Report | None:
        nonlocal read_count
        read_count += 1
        return next(rest)

    reporter = Reporter(next_one, told.append, last=last)
    pauses = Pauses()
    reporter._finished = pauses  # type: ignore[assignment]
    with reporter:
        for count in range(1, len(read)):
            pauses.may_go.release()
            assert wait_until(lambda wanted=count: read_count == wanted, 30)  # type: ignore[misc]
    assert not reporter._thread.is_alive()
    return told, pauses


def test_a_report_is_told_when_it_changed_once_a_second_and_at_the_end() -> None:
    told, pauses = reporting([None, ("a", 1), ("a", 1), ("a", 2), ("b", 2)])
    assert told == [("a", 1), ("a", 2), ("b", 2)]
    assert pauses.asked == [1.0] * 5


def test_the_end_is_not_told_where_another_has_the_last_word() -> None:
    told, _ = reporting([("a", 1), ("b", 2)], last=False)
    assert told == [("a", 1)]


def test_a_listener_that_does_not_answer_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LAST", 0.01)
    answers = threading.Event()

    def listen(_: object) -> None:
        answers.wait(60)

    reporter = Reporter(lambda: ("a", 1), listen)
    with reporter:
        pass
    assert reporter._thread.is_alive()  # it waits on, for itself
    answers.set()
    reporter._thread.join(30)
    assert not reporter._thread.is_alive()


# luigid


class Answering(BaseHTTPRequestHandler):
    """What luigid's interface looks like from outside; its answers are those of the test."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        asked = parse_qs(self.rfile.read(length).decode())
        server: Any = self.server
        server.asked.append((self.path.removeprefix("/api/"), json.loads(asked["data"][0])))
        content = server.answer.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    """A server in the place of luigid."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.asked, server.answer = [], '{"response": null}'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def reporter_to(server: Any) -> StatusReporter:
    return StatusReporter(f"http://127.0.0.1:{server.server_port}")


def told(status: StatusReporter, server: Any, message: str, percent: int | None) -> list[tuple[str, Any]]:
    status.report("UploadShard_1", (message, percent))
    return list(server.asked)


@pytest.mark.usefixtures("clean_environment")
def test_luigid_is_told_message_and_progress(server: Any) -> None:
    assert told(reporter_to(server), server, "6 of 24 photos", 25) == [
        ("set_task_status_message", {"task_id": "UploadShard_1", "status_message": "6 of 24 photos"}),
        ("set_task_progress_percentage", {"task_id": "UploadShard_1", "progress_percentage": 25}),
    ]


@pytest.mark.usefixtures("clean_environment")
def test_a_message_has_no_secret_and_no_markup_in_it(server: Any, settings: Settings) -> None:
    """The visualiser renders a message that changes while it is looked at as HTML; names of folders are in it."""
    known = load_settings(
        environ={
            "NEXT_PUBLIC_SUPABASE_URL": settings.url,
            "SUPABASE_SERVICE_ROLE_KEY": settings.key.reveal(),
            "DATABASE_URL": settings.database_url.reveal(),
        }
    )
    text = f"<img src=x onerror=alert(1)> & {known.key.reveal()}"
    [(_, data)] = told(reporter_to(server), server, text, None)
    assert data["status_message"] == "‹img src=x onerror=alert(1)› + ***"


@pytest.mark.usefixtures("clean_environment")
def test_a_luigid_that_is_away_is_asked_once_and_fails_nothing(server: Any) -> None:
    status = reporter_to(server)
    server.answer = "<html>this is something else</html>"
    assert len(told(status, server, "a", 1)) == 1
    status.report("UploadShard_1", ("b", 2))
    assert len(server.asked) == 1  # it is left alone for a while
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and refuses
        status = StatusReporter(f"http://127.0.0.1:{silent.getsockname()[1]}")
        status.report("UploadShard_1", ("c", 3))
        silent.listen()
        status.report("UploadShard_1", ("d", 4))
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()

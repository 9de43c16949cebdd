"""observe/progress.py: the shape of the line, the bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import multiprocessing
import os
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from embedded_supabase.files import wait_until
from pipeline.config import Settings, load_settings
from pipeline.graph.luigid import StatusReporter
from pipeline.observe import progress
from pipeline.observe.logger import ConsoleHandler, configure_logging
from pipeline.observe.progress import (
    Phase,
    ProgressCounter,
    ProgressDisplay,
    StatusMessage,
    format_end,
    format_progress,
    status_thread,
)

NUMBERS = r"(\d+)% \| (\d+)/(\d+) \| (\d+)/s \| ETA: (\d+s|\d+m \d\ds|\d+h \d\dm|unknown) \| (\w+), (recognitions?)"
PLAIN = re.compile(f"Processing {NUMBERS}")
SHAPE = re.compile(f"Processing [█]*[░]* {NUMBERS}")


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    """A clock that the test advances, in place of the module's."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Ticks:
    """The event that the display waits for; each wait is one step of the test."""

    def __init__(self, steps: list[tuple[float, int]], clock: Clock, counter: ProgressCounter) -> None:
        self._steps, self._clock, self._add = iter(steps), clock, counter.start_shard(1)

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
    """Return what is written; each step is seconds that pass and recognitions that are done."""
    clock, counter = Clock(), ProgressCounter()
    stream = stream or Stream(terminal)
    monkeypatch.setattr(progress, "time", clock)
    counter.start("upload", total, before)
    shower = ProgressDisplay(counter, stream, batch_id="b1")  # type: ignore[arg-type]
    monkeypatch.setattr(shower, "_finished", Ticks(steps, clock, counter))
    with shower:
        shower._thread.join()
    return stream.getvalue() if isinstance(stream, Stream) else ""


def drawn(written: str) -> list[str]:
    """What a terminal shows one after the other in a line that is redrawn."""
    return [text.removesuffix("\n").removesuffix("\x1b[K") for text in written.split("\r")[1:]]


def upload(done: int, before: int, total: int, seconds: float, name: str = "upload") -> Phase:
    return Phase(name, "recognition", done, before, total, began=1.0, seconds=seconds, over=False)


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
        (6000, 5000, 10000, 10.0, "█" * 14 + "░" * 10 + " 60% | 6000/10000 | 100/s | ETA: 40s"),
    ],
)
def test_the_line_has_the_documented_shape(done: int, before: int, total: int, seconds: float, text: str) -> None:
    text = f"{text} | upload, recognitions"
    columns = len(f"Processing {text}")
    phase = upload(done, before, total, seconds)
    assert format_progress(phase, columns=columns) == f"Processing {text}"
    plain = text.lstrip("█░ ")
    assert format_progress(phase) == f"Processing {plain}"


@given(
    st.integers(1, 10**7),
    st.floats(0, 1),
    st.floats(0, 1),
    st.just(0.0) | st.floats(1e-6, 1e6),
    st.integers(110, 400),
)
def test_the_line_keeps_its_shape_and_fills_the_width(
    total: int, share: float, earlier: float, seconds: float, columns: int
) -> None:
    done = int(total * share)
    text = format_progress(upload(done, int(done * earlier), total, seconds), columns=columns)
    match = SHAPE.fullmatch(text)
    assert match
    assert int(match[1]) == done * 100 // total
    assert len(text) == columns


@pytest.mark.parametrize("name", ["discover", "upload", "transform"])
@pytest.mark.parametrize("total", [1, 417, 12_904, 1_000_000])
def test_any_terminal_from_40_columns_shows_phase_unit_and_share(total: int, name: str) -> None:
    for columns in range(39, 201):
        for done, before, seconds in ((0, 0, 0.0), (total // 3, 0, 7.0), (total, total // 2, 5000.0)):
            phase = upload(done, before, total, seconds, name)
            text = format_progress(phase, columns=columns)
            assert len(text) <= columns
            assert f"{done * 100 // total}%" in text
            assert name in text
            assert "recognition" in text
            assert "\n" not in text
            end = format_end(phase, columns)
            assert len(end) <= columns
            assert end.startswith(f"{name}: ")
            if columns >= 80 and total < 1_000_000:
                assert SHAPE.fullmatch(text)
    assert format_progress(phase, columns=10) == f"{name} 100%"[:10]


@pytest.mark.parametrize(
    ("done", "before", "total", "columns", "text"),
    [
        (10000, 0, 10000, None, "upload: 10000 recognitions in 8.0 s, 1250/s"),
        (1, 0, 1, None, "upload: 1 recognition in 8.0 s, 0/s"),
        (3700, 0, 10000, None, "upload: 3700 of 10000 recognitions in 8.0 s, 462/s"),
        (10000, 4000, 10000, None, "upload: 6000 recognitions in 8.0 s, 750/s; 4000 by earlier runs"),
        (5000, 4000, 10000, 60, "upload: 1000 of 10000 recognitions in 8.0 s, 125/s"),
        (5000, 4000, 10000, 40, "upload: 1000 of 10000 recognitions"),
    ],
)
def test_a_phase_ends_with_what_was_done(done: int, before: int, total: int, columns: int | None, text: str) -> None:
    assert format_end(upload(done, before, total, 8.0), columns) == text


# The display


def test_a_terminal_shows_one_line_that_is_redrawn_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch, [(0.2, 10), (0.2, 20), (0.2, 70)], terminal=True)
    assert written.endswith("\n")
    assert written.count("\n") == 1
    *bars, end = drawn(written)
    assert all(SHAPE.fullmatch(text) for text in bars)
    assert [text.split(" | ")[1] for text in bars] == ["10/100", "30/100", "100/100", "100/100"]
    assert end == "upload: 100 recognitions in 0.6 s, 167/s"


def test_each_phase_is_shown_however_short_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(stream: Stream) -> None:
        clock, counter = Clock(), ProgressCounter()
        monkeypatch.setattr(progress, "time", clock)
        with ProgressDisplay(counter, stream, batch_id="b1"):
            counter.start("discover_annotations", 7)
            counter.set_done(7)
            clock.now += 0.01
            counter.start("upload", 4, 1)
            counter.start_shard(1)(2)
            clock.now += 1.0
            counter.start("transform", 4)  # and then the run is interrupted

    run(stream := Stream(True))
    ends = [text for text in drawn(stream.getvalue()) if text.startswith(("discover: ", "upload: ", "transform: "))]
    assert ends == [
        "discover: 7 kB in 0.0 s, 700/s",
        "upload: 2 of 4 recognitions in 1.0 s, 2/s; 1 by earlier runs",
        "transform: 0 of 4 recognitions in 0.0 s, 0/s",
    ]
    configure_logging(log_format="json")
    run(Stream(True))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    forget_handlers()
    assert [(one["event"], one["phase"]) for one in events] == [
        (event, phase) for phase in ("discover", "upload", "transform") for event in ("phase_started", "phase_ended")
    ]
    facts = ("batch_id", "unit", "done", "before", "total", "seconds")
    assert [[one[name] for name in facts] for one in events[2:4]] == [
        ["b1", "recognition", 1, 1, 4, 0.0],
        ["b1", "recognition", 3, 1, 4, 1.0],
    ]


def forget_handlers() -> None:
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, ConsoleHandler):
            logging.getLogger().removeHandler(handler)


def test_other_streams_get_a_plain_line_every_30_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch, [(1.0, 0)] * 95)
    assert "\r" not in written
    assert "\x1b" not in written
    lines = written.splitlines()
    assert len(lines) == 3
    assert all(PLAIN.fullmatch(text) for text in lines)
    assert written.isascii()  # for mails of cron in any encoding


def test_an_hour_produces_about_120_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, [(1.0, 5)] * 3600, total=10**6).splitlines()
    assert 100 <= len(lines) <= 120
    assert lines[-1].startswith("Processing 1% | 1")


def test_an_hour_of_warnings_produces_about_120_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every shard logs a retry, and in between a different warning."""
    clock = Clock()
    monkeypatch.setattr("pipeline.observe.logger.time", clock)
    for verbose, most in ((False, 122), (True, 2000)):
        configure_logging(verbose)
        for shard in range(1000):
            clock.now += 3.6
            logging.getLogger("pipeline.database").warning("%s Trying again in %.1f s (%d).", "It broke.", shard / 7, 1)
            logging.getLogger("pipeline.steps.upload").warning("upload: %d objects differ", shard)
        lines = capsys.readouterr().err.splitlines()
        assert 100 <= len(lines) <= most
        assert len({line[20:].split(":")[0].split(" Trying")[0] for line in lines}) == 2
    forget_handlers()


def test_a_closed_terminal_is_replaced_by_the_null_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        stream.isatty = lambda: True  # type: ignore[method-assign]
        shown(monkeypatch, [(0.2, 10)] * 3, stream=stream)  # the first write fails
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


def test_a_full_disk_does_not_end_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        shown(monkeypatch, [(31.0, 10)] * 3, stream=stream)
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


@pytest.mark.parametrize("columns", [80, 200])
def test_the_bar_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as stream:
        shown(monkeypatch, [(0.2, 50)], stream=stream)
        line = drawn(os.read(ours, 1 << 16).decode())[0]
    os.close(ours)
    assert len(line) == columns - 1
    assert line.startswith("Processing ")


def test_the_display_starts_only_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()

    def note_threads(*_: object, **__: object) -> str:
        threads.update(thread.name for thread in threading.enumerate())
        return ""

    monkeypatch.setattr(progress, "format_progress", note_threads)
    before = {thread.name for thread in threading.enumerate()}
    shown(monkeypatch, [(0.2, 10)], terminal=True)
    assert threads - before == {"progress"}
    assert tqdm.monitor is None


def test_json_logging_gets_an_object_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(log_format="json")
    assert shown(monkeypatch, [(1.0, 1)] * 95, total=200, terminal=True) == ""
    started, *lines, ended = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    forget_handlers()
    assert [started["event"], ended["event"]] == ["phase_started", "phase_ended"]
    assert [(line["done"], line["total"], line["seconds"]) for line in lines] == [
        (30, 200, 30.0),
        (60, 200, 60.0),
        (90, 200, 90.0),
    ]
    assert all(PLAIN.fullmatch(line["message"]) for line in lines)
    assert {(line["level"], line["event"], line["batch_id"]) for line in lines} == {("info", "progress", "b1")}


def test_a_short_run_without_a_terminal_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, [(5.0, 20)] * 5) == ""


def test_nothing_is_drawn_of_a_phase_without_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, [(0.2, 0)] * 3, total=0, terminal=True) == ""


def test_the_rate_excludes_the_time_before_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counter, stream = Clock(), ProgressCounter(), Stream(terminal=True)
    monkeypatch.setattr(progress, "time", clock)
    shower = ProgressDisplay(counter, stream)
    clock.now += 500.0  # discovery
    counter.start("upload", 100, 40)
    monkeypatch.setattr(shower, "_finished", Ticks([(0.2, 0), (1.8, 20)], clock, counter))
    with shower:
        shower._thread.join()
    assert "60/100 | 10/s | ETA: 4s" in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251"])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_encoding_without_block_characters_gets_ascii(
    monkeypatch: pytest.MonkeyPatch, encoding: str, terminal: bool
) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="") as stream:
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        shown(monkeypatch, [(0.2, 50), (31.0, 10)], stream=stream)
        stream.flush()
        text = raw.getvalue().decode(encoding)
    assert re.search(r"Processing #{5,}\.{4,} 60% \| 60/100" if terminal else r"Processing 60% \| 60/100", text)
    assert "█" not in text
    assert "?" not in text


def test_an_error_in_the_block_propagates_and_ends_the_thread() -> None:
    counter = ProgressCounter()
    counter.start("upload", 100)
    shower = ProgressDisplay(counter, Stream(terminal=False))
    with pytest.raises(KeyError), shower:
        raise KeyError
    assert not shower._thread.is_alive()


def test_leaving_the_block_does_not_wait_for_a_redraw() -> None:
    shower = ProgressDisplay(ProgressCounter(), Stream(terminal=False))
    started = time.monotonic()
    with shower:
        pass
    assert time.monotonic() - started < 5.0
    assert not shower._thread.is_alive()


# The counter


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_counter_is_shared_with_forked_workers() -> None:
    counter = ProgressCounter()
    counter.start("upload", 1000, 100)
    context = multiprocessing.get_context("fork")

    def work(shard: int) -> None:
        add = counter.start_shard(shard)
        for _ in range(100):
            add(2)

    workers = [context.Process(target=work, args=(shard,)) for shard in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read() == (700, 100, 1000)


def test_counts_of_the_threads_of_a_shard_add_up() -> None:
    counter = ProgressCounter()
    counter.start("upload", 8000)
    add = counter.start_shard(7)

    def work(_: int) -> None:
        for _ in range(1000):
            add(1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert counter.read() == (8000, 0, 8000)


def test_a_thousand_shards_have_separate_slots() -> None:
    counter = ProgressCounter()
    counter.start("upload", 2000)
    for shard in range(1, 1001):
        counter.start_shard(shard)(2)
    assert counter.read() == (2000, 0, 2000)


def test_a_new_start_clears_the_counter() -> None:
    counter = ProgressCounter()
    counter.start("upload", 10)
    counter.start_shard(3)(10)
    assert counter.read() == (10, 0, 10)
    counter.start("upload", 20, 5)
    assert counter.read() == (5, 5, 20)


def test_a_retried_shard_starts_from_zero() -> None:
    counter = ProgressCounter()
    counter.start("upload", 10)
    counter.start_shard(3)(4)
    counter.start_shard(4)(5)
    counter.start_shard(3)(1)
    assert counter.read() == (6, 0, 10)


def test_done_and_total_of_each_shard_are_readable() -> None:
    counter = ProgressCounter()
    counter.start("upload", 10)
    counter.start_shard(3, 4)(3)
    counter.start_shard(4)(5)
    assert (counter.read_shard(3), counter.read_shard(4), counter.read_shard(5)) == ((3, 4), (5, 0), (0, 0))
    counter.start("upload", 10)
    assert counter.read_shard(3) == (0, 0)


@pytest.mark.parametrize("shard", [1, 1022, 1023, 1024, 2046, 2047, 10 * 1024 - 1])
def test_what_other_workers_did_replaces_the_count_of_no_shard(shard: int) -> None:
    counter = ProgressCounter()
    counter.start("upload", 100)
    add = counter.start_shard(shard, 4)
    for others in (5, 7):
        add(2)
        counter.set_done_by_others(others)
    assert counter.read() == (4 + 7, 0, 100)
    assert counter.read_shard(shard) == (4, 4)


# Status messages


class Pauses:
    """The event that the thread waits for; the test ends each wait, and its length is recorded."""

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


def sent(read: list[StatusMessage | None]) -> tuple[list[StatusMessage], Pauses]:
    """Return the messages sent of those in `read`, the last one read as the block ends; and the pauses."""
    told: list[StatusMessage] = []
    rest = iter(read)
    read_count = 0

    def next_one() -> StatusMessage | None:
        nonlocal read_count
        read_count += 1
        return next(rest)

    thread = status_thread(next_one, told.append)
    pauses = Pauses()
    thread._finished = pauses  # type: ignore[assignment]
    with thread:
        for count in range(1, len(read)):
            pauses.may_go.release()
            assert wait_until(lambda wanted=count: read_count == wanted, 30)  # type: ignore[misc]
    assert not thread._thread.is_alive()
    return told, pauses


def test_a_changed_message_is_sent_once_a_second_and_at_the_end() -> None:
    messages, pauses = sent([None, ("a", 1), ("a", 1), ("a", 2), ("b", 2)])
    assert messages == [("a", 1), ("a", 2), ("b", 2)]
    assert pauses.asked == [1.0] * 5


def test_a_receiver_that_does_not_respond_delays_the_end_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LAST_STATUS_SECONDS", 0.01)
    answers = threading.Event()

    def listen(_: object) -> None:
        answers.wait(60)

    thread = status_thread(lambda: ("a", 1), listen)
    with thread:
        pass
    assert thread._thread.is_alive()  # only the thread still waits
    answers.set()
    thread._thread.join(30)
    assert not thread._thread.is_alive()


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
    luigid = reporter_to(server)
    server.answer = "<html>this is something else</html>"
    assert len(told(luigid, server, "a", 1)) == 1
    luigid.report("UploadShard_1", ("b", 2))
    assert len(server.asked) == 1  # it is left alone for a while
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and refuses
        luigid = StatusReporter(f"http://127.0.0.1:{silent.getsockname()[1]}")
        luigid.report("UploadShard_1", ("c", 3))
        silent.listen()
        luigid.report("UploadShard_1", ("d", 4))
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()

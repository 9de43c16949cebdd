"""progress.py: the shape of the line, the bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import multiprocessing
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import progress
from pipeline.progress import Counter, Progress, line

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
    assert line(done, before, total, seconds) == f"Processing {text}"


def test_a_resumed_batch_shows_the_rate_of_this_run() -> None:
    text = line(6000, 5000, 10000, 10.0)
    assert text == "Processing " + "█" * 14 + "░" * 10 + " 60% | 6000/10000 | 100/s | ETA: 40s"


@given(st.integers(1, 10**7), st.floats(0, 1), st.floats(0, 1), st.just(0.0) | st.floats(1e-6, 1e6))
def test_the_line_keeps_its_shape_at_any_numbers(total: int, share: float, earlier: float, seconds: float) -> None:
    done = int(total * share)
    text = line(done, int(done * earlier), total, seconds)
    match = SHAPE.fullmatch(text)
    assert match
    assert 0 <= int(match[1]) <= 100
    assert text.count("█") + text.count("░") == 24


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
    assert all(SHAPE.fullmatch(text) for text in lines)


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
    assert "Processing ##############.......... 60% | 60/100" in text
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

"""Those who read ahead: in order, far enough ahead and no further, as many as it takes, and nothing is left lying."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing

import pytest

from embedded_supabase.files import wait_until
from pipeline.errors import Interrupted
from pipeline.steps import readahead as readahead_module
from pipeline.steps.readahead import ReadAhead

SECONDS = 20.0


class Pieces:
    """Pieces of work, of which four are read ahead; each may be held up at reading or at checking."""

    def __init__(self, ahead: ReadAhead) -> None:
        self.ahead = ahead
        self.lock = threading.Lock()
        self.begun: list[int] = []
        self.ready: list[int] = []
        self.threads: set[str] = set()
        self.reading = self.checking = self.most_reading = self.most_checking = 0
        self.files, self.processors = threading.Event(), threading.Event()
        self.files.set()
        self.processors.set()

    def work(self, number: int) -> Generator[None, None, int]:
        with self.lock:
            self.begun.append(number)
            self.threads.add(threading.current_thread().name)
            self.reading += 1
            self.most_reading = max(self.reading, self.most_reading)
        assert self.files.wait(SECONDS)
        with self.lock:
            self.reading -= 1
        yield
        with self.lock:
            self.checking += 1
            self.most_checking = max(self.checking, self.most_checking)
        assert self.processors.wait(SECONDS)
        with self.lock:
            self.checking -= 1
            self.ready.append(number)
        self.ahead.add()
        return number


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pieces]:
    monkeypatch.setattr(readahead_module, "DECODERS", 2)
    monkeypatch.setattr(readahead_module, "_THREADS", 5)
    with closing(ReadAhead(4, 1000)) as ahead:
        made = Pieces(ahead)
        yield made
        made.files.set()
        made.processors.set()


def test_so_much_is_ready_and_no_more_until_it_is_taken(pieces: Pieces) -> None:
    futures = [pieces.ahead.submit(pieces.work(number), 1) for number in range(20)]
    for taken in range(20):
        # Who reads goes home where enough is ready, and one of them a little later; up to four are on their way then.
        assert wait_until(lambda taken=taken: len(pieces.ready) > taken, SECONDS)  # type: ignore[misc]
        assert len(pieces.begun) <= taken + 4 + 5
        pieces.ahead.take()
    assert [future.result(SECONDS) for future in futures] == list(range(20))
    assert pieces.begun == list(range(20))


def test_one_thread_that_has_enough_stops_and_begins_again_once_a_quarter_is_taken(pieces: Pieces) -> None:
    pieces.ahead._half = 0  # so nobody joins it
    for number in range(10):
        pieces.ahead.submit(pieces.work(number), 1)
    assert wait_until(lambda: pieces.ahead._active == 0, SECONDS)
    assert pieces.ready == [0, 1, 2, 3]
    pieces.ahead.take()
    assert pieces.ahead._active == 0
    pieces.ahead.take()
    assert wait_until(lambda: len(pieces.ready) == 6 and pieces.ahead._active == 0, SECONDS)
    assert len(pieces.threads) == 1


def test_where_files_come_slowly_more_and_more_threads_wait_for_them(pieces: Pieces) -> None:
    pieces.files.clear()
    futures = [pieces.ahead.submit(pieces.work(number), 1) for number in range(9)]
    assert wait_until(lambda: pieces.reading == 5, SECONDS)
    pieces.files.set()
    for future in futures:
        assert future.result(SECONDS) >= 0
        pieces.ahead.take()
    assert pieces.most_reading == 5


def test_as_many_are_checked_at_once_as_there_are_processors_and_nobody_waits_for_one(pieces: Pieces) -> None:
    pieces.processors.clear()
    futures = [pieces.ahead.submit(pieces.work(number), 1) for number in range(9)]
    # Two check; the others have read, left it to those two, and gone home.
    assert wait_until(lambda: pieces.checking == 2 and pieces.ahead._active == 2, SECONDS)
    pieces.processors.set()
    for future in futures:
        future.result(SECONDS)
        pieces.ahead.take()
    assert pieces.most_checking == 2


@pytest.mark.parametrize("most", [1, 2, 3, 48])
def test_all_is_done_whatever_is_rejected_or_fails_on_the_way(most: int) -> None:
    with closing(ReadAhead(most, 1000)) as ahead:

        def work(number: int) -> Generator[None, None, str]:
            if number % 5 == 0:
                return "rejected while reading"
            if number % 5 == 1:
                raise ValueError("failed while reading")
            yield
            if number % 5 == 2:
                return "rejected while checking"
            if number % 5 == 3:
                raise ValueError("failed while checking")
            ahead.add()
            return "ready"

        futures = [ahead.submit(work(number), 1) for number in range(200)]
        for number, future in enumerate(futures):
            if number % 5 in (1, 3):
                with pytest.raises(ValueError, match="failed while"):
                    future.result(SECONDS)
            elif future.result(SECONDS) == "ready":
                ahead.take()
        assert wait_until(lambda: ahead._active == 0, SECONDS)
        assert ahead._ready == 0


def test_what_is_held_has_room_and_what_is_larger_goes_alone_and_nobody_waits_for_it() -> None:
    sizes = [3, 4, 3, 50, 1, 9, 1]
    held: list[int] = []
    with closing(ReadAhead(100, 10)) as ahead:

        def work(size: int) -> Generator[None, None, None]:
            held.append(size)
            yield
            ahead.add()

        for size in sizes:
            ahead.submit(work(size), size)
        for group in ([3, 4, 3], [50], [1, 9], [1]):
            assert wait_until(lambda group=group: held == group and ahead._active == 0, SECONDS)  # type: ignore[misc]
            held.clear()
            for size in group:
                ahead.take()
                ahead.release(size)
    assert ahead._held == 0


def test_what_was_not_begun_when_it_closes_is_interrupted(pieces: Pieces) -> None:
    pieces.files.clear()
    futures = [pieces.ahead.submit(pieces.work(number), 1) for number in range(9)]
    assert wait_until(lambda: pieces.reading == 5, SECONDS)
    closer = threading.Thread(target=pieces.ahead.close)
    closer.start()
    for future in futures[5:]:
        with pytest.raises(Interrupted):
            future.result(SECONDS)
    pieces.files.set()
    closer.join(SECONDS)
    assert not closer.is_alive()
    assert [future.result(SECONDS) for future in futures[:5]] == [0, 1, 2, 3, 4]
    pieces.ahead.take()  # of what is ready still; it begins nothing


def test_whatever_is_raised_is_the_result_and_keeps_nothing_alive() -> None:
    def work() -> Generator[None, None, None]:
        yield
        raise SystemExit

    gc.disable()
    try:
        with closing(ReadAhead(4, 1000)) as ahead:
            future = ahead.submit(work(), 1)
            with pytest.raises(SystemExit):
                future.result(SECONDS)
        gone = weakref.ref(future)
        del future
        assert gone() is None
    finally:
        gc.enable()

"""gate.py: how many requests are let through, after overload and after success, and that nobody waits for ever."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import gate as module
from pipeline.gate import Gate

SECONDS = 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run_to_the_end(threads: list[threading.Thread]) -> None:
    """Run threads, which are daemons so that one left waiting fails this test and not the whole run."""
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [thread for thread in threads if thread.is_alive()]


def overload(gate: Gate, clock: Clock, times: int = 1) -> None:
    for _ in range(times):
        clock.now += 1.0
        gate.overloaded()


def test_overload_halves_once_for_all_the_refusals_of_a_burst(clock: Clock) -> None:
    gate = Gate(16)
    clock.now += 1.0
    for _ in range(16):
        clock.now += 0.005
        gate.overloaded()
    assert gate.limit == 8
    overload(gate, clock)
    assert gate.limit == 4


def test_never_below_one(clock: Clock) -> None:
    gate = Gate(5)
    overload(gate, clock, 20)
    assert gate.limit == 1
    with gate.pass_through():
        pass


def test_a_round_of_successes_climbs_by_one_and_never_above_the_ceiling(clock: Clock) -> None:
    gate = Gate(8)
    overload(gate, clock)
    for expected in (5, 6, 7, 8):
        for _ in range(expected):
            gate.succeeded()
        assert gate.limit == expected
    for _ in range(100):
        gate.succeeded()
    assert gate.limit == 8


@given(st.integers(1, 64), st.lists(st.booleans(), max_size=200))
def test_the_limit_stays_between_one_and_the_ceiling(ceiling: int, events: list[bool]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        gate = Gate(ceiling)
        for success in events:
            if success:
                gate.succeeded()
            else:
                overload(gate, clock)
            assert 1 <= gate.limit <= ceiling


@pytest.mark.parametrize("limit", [1, 3])
def test_at_most_the_limit_are_inside_at_once(limit: int) -> None:
    gate, inside, most, lock = Gate(limit), 0, 0, threading.Lock()
    full = threading.Barrier(limit)

    def enter() -> None:
        nonlocal inside, most
        with gate.pass_through():
            with lock:
                inside += 1
                most = max(most, inside)
            full.wait(SECONDS)  # each round fills the gate, so the bound is reached, not just kept by chance
            with lock:
                inside -= 1

    def work() -> None:
        for _ in range(4):
            enter()

    run_to_the_end([threading.Thread(target=work, daemon=True) for _ in range(3 * limit)])
    assert (inside, most) == (0, limit)


def test_an_error_inside_gives_the_place_back() -> None:
    gate = Gate(1)
    for _ in range(3):
        with pytest.raises(KeyError), gate.pass_through():
            raise KeyError
    entered = threading.Event()

    def enter() -> None:
        with gate.pass_through():
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert entered.wait(SECONDS)
    thread.join(SECONDS)


def test_no_thread_is_left_waiting_when_the_limit_falls_and_climbs_among_them(clock: Clock) -> None:
    gate, lock = Gate(16), threading.Lock()

    def work() -> None:
        for number in range(200):
            with gate.pass_through():
                if number % 7 == 0:
                    with lock:
                        clock.now += 1.0
                    gate.overloaded()
                else:
                    gate.succeeded()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(32)]
    run_to_the_end(threads)


def test_every_place_is_used_again_after_the_limit_has_climbed_back(clock: Clock) -> None:
    gate = Gate(4)
    overload(gate, clock, 5)
    arrived = threading.Semaphore(0)
    leave = threading.Event()

    def enter() -> None:
        with gate.pass_through():
            arrived.release()
            leave.wait(SECONDS)

    threads = [threading.Thread(target=enter, daemon=True) for _ in range(4)]
    with ExitStack() as stack:
        stack.callback(leave.set)
        for thread in threads:
            thread.start()
        assert arrived.acquire(timeout=SECONDS)
        assert not arrived.acquire(timeout=0.05)
        while gate.limit < 4:
            gate.succeeded()
        for _ in range(3):
            assert arrived.acquire(timeout=SECONDS)
    for thread in threads:
        thread.join(SECONDS)

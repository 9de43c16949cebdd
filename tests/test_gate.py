"""gate.py: how many requests it lets through to services of several kinds, in simulation; and nobody is left waiting.

A simulation has a clock of its own: clients that send, are refused, wait and send again, and a service. It is
deterministic; chance comes from a seed.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.observe.metrics import Metrics
from pipeline.storage import limiter as module
from pipeline.storage.limiter import Gate

SECONDS = 20.0
TURNAROUND = 0.0005


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


def pinned(limit: int) -> Gate:
    """A gate whose limit does not move."""
    gate = Gate(limit)
    gate._limit, gate._holds = limit, True
    return gate


def let_through(gate: Gate, count: int) -> None:
    for _ in range(count):
        with gate.pass_through():
            gate.succeeded()


# Simulation


class Service:
    """A service that answers after a while."""

    def __init__(self, latency: Callable[[Random], float], allowed: int | None = None, workers: int = 10**6) -> None:
        self.latency, self.allowed, self.workers = latency, allowed, workers
        self.inside = 0
        self._busy: list[float] = []

    def ask(self, now: float, random: Random) -> tuple[bool, float]:
        """Return whether the request is taken, and when the answer comes; refusals are quick."""
        if self.allowed is not None and self.inside >= self.allowed:
            return False, now + 0.002
        self.inside += 1
        begin = max(now, heapq.heappop(self._busy)) if len(self._busy) >= self.workers else now
        end = begin + self.latency(random)
        if self.workers < 10**6:
            heapq.heappush(self._busy, end)
        return True, end


class Turn:
    """Takes the place of the lock that a client waits at."""

    def __init__(self, released: Callable[[], None]) -> None:
        self.release = released


class Client:
    def __init__(self) -> None:
        self.place: Any = module._Pass()
        self.refusals = 0


class Simulation:
    """Some clients share a gate until so many requests have succeeded; what is refused waits with full jitter."""

    def __init__(self, gate: Gate, service: Service, clients: int = 16, seed: int = 0) -> None:
        self.gate, self.service, self.random, self.clock = gate, service, Random(seed), Clock()
        self.sent = self.refused = self.succeeded = self._number = self._wanted = 0
        self.limits: list[tuple[float, int]] = []
        self.notes: list[str] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._idle = [Client() for _ in range(clients)]

    @property
    def seconds(self) -> float:
        return self.clock.now - 1000.0

    def run(self, requests: int) -> Simulation:
        self._wanted = self.succeeded + requests
        for client in self._idle:
            self._later(self.random.random() * TURNAROUND, self._arrive, client)
        self._idle = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "time", self.clock)
            while self._events and self.succeeded < self._wanted:
                self.clock.now, _, event, arguments = heapq.heappop(self._events)
                event(*arguments)
                assert 1 <= self.gate.limit <= self.gate._ceiling
                assert not self.gate.waiting or self.gate._in_flight >= self.gate.limit
        assert self.succeeded == self._wanted, "somebody was forgotten"
        return self

    def rate(self) -> float:
        return self.succeeded / self.seconds

    def average_limit(self) -> float:
        """The average of the later half of the requests."""
        half = [limit for _, limit in self.limits[len(self.limits) // 2 :]]
        return sum(half) / len(half)

    def _later(self, seconds: float, event: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.clock.now + seconds, self._number, event, arguments))

    def _arrive(self, client: Client) -> None:
        client.place.handed_over = Turn(lambda: self._later(0.00005, self._go, client))
        if self.gate._ask(client.place):
            self._go(client)

    def _go(self, client: Client) -> None:
        self.sent += 1
        self.limits.append((self.seconds, self.gate.limit))
        taken, end = self.service.ask(self.clock.now, self.random)
        self._later(end - self.clock.now, self._return, client, taken)

    def _return(self, client: Client, taken: bool) -> None:
        if taken:
            self.service.inside -= 1
            self.succeeded += 1
            client.refusals = 0
            note = self.gate._succeed()
            wait = TURNAROUND * (0.5 + self.random.random())
        else:
            self.refused += 1
            client.refusals += 1
            note = self.gate._cut(client.place)
            wait = self.random.random() * 2 ** min(client.refusals - 1, 5)
        self.gate._leave(client.place)
        if note:
            self.notes.append(note)
        self._later(wait, self._arrive, client)


def about(seconds: float) -> Callable[[Random], float]:
    return lambda random: seconds * random.uniform(0.7, 1.3)


def constant(seconds: float) -> Callable[[Random], float]:
    return lambda _: seconds


def log_normal(seconds: float) -> Callable[[Random], float]:
    return lambda random: seconds * random.lognormvariate(-0.125, 0.5)


def with_stalls(seconds: float) -> Callable[[Random], float]:
    return lambda random: seconds * (0.8 if random.random() < 0.97 else 7.5)


LATENCIES = [constant, about, log_normal, with_stalls]


def test_the_full_number_is_in_flight_after_a_few_round_trips() -> None:
    simulation = Simulation(Gate(16), Service(constant(0.042))).run(200)
    assert simulation.limits[0][1] == 4
    assert next(moment for moment, limit in simulation.limits if limit == 16) < 0.1
    assert simulation.notes == ["16 requests in flight"]


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_service_that_is_only_far_away_gets_all_that_may_be_in_flight(
    latency: Callable[[float], Callable[[Random], float]], seed: int
) -> None:
    adaptive = Simulation(Gate(16), Service(latency(0.042)), seed=seed).run(4000)
    fixed = Simulation(pinned(16), Service(latency(0.042)), seed=seed).run(4000)
    assert adaptive.rate() >= 0.97 * fixed.rate()
    assert adaptive.gate.limit == 16


def test_a_limit_that_noise_made_too_low_climbs_again() -> None:
    gate = Gate(16)
    slow = Service(about(0.042), workers=4)
    simulation = Simulation(gate, slow).run(1000)
    assert gate.limit < 12
    slow.workers = 10**6
    simulation.run(4000)
    assert gate.limit == 16


@pytest.mark.parametrize("seed", range(4))
def test_it_settles_near_the_knee_and_loses_no_throughput(seed: int) -> None:
    service = Service(about(0.02), workers=4)
    simulation = Simulation(Gate(32), service, clients=32, seed=seed).run(4000)
    assert 4 <= simulation.average_limit() <= 10
    assert simulation.rate() >= 0.95 * 4 / 0.02
    assert any("more are not faster" in note for note in simulation.notes)


def test_probes_beyond_the_knee_become_rare() -> None:
    simulation = Simulation(Gate(64), Service(constant(0.02), workers=4), clients=64).run(8000)
    settled = simulation.gate._settled
    probes = [
        moment for (_, former), (moment, limit) in itertools.pairwise(simulation.limits) if former == settled < limit
    ]
    gaps = [after - before for before, after in itertools.pairwise(probes)]
    assert len(probes) >= 3
    assert gaps == sorted(gaps)
    assert gaps[-1] > 3 * gaps[0]


@pytest.mark.parametrize("latency", LATENCIES[:3])
@pytest.mark.parametrize("allowed", [1, 3, 6, 8, 12])
def test_a_service_that_refuses_is_kept_as_busy_as_it_allows(
    latency: Callable[[float], Callable[[Random], float]], allowed: int
) -> None:
    adaptive = Simulation(Gate(16), Service(latency(0.02), allowed)).run(1500)
    fixed = Simulation(pinned(allowed), Service(latency(0.02), allowed)).run(1500)
    assert adaptive.refused < 0.02 * adaptive.sent
    assert fixed.refused == 0
    assert adaptive.rate() >= 0.9 * fixed.rate()


def test_what_was_refused_is_remembered_tried_again_rarely_and_told() -> None:
    simulation = Simulation(Gate(16), Service(about(0.02), 8)).run(13_000)
    assert simulation.notes[:2] == [
        "refused with 16 requests in flight at most, 8 from now on",
        "8 requests in flight (refused at 9)",
    ]
    # More than thirty seconds: tries after 2, 4, 8 and 16 of them, each of which halves the limit for a moment.
    assert simulation.notes[2:] == ["refused with 9 requests in flight at most, 4 from now on"] * 4
    assert simulation.gate.state() == {
        "limit": 8,
        "in_flight": simulation.gate._in_flight,
        "peak": 16,
        "refused": simulation.refused,
        "refused_at": 9,
    }
    assert simulation.refused <= 8 + 2 * 4


@pytest.mark.parametrize("allowed", [1, 3, 8])
def test_it_climbs_beyond_a_former_refusal_when_the_service_allows_more(allowed: int) -> None:
    service = Service(about(0.02), allowed)
    simulation = Simulation(Gate(16), service).run(500 * allowed)
    assert simulation.average_limit() == pytest.approx(allowed, abs=0.5)
    service.allowed = None
    before = simulation.seconds
    while simulation.gate.limit < 16:
        simulation.run(10)
        assert simulation.seconds < before + 35
    assert simulation.gate.state()["refused_at"] is None
    assert any("more than were refused before" in note for note in simulation.notes)


def test_it_follows_a_service_that_allows_less_than_before() -> None:
    service = Service(about(0.02), 12)
    simulation = Simulation(Gate(16), service).run(3000)
    service.allowed = 5
    before = simulation.refused
    simulation.run(3000)
    assert simulation.gate.state()["refused_at"] == 6
    assert simulation.refused - before < 40


def test_after_an_outage_it_comes_back_within_seconds() -> None:
    service = Service(about(0.02))
    simulation = Simulation(Gate(16), service).run(1000)
    service.allowed = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", simulation.clock)
        while simulation._events and simulation.refused < 60:
            simulation.clock.now, _, event, arguments = heapq.heappop(simulation._events)
            event(*arguments)
    assert simulation.gate.limit == 1
    service.allowed = None
    simulation.run(1)
    back = simulation.seconds
    while simulation.gate.limit < 16:
        simulation.run(10)
    assert simulation.seconds < back + 30


def test_a_single_refusal_among_many_successes_leaves_no_memory() -> None:
    service = Service(about(0.02))
    simulation = Simulation(Gate(16), service).run(2000)
    service.allowed = service.inside
    while not simulation.refused:
        simulation.run(1)
    service.allowed = None
    simulation.run(300)
    assert (simulation.gate.limit, simulation.gate.state()["refused_at"]) == (16, None)


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_what_the_application_does_not_fill_does_not_climb_and_is_no_knee(clients: int) -> None:
    simulation = Simulation(Gate(16), Service(about(0.02)), clients=clients).run(1000)
    assert simulation.gate.limit == 4
    assert simulation.notes == []


def test_a_pause_of_the_application_is_no_knee() -> None:
    gate, clock = Gate(64), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        for _ in range(50):
            let_through(gate, 7)
            clock.now += 60.0
    assert (gate.limit, gate._rounds) == (4, 0)
    simulation = Simulation(gate, Service(about(0.02)), clients=80).run(2000)
    assert simulation.gate.limit == 64


@settings(max_examples=40, deadline=None)
@given(
    ceiling=st.integers(1, 40),
    clients=st.integers(1, 50),
    allowed=st.none() | st.integers(1, 20),
    workers=st.sampled_from([1, 3, 9, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_the_limit_stays_in_its_bounds_and_nobody_is_forgotten_whatever_the_service_does(
    ceiling: int, clients: int, allowed: int | None, workers: int, seed: int
) -> None:
    service = Service(log_normal(0.02), allowed, workers)
    simulation = Simulation(Gate(ceiling), service, clients, seed)
    for _ in range(3):
        simulation.run(200)
        service.allowed = simulation.random.choice([None, 1, 2, 7])


# Refusals of one moment


def enter(gate: Gate, count: int) -> list[module._Pass]:
    passes = [module._Pass() for _ in range(count)]
    for one in passes:
        assert gate._ask(one)
    return passes


@pytest.mark.parametrize("inside", [True, False])
def test_all_refusals_of_what_was_in_flight_halve_once(inside: bool) -> None:
    gate = pinned(16)
    passes = enter(gate, 16)
    for one in passes[8:]:
        if inside:
            gate._cut(one)
            gate._leave(one)
        else:
            gate._leave(one)
            gate._cut(one)
    assert (gate.limit, gate.state()["refused"], gate.state()["refused_at"]) == (8, 8, 9)
    for one in passes[:8]:
        gate._leave(one)
    late = enter(gate, 8)
    gate._cut(late[0])
    assert gate.limit == 4


def test_a_refusal_that_comes_late_belongs_to_the_moment_of_its_request() -> None:
    gate = pinned(16)
    first, last, *_ = enter(gate, 16)
    gate._cut(first)
    gate._leave(first)
    gate._leave(last)
    gate._cut(last)
    assert gate.limit == 8


def test_one_that_is_alone_is_refused_and_the_limit_is_one(clock: Clock) -> None:
    gate = Gate(5)
    for _ in range(20):
        clock.now += 1.0
        with gate.pass_through():
            pass
        gate.overloaded()
    assert gate.state() == {"limit": 1, "in_flight": 0, "peak": 1, "refused": 20, "refused_at": 2}
    with gate.pass_through():
        pass


# What is told


def test_halving_is_told_in_the_log_and_not_while_others_are_held_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(16)
    with caplog.at_level(logging.INFO, "pipeline"), gate.pass_through():
        monkeypatch.setattr(module.logger, "filters", [lambda _: not gate._lock.locked()])
        gate.overloaded()
    assert caplog.messages == ["storage: refused with 4 requests in flight at most, 1 from now on"]


def test_reports_set_gauges_and_count_each_refusal_once() -> None:
    gate = pinned(16)
    for one in enter(gate, 12)[9:]:
        gate._cut(one)
        gate._leave(one)
    first, second = Metrics(), Metrics()
    gate.report(first)
    gate.report(second)
    found, again = first.as_dict(), second.as_dict()
    assert found["counters"] == {"requests_refused": 3}
    assert again["counters"] == {}
    for told in (found, again):
        assert {name: (entry["last"], entry["max"]) for name, entry in told["gauges"].items()} == {
            "requests_in_flight": (6, 12),
            "requests_refused_at": (10, 10),
        }


def test_a_report_of_a_gate_without_refusal_has_one_gauge() -> None:
    gate, metrics = Gate(16), Metrics()
    let_through(gate, 3)
    gate.report(metrics)
    found = metrics.as_dict()
    assert (list(found["gauges"]), found["counters"]) == (["requests_in_flight"], {})
    assert found["gauges"]["requests_in_flight"]["max"] == 1


# Threads


def run_to_the_end(threads: list[threading.Thread]) -> None:
    """Run threads, which are daemons so that one left waiting fails this test and not the whole run."""
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [thread for thread in threads if thread.is_alive()]


@pytest.mark.parametrize("limit", [1, 3])
def test_at_most_the_limit_are_inside_at_once(limit: int) -> None:
    gate, inside, most, lock = pinned(limit), 0, 0, threading.Lock()
    full = threading.Barrier(limit)
    turns = iter(range(12 * limit))

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
        while next(turns, None) is not None:
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


def test_no_thread_is_left_waiting_when_the_limit_falls_and_climbs_among_them() -> None:
    gate = Gate(16)

    def work() -> None:
        for number in range(200):
            with gate.pass_through():
                if number % 7 == 0:
                    gate.overloaded()
                else:
                    gate.succeeded()

    run_to_the_end([threading.Thread(target=work, daemon=True) for _ in range(32)])
    state = gate.state()
    assert (state["in_flight"], state["refused"], gate.waiting) == (0, 32 * 29, 0)


def test_places_go_to_those_who_wait_in_the_order_in_which_they_came() -> None:
    gate, order = pinned(1), []

    def work(name: str) -> None:
        for _ in range(3):
            with gate.pass_through():
                order.append(name)
                while gate.waiting < 1 and len(order) < 5:  # the other one is always there to be next
                    os.sched_yield()

    run_to_the_end([threading.Thread(target=work, args=(name,), daemon=True) for name in "ab"])
    assert "".join(order) in ("ababab", "bababa")


def test_an_interrupt_while_waiting_gives_no_place_away(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = pinned(1)
    holder, other = module._Pass(), module._Pass()

    class Interrupted(module._Pass):
        def __init__(self, handed_over: bool) -> None:
            super().__init__()
            test = self

            class Lock:
                def acquire(self, blocking: bool = True) -> None:
                    if blocking:
                        if handed_over:
                            gate._leave(holder)
                            assert test.inside
                        raise KeyboardInterrupt

                def release(self) -> None:
                    pass

            self.handed_over = Lock()  # type: ignore[assignment]

    for handed_over in (False, True):
        assert gate._ask(holder)
        gate._local.one = Interrupted(handed_over)
        with pytest.raises(KeyboardInterrupt), gate.pass_through():
            pass
        assert gate.waiting == 0
        if not handed_over:
            gate._leave(holder)
        assert gate.state()["in_flight"] == 0
        assert gate._ask(other)
        gate._leave(other)

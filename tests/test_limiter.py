"""The concurrency limiter: its rule step by step, against simulated services, and with threads."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from embedded_supabase.files import wait_until
from pipeline.observe.metrics import Metrics
from pipeline.storage import limiter as module
from pipeline.storage.limiter import ConcurrencyLimiter

SECONDS = 20.0
#: Seconds between a response and the next request of the same client.
TURNAROUND = 0.001


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the limiter, set by the test."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def waiting(limiter: ConcurrencyLimiter) -> int:
    """Return how many threads wait for a slot."""
    return len(limiter._condition._waiters)  # type: ignore[attr-defined]


def full_round(limiter: ConcurrencyLimiter) -> None:
    """Send as many requests at once as the limit allows; all succeed."""
    with ExitStack() as stack:
        count = limiter.limit
        for _ in range(count):
            stack.enter_context(limiter.slot())
        for _ in range(count):
            limiter.succeeded()


def refuse(limiter: ConcurrencyLimiter, requests: int = 1) -> None:
    """Have so many requests refused that are in flight together."""
    with ExitStack() as stack:
        generations = [stack.enter_context(limiter.slot()) for _ in range(requests)]
        for generation in generations:
            limiter.overloaded(generation)


def test_the_limit_doubles_with_each_full_round_up_to_its_maximum() -> None:
    limiter = ConcurrencyLimiter(20)
    seen = []
    for _ in range(4):
        seen.append(limiter.limit)
        full_round(limiter)
    assert seen == [4, 8, 16, 20]


def test_rounds_that_leave_room_do_not_raise_the_limit() -> None:
    limiter = ConcurrencyLimiter(16)
    for _ in range(100):
        with limiter.slot():
            limiter.succeeded()
    assert limiter.limit == 4


def test_refusals_of_requests_in_flight_together_halve_the_limit_once() -> None:
    limiter = ConcurrencyLimiter(16)
    full_round(limiter)
    refuse(limiter, requests=8)
    assert limiter.limit == 4


def test_the_limit_returns_to_one_below_what_was_refused(clock: SimpleNamespace) -> None:
    limiter = ConcurrencyLimiter(16)
    full_round(limiter)
    refuse(limiter)
    for _ in range(10):
        full_round(limiter)
    assert limiter.limit == 7


def test_the_ceiling_is_tried_again_at_intervals_that_grow(clock: SimpleNamespace) -> None:
    limiter = ConcurrencyLimiter(16)
    full_round(limiter)
    refuse(limiter)
    tries = []
    for tick in range(2000):
        clock.now = 1000 + tick / 10
        full_round(limiter)
        if limiter.limit == 8:
            tries.append(tick / 10)
            refuse(limiter)
    gaps = [round(after - before) for before, after in itertools.pairwise(tries)]
    assert round(tries[0]) == 2
    assert gaps[:4] == [4, 8, 16, 30]
    assert set(gaps[4:]) == {30}


def test_a_service_that_takes_more_than_before_gets_more(clock: SimpleNamespace) -> None:
    limiter = ConcurrencyLimiter(16)
    full_round(limiter)
    refuse(limiter)
    clock.now += 3
    for _ in range(20):
        full_round(limiter)
    assert limiter.limit == 16


def test_one_request_that_is_refused_leaves_a_limit_of_one() -> None:
    limiter = ConcurrencyLimiter(1)
    refuse(limiter)
    assert limiter.limit == 1


def test_a_report_sets_the_gauge_and_counts_each_refusal_once() -> None:
    limiter, metrics = ConcurrencyLimiter(16), Metrics()
    full_round(limiter)
    refuse(limiter, requests=3)
    limiter.report(metrics)
    limiter.report(metrics)
    found = metrics.as_dict()
    assert found["counters"] == {"requests_refused": 3}
    assert found["gauges"]["requests_in_flight"]["max"] == 4


class Simulation:
    """Clients that share a limiter and a service, in simulated time; a refused one waits with full jitter.

    Arguments:
        allowed: requests that the service takes at once; it refuses a further one at once.
        latency: draws the seconds that a request takes.
    """

    def __init__(
        self, limiter: ConcurrencyLimiter, allowed: int, latency: Callable[[Random], float], seed: int
    ) -> None:
        self.limiter, self.allowed, self.latency, self.random = limiter, allowed, latency, Random(seed)
        self.now, self.sent, self.refused, self.succeeded, self._inside, self._number = 1000.0, 0, 0, 0, 0, 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._waiting: deque[int] = deque()
        self._refusals: dict[int, int] = {}

    def run(self, requests: int, clients: int = 16) -> Simulation:
        for client in range(clients):
            self._later(0.0, self._arrive, client)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
            while self.succeeded < requests:
                self.now, _, event, arguments = heapq.heappop(self._events)
                event(*arguments)
        return self

    def rate(self) -> float:
        return self.succeeded / (self.now - 1000)

    def _later(self, seconds: float, event: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.now + seconds, self._number, event, arguments))

    def _arrive(self, client: int) -> None:
        self._waiting.append(client)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.limiter._in_flight < self.limiter.limit:
            client, slot = self._waiting.popleft(), self.limiter.slot()
            generation = slot.__enter__()
            self.sent += 1
            taken = self._inside < self.allowed
            self._inside += taken
            self._later(self.latency(self.random) if taken else 0.001, self._respond, client, slot, generation, taken)

    def _respond(self, client: int, slot: Any, generation: int, taken: bool) -> None:
        if taken:
            self._inside -= 1
            self.succeeded += 1
            self._refusals[client] = 0
            self.limiter.succeeded()
            wait = TURNAROUND
        else:
            self.refused += 1
            self._refusals[client] = self._refusals.get(client, 0) + 1
            self.limiter.overloaded(generation)
            wait = self.random.random() * 2 ** min(self._refusals[client] - 1, 5)
        slot.__exit__(None, None, None)
        self._later(wait, self._arrive, client)
        self._admit()


LATENCIES: list[Callable[[Random], float]] = [
    lambda random: 0.02,
    lambda random: 0.02 * random.uniform(0.7, 1.3),
    lambda random: 0.02 * random.lognormvariate(-0.125, 0.5),
]


def fixed(limit: int) -> ConcurrencyLimiter:
    limiter = ConcurrencyLimiter(limit)
    limiter.limit = limit
    return limiter


@pytest.mark.parametrize("latency", LATENCIES, ids=["constant", "uniform", "log-normal"])
@pytest.mark.parametrize("allowed", [1, 3, 6, 8, 12])
def test_a_service_that_refuses_is_kept_busy_and_seldom_asked_too_much(
    latency: Callable[[Random], float], allowed: int
) -> None:
    adaptive = Simulation(ConcurrencyLimiter(16), allowed, latency, seed=1).run(3000)
    ideal = Simulation(fixed(allowed), allowed, latency, seed=1).run(3000)
    assert ideal.refused == 0
    assert adaptive.refused < 0.02 * adaptive.sent
    assert adaptive.rate() >= 0.9 * ideal.rate()


def test_at_most_the_limit_are_in_flight_and_no_thread_is_left_waiting() -> None:
    limiter, random, lock = ConcurrencyLimiter(8), Random(0), threading.Lock()
    inside = most = 0

    def work(_: int) -> None:
        nonlocal inside, most
        with limiter.slot() as generation:
            with lock:
                inside += 1
                most = max(most, inside)
                refused = random.random() < 0.05
            if refused:
                limiter.overloaded(generation)
            else:
                limiter.succeeded()
            with lock:
                inside -= 1

    with ThreadPoolExecutor(32) as pool:
        for done in [pool.submit(work, number) for number in range(3000)]:
            done.result(SECONDS)
    assert most <= 8
    assert (waiting(limiter), limiter._in_flight) == (0, 0)


def test_an_error_in_the_block_frees_the_slot() -> None:
    limiter = ConcurrencyLimiter(1)
    with pytest.raises(KeyError), limiter.slot():
        raise KeyError
    with limiter.slot():
        pass


def test_a_thread_that_waits_is_admitted_when_a_slot_is_free() -> None:
    limiter = ConcurrencyLimiter(1)
    entered = threading.Event()

    def enter() -> None:
        with limiter.slot():
            entered.set()

    thread = threading.Thread(target=enter)
    with limiter.slot():
        thread.start()
        assert wait_until(lambda: waiting(limiter) == 1, SECONDS)
        assert not entered.is_set()
    thread.join(SECONDS)
    assert entered.is_set()

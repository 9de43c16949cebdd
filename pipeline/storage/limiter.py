"""How many requests may be in flight: as many as the service takes, found out by asking more of it and looking.

What is known of windows in TCP, applied to requests as in https://github.com/Netflix/concurrency-limits. A round is as
many successes as the limit. The limit begins low and doubles each round (slow start, RFC 5681) while that pays; the
knee is where it did not: throughput times latency without a queue (BBR, draft-ietf-ccwg-bbr). Overload halves it. Where
the service refused is remembered (W_max of CUBIC, RFC 9438): the limit comes back to just below, stays, and is tried
beyond at intervals that grow. Rounds in which there was room, and nobody waited, are no evidence, and do not raise the
limit (RFC 7661).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.observe.logger import get_logger
from pipeline.observe.metrics import Metrics

logger = get_logger(__name__)

_START = 4
#: Rounds that decide; fewer are noise.
_ROUNDS = 3
#: So much of the growth that it was meant for makes a higher limit worth it; so much is added to an estimated knee.
_WORTH, _MARGIN = 0.75, 1.1
#: After so many successes a refusal at the same limit is an accident, and the limit none the worse for it.
_MANY = 100
#: Seconds until more is tried: after a knee, where that costs nothing, and after a refusal; twice as many each time.
_KNEE_WAIT, _REFUSAL_WAIT, _LONGEST_WAIT = 0.25, 2.0, 30.0


class _Place(threading.local):
    """What the gate knows of a thread: the lock that it waits at, whether it is inside, and since which cut."""

    def __init__(self) -> None:
        self.one = _Pass()


class _Pass:
    __slots__ = ("cuts", "handed_over", "inside")

    def __init__(self) -> None:
        self.handed_over = threading.Lock()
        self.handed_over.acquire()
        self.inside, self.cuts = False, -1


class Gate:
    """Let at most `limit` threads of this process through, in the order in which they came; the limit adapts itself."""

    def __init__(self, ceiling: int) -> None:
        self._lock, self._local = threading.Lock(), _Place()
        self._queue: deque[_Pass] = deque()  # where somebody waits, there is no room
        self._in_flight = self._peak = self._refused = self._told = self._cuts = 0
        self._ceiling = self._roof = ceiling  # the roof is how far the limit may climb for now
        self._limit = self._step = min(_START, ceiling)
        self._since, self._successes, self._idle, self._draining = 0.0, 0, 0, 0  # this round
        self._measured, self._seconds, self._rounds, self._proof = 0.0, 0.0, 0, 0  # the rounds at this limit
        self._base: tuple[int, float] | None = None  # the limit and throughput that growth is held against
        self._refused_at: int | None = None
        self._proven = self._settled = 0
        self._holds, self._judges = False, True
        self._wait, self._next_try = _REFUSAL_WAIT, 0.0

    @property
    def limit(self) -> int:
        """Return how many may be in flight now."""
        return self._limit

    @property
    def waiting(self) -> int:
        """Return how many threads wait for their turn."""
        return len(self._queue)

    def state(self) -> dict[str, int | None]:
        """Return the limit, how many are in flight and were at most, how many were refused, and from where on."""
        with self._lock:
            numbers = {"limit": self._limit, "in_flight": self._in_flight, "peak": self._peak, "refused": self._refused}
            return {**numbers, "refused_at": self._refused_at}

    def report(self, metrics: Metrics) -> None:
        """Set the gauges, and count what was refused since the last report."""
        state = self.state()
        with self._lock:
            refused, self._told = self._refused - self._told, self._refused
        metrics.gauge("requests_in_flight", min(state["limit"] or 0, state["peak"] or 0), state["peak"])
        if state["refused_at"] is not None:
            metrics.gauge("requests_refused_at", state["refused_at"])
        if refused:
            metrics.count("requests_refused", refused)

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """Wait until there is room, and hold it for the block."""
        one = self._local.one
        with self._lock:
            waits = not self._ask(one)
        if waits:
            try:
                one.handed_over.acquire()
            except BaseException:  # an interrupt: nobody else may wait for a place that was given to us
                with self._lock:
                    self._give_up(one)
                raise
        try:
            yield
        finally:
            with self._lock:
                self._leave(one)

    def succeeded(self) -> None:
        """Count a success; call it inside the block."""
        with self._lock:
            note = self._succeed()
        if note:
            logger.info("storage: %s", note)

    def overloaded(self) -> None:
        """Halve the limit, once for all the refusals of the same moment; call it inside the block or right after it."""
        with self._lock:
            note = self._cut(self._local.one)
        if note:
            logger.info("storage: %s", note)

    # The line; all that follows holds the lock

    def _ask(self, one: _Pass) -> bool:
        """Take a place or line up; return whether there was room."""
        if self._in_flight >= self._limit:
            self._queue.append(one)
            return False
        if not self._in_flight:
            self._begin_round()
        self._enter(one)
        return True

    def _enter(self, one: _Pass) -> None:
        one.inside, one.cuts = True, self._cuts
        self._in_flight += 1
        if self._in_flight > self._peak:
            self._peak = self._in_flight

    def _leave(self, one: _Pass) -> None:
        one.inside = False
        self._in_flight -= 1
        if self._queue:
            self._admit()

    def _admit(self) -> None:
        while self._queue and self._in_flight < self._limit:
            one = self._queue.popleft()
            self._enter(one)
            one.handed_over.release()

    def _give_up(self, one: _Pass) -> None:
        if one in self._queue:
            self._queue.remove(one)
            return
        one.handed_over.acquire(blocking=False)
        self._leave(one)

    # The limit

    def _succeed(self) -> str | None:
        if self._draining:  # sent before the limit fell: no measure of the new one
            self._draining -= 1
            if not self._draining:
                self._begin_round()
            return None
        self._successes += 1
        if not self._queue and self._in_flight < self._ceiling:
            self._idle += 1
        return self._end_round() if self._successes >= self._limit else None

    def _cut(self, one: _Pass) -> str | None:
        self._refused += 1
        at = self._in_flight + (not one.inside)
        if 0 <= one.cuts < self._cuts:  # let in before the last cut: the same moment, and the last to see it knows best
            if self._refused_at is not None and at < self._refused_at:
                self._remember(at)
                self._limit = self._step = min(self._limit, self._roof)
            return None
        before, at = self._limit, min(at, self._limit)
        tried = self._refused_at is not None and before >= self._refused_at
        self._wait = min(2 * self._wait, _LONGEST_WAIT) if tried else _REFUSAL_WAIT
        if before > self._proven:
            self._remember(at)
        elif self._proof + self._successes < _MANY:
            self._proven = at - 1
            self._remember(at)
        self._cuts += 1
        self._base, self._holds, self._judges = None, False, False
        self._set(max(1, min(at // 2, self._roof)))
        self._step = self._limit
        return f"refused with {before} requests in flight at most, {self._limit} from now on"

    def _remember(self, at: int) -> None:
        self._refused_at = max(2, at, self._proven + 1)
        self._roof = self._refused_at - 1

    def _begin_round(self) -> None:
        self._since, self._successes, self._idle = time.monotonic(), 0, 0

    def _end_round(self) -> str | None:
        """Decide what the round says about the limit; return what there is to tell."""
        count, idle, seconds = self._successes, self._idle, time.monotonic() - self._since
        self._begin_round()
        self._proof += count
        if idle == count:
            return None
        if 4 * idle <= count:
            if self._rounds >= 4 * _ROUNDS:  # of a long time at one limit, the later half
                self._measured, self._seconds, self._rounds = self._measured / 2, self._seconds / 2, self._rounds // 2
            self._measured += count
            self._seconds += seconds
            self._rounds += 1
            self._proven = max(self._proven, self._limit)
        if not self._holds:
            return self._climb()
        if self._limit < self._ceiling and self._since >= self._next_try and self._rounds >= _ROUNDS:
            self._holds, self._base, self._step = False, (self._limit, self._throughput()), self._limit
            if self._limit >= self._roof:
                self._roof, self._step = self._limit + 1, 1
            self._raise()
        return None

    def _climb(self) -> str | None:
        """Go on, stay for another round, or settle."""
        limit, note, enough = self._limit, None, self._rounds >= _ROUNDS
        if self._refused_at is not None and limit >= self._refused_at:
            if not enough:
                return None
            self._refused_at, self._roof, self._wait = None, self._ceiling, _REFUSAL_WAIT
            note = f"{limit} requests in flight, more than were refused before"
        if self._judges and self._rounds:
            lower, former = self._base or (limit, self._throughput())
            growth = self._throughput() / former
            knee = lower * growth * _MARGIN if growth >= _MARGIN else lower
            worth = knee >= _WORTH * limit
            if not enough and (not worth or limit >= self._roof):
                return note
            if not worth:
                return self._settle(math.ceil(knee), "more are not faster")
            if self._base is None or 3 * limit >= 4 * lower:  # smaller steps are not to be told from noise
                self._base = (limit, self._throughput())
        if limit >= self._roof:
            return self._settle(limit, f"refused at {self._refused_at}" if self._refused_at else "") or note
        self._raise()
        return note

    def _settle(self, limit: int, why: str) -> str | None:
        former, self._settled = self._settled, limit
        self._holds = self._judges = True
        if limit < self._roof:
            self._wait = min(2 * self._wait, _LONGEST_WAIT) if limit == former else _KNEE_WAIT
        self._next_try = self._since + self._wait
        if limit != self._limit:
            self._set(limit)
        return f"{limit} requests in flight{f' ({why})' if why else ''}" if limit != former else None

    def _raise(self) -> None:
        step, self._step = self._step, 2 * self._step
        self._set(min(self._roof, self._limit + step))

    def _set(self, limit: int) -> None:
        self._draining = self._in_flight if limit < self._limit else 0
        self._limit = limit
        self._measured, self._seconds, self._rounds, self._proof = 0.0, 0.0, 0, 0
        self._begin_round()
        self._admit()

    def _throughput(self) -> float:
        return max(self._measured, 1e-9) / max(self._seconds, 1e-9)

"""How many requests may be in flight: additive increase, multiplicative decrease, with a slow start.

The limit begins at four and doubles after each round, which is as many successes as the limit (slow start, RFC 5681).
An overload response halves it. The ceiling is then one below the number that was refused: the limit doubles up to it,
stays, and tries one more after an interval that grows while it is refused (W_max of CUBIC, RFC 9438). A round in which
no request had to wait is no evidence that the service takes more, and does not raise the limit (RFC 7661).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.observe.logger import get_logger
from pipeline.observe.metrics import Metrics

logger = get_logger(__name__)

_START = 4
#: Seconds until the ceiling is tried again after a refusal: the first time, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 30.0


class ConcurrencyLimiter:
    """Let at most `limit` requests of this process be in flight.

    Arguments:
        maximum: the limit never exceeds it.
    """

    def __init__(self, maximum: int) -> None:
        self._condition = threading.Condition()
        self._maximum = self._ceiling = maximum
        self._limit = min(_START, maximum)
        self._in_flight = self._peak = self._refused = self._reported = self._waiting = 0
        self._successes, self._was_full, self._generation = 0, False, 0
        self._wait, self._next_try = _FIRST_WAIT, 0.0

    @property
    def limit(self) -> int:
        """Return how many requests may be in flight now."""
        return self._limit

    @property
    def waiting(self) -> int:
        """Return how many threads wait to send a request."""
        return self._waiting

    @contextmanager
    def slot(self) -> Iterator[int]:
        """Wait until a request may be sent, and count it as in flight for the block; yield what `overloaded` takes."""
        with self._condition:
            while self._in_flight >= self._limit:
                self._waiting += 1
                try:
                    self._condition.wait()
                finally:
                    self._waiting -= 1
            self._in_flight += 1
            self._peak = max(self._peak, self._in_flight)
            self._was_full |= self._in_flight >= self._limit
            generation = self._generation
        try:
            yield generation
        finally:
            with self._condition:
                self._in_flight -= 1
                if self._waiting:
                    self._condition.notify()

    def succeeded(self) -> None:
        """Count a success."""
        with self._condition:
            self._successes += 1
            if self._successes < self._limit:
                return
            if self._limit == self._ceiling < self._maximum and time.monotonic() >= self._next_try:
                self._ceiling += 1
            if self._was_full and self._limit < self._ceiling:
                self._limit = min(2 * self._limit, self._ceiling)
                self._condition.notify_all()
            self._successes, self._was_full = 0, False

    def overloaded(self, generation: int) -> None:
        """Halve the limit; several refusals of requests that were in flight together count as one."""
        with self._condition:
            self._refused += 1
            if generation != self._generation:
                return
            refused = self._limit
            again = refused == self._ceiling < self._maximum  # a try beyond a former refusal
            self._wait = min(2 * self._wait, _LONGEST_WAIT) if again else _FIRST_WAIT
            self._next_try = time.monotonic() + self._wait
            self._ceiling, self._limit = max(1, refused - 1), max(1, refused // 2)
            self._generation += 1
            self._successes, self._was_full = 0, False
        logger.info("storage: refused with %d requests in flight, %d from now on", refused, self._limit)

    def report(self, metrics: Metrics) -> None:
        """Set the gauge of requests in flight, and count what was refused since the last report."""
        with self._condition:
            refused, self._reported = self._refused - self._reported, self._refused
            metrics.gauge("requests_in_flight", min(self._limit, self._peak), self._peak)
        if refused:
            metrics.count("requests_refused", refused)

"""A limit of concurrent requests: additive increase, multiplicative decrease, with a slow start.

The limit starts at four and doubles after each round of as many successes (slow start, RFC 5681). An overload response
halves it and sets the ceiling to one below the refused limit: the limit doubles up to the ceiling, which rises by one
after an interval that grows with each refusal (W_max of CUBIC, RFC 9438). A round in which the limit was not reached
shows nothing about the capacity of the service and does not raise the limit (RFC 7661).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.observe.metrics import Metrics

logger = logging.getLogger(__name__)

_START = 4
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 30.0  # seconds from a refusal until the ceiling rises


class ConcurrencyLimiter:
    """Limit the concurrent requests of this process; the limit never exceeds `maximum`."""

    def __init__(self, maximum: int) -> None:
        self._condition = threading.Condition()
        self._maximum = self._ceiling = maximum
        self.limit = min(_START, maximum)
        self._in_flight = self._peak = self._refused = 0
        self._successes, self._was_full, self._generation = 0, False, 0
        self._wait, self._next_try = _FIRST_WAIT, 0.0

    @contextmanager
    def slot(self) -> Iterator[int]:
        """Wait until a request may start, and count it as in flight; yield the argument for `overloaded`."""
        with self._condition:
            self._condition.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
            self._peak = max(self._peak, self._in_flight)
            self._was_full |= self._in_flight >= self.limit
            generation = self._generation
        try:
            yield generation
        finally:
            with self._condition:
                self._in_flight -= 1
                self._condition.notify()

    def succeeded(self) -> None:
        """Count a success; raise the limit after a round of them."""
        with self._condition:
            self._successes += 1
            if self._successes < self.limit:
                return
            if self.limit == self._ceiling < self._maximum and time.monotonic() >= self._next_try:
                self._ceiling += 1
            if self._was_full and self.limit < self._ceiling:
                self.limit = min(2 * self.limit, self._ceiling)
                self._condition.notify_all()
            self._successes, self._was_full = 0, False

    def overloaded(self, generation: int) -> None:
        """Halve the limit, once for all refused requests that were in flight together."""
        with self._condition:
            self._refused += 1
            if generation != self._generation:
                return
            refused = self.limit
            again = refused == self._ceiling < self._maximum  # refused at a raised ceiling
            self._wait = min(2 * self._wait, _LONGEST_WAIT) if again else _FIRST_WAIT
            self._next_try = time.monotonic() + self._wait
            self._ceiling, self.limit = max(1, refused - 1), max(1, refused // 2)
            self._generation += 1
            self._successes, self._was_full = 0, False
        logger.info("storage: refused with %d requests in flight, %d from now on", refused, self.limit)

    def report(self, metrics: Metrics) -> None:
        """Set the gauge of requests in flight, and count the refusals since the last report."""
        with self._condition:
            refused, self._refused = self._refused, 0
            metrics.gauge("requests_in_flight", min(self.limit, self._peak), self._peak)
        if refused:
            metrics.count("requests_refused", refused)

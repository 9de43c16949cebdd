"""How many requests may be in flight: additive increase, multiplicative decrease, as in TCP (RFC 5681)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Let at most `limit` threads through; overload halves the limit, success lets it climb back to `ceiling`."""

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._limit = float(ceiling)
        self._in_flight = 0
        self._halved_at = -math.inf
        self._condition = threading.Condition()

    @property
    def limit(self) -> int:
        """Return how many may be in flight now."""
        return int(self._limit)

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """Wait until there is room, and hold it for the block."""
        with self._condition:
            self._condition.wait_for(lambda: self._in_flight < int(self._limit))
            self._in_flight += 1
        try:
            yield
        finally:
            with self._condition:
                self._in_flight -= 1
                self._condition.notify()

    def succeeded(self) -> None:
        """Climb by one for each round of successes."""
        with self._condition:
            if self._limit < self._ceiling:
                self._limit = min(float(self._ceiling), self._limit + 1.0 / self._limit)
                self._condition.notify()

    def overloaded(self) -> None:
        """Halve, once for all the refusals of the same moment."""
        with self._condition:
            now = time.monotonic()
            if now - self._halved_at > 0.1:
                self._halved_at = now
                self._limit = max(1.0, self._limit / 2)

"""Simulated latency and limited capacity, for measurements; off by default."""

from __future__ import annotations

import asyncio

from embedded_supabase.storage.errors import too_many

#: Weight of the latest response in the moving average of the overhead; small, because many responses overlap.
_WEIGHT = 0.005


class FaultInjector:
    """Delays uploads and limits concurrent object requests.

    Arguments:
        latency: mean seconds from an upload's headers to its response.
        capacity: maximum number of concurrent object requests, None for no limit.
    """

    def __init__(self, latency: float = 0.0, capacity: int | None = None) -> None:
        self._latency = latency
        self._overhead = 0.0
        self._capacity = capacity
        self._active = 0

    def acquire(self) -> None:
        """Count a request until `release`.

        Raises:
            ApiError: the capacity is exhausted.
        """
        if self._capacity is not None and self._active >= self._capacity:
            raise too_many()
        self._active += 1

    def release(self) -> None:
        """End a request that `acquire` counted."""
        self._active -= 1

    async def delay(self, elapsed: float) -> bool:
        """Wait for the rest of the latency of an upload that began `elapsed` seconds ago; return whether any is left.

        Responses are sent later than the wait ends, because the event loop rounds up to milliseconds and serves other
        requests. The wait is shortened by the mean of this overhead.
        """
        remaining = self._latency - elapsed
        if remaining > self._overhead:
            await asyncio.sleep(remaining - self._overhead)
        return remaining > 0

    def record_response(self, elapsed: float) -> None:
        """Update the mean overhead with a delayed upload whose response took `elapsed` seconds."""
        overhead = self._overhead + _WEIGHT * (elapsed - self._latency)
        self._overhead = min(max(overhead, 0.0), self._latency)

"""A Storage server that is far away, or has its hands full: for measurements, off unless it is asked for."""

from __future__ import annotations

import asyncio

from embedded_supabase.storage.errors import too_many

#: How much the last answer counts in what is known of how late answers are: little, for many are under way.
_WEIGHT = 0.005


class FaultInjector:
    """How long an upload takes, and how many object requests the server has at once.

    Arguments:
        latency: seconds from an upload's headers to its answer, on average; waiting costs nothing, and holds up nobody.
        capacity: object requests at once, None for any number; what comes beyond that is refused.
    """

    def __init__(self, latency: float = 0.0, capacity: int | None = None) -> None:
        self._latency = latency
        self._late = 0.0
        self._capacity = capacity
        self._under_way = 0

    def enter(self) -> None:
        """Take a place for a request, to be given back with `leave`.

        Raises:
            ApiError: there is none left.
        """
        if self._capacity is not None and self._under_way >= self._capacity:
            raise too_many()
        self._under_way += 1

    def leave(self) -> None:
        """Give the place of a request back."""
        self._under_way -= 1

    async def hold_back(self, elapsed: float) -> bool:
        """Wait until an upload that began `elapsed` seconds ago may be answered; return whether that is in time.

        The event loop waits in whole milliseconds, rounded up, has others to serve, and writes the answer in the end:
        by as much as answers were late so far, the wait is shorter.
        """
        rest = self._latency - elapsed
        if rest > self._late:
            await asyncio.sleep(rest - self._late)
        return rest > 0

    def answered(self, elapsed: float) -> None:
        """Take in how many seconds after its headers an upload was answered that was in time."""
        late = self._late + _WEIGHT * (elapsed - self._latency)
        self._late = min(max(late, 0.0), self._latency)

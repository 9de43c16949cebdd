"""A Storage server that is far away, or has its hands full: for measurements, off unless it is asked for."""

from __future__ import annotations

import asyncio

from pipeline.embedded.storage_errors import too_many

#: The event loop waits in whole milliseconds, rounded up: half of one too long on average.
_TICK = 0.0005


class Strain:
    """How long an upload takes, and how many object requests the server has at once.

    Arguments:
        latency: seconds from an upload's headers to its answer, on average; waiting costs nothing, and holds up nobody.
        capacity: object requests at once, None for any number; what comes beyond that is refused.
    """

    def __init__(self, latency: float = 0.0, capacity: int | None = None) -> None:
        self._latency = latency
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

    async def hold_back(self, elapsed: float) -> None:
        """Wait until an upload that began `elapsed` seconds ago may be answered."""
        rest = self._latency - elapsed - _TICK
        if rest > 0:
            await asyncio.sleep(rest)

"""Requests in several threads, a bounded number ahead of their results."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.storage import Storage

Item = TypeVar("Item")
Result = TypeVar("Result")


def pages(items: Iterable[Item], size: int, seconds: float = math.inf) -> Iterator[list[Item]]:
    """Yield the items in lists of up to `size`, sooner if they took so many seconds to come."""
    page: list[Item] = []
    started = time.monotonic()
    for item in items:
        page.append(item)
        if len(page) >= size or time.monotonic() - started > seconds:
            yield page
            page, started = [], time.monotonic()
    if page:
        yield page


def in_threads(
    storage: Storage, threads: int, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield the results of `work` in the order of the items; after an error, start no further request to Storage."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="storage") as executor:
        try:
            for item in items:
                pending.append(executor.submit(work, item))
                if len(pending) > 4 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            storage.stop()
            executor.shutdown(wait=True, cancel_futures=True)
            raise

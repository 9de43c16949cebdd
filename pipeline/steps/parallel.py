"""Requests to Storage, and looks at files, in several threads."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.storage import Storage

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Folders looked at to measure whether the file system is slow.
_TRIED = 20


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


def spread(work: Callable[[Item], Result], items: Sequence[Item], executor: Executor) -> Iterator[Result]:
    """Look at folders, in order; use threads only if the file system is slow.

    On a local disk, switching the GIL between threads takes longer than inspecting a folder.
    """
    begin, worked = time.perf_counter(), time.thread_time()
    yield from map(work, items[:_TRIED])
    seconds, worked = time.perf_counter() - begin, time.thread_time() - worked
    yield from (map if worked > seconds / 2 else executor.map)(work, items[_TRIED:])

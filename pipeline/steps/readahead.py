"""Threads that read and check a bounded number of recognitions ahead of the senders.

Waking a thread takes as long as reading a photo, and the waking thread holds the GIL, which the senders need. So no
thread blocks here for a processor or for memory: a thread that finishes a task takes the next one, and returns to the
pool if there is none. It is started again when few tasks are ready.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Interrupted
from pipeline.steps.read import DECODERS

#: More threads than processors keep several requests to a network file system in flight.
_THREADS = max(8, 2 * (os.cpu_count() or 1))

#: A generator that yields once, between reading and checking, and returns the task's result.
Work = Generator[None, None, Any]


@dataclass(frozen=True)
class _Task:
    work: Work
    size: int
    future: Future[Any]


class ReadAhead:
    """Run tasks in order; the part before the yield waits for files, the part after it is CPU-bound.

    The number of concurrent checks is bounded by the number of processors. If checks are the bottleneck, one or two
    threads do everything; if reads are, more threads read at once.

    Arguments:
        most: maximum number of ready tasks. Below 75 % of it one thread reads, below 50 % more than one.
        room: maximum bytes of all tasks from read to release; a larger task runs alone.
    """

    def __init__(self, most: int, room: int) -> None:
        self._most, self._low, self._half, self._room = most, 0.75 * most, 0.5 * most, room
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
        self._lock = threading.Lock()
        self._unread: deque[_Task] = deque()
        self._unchecked: deque[_Task] = deque()
        self._active = self._checking = self._ready = self._held = 0

    def submit(self, work: Work, size: int) -> Future[Any]:
        """Queue a task of `size` bytes; return the future of its result."""
        task = _Task(work, size, Future())
        with self._lock:
            self._unread.append(task)
            self._start_thread()
        return task.future

    def add(self) -> None:
        """Count a task that is ready to be sent."""
        with self._lock:
            self._ready += 1

    def take(self) -> None:
        """Count a ready task that is being sent now."""
        with self._lock:
            self._ready -= 1
            self._start_thread()

    def release(self, size: int) -> None:
        """Release the bytes of a task; call it once for each started task, also after an error."""
        with self._lock:
            self._held -= size
            self._start_thread()

    def close(self) -> None:
        """Interrupt the queued tasks, and wait for the running ones."""
        with self._lock:
            left = list(self._unread)
            self._unread.clear()
        for task in left:
            task.future.set_exception(Interrupted("The upload was interrupted before it started."))
        self._pool.shutdown(wait=True)

    def _fits(self) -> bool:
        """Return whether there is a queued task, and memory for it."""
        return bool(self._unread) and (not self._held or self._held + self._unread[0].size <= self._room)

    def _start_thread(self) -> None:
        """Start another thread if one is needed; the caller holds the lock."""
        if (
            self._fits()
            and not self._unchecked  # otherwise the processors are the bottleneck
            and self._active < _THREADS
            and self._ready < (self._half if self._active else self._low)
        ):
            self._pool.submit(self._run)
            self._active += 1

    def _run(self) -> None:
        while (found := self._next()) is not None:
            task, checks = found
            more = _advance(task)
            with self._lock:
                if checks:
                    self._checking -= 1
                elif more:
                    self._unchecked.append(task)
            del task, found  # an exception references this frame; the future would be part of a cycle

    def _next(self) -> tuple[_Task, bool] | None:
        """Return a thread's next task, and whether it is to be checked; None if the thread is not needed."""
        with self._lock:
            if self._unchecked and self._checking < DECODERS:
                self._checking += 1
                return self._unchecked.popleft(), True
            ahead = self._ready + len(self._unchecked)
            if self._fits() and ahead < (self._low if self._active > 1 else self._most):
                task = self._unread.popleft()
                self._held += task.size
                return task, False
            self._active -= 1
            return None


def _advance(task: _Task) -> bool:
    """Run a task to its yield or its end; return whether it yielded."""
    try:
        next(task.work)
    except StopIteration as end:
        task.future.set_result(end.value)
    except BaseException as exc:  # noqa: BLE001 (result() raises it)
        task.future.set_exception(exc)
        del task
    else:
        return True
    return False

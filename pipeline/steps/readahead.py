"""Threads that read and check a little ahead of those who send: as many as it takes, and none is woken for each piece.

Waking a thread takes as long as reading a photo, and whoever wakes it has the interpreter meanwhile, for which those
who send are waiting. So nobody waits in line for a processor or for room here: who ends one piece of work goes on with
the next, and who finds nothing to do goes home until little is ready.
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

#: A file system far away answers slowly; more threads than processors keep it asked.
_THREADS = max(8, 2 * (os.cpu_count() or 1))

#: It yields once, between reading and checking; what it returns is its result.
Work = Generator[None, None, Any]


@dataclass(frozen=True)
class _Piece:
    work: Work
    size: int
    future: Future[Any]


class ReadAhead:
    """Carry out work in its order: each piece first waits for files, up to its yield, then it needs a processor.

    As many pieces are checked at once as there are processors. Where that is what takes the time, one or two threads
    do everything; where files come slowly, more and more of them wait for files at once.

    Arguments:
        most: so many pieces are ready at most. Below three quarters of that somebody reads, below half of it not alone.
        room: bytes of all pieces from where they are read until they are given back; a larger one goes alone.
    """

    def __init__(self, most: int, room: int) -> None:
        self._most, self._much, self._half, self._room = most, 0.75 * most, 0.5 * most, room
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
        self._lock = threading.Lock()
        self._unread: deque[_Piece] = deque()
        self._unchecked: deque[_Piece] = deque()
        self._active = self._checking = self._ready = self._held = 0

    def submit(self, work: Work, size: int) -> Future[Any]:
        """Put a piece of work of so many bytes at the end of the line; return what will have its result."""
        piece = _Piece(work, size, Future())
        with self._lock:
            self._unread.append(piece)
            self._begin_another()
        return piece.future

    def add(self) -> None:
        """Count a piece that is ready to be sent."""
        with self._lock:
            self._ready += 1

    def take(self) -> None:
        """Count one that is being sent."""
        with self._lock:
            self._ready -= 1
            self._begin_another()

    def give_back(self, size: int) -> None:
        """Make room again: each piece that was begun gives its size back once, however it ends."""
        with self._lock:
            self._held -= size
            self._begin_another()

    def close(self) -> None:
        """Wait for what is under way, and let the threads go; what was not begun is interrupted."""
        with self._lock:
            left = list(self._unread)
            self._unread.clear()
        for piece in left:
            piece.future.set_exception(Interrupted("It was not begun."))
        self._pool.shutdown(wait=True)

    # What follows holds the lock, or takes it

    def _fits(self) -> bool:
        """Return whether there is something to be read, and room for it."""
        return bool(self._unread) and (not self._held or self._held + self._unread[0].size <= self._room)

    def _begin_another(self) -> None:
        if (
            self._fits()
            and not self._unchecked  # else it is processors that are short
            and self._active < _THREADS
            and self._ready < (self._half if self._active else self._much)
        ):
            self._pool.submit(self._go_on)
            self._active += 1

    def _go_on(self) -> None:
        while (found := self._next()) is not None:
            piece, checks = found
            more = _advance(piece)
            with self._lock:
                if checks:
                    self._checking -= 1
                elif more:
                    self._unchecked.append(piece)
            del piece, found  # what was raised knows this frame, and its future would know itself

    def _next(self) -> tuple[_Piece, bool] | None:
        """Return what a thread does next, and whether it is to be checked; None when there is enough without it."""
        with self._lock:
            if self._unchecked and self._checking < DECODERS:
                self._checking += 1
                return self._unchecked.popleft(), True
            ahead = self._ready + len(self._unchecked)
            if self._fits() and ahead < (self._much if self._active > 1 else self._most):
                piece = self._unread.popleft()
                self._held += piece.size
                return piece, False
            self._active -= 1
            return None


def _advance(piece: _Piece) -> bool:
    """Carry work on to its yield or its end; return whether there is more of it."""
    try:
        next(piece.work)
    except StopIteration as end:
        piece.future.set_result(end.value)
    except BaseException as exc:  # noqa: BLE001 (whoever waits for the result has it)
        piece.future.set_exception(exc)
        del piece
    else:
        return True
    return False

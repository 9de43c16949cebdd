"""What a process of ours sets for itself: orderly ends on SIGTERM, Ctrl-C and a closed terminal, and malloc."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_HANDLER_SECONDS = 0.2
_REPEAT_SECONDS = 0.05
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # mallopt(3): least size of a block with its own mapping, number of arenas


def bound_memory() -> None:
    """Make glibc return freed photos to the system instead of keeping them in an arena per thread; limit numpy."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the decoder loads numpy: by default a thread per processor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none and needs none
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_ARENA_MAX, 2)


class Interrupts:
    """The signal handlers of a process whose command is ours; they raise KeyboardInterrupt.

    Python swallows an exception that a handler raises while the process forks, or in a finalizer. While the main thread
    waits for PostgreSQL no handler runs, so a thread that reads the signal from a socket cancels the statements.
    """

    def __init__(self, cancel_statements: Callable[[], None]) -> None:
        self._cancel_statements, self._owner = cancel_statements, os.getpid()
        self._defers = self._received = False
        self._handled = threading.Event()
        self._former_hook = sys.unraisablehook
        self._former: dict[signal.Signals, Any] = {}
        self._writer: socket.socket | None = None

    def __enter__(self) -> Interrupts:
        """Handle the signals, as far as this is the main thread; `nohup` keeps SIGHUP ignored."""
        self._former_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.unraisablehook = self._former_hook
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            self._writer.close()  # which ends the thread

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise what a signal asks for at the end of the block; a second signal raises at once."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False
        if self._received and os.getpid() == self._owner:
            raise KeyboardInterrupt

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(16):
                if _SIGNALS.intersection(numbers) and not self._handled.wait(_HANDLER_SECONDS):
                    self._cancel_statements()
                self._handled.clear()

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Repeat a signal whose exception a finalizer swallowed."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._former_hook(unraisable)
        elif os.getpid() == self._owner:
            repeat = threading.Timer(_REPEAT_SECONDS, os.kill, (self._owner, signal.SIGINT))
            repeat.daemon = True
            repeat.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            os._exit(128 + number)  # a child that has not installed its own handlers yet
        self._handled.set()
        repeated, self._received = self._received, True
        if repeated or not self._defers:
            raise KeyboardInterrupt

"""What a process of ours sets for itself: orderly ends on SIGTERM, Ctrl-C and a closed terminal, and malloc."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from pipeline.batches.alarm import Alarm
from pipeline.errors import PipelineError
from pipeline.observe.logger import say

INTERRUPTED = 130  # exit code

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_HANDLER_SECONDS = 0.2
_REPEAT_SECONDS = 0.05
#: From the first signal to the end of the process, whatever it waits for; then for the message and the alarm.
_END_SECONDS, _MESSAGE_SECONDS, _ALARM_SECONDS = 6.0, 1.0, 2.0
_CANCEL_SECONDS = 3
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # mallopt(3): least size of a block with its own mapping, number of arenas


def bound_memory() -> None:
    """Make glibc return freed photos to the system instead of keeping them in an arena per thread; limit numpy."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the decoder loads numpy: by default a thread per processor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none and needs none
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_ARENA_MAX, 2)


def escape_output() -> None:
    """Let the outputs escape characters that the encoding of the terminal lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Interrupts:
    """The signal handlers of a process whose command is ours; they raise KeyboardInterrupt.

    Python swallows an exception that a handler raises while the process forks, or in a finalizer. While the main thread
    waits for PostgreSQL no handler runs, so a thread that reads the signal from a socket has the statements cancelled.

    A thread in a system call cannot be interrupted, and Python waits for its threads when it ends. So six seconds after
    the first signal the process ends as it is, with 130; its work is left as after a crash, for the next run to resume.
    `resume_hint` returns what is said about that. Once the command has ended with a code, a signal raises nothing, and
    the process ends with that code.
    """

    def __init__(self, cancel_statements: Callable[[], None], resume_hint: Callable[[], str]) -> None:
        self._cancel_statements, self._resume_hint, self._owner = cancel_statements, resume_hint, os.getpid()
        self._defers, self._received, self._announced = True, False, False
        self._code: int | None = None  # once the command has ended
        self._turn, self._told = threading.Lock(), threading.Event()  # to let the alarm tell it once
        self._handled = threading.Event()
        self._former_hook = sys.unraisablehook
        self._former: dict[signal.Signals, Any] = {}
        self._writer: socket.socket | None = None
        self.alarm: Alarm | None = None  # of a command that is watched

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

    def begin(self) -> None:
        """Raise what a signal asks for, also if it came before; for a block that handles KeyboardInterrupt."""
        self._defers = False
        if self._received and os.getpid() == self._owner:
            raise KeyboardInterrupt

    def defer(self) -> None:
        """Raise what a signal asks for at the next `begin`; a second signal raises at once."""
        self._defers = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise what a signal asks for at the end of the block."""
        self.defer()
        try:
            yield
        finally:
            self._defers = False
        self.begin()

    def announce(self) -> None:
        """Say once that the command was interrupted, and how it is resumed; a further signal changes nothing."""
        announced, self._announced = self._announced, True
        if threading.current_thread() is threading.main_thread():
            for number in self._former:  # Python restores the default of every other handler before it ends
                signal.signal(number, signal.SIG_IGN)
            self._former.clear()
            # Python ends by the signal, and not with our code, if its exception left a string that eval() ran, as that
            # of a namedtuple, even if it was caught then; another string clears that.
            exec("")
        if not announced:
            say(f"Interrupted. {self._resume_hint()}")

    def watch(self, alarm: Alarm) -> None:
        """Let an alarm tell how the command begins and ends."""
        self.alarm = alarm
        alarm.start()

    def settle(self, code: int) -> None:
        """Let no signal change any more how the command ended."""
        self._code = code

    def finish(self, code: int, error: PipelineError | None = None) -> None:
        """Let the alarm of the command tell once how it ended."""
        self.settle(code)
        if self.alarm is None:
            return
        if self._turn.acquire(blocking=False):
            self.alarm.finish(code, error)
            self._told.set()
        else:  # another thread tells it
            self._told.wait(_ALARM_SECONDS)

    def _watch(self, reader: socket.socket) -> None:
        ending = threading.Thread(target=self._end, name="end", daemon=True)
        with reader:
            while numbers := reader.recv(16):
                if not _SIGNALS.intersection(numbers):
                    continue
                if ending.ident is None:
                    ending.start()
                if not self._handled.wait(_HANDLER_SECONDS):
                    self._cancel()
                self._handled.clear()

    def _cancel(self) -> None:
        """Cancel the statements from a child: the driver keeps the GIL until PostgreSQL has taken the cancellation."""
        child = os.fork()
        if not child:
            signal.alarm(_CANCEL_SECONDS)
            try:
                self._cancel_statements()
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    def _end(self) -> None:
        time.sleep(_END_SECONDS)
        code = INTERRUPTED if self._code is None else self._code
        works: list[tuple[Callable[[], None], float]] = [(partial(self.finish, code), _ALARM_SECONDS)]
        if self._code is None:
            works.insert(0, (self.announce, _MESSAGE_SECONDS))
        for work, seconds in works:  # stderr may be a full pipe
            message = threading.Thread(target=work, name="message", daemon=True)
            message.start()
            message.join(seconds)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)

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
        if self._code is None and not self._announced and (repeated or not self._defers):
            raise KeyboardInterrupt

"""Progress: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from typing import TextIO

_BAR = 24
_REDRAW = 0.2
_PLAIN = 30.0


class Counter:
    """How far the batch is, shared with forked workers: recognitions uploaded, of how many, and how many before us."""

    def __init__(self) -> None:
        self._done = multiprocessing.Value("q", 0)
        self._before = multiprocessing.Value("q", 0)
        self._total = multiprocessing.Value("q", 0)

    def start(self, total: int, before: int) -> None:
        """Set the total, and what earlier runs did of it."""
        self._before.value, self._done.value, self._total.value = before, before, total

    def add(self, count: int) -> None:
        """Count more as done."""
        with self._done.get_lock():
            self._done.value += count

    def read(self) -> tuple[int, int, int]:
        """Return done, done by earlier runs, total."""
        return self._done.value, self._before.value, self._total.value


def line(done: int, before: int, total: int, seconds: float) -> str:
    """Return `Processing ████░░ 80% | 8000/10000 | 1250/s | ETA: 1m 15s`."""
    share = done / total if total else 1.0
    filled = int(share * _BAR)
    rate = (done - before) / seconds if seconds > 0 else 0.0
    eta = _eta((total - done) / rate) if rate > 0 else "unknown"
    bar = "█" * filled + "░" * (_BAR - filled)
    return f"Processing {bar} {int(share * 100)}% | {done}/{total} | {rate:.0f}/s | ETA: {eta}"


def _eta(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Show a counter from a thread of its own, from the first recognition to the end of the block."""

    def __init__(self, counter: Counter, stream: TextIO | None = None) -> None:
        self._counter = counter
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join()

    def _show(self) -> None:
        drawn = False
        started: float | None = None
        told = time.monotonic()
        while not self._finished.wait(_REDRAW):
            done, before, total = self._counter.read()
            if not total or done >= total:
                continue
            now = time.monotonic()
            started = now if started is None else started
            text = line(done, before, total, now - started)
            if self._terminal:
                self._write(f"\r{text}\x1b[K")
                drawn = True
            elif now - told >= _PLAIN:
                self._write(f"{text}\n")
                told = now
        if drawn:
            done, before, total = self._counter.read()
            self._write(f"\r{line(done, before, total, time.monotonic() - (started or 0))}\x1b[K\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except UnicodeEncodeError:
            self._stream.write(text.replace("█", "#").replace("░", "."))
            self._stream.flush()

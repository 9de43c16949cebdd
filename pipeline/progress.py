"""Progress: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.logger import say, writes_json

#: More than a batch has shards.
PLACES = 1024
_BAR = 24
_REDRAW = 0.2
_PLAIN = 30.0


class Counter:
    """How far the batch is, shared with forked workers: recognitions uploaded, of how many, and how many before us.

    Every shard counts in a place of its own, without a lock: a worker that is killed cannot leave one behind.
    """

    def __init__(self) -> None:
        self._places = multiprocessing.RawArray("q", PLACES)
        self._before = multiprocessing.RawValue("q", 0)
        self._total = multiprocessing.RawValue("q", 0)

    def start(self, total: int, before: int) -> None:
        """Set the total, and what earlier runs did of it."""
        self._before.value, self._total.value = before, total
        self._places[:] = [0] * PLACES

    def of(self, shard: int) -> Callable[[int], None]:
        """Return a function, safe to share between threads, that counts more of a shard, which begins at none."""
        place, lock = shard % PLACES, threading.Lock()
        self._places[place] = 0

        def add(count: int) -> None:
            with lock:
                self._places[place] += count

        return add

    def reached(self, done: int) -> None:
        """Say how many are done in all, where there are no shards."""
        self._places[0] = done

    def read(self) -> tuple[int, int, int]:
        """Return done, done by earlier runs, total."""
        before = int(self._before.value)
        return before + sum(self._places), before, int(self._total.value)


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
        # There is none when a program was started with it closed.
        self._stream: TextIO | None = stream or sys.stderr
        self._terminal = self._stream is not None and self._stream.isatty()
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
            if writes_json():
                if now - told >= _PLAIN:
                    say(text, logging.INFO, done=done, total=total, seconds=round(now - started, 1))
                    told = now
            elif self._terminal:
                self._write(f"\r{text}\x1b[K")
                drawn = True
            elif now - told >= _PLAIN:
                self._write(f"{text}\n")
                told = now
        if drawn:
            done, before, total = self._counter.read()
            self._write(f"\r{line(done, before, total, time.monotonic() - (started or 0))}\x1b[K\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            text.encode(self._stream.encoding or "utf-8")
        except UnicodeEncodeError:
            text = text.replace("█", "#").replace("░", ".")
        self._stream.write(text)
        self._stream.flush()

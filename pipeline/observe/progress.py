"""Progress: a bar on a terminal, elsewhere a plain line now and then, and a word to who watches from far away."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.observe.logger import let_go, say, writes_json

#: A message, and percent.
Report = tuple[str, int | None]

#: More than a batch has shards.
PLACES = 1024
_BAR = 24
_REDRAW = 0.2
_PLAIN = 30.0
#: Between two reports to somebody far away, and how long the last one may take.
_REPORT = 1.0
_LAST = 3.0


class Counter:
    """How far the batch is, shared with forked workers: recognitions uploaded, of how many, and how many before us.

    Every shard counts in a place of its own, without a lock: a worker that is killed cannot leave one behind.
    """

    def __init__(self) -> None:
        self._places = multiprocessing.RawArray("q", PLACES)
        self._totals = multiprocessing.RawArray("q", PLACES)
        self._before = multiprocessing.RawValue("q", 0)
        self._total = multiprocessing.RawValue("q", 0)

    def start(self, total: int, before: int) -> None:
        """Set the total, and what earlier runs did of it."""
        self._before.value, self._total.value = before, total
        self._places[:] = [0] * PLACES
        self._totals[:] = [0] * PLACES

    def of(self, shard: int, total: int = 0) -> Callable[[int], None]:
        """Return a function, safe to share between threads, that counts more of a shard, which begins at none."""
        place, lock = shard % PLACES, threading.Lock()
        self._places[place], self._totals[place] = 0, total

        def add(count: int) -> None:
            with lock:
                self._places[place] += count

        return add

    def reached(self, done: int) -> None:
        """Say how many are done in all, where there are no shards."""
        self._places[0] = done

    def read_shard(self, shard: int) -> tuple[int, int]:
        """Return done and total of a shard; the total is 0 where nobody has told it."""
        place = shard % PLACES
        return int(self._places[place]), int(self._totals[place])

    def read(self) -> tuple[int, int, int]:
        """Return done, done by earlier runs, total."""
        before = int(self._before.value)
        return before + sum(self._places), before, int(self._total.value)


def line(done: int, before: int, total: int, seconds: float, *, bar: bool = True) -> str:
    """Return `Processing ████░░ 80% | 8000/10000 | 1250/s | ETA: 1m 15s`, in a file or a mail without the bar."""
    share = done / total if total else 1.0
    filled = int(share * _BAR)
    rate = (done - before) / seconds if seconds > 0 else 0.0
    eta = _eta((total - done) / rate) if rate > 0 else "unknown"
    drawn = "█" * filled + "░" * (_BAR - filled) + " " if bar else ""
    return f"Processing {drawn}{int(share * 100)}% | {done}/{total} | {rate:.0f}/s | ETA: {eta}"


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
            text = line(done, before, total, now - started, bar=self._terminal)
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
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal was closed, or the disk is full; what becomes of the load is decided elsewhere
            let_go(self._stream)


class Reporter:
    """Tell somebody far away how far something is, at most once a second, from a thread of its own.

    Whoever is told may be slow, or away: only the thread waits for that, and at the end of the block nobody waits long.

    Arguments:
        read: returns a message, and how much is done in percent where that is known; None before there is any.
        tell: is given what has changed.
        last: tell how it was at the end of the block.
    """

    def __init__(self, read: Callable[[], Report | None], tell: Callable[[Report], None], *, last: bool = True) -> None:
        self._read, self._tell, self._last = read, tell, last
        self._told: Report | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._report, name="reporter", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join(_LAST)

    def _report(self) -> None:
        over = False
        while not over:
            over = self._finished.wait(_REPORT)
            report = self._read() if self._last or not over else None
            if report is not None and report != self._told:
                self._tell(report)
                self._told = report

"""Progress: a bar on a terminal, a plain line now and then elsewhere, and reports to a distant service."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from pipeline.observe.logger import redirect_to_null, say, writes_json

#: A message, and percent.
Report = tuple[str, int | None]

#: More than a batch has shards.
PLACES = 1024
_BLOCKS, _ASCII_BLOCKS = "░█", ".#"
#: Columns of a terminal that does not tell its width.
_COLUMNS = 79
_REDRAW = 0.2
_PLAIN = 30.0
#: Seconds between two reports, and seconds that the last one may take.
_REPORT = 1.0
_LAST = 3.0


class Counter:
    """How many recognitions of a batch are done, of how many, in memory that forked processes share.

    Each shard has a place of its own and there is no lock, which a killed process could leave behind.
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


def line(done: int, before: int, total: int, seconds: float, *, columns: int = 0, blocks: str = _BLOCKS) -> str:
    """Return `Processing ████░░ 80% | 8000/10000 | 1250/s | ETA: 1m 15s`, without the bar where there are no columns.

    Arguments:
        columns: the width of the terminal, which the line fills.
        blocks: the empty and the full block of the bar.
    """
    share = int(100 * done / total) if total else 100
    rate = (done - before) / seconds if seconds > 0 else 0.0
    eta = _eta((total - done) / rate) if rate > 0 else "unknown"
    numbers = f"{share}% | {done}/{total} | {rate:.0f}/s | ETA: {eta}"
    if not columns:
        return f"Processing {numbers}"
    filled, parts = (done, total) if total else (1, 1)
    shape = f"Processing {{bar}} {numbers}"
    return str(tqdm.format_meter(filled, parts, seconds, ncols=columns, ascii=blocks, bar_format=shape))


def _eta(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Show a counter from a thread, from the first recognition to the end of the block."""

    def __init__(self, counter: Counter, stream: TextIO | None = None) -> None:
        self._counter = counter
        # sys.stderr is None when the program was started with it closed.
        self._stream: TextIO | None = stream or sys.stderr
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._blocks = _BLOCKS if self._has_blocks() else _ASCII_BLOCKS
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join()

    def _has_blocks(self) -> bool:
        try:
            _BLOCKS.encode((self._stream and self._stream.encoding) or "utf-8")
        except UnicodeEncodeError:
            return False
        return True

    def _columns(self) -> int:
        if not self._is_terminal or self._stream is None:
            return 0
        try:
            return os.get_terminal_size(self._stream.fileno()).columns - 1 or _COLUMNS
        except OSError:
            return _COLUMNS

    def _show(self) -> None:
        drawn = False
        started: float | None = None
        written = time.monotonic()
        while not self._finished.wait(_REDRAW):
            done, before, total = self._counter.read()
            if not total or done >= total:
                continue
            now = time.monotonic()
            started = now if started is None else started
            text = line(done, before, total, now - started, columns=self._columns(), blocks=self._blocks)
            if writes_json():
                if now - written >= _PLAIN:
                    say(text, logging.INFO, done=done, total=total, seconds=round(now - started, 1))
                    written = now
            elif self._is_terminal:
                self._write(f"\r{text}\x1b[K")
                drawn = True
            elif now - written >= _PLAIN:
                self._write(f"{text}\n")
                written = now
        if drawn:
            done, before, total = self._counter.read()
            seconds = time.monotonic() - (started or 0)
            self._write(f"\r{line(done, before, total, seconds, columns=self._columns(), blocks=self._blocks)}\x1b[K\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal was closed, or the disk is full; neither ends the load
            redirect_to_null(self._stream)


class Reporter:
    """Report progress to a distant service at most once a second, from a thread.

    The service may be slow or away: only the thread waits for it, and the end of the block waits three seconds at most.

    Arguments:
        read: returns a message, and how much is done in percent where that is known; None before there is any.
        send: is given each report that differs from the former one.
        last: send the report of the end of the block as well.
    """

    def __init__(self, read: Callable[[], Report | None], send: Callable[[Report], None], *, last: bool = True) -> None:
        self._read, self._send, self._last = read, send, last
        self._sent: Report | None = None
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
            if report is not None and report != self._sent:
                self._send(report)
                self._sent = report

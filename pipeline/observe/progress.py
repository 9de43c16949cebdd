"""Progress: a counter shared with worker processes, its display on stderr, and periodic status messages."""

from __future__ import annotations

import io
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
from pipeline.units import duration

#: A message, and percent.
StatusMessage = tuple[str, int | None]

_SLOTS = 1024  # more than the shards of a batch (at most 1,000); the last one is for other workers
_REDRAW_SECONDS, _PLAIN_SECONDS, _STATUS_SECONDS = 0.2, 30.0, 1.0
_LAST_STATUS_SECONDS = 3.0  # the longest wait for the last message


class ProgressCounter:
    """Recognitions done and in total, shared with forked workers.

    Each shard has a slot of its own, so no lock is shared: a worker that is killed cannot leave one locked.
    """

    def __init__(self) -> None:
        self._done = multiprocessing.RawArray("q", _SLOTS)
        self._totals = multiprocessing.RawArray("q", _SLOTS)
        self._whole = multiprocessing.RawArray("q", 2)  # done by earlier runs, and the total

    def start(self, total: int, before: int) -> None:
        """Set the total, and how much of it earlier runs did; clear the rest."""
        self._whole[:] = [before, total]
        self._done[:] = self._totals[:] = [0] * _SLOTS

    def start_shard(self, shard: int, total: int = 0) -> Callable[[int], None]:
        """Set a shard to zero, and return a thread-safe function that adds to it."""
        slot, lock = shard % _SLOTS, threading.Lock()
        self._done[slot], self._totals[slot] = 0, total

        def add(count: int) -> None:
            with lock:
                self._done[slot] += count

        return add

    def set_done(self, done: int) -> None:
        """Set how much is done, for work without shards."""
        self._done[0] = done

    def set_done_by_others(self, done: int) -> None:
        """Set how much workers on other machines did."""
        self._done[-1] = done

    def read_shard(self, shard: int) -> tuple[int, int]:
        """Return done and total of a shard; the total is 0 if it is unknown."""
        return int(self._done[shard % _SLOTS]), int(self._totals[shard % _SLOTS])

    def read(self) -> tuple[int, int, int]:
        """Return done, done by earlier runs, and total."""
        before, total = self._whole
        return before + sum(self._done), before, total


def format_progress(
    done: int, before: int, total: int, seconds: float, *, columns: int | None = None, characters: str = "░█"
) -> str:
    """Return `Processing ████░░ 80% | 8000/10000 | 1250/s | ETA: 1m 15s`.

    Earlier runs did `before` of `done`; they do not count for the rate, nor their time for `seconds`. The bar, of
    `characters` for its empty and its filled part, fills a line of `columns`; None for a line without a bar.
    """
    done = min(done, total)
    rate = (done - before) / seconds if seconds > 0 else 0.0
    # tqdm would round 99.9 % up, and write an ETA as 01:15.
    share = done * 100 // total if total else 100
    left = round((total - done) / rate) if rate > 0 else None
    eta = "unknown" if left is None else f"{left}s" if left < 60 else duration(left)
    bar = "" if columns is None else "{bar} "
    bar_format = f"Processing {bar}{share}% | {{n_fmt}}/{{total_fmt}} | {{rate_noinv:.0f}}/s | ETA: {eta}"
    # An instance of tqdm would start a monitor thread, and take locks that a forked worker inherits.
    return tqdm.format_meter(done, total, seconds, ncols=columns, ascii=characters, rate=rate, bar_format=bar_format)


class BlockThread:
    """Call `tick` at intervals (seconds), from a thread of its own, during a block and once at its end.

    The end of the block waits `longest_wait` seconds at most for the last call; None for any time.
    """

    def __init__(self, name: str, interval: float, longest_wait: float | None = None) -> None:
        self._interval, self._longest_wait = interval, longest_wait
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> BlockThread:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join(self._longest_wait)

    def _run(self) -> None:
        finished = False
        while not finished:
            finished = self._finished.wait(self._interval)
            self.tick(finished)

    def tick(self, finished: bool) -> None:
        """Do the work; `finished` in the call at the end of the block."""
        raise NotImplementedError


class ProgressDisplay(BlockThread):
    """Show a counter until the end of the block: a bar on a terminal, else a line (text or JSON) every 30 seconds."""

    def __init__(self, counter: ProgressCounter, stream: TextIO | None = None) -> None:
        super().__init__("progress", _REDRAW_SECONDS)
        self._counter = counter
        self._stream = stream or sys.stderr or io.StringIO()  # a process may start without stderr
        self._has_bar = self._stream.isatty() and not writes_json()
        is_ascii = not "░█".encode(self._stream.encoding or "utf-8", "ignore")
        self._characters = ".#" if is_ascii else "░█"
        self._started: float | None = None
        self._written = time.monotonic()

    def tick(self, finished: bool) -> None:
        """Show the counter."""
        done, before, total = self._counter.read()
        now = time.monotonic()
        if self._started is None and done < total and not finished:
            self._started = now
        if self._started is None or (done >= total and not finished):
            return
        seconds = now - self._started
        if self._has_bar:
            text = format_progress(done, before, total, seconds, columns=self._columns(), characters=self._characters)
            self._write(f"\r{text}\x1b[K" + ("\n" if finished else ""))
        elif now - self._written >= _PLAIN_SECONDS and not finished:
            text = format_progress(done, before, total, seconds)
            if writes_json():
                say(text, logging.INFO, done=done, total=total, seconds=round(seconds, 1))
            else:
                self._write(f"{text}\n")
            self._written = now

    def _columns(self) -> int:
        """Return the width for a line: one less than the terminal's, since some wrap a line that fills it."""
        try:
            return max(1, (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1)
        except OSError:  # not a terminal of the system
            return 79

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal was closed, or the disk is full; the load continues
            redirect_to_null(self._stream)


class StatusThread(BlockThread):
    """Send status messages that changed, at most once a second, and with `last` at the end of the block.

    Only this thread waits for a slow receiver. `read` returns None if there is no message yet.
    """

    def __init__(
        self, read: Callable[[], StatusMessage | None], send: Callable[[StatusMessage], None], *, last: bool = True
    ) -> None:
        super().__init__("status", _STATUS_SECONDS, _LAST_STATUS_SECONDS)
        self._read, self._send, self._last = read, send, last
        self._sent: StatusMessage | None = None

    def tick(self, finished: bool) -> None:
        """Send the message if it changed."""
        message = self._read() if self._last or not finished else None
        if message is not None and message != self._sent:
            self._send(message)
            self._sent = message

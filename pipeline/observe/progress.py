"""Progress: a counter shared with worker processes, its display on stderr, and periodic status messages."""

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
StatusMessage = tuple[str, int | None]

#: More than the shards of a batch (at most 1,000); the last one is for other workers.
_SLOTS = 1024
_REDRAW_SECONDS = 0.2
_PLAIN_SECONDS = 30.0
_STATUS_SECONDS = 1.0
#: The longest wait for the last status message.
_LAST_STATUS_SECONDS = 3.0


class ProgressCounter:
    """Recognitions done and in total, shared with forked workers.

    Each shard has a slot of its own, so no lock is shared: a worker that is killed cannot leave one locked.
    """

    def __init__(self) -> None:
        self._done = multiprocessing.RawArray("q", _SLOTS)
        self._totals = multiprocessing.RawArray("q", _SLOTS)
        self._before = multiprocessing.RawValue("q", 0)
        self._total = multiprocessing.RawValue("q", 0)

    def start(self, total: int, before: int) -> None:
        """Set the total, and how much of it earlier runs did; clear the rest."""
        self._before.value, self._total.value = before, total
        self._done[:] = [0] * _SLOTS
        self._totals[:] = [0] * _SLOTS

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
        slot = shard % _SLOTS
        return int(self._done[slot]), int(self._totals[slot])

    def read(self) -> tuple[int, int, int]:
        """Return done, done by earlier runs, and total."""
        before = int(self._before.value)
        return before + sum(self._done), before, int(self._total.value)


def format_progress(
    done: int, before: int, total: int, seconds: float, *, columns: int | None = None, characters: str = "░█"
) -> str:
    """Return `Processing ████░░ 80% | 8000/10000 | 1250/s | ETA: 1m 15s`.

    Of tqdm only this formatting is used: an instance of it would start a monitor thread, and take locks that a forked
    worker inherits.

    Arguments:
        before: how many of `done` earlier runs did; they do not count for the rate.
        seconds: since this run started.
        columns: width of the line, which the bar fills; None for a line without a bar.
        characters: of the empty and the filled part of the bar.
    """
    done = min(done, total)
    rate = (done - before) / seconds if seconds > 0 else 0.0
    # tqdm would round 99.9 % up, and write an ETA as 01:15.
    share = done * 100 // total if total else 100
    eta = _duration((total - done) / rate) if rate > 0 else "unknown"
    bar = "" if columns is None else "{bar} "
    bar_format = f"Processing {bar}{share}% | {{n_fmt}}/{{total_fmt}} | {{rate_noinv:.0f}}/s | ETA: {eta}"
    return tqdm.format_meter(done, total, seconds, ncols=columns, ascii=characters, rate=rate, bar_format=bar_format)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class ProgressDisplay:
    """Show a counter, from a thread of its own, until the end of the block.

    A terminal shows a bar. Other streams get a line every 30 seconds, as JSON where logging writes JSON.
    """

    def __init__(self, counter: ProgressCounter, stream: TextIO | None = None) -> None:
        self._counter = counter
        self._stream: TextIO | None = stream or sys.stderr  # None if the process started without stderr
        self._terminal = self._stream is not None and self._stream.isatty()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join()

    def _show(self) -> None:
        drawn = False
        started: float | None = None
        written = time.monotonic()
        while not self._finished.wait(_REDRAW_SECONDS):
            done, before, total = self._counter.read()
            if not total or done >= total:
                continue
            now = time.monotonic()
            started = now if started is None else started
            if self._terminal and not writes_json():
                self._draw(now - started)
                drawn = True
            elif now - written >= _PLAIN_SECONDS:
                text = format_progress(done, before, total, now - started)
                if writes_json():
                    say(text, logging.INFO, done=done, total=total, seconds=round(now - started, 1))
                else:
                    self._write(f"{text}\n")
                written = now
        if drawn:
            self._draw(time.monotonic() - (started or 0), end="\n")

    def _draw(self, seconds: float, end: str = "") -> None:
        columns, characters = _columns(self._stream), _bar_characters(self._stream)
        text = format_progress(*self._counter.read(), seconds, columns=columns, characters=characters)
        self._write(f"\r{text}\x1b[K{end}")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal was closed, or the disk is full; the load continues
            redirect_to_null(self._stream)


def _columns(stream: TextIO | None) -> int:
    """Return the width for a line: one less than the terminal's, since some wrap a line that fills it."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns if stream is not None else 0
    except OSError:  # not a terminal of the system
        columns = 0
    return max(1, (columns or 80) - 1)


def _bar_characters(stream: TextIO | None) -> str:
    try:
        "░█".encode((stream and stream.encoding) or "utf-8")
    except UnicodeEncodeError:
        return ".#"
    return "░█"


class StatusThread:
    """Send status messages that changed, at most once a second, from a thread of its own.

    Only this thread waits for a slow receiver; the end of the block waits three seconds at most.

    Arguments:
        read: returns the current message, None if there is none yet.
        send: receives a message that differs from the one before.
        last: send the message as it is at the end of the block, too.
    """

    def __init__(
        self, read: Callable[[], StatusMessage | None], send: Callable[[StatusMessage], None], *, last: bool = True
    ) -> None:
        self._read, self._send, self._last = read, send, last
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> StatusThread:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join(_LAST_STATUS_SECONDS)

    def _run(self) -> None:
        sent: StatusMessage | None = None
        finished = False
        while not finished:
            finished = self._finished.wait(_STATUS_SECONDS)
            message = self._read() if self._last or not finished else None
            if message is not None and message != sent:
                self._send(message)
                sent = message

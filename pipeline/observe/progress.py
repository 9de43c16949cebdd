"""Progress: a counter shared with worker processes, its display on stderr, and periodic status messages."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TextIO

from tqdm import tqdm

from pipeline.observe.logger import log_event, redirect_to_null, writes_json
from pipeline.units import counted, duration

#: A message, and percent.
StatusMessage = tuple[str, int | None]

#: Name and unit of each phase, in the order in which a run has them.
_KB = "kB"
_PHASES = {
    "sample": "recognition",
    "discover": "recognition",
    "discover_annotations": _KB,
    "upload": "recognition",
    "transform": "recognition",
    "reset": "photo",
}
_SLOTS = 1024  # shards share them where there are more; the last one is for other workers
_REDRAW_SECONDS, _PLAIN_SECONDS, _STATUS_SECONDS = 0.2, 30.0, 1.0
_LAST_STATUS_SECONDS = 3.0  # the longest wait for the last message


@dataclass(frozen=True)
class Phase:
    """A part of a run that is displayed on its own.

    Earlier runs did `before` of `done`. It `began` at a value of `time.monotonic`; `seconds` are those since, or until
    its end if it is `over`.
    """

    name: str
    unit: str
    done: int
    before: int
    total: int
    began: float
    seconds: float
    over: bool

    @property
    def rate(self) -> float:
        """Return the units a second of this run."""
        return (self.done - self.before) / self.seconds if self.seconds > 0 else 0.0

    def counted(self, count: int) -> str:
        """Return a count with the unit."""
        return f"{count} kB" if self.unit == _KB else counted(count, self.unit)


class ProgressCounter:
    """What is done of each phase, shared with forked workers.

    Each of a thousand shards has a slot of its own, so no lock is shared: a worker that is killed cannot leave one
    locked. Where there are more shards, those of a slot add up.
    """

    def __init__(self) -> None:
        self._done = multiprocessing.RawArray("q", _SLOTS)
        self._totals = multiprocessing.RawArray("q", _SLOTS)
        self._current = multiprocessing.RawValue("i", -1)
        self._rows = [multiprocessing.RawArray("d", 5) for _ in _PHASES]  # before, done, total, begin, end
        self._parts: dict[int, list[int]] = {}  # done and total of each shard that this process started

    def start(self, phase: str, total: int = 0, before: int = 0) -> None:
        """Start a phase, which ends the one before it; earlier runs did `before` of the total."""
        self.finish()
        self._done[:] = self._totals[:] = [0] * _SLOTS
        self._parts.clear()
        index = list(_PHASES).index(phase)
        self._rows[index][:] = [before, before, total, time.monotonic(), 0.0]
        self._current.value = index

    def finish(self) -> None:
        """End the phase."""
        if self._current.value >= 0:
            row = self._rows[self._current.value]
            row[1], row[4] = self.read()[0], time.monotonic()
            self._current.value = -1

    def start_shard(self, shard: int, total: int = 0) -> Callable[[int], None]:
        """Set a shard to zero, and return a thread-safe function that adds to it."""
        slot, lock, part = self._slot(shard), threading.Lock(), [0, total]
        done, former = self._parts.get(shard, (0, 0))
        self._parts[shard] = part
        self._done[slot] -= done
        self._totals[slot] += total - former

        def add(count: int) -> None:
            with lock:
                part[0] += count
                self._done[slot] += count

        return add

    def set_done(self, done: int, total: int | None = None) -> None:
        """Set how much is done, and the total where it becomes known, for work without shards."""
        if total is not None and self._current.value >= 0:
            self._rows[self._current.value][2] = total
        self._done[0] = done

    def set_done_by_others(self, done: int) -> None:
        """Set how much workers on other machines did."""
        self._done[-1] = done

    def read_shard(self, shard: int) -> tuple[int, int]:
        """Return done and total of a shard; the total is 0 if it is unknown."""
        return int(self._done[self._slot(shard)]), int(self._totals[self._slot(shard)])

    @staticmethod
    def _slot(shard: int) -> int:
        return shard % (_SLOTS - 1)

    def read(self, phase: str = "") -> tuple[int, int, int]:
        """Return done, done by earlier runs, and total, of the current phase; zeros if `phase` is another one."""
        index = self._current.value
        if index < 0 or phase not in ("", list(_PHASES)[index]):
            return 0, 0, 0
        before, _, total, *_ = map(int, self._rows[index])
        return before + sum(self._done), before, total

    def phases(self) -> list[Phase]:
        """Return the phases that have started, in their order; the last one may not be over."""
        found = []
        for (name, unit), row in zip(_PHASES.items(), self._rows, strict=True):
            before, done, total, begin, end = row
            if begin:
                done = max(before, min(total, done if end else self.read(name)[0]))
                name, seconds = name.removesuffix("_annotations"), (end or time.monotonic()) - begin
                found.append(Phase(name, unit, int(done), int(before), int(total), begin, seconds, bool(end)))
        return found


def format_progress(phase: Phase, *, columns: int | None = None, characters: str = "░█") -> str:
    """Return `Processing ████░░ 80% | 8000/10000 | 1250/s | ETA: 1m 15s | upload, recognitions`.

    The bar, of `characters` for its empty and its filled part, fills a line of `columns`; None for a line without a
    bar. A narrow terminal gets what matters most of it.
    """
    done, total, name = phase.done, phase.total, phase.name
    units = phase.counted(total).partition(" ")[2]
    # tqdm would round 99.9 % up, and write an ETA as 01:15.
    share = done * 100 // total if total else 100
    left = round((total - done) / phase.rate) if phase.rate > 0 else None
    eta = "ETA: unknown" if left is None else f"ETA: {left}s" if left < 60 else f"ETA: {duration(left)}"
    count, rate = f"{done}/{total}", f"{phase.rate:.0f}/s"
    if columns is None:
        return f"Processing {share}% | {count} | {rate} | {eta} | {name}, {units}"
    layouts = (
        f"Processing {{bar}} {share}% | {count} | {rate} | {eta} | {name}, {units}",
        f"Processing {{bar}} {share}% | {count} | {eta} | {name}, {units}",
        f"{name} {{bar}} {share}% | {count} {units} | {eta}",
        f"{name} {share}% | {count} {units}",
        f"{name} {share}% of {total} {units}",
    )
    layout = next((one for one in layouts if len(one.format(bar=" ")) <= columns), layouts[-1])
    # An instance of tqdm would start a monitor thread, and take locks that a forked worker inherits.
    line = tqdm.format_meter(done, max(total, 1), phase.seconds, ncols=columns, ascii=characters, bar_format=layout)
    return line[:columns]


def format_end(phase: Phase, columns: int | None = None) -> str:
    """Return what a phase did, `upload: 10000 recognitions in 8.0 s, 1250/s`, as much as fits into the columns."""
    done = phase.done - phase.before
    did = phase.counted(done) if phase.done == phase.total else f"{done} of {phase.counted(phase.total)}"
    text = f"{phase.name}: {did}"
    earlier = f"; {phase.before} by earlier runs" if phase.before else ""
    for part in (f" in {duration(phase.seconds)}", f", {phase.rate:.0f}/s", earlier):
        text += part if columns is None or len(text) + len(part) <= columns else ""
    return text[:columns]


class BlockThread:
    """Call `tick` at intervals (seconds), from a thread of its own, during a block, and once, with True, at its end.

    The end of the block waits `patience` seconds at most for the last call; None for any time.
    """

    def __init__(self, name: str, interval: float, tick: Callable[[bool], None], patience: float | None = None) -> None:
        self._interval, self._tick, self._patience = interval, tick, patience
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> BlockThread:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()
        self._thread.join(self._patience)

    def _run(self) -> None:
        finished = False
        while not finished:
            finished = self._finished.wait(self._interval)
            self._tick(finished)


class ProgressDisplay(BlockThread):
    """Show a counter until the end of the block: a bar on a terminal, else a line (text or JSON) every 30 seconds.

    At its end a phase is told on a terminal; its start and its end are events of a JSON log, with the given fields.
    """

    def __init__(self, counter: ProgressCounter, stream: TextIO | None = None, **fields: object) -> None:
        super().__init__("progress", _REDRAW_SECONDS, self._show)
        self._counter, self._fields = counter, fields
        self._stream = stream or sys.stderr or io.StringIO()  # a process may start without stderr
        self._has_bar = self._stream.isatty() and not writes_json()
        is_ascii = not "░█".encode(self._stream.encoding or "utf-8", "ignore")
        self._characters = ".#" if is_ascii else "░█"
        self._begun: set[float] = set()
        self._ended: set[float] = set()
        self._written = time.monotonic()

    def _show(self, finished: bool) -> None:
        for phase in self._counter.phases():
            if phase.began in self._ended:
                continue
            if phase.began not in self._begun:
                self._begun.add(phase.began)
                self._log("phase_started", f"{phase.name} started", replace(phase, done=phase.before, seconds=0.0))
            if phase.over or finished:
                self._ended.add(phase.began)
                self._end(phase)
            elif phase.total:
                self._draw(phase)

    def _draw(self, phase: Phase) -> None:
        if self._has_bar:
            self._write(f"\r{self._bar(phase)}\x1b[K")
        elif (now := time.monotonic()) - self._written >= _PLAIN_SECONDS:
            text = format_progress(phase)
            if writes_json():
                self._log("progress", text, phase)
            else:
                self._write(f"{text}\n")
            self._written = now

    def _end(self, phase: Phase) -> None:
        if self._has_bar and phase.total:
            self._write(f"\r{self._bar(phase)}\x1b[K\r{format_end(phase, self._columns())}\x1b[K\n")
        self._log("phase_ended", format_end(phase), phase)

    def _log(self, event: str, text: str, phase: Phase) -> None:
        facts = {"phase": phase.name, "unit": phase.unit, "done": phase.done, "before": phase.before}
        log_event(event, text, **self._fields, **facts, total=phase.total, seconds=round(phase.seconds, 3))

    def _bar(self, phase: Phase) -> str:
        return format_progress(phase, columns=self._columns(), characters=self._characters)

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


def status_thread(read: Callable[[], StatusMessage | None], send: Callable[[StatusMessage], None]) -> BlockThread:
    """Return a thread that sends status messages that changed, once a second, and at the end of its block.

    Only that thread waits for a slow receiver. `read` returns None if there is no message yet.
    """
    sent: StatusMessage | None = None

    def tick(finished: bool) -> None:
        nonlocal sent
        message = read()
        if message is not None and message != sent:
            send(message)
            sent = message

    return BlockThread("status", _STATUS_SECONDS, tick, _LAST_STATUS_SECONDS)

"""What processes cost: processor seconds and peak memory, of a process and everything below it, from /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_SAMPLE_SECONDS = 0.05
_GONE = (FileNotFoundError, ProcessLookupError)


def tree(pid: int) -> Iterator[int]:
    """Yield a process and those below it that first threads have made; only itself where there is no /proc."""
    yield pid
    with suppress(*_GONE):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            yield from tree(int(child))


def processor_seconds(pid: int) -> float:
    """Return what a process, those below it and its children that have ended have used of the processors."""
    ticks = 0
    for one in tree(pid):
        with suppress(*_GONE):
            status = Path(f"/proc/{one}/stat").read_text(encoding="utf-8", errors="replace")
            # After the name, which may hold anything: utime, stime, cutime, cstime (proc(5)).
            ticks += sum(map(int, status.rsplit(")", 1)[1].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def idle_seconds() -> float | None:
    """Return how long the processors of this machine had nothing to do so far, added up; None where there is no /proc.

    What is not idle includes what no process is charged for: the kernel's work for networks and disks.
    """
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except FileNotFoundError:
        return None
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle and iowait (proc(5))


def memory_of_machine() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Watch:
    """Look at a process and those below it, again and again, for the length of a `with` block.

    What wait4() tells of memory includes what its parent had when it began, so it is of no use for this.

    Attributes:
        peak: MB of the field of /proc/<pid>/status that the largest of them had at most, 0 where there is no /proc.
    """

    def __init__(self, pid: int, field: str = "VmHWM") -> None:
        self.peak = 0.0
        self._pid = pid
        self._field = f"{field}:"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            for pid in tree(self._pid):
                with suppress(*_GONE):
                    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
                        if line.startswith(self._field):
                            self.peak = max(self.peak, int(line.split()[1]) / 1024)


def cost_of(program: str) -> tuple[float, float]:
    """Run a Python program to its end; return its seconds by the clock and of the processors."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{program!r} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime

"""What Linux says of a process under /proc; nothing of what ends or is closed while it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def children(pid: int) -> list[int]:
    """Return the child processes of every thread of a process."""
    return [int(child) for path in _threads(pid, "children") for child in _read(path).split()]


def open_files(pid: int) -> Iterator[str]:
    """Yield what each file descriptor of a process stands for: a path, `socket:[inode]`, …"""
    with suppress(FileNotFoundError):
        for path in (PROC / str(pid) / "fd").iterdir():
            with suppress(FileNotFoundError):
                yield os.readlink(path)


def waits_in(pid: int, function: str) -> bool:
    """Return whether a thread of a process waits in a function of the kernel whose name contains a text."""
    return any(function in _read(path) for path in _threads(pid, "wchan"))


def state(pid: int) -> tuple[str, str]:
    """Return the name of a process and the letter of its state, both empty when it has ended."""
    # proc(5): "pid (comm) state …", and a name may contain spaces and parentheses.
    name, _, rest = _read(PROC / str(pid) / "stat").partition("(")[2].rpartition(")")
    return name, rest[1:2]


def _threads(pid: int, name: str) -> list[Path]:
    return list((PROC / str(pid) / "task").glob(f"*/{name}"))


def _read(path: Path) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""

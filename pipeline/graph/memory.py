"""Memory of the process: what was freed is given back, also where glibc would rather keep it; what stays is let be."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3): blocks from this size on are mapped one by one, and so many arenas serve all threads.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def bound_memory() -> None:
    """Let freed photos leave the process; otherwise every thread of glibc keeps its share of the largest ones."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and does not need it
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 256 << 10)
            mallopt(_M_ARENA_MAX, 2)


@contextmanager
def only_new_is_collected() -> Iterator[None]:
    """For the block, leave what is there now out of garbage collections, during which every thread waits.

    Modules alone, Luigi's and SQLAlchemy's among them, take a collection 50 ms and more.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

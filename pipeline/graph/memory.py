"""Settings of malloc and of the garbage collector."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3): the size from which a block gets its own mapping, and the number of arenas.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def bound_memory() -> None:
    """Make glibc return freed photos to the system, instead of keeping the largest ones in an arena per thread."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none and needs none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 256 << 10)
            mallopt(_M_ARENA_MAX, 2)


@contextmanager
def only_new_is_collected() -> Iterator[None]:
    """Exclude the objects that exist now from garbage collections during the block.

    A collection stops every thread, and takes over 50 ms for the modules of Luigi and SQLAlchemy alone.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

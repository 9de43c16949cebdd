"""The setting of malloc."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3): the size from which a block gets its own mapping, and the number of arenas.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def bound_memory() -> None:
    """Make glibc return freed photos to the system, instead of keeping the largest ones in an arena per thread."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none and needs none
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_ARENA_MAX, 2)

"""Counts, durations, sizes and moments as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

_LISTED = 10


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, as `1 photo` or `2 photos`; the plural is given where an s does not make it."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def listed(items: Sequence[object]) -> str:
    """Return the first ten items, separated by commas, and how many more there are."""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(map(str, items[:_LISTED])) + more


def duration(seconds: float) -> str:
    """Return seconds as `8.2 s`, `1m 15s` or `2h 03m`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def size(count: float) -> str:
    """Return bytes in decimal units, as Supabase does."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 0 if unit == "B" else 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def moment(text: str) -> str:
    """Return an ISO 8601 timestamp as `2026-01-02 12:00:00 UTC`."""
    return datetime.fromisoformat(text).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")

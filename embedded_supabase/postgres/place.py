"""Where a server keeps its data and its socket."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from embedded_supabase.postgres.installation import OWN_DATABASE

_SCARCE_BYTES = 64 << 20


@dataclass(frozen=True)
class Place:
    """Where the files are: see the module's docstring."""

    base: Path
    socket: Path

    @property
    def data(self) -> Path:
        """Return the data directory."""
        return self.base / "data"

    @property
    def log(self) -> Path:
        """Return the log file."""
        return self.base / "log"


def advice(place: Place) -> str:
    """Return the hint of a server that does not start."""
    free = shutil.disk_usage(place.base).free
    if free < _SCARCE_BYTES:
        return f"The disk of {place.base} is full: {free >> 20} MB are free. Make room and run this again."
    return f"Its log is {place.log}. PIPELINE_HOME has to be on a local disk. Or: {OWN_DATABASE}"

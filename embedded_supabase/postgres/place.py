"""The folders of a server: data, socket, log."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from embedded_supabase.postgres.installation import OWN_DATABASE

_SCARCE_BYTES = 64 << 20


@dataclass(frozen=True)
class Place:
    """The base folder, which contains data and log, and the folder of the socket."""

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


def start_hint(place: Place) -> str:
    """Return the hint for a server that does not start."""
    free = shutil.disk_usage(place.base).free
    if free < _SCARCE_BYTES:
        return f"The disk of {place.base} is full: {free >> 20} MB are free. Free some space and try again."
    return f"Its log is {place.log}. PIPELINE_HOME must be on a local disk. Or: {OWN_DATABASE}"

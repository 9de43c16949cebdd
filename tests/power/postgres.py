"""What a power failure leaves of the folders of PostgreSQL; initdb syncs what it writes, and the server its data."""

from __future__ import annotations

import random
from pathlib import Path

from embedded_supabase.postgres.server import EmbeddedPostgres
from tests.power.log import Recorder
from tests.power.model import Model

_STATES = 200


def record_start(folder: Path) -> Recorder:
    """Start and stop PostgreSQL in a home on an empty disk, and return what the start recorded."""
    disk = folder / "postgres"
    disk.mkdir()
    disk.chmod(0o711)
    recorder = Recorder(disk)
    server = EmbeddedPostgres(disk / "home")
    server._disk = recorder
    with server:
        pass
    return recorder


def first_loss(recorder: Recorder, seed: int, without: str = "") -> str | None:
    """Return what a power failure after the start can take, None if no state shows it."""
    model = Model(recorder.folder, {".": 0}, without)
    for entry in recorder.log:
        model.apply(entry)
    chance = random.Random(seed)
    wanted = model.now()
    for _ in range(_STATES):
        found = model.after_power_failure(chance)
        if found.folders.get("home/postgres/data") is None:
            return "the database is missing"
        if found.files.get("home/postgres.json") != wanted.files["home/postgres.json"]:
            return "postgres.json is missing or damaged"
    return None

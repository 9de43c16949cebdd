"""The bucket, and totals of a verification, for tests of verify."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.storage import Storage
from tests import reset_support, world
from tests.services import StorageServer

KINDS = ("equal", "missing", "dangling", "damaged", "orphan", "inconsistent")
command = reset_support.command
load = reset_support.load


def totals(settings: Settings, **counts: int) -> str:
    """Return the line with the totals."""
    found = ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in KINDS)
    return f"Verified bucket {settings.bucket}: {found}.\n"


@dataclass(frozen=True)
class Bucket:
    """The bucket of a test, to be spoiled."""

    settings: Settings
    server: StorageServer

    def file(self, key: str) -> Path:
        """Return the file below the server's root that is the content of an object."""
        with closing(sqlite3.connect(f"{(self.server.root / 'index.sqlite').as_uri()}?mode=ro", uri=True)) as index:
            [(version,)] = index.execute(
                "SELECT version FROM objects WHERE bucket_id = ? AND name = ?", (self.settings.bucket, key)
            ).fetchall()
        return self.server.root.joinpath("objects", version[:2], version)

    def read(self, key: str) -> bytes:
        return self.file(key).read_bytes()

    def put(self, key: str, content: bytes) -> None:
        with closing(Storage(self.settings)) as storage:
            storage.upload(key, content)

    def remove(self, *keys: str) -> None:
        with closing(Storage(self.settings)) as storage:
            assert storage.remove(keys) == []

    def listed(self) -> list[str]:
        with closing(Storage(self.settings)) as storage:
            return [found.key for found in storage.list_objects("")]


@pytest.fixture
def stored(settings: Settings, storage_server: StorageServer) -> Bucket:
    return Bucket(settings, storage_server)


def photo_of(dataset: Path, key: str) -> Path:
    """Return the photo that was sent under a key."""
    _, _, number, camera = key.split("/")
    name = "*_Main.jpg" if camera == "camera1.jpg" else "*_Qualifying.jpg"
    return next(world.folders(dataset)[int(number)].rglob(name))


def put_fewer_bytes(bucket: Bucket, key: str) -> None:
    bucket.put(key, bucket.read(key)[:-1])


def put_stranger(bucket: Bucket, key: str) -> None:
    bucket.put(key, b"12345")


def flip(bucket: Bucket, key: str) -> None:
    """Change the content on the server's disk, where only who reads it sees that."""
    file = bucket.file(key)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

"""The files of objects: one per version, written to one folder and renamed into another."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


class Incoming:
    """The file of an upload in progress, which no reader sees."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "xb")  # noqa: SIM115 (closed by finish or abandon)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._finished = False
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            OSError: the chunk cannot be written.
        """
        self._file.write(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)

    def finish(self, target: Path) -> str:
        """Rename the file to its target, and return the MD5 of its content in hex."""
        self._file.close()
        move_file(self._path, target)
        self._finished = True
        return self._md5.hexdigest()

    def abandon(self) -> None:
        """Remove the file, unless `finish` has renamed it."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # closing flushes the buffer, which fails again on a full disk
            self._file.close()
        self._path.unlink(missing_ok=True)


def move_file(path: Path, target: Path) -> None:
    """Rename a file into a folder, which is created if it does not exist."""
    try:
        os.rename(path, target)
    except FileNotFoundError:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(path, target)

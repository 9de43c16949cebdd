"""The contents of objects: one file a version, received in one folder and renamed into another."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


class Incoming:
    """An upload that is under way: a file that nobody sees."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "xb")  # noqa: SIM115 (it lives as long as the upload)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._finished = False
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Add to the content.

        Raises:
            OSError: the disk does not take it.
        """
        self._file.write(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)

    def finish(self, target: Path) -> str:
        """Move the file to its place, and return the MD5 of its content in hex."""
        self._file.close()
        move_file(self._path, target)
        self._finished = True
        return self._md5.hexdigest()

    def abandon(self) -> None:
        """Remove the file; nothing happens after `finish`."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # what a full disk did not take, it does not take now
            self._file.close()
        self._path.unlink(missing_ok=True)


def move_file(path: Path, target: Path) -> None:
    """Rename a file into a folder, which is made where it is missing."""
    try:
        os.rename(path, target)
    except FileNotFoundError:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(path, target)

"""The files of objects: one per version, written to one folder and renamed into another."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import BinaryIO

from embedded_supabase.disk import Disk


class Incoming:
    """The file of an upload in progress, which no reader sees."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._disk = disk
        self._file = disk.create(path)  # closed by finish or abandon
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sealed = False
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            OSError: the chunk cannot be written.
        """
        self._file.write(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)

    def seal(self) -> str:
        """Leave the file to `finish`, so that `abandon` no longer removes it; return the MD5 of its content in hex."""
        self._sealed = True
        return self._md5.hexdigest()

    def finish(self, target: Path) -> None:
        """Sync the file, rename it to its target and sync the folder, or remove it on an error.

        Raises:
            OSError: the file cannot be written, synced or renamed.
        """
        try:
            with self._file:
                _publish(self._file, self._path, target, self._disk)
        except OSError:
            for path in (self._path, target):
                self._disk.unlink(path)
            raise

    def abandon(self) -> None:
        """Remove the file, unless it is sealed."""
        if self._sealed:
            return
        with contextlib.suppress(OSError):  # closing flushes the buffer, which fails again on a full disk
            self._file.close()
        self._disk.unlink(self._path)


def copy_file(source: BinaryIO, path: Path, target: Path, disk: Disk) -> None:
    """Copy an open file to `path`, sync and rename it as `Incoming.finish`, or remove it on an error; close the source.

    Raises:
        OSError: the copy cannot be written, synced or renamed.
    """
    try:
        with source, disk.create(path) as copy:
            shutil.copyfileobj(source, copy)
            _publish(copy, path, target, disk)
    except OSError:
        for written in (path, target):
            disk.unlink(written)
        raise


def _publish(file: BinaryIO, path: Path, target: Path, disk: Disk) -> None:
    disk.sync(file)
    disk.rename(path, target)
    disk.sync_folder(target.parent)

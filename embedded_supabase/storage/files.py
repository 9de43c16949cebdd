"""The files of objects: one per version, written to one folder and renamed into another."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from embedded_supabase.files import sync_folder


class Incoming:
    """The file of an upload in progress, which no reader sees."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "xb")  # noqa: SIM115 (closed by finish or abandon)
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

    def finish(self, target: Path, *, durable: bool) -> None:
        """Rename the file to its target, or remove it on an error; with `durable`, sync the file and the folder.

        Raises:
            OSError: the file cannot be written, synced or renamed.
        """
        try:
            with self._file:
                self._file.flush()
                publish_file(self._file, self._path, target, durable=durable)
        except OSError:
            for path in (self._path, target):
                path.unlink(missing_ok=True)
            raise

    def abandon(self) -> None:
        """Remove the file, unless it is sealed."""
        if self._sealed:
            return
        with contextlib.suppress(OSError):  # closing flushes the buffer, which fails again on a full disk
            self._file.close()
        self._path.unlink(missing_ok=True)


def publish_file(file: BinaryIO, path: Path, target: Path, *, durable: bool) -> None:
    """Rename a written file; with `durable`, sync it before and its folder afterwards."""
    if durable:
        os.fsync(file.fileno())
    os.rename(path, target)
    if durable:
        sync_folder(target.parent)


def copy_file(source: BinaryIO, path: Path, target: Path, *, durable: bool) -> None:
    """Copy an open file to `path` and rename it to its target, or remove it on an error; close the source.

    Raises:
        OSError: the copy cannot be written, synced or renamed.
    """
    try:
        with source, open(path, "xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            publish_file(copy, path, target, durable=durable)
    except OSError:
        for written in (path, target):
            written.unlink(missing_ok=True)
        raise

"""Distinguish a missing file, which is a reject, from an unavailable dataset, which is a transient error.

On a host without the mount, every file of a batch is missing. So a file counts as missing only if the folders around
it exist, and never on a host that only runs `worker`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.batches.state import Batch
from pipeline.database import Connection
from pipeline.dataset.layout import holder_of, holds_recognitions, modified
from pipeline.dataset.records import Reject
from pipeline.errors import SourceUnavailable, UsageError, remedy_of

_GONE = frozenset({"folder_unreadable", "photo_vanished", "photo_unreadable", "json_vanished", "json_unreadable"})
_CHANGED = frozenset({"photo_changed", "json_changed"})
_SAMPLE = 20


def require_source(source: Path, rejects: Iterable[Reject], *, may_reject: bool = True) -> None:
    """Raise SourceUnavailable if rejects name missing files because the dataset is unavailable.

    A source or export that does not exist or contains no recognition counts as not mounted. A file that can be read
    now was temporarily unavailable. Without `may_reject`, for the host of a `worker`, no file may differ either.
    """
    lost = [one for one in rejects if one.code in _GONE or one.code in _CHANGED]
    if lost and not may_reject:
        message = f"On the host {socket.gethostname()}, {source / lost[0].path} is not the file that discovery saw."
        raise SourceUnavailable(message, "Mount the same dataset there, under the same path; nothing was rejected.")
    gone = [one for one in lost if one.code in _GONE]
    for folder in {holder_of(one.path) for one in gone}:
        _require_folder(source / folder)
    for one in gone:
        if _is_available(source / one.path, one.code):
            message = f"{source / one.path} was temporarily unavailable: {one.message}."
            raise SourceUnavailable(message, "Run the same command again.")


def _require_folder(folder: Path) -> None:
    hint = "Mount or restore it, then run the same command again; nothing was rejected."
    try:
        if holds_recognitions(folder):
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as exc:
        message = f"The dataset's folder {folder} cannot be read: {exc.strerror}."
        raise SourceUnavailable(message, remedy_of(exc) or hint) from exc
    raise SourceUnavailable(f"The dataset's folder {folder} is gone, or has no recognition in it any more.", hint)


def _is_available(path: Path, code: str) -> bool:
    """Return whether a folder, or a file to its end, can be read after all."""
    try:
        if code == "folder_unreadable":
            os.listdir(path)
            return True
        if not path.is_file():  # a named pipe would block
            return False
        with open(path, "rb") as stream:
            while stream.read(1 << 20):
                pass
        return True
    except OSError as exc:
        if remedy := remedy_of(exc):  # a limit of this machine, which says nothing about the file
            raise SourceUnavailable(f"{path} cannot be read: {exc.strerror}.", remedy) from exc
        return False


def require_dataset(connection: Connection, batch: Batch, shard: int) -> None:
    """Raise UsageError unless some files of a shard are on this host as discovery saw them, or it has none."""
    rows = connection.execute("sample_manifest", batch_id=batch.id, shard=shard, count=_SAMPLE)
    for row in rows:
        for path, size, mtime in zip(row.photo_paths, row.photo_sizes, row.photo_mtimes, strict=True):
            with suppress(OSError):
                facts = os.stat(f"{batch.source}/{path}")
                if (facts.st_size, modified(facts)) == (size, mtime):
                    return
    if any(row.photo_paths for row in rows):
        hint = "Mount it here under the same path, with the same file times; nothing was rejected for want of it."
        problem = f"is not on this host: {batch.source} has no file as discovery saw it."
        raise UsageError(f"The dataset of batch {batch.id} {problem}", hint)

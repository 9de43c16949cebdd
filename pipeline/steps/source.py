"""Is the dataset there at all? A file that is lost is a reject; a dataset that is lost is to come back.

A host where nothing is mounted sees every file of a batch vanish. Whoever takes that for the truth rejects the whole
batch, so a lost file is believed only where what is around it is there, and on a host that only helps not at all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from pipeline.batches.state import Batch
from pipeline.database import Connection
from pipeline.dataset.layout import holder_of, holds_recognitions, modified
from pipeline.dataset.records import Reject
from pipeline.errors import SourceUnavailable

_GONE = frozenset({"folder_unreadable", "photo_vanished", "photo_unreadable", "json_vanished", "json_unreadable"})
_CHANGED = frozenset({"photo_changed", "json_changed"})
_SAMPLE = 20


def require_source(source: Path, rejects: Iterable[Reject], *, may_reject: bool = True) -> None:
    """Raise unless the files that rejects tell of are lost, and not the dataset that they are in.

    A folder of recognitions, the source or an export, that is gone or has none left is one that is not mounted. A file
    that can be read now after all was away for a moment.

    Arguments:
        may_reject: this host may say that a file is lost. A helper may see less than the host that discovered.

    Raises:
        SourceUnavailable: nothing may be rejected for want of these files.
    """
    lost = [one for one in rejects if one.code in _GONE or one.code in _CHANGED]
    if lost and not may_reject:
        raise not_as_discovered(source / lost[0].path)
    gone = [one for one in lost if one.code in _GONE]
    for folder in {holder_of(one.path) for one in gone}:
        if not holds_recognitions(source / folder):
            raise SourceUnavailable(
                f"The dataset's folder {source / folder} is gone, or has no recognition in it any more.",
                "Mount it, or bring it back, then run the same command again; nothing was rejected for want of it.",
            )
    for one in gone:
        if _can_be_read(source / one.path):
            raise SourceUnavailable(
                f"{source / one.path} could not be read for a moment.", "Run the same command again."
            )


def not_as_discovered(path: Path) -> SourceUnavailable:
    """Return the error of a host that sees another file than discovery saw, and may not say that it is lost."""
    return SourceUnavailable(
        f"On the host {socket.gethostname()}, {path} is not the file that discovery saw.",
        "Mount the same dataset there, under the same path; nothing was rejected for want of it.",
    )


def _can_be_read(path: Path) -> bool:
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                next(entries, None)
        else:
            with open(path, "rb") as stream:
                stream.read(1)
    except OSError:
        return False
    return True


def has_source(connection: Connection, batch: Batch, shard: int) -> bool:
    """Return whether this host sees files of a shard as discovery saw them, by looking at some of them."""
    source = Path(batch.source)
    rows = connection.execute("sample_manifest", batch_id=batch.id, shard=shard, count=_SAMPLE)
    files = [file for row in rows for file in zip(row.photo_paths, row.photo_sizes, row.photo_mtimes, strict=True)]
    return not files or any(_is_as_seen(source / path, size, mtime) for path, size, mtime in files)


def _is_as_seen(path: Path, size: int, mtime: int) -> bool:
    try:
        facts = path.stat()
    except OSError:
        return False
    return (facts.st_size, modified(facts)) == (size, mtime)

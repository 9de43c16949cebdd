"""Replace a file atomically."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def may_replace(path: Path) -> bool:
    """Return whether a path is free or that of a regular file; raises OSError. A device or a pipe is of others."""
    return path.is_file() or not path.exists()


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a new UTF-8 file for its owner alone, which replaces the one at `path` unless the block raises.

    Readers see the former file until then; a link stays, and leads to the new one. Raises OSError, also for a device.
    """
    path = Path(os.path.realpath(path))
    if not may_replace(path):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise

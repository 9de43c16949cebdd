"""The changes of a disk, and the syncs that make them survive a power failure.

Code whose files have to survive one changes them through a `Disk`, so that a test can record the changes in order and
build what a power failure at any point may leave: docs/explanation/power-loss.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


class Disk:
    """Creates, renames, removes and syncs files and folders.

    Arguments:
        durable: False makes every sync do nothing, for tests whose data need not survive a power failure.
    """

    def __init__(self, *, durable: bool = True) -> None:
        self.durable = durable

    def create(self, path: Path) -> BinaryIO:
        """Create a file of mode 0600 and open it for writing.

        Raises:
            OSError: it exists, or cannot be created.
        """
        return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))

    def sync(self, file: BinaryIO) -> None:
        """Write the buffer of a file, and make its content durable, but not its name."""
        file.flush()
        if self.durable:
            os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file, replacing the target, or a folder."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it exists."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path, mode: int = 0o700) -> None:
        """Create a folder, unless it exists; the umask applies."""
        path.mkdir(mode=mode, exist_ok=True)

    def set_access(self, path: Path, mode: int, owner: tuple[int, int] | None) -> None:
        """Set the mode of a folder regardless of the umask, and with (uid, gid) its owner."""
        os.chmod(path, mode)
        if owner is not None:
            os.chown(path, *owner, follow_symlinks=False)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable, and its mode and owner, but not its own name."""
        if not self.durable:
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


#: The disk of everything but tests.
DURABLE = Disk()

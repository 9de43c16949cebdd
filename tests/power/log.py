"""The changes of a disk in the order in which they were made."""

from __future__ import annotations

import linecache
import os
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from embedded_supabase.disk import Disk

PACKAGE = Path(__file__).resolve().parents[2] / "embedded_supabase"
#: Files that a start replaces or that only hold a lock: what a power failure leaves of them does not matter.
PASSING = (".lock", "-shm", "server.json")


@dataclass(frozen=True)
class Made:
    """A new file or folder; `inode` is a number that is never used again."""

    path: str
    inode: int
    is_folder: bool
    mode: int


@dataclass(frozen=True)
class Written:
    """Bytes written to a file."""

    inode: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class Truncated:
    """A new size of a file."""

    inode: int
    size: int


@dataclass(frozen=True)
class Renamed:
    """A new name of a file or folder."""

    source: str
    target: str


@dataclass(frozen=True)
class Unlinked:
    """A file that lost its name."""

    path: str


@dataclass(frozen=True)
class AccessSet:
    """A new mode of a folder."""

    inode: int
    mode: int


@dataclass(frozen=True)
class Synced:
    """A sync of a file or folder; `site` is the line of code that asked for it."""

    inode: int
    site: str


@dataclass(frozen=True)
class Noted:
    """Something that a client of the server knows, see `script.py`."""

    fact: Any


Entry = Made | Written | Truncated | Renamed | Unlinked | AccessSet | Synced | Noted


class Recorder(Disk):
    """Performs the changes below a folder, which stands for the disk, and records them; syncs are recorded only.

    Arguments:
        folder: what it contains at the beginning counts as durable.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(durable=True)
        self.folder = folder
        self.log: list[Entry] = []
        self.lock = threading.RLock()
        #: Called with the lock held before every change; a test may stop the disk here.
        self.before: Callable[[], None] = lambda: None
        self._inodes = {".": 0}
        self._last = 0
        for path in sorted(folder.rglob("*")):
            if not path.name.endswith(PASSING):
                self._number(self.name(path))
        self.first = dict(self._inodes)

    def name(self, path: Path | str) -> str:
        """Return a path below the folder, relative to it."""
        return os.path.relpath(path, self.folder)

    def contains(self, path: str) -> bool:
        """Return whether a path is on this disk."""
        return path.startswith(f"{self.folder}{os.sep}")

    def note(self, fact: Any) -> None:
        """Record what a client knows from now on."""
        with self.lock:
            self.log.append(Noted(fact))

    # Disk

    def create(self, path: Path) -> BinaryIO:
        with self.lock:
            self.before()
            raw = _File(path, self)
            raw.inode = self.made(path, is_folder=False)
            return BufferedWriter(raw)

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        assert isinstance(file, BufferedWriter)
        assert isinstance(file.raw, _File)
        self._synced(file.raw.inode, _site())

    def rename(self, source: Path, target: Path) -> None:
        with self.lock:
            self.before()
            super().rename(source, target)
            old, new = self.name(source), self.name(target)
            if old not in self._inodes:
                self.made(target, is_folder=target.is_dir(), name=old)  # another program wrote and synced it
            self.log.append(Renamed(old, new))
            moved = {path: path for path in self._inodes if path == old or path.startswith(f"{old}/")}
            for path in moved:
                self._inodes[new + path[len(old) :]] = self._inodes.pop(path)

    def unlink(self, path: Path) -> None:
        with self.lock:
            self.before()
            if path.exists():
                super().unlink(path)
                self.unlinked(path)

    def make_folder(self, path: Path, mode: int = 0o700) -> None:
        with self.lock:
            self.before()
            exists = path.exists()
            super().make_folder(path, mode)
            if not exists:
                self.made(path, is_folder=True)

    def set_access(self, path: Path, mode: int, owner: tuple[int, int] | None) -> None:
        with self.lock:
            self.before()
            super().set_access(path, mode, owner)
            self.log.append(AccessSet(self._inodes[self.name(path)], mode))

    def sync_folder(self, path: Path) -> None:
        self.folder_synced(path, _site())

    # Changes that SQLite makes

    def made(self, path: Path | str, *, is_folder: bool, name: str | None = None) -> int:
        """Record a new file or folder, by default under the name of its path, and return its number."""
        with self.lock:
            name = name or self.name(path)
            inode = self._number(name)
            self.log.append(Made(name, inode, is_folder, stat.S_IMODE(os.stat(path).st_mode)))
            return inode

    def written(self, inode: int, offset: int, content: bytes) -> None:
        """Record bytes written to a file."""
        with self.lock:
            self.log.append(Written(inode, offset, content))

    def truncated(self, inode: int, size: int) -> None:
        """Record a new size of a file."""
        with self.lock:
            self.log.append(Truncated(inode, size))

    def unlinked(self, path: Path | str) -> None:
        """Record the removal of a file."""
        with self.lock:
            del self._inodes[self.name(path)]
            self.log.append(Unlinked(self.name(path)))

    def inode_of(self, path: Path | str) -> int | None:
        """Return the number of a file or folder."""
        return self._inodes.get(self.name(path))

    def file_synced(self, inode: int, site: str) -> None:
        """Record the sync of a file."""
        self._synced(inode, site)

    def folder_synced(self, path: Path | str, site: str) -> None:
        """Record the sync of a folder; those above the disk are not part of it."""
        if Path(path) == self.folder or self.contains(str(path)):
            self._synced(self._inodes[self.name(path)], site)

    def _synced(self, inode: int, site: str) -> None:
        with self.lock:
            self.before()
            self.log.append(Synced(inode, site))

    def _number(self, name: str) -> int:
        self._last += 1
        self._inodes[name] = self._last
        return self._last


class _File(FileIO):
    """A file that records what is written to it, in order."""

    inode: int

    def __init__(self, path: Path, recorder: Recorder) -> None:
        super().__init__(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))
        self._recorder = recorder

    def write(self, content: Any) -> int:
        with self._recorder.lock:
            self._recorder.before()
            offset = self.tell()
            count = super().write(content)
            self._recorder.written(self.inode, offset, bytes(content[:count]))
            return count


def _site() -> str:
    """Return the line of the package that asked for a sync."""
    frame = sys._getframe(2)
    return site(Path(frame.f_code.co_filename), linecache.getline(frame.f_code.co_filename, frame.f_lineno))


def site(file: Path, line: str) -> str:
    """Return how a line of the package is named: its file, and its text without the comment."""
    return f"{file.resolve().relative_to(PACKAGE.parent)}: {line.partition('#')[0].strip()}"

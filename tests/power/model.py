"""What a disk may contain after a power failure: everything that POSIX allows, and more than file systems show.

A name in a folder, a sector of a file, the size of a file and the mode of a folder are registers. A power failure
leaves in each of them any value that it had since the last sync of its file or folder, independently of all others. So
a rename can be durable without the content of the file, can leave both names or neither, and later changes can be
durable without earlier ones. A sync fixes the registers of one file, or of one folder; its own name is a register of
the folder above.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.power.log import AccessSet, Entry, Made, Renamed, Synced, Truncated, Unlinked, Written

SECTOR = 512
_T = TypeVar("_T")


@dataclass
class File:
    """A file: its durable content, and what was written since."""

    mode: int
    content: bytes = b""
    pending: list[Written | Truncated] = field(default_factory=list)

    def sync(self) -> None:
        content = bytearray(self.content)
        for one in self.pending:
            _apply(content, one)
        self.content, self.pending = bytes(content), []


@dataclass
class Folder:
    """A folder: for each name, and for its mode, the durable value and those that it had since."""

    modes: list[int]
    names: dict[str, list[int | None]] = field(default_factory=dict)

    def sync(self) -> None:
        self.modes = self.modes[-1:]
        self.names = {name: values[-1:] for name, values in self.names.items() if values[-1] is not None}


@dataclass(frozen=True)
class Tree:
    """The content of a disk: files with mode and content, folders with their modes; parents come first."""

    files: dict[str, tuple[int, bytes]]
    folders: dict[str, int]

    def digest(self) -> int:
        """Return a number that is the same for equal contents."""
        described = repr((sorted(self.files.items()), sorted(self.folders.items())))
        return int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big")

    def write(self, folder: Path) -> None:
        """Write the content below an existing folder."""
        for name, mode in self.folders.items():
            path = f"{folder}/{name}"
            os.mkdir(path, mode)
            if mode & 0o077:
                os.chmod(path, mode)  # regardless of the umask
        for name, (mode, content) in self.files.items():
            path = f"{folder}/{name}"
            with open(path, "xb") as file:
                file.write(content)
            os.chmod(path, mode)


class Model:
    """A disk while the entries of a log are applied to it.

    Arguments:
        folder: what the disk contained before the first entry.
        without: the syncs of this site are left out.
    """

    def __init__(self, folder: Path, first: dict[str, int], without: str = "") -> None:
        self.without = without
        self._nodes: dict[int, File | Folder] = {}
        for path, inode in first.items():
            found = os.lstat(folder / path)
            mode = stat.S_IMODE(found.st_mode)
            is_folder = stat.S_ISDIR(found.st_mode)
            self._nodes[inode] = Folder([mode]) if is_folder else File(mode, (folder / path).read_bytes())
            if path != ".":
                self._parent(path).names[os.path.basename(path)] = [inode]

    def apply(self, entry: Entry) -> None:
        """Make one change."""
        if isinstance(entry, Made):
            self._nodes[entry.inode] = Folder([entry.mode]) if entry.is_folder else File(entry.mode)
            self._set(entry.path, entry.inode)
        elif isinstance(entry, (Written, Truncated)):
            self._file(entry.inode).pending.append(entry)
        elif isinstance(entry, Renamed):
            inode = self._inode(entry.source)
            self._set(entry.source, None)
            self._set(entry.target, inode)
        elif isinstance(entry, Unlinked):
            self._set(entry.path, None)
        elif isinstance(entry, AccessSet):
            folder = self._nodes[entry.inode]
            assert isinstance(folder, Folder)
            folder.modes.append(entry.mode)
        elif isinstance(entry, Synced) and entry.site != self.without:
            self._nodes[entry.inode].sync()

    def now(self) -> Tree:
        """Return the content of the disk without a power failure."""
        return self._tree(_Newest())

    def after_power_failure(self, chance: random.Random) -> Tree:
        """Return one of the contents that a power failure at this point may leave."""
        return self._tree(_Random(chance))

    def _tree(self, choice: _Choice) -> Tree:
        tree = Tree({}, {})
        contents: dict[int, bytes] = {}

        def visit(folder: Folder, prefix: str) -> None:
            for name, values in folder.names.items():
                inode = choice.one_of(values)
                if inode is None:
                    continue
                node, path = self._nodes[inode], prefix + name
                if isinstance(node, Folder):
                    tree.folders[path] = choice.one_of(node.modes)
                    visit(node, f"{path}/")
                else:
                    if inode not in contents:
                        contents[inode] = choice.content(node)
                    tree.files[path] = node.mode, contents[inode]

        root = self._nodes[0]
        assert isinstance(root, Folder)
        visit(root, "")
        return tree

    def _file(self, inode: int) -> File:
        file = self._nodes[inode]
        assert isinstance(file, File)
        return file

    def _parent(self, path: str) -> Folder:
        folder = self._nodes[self._inode(os.path.dirname(path) or ".")]
        assert isinstance(folder, Folder)
        return folder

    def _inode(self, path: str) -> int:
        inode = 0
        for name in path.split("/") if path != "." else ():
            folder = self._nodes[inode]
            assert isinstance(folder, Folder)
            found = folder.names[name][-1]
            assert found is not None
            inode = found
        return inode

    def _set(self, path: str, inode: int | None) -> None:
        self._parent(path).names.setdefault(os.path.basename(path), [None]).append(inode)


class _Choice:
    """What is left of the registers of a disk."""

    def one_of(self, values: list[_T]) -> _T:
        raise NotImplementedError

    def content(self, file: File) -> bytes:
        raise NotImplementedError


class _Newest(_Choice):
    """Everything."""

    def one_of(self, values: list[_T]) -> _T:
        return values[-1]

    def content(self, file: File) -> bytes:
        return _after(file.content, file.pending)


class _Random(_Choice):
    """Any value of each register; each state has its own bias to old or to new values, extremes included."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._old = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        self._new = (1 - self._old) * chance.choice((0.0, 0.5, 1.0))

    def one_of(self, values: list[_T]) -> _T:
        if len(values) == 1:
            return values[0]
        draw = self._chance.random()
        if draw < self._old:
            return values[0]
        return values[-1] if draw < self._old + self._new else self._chance.choice(values)

    def content(self, file: File) -> bytes:
        if not file.pending:
            return file.content
        kind = self._chance.choice(("values", "beginning", "sectors", "sectors"))
        if kind == "values":
            return self.one_of([file.content, _after(file.content, file.pending)])
        if kind == "beginning":
            return _after(file.content, file.pending[: self._chance.randrange(len(file.pending) + 1)])
        return self._mixed(file)

    def _mixed(self, file: File) -> bytes:
        """Return a file whose size and sectors have values of different times; what was never written is zero."""
        content = bytearray(file.content)
        sizes, sectors = [len(content)], dict[int, list[bytes]]()
        for one in file.pending:
            before = len(content)
            touched = range(0)
            if isinstance(one, Written):
                touched = range(min(one.offset, before) // SECTOR, -(-(one.offset + len(one.content)) // SECTOR))
            for sector in touched:
                sectors.setdefault(sector, [_sector(content, sector)])
            _apply(content, one)
            sizes.append(len(content))
            for sector in touched:
                sectors[sector].append(_sector(content, sector))
        size = self._chance.choice(sizes)
        mixed = bytearray(file.content).ljust(max(sizes), b"\0")
        for sector, values in sectors.items():
            mixed[sector * SECTOR : sector * SECTOR + SECTOR] = self._chance.choice(values)
        return bytes(mixed[:size].ljust(size, b"\0"))


def _apply(content: bytearray, one: Written | Truncated) -> None:
    if isinstance(one, Truncated):
        del content[one.size :]
        content.extend(bytes(one.size - len(content)))
        return
    content.extend(bytes(max(0, one.offset - len(content))))
    content[one.offset : one.offset + len(one.content)] = one.content


def _after(content: bytes, changes: Iterable[Written | Truncated]) -> bytes:
    changed = bytearray(content)
    for one in changes:
        _apply(changed, one)
    return bytes(changed)


def _sector(content: bytearray, number: int) -> bytes:
    return bytes(content[number * SECTOR : number * SECTOR + SECTOR]).ljust(SECTOR, b"\0")

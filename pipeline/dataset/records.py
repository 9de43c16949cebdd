"""Folders, files and recognitions of a dataset, and rejects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

from pipeline.units import counted

MAXIMUM_BIGINT = 2**63 - 1  # of PostgreSQL

#: The classes of files: each file below the source is in one of them.
FILE_CLASSES = ("used", "unchanged", "not_taken", "rejected", "passed_over", "clutter")
USED, UNCHANGED, NOT_TAKEN, REJECTED, PASSED_OVER, CLUTTER = FILE_CLASSES


@dataclass(frozen=True)
class Folder:
    """A recognition's folder: its number, its path relative to the source, and its rank: 0 is before older copies."""

    recognition_id: int
    path: str
    rank: int = 0


@dataclass(frozen=True)
class File:
    """A file as discovery saw it: path relative to the source, bytes, modification time in ns since 1970."""

    path: str
    size: int
    mtime: int


@dataclass(frozen=True)
class Recognition:
    """A usable recognition: the photos of camera 1 and 2, and its documents if it has them."""

    recognition_id: int
    photos: tuple[File, File]
    menu: File | None
    receipt: File | None
    captured_on: date | None

    @property
    def files(self) -> tuple[File, ...]:
        """Return the files that it has: photos, menu, receipt."""
        return tuple(file for file in (*self.photos, self.menu, self.receipt) if file is not None)

    @property
    def identity(self) -> str:
        """Return size, time and path of each file, as ingest.identity_of does; a path has no two slashes in a row."""
        return "//".join(f"{file.size} {file.mtime} {file.path}" for file in self.files)


@dataclass(frozen=True)
class _Input:
    """An input that a person should know of, with a code and a sentence."""

    recognition_id: int | None
    path: str
    code: str
    message: str


class Reject(_Input):
    """An input that is left out."""


class Notice(_Input):
    """An input that was passed over, or used although it is unusual."""


class Deviation(NamedTuple):
    """What is unusual about a file that is used, or why one is passed over: a code and a sentence for a notice."""

    code: str
    message: str


@dataclass(frozen=True)
class Inspected:
    """What became of a folder of a recognition, what was noticed in it, and its files by class."""

    result: Recognition | Reject
    notices: list[Notice]
    files: Counter[str]


def describe_files(files: Mapping[str, int]) -> str:
    """Return the number of files by class, without empty classes."""
    parts = [f"{files[name]} {name.replace('_', ' ')}" for name in FILE_CLASSES if files.get(name)]
    return f"{counted(sum(files.values()), 'file')} below the source" + (f": {', '.join(parts)}" if parts else "")


def describe_codes(counts: Mapping[str, int]) -> str:
    """Return numbers of rejects or notices by code, the most frequent first."""
    return ", ".join(f"{code} {count}" for code, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def is_text(path: str) -> bool:
    """Return whether a text can be encoded as UTF-8."""
    return path.encode(errors="replace").decode() == path

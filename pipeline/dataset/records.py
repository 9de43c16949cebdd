"""Folders, files and recognitions of a dataset, and rejects."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

MAXIMUM_BIGINT = 2**63 - 1  # of PostgreSQL


@dataclass(frozen=True)
class Folder:
    """A recognition's folder: its number and its path relative to the source."""

    recognition_id: int
    path: str


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


@dataclass(frozen=True)
class Reject:
    """An input that is left out, with a code and a sentence."""

    recognition_id: int | None
    path: str
    code: str
    message: str


@dataclass(frozen=True)
class Notice:
    """An input that was passed over, or used in a way that a person should know of, with a code and a sentence."""

    recognition_id: int | None
    path: str
    code: str
    message: str


class Deviation(NamedTuple):
    """What is unusual about a document or a photo that is used, as a code and a sentence; it becomes a notice."""

    code: str
    message: str


def is_text(path: str) -> bool:
    """Return whether a text can be encoded as UTF-8."""
    return path.encode(errors="replace").decode() == path

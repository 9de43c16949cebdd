"""Read and check the files of a recognition: each photo once, and nothing of it is changed on the way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.documents import check_menu, check_receipt
from pipeline.dataset.layout import modified
from pipeline.dataset.photo import Dimensions, check_photo
from pipeline.dataset.records import File, Recognition, Reject
from pipeline.errors import BadInput
from pipeline.observe.metrics import Metrics

#: Bytes of photos that one process holds at most; a recognition larger than that goes alone.
BUDGET = 64 << 20
_KNOWN_MENUS = 256


@dataclass(frozen=True)
class Photo:
    """A photo that was read and checked: its content, dimensions and digests (hex)."""

    content: bytes
    dimensions: Dimensions
    sha256: str
    md5: str


@dataclass(frozen=True)
class Files:
    """What was read of a recognition: its photos as they are, and the SHA-256 (hex) of its documents, checked."""

    photos: tuple[bytes, bytes]
    menu_sha256: str | None
    receipt_sha256: str | None


class Budget:
    """Bound what is held at once, as bytes: wait in line until there is room, always letting at least one through."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()
        self._line: deque[tuple[int, threading.Lock]] = deque()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """LockedBatch so much for the block."""
        self.take(size)
        try:
            yield
        finally:
            self.give_back(size)

    def take(self, size: int) -> None:
        """Wait for room for so much, and hold it until `give_back`, be it in another thread."""
        with self._lock:
            if not self._line and self._fits(size):
                self._used += size
                return
            turn = threading.Lock()
            turn.acquire()
            self._line.append((size, turn))
        turn.acquire()

    def give_back(self, size: int) -> None:
        """Make room again, and wake those, and only those, whose turn it is."""
        with self._lock:
            self._used -= size
            self._wake()

    def _wake(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            size, turn = self._line.popleft()
            self._used += size
            turn.release()

    def _fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._limit


#: How many decode at once: as many as there are processors.
DECODERS = os.cpu_count() or 1
# A day's menu is the same file again and again: its digest is remembered once it was found good.
_good_menus: OrderedDict[str, None] = OrderedDict()
_good_menus_lock = threading.Lock()


def read_files(source: Path, recognition: Recognition, metrics: Metrics) -> Files | Reject:
    """Read everything of a recognition, documents first, which are checked as well."""
    path = ""
    try:
        menu_sha256 = receipt_sha256 = None
        if recognition.menu is not None:
            path = recognition.menu.path
            menu_sha256 = _check_menu(read_file(source, recognition.menu, "json"))
        if recognition.receipt is not None:
            path = recognition.receipt.path
            content = read_file(source, recognition.receipt, "json")
            check_receipt(content)
            receipt_sha256 = hashlib.sha256(content).hexdigest()
        contents = []
        for file in recognition.photos:
            path = file.path
            with metrics.timed("photo_read"):
                contents.append(read_file(source, file, "photo"))
    except BadInput as exc:
        return Reject(recognition.recognition_id, path, exc.code, exc.message)
    return Files((contents[0], contents[1]), menu_sha256, receipt_sha256)


def check_photos(recognition: Recognition, files: Files, metrics: Metrics) -> tuple[Photo, Photo] | Reject:
    """Check the photos of a recognition, which is work for a processor."""
    photos = []
    for file, content in zip(recognition.photos, files.photos, strict=True):
        try:
            with metrics.timed("photo_check"):
                photos.append(_checked(content))
        except BadInput as exc:
            return Reject(recognition.recognition_id, file.path, exc.code, exc.message)
    return photos[0], photos[1]


def _checked(content: bytes) -> Photo:
    dimensions = check_photo(content)
    sha256, md5 = hashlib.sha256(content), hashlib.md5(content, usedforsecurity=False)
    return Photo(content, dimensions, sha256.hexdigest(), md5.hexdigest())


def size_of(recognition: Recognition) -> int:
    """Return the bytes of all files of a recognition."""
    files = (*recognition.photos, recognition.menu, recognition.receipt)
    return sum(file.size for file in files if file is not None)


def read_file(source: Path, file: File, kind: str) -> bytes:
    """Read a file that must still be the one that discovery saw.

    Raises:
        BadInput: `<kind>_vanished`, `<kind>_changed` or `<kind>_unreadable`.
    """
    content, facts = read_up_to(f"{source}/{file.path}", file.size + 1, kind, "discovery")
    if (facts.st_size, modified(facts)) != (file.size, file.mtime):
        raise BadInput(f"{kind}_changed", "the file changed since discovery")
    if len(content) != file.size:
        raise BadInput(f"{kind}_changed", "the file changed while it was read")
    return content


def read_up_to(path: str, size: int, kind: str, since: str) -> tuple[bytes, os.stat_result]:
    """Read so many bytes of a file, fewer where it ends before; return them, and its facts of before.

    What is no file, such as a pipe that took its place, is not waited for.

    Arguments:
        since: when it was there, in words.

    Raises:
        BadInput: `<kind>_vanished` or `<kind>_unreadable`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            content = os.read(descriptor, size)
            while len(content) < size and (more := os.read(descriptor, size - len(content))):
                content += more
        finally:
            os.close(descriptor)
    except FileNotFoundError as exc:
        raise BadInput(f"{kind}_vanished", f"the file vanished since {since}") from exc
    except OSError as exc:
        raise BadInput(f"{kind}_unreadable", f"the file cannot be read: {exc.strerror}") from exc
    return content, facts


def _check_menu(content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with _good_menus_lock:
        if digest in _good_menus:
            _good_menus.move_to_end(digest)
            return digest
    check_menu(content)
    with _good_menus_lock:
        _good_menus[digest] = None
        if len(_good_menus) > _KNOWN_MENUS:
            _good_menus.popitem(last=False)
    return digest

"""Read and check the files of a recognition; each photo is read once."""

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

#: Maximum bytes of photos in memory per process; a larger recognition is processed alone.
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
    """The unchecked photos of a recognition, and the SHA-256 (hex) of its checked documents."""

    photos: tuple[bytes, bytes]
    menu_sha256: str | None
    receipt_sha256: str | None


class Budget:
    """A first-come-first-served limit on bytes in use; a reservation above the limit waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes for the duration of the block."""
        self.reserve(size)
        try:
            yield
        finally:
            self.release(size)

    def reserve(self, size: int) -> None:
        """Wait until `size` bytes are free and reserve them; any thread may release them."""
        with self._lock:
            if not self._waiting and self._fits(size):
                self._used += size
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append((size, turn))
        turn.acquire()

    def release(self, size: int) -> None:
        """Release `size` bytes, and wake the waiting threads whose reservations now fit."""
        with self._lock:
            self._used -= size
            while self._waiting and self._fits(self._waiting[0][0]):
                wanted, turn = self._waiting.popleft()
                self._used += wanted
                turn.release()

    def _fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._limit


#: Maximum number of concurrent photo decodes: one per processor.
DECODERS = os.cpu_count() or 1
# Many recognitions share a day's menu, so the digests of valid menus are cached.
_good_menus: OrderedDict[str, None] = OrderedDict()
_good_menus_lock = threading.Lock()


def read_files(source: Path, recognition: Recognition, metrics: Metrics) -> Files | Reject:
    """Read the files of a recognition; check the documents, which are read first."""
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
    """Check the photos of a recognition; this is CPU-bound."""
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
    """Read a file whose size and modification time must be those that discovery recorded.

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
    """Return up to `size` bytes of a file, and its status before the read.

    A named pipe that replaced the file does not block.

    Arguments:
        since: when the file last existed, in words, for the error message.

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

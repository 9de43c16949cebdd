"""Read and check the files of a recognition; each photo is read once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.dates import check_date
from pipeline.dataset.documents import check_menu, check_receipt
from pipeline.dataset.layout import modified
from pipeline.dataset.photo import Dimensions, check_photo
from pipeline.dataset.records import Deviation, File, Notice, Recognition, Reject
from pipeline.errors import BadInput
from pipeline.observe.metrics import Metrics

#: Maximum bytes of photos in memory per process; a larger recognition is processed alone.
BUDGET = 64 << 20
#: Maximum number of concurrent photo decodes: one per processor.
DECODERS = os.cpu_count() or 1
_KNOWN_MENUS = 1000
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PhotoFacts:
    """What a check finds out about a photo; digests are hex."""

    dimensions: Dimensions
    sha256: str
    md5: str


@dataclass(frozen=True)
class Facts:
    """What a check finds out about a recognition: its usable files, and what is unusual there; digests are hex."""

    recognition: Recognition
    photos: tuple[PhotoFacts, PhotoFacts]
    menu_sha256: str | None
    receipt_sha256: str | None
    notices: tuple[Notice, ...]


class Budget:
    """A limit on bytes in use; a reservation above the limit waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes for the duration of the block."""
        with self._condition:
            self._condition.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._condition:
                self._used -= size
                self._condition.notify_all()


class Checker:
    """Read and check recognitions, in several threads: their photos in memory and concurrent decodes are limited."""

    def __init__(self) -> None:
        self.budget = Budget(BUDGET)
        self._decoders = threading.BoundedSemaphore(DECODERS)
        self._menus: dict[str, tuple[Deviation, ...]] = {}

    def check(self, source: Path, found: Recognition, metrics: Metrics) -> tuple[Facts, list[bytes]] | Reject:
        """Read the files of a recognition, documents first, and check them; return facts and photos.

        The caller has reserved `size_of` the recognition in the budget, as long as it has the photos.
        """
        number, path = found.recognition_id, found.photos[0].path
        notices = _notices(number, path, check_date(path, number))
        menu_sha256 = receipt_sha256 = None
        contents, photos = [], []
        try:
            if found.menu is not None:
                path = found.menu.path
                content = read_file(source, found.menu, "json")
                menu_sha256 = hashlib.sha256(content).hexdigest()
                notices += _notices(number, path, self._check_menu(menu_sha256, content))
            if found.receipt is not None:
                path = found.receipt.path
                content = read_file(source, found.receipt, "json")
                notices += _notices(number, path, check_receipt(content))
                receipt_sha256 = hashlib.sha256(content).hexdigest()
            for file in found.photos:
                path = file.path
                with metrics.timed("photo_read"):
                    contents.append(read_file(source, file, "photo"))
            with self._decoders:
                for file, content in zip(found.photos, contents, strict=True):
                    path = file.path
                    with metrics.timed("photo_check"):
                        checked = check_photo(content)
                        sha256 = hashlib.sha256(content).hexdigest()
                        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
                    notices += _notices(number, path, checked.deviations)
                    photos.append(PhotoFacts(checked.dimensions, sha256, md5))
        except BadInput as exc:
            return Reject(number, path, exc.code, exc.message)
        return Facts(found, (photos[0], photos[1]), menu_sha256, receipt_sha256, notices), contents

    def _check_menu(self, sha256: str, content: bytes) -> tuple[Deviation, ...]:
        """Check a menu, once for the many recognitions of a day that share it."""
        deviations = self._menus.get(sha256)
        if deviations is None:
            deviations = check_menu(content)
            if len(self._menus) >= _KNOWN_MENUS:
                self._menus.clear()
            self._menus[sha256] = deviations
        return deviations


def _notices(recognition_id: int, path: str, deviations: Iterable[Deviation]) -> tuple[Notice, ...]:
    return tuple(Notice(recognition_id, path, *one) for one in deviations)


def size_of(recognition: Recognition) -> int:
    """Return the bytes of all files of a recognition."""
    return sum(file.size for file in recognition.files)


def read_file(source: Path, file: File, kind: str) -> bytes:
    """Read a file that discovery recorded; raise BadInput `<kind>_vanished`, `<kind>_changed` or `<kind>_unreadable`.

    It is changed if its size or modification time is another one.
    """
    content, facts = read_up_to(f"{source}/{file.path}", file.size + 1, kind, "discovery")
    if (facts.st_size, modified(facts)) != (file.size, file.mtime):
        raise BadInput(f"{kind}_changed", "the file changed since discovery")
    if len(content) != file.size:
        raise BadInput(f"{kind}_changed", "the file changed while it was read")
    return content


def hash_file(source: Path, file: File, algorithm: str = "sha256") -> str:
    """Return the digest (hex) of a file of the dataset; raises OSError. A named pipe does not block."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(os.open(f"{source}/{file.path}", os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_up_to(path: str, size: int, kind: str, since: str) -> tuple[bytes, os.stat_result]:
    """Return up to `size` bytes of a file, and its status before the read; a named pipe does not block.

    Raises BadInput `<kind>_vanished` (`since` says when the file last existed) or `<kind>_unreadable`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            # One call for most files: each call releases the GIL, and a buffered file takes six more.
            content = os.read(descriptor, size)
            while len(content) < min(size, facts.st_size) and (more := os.read(descriptor, size - len(content))):
                content += more
            return content, facts
        finally:
            os.close(descriptor)
    except FileNotFoundError as exc:
        raise BadInput(f"{kind}_vanished", f"the file vanished since {since}") from exc
    except OSError as exc:
        raise BadInput(f"{kind}_unreadable", f"the file cannot be read: {exc.strerror}") from exc

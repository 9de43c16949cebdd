"""Send the photos of a shard as one stream: some threads read and check, others send, bounded bytes between them.

    entries -> readers: read, check, hash -> a backlog, few -> senders: upload -> facts and rejects, in order

The readers stay a little ahead of the senders, no more: where both share the processors with the service, reading a
whole shard first and sending it then would leave one of them without work at every moment.

A crew of threads works for one process. It takes the entries of several shards one after another, so that the next
shard's photos are on their way while the last ones of a shard are waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset import Recognition, Reject
from pipeline.errors import Interrupted, StorageError
from pipeline.metrics import Metrics
from pipeline.photo import Dimensions
from pipeline.steps.read import BUDGET, DECODERS, Budget, Photo, read_recognition, size_of
from pipeline.storage import Storage, StoredObject

#: A file system far away answers slowly; more threads than processors keep it asked.
_READERS = max(8, 2 * (os.cpu_count() or 1))
#: So many recognitions ready to be sent are enough for the moment.
_ENOUGH = 4


@dataclass(frozen=True)
class Facts:
    """What the upload learned of a recognition, for the manifest; pairs are camera 1 and 2."""

    recognition_id: int
    dimensions: tuple[Dimensions, Dimensions]
    sha256s: tuple[str, str]
    md5s: tuple[str, str]
    menu_sha256: str | None
    receipt_sha256: str | None


@dataclass(frozen=True)
class Entry:
    """A line of the manifest: a recognition and the keys of its photos."""

    recognition: Recognition
    keys: tuple[str, str]


class Backlog:
    """The recognitions of a process that are read, or being read, and that no sender has begun.

    Decoding is work for a processor. While enough is ready, it leaves one to those who send: they wait for the network,
    and are not to wait for a processor as well.

    Attributes:
        decoders: of how many recognitions the photos may be decoded at once.
    """

    def __init__(self, limit: int) -> None:
        self.decoders = Budget(DECODERS)
        self._room = Budget(limit)
        self._lock = threading.Lock()
        self._ready = 0

    def begin(self) -> None:
        """Wait until another one may be read."""
        self._room.take(1)

    def drop(self) -> None:
        """Forget one that is not to be sent."""
        self._room.give_back(1)

    def add(self) -> None:
        """Count one that is read."""
        with self._lock:
            self._ready += 1
            if self._ready == _ENOUGH:
                self.decoders.resize(max(1, DECODERS - 1))

    def take(self) -> None:
        """Count one that a sender has begun."""
        with self._lock:
            self._ready -= 1
            if self._ready == _ENOUGH - 1:
                self.decoders.resize(DECODERS)
        self._room.give_back(1)


class Crew:
    """The threads of a process that read and send, and what they may hold together."""

    def __init__(self, threads: int) -> None:
        self.budget = Budget(BUDGET)
        self.backlog = Backlog(max(_READERS, threads))
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self.senders = ThreadPoolExecutor(threads, thread_name_prefix="upload")

    def close(self) -> None:
        """Wait for what is under way, and let the threads go."""
        self.readers.shutdown(wait=True)
        self.senders.shutdown(wait=True)


class Sending:
    """The photos of some entries on their way; it begins at once.

    Arguments:
        storage: the bucket, through a door of this sending's own, which is closed to it when it stops.
        present: what the bucket holds already; an object of the same size and MD5 is not sent again.
        progress: called with 1 for each recognition that is dealt with.
    """

    def __init__(
        self,
        crew: Crew,
        storage: Storage,
        source: Path,
        entries: Sequence[Entry],
        present: Mapping[str, StoredObject],
        metrics: Metrics,
        progress: Callable[[int], None],
    ) -> None:
        self._crew, self._storage, self._source = crew, storage, source
        self._present, self._metrics, self._progress = present, metrics, progress
        self._stopped, self._over = threading.Event(), threading.Event()
        self._lock, self._left = threading.Lock(), len(entries)
        self._failed: Future[Any] | None = None
        self._read = [crew.readers.submit(self._read_entry, entry) for entry in entries]
        for read in self._read:
            read.add_done_callback(self._count)

    def results(self) -> tuple[list[Facts], list[Reject]]:
        """Wait for all, and return facts and rejects in the order of the entries; the first error stops the rest."""
        try:
            if self._read:
                self._over.wait()
            if self._failed is not None:
                self._failed.result()
        except BaseException:  # an interrupt included: nothing of this is on its way any more when it is told
            self.stop()
            raise
        outcomes = [read.result() for read in self._read]
        results = [outcome.result() if isinstance(outcome, Future) else outcome for outcome in outcomes]
        facts = [result for result in results if isinstance(result, Facts)]
        return facts, [result for result in results if isinstance(result, Reject)]

    def stop(self) -> None:
        """Begin nothing more, and wait for the requests in flight."""
        self._stopped.set()
        self._storage.stop()
        wait(self._read)
        outcomes = [read.result() for read in self._read if read.exception() is None]
        wait([outcome for outcome in outcomes if isinstance(outcome, Future)])

    def _count(self, ended: Future[Any]) -> None:
        """Take in that something ended, and wake whoever waits for all at the end only, or at the first error."""
        if ended.exception() is None and isinstance(sent := ended.result(), Future):
            sent.add_done_callback(self._count)
            return
        with self._lock:
            self._left -= 1
            if ended.exception() is not None and self._failed is None:
                self._failed = ended
            if not self._left or self._failed is not None:
                self._over.set()

    def _read_entry(self, entry: Entry) -> Future[Facts | Reject] | Reject:
        size = size_of(entry.recognition)
        budget, backlog = self._crew.budget, self._crew.backlog
        backlog.begin()
        budget.take(size)
        handed_on = False
        try:
            self._look()
            read = read_recognition(self._source, entry.recognition, backlog.decoders, self._metrics)
            if isinstance(read, Reject):
                self._progress(1)
                return read
            sent = self._crew.senders.submit(self._send_entry, entry, size, *read)
            handed_on = True
            backlog.add()
            return sent
        finally:
            if not handed_on:
                budget.give_back(size)
                backlog.drop()

    def _send_entry(
        self,
        entry: Entry,
        size: int,
        photos: tuple[Photo, Photo],
        menu_sha256: str | None,
        receipt_sha256: str | None,
    ) -> Facts | Reject:
        self._crew.backlog.take()
        try:
            self._look()
            for photo, key, file in zip(photos, entry.keys, entry.recognition.photos, strict=True):
                found = self._present.get(key)
                if found is not None and found.md5 == photo.md5 and found.size == len(photo.content):
                    self._metrics.count("objects_found")
                    continue
                try:
                    self._storage.upload(key, photo.content)
                except StorageError as exc:
                    if exc.code != "EntityTooLarge":
                        raise
                    self._progress(1)
                    message = f"the file has {len(photo.content)} bytes, more than the bucket takes"
                    return Reject(entry.recognition.recognition_id, file.path, "photo_too_large", message)
        finally:
            self._crew.budget.give_back(size)
        self._progress(1)
        first, second = photos
        return Facts(
            entry.recognition.recognition_id,
            (first.dimensions, second.dimensions),
            (first.sha256, second.sha256),
            (first.md5, second.md5),
            menu_sha256,
            receipt_sha256,
        )

    def _look(self) -> None:
        if self._stopped.is_set():
            raise Interrupted("The upload was interrupted.")

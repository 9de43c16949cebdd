"""Send the photos of a shard as one stream: some threads read and check, others send, bounded bytes between them.

    entries -> read ahead: read, check, hash -> a few that are ready -> senders: upload -> facts and rejects, in order

Who reads stays a little ahead of the senders, no more: where both share the processors with the service, reading a
whole shard first and transfer it then would leave one of them without work at every moment.

A executors of threads works for one process. It takes the entries of several shards one after another, so that the next
shard's photos are on their way while the last ones of a shard are waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset.photo import Dimensions
from pipeline.dataset.records import Recognition, Reject
from pipeline.errors import Interrupted, StorageError
from pipeline.observe.metrics import Metrics
from pipeline.steps.read import BUDGET, Files, Photo, check_photos, read_files, size_of
from pipeline.steps.readahead import ReadAhead
from pipeline.storage import Storage, StoredObject

#: Recognitions that are ready for each sender, a quarter of a second where a photo takes 42 ms: a disk may be busy.
_AHEAD = 3


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


class UploadExecutors:
    """The threads of a process that read and send."""

    def __init__(self, threads: int) -> None:
        self.readahead = ReadAhead(_AHEAD * threads, BUDGET)
        self.senders = ThreadPoolExecutor(threads, thread_name_prefix="upload")

    def close(self) -> None:
        """Wait for what is under way, and let the threads go."""
        self.readahead.close()
        self.senders.shutdown(wait=True)


class ShardTransfer:
    """The photos of some entries on their way; it begins at once.

    Arguments:
        storage: the bucket, through a door of this transfer's own, which is closed to it when it stops.
        present: what the bucket holds already; an object of the same size and MD5 is not sent again.
        progress: called with 1 for each recognition that is dealt with.
    """

    def __init__(
        self,
        executors: UploadExecutors,
        storage: Storage,
        source: Path,
        entries: Sequence[Entry],
        present: Mapping[str, StoredObject],
        metrics: Metrics,
        progress: Callable[[int], None],
    ) -> None:
        self._executors, self._storage, self._source = executors, storage, source
        self._present, self._metrics, self._progress = present, metrics, progress
        self._stopped, self._over = threading.Event(), threading.Event()
        self._lock, self._left = threading.Lock(), len(entries)
        self._failed: Future[Any] | None = None
        self._read: list[Future[Any]] = []
        try:
            for entry in entries:
                read = executors.readahead.submit(self._read_entry(entry), size_of(entry.recognition))
                self._read.append(read)
                read.add_done_callback(self._count)
        except BaseException:  # an interrupt: nobody else knows yet that something is on its way
            self.stop()
            raise

    def results(self) -> tuple[list[Facts], list[Reject]]:
        """Wait for all; return facts and rejects, once, in the order of the entries. The first error stops the rest."""
        try:
            if self._read:
                self._over.wait()
            if self._failed is not None:
                self._failed.result()
        except BaseException:  # an interrupt included: nothing of this is on its way any more when it is told
            self.stop()
            raise
        outcomes = [read.result() for read in self._read]
        self._read.clear()  # each of them knows this, a ring that only a collection would take away
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

    def _read_entry(self, entry: Entry) -> Generator[None, None, Future[Facts | Reject] | Reject]:
        handed_on = False
        try:
            self._look()
            files = read_files(self._source, entry.recognition, self._metrics)
            if isinstance(files, Reject):
                self._progress(1)
                return files
            yield
            photos = check_photos(entry.recognition, files, self._metrics)
            if isinstance(photos, Reject):
                self._progress(1)
                return photos
            sent = self._executors.senders.submit(self._send_entry, entry, photos, files)
            handed_on = True
            self._executors.readahead.add()
            return sent
        finally:
            if not handed_on:
                self._executors.readahead.give_back(size_of(entry.recognition))

    def _send_entry(self, entry: Entry, photos: tuple[Photo, Photo], files: Files) -> Facts | Reject:
        try:
            self._executors.readahead.take()
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
            self._executors.readahead.give_back(size_of(entry.recognition))
        self._progress(1)
        first, second = photos
        return Facts(
            entry.recognition.recognition_id,
            (first.dimensions, second.dimensions),
            (first.sha256, second.sha256),
            (first.md5, second.md5),
            files.menu_sha256,
            files.receipt_sha256,
        )

    def _look(self) -> None:
        if self._stopped.is_set():
            raise Interrupted("The upload was interrupted.")

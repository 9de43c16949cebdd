"""Upload the photos of a shard: some threads read and check, others send, with bounded memory between them.

    entries -> read ahead: read, check, hash -> a few that are ready -> senders: upload -> facts and rejects, in order

The readers stay a few recognitions ahead of the senders, so that reading and sending overlap. All shards of a process
use the same threads, so that the next shard's uploads can start before the last responses of a shard arrive.
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

#: Ready recognitions per sender: a quarter of a second at 42 ms per photo, against pauses of the disk.
_AHEAD = 3


@dataclass(frozen=True)
class Facts:
    """What the upload adds to a recognition's manifest row; pairs are camera 1 and 2."""

    recognition_id: int
    dimensions: tuple[Dimensions, Dimensions]
    sha256s: tuple[str, str]
    md5s: tuple[str, str]
    menu_sha256: str | None
    receipt_sha256: str | None


@dataclass(frozen=True)
class Entry:
    """A row of the manifest: a recognition and the keys of its photos."""

    recognition: Recognition
    keys: tuple[str, str]


class UploadExecutors:
    """The threads of a process that read and send."""

    def __init__(self, threads: int) -> None:
        self.readahead = ReadAhead(_AHEAD * threads, BUDGET)
        self.senders = ThreadPoolExecutor(threads, thread_name_prefix="upload")

    def close(self) -> None:
        """Wait for running tasks, and end the threads."""
        self.readahead.close()
        self.senders.shutdown(wait=True)


class ShardTransfer:
    """An upload of entries that is in progress; the constructor starts it.

    Arguments:
        storage: a client for this transfer alone, since `stop` stops it.
        present: objects in the bucket by key; one of the same size and MD5 is not sent again.
        progress: called with 1 for each completed recognition.
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
        except BaseException:  # an interrupt: the caller has no reference to stop it
            self.stop()
            raise

    def results(self) -> tuple[list[Facts], list[Reject]]:
        """Wait for all; return facts and rejects in the order of the entries. Call it once.

        The first error stops the transfer and is raised.
        """
        try:
            if self._read:
                self._over.wait()
            if self._failed is not None:
                self._failed.result()
        except BaseException:  # an interrupt included: no request is in flight when it propagates
            self.stop()
            raise
        outcomes = [read.result() for read in self._read]
        self._read.clear()  # the futures reference this transfer, a cycle
        results = [outcome.result() if isinstance(outcome, Future) else outcome for outcome in outcomes]
        facts = [result for result in results if isinstance(result, Facts)]
        return facts, [result for result in results if isinstance(result, Reject)]

    def stop(self) -> None:
        """Start no further request, and wait for those in flight."""
        self._stopped.set()
        self._storage.stop()
        wait(self._read)
        outcomes = [read.result() for read in self._read if read.exception() is None]
        wait([outcome for outcome in outcomes if isinstance(outcome, Future)])

    def _count(self, ended: Future[Any]) -> None:
        """Count a finished recognition; wake `results` after the last one or the first error."""
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
            self._check_stopped()
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
                self._executors.readahead.release(size_of(entry.recognition))

    def _send_entry(self, entry: Entry, photos: tuple[Photo, Photo], files: Files) -> Facts | Reject:
        try:
            self._executors.readahead.take()
            self._check_stopped()
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
            self._executors.readahead.release(size_of(entry.recognition))
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

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise Interrupted("The upload was interrupted.")

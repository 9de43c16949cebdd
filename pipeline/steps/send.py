"""Upload the photos of a shard: each thread reads, checks and sends one recognition after another.

The concurrency limiter of Storage bounds the requests in flight. Meanwhile the other threads read and check, then wait
with their photos. All shards of a process use the same threads, so that the next shard's uploads can start before the
last responses of a shard arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dataset.records import Recognition, Reject
from pipeline.errors import StorageError, StorageUnavailable
from pipeline.observe.metrics import Metrics
from pipeline.steps.read import Checker, Facts, size_of
from pipeline.storage import Storage, StoredObject

#: Threads that read and check while the others wait for responses.
_AHEAD = 8
#: What refuses a photo for its size, by the code of the error.
_TOO_LARGE = {
    "EntityTooLarge": "the bucket",
    "413": "a gateway in front of Storage (`client_max_body_size` of nginx)",
}


@dataclass(frozen=True)
class Entry:
    """A row of the manifest: a recognition, and the keys of its photos.

    `former` has the keys of the photos that are loaded, by the SHA-256 and MD5 of their contents.
    """

    recognition: Recognition
    keys: tuple[str, str]
    former: Mapping[str, str] = field(default_factory=dict)


class UploadThreads:
    """The threads of a process that upload, with what they share."""

    def __init__(self, senders: int) -> None:
        self.executor = ThreadPoolExecutor(senders + _AHEAD, thread_name_prefix="upload")
        self.checker = Checker()


class ShardTransfer:
    """An upload of entries that is in progress; the constructor starts it.

    `storage` is a client for this transfer alone, since `stop` stops it. An object that is `present` with the same size
    and MD5 is not sent again. `progress` is called with 1 for each completed recognition.
    """

    def __init__(
        self,
        threads: UploadThreads,
        storage: Storage,
        source: Path,
        entries: Sequence[Entry],
        present: Mapping[str, StoredObject],
        metrics: Metrics,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._threads, self._storage, self._source = threads, storage, source
        self._present, self._metrics, self._progress = present, metrics, progress
        self._futures: list[Future[Facts | Reject]] = []
        try:
            for entry in entries:
                self._futures.append(threads.executor.submit(self._transfer, entry))
        except BaseException:  # an interrupt: the caller has no reference to stop it
            self.stop()
            raise

    def results(self) -> list[Facts | Reject]:
        """Wait for all entries; return their results in order. The first error stops the transfer and is raised."""
        try:
            for ended in wait(self._futures, return_when=FIRST_EXCEPTION).done:
                ended.result()
            return [future.result() for future in self._futures]
        except BaseException:  # an interrupt included: no request is in flight when it propagates
            self.stop()
            raise

    def stop(self) -> None:
        """Start no further request, and wait for those in flight."""
        self._storage.stop()
        for future in self._futures:
            future.cancel()
        wait(self._futures)

    def _transfer(self, entry: Entry) -> Facts | Reject:
        with self._threads.checker.budget.reserved(size_of(entry.recognition)):
            result = self._read_and_send(entry)
        self._progress(1)
        return result

    def _read_and_send(self, entry: Entry) -> Facts | Reject:
        checked = self._threads.checker.check(self._source, entry.recognition, self._metrics)
        if isinstance(checked, Reject):
            return checked
        facts, contents = checked
        for content, photo, key, file in zip(contents, facts.photos, entry.keys, entry.recognition.photos, strict=True):
            if self._present.get(key) == StoredObject(key, len(content), photo.md5):
                self._metrics.count("objects_found")
                continue
            former = entry.former.get(photo.sha256) or entry.former.get(photo.md5)
            try:
                if former is None or not self._is_copied(former, key):
                    self._storage.upload(key, content)
            except StorageError as exc:
                if exc.code not in _TOO_LARGE:
                    raise
                message = f"the file has {len(content)} bytes, more than {_TOO_LARGE[exc.code]} takes"
                return Reject(entry.recognition.recognition_id, file.path, "photo_too_large", message)
        return facts

    def _is_copied(self, former: str, key: str) -> bool:
        """Copy an object in the bucket instead of sending its content; return whether Storage did."""
        try:
            self._storage.copy(former, key)
        except (StorageError, StorageUnavailable):  # it is gone or cannot be read, or this server copies nothing
            return False
        return True

"""What the visualiser shows of tasks, and what the progress bar shows of other workers' tasks."""

from __future__ import annotations

import threading
import time

from pipeline.batches import state
from pipeline.config import redact
from pipeline.database import Connection, Database
from pipeline.errors import TransientError
from pipeline.graph.luigid import LuigidUnavailable, call
from pipeline.observe.logger import get_logger
from pipeline.observe.progress import ProgressCounter, StatusMessage

logger = get_logger(__name__)

_TIMEOUT_SECONDS = 1.0
_PAUSE_SECONDS = 30.0
_PEERS_SECONDS = 2.0


class StatusReporter:
    """Set status messages and progress of tasks in luigid.

    Luigi's own functions wait a minute for a luigid that is away, and then fail the task. Here a call takes a second at
    most, and a failed one is followed by a pause.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._paused_until = 0.0

    def report(self, task_id: str, report: StatusMessage) -> None:
        """Set the status message of a task, and its progress in percent where that is known."""
        if time.monotonic() < self._paused_until:
            return
        message, percent = report
        text = _without_markup(redact(message))
        try:
            call(self._url, "set_task_status_message", _TIMEOUT_SECONDS, task_id=task_id, status_message=text)
            if percent is not None:
                arguments = {"task_id": task_id, "progress_percentage": percent}
                call(self._url, "set_task_progress_percentage", _TIMEOUT_SECONDS, **arguments)
        except LuigidUnavailable as exc:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            logger.info("luigid did not take a status message: %s", exc)


def _without_markup(message: str) -> str:
    """Replace the characters that the visualiser would interpret as HTML."""
    return message.translate({ord("<"): "‹", ord(">"): "›", ord("&"): "+"})


def percent(done: int, total: int) -> int | None:
    """Return how much is done in percent, None where the total is not known."""
    return min(100, done * 100 // total) if total else None


class PeerProgress:
    """Count in a progress counter what other workers do of a batch, from a thread, until the block ends.

    Markers tell which shards are done; each shard counts as the same share of the batch.

    Arguments:
        step: the step whose marker says that the recognitions of a shard are done.
    """

    def __init__(self, database: Database, batch_id: str, step: str, counter: ProgressCounter) -> None:
        self._database, self._batch_id, self._step, self._counter = database, batch_id, step, counter
        self._before: frozenset[int] | None = None
        self._shards = 0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> PeerProgress:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finished.set()

    def _watch(self) -> None:
        while not self._finished.wait(_PEERS_SECONDS):
            total = self._counter.read()[2]
            if not total:
                continue
            try:
                shards, marked = self._database.run(self._list)
            except TransientError:  # the steps themselves report it
                continue
            if self._before is None:
                self._before = marked
            others = sum(not self._counter.read_shard(shard)[0] for shard in marked - self._before)
            self._counter.set_done_by_others(total * others // max(1, shards))

    def _list(self, connection: Connection) -> tuple[int, frozenset[int]]:
        shards = state.require_batch(connection, self._batch_id).shards
        rows = state.list_marked(connection, self._batch_id)
        return shards, frozenset(shard for step, shard in rows if step == self._step)

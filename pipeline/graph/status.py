"""What the visualiser shows of tasks, and what the progress bar shows of other workers' tasks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
#: The visualiser would interpret these characters as HTML.
_MARKUP = str.maketrans("<>&", "‹›+")


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
        text = redact(message).translate(_MARKUP)
        try:
            call(self._url, "set_task_status_message", _TIMEOUT_SECONDS, task_id=task_id, status_message=text)
            if percent is not None:
                arguments = {"task_id": task_id, "progress_percentage": percent}
                call(self._url, "set_task_progress_percentage", _TIMEOUT_SECONDS, **arguments)
        except LuigidUnavailable as exc:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            logger.info("luigid did not take a status message: %s", exc)


def percent(done: int, total: int) -> int | None:
    """Return how much is done in percent, None where the total is not known."""
    return min(100, done * 100 // total) if total else None


@contextmanager
def counting_peers(database: Database, batch_id: str, step: str, counter: ProgressCounter) -> Iterator[None]:
    """Count in a progress counter what other workers do of a batch, from a thread, during the block.

    Markers tell which shards are done; each shard counts as the same share of the batch.

    Arguments:
        step: the step whose marker says that the recognitions of a shard are done.
    """
    finished = threading.Event()

    def read(connection: Connection) -> tuple[int, set[int]]:
        marked = {shard for of, shard in state.list_marked(connection, batch_id) if of == step}
        return state.require_batch(connection, batch_id).shards, marked

    def watch() -> None:
        before: set[int] | None = None
        while not finished.wait(_PEERS_SECONDS):
            total = counter.read()[2]
            if not total:
                continue
            try:
                shards, marked = database.run(read)
            except TransientError:  # the steps themselves report it
                continue
            before = marked if before is None else before
            others = sum(not counter.read_shard(shard)[0] for shard in marked - before)
            counter.set_done_by_others(total * others // max(1, shards))

    threading.Thread(target=watch, name="peers", daemon=True).start()
    try:
        yield
    finally:
        finished.set()

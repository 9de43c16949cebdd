"""The lock of a batch, which allows one run at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pipeline.batches import state
from pipeline.batches.state import ARRAY, RUN
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import DatabaseUnavailable, Interrupted, PipelineError, RefusedError

logger = logging.getLogger(__name__)

_POLL_SECONDS, _CHECK_SECONDS, _RELEASE_SECONDS = 0.2, 2.0, 1.0


class BatchLock:
    """An advisory lock in an open transaction, which also works through a pooler in transaction mode.

    Forked processes inherit the connection, so a batch counts as running until the last process of a killed run has
    ended. The lock only saves work; the steps themselves ensure that nothing is loaded twice.

    A thread checks the lock every two seconds and replaces a connection that broke; it calls `on_lost` with the error
    if another run took the lock meanwhile. Raises RefusedError if another run holds the lock after `patience` seconds,
    DatabaseUnavailable if the database has not responded by then. Without `waits`, another run is refused at once.

    `mode` is RUN; ARRAY, which processes of an array share beside a run; or ALONE, for what removes the batch.
    """

    def __init__(
        self,
        settings: Settings,
        batch_id: str,
        on_lost: Callable[[RefusedError], None],
        *,
        mode: str = RUN,
        patience: float = 10.0,
        waits: bool = True,
    ) -> None:
        self._settings, self._batch_id, self._on_lost, self._patience = settings, batch_id, on_lost, patience
        self._mode = mode
        self._stack = ExitStack()
        self._connection: Connection | None = None
        self._backend: dict[str, Any] | None = None
        word = "array" if mode == ARRAY else "lock"
        self._application = f"pipeline {word} {batch_id}"[:63]  # PostgreSQL truncates the name to 63 bytes
        self._released = threading.Event()
        self._take(waits=waits)
        self._thread = threading.Thread(target=self._keep, name=self._application, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock; if the database is unreachable, the thread releases it later."""
        self._released.set()
        self._thread.join(_RELEASE_SECONDS)

    def _take(self, *, waits: bool = True) -> None:
        deadline = time.monotonic() + self._patience
        refused = f"Another run of batch {self._batch_id} is going on.", "Wait for it, or stop it; nothing was changed."
        while not self._released.is_set():
            error: PipelineError = RefusedError(*refused)
            try:
                if self._try():
                    return
            except DatabaseUnavailable as exc:
                error = exc
            if time.monotonic() > deadline or not (waits or isinstance(error, DatabaseUnavailable)):
                self._disconnect()
                raise error
            self._released.wait(_POLL_SECONDS)

    def _try(self) -> bool:
        try:
            if self._connection is None:
                database = Database(self._settings, application=self._application)
                self._stack.callback(database.close)
                connection = self._stack.enter_context(database.transaction())
                if self._backend is not None:
                    # The server may not have noticed that the former connection broke, and still hold its lock.
                    connection.execute("end_backend", application=self._application, **self._backend)
                self._backend = connection.one("find_backend")._asdict()
                self._connection = connection
            return state.try_lock(self._connection, self._batch_id, self._mode)
        except BaseException:
            self._disconnect()
            raise

    def _keep(self) -> None:
        try:
            while not self._released.wait(_CHECK_SECONDS):
                self._check()
        except RefusedError as exc:
            self._on_lost(exc)
        finally:
            self._disconnect()

    def _check(self) -> None:
        try:
            if self._connection is not None:
                self._connection.one("now")
                return
        except PipelineError:
            logger.warning("lock: the connection that held the lock of batch %s broke", self._batch_id)
            self._disconnect()
        try:
            self._take()
        except RefusedError:
            raise
        except PipelineError as exc:  # a pooler that restarts may refuse the login
            logger.info("lock: the lock of batch %s cannot be taken again yet: %s", self._batch_id, exc.message)

    def _disconnect(self) -> None:
        self._connection = None
        # Roll back, since a broken connection cannot commit.
        self._stack.__exit__(Interrupted, Interrupted("The lock is released."), None)

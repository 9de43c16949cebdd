"""A batch that several workers share through luigid: how its starter waits for them, and what it takes over.

Luigi's own worker ends when it is given no task, even while other workers run tasks of its batch. Here the starter
stays as long as luigid knows of such a task, and takes what another worker failed or left behind. luigid notices a
worker that vanished after `worker_disconnect_delay`, so the starter does not wait for ever.
"""

from __future__ import annotations

from typing import Any

import luigi.worker
from luigi.rpc import RemoteScheduler
from luigi.scheduler import WORKER_STATE_DISABLED

from pipeline.graph.luigid import LuigidUnavailable, call
from pipeline.observe.logger import get_logger

logger = get_logger(__name__)

#: States of a task, in Luigi's words.
DONE, FAILED, PENDING = "DONE", "FAILED", "PENDING"
_PING_SECONDS = 3.0
#: luigid forgets a run when it restarts, or has not heard of it for long. So often in a row is it told again.
_REPEATS = 3


class SharedScheduler(RemoteScheduler):
    """luigid with the retries of Luigi's configuration, except for a ping.

    Attributes:
        url: where luigid listens.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)  # type: ignore[no-untyped-call]
        self.url = url

    def ping(self, **arguments: Any) -> Any:
        """Report that the worker lives; Luigi would retry a lost ping for a minute and block every fork meanwhile."""
        try:
            return call(self.url, "ping", _PING_SECONDS, **arguments)
        except LuigidUnavailable as exc:
            logger.info("luigid did not take a ping: %s", exc)
            return {"rpc_messages": []}


class SharingWorker(luigi.worker.Worker):
    """A worker that shares its batch with others."""

    def __init__(self, *, scheduler: Any, assistant: bool = False, **kwargs: Any) -> None:
        super().__init__(scheduler=scheduler, assistant=assistant, **kwargs)  # type: ignore[no-untyped-call]
        self.scheduler, self.is_assistant = scheduler, assistant
        self.roots: list[luigi.Task] = []
        self.is_running = False
        self._failed_here: set[str] = set()
        self._repeats = 0

    @property
    def shares(self) -> bool:
        """Return whether other workers may run tasks of the same batch."""
        return isinstance(self.scheduler, RemoteScheduler)

    def is_finished(self) -> bool:
        """Return whether the database says that nothing is left to do."""
        raise NotImplementedError

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        status, task_id = kwargs["status"], kwargs["task_id"]
        if status == FAILED:
            self._failed_here.add(task_id)
        elif status == DONE and "expl" in kwargs:  # it ran here, and was not found complete while it was scheduled
            self._failed_here.discard(task_id)
            self._repeats = 0
        super()._add_task(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _keep_alive(self, response: Any) -> bool:
        """Return whether to stay without a task: others run tasks of the batch, or have left some."""
        if super()._keep_alive(response):  # type: ignore[no-untyped-call]
            return True
        if self.is_assistant or not self.shares or response.worker_state == WORKER_STATE_DISABLED:
            return False
        if response.running_tasks:
            logger.info("waiting for %s", ", ".join(sorted({one["worker"] for one in response.running_tasks})))
            return True
        return self._take_over() or (response.n_pending_tasks == 0 and not self.is_finished() and self._add_again())

    def _take_over(self) -> bool:
        """Make what failed in another worker available again; what failed here as well stays failed."""
        failed = self.scheduler.task_list(status=FAILED, upstream_status="", limit=False)
        left = [one for one in failed if one in self._scheduled_tasks and one not in self._failed_here]
        for task_id in left:
            logger.info("taking over %s", task_id)
            self.scheduler.forgive_failures(task_id=task_id)
        return bool(left)

    def _add_again(self) -> bool:
        """Schedule the run again in a luigid that has forgotten it."""
        self._repeats += 1
        if self._repeats > _REPEATS:
            return False
        logger.warning("luigid has forgotten this run: scheduling it again.")
        for task in self.roots:
            self.add(task)
        return True

    def add(self, task: luigi.Task, *args: Any, **kwargs: Any) -> bool:
        """Schedule a task and what it requires; remember the tasks that the run is for."""
        if not self.is_running and task not in self.roots:
            self.roots.append(task)
        return bool(super().add(task, *args, **kwargs))  # type: ignore[no-untyped-call]

"""A batch that several workers share through luigid: how its starter waits for them, and what it takes over.

Luigi's own worker leaves when it is handed no task, be it that others are still at theirs. Here the starter stays while
luigid knows somebody at a task of its batch, and at once takes what another worker failed or left behind. luigid finds
out who has vanished (`worker_disconnect_delay`), so the starter does not wait for ever.
"""

from __future__ import annotations

from typing import Any

import luigi.worker
from luigi.rpc import RemoteScheduler

from pipeline.logger import get_logger

logger = get_logger(__name__)

#: States of a task, in Luigi's words.
DONE, FAILED, PENDING, UNKNOWN = "DONE", "FAILED", "PENDING", "UNKNOWN"
#: A ping that is lost is followed by another one, and whoever leaves does not wait long for an answer.
_BRIEF_SECONDS = 3.0
#: luigid may forget a run, when it restarts or has not heard of it for long; so often in a row is it told anew.
_TELLS_AGAIN = 3


class SharedScheduler(RemoteScheduler):
    """luigid, asked again for as long as luigi.cfg says, unless a signal came; a ping is sent once."""

    def __init__(self, url: str, look: Any) -> None:
        """Remember what raises when this process was told to stop."""
        super().__init__(url)  # type: ignore[no-untyped-call]
        self._look = look
        self.briefly = RemoteScheduler(url, connect_timeout=_BRIEF_SECONDS)
        self.briefly._rpc_retry_attempts, self.briefly._rpc_log_retries = 1, False

    def _get_retryer(self) -> Any:
        retryer = super()._get_retryer()  # type: ignore[no-untyped-call]
        retryer.before_sleep = lambda _: self._look()
        return retryer

    def ping(self, **who: Any) -> Any:
        """Tell that the worker lives; Luigi would hold up every fork while it tries that again and again."""
        return self.briefly.ping(**who)  # type: ignore[attr-defined]


class SharingWorker(luigi.worker.Worker):
    """A worker that is not alone in its batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._failed_here: set[str] = set()
        self._told_again = 0

    @property
    def phased_out(self) -> bool:
        """Return whether it stopped asking for tasks before there were none."""
        return bool(self._stop_requesting_work)

    @property
    def shares(self) -> bool:
        """Return whether other workers may be at the same batch."""
        return isinstance(self._scheduler, RemoteScheduler)

    def is_finished(self) -> bool:
        """Return whether the database says that nothing is left to do; subclasses know."""
        return True

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        task_id = kwargs["task_id"]
        if kwargs.get("status") == FAILED:
            self._failed_here.add(task_id)
        elif kwargs.get("status") == DONE and task_id in self._running_tasks:
            self._failed_here.discard(task_id)
            self._told_again = 0
        super()._add_task(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _keep_alive(self, answer: Any) -> bool:
        """Stay, with no task in hand, while others are at tasks of ours or have left some."""
        if super()._keep_alive(answer):  # type: ignore[no-untyped-call]
            return True
        if self._stop_requesting_work or self._assistant or not self.shares:
            return False
        if answer.running_tasks:
            logger.info("waiting for %s", ", ".join(sorted({one["worker"] for one in answer.running_tasks})))
            return True
        return self._take_over() or (answer.n_pending_tasks == 0 and not self.is_finished() and self._tell_again())

    def _take_over(self) -> bool:
        """Make what failed elsewhere free to be taken; what failed here as well, others could not mend."""
        failed = self._scheduler.task_list(status=FAILED, upstream_status="", limit=False)
        left = [one for one in failed if one in self._scheduled_tasks and one not in self._failed_here]
        for task_id in left:
            logger.info("taking over %s", task_id)
            self._scheduler.forgive_failures(task_id=task_id)
        return bool(left)

    def _tell_again(self) -> bool:
        """Tell luigid, which knows nothing of this run any more, what there is to do."""
        self._told_again += 1
        if self._told_again > _TELLS_AGAIN:
            return False
        logger.warning("luigid has forgotten this run: telling it anew.")
        self.add(self._scheduled_tasks[self._first_task])  # type: ignore[no-untyped-call]
        return True

    def settle_history(self) -> None:
        """Let Luigi's exit code be that of the database: who did a task is not asked, once the batch is done."""
        told = [one for one in self._add_task_history if one[1] != UNKNOWN]
        self._add_task_history = [*told, *((task, DONE, True) for task in self._scheduled_tasks.values())]
        self._get_work_response_history.clear()  # of who was at a task while this worker asked

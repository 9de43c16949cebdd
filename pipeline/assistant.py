"""A worker on a further machine, which takes shards of the batches that others have started, through luigid.

To Luigi it is an assistant: tasks do not stay alive for it, and it stays without one. But where Luigi's own assistant
is handed whatever there is to do, of any package and any batch, this one says beforehand which tasks it takes: shards
of batches that its own database knows, whose starter is at work, and whose dataset this host sees as discovery saw it.
Discovery, transform and summary are left to the starter. What failed here once is left to others.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import luigi
import luigi.interface
import luigi.worker
from luigi.rpc import RPCError

from pipeline import batch_state, errors, tasks
from pipeline.batch_state import KIND_LOAD, Batch
from pipeline.database import Connection
from pipeline.errors import PipelineError, SettingsError, SourceUnavailable, UnfinishedError, UsageError
from pipeline.logger import get_logger, say
from pipeline.sharing import DONE, FAILED, PENDING, SharedScheduler
from pipeline.steps.begin import require_schema
from pipeline.steps.source import has_source
from pipeline.storage import Storage
from pipeline.worker import PipelineWorker, SchedulerFactory, answers, heed_signals

logger = get_logger(__name__)

_FAMILIES: Mapping[str, type[tasks.ShardTask]] = {
    kind.__name__: kind for kind in (tasks.UploadShard, tasks.CopyShard, tasks.CopyQwenShard)
}
#: Tasks that are asked for together. What somebody did between luigid's list and our word is done once more, in vain.
_TOGETHER = 8
#: Runs in a row that end in vain for want of a service.
_ENOUGH = 3


def scheduler_url() -> str:
    """Return the address of luigid, as luigi.cfg says."""
    core = luigi.interface.core()
    return core.scheduler_url or f"http://{core.scheduler_host}:{core.scheduler_port}/"


class Assistant(PipelineWorker):
    """A worker that takes shards of running batches.

    Arguments:
        production: which environment's batches.
        idle: leave after so many seconds without a task.
        left_out: ids of tasks that it does not take, since they failed here before.
    """

    def __init__(self, *args: Any, production: bool, idle: float, left_out: frozenset[str], **kwargs: Any) -> None:
        super().__init__(*args, lease=None, verbose_summary=False, **kwargs)
        self._production, self._left_out = production, left_out
        self._idle = datetime.timedelta(seconds=idle)
        self._asked_for: set[str] = set()
        self._joined: dict[str, Batch] = {}
        self.done: Counter[tuple[str, str]] = Counter()
        self.failed: set[str] = set()

    def run(self) -> bool:
        """Run until nothing is left for a while; whatever ends it before, luigid hands on at once what it was at."""
        try:
            return super().run()
        except BaseException:
            self._give_back(list(self._running_tasks))
            raise

    def _reporting(self) -> contextlib.AbstractContextManager[object]:
        """Leave it to the starter to say how far the batch is."""
        return contextlib.nullcontext()

    def _get_work(self) -> Any:
        if self._stop_requesting_work:
            return super()._get_work()
        try:
            running = self._running_batches()
            answer = self._ask(running)
            if answer.task_id is None and self._ask_for_more(running):
                answer = self._ask(running)
        except PipelineError:
            self._end_children()
            raise
        return answer

    def _ask(self, running: Sequence[str]) -> Any:
        """Ask luigid for a task; return its answer without one when the task is not, or no longer, for us to do."""
        # Whoever was out of touch for long is forgotten, and what a stranger is at counts as abandoned.
        self._scheduler.add_worker(self._id, [("assistant", True)])
        answer = super()._get_work()
        if answer.task_id is None:
            return answer
        task = self._scheduled_tasks[answer.task_id]
        if getattr(task, "batch_id", None) in running and answer.task_id in self._asked_for:
            return answer
        # Its starter has left. As long as we are known to take it, luigid would offer it again and again.
        self._give_back([answer.task_id])
        self._start_phasing_out()  # type: ignore[no-untyped-call]
        return answer._replace(task_id=None)

    def _running_batches(self) -> list[str]:
        rows = tasks.database_of(self._production).run(lambda connection: connection.execute("list_running"))
        return [row.id for row in rows]

    def _ask_for_more(self, running: Sequence[str]) -> bool:
        """Tell luigid of more tasks that we take; return whether there are any."""
        found = []
        pending = self._scheduler.task_list(status=PENDING, upstream_status="", limit=False) if running else {}
        for task_id, told in pending.items():
            kind, told_of = _FAMILIES.get(told["name"]), told["params"]
            if kind is None or told_of.get("batch_id") not in running or task_id in self._left_out:
                continue
            task = kind.from_str_params(told_of)  # type: ignore[no-untyped-call]
            # The same words may stand for another environment, or be those of somebody else's package.
            if task.task_id == task_id and task.production == self._production and self._id not in told["workers"]:
                found.append(task)
        # From the end, away from the starter.
        found.sort(key=lambda task: -task.shard)
        for task in found[:_TOGETHER]:
            self._join(task.batch_id, task.shard)
            self._scheduled_tasks[task.task_id] = task
            self._asked_for.add(task.task_id)
            self._add_task(
                worker=self._id,
                task_id=task.task_id,
                status=PENDING,
                runnable=True,
                params=task.to_str_params(),
                family=task.task_family,
                module=task.task_module,
            )
        return bool(found)

    def _join(self, batch_id: str, shard: int) -> None:
        """Make sure, before the first shard of a batch, that its dataset is here."""
        if batch_id in self._joined:
            return
        settings = tasks.settings_of(self._production)

        def look(connection: Connection) -> tuple[Batch, bool]:
            batch = batch_state.require_batch(connection, batch_id)
            return batch, has_source(connection, batch, shard)

        batch, here = tasks.database_of(self._production).run(look)
        if batch.kind == KIND_LOAD and batch.bucket != settings.bucket:
            raise SettingsError(
                f"Batch {batch_id} goes into the bucket {batch.bucket}, not into {settings.bucket}.",
                "Set STORAGE_BUCKET as it is where the batch was started.",
            )
        if not here:
            raise missing_source(batch)
        self._joined[batch_id] = batch
        say(f"Helping with batch {batch_id}: {batch.source}", logging.INFO, batch_id=batch_id)

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        task_id, status = kwargs["task_id"], kwargs["status"]
        task = self._scheduled_tasks.get(task_id)
        if status == DONE and task is not None:
            self.done[task.batch_id, task.step] += 1
        if status == FAILED:
            # This worker goes under another name without it: luigid would offer it to us again.
            self.failed.add(task_id)
            self._start_phasing_out()  # type: ignore[no-untyped-call]
        kwargs["assistant"] = True
        super()._add_task(*args, **kwargs)

    def _keep_alive(self, answer: Any) -> bool:
        since = self._idle_since or datetime.datetime.now()
        return not self._stop_requesting_work and datetime.datetime.now() - since < self._idle

    def _give_back(self, task_ids: Sequence[str]) -> None:
        """Let others have tasks that were given to us, now and not once luigid has missed us."""
        scheduler = self._scheduler.briefly
        with contextlib.suppress(RPCError, ValueError):
            for task_id in task_ids:
                scheduler.add_task(worker=self._id, task_id=task_id, status=FAILED, runnable=False, assistant=True)
                scheduler.forgive_failures(task_id=task_id)

    def lost_sources(self) -> list[Batch]:
        """Return the batches whose dataset this host does not see, of those that a task failed of."""
        if not any(one.error == SourceUnavailable.__name__ for one in self.failures):
            return []
        spoilt = [self._scheduled_tasks[task_id] for task_id in self.failed]

        def look(connection: Connection) -> list[Batch]:
            return [
                self._joined[task.batch_id]
                for task in spoilt
                if not has_source(connection, self._joined[task.batch_id], task.shard)
            ]

        return tasks.database_of(self._production).run(look)


def missing_source(batch: Batch) -> UsageError:
    """Return the error of a host that does not have a batch's dataset."""
    return UsageError(
        f"The dataset of batch {batch.id} is not on this host: {batch.source} has no file as discovery saw it.",
        "Mount it here under the same path, with the same times of its files; nothing was rejected for want of it.",
    )


def assist(production: bool, workers: int, idle: float) -> dict[str, Any]:
    """Take shards of running batches until there are none for a while; return how many were done.

    Raises:
        UsageError: no luigid answers, or this host does not have what a batch needs.
        UnfinishedError: a service failed several times in a row.
    """
    url = scheduler_url()
    if not answers(url):
        raise UsageError(
            f"No luigid answers at {url}, and only luigid can share a batch.",
            "Start it, and name its address as scheduler_url in the section [core] of luigi.cfg, here and there.",
        )
    settings = tasks.settings_of(production)
    tasks.database_of(production).run(require_schema)
    with contextlib.closing(Storage(settings)) as storage:
        storage.check_host()
    tasks.role.judges = False
    heed_signals()
    done: Counter[tuple[str, str]] = Counter()
    failed: frozenset[str] = frozenset()
    in_vain = 0
    scheduler = SchedulerFactory(bare=False).create_remote_scheduler(url)
    while isinstance(scheduler, SharedScheduler):
        worker = Assistant(
            scheduler=scheduler, worker_processes=workers, production=production, idle=idle, left_out=failed
        )
        try:
            with worker:
                worker.run()
        except RPCError as exc:
            raise UnfinishedError(f"luigid was lost: {exc}", "Run the same command again once it is back.") from exc
        done += worker.done
        failed |= worker.failed
        for batch in worker.lost_sources():
            raise missing_source(batch)
        _raise_settings(worker)
        in_vain = 0 if worker.done else in_vain + bool(worker.failed)
        if in_vain == _ENOUGH:
            last = worker.failures[-1]
            raise UnfinishedError(f"{in_vain} shards in a row failed here, the last: {last.message}", last.hint)
        if not worker.phased_out:
            break
    return {
        "tasks": sum(done.values()),
        "failed": len(failed),
        "batches": {
            batch_id: {step: done[batch_id, step] for step in (batch_state.UPLOAD, batch_state.COPY)}
            for batch_id in sorted({batch_id for batch_id, _ in done})
        },
    }


def _raise_settings(worker: Assistant) -> None:
    """Raise what is wrong with this host's settings: it would be wrong for the next shard as well."""
    for one in worker.failures:
        kind = getattr(errors, one.error, None) if one.error else None
        if kind is not None and issubclass(kind, UsageError):
            raise kind(one.message, one.hint)


def describe(result: Mapping[str, Any]) -> str:
    """Return a result of `assist` in words."""
    lines = [
        f"Batch {batch_id}: {', '.join(f'{count} shards: {step}' for step, count in steps.items() if count)}."
        for batch_id, steps in result["batches"].items()
    ]
    if result["failed"]:
        lines.append(f"{result['failed']} tasks failed here and were left to others.")
    return "\n".join(lines) or "There was nothing to help with."

"""A worker on a further machine, which takes shards of the batches that others have started, through luigid.

Luigi's own assistant is given any task. This one names the tasks that it takes: shards of batches that its own database
knows, whose starter is running, and whose dataset this host sees. A task that failed here is left to others.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from luigi.rpc import RPCError
from luigi.task_status import DONE, FAILED, PENDING, RUNNING

from pipeline.batches import state
from pipeline.batches.resolve import require_schema
from pipeline.batches.state import COPY, KIND_LOAD, UPLOAD, Batch
from pipeline.errors import SettingsError, SourceUnavailable, UnfinishedError, UsageError
from pipeline.graph.base import ShardTask
from pipeline.graph.luigid import LuigidUnavailable, StatusReporter, answers, call, join, scheduler_url
from pipeline.graph.process import Interrupts
from pipeline.graph.run import Environment, RunRegistry
from pipeline.graph.tasks import CopyShard, UploadShard
from pipeline.graph.worker import PooledWorker
from pipeline.observe.logger import say
from pipeline.steps.source import require_dataset
from pipeline.storage import Storage
from pipeline.units import counted

_FAMILIES: Mapping[str, type[ShardTask]] = {kind.__name__: kind for kind in (UploadShard, CopyShard)}
_TOGETHER = 8  # tasks; one that another worker did meanwhile is run once more, without effect
_FRUITLESS_LIMIT = 3


@dataclass
class Help:
    """What this process has done for others: tasks by batch and step, failed tasks, ids of batches.

    `is_over` says that it was told to take no further task.
    """

    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed: list[ShardTask] = field(default_factory=list)
    joined: set[str] = field(default_factory=set)
    is_over: bool = False


class Assistant(PooledWorker):
    """A worker that takes shards of running batches, until there are none for `idle` seconds."""

    def __init__(self, *, production: bool, idle: float, help: Help, worker_processes: int, **kwargs: Any) -> None:
        self._environment: Environment = kwargs["registry"].environment(production)
        place = f"host={socket.gethostname()}, project={self._environment.project}, pid={os.getpid()}"
        self._worker_id = f"Worker(salt={uuid.uuid4().hex}, workers={worker_processes}, {place})"
        self._production, self._help, self._idle = production, help, idle
        self._idle_from: float | None = None
        self.is_phased_out = False
        super().__init__(worker_id=self._worker_id, worker_processes=worker_processes, **kwargs)
        if help.is_over:  # by a signal that the worker before this one received
            self._phase_out()

    def run(self) -> bool:
        """Run until there is no task for a while; an end before that gives luigid the tasks back at once."""
        try:
            return super().run()
        except BaseException:
            # An interrupt may come between luigid's response and the start of its task, so luigid is asked.
            with suppress(LuigidUnavailable):
                running = call(scheduler_url(), "task_list", status=RUNNING, upstream_status="", limit=False)
                self._give_back([key for key, one in running.items() if one["worker_running"] == self._worker_id])
            raise

    def handle_interrupt(self, signum: int, frame: Any) -> None:
        """Take no further task, and let no other worker follow; Luigi calls this on SIGUSR1."""
        self._help.is_over = True
        self._phase_out()

    def _phase_out(self) -> None:
        self.is_phased_out = True
        super().handle_interrupt(signal.SIGUSR1, None)  # type: ignore[no-untyped-call]

    def _get_work(self) -> Any:
        if self.is_phased_out:
            return super()._get_work()  # type: ignore[no-untyped-call]
        began = time.monotonic()
        rows = self._environment.database.run(lambda connection: connection.execute("list_running"))
        running = [row.id for row in rows]
        response = self._ask(running)
        if response.task_id is None and self._ask_for_more(running):
            response = self._ask(running)
        if response.task_id is not None:
            self._idle_from = None
        elif self._idle_from is not None:
            self._idle_from += time.monotonic() - began  # the time in which a service was away
        return response

    def _ask(self, running: Sequence[str]) -> Any:
        """Ask luigid for a task; return its response without one that is no longer for this worker."""
        # luigid forgets a worker that was out of touch for long, and would count its tasks as abandoned.
        self.scheduler.add_worker(self._worker_id, [("assistant", True)])
        response = super()._get_work()  # type: ignore[no-untyped-call]
        if response.task_id is None or self._scheduled_tasks[response.task_id].batch_id in running:
            return response
        # Its starter has left, and luigid would offer it to this worker again and again.
        self._give_back([response.task_id])
        self._phase_out()
        return response._replace(task_id=None)

    def _ask_for_more(self, running: Sequence[str]) -> bool:
        """Name further tasks that this worker takes to luigid; return whether there are any."""
        pending = self.scheduler.task_list(status=PENDING, upstream_status="", limit=False) if running else {}
        found = sorted(self._usable(pending, running), key=lambda task: -task.shard)  # the starter begins with 1
        for task in found[:_TOGETHER]:
            self._join(task)
            self._scheduled_tasks[task.task_id] = task
            what = {"task_id": task.task_id, "family": task.task_family, "module": task.task_module}
            params = task.to_str_params()  # type: ignore[no-untyped-call]
            self._add_task(worker=self._worker_id, status=PENDING, runnable=True, params=params, **what)
        return bool(found)

    def _usable(self, pending: Mapping[str, Any], running: Sequence[str]) -> Iterator[ShardTask]:
        for task_id, entry in pending.items():
            kind, parameters = _FAMILIES.get(entry["name"]), entry["params"]
            if kind is None or self._worker_id in entry["workers"] or parameters.get("batch_id") not in running:
                continue
            if parameters.get("supabase_project") != self._environment.project:
                continue
            task = kind.from_str_params(parameters)  # type: ignore[no-untyped-call]
            # The same parameters may be those of a task of another package.
            if task.task_id == task_id and task.production == self._production and task not in self._help.failed:
                yield task

    def _join(self, task: ShardTask) -> None:
        """Check before the first shard of a batch that this host has what the batch needs."""
        if task.batch_id in self._help.joined:
            return
        batch = self.require_source(task)
        bucket = self._environment.settings.bucket
        if batch.kind == KIND_LOAD and batch.bucket != bucket:
            message = f"Batch {batch.id} goes into the bucket {batch.bucket}, not into {bucket}."
            raise SettingsError(message, "Set STORAGE_BUCKET as it is where the batch was started.")
        self._help.joined.add(batch.id)
        self.registry.find(batch.id, self._production).command = ""  # what goes on with it is the same command
        say(f"Helping with batch {batch.id}: {batch.source}", logging.INFO, batch_id=batch.id)

    def require_source(self, task: ShardTask) -> Batch:
        """Return the batch of a task; raise UsageError unless its dataset is on this host."""
        database = self._environment.database
        batch = database.run(lambda connection: state.require_batch(connection, task.batch_id))
        database.run(lambda connection: require_dataset(connection, batch, task.shard))
        return batch

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        task, status = self._scheduled_tasks[kwargs["task_id"]], kwargs["status"]
        if status == DONE and "expl" in kwargs:  # it ran here
            self._help.done[task.batch_id, task.step] += task.shards
        if status == FAILED:
            # luigid would offer the task to this worker again; the next worker has another id, and leaves it out.
            self._help.failed.append(task)
            self._phase_out()
        super()._add_task(*args, **{**kwargs, "assistant": True})  # type: ignore[no-untyped-call]

    def _keep_alive(self, response: Any) -> bool:
        self._idle_from = self._idle_from or time.monotonic()
        return not self.is_phased_out and time.monotonic() - self._idle_from < self._idle

    def _give_back(self, task_ids: Sequence[str]) -> None:
        """Make tasks that luigid gave to this worker available to others at once."""
        arguments: dict[str, Any] = {"worker": self._worker_id, "status": FAILED, "runnable": False, "assistant": True}
        with suppress(LuigidUnavailable):
            for task_id in task_ids:
                call(scheduler_url(), "add_task", task_id=task_id, **arguments)
                call(scheduler_url(), "forgive_failures", task_id=task_id)


def assist(
    registry: RunRegistry, interrupts: Interrupts, production: bool, workers: int, idle: float
) -> dict[str, Any]:
    """Take shards of running batches until there are none for a while; return how many were done.

    Raises UsageError if luigid or what a batch needs is missing, UnfinishedError if services fail again and again.
    """
    url = scheduler_url()
    if not answers(url):
        hint = "Start it, and name its address as scheduler_url in the section [core] of luigi.cfg, here and there."
        raise UsageError(f"No luigid answers at {url}, and only luigid can share a batch.", hint)
    environment = registry.environment(production)
    environment.may_reject = False
    environment.database.run(require_schema)
    with closing(Storage(environment.settings)) as storage:
        storage.check_host()
    registry.owns_worker, registry.status = True, StatusReporter(url)
    scheduler = join(url, environment.project)
    shared: dict[str, Any] = {"registry": registry, "interrupts": interrupts, "scheduler": scheduler}
    help, fruitless = Help(), 0
    while fruitless < _FRUITLESS_LIMIT:
        done, failed = help.done.total(), len(help.failed)
        worker = Assistant(production=production, idle=idle, help=help, worker_processes=workers, **shared)
        try:
            with worker:
                worker.run()
        except RPCError as exc:
            raise UnfinishedError(f"luigid was lost: {exc}", "Run the same command again once it is back.") from exc
        failures = [one for batch_id in help.joined for one in registry.find(batch_id, production).failures.read()]
        errors = [failure.as_error() for failure in failures]
        if any(isinstance(error, SourceUnavailable) for error in errors):
            for task in help.failed[failed:]:
                worker.require_source(task)
        for error in errors:
            if isinstance(error, UsageError):  # these settings would be wrong for the next shard as well
                raise error
        if help.is_over or not worker.is_phased_out:
            batch_ids = sorted({batch_id for batch_id, _ in help.done})
            batches = {name: {step: help.done[name, step] for step in (UPLOAD, COPY)} for name in batch_ids}
            return {"tasks": help.done.total(), "failed": len(help.failed), "batches": batches}
        fruitless = 0 if help.done.total() > done else fruitless + (len(help.failed) > failed)
    last = failures[-1]
    raise UnfinishedError(f"{counted(fruitless, 'shard')} in a row failed here, the last: {last.message}", last.hint)


def describe(result: Mapping[str, Any]) -> str:
    """Return a result of `assist` as text."""
    lines = []
    for batch_id, steps in result["batches"].items():
        done = ", ".join(f"{counted(count, 'shard')}: {step}" for step, count in steps.items() if count)
        lines.append(f"Batch {batch_id}: {done}.")
    if result["failed"]:
        lines.append(f"{counted(result['failed'], 'task')} failed here and left to others.")
    return "\n".join(lines) or "There was nothing to help with."

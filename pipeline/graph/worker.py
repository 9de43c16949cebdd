"""The worker and the scheduler of a run of ours: an orderly stop, a local scheduler without luigid, shared batches.

Luigi's own worker ends when it is given no task. Here the starter of a batch stays while other workers run tasks of
it, and takes what they failed or left behind; luigid misses a worker after `worker_disconnect_delay`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import luigi
import luigi.retcodes
import luigi.worker
from luigi.rpc import RemoteScheduler, RPCError
from luigi.scheduler import WORKER_STATE_DISABLED, Scheduler
from luigi.task_status import DONE, FAILED, PENDING

from pipeline.batches import state
from pipeline.errors import PipelineError, TransientError, UnfinishedError, UsageError
from pipeline.graph.failures import Failure, exit_on_error
from pipeline.graph.luigid import SharedScheduler, StatusReporter, answers, join, percent, scheduler_url
from pipeline.graph.pool import Pool, PooledTask
from pipeline.graph.process import Interrupts
from pipeline.graph.run import Run, RunRegistry
from pipeline.observe.logger import say
from pipeline.observe.progress import BlockThread, ProgressDisplay, StatusMessage, status_thread
from pipeline.units import counted

logger = logging.getLogger(__name__)

_PEERS_SECONDS = 2.0
_REPEATS = 3  # in a row, after luigid has lost a run by a restart or after a long silence


class PooledWorker(luigi.worker.Worker):
    """A worker whose processes run one task after another, and end at once when it is interrupted or killed.

    For a shared cache of completed tasks, and to schedule in parallel, Luigi would start processes that outlive a kill,
    with the lock of the batch that they inherit. One statement reads all markers, so there is nothing to gain.
    """

    def __init__(self, *, registry: RunRegistry, scheduler: Any, interrupts: Interrupts, **kwargs: Any) -> None:
        super().__init__(scheduler=scheduler, cache_task_completion=False, **kwargs)  # type: ignore[no-untyped-call]
        self.registry, self.scheduler, self.interrupts = registry, scheduler, interrupts
        self.shares = isinstance(scheduler, RemoteScheduler)  # other workers may run tasks of the same batch
        config = luigi.worker.worker()
        self._forks = bool(self.worker_processes > 1 or config.force_multiprocessing or config.timeout)

        def is_running(task: PooledTask) -> bool:
            return self._running_tasks.get(task.task.task_id) is task

        self._pool = Pool(super()._create_task_process, self._process, is_running, interrupts.deferred)

    def run(self) -> bool:
        """Run to the end, or to an interrupt, which ends the forked processes first."""
        try:
            with contextlib.nullcontext() if self._forks else self._process():
                return bool(super().run())  # type: ignore[no-untyped-call]
        except (KeyboardInterrupt, PipelineError):
            self._pool.end()
            # The thread of the queue may wait for a lock that the interrupt left behind; Python must not wait for it.
            self._task_result_queue.cancel_join_thread()
            raise

    def add(self, task: luigi.Task, *_: Any, **__: Any) -> bool:
        """Schedule a task and what it requires in this process, also with --parallel-scheduling."""
        return bool(super().add(task))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _process(self) -> Iterator[None]:
        """Set up a process that runs tasks; the next shard is sent ahead if no other process runs tasks."""
        alone = not self._forks and not self.shares
        with contextlib.ExitStack() as stack:
            for environment in self.registry.environments.values():
                stack.enter_context(environment.keeping_uploader(ahead=alone))
            yield

    def _create_task_process(self, task: luigi.Task) -> Any:
        made = super()._create_task_process(task)  # type: ignore[no-untyped-call]
        pooled = made.use_multiprocessing and made.timeout_time is None
        return PooledTask(self._pool, task, made.status_reporter) if pooled else made

    def __exit__(self, *exc_info: Any) -> Any:
        result = super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        self._pool.close()
        return result


class RunWorker(PooledWorker):
    """The worker of a run of ours; in Luigi's own command (`bare`) it prints the summary and decides the exit code."""

    def __init__(self, *, run: Run, bare: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._run, self._bare, self._name = run, bare, kwargs["worker_id"]
        self._root: luigi.Task | None = None
        self._failed_here: set[str] = set()
        self._waits_for_input = False  # of an ExternalTask that a subclass requires
        self._repeats = 0

    def run(self) -> bool:
        """Run to the end, or to an interrupt; raise RefusedError where another run has taken the batch."""
        if not self._bare:
            return self._run_tasks()
        with exit_on_error(self.interrupts):
            try:
                self._run_tasks()
            except RPCError as exc:
                raise UnfinishedError(f"luigid was lost: {exc}", self._run.resume_hint()) from exc
            self._run.print_summary()
            codes = luigi.retcodes.retcode()
            code = codes.missing_data if self._waits_for_input else codes.not_run
            code = code if self.run_succeeded else codes.task_failed
            code = code if self.add_succeeded else codes.scheduling_error
            code = 0 if self._run.is_finished() else int(code)  # whoever did the last task
            self.interrupts.finish(code, next(filter(None, map(Failure.as_error, self._run.failures.read())), None))
            raise SystemExit(code)

    def _run_tasks(self) -> bool:
        run, status = self._run, self.registry.status

        def progress() -> StatusMessage | None:
            done, _, total = run.counter.read("upload")
            return (f"{done} of {counted(total, 'recognition')}", percent(done, total)) if done < total else None

        if signal.getsignal(signal.SIGUSR1) == self.handle_interrupt:
            run.worker_pid = os.getpid()
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, run, "worker_pid", 0)
            stack.enter_context(ProgressDisplay(run.counter, batch_id=run.batch_id))
            if status is not None and self._root is not None:
                send = functools.partial(status.report, self._root.task_id)
                stack.enter_context(status_thread(progress, send))
            if self.shares:
                stack.enter_context(_peer_counter(run))
            succeeded = super().run()
        run.require_lock()
        return succeeded

    def add(self, task: luigi.Task, *_: Any, **__: Any) -> bool:
        """Schedule a task and what it requires; the first one is the root of the run."""
        is_root, self._root = self._root is None, self._root or task
        # Of what is added later, `run` handles the errors.
        with exit_on_error(self.interrupts) if self._bare and is_root else contextlib.nullcontext():
            return super().add(task)

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        status, task_id = kwargs["status"], kwargs["task_id"]
        self._waits_for_input |= status == PENDING and kwargs["runnable"] is False
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
        if not self.shares or response.worker_state == WORKER_STATE_DISABLED:
            return False
        if response.running_tasks:
            logger.info("waiting for %s", ", ".join(sorted({one["worker"] for one in response.running_tasks})))
            return True
        failed = self.scheduler.task_list(status=FAILED, upstream_status="", limit=False)
        left = [one for one in failed if one in self._scheduled_tasks and one not in self._failed_here]
        for task_id in left:
            logger.info("taking over %s", task_id)
            self.scheduler.forgive_failures(task_id=task_id)
        if left or response.n_pending_tasks or self._run.is_finished():
            return bool(left)
        if self._root is None or self._repeats == _REPEATS or self._is_known():
            return False
        logger.warning("luigid has forgotten this run: scheduling it again.")
        self._repeats += 1
        self.add(self._root)
        return True

    def _is_known(self) -> bool:
        """Return whether luigid still has this run, and has nothing for it, as where a task is disabled."""
        known = self.scheduler.task_list(status="", upstream_status="", search=self._run.batch_id, limit=False)
        return self._root is not None and self._name in known.get(self._root.task_id, {"workers": []})["workers"]

    def __exit__(self, *exc_info: Any) -> Any:
        result = super().__exit__(*exc_info)
        self._run.release()
        return result


def _peer_counter(run: Run) -> BlockThread:
    """Count in the progress of a run the shards that other workers mark; each counts as the same share of the batch."""
    before: set[int] | None = None

    def tick(finished: bool) -> None:
        nonlocal before
        total = run.counter.read("upload")[2]
        if finished or not total:
            return
        with contextlib.suppress(TransientError):  # the steps themselves report it
            markers = run.database.run(lambda connection: state.list_marked(connection, run.batch_id))
            marked = {shard for step, shard in markers if step == run.counted}
            before = marked if before is None else before
            others = sum(not run.counter.read_shard(shard)[0] for shard in marked - before)
            run.counter.set_done_by_others(total * others // max(1, run.shards))

    return BlockThread("peers", _PEERS_SECONDS, tick, patience=0)


class SchedulerFactory:
    """Make the scheduler and the worker of a run, with the interface of Luigi's `worker_scheduler_factory`."""

    def __init__(self, registry: RunRegistry, run: Run, interrupts: Interrupts, *, bare: bool = False) -> None:
        self._registry, self._run, self._interrupts, self._bare = registry, run, interrupts, bare
        registry.owns_worker = True

    def create_local_scheduler(self) -> Scheduler:
        """Return a scheduler in this process."""
        return Scheduler(prune_on_get_work=True, record_task_history=False)

    def create_remote_scheduler(self, url: str) -> SharedScheduler | Scheduler:
        """Return luigid where it answers within a second, and say so; else a local scheduler."""
        url = scheduler_url()
        if answers(url):
            self._registry.status = StatusReporter(url)
            return join(url, self._run.environment.project)
        level = logging.WARNING if self._bare else logging.INFO
        logger.log(level, "luigid does not answer at %s: using the local scheduler.", url)
        return self.create_local_scheduler()

    def create_worker(self, scheduler: Any, worker_processes: int, assistant: bool = False) -> RunWorker:
        """Return a worker, after it has taken the lock of the batch; raise RefusedError where another run has it."""
        with exit_on_error(self._interrupts) if self._bare else contextlib.nullcontext():
            if assistant:
                hint = f"Leave it out; on further machines, run `{self._run.environment.settings.command('worker')}`."
                raise UsageError("--assistant would take any task that luigid has, those of others included.", hint)
            if not (self._run.was_done and self._run.target.exists()):
                self._run.claim()
        # Stable, so that luigid gives the tasks of a killed run to its successor; unique through the lock.
        project, batch_id = self._run.environment.project, self._run.batch_id
        worker_id = f"Worker(host={socket.gethostname()}, project={project}, batch={batch_id})"
        luigis = {"worker_id": worker_id, "worker_processes": worker_processes}
        shared: dict[str, Any] = {"registry": self._registry, "interrupts": self._interrupts, "scheduler": scheduler}
        return RunWorker(run=self._run, bare=self._bare, **shared, **luigis)


def run_task(registry: RunRegistry, run: Run, task: luigi.Task, interrupts: Interrupts, **parameters: Any) -> None:
    """Run a task to its end, with parameters of `luigi.build`; raise RefusedError where another run has its batch."""
    try:
        luigi.build([task], SchedulerFactory(registry, run, interrupts), no_lock=True, **parameters)
    except RPCError as exc:  # what is marked is done all the same
        say(f"luigid was lost: {exc}", logging.WARNING)

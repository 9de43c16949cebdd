"""The worker and the scheduler of a run of ours: one run a batch, an orderly stop, a local scheduler without luigid."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import luigi
import luigi.interface
import luigi.retcodes
import luigi.worker
from luigi.rpc import RPCError
from luigi.scheduler import Scheduler

from pipeline.errors import PipelineError
from pipeline.graph.failures import exit_with
from pipeline.graph.luigid import answers
from pipeline.graph.pool import Pool, PooledTask
from pipeline.graph.run import Run, RunRegistry
from pipeline.graph.sharing import SharedScheduler, SharingWorker
from pipeline.graph.signals import Interrupts
from pipeline.graph.status import PeerProgress, StatusReporter, percent
from pipeline.observe.logger import get_logger, say
from pipeline.observe.progress import ProgressDisplay, StatusMessage, StatusThread

logger = get_logger(__name__)

#: The exit code of a command that a signal interrupted.
_INTERRUPTED = 130


class PipelineWorker(SharingWorker):
    """A worker that runs one run of ours, or helps with the runs of other hosts.

    Arguments:
        run: what it is for; None for a helper.
        interrupts: the signal handlers of this process.
        bare: the process is Luigi's own command, so the worker prints the summary and decides the exit code.
    """

    def __init__(
        self, *, registry: RunRegistry, run: Run | None, interrupts: Interrupts, bare: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._registry, self._run, self._bare = registry, run, bare
        config = luigi.worker.worker()
        self._forks = bool(self.worker_processes > 1 or config.force_multiprocessing or config.timeout)
        self._pool = Pool(super()._create_task_process, self._process, self._awaits, interrupts.deferred)

    def run(self) -> bool:
        """Run to the end, or to an interrupt, which ends the forked processes first.

        Raises:
            RefusedError: another run has taken the batch.
            SystemExit: the process is Luigi's own command. Who did a task does not matter for the exit code: once the
                database says that nothing is left to do, it is 0.
        """
        if not self._bare or self._run is None:
            return self._run_tasks()
        try:
            self._run_tasks()
        except KeyboardInterrupt:
            say(f"Interrupted. To go on: {self._run.command}")
            self._run.release()
            raise SystemExit(_INTERRUPTED) from None
        except PipelineError as exc:
            exit_with(exc)
        self._run.print_summary()
        raise SystemExit(self._exit_code())

    def _run_tasks(self) -> bool:
        self.is_running = True
        if self._run is not None and signal.getsignal(signal.SIGUSR1) == self.handle_interrupt:
            self._run.phase_out_with(os.getpid())
        try:
            with contextlib.ExitStack() as stack:
                for shown in self._displays():
                    stack.enter_context(shown)
                if not self._forks:
                    stack.enter_context(self._process())
                succeeded = bool(super().run())  # type: ignore[no-untyped-call]
        except KeyboardInterrupt:
            self.end_processes()
            # The thread of the queue may wait for a lock that the interrupt left behind; Python must not wait for it.
            self._task_result_queue.cancel_join_thread()
            raise
        finally:
            if self._run is not None:
                self._run.phase_out_with(0)
        if self._run is not None and self._run.lost is not None:
            raise self._run.lost
        return succeeded

    def _exit_code(self) -> int:
        codes = luigi.retcodes.retcode()
        if self.is_finished():
            return 0
        if not self.add_succeeded:
            return int(codes.scheduling_error)
        return int(codes.not_run if self.run_succeeded else codes.task_failed)

    def is_finished(self) -> bool:
        """Return whether the database says that nothing is left to do."""
        return self._run is not None and self._run.is_finished()

    def _displays(self) -> Iterator[contextlib.AbstractContextManager[object]]:
        """Yield what shows progress during the run: on the terminal, in luigid, and what other workers do."""
        run, status = self._run, self._registry.status
        if run is None:
            return
        yield ProgressDisplay(run.counter)
        if status is not None:
            reporting = StatusThread(
                lambda: _report_of(run), lambda report: status.report(self.roots[0].task_id, report), last=False
            )
            yield reporting
        if self.shares:
            yield PeerProgress(run.database, run.batch_id, run.counted, run.counter)

    @contextlib.contextmanager
    def _process(self) -> Iterator[None]:
        """Set up a process that runs tasks; the next shard is sent ahead where nobody else runs tasks of the batch."""
        alone = not self._forks and not self.shares
        with contextlib.ExitStack() as stack:
            for environment in self._registry.environments:
                stack.enter_context(environment.uploads.kept(ahead=alone))
            yield

    def _create_task_process(self, task: luigi.Task) -> Any:
        made = super()._create_task_process(task)  # type: ignore[no-untyped-call]
        pooled = made.use_multiprocessing and made.timeout_time is None and not task.accepts_messages
        return PooledTask(self._pool, task, made.status_reporter) if pooled else made

    def _awaits(self, task: PooledTask) -> bool:
        return self._running_tasks.get(task.task.task_id) is task

    def end_processes(self) -> None:
        """End the processes of tasks at once: what is not marked does not count."""
        self._pool.end()
        for process in multiprocessing.active_children():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
            process.join()

    def __exit__(self, *exc_info: Any) -> Any:
        result = super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        self._pool.close()
        if self._run is not None:
            self._run.release()
        return result


def _report_of(run: Run) -> StatusMessage | None:
    """Return how far the shards of a run are; None before that is known, and once all are done."""
    done, _, total = run.counter.read()
    return (f"{done} of {total} recognitions", percent(done, total)) if done < total else None


class SchedulerFactory:
    """Make the scheduler and the worker of a run, with the interface of Luigi's `worker_scheduler_factory`.

    Arguments:
        bare: for Luigi's own command.
    """

    def __init__(self, registry: RunRegistry, run: Run, interrupts: Interrupts, *, bare: bool = False) -> None:
        self._registry, self._run, self._interrupts, self._bare = registry, run, interrupts, bare
        registry.owns_worker = True

    def create_local_scheduler(self) -> Scheduler:
        """Return a scheduler in this process."""
        return Scheduler(prune_on_get_work=True, record_task_history=False)

    def create_remote_scheduler(self, url: str) -> SharedScheduler | Scheduler:
        """Return luigid where it answers within a second, else a local scheduler."""
        if answers(url):
            self._registry.status = StatusReporter(url)
            return SharedScheduler(url)
        level = logging.WARNING if self._bare else logging.INFO
        logger.log(level, "luigid does not answer at %s: using the local scheduler.", url)
        return self.create_local_scheduler()

    def create_worker(self, scheduler: Any, worker_processes: int, assistant: bool = False) -> PipelineWorker:
        """Return a worker, after it has taken the lock of the batch.

        The worker's id is stable, so that luigid gives the tasks of a killed run to its successor at once. The lock
        keeps it unique among live workers.

        Raises:
            RefusedError: another run of the batch goes on.
        """
        run = self._run
        try:
            if not run.target.exists():
                run.claim()
        except PipelineError as exc:
            if self._bare:
                exit_with(exc)
            raise
        return PipelineWorker(
            registry=self._registry,
            run=run,
            interrupts=self._interrupts,
            bare=self._bare,
            scheduler=scheduler,
            worker_processes=worker_processes,
            assistant=assistant,
            worker_id=f"Worker(host={socket.gethostname()}, batch={run.batch_id})",
        )


def run_task(registry: RunRegistry, run: Run, task: luigi.Task, interrupts: Interrupts, **parameters: Any) -> None:
    """Run a task of ours to its end; `run.failures` has what failed.

    Arguments:
        parameters: those of `luigi.build`, such as `workers` and `local_scheduler`.

    Raises:
        RefusedError: another run of the batch goes on, or has taken it.
    """
    try:
        luigi.build([task], SchedulerFactory(registry, run, interrupts), no_lock=True, **parameters)
    except RPCError as exc:
        # What is marked is done all the same.
        say(f"luigid was lost: {exc}", logging.WARNING)
    except PipelineError:
        run.release()
        raise

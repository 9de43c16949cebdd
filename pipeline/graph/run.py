"""Runs: what one load or one reset of a batch needs in this process, and the registry of the runs of this process.

Luigi makes tasks from parameters alone, in several processes, so a task finds its run by batch id and environment.
`registry` is the one object of a process that lives longer than a call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace

import luigi
from luigi.worker import KeepAliveThread

from pipeline.batches.lock import BatchLock
from pipeline.batches.resolve import LoadRequest, ensure_bucket, reset_command, resolve_batch, resume_command
from pipeline.batches.state import COPY, KIND_LOAD, LOAD, RESET, UPLOAD
from pipeline.batches.summary import headline, performance_metrics, summarise
from pipeline.database import Database
from pipeline.errors import PipelineError, RefusedError, TransientError
from pipeline.graph.environment import Environment
from pipeline.graph.failures import Failure, FailureLog, print_failures
from pipeline.graph.luigid import use_packaged_settings
from pipeline.graph.markers import BatchStateTarget, MarkerCache, ResetTarget
from pipeline.graph.status import StatusReporter
from pipeline.observe.logger import get_logger, say
from pipeline.observe.progress import ProgressCounter

logger = get_logger(__name__)

#: Failures in a row for want of a service, after which no further task is started.
_UNAVAILABLE_LIMIT = 3
_FOLLOW_SECONDS = 2.0


class Run:
    """One load or one reset of one batch.

    Arguments:
        request: the load; None for a reset.
        source: the dataset's folder or the annotations file, as an absolute path.
        needs_bucket: photos go into the bucket, which is made before the first of them.
        schedules: this process schedules the batch's tasks.

    Attributes:
        command: resumes the batch.
        target: exists once nothing is left to do.
        counted: the step whose marker says that the recognitions of a shard are done.
        counter: how many recognitions are done; in memory that forked processes share.
        failures: what failed; shared with forked processes as well.
        lost: why the run has to end, once another run has taken the batch.
        worker_pid: the process of the worker that takes no further task on SIGUSR1, 0 where there is none.
        follower: the thread that follows the worker which schedules the run, and that worker.
    """

    def __init__(
        self,
        environment: Environment,
        batch_id: str,
        request: LoadRequest | None,
        source: str = "",
        *,
        needs_bucket: bool = False,
        schedules: bool = True,
    ) -> None:
        self.environment, self.batch_id, self.source = environment, batch_id, source
        self.database: Database = environment.database
        self.markers = MarkerCache(self.database, batch_id, schedules=schedules)
        self.target: luigi.Target
        production = environment.settings.environment == "production"
        if request is None:
            self.command = f"{reset_command(batch_id, production)} --confirm"
            self.target = ResetTarget(self.database, batch_id)
            self.counted = UPLOAD
        else:
            self.command = resume_command(batch_id, request.kind, request.limit, request.force, production)
            self.target = BatchStateTarget(self.markers, batch_id, LOAD)
            self.counted = UPLOAD if request.kind == KIND_LOAD else COPY
        self.counter = ProgressCounter()
        self.failures = FailureLog()
        self.lost: RefusedError | None = None
        self.worker_pid = 0
        self.follower: tuple[threading.Thread, threading.Thread] | None = None
        self._needs_bucket = needs_bucket
        self._unavailable = multiprocessing.RawValue("i", 0)
        self._lock: BatchLock | None = None

    def claim(self) -> None:
        """Take the batch's lock, unless this process, or the one that forked it, has it.

        Raises:
            RefusedError: another run of this batch goes on.
            UsageError: Storage refuses the settings.
        """
        if self.is_claimed:
            return
        self.failures.clear()
        self._lock = BatchLock(self.environment.settings, self.batch_id, on_lost=self._on_lost)
        try:
            if self._needs_bucket:
                ensure_bucket(self.environment.settings)
        except BaseException:
            self.release()
            raise

    @property
    def is_claimed(self) -> bool:
        """Return whether this process, or the one that forked it, holds the lock."""
        return self._lock is not None

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def is_finished(self) -> bool:
        """Return whether the database says that nothing is left to do; False where it does not answer."""
        try:
            return bool(self.target.exists())
        except PipelineError:
            return False

    def succeeded(self) -> None:
        """Note that a task succeeded, in any process."""
        self._unavailable.value = 0

    def failed(self, task: luigi.Task, exception: BaseException) -> Failure:
        """Record a failure, in any process.

        A service that is away is away for the other tasks as well, each of which would retry for minutes.
        """
        failure = Failure.of(task, exception)
        if isinstance(exception, PipelineError):
            if exception.is_recorded:  # for a task that this one requires
                return failure
            exception.is_recorded = True
        self.failures.add(failure)
        if isinstance(exception, TransientError):
            self._unavailable.value += 1
            if self._unavailable.value == _UNAVAILABLE_LIMIT:
                self._phase_out()
        return failure

    def _on_lost(self, error: RefusedError) -> None:
        self.lost = error
        self._phase_out()

    def _phase_out(self) -> None:
        if self.worker_pid:
            os.kill(self.worker_pid, signal.SIGUSR1)

    def print_summary(self) -> None:
        """Print the failures on stderr and the numbers of the batch on stdout."""
        print_failures(self.failures.read())
        try:
            summary = self.database.run(lambda connection: summarise(connection, self.batch_id))
        except PipelineError as exc:
            # Discovery wrote nothing, or the database went away; the failures above say why.
            logger.info("no summary: %s", exc.message)
            return
        print(headline(summary))
        if summary["state"] == "done":
            print(performance_metrics(summary))
        elif not self.is_finished():
            say(f"To go on: {self.command}")


class RunRegistry:
    """The environments and runs of this process.

    Attributes:
        status: reports to luigid, None where there is none.
        owns_worker: the worker of this process is one of ours, which ends its run itself.
    """

    def __init__(self) -> None:
        self.status: StatusReporter | None = None
        self.owns_worker = False
        self._databases: weakref.WeakSet[Database] = weakref.WeakSet()
        self._environments: dict[bool, Environment] = {}
        self._requests: dict[tuple[LoadRequest, bool], Run] = {}
        self._runs: dict[tuple[str, str, bool], Run] = {}

    @property
    def environments(self) -> Sequence[Environment]:
        """Return the environments that this process uses."""
        return list(self._environments.values())

    def environment(self, production: bool) -> Environment:
        """Return an environment; its settings are read once."""
        if production not in self._environments:
            self._environments[production] = Environment(production)
            self.watch(self._environments[production].database)
        return self._environments[production]

    def watch(self, database: Database) -> Database:
        """Let `cancel_statements` reach a database, and return it."""
        self._databases.add(database)
        return database

    def cancel_statements(self) -> None:
        """Cancel what the databases of this process are waited for."""
        for database in list(self._databases):
            database.cancel_statements()

    def open(self, production: bool) -> Environment:
        """Read the settings anew, Luigi's included, and forget the runs and the worker of the former command."""
        use_packaged_settings()
        self.status, self.owns_worker = None, False
        for known in (self._environments, self._requests, self._runs):
            known.clear()
        return self.environment(production)

    def resolve(self, request: LoadRequest, production: bool) -> Run:
        """Return the run that a request means: as long as it lasts, the same for the same request.

        Raises:
            RefusedError: a run of this process has the batch, with other parameters.
        """
        self._settle()
        run = self._requests.get((request, production))
        if run is not None:
            return run
        environment = self.environment(production)
        ours = {known.batch_id for known in self._requests.values()}
        batch = resolve_batch(environment.settings, environment.database, request, ours)
        # The parameters of the task made from it are a request with the same answer.
        whole = replace(request, batch_id=batch.batch_id, source=batch.source)
        run = self._requests.get((whole, production))
        if run is None:
            key = LOAD, batch.batch_id, production
            if any(known is self._runs.get(key) for known in self._requests.values()):
                raise RefusedError(
                    f"Batch {batch.batch_id} is being loaded by this process with other parameters.",
                    "Give each load a --batch-id of its own.",
                )
            needs_bucket = request.kind == KIND_LOAD and not batch.done
            run = Run(environment, batch.batch_id, request, batch.source, needs_bucket=needs_bucket)
            self._runs[key] = run
        self._requests[request, production] = self._requests[whole, production] = run
        return run

    def _settle(self) -> None:
        """Wait until runs whose worker has ended are forgotten."""
        for run in list(self._runs.values()):
            if run.follower is not None and not run.follower[1].is_alive():
                run.follower[0].join()

    def load(self, batch_id: str, production: bool) -> Run:
        """Return the load of a batch; a process that only runs its tasks knows none of the request."""
        key = LOAD, batch_id, production
        if key not in self._runs:
            self._runs[key] = Run(self.environment(production), batch_id, LoadRequest(batch_id), schedules=False)
        return self._runs[key]

    def reset(self, batch_id: str, production: bool) -> Run:
        """Return the reset of a batch."""
        self._settle()
        key = RESET, batch_id, production
        if key not in self._runs:
            self._runs[key] = Run(self.environment(production), batch_id, None)
        return self._runs[key]

    def resume_hint(self) -> str:
        """Return how an interrupted command is resumed."""
        run = next(iter(self._runs.values()), None)
        return f"To go on: {run.command}" if run is not None else "Run the same command again."

    def attend(self, run: Run) -> bool:
        """Follow the worker that looks at the root task of a run, and return whether there is such a worker.

        A worker of ours takes the lock and ends the run itself. Luigi has no event for the end of its own worker, but
        the worker's keep-alive thread ends with it. The interpreter waits for the thread that is started here.
        """
        workers = [thread for thread in threading.enumerate() if isinstance(thread, KeepAliveThread)]
        if self.owns_worker or not workers:
            return False
        if run.follower is None:
            follower = threading.Thread(target=self._follow, args=(run, workers[-1]), name="run", daemon=False)
            run.follower = follower, workers[-1]
            follower.start()
        return True

    def _follow(self, run: Run, worker: threading.Thread) -> None:
        """Release the lock and print the summary when the run has ended; forget the run when its worker has ended.

        Until then, the same request has to mean the same batch.
        """
        while worker.is_alive() and not run.is_finished():
            worker.join(_FOLLOW_SECONDS)
        if run.is_claimed:
            run.print_summary()
        else:
            print_failures(run.failures.read())
        run.release()
        worker.join()
        self._runs = {key: one for key, one in self._runs.items() if one is not run}
        self._requests = {key: one for key, one in self._requests.items() if one is not run}


#: The runs of this process.
registry = RunRegistry()

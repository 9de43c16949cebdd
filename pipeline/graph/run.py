"""Runs: what one load or one reset of a batch needs in this process, and the registry of the runs of this process.

Luigi makes tasks from parameters alone, in several processes, so a task finds its run by batch id and environment.
`registry` is the one object of a process that lives longer than a call.
"""

from __future__ import annotations

import configparser
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import luigi
from luigi.worker import KeepAliveThread

from pipeline.batches.lock import BatchLock
from pipeline.batches.resolve import (
    LoadRequest,
    ResolvedBatch,
    ensure_bucket,
    reset_command,
    resolve_batch,
    resume_command,
)
from pipeline.batches.state import COPY, KIND_LOAD, LOAD, UPLOAD
from pipeline.batches.summary import headline, performance_metrics, summarise
from pipeline.config import Settings, load_settings
from pipeline.database import Database
from pipeline.errors import PipelineError, RefusedError, SettingsError, TransientError
from pipeline.graph.failures import Failure, FailureLog, print_failures
from pipeline.graph.markers import BatchStateTarget, MarkerCache, ResetTarget
from pipeline.graph.status import StatusReporter
from pipeline.graph.uploads import UploaderCache
from pipeline.observe.logger import get_logger, say
from pipeline.observe.progress import ProgressCounter, StatusMessage, StatusThread

logger = get_logger(__name__)

#: Failures in a row for want of a service, after which no further task is started.
_UNAVAILABLE_LIMIT = 3
_FOLLOW_SECONDS = 2.0


class Environment:
    """An environment's settings and database, shared by all its runs in this process.

    Attributes:
        may_reject: this host may reject an input that is not as discovery saw it. A helper on another host may not:
            it may see less of the dataset.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings)
        self.uploads = UploaderCache(settings, self.database)
        self.may_reject = True

    @classmethod
    def load(cls, production: bool) -> Environment:
        """Read the settings, those of the section [pipeline] of Luigi's configuration included."""
        return cls(load_settings(production, _tuning()))


def _tuning() -> dict[str, str]:
    configuration = luigi.configuration.get_config()
    try:
        return dict(configuration.items("pipeline")) if configuration.has_section("pipeline") else {}
    except configparser.Error as exc:
        raise SettingsError(
            f"The section [pipeline] of luigi.cfg cannot be read: {exc.message}.", "A percent sign is written twice."
        ) from exc


class Run:
    """One load or one reset of one batch.

    Arguments:
        command: resumes the batch.
        target: makes what exists once nothing is left to do.
        counted: the step whose marker says that the recognitions of a shard are done.
        schedules: this process schedules the batch's tasks.
        needs_bucket: photos go into the bucket, which is made before the first of them.

    Attributes:
        counter: how many recognitions are done; in memory that forked processes share.
        failures: what failed; shared with forked processes as well.
        lost: why the run has to end, once another run has taken the batch.
        follower: the thread that follows the worker which schedules the run, and that worker.
    """

    def __init__(
        self,
        environment: Environment,
        batch_id: str,
        *,
        command: str,
        target: Callable[[MarkerCache], luigi.Target],
        counted: str = UPLOAD,
        schedules: bool = True,
        needs_bucket: bool = False,
    ) -> None:
        self.environment, self.batch_id, self.command, self.counted = environment, batch_id, command, counted
        self.counter = ProgressCounter()
        self.failures = FailureLog()
        self.markers = MarkerCache(environment.database, batch_id, schedules=schedules)
        self.target = target(self.markers)
        self.lost: RefusedError | None = None
        self.follower: tuple[threading.Thread, threading.Thread] | None = None
        self._needs_bucket = needs_bucket
        self._unavailable = multiprocessing.RawValue("i", 0)
        self._lock: BatchLock | None = None
        self._phase_out_pid = 0

    @property
    def database(self) -> Database:
        """Return the database of the environment."""
        return self.environment.database

    def claim(self) -> None:
        """Take the batch's lock, unless this process, or the one that forked it, has it.

        Raises:
            RefusedError: another run of this batch goes on.
            UsageError: Storage refuses the settings.
        """
        if self._lock is not None:
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

    def phase_out_with(self, pid: int) -> None:
        """Send SIGUSR1 to the worker of this process where going on is of no use; Luigi's worker then takes no task."""
        self._phase_out_pid = pid

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
        if self._phase_out_pid:
            os.kill(self._phase_out_pid, signal.SIGUSR1)

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
        owns_worker: the worker of this process is a `PipelineWorker`, which ends its run itself.
    """

    def __init__(self) -> None:
        self.status: StatusReporter | None = None
        self.owns_worker = False
        self._databases: weakref.WeakSet[Database] = weakref.WeakSet()
        self._environments: dict[bool, Environment] = {}
        self._requests: dict[tuple[LoadRequest, bool], ResolvedBatch] = {}
        self._runs: dict[tuple[type[luigi.Target], str, bool], Run] = {}

    @property
    def environments(self) -> Sequence[Environment]:
        """Return the environments that this process uses."""
        return list(self._environments.values())

    def environment(self, production: bool) -> Environment:
        """Return an environment; its settings are read once."""
        if production not in self._environments:
            self._environments[production] = Environment.load(production)
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
        """Read the settings anew, and forget the runs and the worker of the former command."""
        self.status, self.owns_worker = None, False
        for known in (self._environments, self._requests, self._runs):
            known.clear()
        return self.environment(production)

    def resolve(self, request: LoadRequest, production: bool) -> ResolvedBatch:
        """Return the batch that a request means: for as long as its run lasts, the same for the same request.

        Raises:
            RefusedError: a run of this process has the batch, with other parameters.
        """
        self._settle()
        known = self._requests.get((request, production))
        if known is None:
            environment = self.environment(production)
            ours = {batch.batch_id for batch in self._requests.values()}
            known = resolve_batch(environment.settings, environment.database, request, ours)
            # The parameters of the task made from it are a request with the same answer.
            whole = replace(request, batch_id=known.batch_id, source=known.source)
            if (whole, production) not in self._requests:
                if any(one.batch_id == known.batch_id for one, of in self._requests if of == production):
                    raise RefusedError(
                        f"Batch {known.batch_id} is being loaded by this process with other parameters.",
                        "Give each load a --batch-id of its own.",
                    )
                run = self._start_load(known, request, production, schedules=True)
                if known.marked:
                    run.markers.add(LOAD)
            self._requests[request, production] = self._requests[whole, production] = known
        return known

    def _settle(self) -> None:
        """Wait until runs whose worker has ended are forgotten."""
        for run in list(self._runs.values()):
            if run.follower is not None and not run.follower[1].is_alive():
                run.follower[0].join()

    def _start_load(self, batch: ResolvedBatch, request: LoadRequest, production: bool, *, schedules: bool) -> Run:
        run = Run(
            self.environment(production),
            batch.batch_id,
            command=resume_command(batch.batch_id, request.kind, request.limit, request.force, production),
            target=lambda markers: BatchStateTarget(markers, batch.batch_id, LOAD),
            counted=UPLOAD if request.kind == KIND_LOAD else COPY,
            schedules=schedules,
            needs_bucket=request.kind == KIND_LOAD and not batch.done,
        )
        self._runs[BatchStateTarget, batch.batch_id, production] = run
        return run

    def load(self, batch_id: str, production: bool) -> Run:
        """Return the load of a batch; a process that only runs its tasks knows none of the request."""
        key = BatchStateTarget, batch_id, production
        if key not in self._runs:
            self._start_load(ResolvedBatch(batch_id, "", True), LoadRequest(batch_id), production, schedules=False)
        return self._runs[key]

    def reset(self, batch_id: str, production: bool) -> Run:
        """Return the reset of a batch."""
        self._settle()
        key = ResetTarget, batch_id, production
        if key not in self._runs:
            environment = self.environment(production)
            self._runs[key] = Run(
                environment,
                batch_id,
                command=f"{reset_command(batch_id, production)} --confirm",
                target=lambda _: ResetTarget(environment.database, batch_id),
            )
        return self._runs[key]

    def end(self, run: Run) -> None:
        """Release the lock of a run, and forget it: the next request for its batch asks the database."""
        run.release()
        self._runs = {key: one for key, one in self._runs.items() if one is not run}
        self._requests = {key: one for key, one in self._requests.items() if one.batch_id != run.batch_id}

    def resume_hint(self) -> str:
        """Return how an interrupted command is resumed."""
        run = next(iter(self._runs.values()), None)
        return f"To go on: {run.command}" if run is not None else "Run the same command again."

    def reporting(self, task_id: str, read: Callable[[], StatusMessage | None]) -> AbstractContextManager[object]:
        """Report to luigid during the block, at most once a second, what `read` returns."""
        status = self.status
        if status is None:
            return nullcontext()
        return StatusThread(read, lambda report: status.report(task_id, report))

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
            run.release()
        else:
            print_failures(run.failures.read())
        worker.join()
        self.end(run)


#: The runs of this process.
registry = RunRegistry()

"""What a load or a reset of a batch needs in this process: environments, runs, and the registry of them.

Luigi makes tasks from parameters alone, in several processes, so a task finds its run in the `registry`.
"""

from __future__ import annotations

import configparser
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import cached_property

import luigi
from luigi.worker import KeepAliveThread

from pipeline.batches import state
from pipeline.batches.alarm import Alarm
from pipeline.batches.bucket import open_bucket
from pipeline.batches.lock import BatchLock
from pipeline.batches.resolve import LoadRequest, ResolvedBatch, is_taken, resolve_batch
from pipeline.batches.state import ALONE, ARRAY, COPY, KIND_LOAD, KIND_QWEN, LOAD, RESET, RUN, UPLOAD, WHOLE
from pipeline.batches.summary import describe, headline, summarise
from pipeline.config import Settings, load_settings
from pipeline.database import Database, foreign_remark, override_remark, target_of
from pipeline.errors import HeldError, PipelineError, RefusedError, SettingsError, TransientError, UsageError
from pipeline.graph.failures import Failure, FailureLog, print_failures
from pipeline.graph.luigid import StatusReporter, choose_parser, use_packaged_settings
from pipeline.graph.markers import BatchStateTarget, MarkerCache
from pipeline.observe.logger import say, show
from pipeline.observe.progress import ProgressCounter
from pipeline.steps.discover import MAXIMUM_SHARDS
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

_UNAVAILABLE_LIMIT = 3
_FOLLOW_SECONDS = 2.0
_AGAIN = "Run the same command again."


class Environment:
    """An environment's settings, those of Luigi's section [pipeline] included, and its database."""

    def __init__(self, production: bool) -> None:
        choose_parser(late=True)
        configuration = luigi.configuration.get_config()
        defaults = configuration.defaults()  # configparser shows them in every section
        try:
            tuning = {name: str(value) for name, value in configuration["pipeline"].items() if name not in defaults}
        except KeyError:
            tuning = {}
        except configparser.Error as exc:
            message = f"The section [pipeline] of luigi.cfg cannot be read: {exc.message}."
            raise SettingsError(message, "Write a percent sign twice.") from exc
        self.settings: Settings = load_settings(production, tuning)
        self.database = Database(self.settings)
        self.may_reject = True  # False for a helper on another host, which may see less of the dataset
        self._uploader: Uploader | None = None

    @cached_property
    def project(self) -> str:
        """Return a short hash that names the database, whatever the address: one luigid serves several projects."""
        return str(self.database.run(lambda connection: connection.one("find_project").id))

    @contextmanager
    def keeping_uploader(self, *, ahead: bool) -> Iterator[Uploader]:
        """Keep one uploader, with its threads and connections, until the block ends."""
        with closing(Storage(self.settings)) as storage:
            uploader = Uploader(self.database, storage, ahead=ahead, may_reject=self.may_reject)
            with closing(uploader) as self._uploader:
                try:
                    yield uploader
                finally:
                    self._uploader = None

    def uploader(self) -> AbstractContextManager[Uploader]:
        """Return the kept uploader, or one that is closed at the end of the block."""
        return nullcontext(self._uploader) if self._uploader is not None else self.keeping_uploader(ahead=False)


class Run:
    """One load, or without a request one reset, of one batch; forked processes share counter and failures.

    `found` is what the request of a load resolved to; a process that only runs tasks of the load does not know it.
    """

    def __init__(
        self, environment: Environment, batch_id: str, request: LoadRequest | None, found: ResolvedBatch | None = None
    ) -> None:
        self.environment, self.batch_id = environment, batch_id
        self.database: Database = environment.database
        self.requests: set[LoadRequest] = set()  # those that resolve to this run
        self.markers = MarkerCache(self.database, batch_id, schedules=found is not None or request is None)
        is_on_record = request is None or (found is not None and (found.done or bool(found.resumed)))
        self.is_on_record = multiprocessing.RawValue("b", is_on_record)  # else its id alone does not resume the batch
        self._asked = replace(request, batch_id=batch_id, source=found.source) if request and found else None
        found = found or ResolvedBatch(batch_id, "")
        self.source, self.was_done, self.resumed = found.source, found.done, found.resumed  # before the run
        if found.marked:
            self.markers.present.add((LOAD, WHOLE))
        if request is None:
            kind, step = "", RESET
            self.command = environment.settings.command(f"reset --batch-id {batch_id} --confirm")
        else:
            kind, step = request.kind, LOAD
            self.command = replace(request, batch_id=batch_id).command(environment.settings.is_production)
        self.target = BatchStateTarget(self.markers, batch_id, step)  # exists once nothing is left to do
        self.counted = COPY if kind == KIND_QWEN else UPLOAD  # its marker completes the recognitions of a shard
        self._needs_bucket = kind == KIND_LOAD
        self.bucket_created_at: datetime | None = None  # known once the run has its lock
        self.counter, self.failures = ProgressCounter(), FailureLog()
        self.unavailable = multiprocessing.RawValue("i", 0)  # failures in a row because a service was away
        self.discovery: luigi.Task | None = None  # once it is scheduled
        self.maximum_shards = MAXIMUM_SHARDS  # of a batch that this run discovers
        self.lock: BatchLock | None = None
        self._is_claimed = False  # its lock may be taken before
        self.lost: RefusedError | None = None  # to raise once another run has taken the batch
        self.worker_pid = 0  # the process whose worker takes no further task after SIGUSR1
        self.is_announced = False  # the user has seen the plan of the reset
        self.follower: tuple[threading.Thread, threading.Thread] | None = None  # of Luigi's worker, and that worker

    @cached_property
    def shards(self) -> int:
        """Return how many shards the batch has, once discovery has told."""
        return self.database.run(lambda connection: state.require_batch(connection, self.batch_id)).shards

    def open_bucket(self) -> None:
        """Make the bucket of a load, or prove that it is the one on record."""
        if self._needs_bucket:
            self.bucket_created_at = open_bucket(self.database, self.environment.settings, self.batch_id)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keep a reset away during the block, and nothing else; raise RefusedError where one goes on."""
        try:
            self._take_lock(ARRAY)
            yield
        finally:
            self.release()

    def reserve(self) -> bool:
        """Take the lock of a new batch at once; return whether no other run has it, or has used the id before."""
        try:
            self.lock = BatchLock(self.environment.settings, self.batch_id, self._on_lost, waits=False)
        except RefusedError:
            return False
        if self.database.run(lambda connection: is_taken(connection, self.batch_id)):
            self.release()
        return self.lock is not None

    def claim(self) -> None:
        """Take the batch's lock and make the bucket, once; raise RefusedError where another run goes on."""
        if self._is_claimed:
            return
        try:
            self._take_lock(ALONE if self.target.step == RESET else RUN)
            self.open_bucket()
        except BaseException:
            self.release()
            raise
        self._is_claimed = True
        if self.resumed:
            text = f"Resuming batch {self.batch_id}: {self.resumed}."
            say(text, logging.INFO, event="resumed", batch_id=self.batch_id)

    def _take_lock(self, mode: str) -> None:
        if self.lock is None:
            self.lock = BatchLock(self.environment.settings, self.batch_id, self._on_lost, mode=mode)
            self.compare()

    def compare(self) -> None:
        """Compare the request with what is on record now; raise RefusedError where another run put that there."""
        if self._asked is not None:
            self.was_done = resolve_batch(self.environment.settings, self.database, self._asked).done

    def require_lock(self) -> Run:
        """Return the run; raise RefusedError once another run has taken the batch: Luigi's own worker goes on."""
        if self.lost is not None:
            raise self.lost
        return self

    def release(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None
        self._is_claimed = False

    def is_finished(self) -> bool:
        """Return whether the database says that nothing is left to do; False where it does not answer."""
        try:
            return bool(self.target.exists())
        except PipelineError:
            return False

    def resume_hint(self) -> str:
        """Return how the run is resumed; before discovery has committed, only the same command has all its options."""
        return f"To go on: {self.command}" if self.command and self.is_on_record.value else _AGAIN

    def failed(self, task: luigi.Task, exception: BaseException) -> Failure:
        """Record a failure; several in a row because a service is away end the run: each task retries for minutes."""
        failure = Failure.of(task, exception)
        if isinstance(exception, PipelineError):
            if exception.is_recorded:  # for a task that this one requires
                return failure
            exception.is_recorded = True
        self.failures.add(failure)
        if isinstance(exception, TransientError):
            self.unavailable.value += 1
            if self.unavailable.value >= _UNAVAILABLE_LIMIT:
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
        print_failures([one for one in self.failures.read() if one.error != HeldError.__name__])  # the summary has it
        try:
            summary = self.database.run(lambda connection: summarise(connection, self.batch_id))
        except PipelineError as exc:  # the failures above say why
            logger.info("no summary: %s", exc.message)
            return
        rejects = 0 if self.target.step == RESET else 10
        if summary["state"] == "done" and not self.was_done:
            show(describe(summary, rejects), flush=True)
            return
        show(headline(summary, rejects, was_done=self.was_done), flush=True)
        if summary["state"] == "held":
            usable = summary["recognitions_processed"] > 0
            say(state.held_hint(self.batch_id, self.environment.settings.command, usable=usable))
        elif not self.is_finished():
            say(f"To go on: {self.command}")


class RunRegistry:
    """The environments and runs of this process; `owns_worker` where a worker of ours ends its run itself."""

    def __init__(self) -> None:
        self.environments: dict[bool, Environment] = {}
        self.status: StatusReporter | None = None
        self.owns_worker = self._reserves = False
        self._databases: weakref.WeakSet[Database] = weakref.WeakSet()
        self._runs: dict[tuple[str, str, bool], Run] = {}

    def environment(self, production: bool) -> Environment:
        """Return an environment; its settings are read once, and name the target on stderr."""
        if production not in self.environments:
            environment = Environment(production)
            settings = environment.settings
            say(f"Target: {target_of(settings)}", logging.INFO)
            for remark in filter(None, (override_remark(settings), foreign_remark(settings))):
                say(f"Notice: {remark}", logging.WARNING)
            self.environments[production] = environment
            self.watch(environment.database)
        return self.environments[production]

    def watch(self, database: Database) -> Database:
        """Let `cancel_statements` reach a database, and return it."""
        self._databases.add(database)
        return database

    def cancel_statements(self) -> None:
        """Cancel the running statements of the databases of this process."""
        for database in list(self._databases):
            database.cancel_statements()

    def open(self, production: bool) -> Environment:
        """Read the settings anew, Luigi's included, and forget the runs and the worker of the former command."""
        use_packaged_settings()
        self.status, self.owns_worker = None, False
        self.environments.clear()
        self._runs.clear()
        return self.environment(production)

    @contextmanager
    def reserving(self) -> Iterator[None]:
        """Take the lock of a new batch with its id in the block, whose command begins the load at once."""
        self._reserves = True
        try:
            yield
        finally:
            self._reserves = False

    def alarm(self, command: str, production: bool) -> Alarm:
        """Return the alarm of a command that is watched."""
        return Alarm(command, production, lambda: getattr(self.environments.get(production), "database", None))

    def resolve(self, request: LoadRequest, production: bool) -> Run:
        """Return the run of a request, as long as it lasts; raise RefusedError if it has other parameters."""
        self._settle()
        environment = self.environment(production)
        for run in self._runs.values():
            if request in run.requests and run.environment is environment:
                return run
        if request.batch_id is None and multiprocessing.parent_process() is not None:  # it would find another each time
            hint = "Give it a batch_id, or return it from requires()."
            raise UsageError("A load that a run() yields in a process of its own needs the id of its batch.", hint)
        taken = {run.batch_id for run in self._runs.values()}
        while True:
            batch = resolve_batch(environment.settings, environment.database, request, taken)
            run = Run(environment, batch.batch_id, request, batch)
            if not self._reserves or request.batch_id is not None or batch.resumed or run.reserve():
                break
            taken.add(batch.batch_id)
        # The parameters of the task made from it are a request with the same answer.
        whole = replace(request, batch_id=batch.batch_id, source=batch.source)
        found = self._runs.get((LOAD, batch.batch_id, production))
        if found is None or not found.requests:
            found = self._runs[LOAD, batch.batch_id, production] = run
        elif whole not in found.requests:
            message = f"Batch {batch.batch_id} is being loaded by this process with other parameters."
            raise RefusedError(message, "Give each load a --batch-id of its own.")
        found.requests |= {request, whole}
        return found

    def _settle(self) -> None:
        """Wait until runs whose worker has ended are forgotten."""
        for run in list(self._runs.values()):
            if run.follower is not None and not run.follower[1].is_alive():
                run.follower[0].join()

    def find(self, batch_id: str, production: bool, *, reset: bool = False) -> Run:
        """Return the load or reset of a batch; a process that only runs tasks of a load does not know its request."""
        if reset:
            self._settle()
        key = RESET if reset else LOAD, batch_id, production
        if key not in self._runs:
            self._runs[key] = Run(self.environment(production), batch_id, None if reset else LoadRequest(batch_id))
        return self._runs[key]

    def resume_hint(self) -> str:
        """Return how an interrupted command is resumed."""
        run = next(iter(self._runs.values()), None)
        return run.resume_hint() if run is not None else _AGAIN

    def attend(self, run: Run) -> bool:
        """Follow the worker that schedules a run, if it is Luigi's own; return whether it is."""
        # Luigi has no event for the end of its worker, but the worker's keep-alive thread ends with it.
        workers = [thread for thread in threading.enumerate() if isinstance(thread, KeepAliveThread)]
        if self.owns_worker or not workers:
            return False
        if run.follower is None:
            follower = threading.Thread(target=self._follow, args=(run, workers[-1]), name="run", daemon=False)
            run.follower = follower, workers[-1]
            follower.start()
        return True

    def _follow(self, run: Run, worker: threading.Thread) -> None:
        """Release the lock when the run has ended; forget the run, and its requests, when its worker has ended."""
        while worker.is_alive() and not run.is_finished():
            worker.join(_FOLLOW_SECONDS)
        if run.lock is not None:
            run.print_summary()
            run.release()
        else:
            print_failures(run.failures.read())
        worker.join()
        self._runs = {key: one for key, one in self._runs.items() if one is not run}


#: The one object of the process that lives longer than a call.
registry = RunRegistry()

"""What hooks into Luigi's workers: one run a batch, a clean stop, the local scheduler when luigid is down.

Luigi has no public way to give the bare `luigi` command another worker; `install` replaces
`luigi.interface._WorkerSchedulerFactory`, a private name, which is why requirements.txt pins Luigi 3.8 and a test runs
the bare command.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import luigi
import luigi.interface
import luigi.worker
from luigi.rpc import RemoteScheduler
from luigi.scheduler import Scheduler

from pipeline import errors, tasks
from pipeline.database import cancel_statements
from pipeline.logger import configure_logging, get_logger, say
from pipeline.memory import bound_memory
from pipeline.pool import Errand, Pool
from pipeline.progress import Progress, Reporter
from pipeline.sharing import SharedScheduler, SharingWorker
from pipeline.steps.begin import Lease
from pipeline.steps.summary import headline, performance_metrics, summarise

logger = get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_TURN_SECONDS = 0.2
_STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_UNAVAILABLE = frozenset({"DatabaseUnavailable", "SourceUnavailable", "StorageUnavailable", "StorageOverloaded"})
#: Tasks in a row that a service fails, until no further one is begun.
_ENOUGH = 3

# What luigi.cfg says as well; an installed wheel has no luigi.cfg beside it, and must not report a failure as 0.
_DEFAULTS: dict[str, dict[str, str]] = {
    "core": {
        "no_configure_logging": "true",
        "no_lock": "true",
        "autoload_range": "false",
        "rpc_retry_attempts": "30",
        "rpc_retry_wait": "2",
    },
    "worker": {
        "check_complete_on_run": "true",
        "task_process_context": "pipeline.worker.ChildProcess",
        "wait_jitter": "0.2",
    },
    "execution_summary": {"summary_length": "5"},
    "retcode": {
        "already_running": "10",
        "missing_data": "20",
        "not_run": "25",
        "task_failed": "30",
        "scheduling_error": "35",
        "unhandled_exception": "40",
    },
}


@dataclass(frozen=True)
class Failure:
    """A task that failed: its family, the class of the error by name, the sentence and the hint."""

    task: str
    error: str
    message: str
    hint: str


def print_failures(failures: Sequence[Failure]) -> None:
    """Say on stderr what failed first."""
    for failure in failures[:5]:
        say(f"Failed: {failure.task}: {failure.message}", task=failure.task, error=failure.error)
        if failure.hint:
            say(f"Hint: {failure.hint}")


def failure_of(task: str, explanation: str) -> Failure:
    """Read back what `tasks.describe_failure` wrote; anything else is a message of no class of ours."""
    text, _, hint = explanation.partition(tasks.HINT)
    error, separator, message = text.partition(": ")
    if separator and isinstance(getattr(errors, error, None), type):
        return Failure(task, error, message, hint)
    return Failure(task, "", explanation.strip(), "")


class ChildProcess:
    """The context of a task's process: end with the parent, and leave interrupts to it."""

    def __init__(self, task_process: Any) -> None:
        self._forked = bool(task_process.use_multiprocessing)
        self._parent = os.getppid()

    def __enter__(self) -> ChildProcess:
        if self._forked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's, which the parent hears as well
                signal.signal(number, signal.SIG_IGN)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != self._parent:
                    os.kill(os.getpid(), signal.SIGTERM)
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


class PipelineWorker(SharingWorker):
    """A worker that holds the batch's lock, shows progress, remembers failures and stops its children."""

    def __init__(self, *args: Any, lease: Lease | None, verbose_summary: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lease = lease
        self._prints_summary = verbose_summary
        self._pool = Pool(super()._create_task_process, lambda: tasks.uploads.kept(ahead=False), self._running_tasks)
        self.failures: list[Failure] = []
        self._in_vain = 0
        self._elsewhere: tasks.Elsewhere | None = None

    def run(self) -> bool:
        """Run to the end, or to an interrupt, which ends the children first."""
        forks = bool(self.worker_processes > 1 or self._config.force_multiprocessing or self._config.timeout)
        _interrupt.waits = forks
        # An assistant shares the batch with whoever started it, and so does who holds no lease, or asks luigid.
        alone = not forks and not self._assistant and self._lease is not None and not self.shares
        try:
            with (
                Progress(tasks.counter),
                self._reporting(),
                contextlib.nullcontext() if forks else tasks.uploads.kept(ahead=alone),
            ):
                succeeded = bool(super().run())  # type: ignore[no-untyped-call]
        except KeyboardInterrupt:
            _interrupt.waits = False
            self._end_children()
            # Interrupted in a put, the queue's thread may never end: Python is not to wait for it at exit.
            self._task_result_queue.cancel_join_thread()
            if self._prints_summary:
                say(f"Interrupted. {resume_hint()}")
                self._release()
                raise SystemExit(130) from None
            raise
        finally:
            _interrupt.waits = False
        if self._prints_summary:
            self._print_summary()
            if self.is_finished():
                self.settle_history()
        return succeeded

    def is_finished(self) -> bool:
        """Return whether the database says that nothing is left to do."""
        known = tasks.begun()
        try:
            return known is not None and bool(known.target.exists())
        except errors.PipelineError:
            return False

    def _reporting(self) -> contextlib.AbstractContextManager[object]:
        """Tell luigid, as the message of the task that was asked for, how far the shards are, until they are done."""
        if self._assistant or not tasks.luigid.listens:
            return contextlib.nullcontext()
        return Reporter(tasks.batch_report, lambda one: tasks.luigid.tell(str(self._first_task), one), last=False)

    def _get_work(self) -> Any:
        _interrupt.look()
        if self._lease is not None:
            try:
                self._lease.keep()
            except errors.RefusedError:
                # What the children send does not count any more; each finds that out, and removes it again.
                self._end_children(now=False)
                raise
            except errors.PipelineError:
                self._end_children()
                raise
            self._look_elsewhere()
        return super()._get_work()  # type: ignore[no-untyped-call]

    def _look_elsewhere(self) -> None:
        """Show, as far as this worker shares its batch, what others have done of it."""
        known, root = tasks.begun(), self._scheduled_tasks.get(self._first_task)
        if not self.shares or known is None or not isinstance(root, tasks.Load):
            return
        self._elsewhere = self._elsewhere or tasks.Elsewhere(known, root.transform.counted)
        with contextlib.suppress(errors.TransientError):  # the steps themselves will tell
            self._elsewhere.look()

    def _handle_next_task(self) -> None:
        _interrupt.look()
        super()._handle_next_task()  # type: ignore[no-untyped-call]

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> Any:
        result = super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]
        self._pool.close()
        self._release()
        return result

    def _release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("status") == "DONE":
            self._in_vain = 0
        if kwargs.get("status") == "FAILED":
            task = self._scheduled_tasks.get(kwargs["task_id"])
            text = kwargs.get("expl") or ""
            with contextlib.suppress(json.JSONDecodeError):
                text = json.loads(text)
            failure = failure_of(str(task or kwargs["task_id"]), str(text))
            self.failures.append(failure)
            self._in_vain += failure.error in _UNAVAILABLE
            if self._in_vain == _ENOUGH:
                # A service that is gone is gone for the other tasks as well, each of which would try for long.
                self._start_phasing_out()  # type: ignore[no-untyped-call]
        super()._add_task(*args, **kwargs)

    def _log_complete_error(self, task: Any, tb: Any) -> None:
        self.failures.append(failure_of(str(task), _last_line(str(tb))))
        super()._log_complete_error(task, tb)  # type: ignore[no-untyped-call]

    def _create_task_process(self, task: Any) -> Any:
        made = super()._create_task_process(task)  # type: ignore[no-untyped-call]
        pooled = made.use_multiprocessing and made.timeout_time is None and not task.accepts_messages
        return Errand(self._pool, task, made.status_reporter) if pooled else made

    def _end_children(self, now: bool = True) -> None:
        """End the processes of tasks: at once, or each when it has done what it is at."""
        # Nothing needs cleaning up in them: what is not marked does not count, and a transaction ends with its client.
        running = [one for one in self._running_tasks.values() if one.use_multiprocessing]
        alone = [one for one in running if not isinstance(one, Errand)]
        for process in alone:
            if now and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        if now:
            self._pool.end()
        else:
            self._pool.close()
        for process in alone:
            process.join()

    def _print_summary(self) -> None:
        known = tasks.begun()
        if known is None:
            return
        print_failures(self.failures)
        try:
            summary = tasks.database_of(known.production).run(lambda c: summarise(c, known.batch_id))
            finished = known.target.exists()
        except errors.PipelineError as exc:
            # Nothing was begun, or the database went away; the failures above say why.
            logger.info("no summary: %s", exc.message)
            return
        print(headline(summary))
        if summary["state"] == "done":
            print(performance_metrics(summary))
        elif not finished:
            say(resume_hint())


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def resume_hint() -> str:
    """Return how the batch of this process is resumed."""
    known = tasks.begun()
    if known is None:
        return "Run the same command again."
    return f"To go on: {known.command}"


class SchedulerFactory:
    """Make the scheduler and the worker of a run.

    Arguments:
        bare: this is the `luigi` command itself, so the summary is printed here.
    """

    last: ClassVar[PipelineWorker | None] = None

    def __init__(self, bare: bool = True) -> None:
        self._bare = bare

    def create_local_scheduler(self) -> Scheduler:
        """Return a scheduler inside this process."""
        return Scheduler(prune_on_get_work=True, record_task_history=False)

    def create_remote_scheduler(self, url: str) -> RemoteScheduler | Scheduler:
        """Return luigid's, when it answers within a second, else a local one with one warning."""
        if answers(url):
            tasks.luigid.found(url)
            return SharedScheduler(url, _interrupt.look)
        level = logging.WARNING if self._bare else logging.INFO
        logger.log(level, "luigid does not answer at %s: using the local scheduler.", url)
        return self.create_local_scheduler()

    def create_worker(self, scheduler: Any, worker_processes: int, assistant: bool = False) -> PipelineWorker:
        """Return a worker that holds the lock of its batch, under an id that a re-run takes over."""
        _interrupt.install()
        known = tasks.begun()
        lease = None
        arguments: dict[str, Any] = {}
        if known is not None and not assistant:
            if not known.target.exists():
                lease = Lease(tasks.settings_of(known.production), known.batch_id)
            # Stable, so that luigid gives a killed run's tasks to its successor at once; the lock keeps it unique.
            arguments["worker_id"] = f"Worker(host={socket.gethostname()}, batch={known.batch_id})"
        worker = PipelineWorker(
            scheduler=scheduler,
            worker_processes=worker_processes,
            assistant=assistant,
            lease=lease,
            verbose_summary=self._bare,
            **arguments,
        )
        type(self).last = worker
        return worker


def answers(url: str, timeout: float = 1.0) -> bool:
    """Return whether a luigid answers at the URL, asked once."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as response:
            return bool(response.status < 400)
    except (urllib.error.URLError, OSError, ValueError):
        return False


class _Interrupt:
    """What SIGTERM, Ctrl-C and a terminal that closes do: raise KeyboardInterrupt, at once or where the worker looks.

    While a process forks, Python only prints an exception that a signal handler raises and goes on. So a worker with
    children sets `waits`, and looks between two tasks; a second signal raises at once all the same. While PostgreSQL
    works, no handler runs at all: a thread that hears of the signal then cancels the statement.
    """

    def __init__(self) -> None:
        self.waits = False
        self._came = False
        self._owner = 0
        self._handled = threading.Event()
        self._heard: socket.socket | None = None
        self._former_hook: Callable[[sys.UnraisableHookArgs], object] = sys.__unraisablehook__

    def install(self) -> None:
        """Take the signals, as far as this thread may; SIGHUP stays ignored where `nohup` has it ignored."""
        self.waits = self._came = False
        self._owner = os.getpid()
        if sys.unraisablehook != self._unraisable:
            self._former_hook = sys.unraisablehook
            sys.unraisablehook = self._unraisable
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._handle)
            if self._heard is None:
                hears, self._heard = socket.socketpair()
                self._heard.setblocking(False)
                threading.Thread(target=self._listen, args=(hears,), name="signals", daemon=True).start()
            signal.set_wakeup_fd(self._heard.fileno(), warn_on_full_buffer=False)

    def _listen(self, hears: socket.socket) -> None:
        """Give the handler its turn, and where it gets none, make PostgreSQL let go of the main thread."""
        while numbers := hears.recv(16):
            if _STOPS.intersection(numbers) and not self._handled.wait(_TURN_SECONDS):
                cancel_statements()
            self._handled.clear()

    def look(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._came:
            raise KeyboardInterrupt

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Where a finalizer swallowed the exception, ask for it again a moment later; nobody needs to read of it."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._former_hook(unraisable)
        elif os.getpid() == self._owner:
            self._came = True
            again = threading.Timer(0.05, os.kill, (self._owner, signal.SIGINT))
            again.daemon = True
            again.start()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            os._exit(128 + signum)  # a child that has not set up its own handlers yet
        self._handled.set()
        first, self._came = not self._came, True
        if not (self.waits and first):
            raise KeyboardInterrupt


_interrupt = _Interrupt()


def heed_signals() -> None:
    """Make SIGTERM, Ctrl-C and a terminal that closes stop a command in good order, also one that has no worker."""
    _interrupt.install()


class _BareSchedulerFactory(SchedulerFactory):
    """The factory of the `luigi` command, which also sets up the logging that luigi.cfg leaves to us."""

    def __init__(self) -> None:
        super().__init__(bare=True)


def install() -> None:
    """Put our factory, our defaults and our logging under the `luigi` command."""
    bound_memory()
    setattr(luigi.interface, "_WorkerSchedulerFactory", _BareSchedulerFactory)  # noqa: B010 (mypy: a type is no variable)
    # Luigi reads these two past its own parameters, and would warn that nobody does.
    luigi.interface.core.ignore_unconsumed |= {"rpc_retry_attempts", "rpc_retry_wait"}
    configuration = luigi.configuration.get_config()
    for section, options in _DEFAULTS.items():
        for option, value in options.items():
            if not configuration.has_option(section, option):
                configuration.set(section, option, value)
    if not logging.getLogger().handlers:
        configure_logging()

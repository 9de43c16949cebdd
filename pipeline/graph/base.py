"""What all tasks have in common: markers, failures and reports; and what the task of a whole batch does besides.

Importing the package changes nothing of Luigi. A process runs our worker once Luigi's command makes a task of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import luigi
import luigi.interface
from luigi.cmdline_parser import CmdlineParser

from pipeline.batches.state import RESET, WHOLE
from pipeline.errors import PipelineError, RefusedError, UsageError
from pipeline.graph.failures import Failure, exit_on_error
from pipeline.graph.luigid import announce, scheduler_url, typed, use_packaged_settings
from pipeline.graph.markers import BatchStateTarget
from pipeline.graph.process import Interrupts, bound_memory, escape_output
from pipeline.graph.run import Run, registry
from pipeline.graph.worker import SchedulerFactory
from pipeline.observe.logger import configure_logging
from pipeline.observe.progress import StatusMessage, status_thread


class BatchTask(luigi.Task):
    """A task of a batch; subclasses name their step."""

    batch_id = luigi.Parameter(description="the batch")
    production = luigi.BoolParameter(default=False, description="use .env.production")
    # Part of the task id: one luigid serves several projects. After `shard` by name, since ids show the first names.
    supabase_project = luigi.Parameter(default="", description="the database's identity; filled in", positional=False)

    step: str

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """Resolve what the parameters mean, so that the task id and the tasks below carry it."""
        values = dict(super().get_param_values(params, args, kwargs))  # type: ignore[no-untyped-call]
        cls.resolve(values)
        return [(name, values[name]) for name, _ in params]

    @classmethod
    def resolve(cls, values: dict[str, Any]) -> None:
        """Fill in what the parameters leave open; raise RefusedError for a task of another project."""
        given, project = values["supabase_project"], registry.environment(values["production"]).project
        if given not in ("", project):
            task = f"{cls.__name__} of batch {values['batch_id']}"
            message = f"{task} is a task of the project {given}, not of {project}."
            raise RefusedError(message, "Leave --supabase-project out; `pipeline worker` takes tasks of its project.")
        values["supabase_project"] = project

    @property
    def active_run(self) -> Run:
        """Return the run of this process that the task belongs to."""
        return registry.find(self.batch_id, self.production, reset=self.step == RESET)

    def output(self) -> luigi.Target:
        """Return the markers."""
        shards = getattr(self, "shard_numbers", (WHOLE,))
        return BatchStateTarget(self.active_run.markers, self.batch_id, self.step, shards)

    def complete(self) -> bool:
        """Return whether the marker is there."""
        with self.recording_failures():
            return bool(super().complete())  # type: ignore[no-untyped-call]

    @contextmanager
    def recording_failures(self) -> Iterator[None]:
        """Record an error of the block as a failure of this task: Luigi would keep only its traceback."""
        try:
            yield
        except PipelineError as exc:
            self.active_run.failed(self, exc)
            raise

    def on_success(self) -> None:
        """Note that the services answer."""
        self.active_run.unavailable.value = 0

    def on_failure(self, exception: BaseException) -> str:
        """Record the failure, and return what the scheduler shows of it: no secret, no traceback."""
        return str(self.active_run.failed(self, exception))

    def report(self, message: str, percent: int | None = None) -> None:
        """Set status message and progress in the visualiser, where there is one."""
        if registry.status is not None:
            registry.status.report(self.task_id, (message, percent))

    def reporting(self, read: Callable[[], StatusMessage | None]) -> AbstractContextManager[object]:
        """Report to the visualiser during the block what `read` returns."""
        status = registry.status
        return status_thread(read, partial(status.report, self.task_id)) if status is not None else nullcontext()


@BatchTask.event_handler(luigi.Event.TIMEOUT)  # type: ignore[no-untyped-call,untyped-decorator]
@BatchTask.event_handler(luigi.Event.PROCESS_FAILURE)  # type: ignore[no-untyped-call,untyped-decorator]
def _record_process_failure(task: BatchTask, message: str) -> None:
    task.active_run.failures.add(Failure(str(task), "", message, ""))


class ShardTask(BatchTask):
    """A task of one shard, or of several where a batch has more than Luigi's scheduler can take."""

    shard = luigi.IntParameter(description="the shard, from 1")
    shards = luigi.IntParameter(default=1, description="how many, from that one on", positional=False)
    # The visualiser shows the name of a task and its parameters, nothing else.
    part = luigi.Parameter(default="", significant=False, description="which shard of how many; filled in")

    @classmethod
    def resolve(cls, values: dict[str, Any]) -> None:
        """Fill in which shard of how many this is, and the step."""
        super().resolve(values)
        which = values["part"].rpartition(", ")[0]  # of the task that it was cloned from
        if not which:
            first, several = values["shard"], values["shards"] > 1
            which = f"shards {first} to {first + values['shards'] - 1}" if several else f"shard {first}"
            which += f" of {registry.find(values['batch_id'], values['production']).shards}"
        values["part"] = f"{which}, {cls.step}"

    @property
    def shard_numbers(self) -> Sequence[int]:
        """Return the shards."""
        return range(self.shard, self.shard + self.shards)


class RootTask(BatchTask):
    """A task that people run, or require from tasks of their own. It has the lock of its batch.

    `command` is the one that does the same, if it is watched.
    """

    command = ""

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """Resolve what the parameters mean, and let Luigi's command use our scheduler and our worker."""
        parser = CmdlineParser.get_instance()
        family = cls.get_task_family()  # type: ignore[no-untyped-call]
        if parser is None or parser.known_args.root_task != family or registry.owns_worker:
            return super().get_param_values(params, args, kwargs)
        bound_memory()
        escape_output()
        # `core()` would warn of options that it does not know, before `use_packaged_settings` names them.
        file = luigi.configuration.get_config().get("core", "logging_conf_file", "")
        if not (logging.getLogger().handlers or file or typed("logging_conf_file")):
            configure_logging(verbose=typed("log_level") in ("DEBUG", "INFO"))
        interrupts = Interrupts(registry.cancel_statements, registry.resume_hint)
        interrupts.__enter__()  # until the process ends
        with exit_on_error(interrupts):
            try:
                given = dict(super(BatchTask, cls).get_param_values(params, args, kwargs))  # type: ignore[no-untyped-call]
            except luigi.parameter.MissingParameterException as exc:
                use_packaged_settings()  # the exit code
                missing = next(name for name, one in params if not (name in kwargs or one.has_task_value(family, name)))
                hint = f"`luigi --module {typed('module')} {family} --help` shows what there is."
                raise UsageError(f"{family} needs --{missing.replace('_', '-')}.", hint) from exc
            if cls.command:
                interrupts.watch(registry.alarm(cls.command, given["production"]))
            use_packaged_settings()
            # The lock of a batch is in the database; Luigi's own would end the process before its alarm tells of it.
            luigi.configuration.get_config().set("core", "no_lock", "true")
            with registry.reserving():
                values = super().get_param_values(params, args, kwargs)
        named = dict(values)
        run = registry.find(named["batch_id"], named["production"], reset=cls.step == RESET)
        registry.owns_worker = True
        # Luigi has no public way to name a factory for its command.
        factory = partial(SchedulerFactory, registry, run, interrupts, bare=True)
        setattr(luigi.interface, "_WorkerSchedulerFactory", factory)  # noqa: B010 (mypy: a type is no variable)
        return values

    def complete(self) -> bool:
        """Return whether nothing is left to do."""
        registry.attend(self.active_run)
        return super().complete()

    def requires(self) -> Any:
        """Take the lock of the batch when Luigi's worker schedules this task; raise RefusedError if another has it."""
        run = self.active_run
        if registry.attend(run):
            is_command = CmdlineParser.get_instance() is not None
            if is_command and run.lock is None and not luigi.interface.core().local_scheduler:
                announce(scheduler_url(), run.environment.project)
            with self.recording_failures():
                run.claim()
        return []

"""The Luigi tasks: what needs what, and which marker says that it is done. The work itself is in `steps`.

LoadBatch -> TransformBatch -> DiscoverBatch
                   └ yields, once the shards are known, CopyShard -> UploadShard for each
LoadQwen -> TransformQwen -> DiscoverQwen
                   └ yields, once the shards are known, CopyQwenShard for each
ResetBatch
"""

from __future__ import annotations

import configparser
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import luigi
from luigi.rpc import RemoteScheduler
from luigi.task import DynamicRequirements

from pipeline import batch_state
from pipeline.batch_state import COPY, DISCOVER, KIND_LOAD, KIND_QWEN, LOAD, RESET, TRANSFORM, UPLOAD, WHOLE
from pipeline.config import Settings, load_settings, redact
from pipeline.database import Connection, Database
from pipeline.errors import PermanentError, PipelineError, RefusedError, SettingsError, UnfinishedError
from pipeline.logger import get_logger
from pipeline.memory import only_new_is_collected
from pipeline.metrics import Metrics
from pipeline.progress import PLACES, Counter, Report, Reporter
from pipeline.steps.begin import Begun, Wish, begin_load, reset_command, resume_command
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import Request, discover
from pipeline.steps.reset import find_batch_to_reset, reset_batch
from pipeline.steps.summary import headline, performance_metrics, summarise
from pipeline.steps.transform import transform_batch
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Self

logger = get_logger(__name__)

#: Between the sentence and the hint of a failure.
HINT = "\nHint: "

#: How far the batch is; made before any fork, so that workers add to the same numbers.
counter = Counter()


@cache
def settings_of(production: bool) -> Settings:
    """Return the settings of an environment, with the section [pipeline] of luigi.cfg."""
    configuration = luigi.configuration.get_config()
    try:
        section = dict(configuration.items("pipeline")) if configuration.has_section("pipeline") else {}
    except configparser.Error as exc:
        raise SettingsError(
            f"The section [pipeline] of luigi.cfg cannot be read: {exc.message}.", "A percent sign is written twice."
        ) from exc
    return load_settings(production, section)


@cache
def database_of(production: bool) -> Database:
    """Return the database of an environment; it connects at its first use, once in each process."""
    return Database(settings_of(production))


@dataclass(frozen=True)
class Run:
    """What this process was started for.

    Attributes:
        batch_id: the batch.
        production: in production.
        command: what goes on with it when it is stopped.
        target: there once nothing is left to do.
    """

    batch_id: str
    production: bool
    command: str
    target: luigi.Target


_begun: dict[tuple[Wish, bool], Begun] = {}
_runs: list[Run] = []


def begin(wish: Wish, production: bool) -> Begun:
    """Return the batch that is meant; asked once a process for the same wish."""
    known = _begun.get((wish, production))
    if known is None:
        known = begin_load(settings_of(production), database_of(production), wish)
        _begun[wish, production] = known
        markers.begin()
        # The task's own parameters are a wish as well, with the same answer.
        _begun[replace(wish, batch_id=known.batch_id, source=known.source), production] = known
        command = resume_command(known.batch_id, wish.kind, wish.limit, wish.force, production)
        target = BatchStateTarget(database_of(production), known.batch_id, LOAD)
        if known.marked:
            markers.add(known.batch_id, LOAD)
        _runs.append(Run(known.batch_id, production, command, target))
    return known


def begun() -> Run | None:
    """Return what this process was started for, None before that is known."""
    return _runs[0] if _runs else None


class _Uploads:
    """The uploader of this process, kept from shard to shard."""

    def __init__(self) -> None:
        self._kept: ExitStack | None = None
        self._ahead = False
        self._uploaders: dict[bool, Uploader] = {}

    @contextmanager
    def kept(self, ahead: bool) -> Iterator[None]:
        """Keep the uploader until the block ends; let it send `ahead` where the process has the batch to itself."""
        with only_new_is_collected(), ExitStack() as stack:
            self._kept, self._ahead = stack, ahead
            try:
                yield
            finally:
                self._kept = None
                self._uploaders.clear()

    @contextmanager
    def of(self, production: bool) -> Iterator[Uploader]:
        """Return the uploader of an environment."""
        if self._kept is None:
            with ExitStack() as stack:
                yield self._make(production, stack, ahead=False)
            return
        if production not in self._uploaders:
            self._uploaders[production] = self._make(production, self._kept, ahead=self._ahead)
        yield self._uploaders[production]

    def _make(self, production: bool, stack: ExitStack, *, ahead: bool) -> Uploader:
        storage = stack.enter_context(closing(Storage(settings_of(production))))
        uploader = Uploader(database_of(production), storage, ahead=ahead, judges=role.judges, progress_of=counter.of)
        return stack.enter_context(closing(uploader))


uploads = _Uploads()


@dataclass
class Role:
    """What this process may decide.

    Attributes:
        judges: it may reject what is not as discovery saw it; who helps on another host may see less of the dataset.
    """

    judges: bool = True


role = Role()


class Luigid:
    """What this process tells luigid of its tasks: quickly or not at all, for no task may wait for it, or fail by it.

    Luigi's own way waits a minute for a luigid that is away, and then fails the task. A local scheduler is told
    nothing: nobody could see it.
    """

    _PATIENCE = 1.0
    _SILENCE = 30.0

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._silent_until = 0.0

    def found(self, url: str | None) -> None:
        """Tell this luigid from now on; None for nobody."""
        self._scheduler = None
        if url is not None:
            self._scheduler = RemoteScheduler(url, self._PATIENCE)
            self._scheduler._rpc_retry_attempts, self._scheduler._rpc_log_retries = 1, False
            self._silent_until = 0.0

    @property
    def listens(self) -> bool:
        """Return whether there is one to tell."""
        return self._scheduler is not None

    def tell(self, task_id: str, report: Report) -> None:
        """Set the status message of a task, and its progress in percent where that is known."""
        if self._scheduler is None or time.monotonic() < self._silent_until:
            return
        message, percent = report
        try:
            self._scheduler.set_task_status_message(task_id, _shown(message))
            if percent is not None:
                self._scheduler.set_task_progress_percentage(task_id, percent)
        except (luigi.rpc.RPCError, ValueError) as exc:  # ValueError: what answers is no luigid
            self._silent_until = time.monotonic() + self._SILENCE
            logger.info("luigid did not take a status message: %s", exc)


def _shown(message: str) -> str:
    """Return a message as luigid may have it: no secret, and no markup, which the visualiser would take for its own."""
    return redact(message).translate({ord("<"): "‹", ord(">"): "›", ord("&"): "+"})


luigid = Luigid()


def percent(done: int, total: int) -> int | None:
    """Return how much is done in percent, None where the total is not known."""
    return min(100, done * 100 // total) if total else None


def batch_report() -> Report | None:
    """Return how far the shards of this process's batch are; None before that is known, and once all are done."""
    done, _, total = counter.read()
    return (f"{done} of {total} recognitions", percent(done, total)) if done < total else None


class Elsewhere:
    """What other workers do of this process's batch, as markers tell; each shard counts as the same share of it.

    Arguments:
        step: the step whose marker says that the recognitions of a shard are done.
    """

    _SECONDS = 2.0

    def __init__(self, run: Run, step: str) -> None:
        self._run, self._step = run, step
        self._before: frozenset[int] | None = None
        self._shards = 0
        self._looked = 0.0

    def look(self) -> None:
        """Count now and then what is marked, and neither done here nor before this run."""
        total = counter.read()[2]
        if not total or time.monotonic() - self._looked < self._SECONDS:
            return
        batch_id = self._run.batch_id
        rows = database_of(self._run.production).run(lambda c: batch_state.list_marked(c, batch_id))
        marked = frozenset(shard for step, shard in rows if step == self._step)
        if self._before is None:
            self._before = marked
            self._shards = (
                database_of(self._run.production).run(lambda c: batch_state.require_batch(c, batch_id)).shards
            )
        others = sum(not counter.read_shard(shard)[0] for shard in marked - self._before)
        counter.of(PLACES - 1)(total * others // max(1, self._shards))
        self._looked = time.monotonic()


def forget() -> None:
    """Forget settings and batches: for a process that runs one command after another."""
    luigid.found(None)
    role.judges = True
    settings_of.cache_clear()
    database_of.cache_clear()
    _begun.clear()
    _runs.clear()
    markers.clear()
    counter.start(0, 0)


class Markers:
    """What this process knows of markers without asking the database for each.

    That a marker is there stays true, but for an upload that is taken back. That one is not there may change at any
    moment, so what `list_marked` found is an answer to the first question about each alone: the one that Luigi asks of
    every shard when it schedules them all.
    """

    def __init__(self) -> None:
        self._there: set[tuple[str, str, int]] = set()
        self._found: dict[str, set[tuple[str, str, int]]] = {}
        self._asked: set[tuple[str, str, int]] = set()
        self._owner = 0

    def begin(self) -> None:
        """Make this process the one that schedules; those that it forks ask for the latest."""
        self._owner = os.getpid()

    def add(self, batch_id: str, step: str, shard: int = WHOLE) -> None:
        """Remember a marker."""
        self._there.add((batch_id, step, shard))

    def remove(self, batch_id: str, step: str, shard: int) -> None:
        """Forget one that was taken back."""
        self._there.discard((batch_id, step, shard))

    def clear(self) -> None:
        """Forget all."""
        self._there.clear()
        self._found.clear()
        self._asked.clear()

    def ask(self, database: Database, batch_id: str, step: str, shard: int) -> bool:
        """Return whether a marker is there."""
        key = batch_id, step, shard
        if key in self._there:
            return True
        if shard != WHOLE and key not in self._asked and self._owner == os.getpid():
            self._asked.add(key)
            if batch_id not in self._found:
                rows = database.run(lambda connection: batch_state.list_marked(connection, batch_id))
                self._found[batch_id] = {(batch_id, *row) for row in rows}
            return key in self._found[batch_id]
        there = database.run(lambda connection: batch_state.is_done(connection, batch_id, step, shard))
        if there and shard == WHOLE:
            self.add(*key)
        return there


markers = Markers()


class BatchStateTarget(luigi.Target):
    """A row of ingest.batch_state."""

    def __init__(self, database: Database, batch_id: str, step: str, shard: int = WHOLE) -> None:
        self._database = database
        self._key = batch_id, step, shard

    def exists(self) -> bool:
        """Return whether the marker is there."""
        return markers.ask(self._database, *self._key)

    def __str__(self) -> str:
        batch_id, step, shard = self._key
        return f"{batch_id}/{step}" + (f"/{shard}" if shard else "")


class BatchTask(luigi.Task):
    """A task of a batch; subclasses name their step."""

    batch_id = luigi.Parameter(description="the batch")
    production = luigi.BoolParameter(default=False, description="use .env.production")

    step: str

    @property
    def database(self) -> Database:
        """Return the database of this task's environment."""
        return database_of(self.production)

    def output(self) -> luigi.Target:
        """Return the marker."""
        return BatchStateTarget(self.database, self.batch_id, self.step, getattr(self, "shard", WHOLE))

    def on_failure(self, exception: BaseException) -> str:
        """Return what the scheduler shows of a failure: the sentence, never a secret."""
        return describe_failure(exception)

    def tell(self, message: str, percent: int | None = None) -> None:
        """Set status message and progress in the visualiser, as far as there is one that listens."""
        luigid.tell(self.task_id, (message, percent))

    @contextmanager
    def telling(self, read: Callable[[], Report | None]) -> Iterator[None]:
        """Tell the visualiser during the block, at most once a second, what `read` says."""
        with Reporter(read, partial(luigid.tell, self.task_id)) if luigid.listens else nullcontext():
            yield


def describe_failure(exception: BaseException) -> str:
    """Return `<class>: <sentence>`, and the hint on a line of its own; `worker.failure_of` reads it back."""
    if isinstance(exception, PipelineError):
        text = f"{type(exception).__name__}: {exception.message}"
        return redact(f"{text}{HINT}{exception.hint}" if exception.hint else text)
    return redact(f"{type(exception).__name__}: {exception}")


class ShardTask(BatchTask):
    """A task of one shard."""

    shard = luigi.IntParameter(description="the shard, from 1")

    @classmethod
    def of(cls, task: BatchTask, shard: int) -> Self:
        """Return the task of a shard in the batch of another task."""
        parameters: dict[str, Any] = {"batch_id": task.batch_id, "shard": shard, "production": task.production}
        return cls(**parameters)


class UploadShard(ShardTask):
    """Upload the photos of a shard."""

    step = UPLOAD

    def run(self) -> None:
        """Upload, then mark."""
        with uploads.of(self.production) as uploader, self.telling(self._report):
            uploader.upload(self.batch_id, self.shard)
        markers.add(self.batch_id, UPLOAD, self.shard)

    def _report(self) -> Report | None:
        done, total = counter.read_shard(self.shard)
        return (f"{2 * done} of {2 * total} photos", percent(done, total)) if total else None


class CopyShard(ShardTask):
    """COPY the rows of a shard into the schema raw."""

    step = COPY
    kind = KIND_LOAD

    def requires(self) -> UploadShard | list[luigi.Task]:
        """Return the upload of the same shard."""
        return UploadShard.of(self, self.shard)

    def run(self) -> None:
        """Copy and mark in one transaction."""
        metrics = Metrics()
        said: list[str] = ["copying"]
        try:
            with (
                closing(Storage(settings_of(self.production), metrics)) as storage,
                self.telling(lambda: (said[-1], 100 if len(said) > 1 else 0)),
            ):
                copy_shard(
                    self.database,
                    storage,
                    self.batch_id,
                    self.shard,
                    metrics,
                    said.append,
                    kind=self.kind,
                    judges=role.judges,
                )
        except (PermanentError, UnfinishedError):
            markers.remove(self.batch_id, UPLOAD, self.shard)  # the upload was taken back, by us or another process
            raise
        markers.add(self.batch_id, COPY, self.shard)


class CopyQwenShard(CopyShard):
    """COPY the detections of a shard into the schema raw; there is nothing to upload."""

    kind = KIND_QWEN

    def requires(self) -> list[luigi.Task]:
        """Return nothing: the manifest is there when a shard is known."""
        return []

    def run(self) -> None:
        """Copy, mark and count."""
        super().run()
        recognitions = self.database.run(lambda c: c.one("count_shard", batch_id=self.batch_id, shard=self.shard))
        counter.of(self.shard)(recognitions.recognitions)


class Asked(BatchTask):
    """A task that knows what was asked for: which parameters, and what kind of batch that makes.

    Attributes:
        shared: names of the parameters that go down to the tasks below.
    """

    kind: str
    shared: tuple[str, ...]

    def same(self) -> dict[str, Any]:
        """Return the parameters that the tasks below share."""
        return {name: getattr(self, name) for name in self.shared}

    def request(self) -> Request:
        """Return what discovery is to do."""
        raise NotImplementedError


class LoadTask(Asked):
    """A task that knows what a load was asked to do."""

    kind = KIND_LOAD
    shared = ("batch_id", "production", "source", "limit", "force", "strict")

    source = luigi.Parameter(default="", description="the dataset's folder")
    limit = luigi.OptionalIntParameter(default=None, description="at most so many new recognitions, lowest id first")
    force = luigi.BoolParameter(default=False, description="load what is loaded already, as a new version")
    strict = luigi.BoolParameter(default=False, description="check everything first; one reject refuses the batch")

    def request(self) -> Request:
        """Return what discovery is to do."""
        options = {"kind": self.kind, "limit": self.limit, "force": self.force, "strict": self.strict}
        return Request.of(settings_of(self.production), self.batch_id, self.source, **options)


class QwenTask(Asked):
    """A task that knows which annotations were asked for."""

    kind = KIND_QWEN
    shared = ("batch_id", "production", "file", "force")

    file = luigi.Parameter(default="", description="the annotations file")
    force = luigi.BoolParameter(default=False, description="annotate anew what has annotations already")

    def request(self) -> Request:
        """Return what discovery is to do."""
        return Request.of(settings_of(self.production), self.batch_id, self.file, kind=self.kind, force=self.force)


class Discover(Asked):
    """Find out what is to be loaded, and write the manifest."""

    step = DISCOVER

    def run(self) -> None:
        """Discover and mark in one transaction."""
        looked: list[Report] = [("listing the dataset", 0)]

        def progress(total: int, done: int) -> None:
            looked[0] = f"{done} of {total} recognitions looked at", percent(done, total)

        with self.telling(lambda: looked[0]):
            found = discover(self.database, self.request(), progress=progress)
            if found is not None:
                rejects = sum(found.rejects.values())
                looked[0] = f"{found.recognitions} recognitions in {found.shards} shards, {rejects} rejects", 100


class DiscoverBatch(Discover, LoadTask):
    """Walk the dataset and write the manifest."""


class DiscoverQwen(Discover, QwenTask):
    """Read the annotations file and write the manifest."""


class Transform(Asked):
    """Wait for all shards, then publish the batch.

    Attributes:
        discovery: the task that says which shards there are.
        copying: the task of a shard.
        counted: the step whose marker says that the recognitions of a shard are done, for the progress.
    """

    step = TRANSFORM
    discovery: type[Discover]
    copying: type[CopyShard]
    counted: str

    def requires(self) -> Discover:
        """Return the discovery, which says how many shards there are."""
        return self.discovery(**self.same())

    def run(self) -> Iterator[DynamicRequirements]:
        """Yield the shards that are not copied yet, all at once; then transform, mark and finish in one transaction."""

        def look(connection: Connection) -> tuple[list[int], tuple[int, int]]:
            progress = batch_state.progress(connection, self.batch_id, self.counted)
            return batch_state.pending_shards(connection, self.batch_id, COPY), progress

        pending, progress = self.database.run(look)
        counter.start(*progress)

        def complete(_: Any = None) -> bool:
            return not self.database.run(lambda c: batch_state.pending_shards(c, self.batch_id, COPY))

        if pending:
            self.tell(f"waiting for {len(pending)} shards", 0)
            yield DynamicRequirements([self.copying.of(self, shard) for shard in pending], custom_complete=complete)
        said, done = ["beginning"], 0
        metrics = Metrics()
        with (
            closing(Storage(settings_of(self.production), metrics)) as storage,
            self.telling(lambda: (said[-1], done)),
        ):
            transform_batch(self.database, storage, self.batch_id, metrics, said.append)
            done = 100


class TransformBatch(Transform, LoadTask):
    """Publish the photos, menus and receipts of a batch."""

    discovery, copying, counted = DiscoverBatch, CopyShard, UPLOAD


class TransformQwen(Transform, QwenTask):
    """Publish the annotations of a batch."""

    discovery, copying, counted = DiscoverQwen, CopyQwenShard, COPY


class Load(Asked):
    """The whole of a batch; without an id, resume the newest unfinished one like it, or make a new one.

    Attributes:
        transform: the task that makes the batch count.
        named: the parameter that names what is loaded.
    """

    step = LOAD
    transform: type[Transform]
    named: str

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """Resolve which batch and which source are meant, so that the task id and the children carry them."""
        values = dict(super().get_param_values(params, args, kwargs))  # type: ignore[no-untyped-call]
        wish = Wish(
            values["batch_id"] or None, values[cls.named] or None, values.get("limit"), values["force"], cls.kind
        )
        known = begin(wish, values["production"])
        values["batch_id"], values[cls.named] = known.batch_id, known.source
        return [(name, values[name]) for name, _ in params]

    def requires(self) -> Transform:
        """Return the transform, and through it everything else."""
        return self.transform(**self.same())

    def run(self) -> None:
        """Keep the numbers of the load with the batch, and mark."""

        def work(connection: Connection) -> dict[str, Any]:
            batch_state.hold_finished(connection, self.batch_id)
            if not batch_state.await_step(connection, self.batch_id, LOAD):
                batch_state.mark(connection, self.batch_id, LOAD, WHOLE, connection.one("now").now, {})
            summary = summarise(connection, self.batch_id)
            connection.execute(
                "update_batch_metrics", batch_id=self.batch_id, metrics=json.dumps(summary, ensure_ascii=False)
            )
            return summary

        summary = self.database.run(work)
        self.tell(f"{headline(summary)}\n{performance_metrics(summary)}", 100)


class LoadBatch(Load, LoadTask):
    """Load a dataset; without --batch-id, resume the newest unfinished batch like it, or make a new one."""

    transform, named = TransformBatch, "source"

    batch_id = luigi.Parameter(default="", description="the batch; resumed or made when not given")


class LoadQwen(Load, QwenTask):
    """Load annotations; without --batch-id, resume the newest unfinished batch like it, or make a new one."""

    transform, named = TransformQwen, "file"

    batch_id = luigi.Parameter(default="", description="the batch; resumed or made when not given")


class ResetTarget(luigi.Target):
    """A batch that is reset."""

    def __init__(self, database: Database, batch_id: str) -> None:
        self._database, self._batch_id = database, batch_id

    def exists(self) -> bool:
        """Return whether nothing of the batch is left."""
        batch = self._database.run(lambda connection: batch_state.find_batch(connection, self._batch_id))
        return batch is not None and batch.state == "reset"

    def __str__(self) -> str:
        return f"{self._batch_id}/reset"


class ResetBatch(BatchTask):
    """Take a batch out again, as if it had never been loaded."""

    step = RESET

    confirm = luigi.BoolParameter(default=False, description="yes, delete its rows and objects")

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """Refuse what is not confirmed, or no batch at all, before anything is scheduled."""
        values = dict(super().get_param_values(params, args, kwargs))  # type: ignore[no-untyped-call]
        batch_id, production = values["batch_id"], values["production"]
        if not values["confirm"]:
            raise RefusedError(
                f"Batch {batch_id} is not reset without --confirm.",
                f"See what would go with `{reset_command(batch_id, production)} --dry-run`.",
            )
        database = database_of(production)
        database.run(lambda connection: find_batch_to_reset(connection, batch_id))
        if not any(run.batch_id == batch_id for run in _runs):
            command = f"{reset_command(batch_id, production)} --confirm"
            _runs.append(Run(batch_id, production, command, ResetTarget(database, batch_id)))
        return [(name, values[name]) for name, _ in params]

    def output(self) -> luigi.Target:
        """Return the batch's state: a reset takes markers away, its own would be among them."""
        return ResetTarget(self.database, self.batch_id)

    def run(self) -> None:
        """Remove rows, then objects, then manifest and markers."""
        reset_batch(self.database, settings_of(self.production), self.batch_id, counter)
        self.tell(f"{self.batch_id} is reset")


__all__: Sequence[str] = (
    "CopyQwenShard",
    "CopyShard",
    "DiscoverBatch",
    "DiscoverQwen",
    "LoadBatch",
    "LoadQwen",
    "ResetBatch",
    "TransformBatch",
    "TransformQwen",
    "UploadShard",
)

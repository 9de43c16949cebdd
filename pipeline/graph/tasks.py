"""The Luigi tasks: what requires what, and which marker says that it is done. The work itself is in `pipeline.steps`.

LoadBatch -> TransformBatch -> DiscoverBatch
                   └ yields, once the shards are known, CopyShard -> UploadShard for each
LoadQwen -> TransformQwen -> DiscoverQwen, which copies the detections as well
LoadNight, a LoadBatch that is done once a day
ResetBatch
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import date as Day
from datetime import datetime, time, timezone
from functools import partial
from typing import Any

import luigi
from luigi.task import DynamicRequirements

from pipeline.batches import state
from pipeline.batches.held import MAXIMUM_REJECTS, check_max_rejects
from pipeline.batches.looks import OPTIONS, Look
from pipeline.batches.resolve import LoadRequest, find_newest_done
from pipeline.batches.state import COPY, DISCOVER, KIND_LOAD, KIND_QWEN, LOAD, RESET, TRANSFORM, UPLOAD, WHOLE
from pipeline.batches.summary import describe, keep_summary
from pipeline.config import command_line
from pipeline.database import Connection
from pipeline.dataset.frame import PIXELS
from pipeline.errors import DataError, RefusedError, UnfinishedError
from pipeline.graph.base import BatchTask, RootTask, ShardTask
from pipeline.graph.luigid import percent
from pipeline.graph.run import Environment, Run, registry
from pipeline.observe.logger import show
from pipeline.observe.metrics import Metrics
from pipeline.observe.progress import StatusMessage
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import MAXIMUM_SHARDS, Request, discover
from pipeline.steps.reset import describe_reset, find_batch_to_reset, plan_reset, reset_batch
from pipeline.steps.transform import transform_batch, withdraw_lost_shards
from pipeline.steps.upload import ProgressOf
from pipeline.storage import Storage
from pipeline.units import counted

#: The parameters of a load that are part of its request.
_OPTIONS = frozenset({"strict", *OPTIONS})


class UploadShard(ShardTask):
    """Upload the photos of a shard."""

    step = UPLOAD

    def requires(self) -> Any:
        """Return the discovery, where this process has scheduled it: the graph then reads from left to right."""
        return self.active_run.discovery or []

    def run(self) -> None:
        """Upload, then mark."""
        run = self.active_run.require_lock()
        with run.environment.uploader() as uploader, self.reporting(self._progress):
            for shard in self.shard_numbers:
                uploader.upload(self.batch_id, shard, run.counter.start_shard)
                run.markers.present.add((UPLOAD, shard))

    def _progress(self) -> StatusMessage | None:
        counts = [self.active_run.counter.read_shard(shard) for shard in self.shard_numbers]
        done, total = map(sum, zip(*counts, strict=True))
        return (f"{2 * done} of {2 * total} photos", percent(done, total)) if total else None


class CopyShard(ShardTask):
    """COPY the rows of a shard into the schema raw."""

    step = COPY

    def requires(self) -> Any:
        """Return the upload of the same shards."""
        return self.clone(UploadShard)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        """Copy and mark, a transaction for each shard."""
        messages = ["copying"]
        reporting = self.reporting(lambda: (messages[-1], 100 * (len(messages) - 1) // self.shards))
        with reporting:
            for shard in self.shard_numbers:
                run = self.active_run.require_lock()
                arguments = run.database, run.environment.settings, self.batch_id, shard, messages.append
                try:
                    copy_shard(*arguments, may_reject=run.environment.may_reject)
                except (DataError, UnfinishedError):
                    run.markers.present.discard((UPLOAD, shard))  # rolled back, here or by another process
                    raise
                run.markers.present.add((COPY, shard))


class RequestTask(BatchTask):
    """A task of a load: its kind of batch, and the parameter that names its source."""

    kind: str
    named: str

    # It does not tell one load from another: a resumed batch may have another limit.
    max_rejects = luigi.Parameter(
        default=MAXIMUM_REJECTS, significant=False, description="hold the batch if more is rejected, N or a percentage"
    )


class LoadParameters(RequestTask):
    """A task with the parameters of the load of a dataset."""

    kind, named = KIND_LOAD, "source"

    source = luigi.Parameter(default="", description="the dataset's folder")
    limit = luigi.OptionalIntParameter(default=None, description="at most so many new recognitions, lowest id first")
    force = luigi.BoolParameter(default=False, description="load what is loaded already, as a new version")
    changed = luigi.BoolParameter(default=False, description="load also what changed since it was loaded")
    strict = luigi.BoolParameter(default=False, description="check everything first; one reject refuses the batch")


class QwenParameters(RequestTask):
    """A task with the parameters of the load of an annotations file."""

    kind, named = KIND_QWEN, "file"

    file = luigi.Parameter(default="", description="the annotations file")
    force = luigi.BoolParameter(default=False, description="annotate anew what has annotations already")
    changed = luigi.BoolParameter(default=False, description="annotate anew the photos whose values changed")
    coordinates = luigi.Parameter(default=PIXELS, description="what the numbers of a box are: pixels, 1000, 1 or WxH")
    exif_turned = luigi.BoolParameter(default=False, description="the model saw photos turned as their EXIF data says")


class Discover(RequestTask):
    """Find out what is to be loaded, and write the manifest."""

    step = DISCOVER

    def run(self) -> None:
        """Discover and mark in one transaction."""
        run = self.active_run.require_lock()
        options = {name: value for name, value in self.param_kwargs.items() if name in _OPTIONS}
        source, settings = getattr(self, self.named), run.environment.settings
        options |= {"kind": self.kind, "bucket_created_at": run.bucket_created_at, "maximum_shards": run.maximum_shards}
        request = Request.of(settings, self.batch_id, source, **options)
        progress: list[StatusMessage] = [("reading the source", 0)]
        phase, each, what = "discover", 1, "recognitions looked at"
        if self.kind == KIND_QWEN:
            phase, each, what = "discover_annotations", 1000, "bytes read"
        run.counter.start(phase)

        def show(total: int, done: int) -> None:
            progress[0] = f"{done} of {total} {what}", percent(done, total)
            run.counter.set_done(done // each, total // each)

        with self.reporting(lambda: progress[0]):
            found = discover(run.database, request, progress=show)
            run.is_on_record.value = True
            if found is not None and not found.batch_made:
                progress[0] = "nothing to load", 100
            elif found is not None:
                rejects = counted(sum(found.rejects.values()), "reject")
                shards = counted(found.shards, "shard")
                progress[0] = f"{counted(found.recognitions, 'recognition')} in {shards}, {rejects}", 100
        run.counter.finish()


class DiscoverBatch(Discover, LoadParameters):
    """Walk the dataset and write the manifest."""


class DiscoverQwen(Discover, QwenParameters):
    """Read the annotations file, write the manifest and COPY the detections into the schema raw."""


class Transform(RequestTask):
    """Wait for all shards, then publish the batch."""

    step = TRANSFORM
    discovery: type[Discover]

    def requires(self) -> Any:
        """Return the discovery; without a run, for tools such as luigi-deps, the shards of a known batch as well."""
        run = self.active_run
        run.discovery = self.clone(self.discovery)  # type: ignore[no-untyped-call]
        if run.lock is not None or self.kind != KIND_LOAD:
            return run.discovery
        batch = run.database.run(lambda connection: state.find_batch(connection, self.batch_id))
        total = batch.shards if batch is not None else 0
        return [run.discovery, *self._copies(range(1, total + 1), total)]

    def run(self) -> Iterator[DynamicRequirements]:
        """Yield the shards that are not copied yet, all at once; then transform, mark and finish in one transaction."""
        run = self.active_run.require_lock()
        if run.markers.exists(TRANSFORM, WHOLE):  # there is nothing to load
            return

        pending = partial(state.pending_shards, batch_id=self.batch_id, step=COPY, shards=range(1, run.shards + 1))

        def look(connection: Connection) -> tuple[list[int], tuple[int, int]]:
            return pending(connection), state.progress(connection, self.batch_id, run.counted)

        shards, (total, done) = run.database.run(look)
        if shards:
            run.counter.start("upload", total, done)
            self.report(f"waiting for {counted(len(shards), 'shard')}", 0)
            copies = self._copies(shards, run.shards)
            yield DynamicRequirements(copies, custom_complete=lambda _: not run.database.run(pending))
        run.counter.start("transform", total)
        messages, percents, metrics = ["beginning"], [0], Metrics()
        reporting = self.reporting(lambda: (messages[-1], percents[-1]))
        with closing(Storage(run.environment.settings, metrics)) as storage, reporting:
            messages.append("comparing the bucket with what was sent")
            for shard in withdraw_lost_shards(run.database, storage, self.batch_id):
                run.markers.present -= {(UPLOAD, shard), (COPY, shard)}
                send_shard(run.environment, self.batch_id, shard)  # an error leaves it to the next run
            arguments = run.database, storage, self.batch_id, metrics, messages.append
            transform_batch(*arguments, max_rejects=self.max_rejects)
            percents.append(100)
        run.counter.set_done(total)
        run.counter.finish()

    def _copies(self, shards: Iterable[int], total: int) -> list[CopyShard]:
        """Return the tasks that copy these shards: one for each, or for ranges where there are more than tasks."""
        size = -(-total // MAXIMUM_SHARDS)
        firsts = sorted({shard - (shard - 1) % size for shard in shards})
        return [self.clone(CopyShard, shard=one, shards=min(size, total - one + 1)) for one in firsts]  # type: ignore[no-untyped-call]


class TransformBatch(Transform, LoadParameters):
    """Publish the photos, menus and receipts of a batch."""

    discovery = DiscoverBatch


class TransformQwen(Transform, QwenParameters):
    """Publish the annotations of a batch, which discovery has copied."""

    discovery = DiscoverQwen


class Load(RootTask, RequestTask):
    """The whole of a batch; without an id, resume the newest unfinished one like it, or make a new one."""

    step = LOAD
    transform: type[Transform]

    batch_id = luigi.Parameter(default="", description="the batch; resumed or made when not given")

    @classmethod
    def resolve(cls, values: dict[str, Any]) -> None:
        """Fill in the batch and the source that the parameters mean."""
        check_max_rejects(values["max_rejects"])
        run = registry.resolve(cls.request_of(values), values["production"])
        values["batch_id"], values[cls.named] = run.batch_id, run.source
        super().resolve(values)

    @classmethod
    def request_of(cls, values: dict[str, Any]) -> LoadRequest:
        """Return the request that the parameters are."""
        source = values[cls.named] or None
        options = {name: values[name] for name in _OPTIONS & values.keys() - {"strict"}}
        return LoadRequest(values["batch_id"] or None, source, kind=cls.kind, **options)

    @property
    def active_run(self) -> Run:
        """Return the run of the task's parameters; a task that is built again begins another one."""
        return registry.resolve(self.request_of(self.param_kwargs), self.production)

    def requires(self) -> Any:
        """Take the lock, and return the transform, and through it everything else."""
        super().requires()
        return self.clone(self.transform)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        """Keep the numbers of the load with the batch, and mark."""
        if self.complete():  # there is nothing to load
            return
        summary = self.active_run.database.run(partial(keep_summary, batch_id=self.batch_id))
        self.report(describe(summary), 100)


class LoadBatch(Load, LoadParameters):
    """Load a dataset; without --batch-id, resume the newest unfinished batch like it, or make a new one."""

    command = "load"
    transform = TransformBatch


class LoadNight(LoadBatch):
    """Load a dataset once since a day began, in UTC as Luigi's RangeDaily counts; its batch is a usual one."""

    date = luigi.DateParameter(description="the day; it is done once the dataset was looked at since, and loaded")

    @classmethod
    def get_params(cls) -> list[tuple[str, luigi.Parameter]]:
        """Return the date first: RangeDaily passes it in the first parameter."""
        return sorted(super().get_params(), key=lambda one: one[0] != "date")  # type: ignore[no-untyped-call]

    @classmethod
    def request_of(cls, values: dict[str, Any]) -> LoadRequest:
        """Return a request with the id of a look since the day began, where there is one."""
        request = super().request_of(values)
        look = None if request.batch_id else cls._newest(values)
        return replace(request, batch_id=look.batch_id) if look and _is_since(look, values["date"]) else request

    @classmethod
    def _newest(cls, values: dict[str, Any]) -> Look | None:
        environment = registry.environment(values["production"])
        return find_newest_done(environment.settings, environment.database, super().request_of(values))

    @classmethod
    def bulk_complete(cls, parameter_tuples: Iterable[Day]) -> list[Day]:
        """Return the days that are done, with one query; RangeDaily passes a partial for the class."""
        days = list(parameter_tuples)
        task = cls(date=max(days))  # type: ignore[call-arg]
        look = LoadNight._newest(task.param_kwargs)
        return [day for day in days if look and _is_since(look, day)]


def _is_since(look: Look, day: Day) -> bool:
    return look.looked_at >= datetime.combine(day, time(), timezone.utc)


class LoadQwen(Load, QwenParameters):
    """Load annotations; without --batch-id, resume the newest unfinished batch like it, or make a new one."""

    command = "load-qwen"
    transform = TransformQwen


def send_shard(
    environment: Environment, batch_id: str, shard: int, show: ProgressOf = lambda *_: lambda _: None
) -> None:
    """Upload and copy a shard without Luigi."""
    with environment.uploader() as uploader:
        uploader.upload(batch_id, shard, show)
    copy_shard(environment.database, environment.settings, batch_id, shard, may_reject=environment.may_reject)


def task_of(family: type[Load], values: Mapping[str, Any]) -> Load:
    """Return the task with the parameters that values of the same names give."""
    names = family.get_param_names(include_significant=True)  # type: ignore[no-untyped-call]
    return family(**{name: values[name] for name in names if values.get(name) is not None})


def load_of(batch: state.Batch, production: bool) -> Load:
    """Return the task that loaded a batch."""
    family = LoadBatch if batch.kind == KIND_LOAD else LoadQwen
    return task_of(family, {**vars(LoadRequest.of(batch)), family.named: batch.source, "production": production})


class ResetBatch(RootTask):
    """Remove a batch, as if it had never been loaded."""

    step = RESET

    confirm = luigi.BoolParameter(default=False, description="yes, delete its rows and objects")

    @classmethod
    def resolve(cls, values: dict[str, Any]) -> None:
        """Refuse what is not confirmed, and what is no batch, before anything is scheduled."""
        batch_id, production = values["batch_id"], values["production"]
        if not values["confirm"]:
            command = command_line(f"reset --batch-id {batch_id} --dry-run", production)
            hint = f"See what would go with `{command}`."
            raise RefusedError(f"Batch {batch_id} is not reset without --confirm.", hint)
        run = registry.find(batch_id, production, reset=True)
        if not run.is_announced:  # else the batch was found for the plan
            run.database.run(lambda connection: find_batch_to_reset(connection, batch_id))
        super().resolve(values)

    def run(self) -> None:
        """Remove rows, then objects, then manifest and markers."""
        run, settings = self.active_run, self.active_run.environment.settings
        if not run.is_announced:
            show(describe_reset(plan_reset(run.database, settings, self.batch_id)), flush=True)
        reset_batch(run.database, settings, self.batch_id, run.counter)
        self.report(f"{self.batch_id} is reset")

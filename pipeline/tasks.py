"""The Luigi tasks: what needs what, and which marker says that it is done. The work itself is in `steps`.

LoadBatch -> TransformBatch -> DiscoverBatch
                   └ yields, once the shards are known, CopyShard -> UploadShard for each
"""

from __future__ import annotations

import configparser
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import luigi
from luigi.task import DynamicRequirements

from pipeline import batch_state
from pipeline.batch_state import COPY, DISCOVER, LOAD, TRANSFORM, UPLOAD, WHOLE
from pipeline.config import Settings, load_settings, redact
from pipeline.database import Connection, Database
from pipeline.errors import PipelineError, SettingsError
from pipeline.logger import get_logger
from pipeline.metrics import Metrics
from pipeline.progress import Counter
from pipeline.steps.begin import Begun, Wish, begin_load
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import Request, discover
from pipeline.steps.summary import headline, summarise
from pipeline.steps.transform import transform_batch
from pipeline.steps.upload import upload_shard
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


_begun: dict[tuple[Wish, bool], Begun] = {}


def begin(wish: Wish, production: bool) -> Begun:
    """Return the batch that is meant; asked once a process for the same wish."""
    known = _begun.get((wish, production))
    if known is None:
        known = begin_load(settings_of(production), database_of(production), wish)
        _begun[wish, production] = known
        # The task's own parameters are a wish as well, with the same answer.
        resolved = Wish(known.batch_id, known.source, wish.limit, wish.force)
        _begun[resolved, production] = known
    return known


def begun() -> tuple[Wish, bool] | None:
    """Return what this process was started for, with the batch's id, and whether it is in production; None before."""
    for (wish, production), known in _begun.items():
        return replace(wish, batch_id=known.batch_id, source=known.source), production
    return None


def forget() -> None:
    """Forget settings and batches: for a process that runs one command after another."""
    settings_of.cache_clear()
    database_of.cache_clear()
    _begun.clear()
    counter.start(0, 0)


class BatchStateTarget(luigi.Target):
    """A row of ingest.batch_state."""

    def __init__(self, database: Database, batch_id: str, step: str, shard: int = WHOLE) -> None:
        self._database = database
        self._key = batch_id, step, shard

    def exists(self) -> bool:
        """Return whether the marker is there."""
        return self._database.run(lambda connection: batch_state.is_done(connection, *self._key))

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

    def output(self) -> BatchStateTarget:
        """Return the marker."""
        return BatchStateTarget(self.database, self.batch_id, self.step, getattr(self, "shard", WHOLE))

    def on_failure(self, exception: BaseException) -> str:
        """Return what the scheduler shows of a failure: the sentence, never a secret."""
        return describe_failure(exception)

    def tell(self, message: str) -> None:
        """Set the status message in the visualiser, as far as there is one that listens."""
        callback = getattr(self, "set_status_message", None)
        if callback is None:
            return
        try:
            callback(redact(message))
        except luigi.rpc.RPCError as exc:
            logger.info("luigid did not take a status message: %s", exc)


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
        metrics = Metrics()
        with closing(Storage(settings_of(self.production), metrics)) as storage:
            upload_shard(self.database, storage, self.batch_id, self.shard, metrics, counter.of(self.shard))


class CopyShard(ShardTask):
    """COPY the rows of a shard into the schema raw."""

    step = COPY

    def requires(self) -> UploadShard:
        """Return the upload of the same shard."""
        return UploadShard.of(self, self.shard)

    def run(self) -> None:
        """Copy and mark in one transaction."""
        copy_shard(self.database, self.batch_id, self.shard, Metrics())


class LoadTask(BatchTask):
    """A task that knows what the load was asked to do."""

    source = luigi.Parameter(default="", description="the dataset's folder")
    limit = luigi.OptionalIntParameter(default=None, description="at most so many new recognitions, lowest id first")
    force = luigi.BoolParameter(default=False, description="load what is loaded already, as a new version")
    strict = luigi.BoolParameter(default=False, description="check everything first; one reject refuses the batch")

    def same(self) -> dict[str, Any]:
        """Return the parameters that the tasks below share."""
        return {name: getattr(self, name) for name in ("batch_id", "production", "source", "limit", "force", "strict")}


class DiscoverBatch(LoadTask):
    """Walk the dataset and write the manifest."""

    step = DISCOVER

    def run(self) -> None:
        """Discover and mark in one transaction."""
        request = Request.of(
            settings_of(self.production),
            self.batch_id,
            self.source,
            limit=self.limit,
            force=self.force,
            strict=self.strict,
        )
        found = discover(self.database, request)
        if found is not None:
            self.tell(
                f"{found.recognitions} recognitions in {found.shards} shards, {sum(found.rejects.values())} rejects"
            )


class TransformBatch(LoadTask):
    """Wait for all shards, then publish the batch."""

    step = TRANSFORM

    def requires(self) -> DiscoverBatch:
        """Return the discovery, which says how many shards there are."""
        return DiscoverBatch(**self.same())

    def run(self) -> Iterator[DynamicRequirements]:
        """Yield the shards that are not copied yet, all at once; then transform, mark and finish in one transaction."""

        def look(connection: Connection) -> tuple[list[int], int, int]:
            progress = connection.one("count_uploaded", batch_id=self.batch_id)
            return batch_state.pending_shards(connection, self.batch_id, COPY), progress.total, progress.uploaded

        pending, total, uploaded = self.database.run(look)
        counter.start(total, uploaded)

        def complete(_: Any = None) -> bool:
            return not self.database.run(lambda c: batch_state.pending_shards(c, self.batch_id, COPY))

        if pending:
            yield DynamicRequirements([CopyShard.of(self, shard) for shard in pending], custom_complete=complete)
        self.tell("transforming")
        metrics = Metrics()
        with closing(Storage(settings_of(self.production), metrics)) as storage:
            transform_batch(self.database, storage, self.batch_id, metrics)


class LoadBatch(LoadTask):
    """Load a dataset; without --batch-id, resume the newest unfinished batch like it, or make a new one."""

    step = LOAD

    batch_id = luigi.Parameter(default="", description="the batch; resumed or made when not given")

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """Resolve which batch and which source are meant, so that the task id and the children carry them."""
        values = dict(super().get_param_values(params, args, kwargs))  # type: ignore[no-untyped-call]
        wish = Wish(values["batch_id"] or None, values["source"] or None, values["limit"], values["force"])
        known = begin(wish, values["production"])
        values["batch_id"], values["source"] = known.batch_id, known.source
        return [(name, values[name]) for name, _ in params]

    def requires(self) -> TransformBatch:
        """Return the transform, and through it everything else."""
        return TransformBatch(**self.same())

    def run(self) -> None:
        """Keep the numbers of the load with the batch, and mark."""

        def work(connection: Connection) -> dict[str, Any]:
            now = connection.one("now").now
            summary = summarise(connection, self.batch_id)
            connection.execute(
                "update_batch_metrics", batch_id=self.batch_id, metrics=json.dumps(summary, ensure_ascii=False)
            )
            if not batch_state.is_done(connection, self.batch_id, LOAD):
                batch_state.mark(connection, self.batch_id, LOAD, WHOLE, now, {})
            return summary

        self.tell(headline(self.database.run(work)))


__all__: Sequence[str] = ("CopyShard", "DiscoverBatch", "LoadBatch", "TransformBatch", "UploadShard")

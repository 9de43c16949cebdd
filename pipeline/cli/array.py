"""Commands for an array engine: discover, shard, finish. They are the steps of a load, without Luigi's scheduler.

Processes of one batch run beside each other, and beside a load of it: they share a lock that only a reset excludes.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby

from pipeline.batches import state
from pipeline.batches.looks import find_look
from pipeline.batches.resolve import check_batch_id, require_schema
from pipeline.batches.state import COPY, KIND_LOAD, Batch
from pipeline.batches.summary import describe, headline, keep_summary, summarise
from pipeline.cli.completion import remember
from pipeline.cli.output import print_result
from pipeline.database import Connection
from pipeline.errors import DataError, HeldError, PipelineError, RefusedError, UnfinishedError, UsageError
from pipeline.graph.run import Run, registry
from pipeline.graph.tasks import LoadBatch, LoadQwen, TransformBatch, TransformQwen, send_shard, task_of
from pipeline.observe.logger import say
from pipeline.observe.progress import ProgressDisplay
from pipeline.observe.prometheus import batch_metrics
from pipeline.steps.source import require_dataset
from pipeline.units import counted

#: Kubernetes, Slurm and AWS Batch name a process's index in these; the first that is set counts.
INDEX_VARIABLES = ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID", "AWS_BATCH_JOB_ARRAY_INDEX")
_INDEX = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_SHOWN = 20  # ranges of shards in a message


def discover(options: argparse.Namespace) -> None:
    """Write the manifest of a batch, in shards of exactly the batch size however many these are."""
    of_qwen = options.file is not None or options.coordinates or options.exif_turned
    if of_qwen and (options.source or options.limit or options.strict):
        hint = "Give options of load, to discover a dataset, or of load-qwen, for an annotations file."
        raise UsageError("There are options of load and of load-qwen.", hint)
    registry.open(options.production)
    with registry.reserving():
        load = task_of(LoadQwen if of_qwen else LoadBatch, vars(options))
    run = registry.find(load.batch_id, options.production)
    options.batch_id = run.batch_id  # for the log
    remember([run.batch_id])
    run.maximum_shards, run.command = sys.maxsize, ""
    discovery = load.clone(load.transform.discovery)  # type: ignore[no-untyped-call]
    with run.shared(), ProgressDisplay(run.counter, batch_id=run.batch_id):
        run.open_bucket()
        if not discovery.complete():
            discovery.run()
        run.compare()  # another discovery may have had the same id beside this one
    summary = run.database.run(partial(summarise, batch_id=run.batch_id))
    command, shards, text = run.environment.settings.command, summary["shards"], headline(summary)
    if summary["state"] == "loading":
        each = command(f"shard --batch-id {run.batch_id} --index I --of {shards}")
        text += f"\nShards: {shards}. " + (f"For each I from 0 to {shards - 1}: `{each}`. " if shards else "")
        text += f"Then: `{command(f'finish --batch-id {run.batch_id}')}`."
    print_result(options, summary, text)


def shard(options: argparse.Namespace) -> None:
    """Upload and copy the shards of some slices of a batch, as far as they are not done."""
    slices = list(_slices(options.index or [], options.of))
    run, batch = _join(options)
    shards = _shards_of(slices, options.of, batch.shards if batch is not None else 0)
    pending = run.database.run(partial(state.pending_shards, batch_id=run.batch_id, step=COPY, shards=shards))
    if batch is not None and pending:
        with run.shared(), ProgressDisplay(run.counter, batch_id=run.batch_id):
            _process(run, batch, pending)
    result = {"batch_id": run.batch_id, "shards": len(shards), "done": len(pending)}
    before = f", {len(shards) - len(pending)} were done before" if len(pending) < len(shards) else ""
    what = f"{counted(len(pending), 'shard')} done{before}" if batch is not None else "nothing to load, nothing to do"
    print_result(options, result, f"Batch {run.batch_id}: {what}.")


def _process(run: Run, batch: Batch, shards: Sequence[int]) -> None:
    environment, failed = run.environment, None
    run.database.run(partial(require_dataset, batch=batch, shard=shards[0]))
    count = {"batch_id": run.batch_id, "shards": shards}
    total = run.database.run(lambda connection: connection.one("count_recognitions", **count).recognitions)
    run.counter.start("upload", total)
    with environment.keeping_uploader(ahead=False):
        for number in shards:
            run.require_lock()
            try:
                send_shard(environment, run.batch_id, number, run.counter.start_shard)
            except DataError as exc:  # of this shard alone: the others go on, as in a load
                say(f"Failed: shard {number} of batch {run.batch_id}: {exc.message}", logging.ERROR)
                failed = failed or exc
            except (RefusedError, HeldError):
                # A load of the batch, beside this process, did the shard, and finished or held the batch.
                if run.database.run(partial(state.pending_shards, batch_id=run.batch_id, step=COPY, shards=[number])):
                    raise
    run.counter.finish()
    if failed is not None:
        raise failed


def finish(options: argparse.Namespace) -> None:
    """Publish a batch whose shards are done."""
    run, batch = _join(options)
    run.was_done = batch is None or batch.marked
    try:
        if batch is not None and not batch.marked:
            _publish(run, batch, options)
    except PipelineError:
        with suppress(PipelineError), run.database.transaction(read_only=True) as connection:
            options.families += batch_metrics(summarise(connection, run.batch_id))
        raise
    summary = run.database.run(partial(summarise, batch_id=run.batch_id))
    options.families += batch_metrics(summary)
    print_result(options, summary, describe(summary, was_done=run.was_done, everything=options.verbose))


def _publish(run: Run, batch: Batch, options: argparse.Namespace) -> None:
    family = TransformBatch if batch.kind == KIND_LOAD else TransformQwen
    values = {"batch_id": batch.id, "production": options.production, "max_rejects": options.max_rejects}
    with run.shared(), ProgressDisplay(run.counter, batch_id=batch.id):
        for _ in family(**values).run():  # it yields while shards are not done
            raise _unfinished(run, batch)
        if not run.target.exists():
            run.database.run(partial(keep_summary, batch_id=batch.id))


def _join(options: argparse.Namespace) -> tuple[Run, Batch | None]:
    """Return the run and the batch that a process takes part in, None where a look found nothing to load."""

    def find(connection: Connection) -> Batch | None:
        require_schema(connection)
        batch = state.find_batch(connection, options.batch_id)
        if batch is None or batch.state == "reset":
            look = find_look(connection, options.batch_id)
            if look is not None and not look.batch_made:
                return None
        batch = batch or state.require_batch(connection, options.batch_id)
        if batch.state in ("resetting", "reset"):
            message = f"Batch {batch.id} is {'being ' if batch.state == 'resetting' else ''}reset."
            raise RefusedError(message, "Discover it anew, or choose another --batch-id.")
        return batch

    environment = registry.open(options.production)
    check_batch_id(options.batch_id)
    batch = environment.database.run(find)
    run = registry.find(options.batch_id, options.production)
    run.command = ""  # what goes on with it is the same command, and no load
    return run, batch


def _slices(words: Sequence[str], of: int) -> Iterator[tuple[int, int]]:
    """Yield first and last index of each argument, or of the engine's variable; raise UsageError if one is wrong."""
    where = "--index"
    if not words:
        where = next((name for name in INDEX_VARIABLES if os.environ.get(name)), "")
        words = [os.environ[where]] if where else []
    if not words:
        names = ", ".join(INDEX_VARIABLES)
        raise UsageError("No index says which slice of the shards this is.", f"Give --index, or set one of {names}.")
    for word in words:
        found = _INDEX.fullmatch(word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < of:
            hint = f"Use numbers from 0 to {of - 1}, one less than --of, or ranges such as 0-{of - 1}."
            raise UsageError(f"{where} is {word!r}.", hint)
        yield first, last


def _shards_of(slices: Iterable[tuple[int, int]], of: int, total: int) -> list[int]:
    """Return the shards of slices: each slice is a range, and all of them together are the batch."""
    ranges = (range(total * first // of, total * (last + 1) // of) for first, last in slices)
    return sorted({number + 1 for one in ranges for number in one})


def _unfinished(run: Run, batch: Batch) -> UnfinishedError:
    """Return the error of a batch with shards that are not done, with the command that does them."""
    every = range(1, batch.shards + 1)
    missing = run.database.run(partial(state.pending_shards, batch_id=batch.id, step=COPY, shards=every))
    runs = groupby(enumerate(missing), lambda pair: pair[1] - pair[0])
    ranges = [[number - 1 for _, number in one] for _, one in runs]
    indices = " ".join(f"{one[0]}-{one[-1]}" if one[1:] else str(one[0]) for one in ranges[:_SHOWN])
    message = f"Batch {batch.id}: {len(missing)} of {batch.shards} shards are not done: {indices}"
    again = run.environment.settings.command(f"shard --batch-id {batch.id} --of {batch.shards} --index {indices}")
    if len(ranges) > _SHOWN:
        return UnfinishedError(f"{message} …", "Run the array again: it passes over what is done.")
    return UnfinishedError(f"{message}.", f"Do them with `{again}`, then run the same command again.")

"""Commands that load: load, load-qwen, worker."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.batches.summary import headline, performance_metrics, summarise
from pipeline.cli.exit_codes import DONE
from pipeline.cli.output import print_result
from pipeline.errors import PipelineError, RefusedError, SettingsError, UnfinishedError, UsageError
from pipeline.graph.assistant import assist
from pipeline.graph.assistant import describe as describe_help
from pipeline.graph.failures import Failure, print_failures
from pipeline.graph.run import Run, registry
from pipeline.graph.tasks import Load, LoadBatch, LoadQwen
from pipeline.graph.worker import run_task
from pipeline.observe.logger import say
from pipeline.observe.prometheus import require_writable, write_metrics
from pipeline.steps.discover import Discovery, Request, describe_rejects, discover
from pipeline.units import size


def load(options: argparse.Namespace) -> int:
    """Load a dataset."""
    if options.dry_run:
        return _dry_run(options)
    parameters: dict[str, Any] = {
        "batch_id": options.batch_id or "",
        "source": options.source or "",
        "limit": options.limit,
        "force": options.force,
        "strict": options.strict,
        "production": options.production,
    }
    return _load_batch(options, LoadBatch, parameters)


def load_qwen(options: argparse.Namespace) -> int:
    """Load an annotations file."""
    parameters: dict[str, Any] = {
        "batch_id": options.batch_id or "",
        "file": options.file or "",
        "force": options.force,
        "production": options.production,
    }
    return _load_batch(options, LoadQwen, parameters)


def _load_batch(options: argparse.Namespace, family: type[Load], parameters: Mapping[str, Any]) -> int:
    if options.metrics_file:
        require_writable(Path(options.metrics_file))
    registry.open(options.production)
    task = family(**parameters)
    run = registry.load(task.batch_id, options.production)
    run_task(registry, run, task, options.interrupts, workers=options.workers, local_scheduler=options.local_scheduler)
    return _report(run, options)


def worker(options: argparse.Namespace) -> int:
    """Process shards of batches that other hosts load."""
    registry.open(options.production)
    result = assist(registry, options.interrupts, options.production, options.workers, options.idle)
    print_result(options, result, describe_help(result))
    return DONE


def _report(run: Run, options: argparse.Namespace) -> int:
    """Print the result of a batch; its state in the database decides the exit code, not Luigi."""
    failures = run.failures.read()
    try:
        summary = run.database.run(lambda connection: summarise(connection, run.batch_id))
    except UsageError as exc:
        # Discovery wrote nothing; raise its failure instead.
        raise error_of(run, failures) from exc
    done = summary["state"] == "done"
    if done or options.json:
        text = f"{headline(summary)}\n{performance_metrics(summary)}"
        print_result(options, {**summary, "failures": [vars(one) for one in failures]}, text)
    else:
        say(headline(summary))
    if options.metrics_file:
        _write_metrics(Path(options.metrics_file), summary)
    if done:
        return DONE
    raise error_of(run, failures)


def _write_metrics(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the metrics; a failure does not change the exit code of the load."""
    try:
        write_metrics(path, summary)
    except SettingsError as exc:
        say(f"{exc.message} {exc.hint}", logging.WARNING)


def error_of(run: Run, failures: Sequence[Failure]) -> PipelineError:
    """Return the error of an unfinished run: the first refusal or usage error of a task, else UnfinishedError."""
    for error in filter(None, map(Failure.as_error, failures)):
        if isinstance(error, (UsageError, RefusedError)):
            return error
    print_failures(failures)
    return UnfinishedError(
        f"Batch {run.batch_id} is unfinished: {len(failures)} tasks failed.", f"To go on: {run.command}"
    )


def _dry_run(options: argparse.Namespace) -> int:
    environment = registry.open(options.production)
    settings, database = environment.settings, environment.database
    parameters = {"limit": options.limit, "force": options.force}
    batch = resolve_batch(settings, database, LoadRequest(options.batch_id, options.source, **parameters))
    request = Request.of(settings, batch.batch_id, batch.source, **parameters, strict=options.strict)
    found = None if batch.done else discover(database, request, dry_run=True)
    if found is None:
        discovered = {"dry_run": True, "batch_id": batch.batch_id, "discovered": True}
        text = f"Batch {batch.batch_id} is discovered already; nothing new would be selected."
        print_result(options, discovered, text)
    else:
        print_result(options, {"dry_run": True, **asdict(found)}, _describe(found))
    return DONE


def _describe(found: Discovery) -> str:
    lines = [
        f"Would load {found.recognitions} recognitions, {found.photos} photos, {size(found.bytes)}, "
        f"in {found.shards} shards, as batch {found.batch_id}. Nothing was written.",
        f"Dataset: {found.source}: {found.found} recognitions, {found.already_loaded} already loaded, "
        f"{found.held_elsewhere} held by unfinished batches{' ' + ', '.join(found.held_by) if found.held_by else ''}, "
        f"{found.beyond_limit} beyond the limit, {found.superseded_copies} earlier copies in other exports.",
    ]
    if found.rejects:
        lines.append(f"Rejects seen so far: {describe_rejects(found.rejects)}.")
    return "\n".join(lines)

"""Commands about existing batches: reset, status, verify, report."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.batches import status as batch_status
from pipeline.batches.resolve import require_schema
from pipeline.batches.summary import headline, performance_metrics, summarise
from pipeline.cli.exit_codes import DIFFERENCES, DONE, exit_code
from pipeline.cli.loads import error_of
from pipeline.cli.output import print_result
from pipeline.cli.terminal import ask
from pipeline.cli.verify_report import VerifyReport
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import PipelineError, RefusedError, UsageError
from pipeline.extras import extra
from pipeline.graph.luigid import scheduler_url
from pipeline.graph.run import registry
from pipeline.graph.tasks import ResetBatch
from pipeline.graph.worker import run_task
from pipeline.observe.logger import say
from pipeline.steps.reset import Plan, describe_reset, find_batch_to_reset, plan_reset
from pipeline.steps.verify import Verification
from pipeline.storage import Storage
from pipeline.units import size


def reset(options: argparse.Namespace) -> int:
    """Remove a batch."""
    environment = registry.open(options.production)
    settings, database = environment.settings, environment.database
    plan = plan_reset(database, settings, options.batch_id)
    if options.json and not (options.confirm or options.dry_run):
        say(describe_reset(plan), logging.INFO)  # show the plan before the prompt
    elif not options.json:
        print(describe_reset(plan), flush=True)
    if not options.dry_run and plan.batch.state != "reset":
        _execute(options, database, plan)
    if options.json:
        state = database.run(lambda connection: find_batch_to_reset(connection, plan.batch.id)).state
        print(json.dumps({**plan.as_dict(), "dry_run": options.dry_run, "state": state}, ensure_ascii=False))
    elif not options.dry_run and plan.batch.state != "reset":
        print(f"Batch {plan.batch.id} is reset.")
    return DONE


def _execute(options: argparse.Namespace, database: Database, plan: Plan) -> None:
    if plan.blocking:
        found = ", ".join(f"{one.table} ({one.rows} rows, to {one.target})" for one in plan.blocking)
        raise RefusedError(
            f"Batch {plan.batch.id} is not reset: rows of other tables reference what would be deleted: {found}.",
            "Remove those rows, or keep this batch; nothing was changed.",
        )
    if not options.confirm:
        _confirm(plan.batch.id)
    parameters: dict[str, Any] = {"batch_id": plan.batch.id, "confirm": True, "production": options.production}
    task = ResetBatch(**parameters)
    run = registry.reset(plan.batch.id, options.production)
    run_task(registry, run, task, options.interrupts)
    batch = database.run(lambda connection: find_batch_to_reset(connection, plan.batch.id))
    if batch.state != "reset":
        raise error_of(run, run.failures.read())


def _confirm(batch_id: str) -> None:
    """Raise RefusedError unless the user types the batch's id."""
    typed, why = "", "there is no terminal for the prompt"
    if sys.stdin is not None and sys.stdin.isatty():
        why = "its id was not typed"
        typed = ask(f"Type the batch's id, {batch_id}, to delete all this: ").strip()
    if typed != batch_id:
        raise RefusedError(
            f"Batch {batch_id} was not reset: {why}.", "Use --confirm to skip the prompt; nothing was changed."
        )


def verify(options: argparse.Namespace) -> int:
    """Compare manifest and tables with the bucket."""
    environment = registry.open(options.production)
    settings, database = environment.settings, environment.database
    database.run(require_schema)
    report = VerifyReport(options.json, options.quiet)
    with closing(Storage(settings)) as storage, report:
        storage.check_host()
        verification = Verification(database, storage, settings.bucket, batch_id=options.batch_id, deep=options.deep)
        report.begin(settings.bucket, verification.unfinished, verification.elsewhere)
        for finding in verification.run():
            report.found(finding)
        report.total()
        if options.repair:
            report.plan()
            for finding, reason in verification.repair(report.differences()):
                report.repair(finding, reason)
        report.end(options.repair)
    return DONE if not report.remaining else DIFFERENCES


def status(options: argparse.Namespace) -> int:
    """Show the environment and the batches."""
    if options.check:
        return _check(options)
    if options.source:
        raise UsageError("--source belongs to --check.", "Add --check.")
    settings = registry.open(options.production).settings
    settings = replace(settings, tuning=replace(settings.tuning, retry_max_attempts=0))  # show errors at once
    with closing(registry.watch(Database(settings))) as database:
        return _show_status(options, settings, database)


def _check(options: argparse.Namespace) -> int:
    from pipeline import doctor  # imported here because no other command needs it

    settings: Settings | PipelineError
    try:
        settings = registry.open(options.production).settings
    except PipelineError as exc:
        settings = exc
    findings = doctor.examine(settings, scheduler_url(), options.source)
    print_result(options, doctor.as_dict(findings), doctor.as_text(findings))
    error = doctor.verdict(findings)
    return exit_code(error) if error is not None else DONE


def _show_status(options: argparse.Namespace, settings: Settings, database: Database) -> int:
    if options.batch_id:

        def ask(connection: Connection) -> dict[str, Any]:
            require_schema(connection)
            return summarise(connection, options.batch_id)

        summary = database.run(ask, read_only=True)
        print_result(options, summary, f"{headline(summary, rejects=100)}\n{performance_metrics(summary)}")
        return DONE
    result, failures = batch_status.status(settings, database)
    print_result(options, result, batch_status.as_text(result, options.production))
    return exit_code(failures[0]) if failures else DONE


def report(options: argparse.Namespace) -> int:
    """Write a page about a batch."""
    with extra("report"):
        from pipeline.report.gather import write_report

    path = Path(options.out or f"report-{options.batch_id}.html").expanduser()
    environment = registry.open(options.production)
    settings, database = environment.settings, environment.database
    page = write_report(settings, database, options.batch_id, path, options.sample)
    if page.unavailable:
        say(f"The page is without photos from Storage: {page.unavailable}", logging.WARNING)
    print_result(
        options,
        asdict(page),
        f"{page.file}: {size(page.bytes)}, batch {page.batch_id} is {page.state}, "
        f"{page.recognitions} recognitions with {page.photos} photos",
    )
    return DONE

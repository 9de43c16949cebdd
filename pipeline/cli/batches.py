"""Commands about batches: load, load-qwen, worker, reset, status, verify, report."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from operator import methodcaller
from typing import Any

from pipeline import doctor
from pipeline.batches.held import is_held, release
from pipeline.batches.looks import describe_changed, describe_known
from pipeline.batches.resolve import LoadRequest, check_batch_id, next_step, require_schema, resolve_batch
from pipeline.batches.state import KIND_LOAD
from pipeline.batches.summary import describe, headline, nothing_to_load, read_status, status_text, summarise
from pipeline.cli.completion import remember
from pipeline.cli.output import DIFFERENCES, DONE, exit_code, print_result, require_typed
from pipeline.cli.verify_report import VerifyReport
from pipeline.config import Settings, expanded, read_alarms
from pipeline.database import Database, target_of
from pipeline.dataset.records import describe_codes, describe_files
from pipeline.errors import ClaimedError, HeldError, PipelineError, RefusedError, UnfinishedError, UsageError
from pipeline.extras import extra
from pipeline.graph import assistant
from pipeline.graph.failures import Failure, print_failures
from pipeline.graph.luigid import scheduler_url
from pipeline.graph.run import Run, registry
from pipeline.graph.tasks import Load, LoadBatch, ResetBatch, load_of, task_of
from pipeline.graph.worker import run_task
from pipeline.observe.logger import say, show
from pipeline.observe.prometheus import batch_metrics, verify_metrics
from pipeline.steps.adopt import Adoption, Forgotten, forget
from pipeline.steps.adopt import adopt as put_on_record
from pipeline.steps.discover import Discovery, Request, discover
from pipeline.steps.reset import Plan, describe_reset, lost_error, plan_reset
from pipeline.steps.verify import EQUAL, Verification
from pipeline.storage import Storage
from pipeline.units import counted, moment, size


def _open(options: argparse.Namespace) -> tuple[Settings, Database]:
    environment = registry.open(options.production)
    return environment.settings, environment.database


def load(options: argparse.Namespace, family: type[Load] = LoadBatch) -> None:
    """Load a dataset, or with another family of tasks an annotations file."""
    if getattr(options, "dry_run", False):
        _dry_run(options)
        return
    registry.open(options.production)
    with registry.reserving():
        task = task_of(family, vars(options))
    _run_load(task, options, workers=options.workers, local_scheduler=options.local_scheduler)


def publish(options: argparse.Namespace) -> None:
    """Release a batch that is held, and complete its load."""
    _, database = _open(options)
    batch = database.run(partial(release, batch_id=options.batch_id, production=options.production))
    task = load_of(batch, options.production)
    registry.find(batch.id, options.production).resumed = ""
    _run_load(task, options)
    if batch.state != "done":
        say(f"Batch {batch.id} is published.", logging.INFO)
    elif batch.released_at is not None:
        say(f"Batch {batch.id} was published already, at {moment(batch.released_at.isoformat())}.", logging.INFO)


def _run_load(task: Load, options: argparse.Namespace, **parameters: Any) -> None:
    """Run a load, print and measure the result; the state of the batch decides the exit code, not Luigi."""
    run = registry.find(task.batch_id, options.production)
    options.batch_id = run.batch_id  # for the log
    remember([run.batch_id])
    run_task(registry, run, task, options.interrupts, **parameters)
    try:
        summary = run.database.run(lambda connection: summarise(connection, run.batch_id))
    except UsageError as exc:
        error = _error_of(run)  # discovery wrote nothing; its failure says why
        if type(error) is UnfinishedError:
            error.hint = "Nothing is on record yet: repeat the whole command."
        raise error from exc
    done = summary["state"] == "done"
    if done or options.json:
        text = describe(summary, was_done=run.was_done, everything=options.verbose)
        print_result(options, {**summary, "failures": [vars(one) for one in run.failures.read()]}, text)
    else:
        say(headline({**summary, "held_reason": None}))  # the error has it
    options.families += batch_metrics(summary)
    if not done:
        raise _error_of(run)


def _error_of(run: Run) -> PipelineError:
    """Return the error of an unfinished run: the first one that a repetition meets again, else UnfinishedError."""
    failures = run.failures.read()
    for error in map(Failure.as_error, failures):
        if isinstance(error, (UsageError, RefusedError, HeldError, ClaimedError)):
            return error
    print_failures(failures)
    message = f"Batch {run.batch_id} is unfinished: {counted(len(failures), 'task')} failed."
    causes = (one.error for one in failures if one.error)
    return UnfinishedError(message, f"To go on: {run.command}", next(causes, ""))


def _dry_run(options: argparse.Namespace) -> None:
    settings, database = _open(options)
    parameters = {"limit": options.limit, "force": options.force, "changed": options.changed}
    batch = resolve_batch(settings, database, LoadRequest(options.batch_id, options.source, **parameters))
    request = Request.of(settings, batch.batch_id, batch.source, **parameters, strict=options.strict)
    result: dict[str, Any] = {"batch_id": batch.batch_id, "discovered": True}
    text = f"{batch.batch_id} is on record already; nothing new would be selected."
    if not batch.done and (found := discover(database, request, dry_run=True)) is not None:
        result, text = asdict(found), _describe(found, options)
    print_result(options, {"dry_run": True, **result}, text)


def _describe(found: Discovery, options: argparse.Namespace) -> str:
    holders = ", ".join(found.held_by) or "batches"
    rejects = f"\nRejects seen so far: {describe_codes(found.rejects)}." if found.rejects else ""
    if is_held(sum(found.rejects.values()), found.recognitions, options.max_rejects):
        rejects += " The batch would be held for them, until somebody publishes or resets it."
    if found.known_rejects:
        rejects += f"\n{describe_known(found.known_rejects)}"
    if found.changed_since_load:
        rejects += f"\n{describe_changed(KIND_LOAD, found.changed_since_load, options.changed)}"
    notices = f"\nNotices: {describe_codes(found.notices)}." if found.notices else ""
    return (
        f"{_describe_plan(found, options.strict)}\n"
        f"Dataset: {found.source}: {counted(found.found, 'recognition')}, {found.already_loaded} already loaded, "
        f"{found.held_elsewhere} held by unfinished {holders}, {found.beyond_limit} beyond the limit, "
        f"{counted(found.superseded_copies, 'other copy', 'other copies')}.\n"
        f"Files: {describe_files(found.files)}.{rejects}{notices}"
    )


def _describe_plan(found: Discovery, strict: bool) -> str:
    """Return what a load would do; what was rejected before, and would be tried again, is counted apart."""
    if not found.batch_made:
        return f"{nothing_to_load(found.source, counted(found.found, 'recognition'))} Nothing was written."
    recognitions, photos = found.recognitions - found.retried, found.photos - 2 * found.retried
    text = (
        f"Would load {counted(recognitions, 'recognition')}, {counted(photos, 'photo')}, "
        f"{size(found.bytes - found.retried_bytes)}, in {counted(found.shards, 'shard')}, as batch {found.batch_id}. "
        "Nothing was written."
    )
    if found.retried and not recognitions and not found.rejects:
        text = "Nothing that is new would be loaded. Nothing was written."
    if found.retried:
        text += f"\nWould try {counted(found.retried, 'recognition')} again that an earlier load rejected."
    if recognitions and not strict:
        text += "\nPhotos and documents were not read: the load rejects what it finds unusable in them."
    return text


def worker(options: argparse.Namespace) -> None:
    """Process shards of batches that other hosts load."""
    registry.open(options.production)
    result = assistant.assist(registry, options.interrupts, options.production, options.workers, options.idle)
    print_result(options, result, assistant.describe(result))


def reset(options: argparse.Namespace) -> None:
    """Remove a batch."""
    settings, database = _open(options)
    plan = plan_reset(database, settings, options.batch_id)
    executes = not options.dry_run and plan.batch.state != "reset"
    if not options.json:
        show(describe_reset(plan), flush=True)
    elif not (options.confirm or options.dry_run):
        say(describe_reset(plan), logging.INFO)  # show the plan before the prompt
    if executes:
        _execute(options, plan)
    if options.json or executes:
        result = {"dry_run": options.dry_run, "state": "reset" if executes else plan.batch.state}
        print_result(options, {**plan.as_dict(), **result}, f"Batch {plan.batch.id} is reset.")


def _execute(options: argparse.Namespace, plan: Plan) -> None:
    if plan.blocking:
        references = ((one["table"], counted(one["rows"], "row"), one["target"]) for one in plan.blocking)
        found = ", ".join(f"{table} ({rows}, to {target})" for table, rows, target in references)
        message = f"Batch {plan.batch.id} is not reset: rows of other tables reference what would be deleted: {found}."
        raise RefusedError(message, "Remove those rows, or keep this batch; nothing was changed.")
    if plan.lost:
        raise lost_error(plan.batch.id, plan.lost)
    if not options.confirm:
        target = target_of(registry.environment(options.production).settings)
        question = f"Type the batch's id, {plan.batch.id}, to delete all this from {target}: "
        require_typed(plan.batch.id, question, f"Batch {plan.batch.id} was not reset", "its id was not typed")
    run = registry.find(plan.batch.id, options.production, reset=True)
    run.is_announced = True
    task = ResetBatch(batch_id=plan.batch.id, confirm=True, production=options.production)  # type: ignore[call-arg]
    run_task(registry, run, task, options.interrupts)
    if not run.target.exists():
        raise _error_of(run)


def adopt(options: argparse.Namespace) -> None:
    """Put on record what another tool loaded, or forget it."""
    settings, database = _open(options)
    with closing(Storage(settings)) as storage:

        def work(*, keep: bool) -> Adoption | Forgotten:
            return forget(database, keep=keep) if options.undo else put_on_record(database, storage, keep=keep)

        plan = work(keep=options.confirm and not options.dry_run)
        if not options.json:
            show(plan.describe(), flush=True)
        if not (options.confirm or options.dry_run) and plan.batches:
            if options.json:
                say(plan.describe(), logging.INFO)
            word = "forget" if options.undo else "adopt"
            question = f"Type {word} to write this to {target_of(settings)}: "
            require_typed(word, question, "Nothing was written", f"{word} was not typed")
            plan = work(keep=True)
    wrote = plan.batches and not options.dry_run
    text = ("Forgotten." if options.undo else "Adopted.") if wrote else "Nothing was written."
    print_result(options, {"dry_run": options.dry_run, **asdict(plan)}, text)


def status(options: argparse.Namespace) -> int:
    """Show the environment and the batches."""
    if options.check:
        findings = examine(options, options.source, options.max_age)
        print_result(options, doctor.as_dict(findings), doctor.as_text(findings))
        return judge(findings)
    if options.source or options.max_age:
        raise UsageError(f"--{'source' if options.source else 'max-age'} belongs to --check.", "Add --check.")
    settings, _ = _open(options)
    settings = replace(settings, tuning=replace(settings.tuning, retry_max_attempts=0))  # show errors at once
    with closing(registry.watch(Database(settings))) as database:
        if options.batch_id:
            check_batch_id(options.batch_id)
            database.run(require_schema, read_only=True)
            summary = database.run(lambda connection: summarise(connection, options.batch_id), read_only=True)
            text = describe(summary, rejects=100, everything=options.verbose)
            if step := next_step(summary, options.production):
                text += f"\n{'' if summary['state'] == 'held' else 'To go on: '}{step}"
            print_result(options, summary, text)
            return DONE
        result, failures = read_status(settings, database, lists_all=options.all)
    remember(one["batch_id"] for one in (*result.get("unfinished", ()), *result.get("batches", ())))
    print_result(options, result, status_text(result, options.production))
    return exit_code(failures[0]) if failures else DONE


def examine(options: argparse.Namespace, source: str | None, max_age: float | None = None) -> list[doctor.Finding]:
    """Return what the doctor finds with the settings of a command, or with the error of reading them."""
    settings: Settings | PipelineError
    try:
        settings, _ = _open(options)
    except PipelineError as exc:
        settings = exc
    findings = doctor.examine(settings, scheduler_url(), source, max_age)
    return [*findings, *doctor.alarm_findings(read_alarms(options.production))]


def judge(findings: Iterable[doctor.Finding]) -> int:
    """Return the exit code of the worst problem that was found."""
    error = doctor.verdict(findings)
    return exit_code(error) if error is not None else DONE


def verify(options: argparse.Namespace) -> int:
    """Compare manifest and tables with the bucket."""
    started = time.monotonic()
    if options.minutes and not options.deep:
        raise UsageError("--minutes belongs to --deep.", "Add --deep.")
    settings, database = _open(options)
    database.run(require_schema)
    with closing(Storage(settings)) as storage:
        storage.check_host()
        deep, minutes = options.deep and not options.minutes, options.minutes or 0
        verification = Verification(database, storage, batch_id=options.batch_id, deep=deep)
        with VerifyReport(options, verification) as report:
            for finding in verification.run():
                report.found(finding)
            if minutes:
                # A tenth of the time at least, so that every object has its turn however long the comparison takes.
                deadline = max(started + 60 * minutes, time.monotonic() + 6 * minutes)
                for finding in verification.read_longest_unread(deadline):
                    report.found(finding, again=True)
                count = methodcaller("one", "count_proofs", bucket=storage.bucket, batch_id=options.batch_id)
                report.was_read(verification.read, database.run(count, read_only=True))
            report.total()
            if options.repair:
                for finding, reason in verification.repair(report.differences()):
                    report.repair(finding, reason)
    options.families += verify_metrics(report.counts, report.repaired, report.remaining, deep=options.deep)
    if options.interrupts.alarm is not None:
        found = (f"{count} {kind}" for kind, count in report.counts.items() if count and kind != EQUAL)
        options.interrupts.alarm.detail = ", ".join(found)
    return DIFFERENCES if report.remaining else DONE


def report(options: argparse.Namespace) -> None:
    """Write a page about a batch."""
    with extra("report"):
        from pipeline.report.gather import write_report

    check_batch_id(options.batch_id)
    path = expanded("--out", options.out or f"report-{options.batch_id}.html")
    page = write_report(*_open(options), options.batch_id, path, options.sample)
    if page.unavailable:
        say(f"The page is without photos from Storage: {page.unavailable}", logging.WARNING)
    content = f"{counted(page.recognitions, 'recognition')} with {counted(page.photos, 'photo')}"
    shown = f"batch {page.batch_id} is {page.state}, {content}"
    print_result(options, asdict(page), f"{page.file}: {size(page.bytes)}, {shown}")

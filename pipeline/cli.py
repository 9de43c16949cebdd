"""The commands, thin: read the arguments, call a step or build a task, say what came of it. One table of exit codes."""

from __future__ import annotations

import argparse
import io
import json
import logging
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import luigi
import shtab

from pipeline import errors, tasks
from pipeline.arguments import Command, build_parser
from pipeline.assistant import assist, scheduler_url
from pipeline.assistant import describe as describe_help
from pipeline.config import Settings, home_directory, load_settings
from pipeline.database import Connection, Database
from pipeline.embedded import services
from pipeline.errors import Interrupted, PipelineError, RefusedError, SettingsError, UnfinishedError, UsageError
from pipeline.logger import configure_logging, let_go, say
from pipeline.migrate import Migration, migrate
from pipeline.progress import Counter, Progress
from pipeline.prometheus import require_writable, write_metrics
from pipeline.sample import write_sample
from pipeline.steps import status as status_step
from pipeline.steps.begin import Wish, begin_load, require_schema
from pipeline.steps.discover import Discovery, Request, describe_rejects, discover
from pipeline.steps.reset import Plan, describe_reset, find_batch_to_reset, plan_reset
from pipeline.steps.summary import headline, performance_metrics, size, summarise
from pipeline.steps.verify import EQUAL, Verification, refuse_foreign_bucket
from pipeline.steps.verify_report import VerifyReport
from pipeline.storage import Storage
from pipeline.terminal import ask
from pipeline.worker import Failure, SchedulerFactory, heed_signals, print_failures, resume_hint

DONE = 0
USAGE = 2
UNFINISHED = 3
REFUSED = 4
DIFFERENCES = 5
INTERRUPTED = 130

#: The first class that fits decides; the README has the same table.
EXIT_CODES: tuple[tuple[type[PipelineError], int], ...] = (
    (UsageError, USAGE),
    (RefusedError, REFUSED),
    (Interrupted, INTERRUPTED),
    (PipelineError, UNFINISHED),
)


def exit_code(error: PipelineError) -> int:
    """Return the exit code of an error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is shown with escapes.
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    configure_logging(options.verbose, options.log_format)
    tasks.forget()
    heed_signals()
    code = UNFINISHED  # where the output breaks off before the command ends
    try:
        code = _run_command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as exc:
        if exc.filename is not None:
            raise
        # Whoever read our output has gone, or its disk is full.
        let_go(sys.stdout)
        if not isinstance(exc, BrokenPipeError):
            say(f"Error: The output cannot be written: {exc.strerror}.")
            code = code or UNFINISHED
    return code


def _run_command(options: argparse.Namespace) -> int:
    command: Command = options.command
    try:
        return command(options)
    except PipelineError as exc:
        return _tell(exc, options.verbose)
    except KeyboardInterrupt:
        say(f"Interrupted. {resume_hint()}")
        return INTERRUPTED


def _tell(error: PipelineError, verbose: bool) -> int:
    if verbose:
        say("".join(traceback.format_exception(error)))
    say(f"Error: {error.message}", error=type(error).__name__)
    if error.hint:
        say(f"Hint: {error.hint}")
    return exit_code(error)


def _answer(options: argparse.Namespace, value: Mapping[str, Any], text: str) -> None:
    """Print a result: for people, or as one JSON object."""
    try:
        print(json.dumps(value, ensure_ascii=False, default=str) if options.json else text)
    except BrokenPipeError:  # whoever would read it has gone; what came of the command is the same
        let_go(sys.stdout)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    return build_parser(COMMANDS)


def _up(options: argparse.Namespace) -> int:
    home = home_directory()
    started = services.up(home)
    # Those of the services that were started, whatever .env.local or the environment name.
    settings = load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home)
    with closing(Database(settings)) as database:
        applied = migrate(database)
    lines = [
        started.describe(),
        f"Migrations: {len(applied)} applied" if applied else "Migrations: up to date",
        f"For other tools: set -a; . {shlex.quote(str(home / 'env'))}; set +a",
    ]
    _answer(options, {**asdict(started), "migrations_applied": _names(applied)}, "\n".join(lines))
    return DONE


def _names(applied: Sequence[Migration]) -> list[str]:
    return [f"{one.version}_{one.name}" for one in applied]


def _down(options: argparse.Namespace) -> int:
    stopped = services.down(home_directory())
    _answer(options, asdict(stopped), stopped.describe())
    return DONE


def _migrate(options: argparse.Namespace) -> int:
    with closing(Database(tasks.settings_of(options.production))) as database:
        applied = migrate(database)
    lines = [f"applied {name}" for name in _names(applied)]
    lines.append(f"{len(applied)} applied, the schema is up to date" if applied else "The schema is up to date")
    _answer(options, {"applied": _names(applied)}, "\n".join(lines))
    return DONE


def _sample(options: argparse.Namespace) -> int:
    directory = Path(options.directory).expanduser()
    counter = Counter()
    counter.start(options.recognitions, 0)
    try:
        with Progress(counter):
            done = write_sample(
                directory, options.recognitions, options.seed, broken=options.broken, progress=counter.reached
            )
    except OSError as exc:
        raise UsageError(f"{exc.filename or directory}: {exc.strerror}.", "Choose another folder.") from exc
    _answer(
        options,
        {"directory": str(directory), **asdict(done)},
        f"{directory}: {done.recognitions} recognitions, {done.photos} photos, {size(done.bytes)}, "
        f"{done.detections} detections, {done.broken} broken, in {done.seconds:.1f} s",
    )
    return DONE


def _load(options: argparse.Namespace) -> int:
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
    return _load_batch(options, tasks.LoadBatch, parameters)


def _load_qwen(options: argparse.Namespace) -> int:
    parameters: dict[str, Any] = {
        "batch_id": options.batch_id or "",
        "file": options.file or "",
        "force": options.force,
        "production": options.production,
    }
    return _load_batch(options, tasks.LoadQwen, parameters)


def _load_batch(options: argparse.Namespace, family: type[tasks.Load], parameters: Mapping[str, Any]) -> int:
    if options.metrics_file:
        require_writable(Path(options.metrics_file))
    task = family(**parameters)
    return _report(task.batch_id, options, _run(task, options.workers, options.local_scheduler))


def _worker(options: argparse.Namespace) -> int:
    result = assist(options.production, options.workers, options.idle)
    _answer(options, result, describe_help(result))
    return DONE


def _run(task: luigi.Task, workers: int = 1, local_scheduler: bool = False) -> Sequence[Failure]:
    """Give a task to Luigi, and return what failed of it."""
    factory = SchedulerFactory(bare=False)
    try:
        luigi.build([task], factory, workers=workers, local_scheduler=local_scheduler, no_lock=True)
    except luigi.rpc.RPCError as exc:
        # What is marked is done all the same.
        say(f"luigid was lost: {exc}", logging.WARNING)
    worker = SchedulerFactory.last
    assert worker is not None
    return worker.failures


def _report(batch_id: str, options: argparse.Namespace, failures: Sequence[Failure]) -> int:
    """Say what became of a batch; whether it is done is for the database to say, not for Luigi."""
    database = tasks.database_of(options.production)
    try:
        summary = database.run(lambda connection: summarise(connection, batch_id))
    except UsageError as exc:
        # Discovery wrote nothing; why, its failure says.
        raise _error_of(failures, batch_id) from exc
    done = summary["state"] == "done"
    if done or options.json:
        text = f"{headline(summary)}\n{performance_metrics(summary)}"
        _answer(options, {**summary, "failures": [vars(one) for one in failures]}, text)
    else:
        say(headline(summary))
    if options.metrics_file:
        _write_metrics(Path(options.metrics_file), summary)
    if done:
        return DONE
    raise _error_of(failures, batch_id)


def _write_metrics(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the metrics; the exit code is that of the load, whatever comes of it."""
    try:
        write_metrics(path, summary)
    except SettingsError as exc:
        say(f"{exc.message} {exc.hint}", logging.WARNING)


def _error_of(failures: Sequence[Failure], batch_id: str) -> PipelineError:
    """Return the error that the failures of tasks amount to: their own when it is one, else that of the batch."""
    known = [one for one in failures if one.error]
    for one in known:
        kind = getattr(errors, one.error)
        if issubclass(kind, (UsageError, RefusedError)):
            return kind(one.message, one.hint)  # type: ignore[no-any-return]
    print_failures(failures)
    return UnfinishedError(f"Batch {batch_id} is unfinished: {len(failures)} tasks failed.", resume_hint())


def _reset(options: argparse.Namespace) -> int:
    settings = tasks.settings_of(options.production)
    database = tasks.database_of(options.production)
    plan = plan_reset(database, settings, options.batch_id)
    asks = not (options.confirm or options.dry_run)
    if options.json and asks:
        say(describe_reset(plan), logging.INFO)  # nobody confirms what was not shown
    elif not options.json:
        print(describe_reset(plan), flush=True)
    if not options.dry_run and plan.batch.state != "reset":
        _reset_as_planned(options, database, plan)
    if options.json:
        state = database.run(lambda connection: find_batch_to_reset(connection, plan.batch.id)).state
        print(json.dumps({**plan.as_dict(), "dry_run": options.dry_run, "state": state}, ensure_ascii=False))
    elif not options.dry_run and plan.batch.state != "reset":
        print(f"Batch {plan.batch.id} is reset.")
    return DONE


def _reset_as_planned(options: argparse.Namespace, database: Database, plan: Plan) -> None:
    if plan.blocking:
        found = ", ".join(f"{one.table} ({one.rows} rows, to {one.target})" for one in plan.blocking)
        raise RefusedError(
            f"Batch {plan.batch.id} is not reset: rows of other tables reference what would be deleted: {found}.",
            "Remove those rows, or keep this batch; nothing was changed.",
        )
    if not options.confirm:
        _ask_for(plan.batch.id)
    parameters: dict[str, Any] = {"batch_id": plan.batch.id, "confirm": True, "production": options.production}
    failures = _run(tasks.ResetBatch(**parameters))
    batch = database.run(lambda connection: find_batch_to_reset(connection, plan.batch.id))
    if batch.state != "reset":
        raise _error_of(failures, plan.batch.id)


def _ask_for(batch_id: str) -> None:
    """Let the user type the batch's id, and raise unless it is the same."""
    typed, why = "", "there is no terminal to type its id at"
    if sys.stdin is not None and sys.stdin.isatty():
        why = "its id was not typed"
        typed = ask(f"Type the batch's id, {batch_id}, to delete all this: ").strip()
    if typed != batch_id:
        raise RefusedError(
            f"Batch {batch_id} was not reset: {why}.", "Use --confirm where nobody can be asked; nothing was changed."
        )


def _verify(options: argparse.Namespace) -> int:
    settings = tasks.settings_of(options.production)
    database = tasks.database_of(options.production)
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
            refuse_foreign_bucket(report.counts[EQUAL], report.strangers)
            for finding, why in verification.repair(report.differences()):
                report.mended(finding, why)
        report.end(options.repair)
    return DONE if not report.remaining else DIFFERENCES


def _dry_run(options: argparse.Namespace) -> int:
    settings = tasks.settings_of(options.production)
    database = tasks.database_of(options.production)
    wish = Wish(options.batch_id, options.source, options.limit, options.force)
    begun = begin_load(settings, database, wish, dry_run=True)
    parameters = {"limit": options.limit, "force": options.force, "strict": options.strict}
    request = Request.of(settings, begun.batch_id, begun.source, **parameters)
    found = None if begun.done else discover(database, request, dry_run=True)
    if found is None:
        discovered = {"dry_run": True, "batch_id": begun.batch_id, "discovered": True}
        text = f"Batch {begun.batch_id} is discovered already; nothing would be chosen anew."
        _answer(options, discovered, text)
    else:
        _answer(options, {"dry_run": True, **found.as_dict()}, _describe(found))
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


def _status(options: argparse.Namespace) -> int:
    if options.check:
        return _check(options)
    if options.source:
        raise UsageError("--source belongs to --check.", "Add --check.")
    settings = _impatient(tasks.settings_of(options.production))
    with closing(Database(settings)) as database:
        return _show_status(options, settings, database)


def _check(options: argparse.Namespace) -> int:
    from pipeline import doctor  # no other command has to wait for it to be imported

    settings: Settings | PipelineError
    try:
        settings = tasks.settings_of(options.production)
    except PipelineError as exc:
        settings = exc
    findings = doctor.examine(settings, scheduler_url(), options.source)
    _answer(options, doctor.as_dict(findings), doctor.as_text(findings))
    error = doctor.verdict(findings)
    return exit_code(error) if error is not None else DONE


def _impatient(settings: Settings) -> Settings:
    """Return settings without retries: who asks how things are wants to know it now."""
    return replace(settings, tuning=replace(settings.tuning, retry_max_attempts=0))


def _show_status(options: argparse.Namespace, settings: Settings, database: Database) -> int:
    if options.batch_id:

        def ask(connection: Connection) -> dict[str, Any]:
            require_schema(connection)
            return summarise(connection, options.batch_id)

        summary = database.run(ask, read_only=True)
        _answer(options, summary, f"{headline(summary, rejects=100)}\n{performance_metrics(summary)}")
        return DONE
    result, failures = status_step.status(settings, database)
    _answer(options, result, status_step.as_text(result, options.production))
    return exit_code(failures[0]) if failures else DONE


def _write_report(options: argparse.Namespace) -> int:
    from pipeline.steps.report import write_report  # no other command has to wait for it to be imported

    path = Path(options.out or f"report-{options.batch_id}.html").expanduser()
    settings, database = tasks.settings_of(options.production), tasks.database_of(options.production)
    report = write_report(settings, database, options.batch_id, path, options.sample)
    if report.unavailable:
        say(f"The page is without photos from Storage: {report.unavailable}", logging.WARNING)
    _answer(
        options,
        asdict(report),
        f"{report.file}: {size(report.bytes)}, batch {report.batch_id} is {report.state}, "
        f"{report.recognitions} recognitions with {report.photos} photos",
    )
    return DONE


def _completion(options: argparse.Namespace) -> int:
    script = shtab.complete(parser(), options.shell)
    _answer(options, {"shell": options.shell, "script": script}, script)
    return DONE


COMMANDS: Mapping[str, Command] = {
    "up": _up,
    "down": _down,
    "migrate": _migrate,
    "sample": _sample,
    "load": _load,
    "load-qwen": _load_qwen,
    "worker": _worker,
    "reset": _reset,
    "status": _status,
    "verify": _verify,
    "report": _write_report,
    "completion": _completion,
}

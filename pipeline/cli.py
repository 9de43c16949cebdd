"""The commands, thin: read the arguments, call a step or build a task, say what came of it. One table of exit codes."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import luigi

from pipeline import errors, tasks
from pipeline.config import Settings, home_directory, load_settings, redact
from pipeline.database import Connection, Database
from pipeline.embedded import services
from pipeline.errors import Interrupted, PipelineError, RefusedError, UnfinishedError, UsageError
from pipeline.logger import configure_logging
from pipeline.migrate import migrate
from pipeline.progress import Counter, Progress
from pipeline.sample import write_sample
from pipeline.steps import status as status_step
from pipeline.steps.begin import Wish, begin_load, require_schema
from pipeline.steps.discover import Discovery, Request, describe_rejects, discover
from pipeline.steps.reset import describe_reset, find_batch_to_reset, plan_reset
from pipeline.steps.summary import headline, performance_metrics, size, summarise
from pipeline.steps.verify import EQUAL, Verification, refuse_foreign_bucket
from pipeline.steps.verify_report import VerifyReport
from pipeline.storage import Storage
from pipeline.terminal import ask
from pipeline.worker import Failure, SchedulerFactory, print_failures, resume_hint

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
    verbose = getattr(options, "verbose", False)
    configure_logging(verbose)
    tasks.forget()
    command: Callable[[argparse.Namespace], int] = options.command
    code = DONE
    try:
        code = command(options)
        sys.stdout.flush()
    except PipelineError as exc:
        code = _tell(exc, verbose)
    except KeyboardInterrupt:
        print(f"Interrupted. {resume_hint()}", file=sys.stderr)
        code = INTERRUPTED
    except OSError as exc:
        if exc.filename is not None:
            raise
        # Whoever read our output has gone, or its disk is full. Python must not try again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(exc, BrokenPipeError):
            print(f"Error: The output cannot be written: {exc.strerror}.", file=sys.stderr)
            code = code or UNFINISHED
    return code


def _tell(error: PipelineError, verbose: bool) -> int:
    if verbose:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
    print(redact(f"Error: {error.message}"), file=sys.stderr)
    if error.hint:
        print(redact(f"Hint: {error.hint}"), file=sys.stderr)
    return exit_code(error)


Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]

_PRODUCTION: dict[str, Any] = {"action": "store_true", "help": "use .env.production, and nothing in its place"}
_VERBOSE: dict[str, Any] = {"action": "store_true", "help": "say every step on stderr, and show tracebacks"}
_JSON: dict[str, Any] = {"action": "store_true", "help": "print the result as one JSON object on stdout"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="pipeline", description="Load datasets of canteen-tray photos into Supabase, in batches, exactly once."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=summary, description=summary)
        one.set_defaults(command=command)
        return one

    _add_services(add)
    _add_loads(add)
    _add_batches(add)
    return top


def _add_services(add: Add) -> None:
    one = add("up", _up, "Start the embedded PostgreSQL and Storage server, and apply the migrations.")
    one.add_argument("--verbose", **_VERBOSE)
    one = add("down", _down, "Stop the embedded services; their data stays.")
    one.add_argument("--verbose", **_VERBOSE)

    one = add("migrate", _migrate, "Apply the pending migrations.")
    one.add_argument("--production", **_PRODUCTION)
    one.add_argument("--verbose", **_VERBOSE)

    one = add("sample", _sample, "Write a synthetic dataset with real JPEGs.")
    one.add_argument("directory", metavar="DIR", help="a folder that does not exist yet, or is empty")
    one.add_argument("--recognitions", type=_number(0), default=200, metavar="N", help="how many trays (200)")
    one.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same bytes; another, other ids (0)")
    one.add_argument("--broken", action="store_true", help="add one of every kind of reject")


def _add_loads(add: Add) -> None:
    one = add("load", _load, "Load a dataset: photos to Storage, rows to PostgreSQL.")
    one.add_argument("--source", metavar="PATH", help="the dataset's folder (DATASET_DIR, or the usual places)")
    one.add_argument("--limit", type=_number(1), metavar="N", help="at most N new recognitions, lowest id first")
    one.add_argument("--force", action="store_true", help="load what is loaded already, as a new version")
    one.add_argument("--strict", action="store_true", help="check everything first; one reject refuses the batch")
    one.add_argument("--dry-run", action="store_true", help="print what would be loaded, and write nothing")
    _add_run(one)

    one = add("load-qwen", _load_qwen, "Load the annotations of a vision model for what is loaded.")
    one.add_argument("--file", metavar="PATH", help="the annotations file (QWEN_ANNOTATIONS, or the usual places)")
    one.add_argument("--force", action="store_true", help="annotate anew what has annotations already")
    _add_run(one)


def _add_run(one: argparse.ArgumentParser) -> None:
    one.add_argument("--batch-id", metavar="ID", help="the batch (the newest unfinished one like it, or a new one)")
    one.add_argument("--workers", type=_number(1), default=1, metavar="N", help="worker processes (1)")
    one.add_argument("--local-scheduler", action="store_true", help="do not ask for a luigid")
    one.add_argument("--production", **_PRODUCTION)
    one.add_argument("--verbose", **_VERBOSE)
    one.add_argument("--json", **_JSON)


def _add_batches(add: Add) -> None:
    one = add("reset", _reset, "Take a batch out again, as if it had never been loaded.")
    one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    one.add_argument("--confirm", action="store_true", help="do not ask, do it")
    one.add_argument("--dry-run", action="store_true", help="print what would go, and change nothing")
    one.add_argument("--production", **_PRODUCTION)
    one.add_argument("--verbose", **_VERBOSE)

    one = add("status", _status, "Show the environment, both connections, and the batches.")
    one.add_argument("--batch-id", metavar="ID", help="show the numbers of this batch")
    one.add_argument("--json", **_JSON)
    one.add_argument("--production", **_PRODUCTION)
    one.add_argument("--verbose", **_VERBOSE)

    one = add("verify", _verify, "Hold manifest and tables against the bucket, in both directions.")
    one.add_argument("--batch-id", metavar="ID", help="look at this batch only")
    one.add_argument("--deep", action="store_true", help="read every object and compare its content, too")
    one.add_argument("--repair", action="store_true", help="send again what is missing or damaged, remove orphans")
    one.add_argument("--quiet", action="store_true", help="leave out the lines of what is as it should be")
    one.add_argument("--json", **_JSON)
    one.add_argument("--production", **_PRODUCTION)
    one.add_argument("--verbose", **_VERBOSE)


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "number"
    return number


def _up(options: argparse.Namespace) -> int:
    home = home_directory()
    print(services.up(home).describe())
    # Those of the services that were started, whatever .env.local or the environment name.
    settings = load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home)
    with closing(Database(settings)) as database:
        applied = migrate(database)
    print(f"Migrations: {len(applied)} applied" if applied else "Migrations: up to date")
    print(f"For other tools: set -a; . {shlex.quote(str(home / 'env'))}; set +a")
    return DONE


def _down(options: argparse.Namespace) -> int:
    print(services.down(home_directory()).describe())
    return DONE


def _migrate(options: argparse.Namespace) -> int:
    with closing(Database(tasks.settings_of(options.production))) as database:
        applied = migrate(database)
    for one in applied:
        print(f"applied {one.version}_{one.name}")
    print(f"{len(applied)} applied, the schema is up to date" if applied else "The schema is up to date")
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
    print(
        f"{directory}: {done.recognitions} recognitions, {done.photos} photos, {size(done.bytes)}, "
        f"{done.detections} detections, {done.broken} broken, in {done.seconds:.1f} s"
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
    task = tasks.LoadBatch(**parameters)
    return _report(task.batch_id, options, _run(task, options.workers, options.local_scheduler))


def _load_qwen(options: argparse.Namespace) -> int:
    parameters: dict[str, Any] = {
        "batch_id": options.batch_id or "",
        "file": options.file or "",
        "force": options.force,
        "production": options.production,
    }
    task = tasks.LoadQwen(**parameters)
    return _report(task.batch_id, options, _run(task, options.workers, options.local_scheduler))


def _run(task: luigi.Task, workers: int = 1, local_scheduler: bool = False) -> Sequence[Failure]:
    """Give a task to Luigi, and return what failed of it."""
    factory = SchedulerFactory(bare=False)
    try:
        luigi.build([task], factory, workers=workers, local_scheduler=local_scheduler, no_lock=True)
    except luigi.rpc.RPCError as exc:
        # What is marked is done all the same.
        print(redact(f"luigid was lost: {exc}"), file=sys.stderr)
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
    if options.json:
        print(json.dumps({**summary, "failures": [vars(one) for one in failures]}, ensure_ascii=False))
    if summary["state"] == "done":
        if not options.json:
            print(headline(summary))
            print(performance_metrics(summary))
        return DONE
    if not options.json:
        print(headline(summary), file=sys.stderr)
    raise _error_of(failures, batch_id)


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
    print(describe_reset(plan))
    if options.dry_run or plan.batch.state == "reset":
        return DONE
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
    print(f"Batch {batch.id} is reset.")
    return DONE


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
        if options.json:
            print(json.dumps({"dry_run": True, "batch_id": begun.batch_id, "discovered": True}))
        else:
            print(f"Batch {begun.batch_id} is discovered already; nothing would be chosen anew.")
        return DONE
    if options.json:
        print(json.dumps({"dry_run": True, **found.as_dict()}, ensure_ascii=False))
    else:
        print(_describe(found))
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
    settings = _impatient(tasks.settings_of(options.production))
    with closing(Database(settings)) as database:
        return _show_status(options, settings, database)


def _impatient(settings: Settings) -> Settings:
    """Return settings without retries: who asks how things are wants to know it now."""
    return replace(settings, tuning=replace(settings.tuning, retry_max_attempts=0))


def _show_status(options: argparse.Namespace, settings: Settings, database: Database) -> int:
    if options.batch_id:

        def ask(connection: Connection) -> dict[str, Any]:
            require_schema(connection)
            return summarise(connection, options.batch_id)

        summary = database.run(ask, read_only=True)
        if options.json:
            print(json.dumps(summary, ensure_ascii=False))
        else:
            print(headline(summary, rejects=100))
            print(performance_metrics(summary))
        return DONE
    result, failures = status_step.status(settings, database)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(status_step.as_text(result, options.production))
    return exit_code(failures[0]) if failures else DONE

"""The entry point, the table of commands, and the commands about services: up, down, migrate, sample, completion."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from types import ModuleType

from pipeline.batches.alarm import WATCHED, Alarm
from pipeline.batches.held import MAXIMUM_REJECTS, check_max_rejects
from pipeline.cli import array, batches
from pipeline.cli.completion import script
from pipeline.cli.init import init
from pipeline.cli.output import DONE, UNFINISHED, exit_code, print_result
from pipeline.cli.parser import Command, build_parser, log_format, parse
from pipeline.config import expanded, home_directory, load_settings
from pipeline.database import Database
from pipeline.database.migrate import export, migrate, release_history
from pipeline.doctor.obstacles import refuse_obstacles
from pipeline.errors import (
    DatabaseUnavailable,
    PermanentError,
    PipelineError,
    SettingsError,
    UsageError,
    remedy_of,
    unexpected,
)
from pipeline.extras import extra
from pipeline.graph.process import INTERRUPTED, Interrupts, bound_memory, escape_output
from pipeline.graph.run import registry
from pipeline.graph.tasks import LoadQwen
from pipeline.observe.logger import OutputError, configure_logging, log_event, say, say_error, show
from pipeline.observe.progress import ProgressCounter, ProgressDisplay
from pipeline.observe.prometheus import look_metrics, run_metrics, write_metrics
from pipeline.units import counted, size

_DEFECT = 1  # exit code of an exception that nobody catches


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    escape_output()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        configure_logging(log_format=log_format(given))
        options = parse(COMMANDS, given)
    except OSError as exc:
        return _explain(exc, _DEFECT)
    except UsageError as exc:
        say_error(exc)
        if (name := next(iter(given), "")) in WATCHED and not (sys.stderr and sys.stderr.isatty()):
            Alarm(name, "--production" in given, lambda: None).finish(exit_code(exc), exc)
        return exit_code(exc)
    bound_memory()
    return _run_interruptibly(options)


def _run_interruptibly(options: argparse.Namespace) -> int:
    code, error, began = _DEFECT, None, time.monotonic()
    is_watched, options.families = options.name in WATCHED and not getattr(options, "dry_run", False), []
    log_event("start", f"{options.name} started", command=options.name)
    with Interrupts(registry.cancel_statements, registry.resume_hint) as interrupts:
        options.interrupts = interrupts
        try:
            interrupts.begin()
            configure_logging(options.verbose, options.log_format)
            if is_watched:
                interrupts.watch(registry.alarm(options.name, options.production))
            code, error = _run_command(options)
            show("", end="", flush=True)
        except OSError as exc:
            code = _explain(exc, code)
        except KeyboardInterrupt:
            interrupts.announce()
            code = INTERRUPTED
        finally:
            interrupts.settle(code)
            seconds = time.monotonic() - began
            if (defect := sys.exc_info()[1]) is not None:
                error = unexpected(defect)
            if is_watched:
                _write_metrics(options, code, seconds)
            interrupts.finish(code, error)
            facts = {"batch_id": getattr(options, "batch_id", None), "seconds": round(seconds, 3), "exit_code": code}
            log_event("end", f"{options.name} ended with {code}", command=options.name, **facts)
    return code


def _explain(exc: OSError, code: int) -> int:
    """Print what the operating system refused, and return the exit code; raise the error again if it is of our own."""
    why = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else str(exc.strerror)
    cause, hint = f"The operating system refuses what the pipeline needs: {why}.", remedy_of(exc)
    if isinstance(exc, OutputError):
        cause = f"The output cannot be written: {why}."
        hint = "Free space there, raise `ulimit -f`, or send it elsewhere."
    elif not hint and exc.filename is not None:
        raise exc
    if not isinstance(exc, BrokenPipeError):  # the reader of the output left
        say(f"Error: {cause}")
        say(f"Hint: {hint or 'Run it again with --verbose.'}")
        code = code or UNFINISHED
    return UNFINISHED if code == _DEFECT else code


def _run_command(options: argparse.Namespace) -> tuple[int, PipelineError | None]:
    command: Command = options.command
    try:
        return command(options) or DONE, None
    except PipelineError as exc:
        if options.verbose:
            say("".join(traceback.format_exception(exc)))
        say_error(exc)
        return exit_code(exc), exc


def _write_metrics(options: argparse.Namespace, code: int, seconds: float) -> None:
    """Write the families that the command has left in its options, and those of every run, to --metrics-file."""
    if options.metrics_file is None:
        return
    families = [*run_metrics(code, seconds), *options.families]
    environment = registry.environments.get(options.production)
    if environment is not None:
        with suppress(PipelineError), environment.database.transaction(read_only=True) as connection:
            families += look_metrics(connection.execute("list_looks"))
    write_metrics(options.metrics_file, options.name, families)


@contextmanager
def _embedded() -> Iterator[ModuleType]:
    """Import the embedded services, and raise their errors as errors of the pipeline."""
    with extra("embedded"):
        from embedded_supabase import errors, services
    try:
        yield services
    except errors.EmbeddedError as exc:
        kinds = {errors.SetupError: SettingsError, errors.ServiceUnavailable: DatabaseUnavailable}
        raise kinds.get(type(exc), PermanentError)(exc.message, exc.hint) from exc


def up(options: argparse.Namespace) -> None:
    """Start the embedded services and apply the migrations."""
    home = home_directory()
    with _embedded() as services:
        started = services.up(home)
    # The settings of the started services, regardless of .env.local and the process environment.
    settings = load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home)
    with closing(registry.watch(Database(settings))) as database:
        applied = [one.label for one in migrate(database)]
    migrations = f"Migrations: {len(applied)} applied" if applied else "Migrations: up to date"
    tools = f"For other tools: (set -a; . {shlex.quote(str(home / 'env'))}; COMMAND)"
    text = f"{started.describe()}\n{migrations}\n{tools}"
    print_result(options, {**asdict(started), "migrations_applied": applied}, text)


def down(options: argparse.Namespace) -> None:
    """Stop the embedded services."""
    with _embedded() as services:
        stopped = services.down(home_directory())
    print_result(options, asdict(stopped), stopped.describe())


def apply_migrations(options: argparse.Namespace) -> None:
    """Apply the pending migrations, export them to an app's repository, or move their records."""
    if options.export is not None:
        word, names = "exported", [str(path) for path in export(expanded("--export", options.export))]
        some, none = "to apply with the Supabase CLI", f"{options.export} has all migrations"
    else:
        with closing(registry.open(options.production).database) as database:
            if options.release_history:
                word, names, some = "released", release_history(database), "moved to ingest.schema_migrations"
                none = "The history of the Supabase CLI has no record of ours"
            else:
                refuse_obstacles(database)
                word, names = "applied", [one.label for one in migrate(database)]
                some, none = "applied, the schema is up to date", "The schema is up to date"
    lines = [*(f"{word} {name}" for name in names), f"{len(names)} {some}" if names else none]
    print_result(options, {word: names}, "\n".join(lines))


def sample(options: argparse.Namespace) -> None:
    """Write a synthetic dataset."""
    with extra("embedded"):
        from pipeline.sample import write_sample
    directory = expanded("DIR", options.directory)
    counter = ProgressCounter()
    count, seed = options.recognitions, options.seed
    counter.start("sample", count)
    try:
        with ProgressDisplay(counter):
            planted = options.broken
            done = write_sample(directory, count, seed, broken=planted, unusual=planted, progress=counter.set_done)
    except OSError as exc:
        hint = remedy_of(exc) or "Choose another folder."
        raise UsageError(f"{exc.filename or directory}: {exc.strerror}.", hint) from exc
    photos, detections = counted(done.photos, "photo"), counted(done.detections, "detection")
    text = f"{directory}: {counted(done.recognitions, 'recognition')}, {photos}, {size(done.bytes)}, {detections}"
    broken, unusual = len(done.broken_ids), len(done.unusual_ids)
    text += f", {broken} broken, {unusual} unusual, in {done.seconds:.1f} s"
    if broken * 100 > check_max_rejects(MAXIMUM_REJECTS)[0] * (done.recognitions + broken + unusual):
        text += f"\nMore than {MAXIMUM_REJECTS} of it are broken: a load is held, unless it has --max-rejects 100%."
    print_result(options, {"directory": str(directory), "broken": broken, **asdict(done)}, text)


def complete(options: argparse.Namespace) -> None:
    """Print the completion script for a shell."""
    text = script(parser(), options.shell)
    print_result(options, {"shell": options.shell, "script": text}, text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    return build_parser(COMMANDS)


COMMANDS: Mapping[str, Command] = {
    "up": up,
    "down": down,
    "init": init,
    "migrate": apply_migrations,
    "sample": sample,
    "load": batches.load,
    "load-qwen": partial(batches.load, family=LoadQwen),
    "adopt": batches.adopt,
    "publish": batches.publish,
    "worker": batches.worker,
    "discover": array.discover,
    "shard": array.shard,
    "finish": array.finish,
    "reset": batches.reset,
    "status": batches.status,
    "verify": batches.verify,
    "report": batches.report,
    "completion": complete,
}

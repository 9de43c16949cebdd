"""Commands about services and sample data: up, down, migrate, sample, completion."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import shtab

from pipeline.cli.exit_codes import DONE
from pipeline.cli.output import print_result
from pipeline.config import home_directory, load_settings
from pipeline.database import Database
from pipeline.database.migrate import Migration, migrate
from pipeline.errors import DatabaseUnavailable, PermanentError, SettingsError, UsageError
from pipeline.extras import extra
from pipeline.graph.run import registry
from pipeline.observe.progress import ProgressCounter, ProgressDisplay
from pipeline.units import size


@contextmanager
def _embedded() -> Iterator[ModuleType]:
    """Import the embedded services, and raise their errors as errors of the pipeline."""
    with extra("embedded"):
        from embedded_supabase import errors, services
    try:
        yield services
    except errors.SetupError as exc:
        raise SettingsError(exc.message, exc.hint) from exc
    except errors.ServiceUnavailable as exc:
        raise DatabaseUnavailable(exc.message, exc.hint) from exc
    except errors.EmbeddedError as exc:
        raise PermanentError(exc.message, exc.hint) from exc


def up(options: argparse.Namespace) -> int:
    """Start the embedded services and apply the migrations."""
    home = home_directory()
    with _embedded() as services:
        started = services.up(home)
    # The settings of the started services, regardless of .env.local and the process environment.
    settings = load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home)
    with closing(registry.watch(Database(settings))) as database:
        applied = migrate(database)
    lines = [
        started.describe(),
        f"Migrations: {len(applied)} applied" if applied else "Migrations: up to date",
        f"For other tools: set -a; . {shlex.quote(str(home / 'env'))}; set +a",
    ]
    print_result(options, {**asdict(started), "migrations_applied": _names(applied)}, "\n".join(lines))
    return DONE


def _names(applied: Sequence[Migration]) -> list[str]:
    return [f"{one.version}_{one.name}" for one in applied]


def down(options: argparse.Namespace) -> int:
    """Stop the embedded services."""
    with _embedded() as services:
        stopped = services.down(home_directory())
    print_result(options, asdict(stopped), stopped.describe())
    return DONE


def apply_migrations(options: argparse.Namespace) -> int:
    """Apply the pending migrations."""
    with closing(registry.open(options.production).database) as database:
        applied = migrate(database)
    lines = [f"applied {name}" for name in _names(applied)]
    lines.append(f"{len(applied)} applied, the schema is up to date" if applied else "The schema is up to date")
    print_result(options, {"applied": _names(applied)}, "\n".join(lines))
    return DONE


def sample(options: argparse.Namespace) -> int:
    """Write a synthetic dataset."""
    with extra("embedded"):
        from pipeline.sample import write_sample
    directory = Path(options.directory).expanduser()
    counter = ProgressCounter()
    counter.start(options.recognitions, 0)
    try:
        with ProgressDisplay(counter):
            done = write_sample(
                directory, options.recognitions, options.seed, broken=options.broken, progress=counter.set_done
            )
    except OSError as exc:
        raise UsageError(f"{exc.filename or directory}: {exc.strerror}.", "Choose another folder.") from exc
    print_result(
        options,
        {"directory": str(directory), **asdict(done)},
        f"{directory}: {done.recognitions} recognitions, {done.photos} photos, {size(done.bytes)}, "
        f"{done.detections} detections, {done.broken} broken, in {done.seconds:.1f} s",
    )
    return DONE


def complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the completion script for a shell."""
    script = shtab.complete(parser, options.shell)
    print_result(options, {"shell": options.shell, "script": script}, script)
    return DONE

"""The option --metrics-file: what a command writes for Prometheus, however it ends."""

from __future__ import annotations

import argparse
import logging
from contextlib import suppress
from pathlib import Path

from pipeline.errors import PipelineError, SettingsError
from pipeline.graph.run import registry
from pipeline.observe.logger import say
from pipeline.observe.prometheus import look_metrics, require_writable, run_metrics, write_metrics


def require_file(options: argparse.Namespace) -> None:
    """Raise SettingsError, before the command starts, if its file cannot be created; it is not written then."""
    path, options.metrics_file = options.metrics_file, None
    if path is not None:
        require_writable(Path(path))
        options.metrics_file = path


def write_file(options: argparse.Namespace, code: int, seconds: float) -> None:
    """Write the families that the command has left in its options, and those of every run; a failure is a warning."""
    if options.metrics_file is None:
        return
    families = [*run_metrics(code, seconds), *options.families]
    environment = registry.environments.get(options.production)
    if environment is not None:
        with suppress(PipelineError), environment.database.transaction(read_only=True) as connection:
            families += look_metrics(connection.execute("list_looks"))
    try:
        write_metrics(Path(options.metrics_file), options.name, families)
    except SettingsError as exc:  # which does not change the exit code of the command
        say(f"{exc.message} {exc.hint}", logging.WARNING)

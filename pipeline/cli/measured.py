"""The option --metrics-file: what a command writes for Prometheus, however it ends."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.cli.output import DONE, UNFINISHED, exit_code
from pipeline.errors import PipelineError, SettingsError
from pipeline.graph.process import INTERRUPTED
from pipeline.graph.run import registry
from pipeline.observe.logger import say
from pipeline.observe.prometheus import Family, look_metrics, require_writable, run_metrics, write_metrics


class Measured:
    """The metrics of a command, and its exit code where no error decides it."""

    def __init__(self) -> None:
        self.families: list[Family] = []
        self.code = DONE


@contextmanager
def measured(options: argparse.Namespace) -> Iterator[Measured]:
    """Write the file at the end of the block; raise SettingsError before the block if no file can be created."""
    found, began = Measured(), time.monotonic()
    if options.metrics_file is None:
        yield found
        return
    path = Path(options.metrics_file)
    require_writable(path)
    code = UNFINISHED  # if the operating system refuses something
    try:
        yield found
        code = found.code
    except PipelineError as exc:
        code = exit_code(exc)
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        families = [*run_metrics(code, time.monotonic() - began), *found.families]
        environment = registry.environments.get(options.production)
        if environment is not None:
            with suppress(PipelineError), environment.database.transaction(read_only=True) as connection:
                families += look_metrics(connection.execute("list_looks"))
        try:
            write_metrics(path, options.name, families)
        except SettingsError as exc:  # which does not change the exit code of the command
            say(f"{exc.message} {exc.hint}", logging.WARNING)

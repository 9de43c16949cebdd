"""The entry point of the commands: read the arguments, run one command, turn an error into an exit code."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence

from pipeline.cli import batches, loads, services
from pipeline.cli.exit_codes import INTERRUPTED, UNFINISHED, exit_code
from pipeline.cli.output import print_error
from pipeline.cli.parser import Command, build_parser
from pipeline.errors import PipelineError
from pipeline.graph.process import Interrupts, bound_memory
from pipeline.graph.run import registry
from pipeline.observe.logger import configure_logging, redirect_to_null, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is printed as an escape sequence.
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    bound_memory()
    configure_logging(options.verbose, options.log_format)
    code = UNFINISHED  # if writing the output fails
    try:
        code = _run_command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as exc:
        if exc.filename is not None:
            raise
        # The reader closed the pipe, or the disk of the output is full.
        redirect_to_null(sys.stdout)
        if not isinstance(exc, BrokenPipeError):
            say(f"Error: The output cannot be written: {exc.strerror}.")
            code = code or UNFINISHED
    return code


def _run_command(options: argparse.Namespace) -> int:
    command: Command = options.command
    with Interrupts(registry.cancel_statements) as options.interrupts:
        try:
            return command(options)
        except PipelineError as exc:
            print_error(exc, options.verbose)
            return exit_code(exc)
        except KeyboardInterrupt:
            say(f"Interrupted. {registry.resume_hint()}")
            return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    return build_parser(COMMANDS)


def _complete(options: argparse.Namespace) -> int:
    return services.complete(options, parser())


COMMANDS: Mapping[str, Command] = {
    "up": services.up,
    "down": services.down,
    "migrate": services.apply_migrations,
    "sample": services.sample,
    "load": loads.load,
    "load-qwen": loads.load_qwen,
    "worker": loads.worker,
    "reset": batches.reset,
    "status": batches.status,
    "verify": batches.verify,
    "report": batches.report,
    "completion": _complete,
}

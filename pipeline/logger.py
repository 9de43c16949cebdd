"""Logging: one configuration, lines such as `[INFO] discover: 2000 recognitions`, and no secret in any of them."""

from __future__ import annotations

import logging
import sys
from typing import Any

from pipeline.config import redact
from pipeline.errors import PipelineError


class RedactingFormatter(logging.Formatter):
    """Format a record as `[LEVEL] message`, secrets blotted out; an error of ours needs no traceback but its sentence.

    Arguments:
        timestamp: begin with the time, where nobody is watching.
        tracebacks: show them for our own errors as well.
    """

    def __init__(self, timestamp: bool, tracebacks: bool) -> None:
        super().__init__(f"{'%(asctime)s ' if timestamp else ''}[%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, tracebacks included, without secrets."""
        return redact(super().format(record))

    def formatException(self, ei: Any) -> str:
        """Return the traceback of an error, or the sentence and the hint of one of ours."""
        error = ei[1]
        if isinstance(error, PipelineError) and not self._tracebacks:
            return f"Error: {error.message}" + (f"\nHint: {error.hint}" if error.hint else "")
        return super().formatException(ei)


class _LastWords(logging.Filter):
    """Of Luigi's errors, let through the one that ends its command; a task's failure we tell ourselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno != logging.ERROR or record.funcName == "run_with_retcodes"


def printable(text: str) -> str:
    """Return a line with its control characters escaped, so that a file's name cannot pass for a line of ours."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, below the root `pipeline`."""
    return logging.getLogger(name if name.startswith("pipeline") else f"pipeline.{name}")


def configure_logging(verbose: bool = False) -> None:
    """Send warnings to stderr, and with `verbose` also the steps of the work; calling it again replaces the former."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(timestamp=not (sys.stderr and sys.stderr.isatty()), tracebacks=verbose))
    root = logging.getLogger()
    for former in list(root.handlers):
        if isinstance(former, logging.StreamHandler) and isinstance(former.formatter, RedactingFormatter):
            root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    # Luigi tells of every task it schedules; what the user wants to know of a task we say ourselves.
    logging.getLogger("luigi").setLevel(logging.WARNING)
    interface = logging.getLogger("luigi-interface")
    interface.setLevel(logging.INFO if verbose else logging.ERROR)
    for former_filter in [one for one in interface.filters if isinstance(one, _LastWords)]:
        interface.removeFilter(former_filter)
    if not verbose:
        interface.addFilter(_LastWords())

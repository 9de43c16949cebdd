"""Logging: one configuration, lines such as `[INFO] discover: 2000 recognitions`, and no secret in any of them."""

from __future__ import annotations

import logging
import sys

from pipeline.config import redact


class RedactingFormatter(logging.Formatter):
    """Format a record as `[LEVEL] message`, with a timestamp where nobody is watching, and secrets blotted out."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, tracebacks included, without secrets."""
        return redact(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, below the root `pipeline`."""
    return logging.getLogger(name if name.startswith("pipeline") else f"pipeline.{name}")


def configure_logging(verbose: bool = False) -> None:
    """Send warnings to stderr, and with `verbose` also the steps of the work; calling it again replaces the former."""
    timestamp = "" if sys.stderr.isatty() else "%(asctime)s "
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(f"{timestamp}[%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    for former in list(root.handlers):
        if isinstance(former, logging.StreamHandler) and isinstance(former.formatter, RedactingFormatter):
            root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    # Luigi tells of every task it schedules; what the user wants to know of a task we say ourselves.
    logging.getLogger("luigi").setLevel(logging.WARNING)
    logging.getLogger("luigi-interface").setLevel(logging.INFO if verbose else logging.CRITICAL)

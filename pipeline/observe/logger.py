"""Logging: one configuration, lines such as `[INFO] discover: 2000 recognitions`, and no secret in any of them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import zlib
from datetime import datetime, timezone
from typing import Any, TextIO

from pipeline.config import redact
from pipeline.errors import PipelineError

_sayings = logging.getLogger("pipeline.say")


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


class JsonFormatter(RedactingFormatter):
    """Format a record as one JSON object: `time` (RFC 3339, UTC), `level`, `logger`, `message`, what else is known."""

    def __init__(self, tracebacks: bool) -> None:
        super().__init__(timestamp=False, tracebacks=tracebacks)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without secrets."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        entry: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
            # Before a quote or a backslash in a secret is escaped, and hidden from who looks for it.
            **{name: _redacted(value) for name, value in getattr(record, "fields", {}).items()},
        }
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        if record.stack_info:
            entry["stack"] = redact(record.stack_info)
        return json.dumps(entry, ensure_ascii=False)


def _redacted(value: object) -> object:
    """Return a field of a line without secrets: numbers as they are, anything else as text."""
    return value if value is None or isinstance(value, (bool, int, float)) else redact(str(value))


class _Seldom(logging.Filter):
    """Of warnings that differ in numbers and names alone, let one a minute through, of all workers together.

    A service that comes and goes for hours is then told in so few lines that somebody reads them.
    """

    _SECONDS = 60.0
    _PLACES = 64

    def __init__(self) -> None:
        super().__init__()
        self._next = multiprocessing.RawArray("d", self._PLACES)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a minute has passed since the last one like it."""
        if record.levelno != logging.WARNING:
            return True
        place, now = zlib.crc32(str(record.msg).encode()) % self._PLACES, time.monotonic()
        if now < self._next[place]:
            return False
        self._next[place] = now + self._SECONDS
        return True


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


def say(text: str, level: int = logging.ERROR, **fields: object) -> None:
    """Tell whoever started this: on stderr as it is, or as a line of JSON, with fields, where these were asked for."""
    if writes_json():
        _sayings.log(level, text, extra={"fields": fields})
    elif sys.stderr is not None:
        try:
            print(redact(text), file=sys.stderr)
        except OSError:  # the terminal was closed
            let_go(sys.stderr)


def let_go(stream: TextIO) -> None:
    """Send what a stream has, and will have, to nowhere: its other end is gone, and Python would try again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def writes_json() -> bool:
    """Return whether lines of JSON were asked for."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def configure_logging(verbose: bool = False, log_format: str = "text") -> None:
    """Send warnings to stderr, each once a minute; with `verbose` all, and the steps of the work. Replaces the former.

    Arguments:
        log_format: `text`, or `json` for one object a line.
    """
    handler = logging.StreamHandler()
    timestamp = not (sys.stderr and sys.stderr.isatty())
    text = RedactingFormatter(timestamp=timestamp, tracebacks=verbose)
    handler.setFormatter(JsonFormatter(tracebacks=verbose) if log_format == "json" else text)
    root = logging.getLogger()
    for former in list(root.handlers):
        if isinstance(former, logging.StreamHandler) and isinstance(former.formatter, RedactingFormatter):
            root.removeHandler(former)
    if not verbose:
        handler.addFilter(_Seldom())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    _sayings.setLevel(logging.INFO)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    # Luigi tells of every task it schedules; what the user wants to know of a task we say ourselves.
    logging.getLogger("luigi").setLevel(logging.WARNING)
    interface = logging.getLogger("luigi-interface")
    interface.setLevel(logging.INFO if verbose else logging.ERROR)
    for former_filter in [one for one in interface.filters if isinstance(one, _LastWords)]:
        interface.removeFilter(former_filter)
    if not verbose:
        interface.addFilter(_LastWords())

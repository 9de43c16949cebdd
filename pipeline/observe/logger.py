"""Logging: one configuration, lines such as `[INFO] discover: 2000 recognitions`, without secrets."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import zlib
from datetime import datetime, timezone
from typing import Any, TextIO

from pythonjsonlogger import json

from pipeline.config import redact
from pipeline.errors import PipelineError

_sayings = logging.getLogger("pipeline.say")


class RedactingFormatter(logging.Formatter):
    """Format a record as `[LEVEL] message` without secrets; an error of the pipeline is its sentence and its hint.

    Arguments:
        timestamp: begin with the time.
        tracebacks: show the traceback of an error of the pipeline as well.
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


class JsonFormatter(json.JsonFormatter):
    """Format a record as one JSON object: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and further fields."""

    def __init__(self, tracebacks: bool) -> None:
        super().__init__(json_ensure_ascii=False)
        self._text = RedactingFormatter(timestamp=False, tracebacks=tracebacks)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """Fill in the fields; secrets are redacted before a quote or a backslash in them is escaped."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        log_data["time"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log_data["level"] = record.levelname.lower()
        log_data["logger"] = record.name
        log_data["message"] = redact(record.getMessage())
        log_data.update({name: _redacted(value) for name, value in getattr(record, "fields", {}).items()})
        if record.exc_info:
            log_data["exception"] = redact(self._text.formatException(record.exc_info))
        if record.stack_info:
            log_data["stack"] = redact(record.stack_info)


def _redacted(value: object) -> object:
    """Return a field without secrets: numbers as they are, anything else as text."""
    return value if value is None or isinstance(value, (bool, int, float)) else redact(str(value))


class _RateLimit(logging.Filter):
    """Pass one warning a minute of those that differ in their arguments alone, of all forked processes together.

    A service that comes and goes for hours then gives few enough lines to be read.
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


class _FatalErrors(logging.Filter):
    """Pass only the error of Luigi that ends its command; the pipeline reports failed tasks itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno != logging.ERROR or record.funcName == "run_with_retcodes"


def printable(text: str) -> str:
    """Return a line with its control characters escaped, so that a file's name cannot look like a log line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, below the root `pipeline`."""
    return logging.getLogger(name if name.startswith("pipeline") else f"pipeline.{name}")


def say(text: str, level: int = logging.ERROR, **fields: object) -> None:
    """Print a message for the user on stderr; with `--log-format json`, as an object with the fields."""
    if writes_json():
        _sayings.log(level, text, extra={"fields": fields})
    elif sys.stderr is not None:
        try:
            print(redact(text), file=sys.stderr)
        except OSError:  # the terminal was closed
            redirect_to_null(sys.stderr)


def redirect_to_null(stream: TextIO) -> None:
    """Discard what a stream has buffered and will be given: its reader is gone, and Python would flush it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def writes_json() -> bool:
    """Return whether `--log-format json` is in force."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def configure_logging(verbose: bool = False, log_format: str = "text") -> None:
    """Send warnings to stderr, each once a minute; with `verbose` all of them, and the steps of the work.

    A former configuration by this function is replaced.

    Arguments:
        log_format: `text`, or `json` for one object a line.
    """
    handler = logging.StreamHandler()
    timestamp = not (sys.stderr and sys.stderr.isatty())
    text = RedactingFormatter(timestamp=timestamp, tracebacks=verbose)
    handler.setFormatter(JsonFormatter(tracebacks=verbose) if log_format == "json" else text)
    root = logging.getLogger()
    for former in list(root.handlers):
        if isinstance(former.formatter, (RedactingFormatter, JsonFormatter)):
            root.removeHandler(former)
    if not verbose:
        handler.addFilter(_RateLimit())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    _sayings.setLevel(logging.INFO)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    # Luigi logs every task that it schedules; the pipeline reports what the user wants to know of a task.
    logging.getLogger("luigi").setLevel(logging.WARNING)
    interface = logging.getLogger("luigi-interface")
    interface.setLevel(logging.INFO if verbose else logging.ERROR)
    for former_filter in [one for one in interface.filters if isinstance(one, _FatalErrors)]:
        interface.removeFilter(former_filter)
    if not verbose:
        interface.addFilter(_FatalErrors())

"""Logging: one handler on stderr, as text (`[INFO] discover: 2000 recognitions`) or JSON, with secrets redacted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import zlib
from datetime import datetime
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from pipeline.config import Redactor, process_redactor, redact
from pipeline.errors import PipelineError


class RedactingFormatter(logging.Formatter):
    """Format a record as `[LEVEL] message`, without secrets.

    Arguments:
        redactor: removes the secrets.
        timestamp: start the line with the local time.
        tracebacks: show the traceback of a PipelineError instead of its message and hint.
    """

    def __init__(self, redactor: Redactor, *, timestamp: bool, tracebacks: bool) -> None:
        super().__init__(f"{'%(asctime)s ' if timestamp else ''}[%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        self._redactor, self._tracebacks = redactor, tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, including any traceback."""
        return self._redactor.redact(super().format(record))

    def formatException(self, ei: Any) -> str:
        """Return the traceback, or message and hint of a PipelineError."""
        return _brief(ei[1], self._tracebacks) or super().formatException(ei)


class RedactingJsonFormatter(JsonFormatter):
    """Format a record as a JSON object, without secrets.

    Its fields are `time` (RFC 3339, UTC), `level`, `logger`, `message`, the record's `extra`, and `exception` and
    `stack` if there are any.
    """

    def __init__(self, redactor: Redactor, *, tracebacks: bool) -> None:
        renamed = {"levelname": "level", "name": "logger", "exc_info": "exception", "stack_info": "stack"}
        super().__init__(
            "%(levelname)s %(name)s %(message)s", rename_fields=renamed, timestamp="time", json_ensure_ascii=False
        )
        self._redactor, self._tracebacks = redactor, tracebacks

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Redact each value before it is encoded: a secret with escaped characters would not be recognised."""
        moment: datetime = log_data.pop("time")
        fields = {name: self._redacted(value) for name, value in log_data.items()}
        text = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"time": text, **fields, "level": str(log_data["level"]).lower()}

    def formatException(self, ei: Any) -> str:
        """Return the traceback, or message and hint of a PipelineError."""
        return _brief(ei[1], self._tracebacks) or str(super().formatException(ei))

    def _redacted(self, value: object) -> object:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._redactor.redact(str(value))


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no subscript before Python 3.11
    """Write records to stderr; the state of one `configure_logging` call.

    Arguments:
        verbose: write every record, and tracebacks for our own errors.
        json: write JSON instead of text.
        redactor: removes secrets from each line.
    """

    def __init__(self, *, verbose: bool, json: bool, redactor: Redactor) -> None:
        super().__init__()
        self.json = json
        timestamp = not (sys.stderr and sys.stderr.isatty())
        self.setFormatter(
            RedactingJsonFormatter(redactor, tracebacks=verbose)
            if json
            else RedactingFormatter(redactor, timestamp=timestamp, tracebacks=verbose)
        )
        if not verbose:
            self.addFilter(_RepeatFilter())
            self.addFilter(_is_not_task_failure)


class _RepeatFilter(logging.Filter):
    """Pass a warning once a minute, over all worker processes; warnings with the same format string count as one.

    An outage of hours then produces a log that can be read.
    """

    _SECONDS = 60.0
    _SLOTS = 64

    def __init__(self) -> None:
        super().__init__()
        self._next = multiprocessing.RawArray("d", self._SLOTS)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        slot, now = zlib.crc32(str(record.msg).encode()) % self._SLOTS, time.monotonic()
        if now < self._next[slot]:
            return False
        self._next[slot] = now + self._SECONDS
        return True


def _is_not_task_failure(record: logging.LogRecord) -> bool:
    """Drop Luigi's report of a failed task, which the worker prints itself; keep the error that ends `luigi`."""
    is_luigi_error = record.name == "luigi-interface" and record.levelno == logging.ERROR
    return not is_luigi_error or record.funcName == "run_with_retcodes"


def _brief(error: BaseException, tracebacks: bool) -> str:
    """Return message and hint of a PipelineError; nothing for other errors, or if tracebacks were requested."""
    if not isinstance(error, PipelineError) or tracebacks:
        return ""
    return f"Error: {error.message}" + (f"\nHint: {error.hint}" if error.hint else "")


def printable(text: str) -> str:
    """Return the text with its control characters escaped, so that a file name cannot forge a line of output."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, below the root `pipeline`."""
    return logging.getLogger(name if name.startswith("pipeline") else f"pipeline.{name}")


def say(text: str, level: int = logging.ERROR, **fields: object) -> None:
    """Print a message for the user on stderr, or with `--log-format json` log it with its fields."""
    if writes_json():
        logging.getLogger("pipeline.say").log(level, text, extra=fields)
    elif sys.stderr is not None:
        try:
            print(redact(text), file=sys.stderr)
        except OSError:  # the terminal was closed, or the disk is full
            redirect_to_null(sys.stderr)


def redirect_to_null(stream: TextIO) -> None:
    """Discard what the stream has buffered and all later output, which Python would otherwise retry at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def writes_json() -> bool:
    """Return whether logging is configured to write JSON."""
    return any(isinstance(handler, ConsoleHandler) and handler.json for handler in logging.getLogger().handlers)


def configure_logging(verbose: bool = False, log_format: str = "text", redactor: Redactor | None = None) -> None:
    """Write warnings to stderr, each at most once a minute; with `verbose` also every step. Replaces an earlier call.

    Arguments:
        verbose: show steps, repeated warnings, and tracebacks.
        log_format: `text`, or `json` for one object a line.
        redactor: removes secrets from each line; by default the one that every Secret of this process is added to.
    """
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, ConsoleHandler)]:
        root.removeHandler(handler)
    root.addHandler(ConsoleHandler(verbose=verbose, json=log_format == "json", redactor=redactor or process_redactor()))
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("pipeline.say").setLevel(logging.INFO)
    # Luigi logs every task that it schedules; the progress display replaces that.
    logging.getLogger("luigi").setLevel(logging.WARNING)
    logging.getLogger("luigi-interface").setLevel(logging.INFO if verbose else logging.ERROR)

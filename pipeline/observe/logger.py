"""Logging: one handler on stderr, as text (`[INFO] discover: 2000 recognitions`) or JSON, with secrets redacted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections import deque
from datetime import datetime
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from pipeline.config import redact
from pipeline.errors import PipelineError

_TAIL_LINES, _TAIL_CHARACTERS = 100, 10_000  # the most of a text that the end of the log has


class RedactingJsonFormatter(JsonFormatter):
    """Format a record as JSON: `time` (RFC 3339, UTC), `level`, `logger`, `message`, `extra`, `exception`, `stack`."""

    def __init__(self) -> None:
        renamed = {"levelname": "level", "name": "logger", "exc_info": "exception", "stack_info": "stack"}
        super().__init__(
            "%(levelname)s %(name)s %(message)s", rename_fields=renamed, timestamp="time", json_ensure_ascii=False
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Redact each value before it is encoded: a secret with escaped characters would not be recognised."""
        moment: datetime = log_data.pop("time")
        plain = (type(None), bool, int, float)
        fields = {name: one if isinstance(one, plain) else redact(str(one)) for name, one in log_data.items()}
        text = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"time": text, **fields, "level": str(log_data["level"]).lower()}


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no subscript before Python 3.11
    """Write records to stderr; the state of one `configure_logging` call."""

    def __init__(self, *, verbose: bool, json: bool) -> None:
        super().__init__()
        self.json = json
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        timestamp = "" if sys.stderr and sys.stderr.isatty() else "%(asctime)s "
        text = logging.Formatter(f"{timestamp}[%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        self.setFormatter(RedactingJsonFormatter() if json else text)
        if not verbose:
            self.addFilter(_BriefFilter())

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with any traceback, without secrets."""
        line = super().format(record)
        self.tail.append(line[-_TAIL_CHARACTERS:])
        return line if self.json else redact(line)


class _BriefFilter(logging.Filter):
    """Shorten what is logged without `--verbose`, so that the log of an outage of hours can be read.

    A warning, told by its format string, passes once a minute over all worker processes; of more than 64 in a minute,
    the oldest may pass again. A PipelineError has message and hint in place of a traceback. Of Luigi's errors only the
    one that ends `luigi` passes: tasks report their own.
    """

    _SECONDS = 60.0
    _SLOTS = 64

    def __init__(self) -> None:
        super().__init__()
        # Shared with forked processes, in which `hash` returns the same.
        self._formats = multiprocessing.RawArray("q", self._SLOTS)
        self._next = multiprocessing.RawArray("d", self._SLOTS)

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PipelineError):
            hint = f"\nHint: {error.hint}" if error.hint else ""
            record.exc_info, record.exc_text = None, f"Error: {error.message}{hint}"
        if record.name == "luigi-interface" and record.levelno == logging.ERROR:
            return record.funcName == "run_with_retcodes"
        if record.levelno != logging.WARNING:
            return True
        key, now, formats = hash(str(record.msg)), time.monotonic(), list(self._formats)
        slot = formats.index(key) if key in formats else min(range(self._SLOTS), key=self._next.__getitem__)
        if formats[slot] == key and now < self._next[slot]:
            return False
        self._formats[slot], self._next[slot] = key, now + self._SECONDS
        return True


def say(text: str, level: int = logging.ERROR, **fields: object) -> None:
    """Print a message for the user on stderr, or with `--log-format json` log it with its fields."""
    if writes_json():
        logging.getLogger("pipeline.say").log(level, text, extra=fields)
        return
    _remember(text)
    if sys.stderr is not None:
        try:
            print(redact(text), file=sys.stderr)
        except OSError:  # the terminal was closed, or the disk is full
            redirect_to_null(sys.stderr)


def log_event(event: str, text: str, **fields: object) -> None:
    """Log an event with its fields, with `--log-format json` only."""
    if writes_json():
        logging.getLogger("pipeline.event").log(logging.INFO, text, extra={"event": event, **fields})


class OutputError(OSError):
    """What goes to stdout cannot be written."""


def show(text: str, end: str = "\n", *, flush: bool = False) -> None:
    """Print a result on stdout; raise OutputError where it cannot be written, BrokenPipeError where nobody reads it."""
    if end == "\n":
        _remember(text)
    try:
        print(text, end=end, flush=flush)
    except OSError as exc:
        redirect_to_null(sys.stdout)
        if isinstance(exc, BrokenPipeError):
            raise
        raise OutputError(*exc.args) from exc


def say_error(error: PipelineError) -> None:
    """Print an error, and its hint."""
    say(f"Error: {error.message}", error=type(error).__name__)
    if error.hint:
        say(f"Hint: {error.hint}")


def redirect_to_null(stream: TextIO) -> None:
    """Discard what the stream has buffered and all later output, which Python would otherwise retry at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _consoles() -> list[ConsoleHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, ConsoleHandler)]


def _remember(text: str) -> None:
    for handler in _consoles():
        handler.tail.append(text[-_TAIL_CHARACTERS:])


def log_tail() -> str:
    """Return the last lines that this process wrote to the log and to stdout, without secrets."""
    return redact("\n".join(line for handler in _consoles() for line in list(handler.tail)))


def writes_json() -> bool:
    """Return whether logging is configured to write JSON."""
    return any(handler.json for handler in _consoles())


def configure_logging(verbose: bool = False, log_format: str = "text") -> None:
    """Write warnings to stderr as text or `json`; with `verbose` also steps, repeated warnings and tracebacks."""
    root = logging.getLogger()
    for handler in _consoles():
        root.removeHandler(handler)
    root.addHandler(ConsoleHandler(verbose=verbose, json=log_format == "json"))
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    for name in ("pipeline.say", "pipeline.event"):
        logging.getLogger(name).setLevel(logging.INFO)
    # Its warnings contain URLs, which may be secrets; its errors are raised.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    # Luigi logs every task that it schedules; the progress display replaces that.
    logging.getLogger("luigi").setLevel(logging.WARNING)
    logging.getLogger("luigi-interface").setLevel(logging.INFO if verbose else logging.ERROR)

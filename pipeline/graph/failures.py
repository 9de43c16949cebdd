"""Failures of tasks, recorded in the process that ran the task and read in the process that schedules."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import luigi.retcodes

from pipeline import errors
from pipeline.config import redact
from pipeline.errors import PipelineError, remedy_of, unexpected
from pipeline.graph.process import INTERRUPTED, Interrupts
from pipeline.observe.logger import say, say_error

logger = logging.getLogger(__name__)

_PRINTED = 5  # failures; the others most often say the same


@dataclass(frozen=True)
class Failure:
    """A failed task, without secrets; `error` is the name of its class in `pipeline.errors`, else empty."""

    task: str
    error: str
    message: str
    hint: str

    @classmethod
    def of(cls, task: object, exception: BaseException) -> Failure:
        """Describe an exception of a task."""
        if isinstance(exception, PipelineError):
            return cls(str(task), type(exception).__name__, redact(exception.message), redact(exception.hint))
        hint = remedy_of(exception) if isinstance(exception, OSError) else ""
        return cls(str(task), "", redact(f"{type(exception).__name__}: {exception}"), hint)

    def as_error(self) -> PipelineError | None:
        """Return the error again, None for an exception of any other class."""
        return getattr(errors, self.error)(self.message, self.hint) if self.error else None

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class FailureLog:
    """A list of failures that forked processes share: an unnamed file, since a write at its end needs no lock."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("ab+", buffering=0)  # noqa: SIM115 (it lives as long as its run)
        weakref.finalize(self, self._file.close)

    def add(self, failure: Failure) -> None:
        """Append a failure; where the disk is full, it is in the log alone."""
        try:
            self._file.write(json.dumps(asdict(failure)).encode() + b"\n")
        except OSError as exc:
            logger.error("A failure cannot be recorded (%s): %s", exc.strerror, failure)

    def read(self) -> list[Failure]:
        """Return the failures in their order."""
        content = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        return [Failure(**json.loads(line)) for line in content.splitlines()]


def print_failures(failures: Sequence[Failure]) -> None:
    """Print the first failures on stderr."""
    for failure in failures[:_PRINTED]:
        say(f"Failed: {failure.task}: {failure.message}", task=failure.task, error=failure.error)
        if failure.hint:
            say(f"Hint: {failure.hint}")


@contextmanager
def exit_on_error(interrupts: Interrupts) -> Iterator[None]:
    """End Luigi's command with an error of the block, and with the exit code of Luigi's [retcode], or with 130.

    Any other exception ends it in the same way, with its traceback. A signal between two such blocks, in code of Luigi,
    is raised in the second one.
    """
    try:
        interrupts.begin()
        yield
        interrupts.defer()
        return
    except KeyboardInterrupt:
        interrupts.announce()
        interrupts.finish(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except PipelineError as exc:
        say_error(exc)
        error = exc
    except Exception as exc:
        logger.exception("The command failed with an unexpected error.")
        error = unexpected(exc)
    code: int = luigi.retcodes.retcode().unhandled_exception  # Luigi itself may have read it without our defaults
    interrupts.finish(code, error)
    sys.exit(code)

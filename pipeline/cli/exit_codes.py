"""The table of exit codes."""

from __future__ import annotations

from pipeline.errors import Interrupted, PipelineError, RefusedError, UsageError

DONE = 0
USAGE = 2
UNFINISHED = 3
REFUSED = 4
DIFFERENCES = 5
INTERRUPTED = 130

#: The first matching class decides; the README has the same table.
EXIT_CODES: tuple[tuple[type[PipelineError], int], ...] = (
    (UsageError, USAGE),
    (RefusedError, REFUSED),
    (Interrupted, INTERRUPTED),
    (PipelineError, UNFINISHED),
)


def exit_code(error: PipelineError) -> int:
    """Return the exit code of an error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))

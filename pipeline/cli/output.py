"""What commands print and ask on a terminal, and the table of exit codes."""

from __future__ import annotations

import argparse
import errno
import json
import select
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.errors import HeldError, Interrupted, PipelineError, RefusedError, UsageError
from pipeline.graph.process import INTERRUPTED
from pipeline.observe.logger import redirect_to_null

DONE, USAGE, UNFINISHED, REFUSED, DIFFERENCES, HELD = 0, 2, 3, 4, 5, 6

_PROMPT_SECONDS = 0.2

#: The first matching class decides; the README has the same table.
EXIT_CODES = {
    UsageError: USAGE,
    RefusedError: REFUSED,
    HeldError: HELD,
    Interrupted: INTERRUPTED,
    PipelineError: UNFINISHED,
}


_SPACE = "Free space for temporary files (TMPDIR), in /dev/shm and where logs are written."
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "Raise the limit for the size of a file: `ulimit -f unlimited`.",
    errno.EMFILE: "Raise the limit for open files: `ulimit -n 4096`.",
}


def exit_code(error: PipelineError) -> int:
    """Return the exit code of an error."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def print_result(options: argparse.Namespace, value: Mapping[str, Any], text: str) -> None:
    """Print a result on stdout: as text, or with `--json` as one JSON object."""
    try:
        print(json.dumps(value, ensure_ascii=False, default=str) if options.json else text)
    except BrokenPipeError:  # the reader closed the pipe; the exit code stays the same
        redirect_to_null(sys.stdout)


def remedy_of(error: OSError) -> str:
    """Return what to do about an error of the operating system that its number explains, else nothing."""
    return _REMEDIES.get(error.errno or 0, "")


def os_error(error: OSError) -> tuple[str, str]:
    """Return what an error of the operating system is about, and the remedy; empty for a defect of ours."""
    why = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    hint = remedy_of(error)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()  # what could not be written is still in its buffer
    except OSError:
        redirect_to_null(sys.stdout)
        return f"The output cannot be written: {why}.", hint or "Send it elsewhere."
    if not hint and error.filename is not None:
        return "", ""
    return f"The operating system refuses what the pipeline needs: {why}.", hint or "Run it again with --verbose."


def ask(question: str) -> str:
    """Print a question and return the line typed in response, empty at the end of input.

    `input` would miss a Ctrl-C between printing and reading; `select` returns now and then for that.
    """
    print(question, end="", file=sys.stderr, flush=True)  # stdout may be redirected
    while not select.select([sys.stdin], [], [], _PROMPT_SECONDS)[0]:
        pass
    return sys.stdin.readline().rstrip("\n")

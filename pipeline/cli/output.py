"""What commands print and ask on a terminal, and the table of exit codes."""

from __future__ import annotations

import argparse
import json
import select
import sys
import termios
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipeline.errors import HeldError, Interrupted, PipelineError, RefusedError, UsageError
from pipeline.graph.process import INTERRUPTED
from pipeline.observe.logger import show

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


def exit_code(error: PipelineError) -> int:
    """Return the exit code of an error."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def print_result(options: argparse.Namespace, value: Mapping[str, Any], text: str) -> None:
    """Print a result on stdout: as text, or with `--json` as one JSON object."""
    with suppress(BrokenPipeError):  # the reader closed the pipe; the exit code stays the same
        show(json.dumps(value, ensure_ascii=False, default=str) if options.json else text)


def require_typed(word: str, question: str, failed: str, why: str) -> None:
    """Raise RefusedError unless the user types a word in response to a question; `failed` and `why` are its message."""
    if sys.stdin is None or not sys.stdin.isatty():
        why = "there is no terminal for the prompt"
    elif ask(question).strip() == word:
        return
    raise RefusedError(f"{failed}: {why}.", "Use --confirm to skip the prompt; nothing was changed.")


def ask(question: str, *, echo: bool = True) -> str:
    """Print a question and return the line typed in response, empty at the end of input.

    `input` and `getpass` would miss a Ctrl-C between printing and reading; `select` returns now and then for that.
    """
    if not echo:
        former = termios.tcgetattr(sys.stdin)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, [*former[:3], former[3] & ~termios.ECHO, *former[4:]])
    try:
        print(question, end="", file=sys.stderr, flush=True)  # stdout may be redirected
        while not select.select([sys.stdin], [], [], _PROMPT_SECONDS)[0]:
            pass
        return sys.stdin.readline().rstrip("\n")
    finally:
        if not echo:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, former)
            print(file=sys.stderr)

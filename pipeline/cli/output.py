"""What commands print and ask on a terminal, and the table of exit codes."""

from __future__ import annotations

import argparse
import json
import select
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.errors import HeldError, Interrupted, PipelineError, RefusedError, UsageError
from pipeline.observe.logger import redirect_to_null

DONE, USAGE, UNFINISHED, REFUSED, DIFFERENCES, HELD, INTERRUPTED = 0, 2, 3, 4, 5, 6, 130

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
    try:
        print(json.dumps(value, ensure_ascii=False, default=str) if options.json else text)
    except BrokenPipeError:  # the reader closed the pipe; the exit code stays the same
        redirect_to_null(sys.stdout)


def ask(question: str) -> str:
    """Print a question and return the line typed in response, empty at the end of input.

    `input` would miss a Ctrl-C between printing and reading; here a signal wakes `select` through a file descriptor.
    """
    print(question, end="", file=sys.stderr, flush=True)  # stdout may be redirected
    wakes, woken = socket.socketpair()
    with wakes, woken:
        woken.setblocking(False)
        former = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        try:
            while True:
                ready, _, _ = select.select([sys.stdin, wakes], [], [])
                if sys.stdin in ready:
                    return sys.stdin.readline().rstrip("\n")
                wakes.recv(16)  # another signal, whose handler did not raise
        finally:
            signal.set_wakeup_fd(former)

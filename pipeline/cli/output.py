"""How commands print their results and their errors."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from pipeline.errors import PipelineError
from pipeline.observe.logger import redirect_to_null, say


def print_result(options: argparse.Namespace, value: Mapping[str, Any], text: str) -> None:
    """Print a result on stdout: as text, or with `--json` as one JSON object."""
    try:
        print(json.dumps(value, ensure_ascii=False, default=str) if options.json else text)
    except BrokenPipeError:  # the reader closed the pipe; the exit code stays the same
        redirect_to_null(sys.stdout)


def print_error(error: PipelineError, verbose: bool) -> None:
    """Print an error and its hint on stderr."""
    if verbose:
        say("".join(traceback.format_exception(error)))
    say(f"Error: {error.message}", error=type(error).__name__)
    if error.hint:
        say(f"Hint: {error.hint}")

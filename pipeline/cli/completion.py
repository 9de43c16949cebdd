"""Completion in a shell: the script, and the list of batch ids that it reads.

A shell completes while somebody types, so it waits neither for Python nor for a database: loads and `status` keep the
last ids in a file of the user's cache, once that user has asked for the script.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import shtab

from pipeline.files import replacing

_KEPT = 100
_LIST = '"${XDG_CACHE_HOME:-$HOME/.cache}/pipeline/batch-ids"'
#: Functions of the script. A missing list completes nothing; tcsh has no functions.
_PREAMBLE = {
    "bash": f'_pipeline_batch_ids() {{ compgen -W "$(cat {_LIST} 2>/dev/null)" -- "$1"; }}\n',
    "zsh": f"_pipeline_batch_ids() {{ compadd -- $(cat {_LIST} 2>/dev/null) }}\n",
}
_COMPLETE = {
    "--batch-id": dict.fromkeys(_PREAMBLE, "_pipeline_batch_ids"),
    **dict.fromkeys(("--source", "--export", "DIR"), shtab.DIRECTORY),
    **dict.fromkeys(("--file", "--out", "--metrics-file"), shtab.FILE),
}


def complete_values(action: argparse.Action) -> None:
    """Let the value of an argument complete: a batch id, a file or a folder."""
    name = action.option_strings[0] if action.option_strings else action.metavar
    if name in _COMPLETE:
        action.complete = _COMPLETE[name]  # type: ignore[attr-defined]  # an attribute that shtab looks for


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script for a shell, and begin the list of batch ids."""
    with suppress(OSError, RuntimeError):
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(shtab.complete(parser, shell, preamble=_PREAMBLE.get(shell, "")))


def remember(batch_ids: Iterable[str]) -> None:
    """Put batch ids at the top of the list, if there is one."""
    with suppress(OSError, RuntimeError, ValueError):  # no home, no list, or a file that is not ours
        path = _folder() / "batch-ids"
        former = path.read_text(encoding="ascii").split() if path.exists() else []
        kept = list(dict.fromkeys([*batch_ids, *former]))[:_KEPT]
        if kept != former:
            with replacing(path) as new:
                new.write("\n".join(kept) + "\n")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipeline"

"""SQL statements: one file a room, each statement after a line `-- name: <name>`; parameters are written `:name`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_NAME = re.compile(r"^-- name: ([a-z_]+)\n", re.MULTILINE)


@cache
def statements() -> dict[str, str]:
    """Return all statements by name; raise ValueError if two have the same name."""
    found: dict[str, str] = {}
    for file in sorted(files(__name__).iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            _, *parts = _NAME.split(file.read_text(encoding="utf-8"))
            for name, text in zip(parts[::2], parts[1::2], strict=True):
                if name in found:
                    raise ValueError(f"The statement {name} is there twice, the second time in {file.name}.")
                found[name] = text.strip()
    return found


def statement(name: str) -> str:
    """Return the text of a statement."""
    return statements()[name]

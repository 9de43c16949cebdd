"""Write reference/luigi.md, the habits of Luigi's users and what comes of each, from their tests: `make docs`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("reference") / "luigi.md"
MODULES = ("tests.test_luigi_habits", "tests.test_luigi_tasks", "tests.test_luigi_projects", "tests.test_luigi")

_HEAD = """# Luigi's habits

This page lists what users of Luigi are used to, and whether it works with the tasks of the loader. What does not is
refused with a sentence. `make docs` generates the page from its tests, which run the commands and the API of Luigi 3.8.
[The guide](../guides/luigi.md) explains how to run loads under Luigi.

A refused option ends `luigi --module pipeline …` before any task runs, with exit code 40. Where the task on the command
line is your own or Luigi's, such as `RangeDaily`, Luigi's own worker runs. Use the luigi.cfg of this repository then:
without its `[retcode]`, Luigi exits with 0 after a failure.
"""


def page() -> str:
    """Return the page."""
    sys.path.insert(0, str(ROOT))
    from tests.habits import HABITS

    for module in MODULES:
        importlib.import_module(module)
    lines = [_HEAD]
    for group in dict.fromkeys(one.group for one in HABITS):
        lines += [f"## {group}\n", "| habit | outcome | test |", "| --- | --- | --- |"]
        lines += _rows(group)
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _rows(group: str) -> Iterator[str]:
    from tests.habits import HABITS

    for one in HABITS:
        if one.group == group:
            yield f"| {one.what} | {one.outcome} | `{one.test}` |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

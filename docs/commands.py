"""Write commands.md, the manual of the commands, from their parser: `make docs`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from pipeline.cli import parser
from pipeline.cli.parser import EXAMPLES

PAGE = Path(__file__).with_name("commands.md")

_HEAD = """# Commands

Made from the parser by `make docs`; `python -m pipeline COMMAND --help` shows the same. What the commands are for, and
what their output means, is in the [README](../README.md).

Results go to stdout; errors and progress go to stderr. The exit codes are in the
[README](../README.md#exit-codes).
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, in the order of `--help`."""
    (action,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def page() -> str:
    """Return the page."""
    sections = ("\n".join(_command(name, one)) for name, one in commands().items())
    return "\n".join((_HEAD, *sections))


def _command(name: str, one: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{one.description}\n"
    usage = " ".join(["python -m pipeline", name, *map(_usage, _arguments(one))])
    yield f"    {usage}\n"
    yield "| argument | meaning |"
    yield "| --- | --- |"
    for action in _arguments(one):
        yield f"| `{_form(action)}` | {(action.help or '').replace('|', '/')} |"
    yield ""
    for purpose, command in EXAMPLES[name]:
        yield f"{purpose}:\n\n    {command}\n"


def _arguments(one: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in one._actions if not isinstance(action, argparse._HelpAction)]


def _form(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    value = action.metavar if action.nargs != 0 else None
    return " ".join(filter(None, (names, str(value) if value else "")))


def _usage(action: argparse.Action) -> str:
    return _form(action) if action.required else f"[{_form(action)}]"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

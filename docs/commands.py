"""Write reference/commands.md, the reference of the commands, from their parser: `make docs`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from pipeline.cli import parser
from pipeline.cli.parser import examples

PAGE = Path(__file__).with_name("reference") / "commands.md"

_HEAD = """# Commands

`make docs` generates this page from the parser; `python -m pipeline COMMAND --help` prints the same. The console script
`pipeline` is the same as `python -m pipeline`; `pipeline --version` prints the version. Results go to stdout; progress,
errors and hints go to stderr. The [README](../../README.md#exit-codes) lists the exit codes. Code 2 is
also that of a `worker` without a luigid, and of a `worker` or a `shard` on a machine without the dataset.

## Options of every command
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, in the order of `--help`."""
    (action,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def page() -> str:
    """Return the page."""
    common = set.intersection(*({_form(action) for action in _arguments(one)} for one in commands().values()))
    first = next(iter(commands().values()))
    shared = [action for action in _arguments(first) if _form(action) in common]
    lines = [_HEAD, *_table(shared), ""]
    for name, one in commands().items():
        lines += _command(name, one, [action for action in _arguments(one) if _form(action) not in common])
    return "\n".join(lines).rstrip("\n") + "\n"


def _command(name: str, one: argparse.ArgumentParser, own: list[argparse.Action]) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{one.description}\n"
    yield f"    {' '.join(['python -m pipeline', name, *map(_usage, own)])}\n"
    if own:
        yield from _table(own)
        yield ""
    for example in examples()[name]:
        purpose, command = example.removeprefix("# ").split("\n")
        yield f"{purpose}:\n\n```sh\n{command}\n```\n"


def _table(actions: list[argparse.Action]) -> Iterator[str]:
    yield "| argument | meaning |"
    yield "| --- | --- |"
    for action in actions:
        yield f"| `{_form(action)}` | {(action.help or '').replace('|', '/').replace('%%', '%')} |"


def _arguments(one: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in one._actions if action.help != argparse.SUPPRESS]


def _form(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    value = action.metavar if action.nargs != 0 else None
    return " ".join(filter(None, (names, str(value) if value else "")))


def _usage(action: argparse.Action) -> str:
    return _form(action) if action.required else f"[{_form(action)}]"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""The command line: commands, options, and the examples that `--help` shows. What the commands do is in `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

Command = Callable[[argparse.Namespace], int]

_PRODUCTION: dict[str, Any] = {"action": "store_true", "help": "use .env.production, and nothing in its place"}
_VERBOSE: dict[str, Any] = {"action": "store_true", "help": "say every step on stderr, and show tracebacks"}
_JSON: dict[str, Any] = {"action": "store_true", "help": "print the result as one JSON object on stdout"}
_LOG_FORMAT: dict[str, Any] = {
    "choices": ("text", "json"),
    "default": "text",
    "metavar": "FORMAT",
    "help": "text for people, or json: one object a line on stderr (text)",
}

#: Examples of each command: what it is for, and what to type.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "up": (
        ("Start PostgreSQL and Storage below .pipeline", "python -m pipeline up"),
        ("Let psql use them", '(set -a; . .pipeline/env; psql "$DATABASE_URL")'),
    ),
    "down": (("Stop them; `up` goes on where they were", "python -m pipeline down"),),
    "migrate": (("Make or update the tables of a Supabase project", "python -m pipeline migrate --production"),),
    "sample": (
        ("A thousand trays", "python -m pipeline sample /tmp/ds --recognitions 1000"),
        ("Other trays, and some that cannot be used", "python -m pipeline sample /tmp/ds2 --seed 2 --broken"),
    ),
    "load": (
        ("What would be loaded", "python -m pipeline load --source /srv/ds --dry-run"),
        ("Load what is new, with four processes", "python -m pipeline load --source /srv/ds --workers 4"),
        ("Try a hundred first", "python -m pipeline load --source /srv/ds --limit 100 --batch-id trial"),
        ("Resume it with the same options", "python -m pipeline load --source /srv/ds --limit 100 --batch-id trial"),
        ("Load everything again, as a new version", "python -m pipeline load --source /srv/ds --force"),
    ),
    "load-qwen": (
        ("Annotate what is loaded", "python -m pipeline load-qwen --file /srv/ds/qwen_annotations.json"),
        ("The detections of a better model instead", "python -m pipeline load-qwen --file new.json --force"),
    ),
    "worker": (
        ("On a second machine, beside a load that was started on the first", "python -m pipeline worker --workers 4"),
        ("All night long, whatever is loaded", "python -m pipeline worker --production --idle 43200"),
    ),
    "reset": (
        ("What would go, and what would come back", "python -m pipeline reset --batch-id b1 --dry-run"),
        ("Take it out, without a question", "python -m pipeline reset --batch-id b1 --confirm"),
    ),
    "status": (
        ("Do both connections work, and what is unfinished?", "python -m pipeline status --production"),
        ("The numbers of an earlier load", "python -m pipeline status --batch-id b1"),
        ("Everything that a load rests on, before the first one", "python -m pipeline status --check --source /srv/ds"),
    ),
    "report": (
        ("A page to look at", "python -m pipeline report --batch-id b1"),
        (
            "More trays, into a folder that a web server shows",
            "python -m pipeline report --batch-id b1 --sample 50 --out /srv/www/b1.html",
        ),
    ),
    "completion": (
        ("For bash, in ~/.bashrc", 'eval "$(pipeline completion bash)"'),
        ("For zsh, into a folder of $fpath", "pipeline completion zsh > ~/.zfunc/_pipeline"),
    ),
    "verify": (
        ("Only what is not as it should be", "python -m pipeline verify --quiet"),
        ("Read every object, and mend what can be mended", "python -m pipeline verify --deep --repair"),
    ),
}


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of all commands, each with the function that does it."""
    top = argparse.ArgumentParser(
        prog="pipeline",
        description="Load datasets of canteen-tray photos into Supabase, in batches, exactly once.",
        epilog="To begin: `up`, `sample DIR`, `load --source DIR`, `report`. `COMMAND --help` has examples of each; "
        "`status --check` says what is wrong with a machine, and what to do about it.",
    )
    add = _Adder(top.add_subparsers(required=True, metavar="COMMAND"), commands)
    _add_services(add)
    _add_loads(add)
    _add_worker(add)
    _add_batches(add)

    one = add("completion", "Print the completion of these commands for a shell.")
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")
    _add_output(one)
    return top


class _Adder:
    def __init__(self, parsers: Any, commands: Mapping[str, Command]) -> None:
        self._parsers, self._commands = parsers, commands

    def __call__(self, name: str, summary: str) -> argparse.ArgumentParser:
        """Add a command with the options that all have."""
        one: argparse.ArgumentParser = self._parsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(command=self._commands[name])
        return one


def _examples(name: str) -> str:
    lines = ["examples:"]
    for purpose, command in EXAMPLES[name]:
        lines += [f"  # {purpose}", f"  {command}"]
    return "\n".join(lines)


def _add_services(add: _Adder) -> None:
    one = add("up", "Start the embedded PostgreSQL and Storage server, and apply the migrations.")
    _add_output(one)
    one = add("down", "Stop the embedded services; their data stays.")
    _add_output(one)

    one = add("migrate", "Apply the pending migrations.")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("sample", "Write a synthetic dataset with real JPEGs.")
    one.add_argument("directory", metavar="DIR", help="a folder that does not exist yet, or is empty")
    one.add_argument("--recognitions", type=_number(0), default=200, metavar="N", help="how many trays (200)")
    one.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same bytes; another, other ids (0)")
    one.add_argument("--broken", action="store_true", help="add one of every kind of reject")
    _add_output(one)


def _add_loads(add: _Adder) -> None:
    one = add("load", "Load a dataset: photos to Storage, rows to PostgreSQL.")
    one.add_argument("--source", metavar="PATH", help="the dataset's folder (DATASET_DIR, or the usual places)")
    one.add_argument("--limit", type=_number(1), metavar="N", help="at most N new recognitions, lowest id first")
    one.add_argument("--force", action="store_true", help="load what is loaded already, as a new version")
    one.add_argument("--strict", action="store_true", help="check everything first; one reject refuses the batch")
    one.add_argument("--dry-run", action="store_true", help="print what would be loaded, and write nothing")
    _add_run(one)

    one = add("load-qwen", "Load the annotations of a vision model for what is loaded.")
    one.add_argument("--file", metavar="PATH", help="the annotations file (QWEN_ANNOTATIONS, or the usual places)")
    one.add_argument("--force", action="store_true", help="annotate anew what has annotations already")
    _add_run(one)


def _add_worker(add: _Adder) -> None:
    one = add("worker", "Help, on a further machine, with the batches that are being loaded; it needs a luigid.")
    one.add_argument("--workers", type=_number(1), default=1, metavar="N", help="worker processes (1)")
    one.add_argument("--idle", type=_number(0), default=60, metavar="SECONDS", help="leave without work so long (60)")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)


def _add_run(one: argparse.ArgumentParser) -> None:
    one.add_argument("--batch-id", metavar="ID", help="the batch (the newest unfinished one like it, or a new one)")
    one.add_argument("--workers", type=_number(1), default=1, metavar="N", help="worker processes (1)")
    one.add_argument("--local-scheduler", action="store_true", help="do not ask for a luigid")
    one.add_argument("--metrics-file", metavar="FILE", help="write the numbers for Prometheus's textfile collector")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)


def _add_batches(add: _Adder) -> None:
    one = add("reset", "Take a batch out again, as if it had never been loaded.")
    one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    one.add_argument("--confirm", action="store_true", help="do not ask, do it")
    one.add_argument("--dry-run", action="store_true", help="print what would go, and change nothing")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("status", "Show the environment, both connections, and the batches.")
    what = one.add_mutually_exclusive_group()
    what.add_argument("--batch-id", metavar="ID", help="show the numbers of this batch")
    what.add_argument("--check", action="store_true", help="look at everything that a load rests on, with remedies")
    one.add_argument("--source", metavar="PATH", help="with --check: the dataset, held against the bucket's limits")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("report", "Write a page about a batch: where its time went, its rejects, and trays with their boxes.")
    one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    one.add_argument("--out", metavar="FILE", help="the page (report-ID.html in the working directory)")
    one.add_argument("--sample", type=_number(0), default=12, metavar="N", help="recognitions to show (12)")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("verify", "Hold manifest and tables against the bucket, in both directions.")
    one.add_argument("--batch-id", metavar="ID", help="look at this batch only")
    one.add_argument("--deep", action="store_true", help="read every object and compare its content, too")
    one.add_argument("--repair", action="store_true", help="send again what is missing or damaged, remove orphans")
    one.add_argument("--quiet", action="store_true", help="leave out the lines of what is as it should be")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)


def _add_output(one: argparse.ArgumentParser) -> None:
    one.add_argument("--verbose", **_VERBOSE)
    one.add_argument("--json", **_JSON)
    one.add_argument("--log-format", **_LOG_FORMAT)


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "number"
    return number

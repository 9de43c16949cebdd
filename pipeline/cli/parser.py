"""The command-line parser: commands, options, and the examples that `--help` shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

Command = Callable[[argparse.Namespace], int]

_PRODUCTION: dict[str, Any] = {"action": "store_true", "help": "use .env.production; fail if it does not exist"}
_VERBOSE: dict[str, Any] = {"action": "store_true", "help": "log every step to stderr, and show tracebacks"}
_JSON: dict[str, Any] = {"action": "store_true", "help": "print the result as one JSON object on stdout"}
_LOG_FORMAT: dict[str, Any] = {
    "choices": ("text", "json"),
    "default": "text",
    "metavar": "FORMAT",
    "help": "format of stderr: text, or json with one object per line (text)",
}

#: Examples of each command: purpose and command line.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "up": (
        ("Start PostgreSQL and Storage below .pipeline", "python -m pipeline up"),
        ("Connect to them with psql", '(set -a; . .pipeline/env; psql "$DATABASE_URL")'),
    ),
    "down": (("Stop them and keep their data", "python -m pipeline down"),),
    "migrate": (("Create or update the tables of a Supabase project", "python -m pipeline migrate --production"),),
    "sample": (
        ("Write a thousand recognitions", "python -m pipeline sample /tmp/ds --recognitions 1000"),
        (
            "Write other recognitions, including one of every kind of reject",
            "python -m pipeline sample /tmp/ds2 --seed 2 --broken",
        ),
    ),
    "load": (
        ("Show what would be loaded", "python -m pipeline load --source /srv/ds --dry-run"),
        ("Load new recognitions with four processes", "python -m pipeline load --source /srv/ds --workers 4"),
        (
            "Load a hundred recognitions as a trial",
            "python -m pipeline load --source /srv/ds --limit 100 --batch-id trial",
        ),
        (
            "Resume it with the same options",
            "python -m pipeline load --source /srv/ds --limit 100 --batch-id trial",
        ),
        ("Load everything again as a new version", "python -m pipeline load --source /srv/ds --force"),
    ),
    "load-qwen": (
        ("Annotate the loaded photos", "python -m pipeline load-qwen --file /srv/ds/qwen_annotations.json"),
        ("Replace the annotations by those of another model", "python -m pipeline load-qwen --file new.json --force"),
    ),
    "worker": (
        ("Share a load that was started on another machine", "python -m pipeline worker --workers 4"),
        ("Work on every load for twelve hours", "python -m pipeline worker --production --idle 43200"),
    ),
    "reset": (
        (
            "Show what would be removed, and which versions would be restored",
            "python -m pipeline reset --batch-id b1 --dry-run",
        ),
        ("Remove a batch without a prompt", "python -m pipeline reset --batch-id b1 --confirm"),
    ),
    "status": (
        ("Check both connections, and list the batches", "python -m pipeline status --production"),
        ("Show the metrics of an earlier load", "python -m pipeline status --batch-id b1"),
        ("Check all prerequisites before the first load", "python -m pipeline status --check --source /srv/ds"),
    ),
    "report": (
        ("Write a page with twelve recognitions", "python -m pipeline report --batch-id b1"),
        (
            "Write one with fifty recognitions into the folder of a web server",
            "python -m pipeline report --batch-id b1 --sample 50 --out /srv/www/b1.html",
        ),
    ),
    "completion": (
        ("Enable completion in bash, from ~/.bashrc", 'eval "$(pipeline completion bash)"'),
        ("Enable completion in zsh, from a folder in $fpath", "pipeline completion zsh > ~/.zfunc/_pipeline"),
    ),
    "verify": (
        ("Show only the differences", "python -m pipeline verify --quiet"),
        ("Compare the content of every object, and repair", "python -m pipeline verify --deep --repair"),
    ),
}


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser; `options.command` is the function that runs the command."""
    top = argparse.ArgumentParser(
        prog="pipeline",
        description="Load datasets of canteen-tray photos into Supabase, in batches, exactly once.",
        epilog="First steps: `up`, `sample DIR`, `load --source DIR`, `report --batch-id ID`. `COMMAND --help` shows "
        "examples; `status --check` finds problems of the machine or the services, with remedies.",
    )
    add = _Adder(top.add_subparsers(required=True, metavar="COMMAND"), commands)
    _add_services(add)
    _add_loads(add)
    _add_worker(add)
    _add_batches(add)

    one = add("completion", "Print the completion script for a shell.")
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")
    _add_output(one)
    return top


class _Adder:
    def __init__(self, parsers: Any, commands: Mapping[str, Command]) -> None:
        self._parsers, self._commands = parsers, commands

    def __call__(self, name: str, summary: str) -> argparse.ArgumentParser:
        """Add a command, with its examples."""
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
    one = add("down", "Stop the embedded services and keep their data.")
    _add_output(one)

    one = add("migrate", "Apply the pending migrations.")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("sample", "Write a synthetic dataset with real JPEGs.")
    one.add_argument("directory", metavar="DIR", help="a new or empty folder")
    one.add_argument("--recognitions", type=_number(0), default=200, metavar="N", help="number of recognitions (200)")
    one.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed; the same seed writes the same bytes (0)"
    )
    one.add_argument("--broken", action="store_true", help="add one input of every kind of reject")
    _add_output(one)


def _add_loads(add: _Adder) -> None:
    one = add("load", "Load a dataset: photos into Storage, rows into PostgreSQL.")
    one.add_argument("--source", metavar="PATH", help="folder of the dataset (DATASET_DIR, or a default place)")
    one.add_argument("--limit", type=_number(1), metavar="N", help="at most N new recognitions, lowest id first")
    one.add_argument("--force", action="store_true", help="also load what is loaded already, as a new version")
    one.add_argument(
        "--strict",
        action="store_true",
        help="check everything before the upload, and refuse the batch if there is a reject",
    )
    one.add_argument("--dry-run", action="store_true", help="print what would be loaded; write nothing")
    _add_run(one)

    one = add("load-qwen", "Load the annotations of a vision model for loaded photos.")
    one.add_argument("--file", metavar="PATH", help="annotations file (QWEN_ANNOTATIONS, or a default place)")
    one.add_argument("--force", action="store_true", help="replace existing annotations")
    _add_run(one)


def _add_worker(add: _Adder) -> None:
    one = add("worker", "Process shards of running loads, on a further machine; needs a luigid.")
    one.add_argument("--workers", type=_number(1), default=1, metavar="N", help="worker processes (1)")
    one.add_argument(
        "--idle", type=_number(0), default=60, metavar="SECONDS", help="exit after so long without work (60)"
    )
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)


def _add_run(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--batch-id", metavar="ID", help="the batch (the newest unfinished one with the same options, or a new one)"
    )
    one.add_argument("--workers", type=_number(1), default=1, metavar="N", help="worker processes (1)")
    one.add_argument("--local-scheduler", action="store_true", help="do not use a luigid")
    one.add_argument("--metrics-file", metavar="FILE", help="write metrics for the textfile collector of Prometheus")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)


def _add_batches(add: _Adder) -> None:
    one = add("reset", "Remove a batch as if it had never been loaded.")
    one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    one.add_argument("--confirm", action="store_true", help="do not prompt")
    one.add_argument("--dry-run", action="store_true", help="print what would be removed; change nothing")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("status", "Show the environment, both connections, and the batches.")
    what = one.add_mutually_exclusive_group()
    what.add_argument("--batch-id", metavar="ID", help="show the metrics of this batch")
    what.add_argument("--check", action="store_true", help="check all prerequisites of a load, with remedies")
    one.add_argument(
        "--source", metavar="PATH", help="with --check: compare this dataset with the limits of the bucket"
    )
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("report", "Write a page about a batch: timings, rejects, and photos with their boxes.")
    one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    one.add_argument("--out", metavar="FILE", help="file to write (report-ID.html in the working directory)")
    one.add_argument("--sample", type=_number(0), default=12, metavar="N", help="number of recognitions to show (12)")
    one.add_argument("--production", **_PRODUCTION)
    _add_output(one)

    one = add("verify", "Compare manifest and tables with the bucket, in both directions.")
    one.add_argument("--batch-id", metavar="ID", help="check only this batch")
    one.add_argument("--deep", action="store_true", help="also read every object and compare its content")
    one.add_argument(
        "--repair", action="store_true", help="upload missing and damaged objects again, and remove orphans"
    )
    one.add_argument("--quiet", action="store_true", help="print only differences")
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

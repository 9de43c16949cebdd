"""The command-line parser: commands, options, and the examples that `--help` shows."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any, NoReturn

from pipeline.batches.held import MAXIMUM_REJECTS, check_max_rejects
from pipeline.cli.completion import complete_values
from pipeline.config import command_line
from pipeline.dataset.records import MAXIMUM_BIGINT
from pipeline.errors import UsageError
from pipeline.files import may_replace
from pipeline.observe.logger import say, show, writes_json

#: Runs a command; returns its exit code, None for success.
Command = Callable[[argparse.Namespace], int | None]

MOST_MINUTES = 24 * 60

_WITHOUT_PRODUCTION = ("up", "down", "sample", "completion")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the pipeline, with the nearest option as a hint."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument whose value a shell completes."""
        action = super().add_argument(*names, **options)
        complete_values(action)
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and raise UsageError for what is left: of a command, its own parser knows the nearest option."""
        found, rest = super().parse_known_args(args, namespace)
        if not rest:
            return found, rest
        word = rest[0].partition("=")[0]
        hint = did_you_mean(word, re.findall(r"--[a-z-]+", self.format_help()))
        raise self.failed(f"unrecognized argument {word}", hint)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise self.failed(message)

    def failed(self, message: str, hint: str = "") -> UsageError:
        """Show the usage, and return an error."""
        if not writes_json():
            say(self.format_usage().rstrip())
        usage = command_line(" ".join([*self.prog.split(" ")[1:], "--help"]))
        return UsageError(f"{message.rstrip('.')}.", hint or f"`{usage}` shows what there is.")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest of the known words, empty if none is near."""
    nearest = difflib.get_close_matches(word, list(known), 1)
    return f"Did you mean {nearest[0]}?" if nearest else ""


class _Version(argparse.Action):
    """Print the version of the distribution that this package came with."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        distributions = metadata.packages_distributions().get("pipeline", ())
        versions = [metadata.version(name) for name in distributions]
        show(f"{parser.prog} {versions[0] if versions else 'unknown'}")
        parser.exit()


def log_format(arguments: Sequence[str]) -> str:
    """Return the format of the log that the arguments ask for, also where they are wrong otherwise."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--log-format", nargs="?")
    return "json" if early.parse_known_args(arguments)[0].log_format == "json" else "text"


def parse(commands: Mapping[str, Command], arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the program; raise UsageError, with the nearest command as a hint."""
    parser, first = build_parser(commands), arguments[0] if arguments else ""
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        raise parser.failed(f"{first} stands before the command", "Write the command first, then its options.")
    if first and not first.startswith("-") and first not in commands:
        hint = did_you_mean(first, commands) or f"The commands are {', '.join(commands)}."
        raise parser.failed(f"there is no command {first}", hint)
    return parser.parse_args(arguments)


_Add = Callable[[str, str], _Parser]


@cache
def examples() -> dict[str, list[str]]:
    """Return the examples of each command, each a line `# <purpose>` and a command line."""
    _, *sections = files(__package__).joinpath("examples.txt").read_text(encoding="utf-8").split("## ")
    return {name: found for name, *found in (section.strip().split("\n\n") for section in sections)}


def build_parser(commands: Mapping[str, Command]) -> _Parser:
    """Return the parser; `options.command` is the function that runs the command, `options.name` its name."""
    top = _Parser(
        prog="pipeline",
        description="Load datasets of canteen-tray photos into Supabase, in batches, exactly once.",
        epilog="First steps: `up`, `sample DIR`, `load --source DIR`, `report --batch-id ID`. `COMMAND --help` shows "
        "examples; `status --check` finds problems of the machine or the services, with remedies.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parsers = top.add_subparsers(required=True, metavar="COMMAND", dest="name")

    def add(name: str, summary: str) -> _Parser:
        epilog, raw = "examples:\n" + indent("\n".join(examples()[name]), "  "), argparse.RawDescriptionHelpFormatter
        one = parsers.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=raw)
        one.set_defaults(command=commands[name])
        return one

    _add_services(add)
    _add_loads(add)
    _add_batches(add)
    one = add("completion", "Print the completion script for a shell.")
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")
    for name, one in parsers.choices.items():  # last, so that `--help` lists a command's own options first
        if name not in _WITHOUT_PRODUCTION:
            text = "use .env.production; fail if it does not exist"
            if name == "init":
                text = "write .env.production instead of .env.local, or check the one that is there"
            one.add_argument("--production", action="store_true", help=text)
        text = "log every step to stderr; show all timings, and tracebacks"
        one.add_argument("--verbose", action="store_true", help=text)
        one.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
        text = "format of stderr: text, or json with one object per line (text)"
        one.add_argument("--log-format", choices=("text", "json"), default="text", metavar="FORMAT", help=text)
    return top


def _add_services(add: _Add) -> None:
    add("up", "Start the embedded PostgreSQL and Storage server, and apply the migrations.")
    add("down", "Stop the embedded services and keep their data.")
    one = add("init", "Write the settings, luigi.cfg and the nightly jobs into this folder, and check the settings.")
    one.add_argument("--url", metavar="URL", help="URL of the project's API; key and DATABASE_URL are never options")
    one.add_argument("--source", metavar="PATH", help="folder of the dataset (DATASET_DIR, or a default place)")
    one.add_argument("--systemd", action="store_true", help="write systemd units instead of a crontab")
    text = "ask nothing: take the settings from the process environment"
    one.add_argument("--non-interactive", action="store_true", help=text)
    what = add("migrate", "Apply the pending migrations.").add_mutually_exclusive_group()
    text = "write those that DIR lacks, supabase/migrations of the app's repository, for the Supabase CLI; apply none"
    complete_values(what.add_argument("--export", metavar="DIR", help=text))
    text = "move our records from the history of the Supabase CLI to ingest.schema_migrations; apply none"
    what.add_argument("--release-history", action="store_true", help=text)
    one = add("sample", "Write a synthetic dataset with real JPEGs.")
    one.add_argument("directory", metavar="DIR", help="a new or empty folder")
    one.add_argument("--recognitions", type=_number(0), default=200, metavar="N", help="number of recognitions (200)")
    one.add_argument("--seed", type=int, default=0, metavar="S", help="random seed; equal seeds write equal bytes (0)")
    one.add_argument("--broken", action="store_true", help="add one input of every kind of reject and of notice")


def _add_loads(add: _Add) -> None:
    load = add("load", "Load a dataset: photos into Storage, rows into PostgreSQL.")
    qwen = add("load-qwen", "Load the annotations of a vision model for loaded photos.")
    worker = add("worker", "Process shards of running loads, on a further machine; needs a luigid.")
    found = add("discover", "Begin a load whose shards the processes of an array do: write its manifest.")
    shard = add("shard", "Upload and copy a slice of the shards of a batch, as a process of an array.")
    finish = add("finish", "Publish a batch whose shards are done.")

    for one in (load, found):
        one.add_argument("--source", metavar="PATH", help="folder of the dataset (DATASET_DIR, or a default place)")
        one.add_argument("--limit", type=_number(1), metavar="N", help="at most N new recognitions, lowest id first")
        one.add_argument("--strict", action="store_true", help="check all before uploads; a reject refuses the batch")
    for one in (qwen, found):
        text = "annotations file (QWEN_ANNOTATIONS, or a default place)"
        place: dict[str, Any] = {"nargs": "?", "const": ""} if one is found else {}  # without a value, a default place
        one.add_argument("--file", metavar="PATH", help=text, **place)
        text = "what a box's numbers are: pixels, 1000 (0 to 1000), 1 (0 to 1), or the size of resized photos (pixels)"
        one.add_argument("--coordinates", metavar="C", help=text)
        one.add_argument("--exif-turned", action="store_true", help="the model saw photos turned as EXIF data says")
    for one in (load, qwen, found):
        what = one.add_mutually_exclusive_group()
        what.add_argument("--force", action="store_true", help="also load what is loaded already, as a new version")
        what.add_argument("--changed", action="store_true", help="also load what changed since it was loaded")
        text = "the batch (the newest unfinished one with the same options, or a new one)"
        one.add_argument("--batch-id", metavar="ID", help=text)
    for one in (shard, finish):
        one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    for one in (load, qwen, finish):
        text = f"hold the batch if at least ten and more of it are rejected, a number or N%% ({MAXIMUM_REJECTS}%)"
        one.add_argument("--max-rejects", type=_max_rejects, default=MAXIMUM_REJECTS, metavar="N", help=text)
        _add_metrics_file(one)
    for one in (load, qwen, worker):
        one.add_argument("--workers", type=_number(1), default=1, metavar="N", help="worker processes (1)")
    for one in (load, qwen):
        one.add_argument("--local-scheduler", action="store_true", help="do not use a luigid")
    load.add_argument("--dry-run", action="store_true", help="print what would be loaded; write nothing")
    text = "exit when idle for this long (60)"
    worker.add_argument("--idle", type=_number(0), default=60, metavar="SECONDS", help=text)
    text = "the slice, from 0; several, or ranges such as 0-99 (the variable of Kubernetes, Slurm or AWS Batch)"
    shard.add_argument("--index", nargs="*", metavar="I", help=text)
    text = "number of slices; each is a range of shards, none where there are more slices than shards"
    shard.add_argument("--of", type=_number(1), required=True, metavar="N", help=text)


def _add_batches(add: _Add) -> None:
    adopt = add("adopt", "Put on record what another tool loaded, as finished batches.")
    publish = add("publish", "Publish a batch that is held.")
    reset = add("reset", "Remove a batch as if it had never been loaded.")
    status = add("status", "Show the environment, both connections, and the batches.")
    report = add("report", "Write a page about a batch: timings, rejects, and photos with their boxes.")
    verify = add("verify", "Compare manifest and tables with the bucket, in both directions.")

    for one in (publish, reset, report):
        one.add_argument("--batch-id", metavar="ID", required=True, help="the batch")
    adopt.add_argument("--undo", action="store_true", help="forget adopted batches instead; delete nothing")
    for one, what in ((adopt, "put on record"), (reset, "removed")):
        one.add_argument("--confirm", action="store_true", help="do not prompt")
        one.add_argument("--dry-run", action="store_true", help=f"print what would be {what}; change nothing")
    shown = status.add_mutually_exclusive_group()
    complete_values(shown.add_argument("--batch-id", metavar="ID", help="show the metrics of this batch"))
    shown.add_argument("--check", action="store_true", help="check all prerequisites of a load, with remedies")
    shown.add_argument("--all", action="store_true", help="list all batches, not only those that changed last")
    status.add_argument("--source", metavar="PATH", help="with --check: compare this dataset with the bucket's limits")
    text = "with --check: a problem (exit 3) if nothing, or not what is looked at regularly, was looked at for so long"
    status.add_argument("--max-age", type=_above_zero, metavar="HOURS", help=text)
    report.add_argument("--out", metavar="FILE", help="file to write (report-ID.html in the working directory)")
    report.add_argument("--sample", type=_number(0), default=12, metavar="N", help="recognitions to show (12)")
    verify.add_argument("--batch-id", metavar="ID", help="check only this batch")
    verify.add_argument("--deep", action="store_true", help="also read every object and compare its content")
    text = "with --deep: read the longest unread objects, until N minutes after the start"
    verify.add_argument("--minutes", type=partial(_above_zero, most=MOST_MINUTES), metavar="N", help=text)
    verify.add_argument("--repair", action="store_true", help="upload missing and damaged objects, remove orphans")
    verify.add_argument("--quiet", action="store_true", help="print only differences")
    _add_metrics_file(verify)


def _add_metrics_file(one: _Parser) -> None:
    text = "write metrics for Prometheus's textfile collector"
    one.add_argument("--metrics-file", type=_new_file, metavar="FILE", help=text)


def _new_file(text: str) -> Path:
    path = Path(os.path.realpath(text))  # what writes it replaces a link, and would replace a device
    with suppress(OSError):  # of a name that is too long, or in a folder that may not be searched
        if may_replace(path) and path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK):
            return path
    raise argparse.ArgumentTypeError(f"{text} is no file in an existing, writable folder")


def _max_rejects(text: str) -> str:
    check_max_rejects(text)
    return text


def _above_zero(text: str, most: float = sys.float_info.max) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= most:
            return float(text)
    limit = f" and at most {most:g}" if most == MOST_MINUTES else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0{limit}")


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not least <= int(text) <= MAXIMUM_BIGINT:
            bound = f"less than {least}" if int(text) < least else "too large"
            raise argparse.ArgumentTypeError(f"{text} is {bound}")
        return int(text)

    return number

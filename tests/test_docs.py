"""The documents tell what the code does: commands, options, settings, exit codes, rejects, tasks, links."""

from __future__ import annotations

import argparse
import ast
import configparser
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from io import StringIO
from pathlib import Path

import luigi
import pytest
from dotenv import dotenv_values

from pipeline import cli, config
from pipeline.cli import exit_codes
from pipeline.cli.parser import EXAMPLES
from pipeline.config import Tuning
from pipeline.graph import tasks
from pipeline.steps.discover import MAXIMUM_SHARDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))

OPTIONAL = ("STORAGE_BUCKET", "DATASET_DIR", "QWEN_ANNOTATIONS", "PIPELINE_HOME")
COMMON = {"--help", "--verbose", "--json", "--log-format"}
TUNING = [field.name for field in fields(Tuning)]


def section(title: str, text: str = README) -> str:
    """The text below a heading, up to the next one of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert match is not None, f"no heading {title}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def words(text: str) -> set[str]:
    """What stands in backticks, each as a whole."""
    return set(re.findall(r"`([^`\n]+)`", text))


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (one for one in cli.parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def options_of(name: str) -> set[str]:
    """The options of a command that not every command has."""
    actions = subcommands()[name]._actions
    every = {option for action in actions for option in action.option_strings if option.startswith("--")}
    assert every >= COMMON
    return every - COMMON


# Commands


@pytest.mark.parametrize("name", subcommands())
def test_each_command_has_its_usage_with_every_option(name: str) -> None:
    # The line of the command, and what is indented further below it.
    pattern = rf"^ +python -m pipeline {name}\b(.*\n(?: {{10,}}.*\n)*)"
    usage = re.search(pattern, section("Commands"), re.MULTILINE)
    assert usage is not None, f"no usage of {name}"
    assert set(re.findall(r"--[a-z-]+", usage[1])) == options_of(name)


@pytest.mark.parametrize("name", ["sample", "load", "load-qwen", "reset", "verify", "status", "report"])
def test_the_table_of_a_command_lists_its_options_and_no_others(name: str) -> None:
    first_table = next(part for part in section(f"`{name}`").split("\n\n") if part.startswith("|"))
    listed = {row[0].strip("`").split()[0] for row in rows(first_table)[1:]}
    assert listed == options_of(name)


def test_every_command_that_the_readme_calls_exists() -> None:
    for path in DOCUMENTS:
        called = set(re.findall(r"python -m pipeline ([a-z][a-z-]*)", path.read_text(encoding="utf-8")))
        assert called <= set(subcommands()), path


def test_the_options_of_the_luigi_command_are_those_of_the_tasks() -> None:
    paragraph = next(text for text in section("Under Luigi").split("\n\n") if text.startswith("Its own options"))
    ours = paragraph.split("`--workers`")[0]
    load, rest = ours.split("`LoadQwen` has")
    qwen, reset = rest.split("`ResetBatch`")
    for text, task in ((load, tasks.LoadBatch), (qwen, tasks.LoadQwen), (reset, tasks.ResetBatch)):
        parameters: list[tuple[str, object]] = task.get_params()  # type: ignore[no-untyped-call]
        assert words(text) == {f"--{name.replace('_', '-')}" for name, _ in parameters}


def test_the_options_that_all_commands_have_are_listed_once() -> None:
    first_table = next(part for part in section("Commands").split("\n\n") if part.startswith("|"))
    assert {row[0].strip("`").split()[0] for row in rows(first_table)[1:]} == COMMON


def test_the_manual_of_the_commands_is_what_the_parser_says_now() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import runpy; print(end=runpy.run_path('docs/commands.py')['page']())"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == made.stdout, "run `make docs`"


@pytest.mark.parametrize("name", subcommands())
def test_each_example_is_a_command_that_the_parser_takes(name: str) -> None:
    for purpose, example in EXAMPLES[name]:
        assert purpose
        for call in re.findall(r"(?:python -m )?pipeline ([a-z-]+[^)|>]*)", example.replace('"', "")):
            assert cli.parser().parse_args(shlex.split(call)).command is not None


# Exit codes


def test_the_table_of_exit_codes_is_that_of_the_commands() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert codes >= {code for _, code in exit_codes.EXIT_CODES}
    table = section("Exit codes").split("`luigi --module")[0]
    assert {int(row[0]) for row in rows(table)[1:]} == codes


def test_the_table_of_luigis_exit_codes_is_that_of_luigi_cfg() -> None:
    table = section("Exit codes").split("`luigi --module")[1]
    named = {row[1].strip("`"): row[0] for row in rows(table)[1:] if row[1]}
    assert named == dict(luigi_cfg()["retcode"])


# Settings


def test_the_table_of_variables_lists_all_that_config_reads() -> None:
    named = {row[0].strip("`") for row in rows(section("Environments and settings")) if row[0].strip("`").isupper()}
    assert named == {*config.REQUIRED, *OPTIONAL}
    read = set(re.findall(r'values\.get\("([A-Z_]+)"\)|environ\.get\("([A-Z_]+)"\)', source_of("config.py")))
    assert {one or other for one, other in read} == set(OPTIONAL)


def test_the_table_of_tuning_values_has_their_variables_defaults_and_bounds() -> None:
    table = {row[0].strip("`"): row[1:4] for row in rows(section("Environments and settings"))}
    for field in fields(Tuning):
        low, high = config._BOUNDS[field.name]
        expected = [f"`PIPELINE_{field.name.upper()}`", str(field.default), f"{low} to {high}"]
        assert table[field.name] == expected


def test_the_example_of_settings_has_every_variable_with_a_comment_and_no_secret() -> None:
    assignment = re.compile(r"^(?:# )?([A-Z_]+)=(.*)$")
    lines = EXAMPLE.splitlines()
    found = {}
    for before, line in itertools.pairwise(lines):
        match = assignment.match(line)
        if match:
            assert before.startswith("# "), f"no comment above {line}"
            assert not assignment.match(before), f"no comment above {line}"
            found[match[1]] = match[2]
    assert set(found) == {*config.REQUIRED, *OPTIONAL, *(f"PIPELINE_{name.upper()}" for name in TUNING)}
    assert dotenv_values(stream=StringIO(EXAMPLE)) == dict.fromkeys(config.REQUIRED, "")
    for field in fields(Tuning):
        assert found[f"PIPELINE_{field.name.upper()}"] == str(field.default)
    assert found["STORAGE_BUCKET"] == "recognitions"
    assert config.redact(EXAMPLE).count("***") == EXAMPLE.count("user:password@")


def luigi_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "luigi.cfg", encoding="utf-8")
    return parser


def test_luigi_cfg_has_the_tuning_defaults() -> None:
    assert dict(luigi_cfg()["pipeline"]) == {field.name: str(field.default) for field in fields(Tuning)}


def test_luigi_cfg_names_the_luigid_that_the_readme_starts() -> None:
    address = re.search(r"^luigid --address (\S+) --port (\d+) .*(http://\S+)$", README, re.MULTILINE)
    assert address is not None
    assert luigi_cfg()["core"]["scheduler_url"] == f"http://{address[1]}:{address[2]}/" == f"{address[3]}/"
    assert "`scheduler_url`" in section("Under Luigi")


# Rejects


def source_of(name: str) -> str:
    return (ROOT / "pipeline" / name).read_text(encoding="utf-8")


def reject_codes(texts: list[str]) -> set[str]:
    """Every code that BadInput, Reject and `reject` are given, found in the syntax; an unknown form is an error."""
    trees = [ast.parse(text) for text in texts]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    kinds = {text_of(call.args[2]) for call in calls if called(call) == "read_file"}
    helpers = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    codes: set[str] = set()
    for call in calls:
        position = {"BadInput": 0, "reject": 0, "Reject": 2}.get(called(call))
        if position is None or len(call.args) <= min(position, 1):
            continue
        codes.update(codes_of(call.args[position], kinds, helpers))
    return codes


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def text_of(expression: ast.expr) -> str:
    assert isinstance(expression, ast.Constant)
    assert isinstance(expression.value, str)
    return expression.value


def codes_of(argument: ast.expr, kinds: set[str], helpers: dict[str, ast.FunctionDef]) -> Iterator[str]:
    if isinstance(argument, ast.Constant):
        yield text_of(argument)
    elif isinstance(argument, ast.JoinedStr):
        # f"{kind}_changed", once for each kind that read_file is called with
        prefix, suffix = argument.values
        assert isinstance(prefix, ast.FormattedValue)
        for kind in kinds:
            yield kind + text_of(suffix)
    elif isinstance(argument, ast.Starred):
        assert isinstance(argument.value, ast.Call)
        for node in ast.walk(helpers[called(argument.value)]):
            if isinstance(node, ast.Return):
                assert isinstance(node.value, ast.Tuple)
                yield from codes_of(node.value.elts[0], kinds, helpers)
    else:
        # A code that is handed on, from an exception or from a parameter, was counted where it came from.
        assert ast.unparse(argument) in ("code", "exc.code"), f"a reject code of unknown form: {ast.unparse(argument)}"


def test_the_table_of_rejects_lists_every_code_that_the_code_gives_and_no_other() -> None:
    listed = [row[0].strip("`") for row in rows(section("Rejects"))[1:]]
    assert len(listed) == len(set(listed))
    in_sql = set()
    for path in (ROOT / "pipeline" / "sql").glob("*.sql"):
        if "INSERT INTO pg_temp.found" in path.read_text(encoding="utf-8"):
            in_sql |= set(re.findall(r"'([a-z_]+)'", path.read_text(encoding="utf-8")))
    assert set(listed) == in_sql | reject_codes([path.read_text(encoding="utf-8") for path in SOURCES])


def test_reject_codes_are_found_in_every_form_that_the_code_uses() -> None:
    text = """
def _why(): return "from_helper", "a sentence"
def read_file(source, file, kind): raise BadInput(f"{kind}_formatted", "a sentence")
def work():
    read_file(source, file, "one")
    read_file(source, file, "two")
    raise BadInput("constant", "a sentence")
    raise BadInput(*_why())
    return reject("local", "a sentence")
    return Reject(1, "a path", "direct", "a sentence")
    return Reject(1, "a path", exc.code, exc.message)
"""
    assert reject_codes([text]) == {"from_helper", "one_formatted", "two_formatted", "constant", "local", "direct"}
    with pytest.raises(AssertionError, match="unknown form"):
        reject_codes(['raise BadInput(CODES[1], "a sentence")'])


# Architecture, links


def test_the_architecture_names_every_task_and_every_table() -> None:
    families = [name for name in tasks.__all__ if issubclass(getattr(tasks, name), luigi.Task)]
    assert len(families) >= 5
    assert [name for name in families if not re.search(rf"\b{name}\b", ARCHITECTURE)] == []
    migrations = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "supabase").rglob("*.sql")))
    tables = re.findall(r"^CREATE (?:TABLE|VIEW) [a-z]+\.([a-z_]+)", migrations, re.MULTILINE)
    assert len(tables) >= 15
    assert [name for name in tables if name not in words(section("The tables", ARCHITECTURE))] == []


def test_each_promise_names_tests_that_there_are() -> None:
    table = rows(section("The promises", ARCHITECTURE))[1:]
    assert len(table) == 6
    there = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    for promise, _, shown in table:
        assert words(shown), promise
        assert words(shown) <= there, promise


def test_the_architecture_has_four_pages_and_one_diagram() -> None:
    assert len(ARCHITECTURE.split()) < 2200
    blocks = re.split(r"\n(?=\S)", ARCHITECTURE)
    assert len([block for block in blocks if re.search(r"^ {4}.*[│┬┴┼─▼]", block, re.MULTILINE)]) == 1
    assert f" {MAXIMUM_SHARDS} shards" in ARCHITECTURE


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_and_headings_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).is_file(), target


def test_the_messages_under_troubleshooting_are_those_that_the_code_says() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    said = [path.read_text(encoding="utf-8") for path in (ROOT / "supabase").rglob("*.sql")]
    said += reject_codes(texts)
    for tree in map(ast.parse, texts):
        said += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    symptoms = [message for row in rows(section("Troubleshooting"))[1:] for message in words(row[0])]
    assert len(symptoms) >= 15
    for symptom in symptoms:
        for part in filter(None, (part.strip() for part in symptom.split("…"))):
            assert any(part in text for text in said), part


def test_the_make_targets_that_the_readme_names_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    code = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    named = set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE))
    assert named == set(phony[1].split())


def test_the_changelog_begins_with_what_is_unreleased_or_with_a_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert titles
    assert titles[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles)
    assert set(re.findall(r"^### (.+)$", changelog, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }

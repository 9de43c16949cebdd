"""The documents state what the code does: commands, options, settings, exit codes, rejects, tasks, links."""

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

import pipeline
from pipeline import cli, config
from pipeline.cli import output
from pipeline.cli.parser import examples
from pipeline.config import Tuning
from pipeline.dataset.clutter import CLUTTER
from pipeline.dataset.records import FILE_CLASSES
from pipeline.steps.discover import MAXIMUM_SHARDS
from tests import nights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
LUIGI = (ROOT / "docs" / "guides" / "luigi.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
REJECTS = (ROOT / "docs" / "reference" / "rejects.md").read_text(encoding="utf-8")
DATASET = (ROOT / "docs" / "reference" / "dataset.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))

OPTIONAL = ("STORAGE_BUCKET", "DATASET_DIR", "QWEN_ANNOTATIONS", "PIPELINE_HOME", "PING_URL", "NOTIFY_URLS")
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


def test_the_readme_fits_on_150_lines_and_names_every_command() -> None:
    assert len(README.splitlines()) <= 150
    named = [name for row in rows(section("Commands"))[1:] for name in re.findall(r"`([a-z-]+)`", row[0])]
    assert sorted(named) == sorted(subcommands())


@pytest.mark.parametrize("name", subcommands())
def test_the_reference_has_each_command_with_its_options(name: str) -> None:
    text = section(name, COMMANDS)
    listed = {row[0].strip("`").split()[0] for row in rows(text)[1:]}
    assert {one for one in listed if one.startswith("--")} == options_of(name)
    usage = re.search(rf"^    python -m pipeline {name}\b.*$", text, re.MULTILINE)
    assert usage is not None
    assert set(re.findall(r"--[a-z-]+", usage[0])) == options_of(name)


def test_the_reference_has_the_options_of_every_command_once() -> None:
    table = rows(section("Options of every command", COMMANDS))[1:]
    assert {one for row in table for one in re.findall(r"--[a-z-]+", row[0])} == COMMON
    assert {word.split()[0] for word in words(section("Commands"))} >= COMMON


def test_the_luigi_guide_has_the_options_of_each_task() -> None:
    table = {row[0].strip("`"): words(row[1]) for row in rows(LUIGI.split("## ")[0])[1:]}
    assert set(table) == {"LoadBatch", "LoadNight", "LoadQwen", "ResetBatch"}
    for name, options in table.items():
        parameters: list[tuple[str, object]] = getattr(pipeline, name).get_params()
        asked = {parameter for parameter, _ in parameters} - {"supabase_project"}
        assert options == {f"--{parameter.replace('_', '-')}" for parameter in asked}


def made(script: str, *arguments: str) -> str:
    """Return the page that a script of docs/ makes now."""
    program = f"import runpy, sys; print(end=runpy.run_path('docs/{script}')['page'](*sys.argv[1:]))"
    run = [sys.executable, "-c", program, *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout


def test_the_reference_of_commands_is_current() -> None:
    assert made("commands.py") == COMMANDS, "run `make docs`"


def test_the_reference_of_luigis_habits_is_current() -> None:
    page = (ROOT / "docs" / "reference" / "luigi.md").read_text(encoding="utf-8")
    assert made("habits.py") == page, "run `make docs`"
    assert len(rows(page)) >= 30
    outcomes = [row[1] for row in rows(page) if row != ["habit", "outcome", "test"]]
    assert all(re.match("works|refused|fails in Luigi", outcome) for outcome in outcomes)
    assert {name for row in rows(page)[1:] for name in words(row[2])} <= named_tests()


def test_the_reference_of_the_database_is_current(database_url: str) -> None:
    page = (ROOT / "docs" / "reference" / "database.md").read_text(encoding="utf-8")
    assert made("database.py", database_url) == page, "run `make docs`"


def test_the_table_of_nights_is_current() -> None:
    text = nights.GUIDE.read_text(encoding="utf-8")
    assert all(f"| {kind.what} |" in text for kind in nights.KINDS.values())
    assert nights.page(text) == text


@pytest.mark.parametrize("name", subcommands())
def test_each_example_is_a_command_that_the_parser_takes(name: str) -> None:
    for purpose, example in (lines.split("\n") for lines in examples()[name]):
        assert purpose.startswith("# ")
        for call in re.findall(r"(?:python -m )?pipeline ([a-z-]+[^)|>]*)", example.replace('"', "")):
            assert cli.parser().parse_args(shlex.split(call)).command is not None


# Exit codes


def test_the_table_of_exit_codes_is_that_of_the_commands() -> None:
    codes = {value for name, value in vars(output).items() if name.isupper() and isinstance(value, int)}
    assert codes >= set(output.EXIT_CODES.values())
    assert {int(row[0]) for row in rows(section("Exit codes"))[1:]} == codes


def test_the_table_of_luigis_exit_codes_is_that_of_luigi_cfg() -> None:
    named = {row[1].strip("`"): row[0] for row in rows(section("Exit codes", LUIGI))[1:] if row[1]}
    assert named == dict(luigi_cfg()["retcode"])


# Settings


def test_the_table_of_variables_lists_all_that_config_reads() -> None:
    named = {row[0].strip("`") for row in rows(section("Variables", SETTINGS)) if row[0].strip("`").isupper()}
    assert named == {*config.REQUIRED, *OPTIONAL}
    read = set(re.findall(r'values\.get\("([A-Z_]+)"\)|environ\.get\("([A-Z_]+)"\)', source_of("config.py")))
    assert {one or other for one, other in read} == set(OPTIONAL)


def test_the_tuning_table_has_variables_defaults_and_bounds() -> None:
    table = {row[0].strip("`"): row[1:4] for row in rows(section("Tuning", SETTINGS))}
    for field in fields(Tuning):
        low, high = field.metadata["bounds"]
        expected = [f"`PIPELINE_{field.name.upper()}`", str(field.default), f"{low} to {high}"]
        assert table[field.name] == expected


def test_env_example_has_every_variable_with_a_comment_and_no_secret() -> None:
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


def test_luigi_cfg_names_the_luigid_that_the_guide_starts() -> None:
    address = re.search(r"^luigid --address (\S+) --port (\d+) .*(http://\S+)$", LUIGI, re.MULTILINE)
    assert address is not None
    core = luigi_cfg()["core"]
    assert (core["scheduler_host"], core["scheduler_port"]) == address.groups()[:2]
    assert address[3] == f"http://{address[1]}:{address[2]}"
    assert "`scheduler_host` and `scheduler_port`" in LUIGI


def test_the_table_of_events_lists_all_that_are_logged() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    logged = {one for text in texts for one in re.findall(r"""(?:_event\(|_log\(|event=)"(\w+)\"""", text)}
    listed = {row[0].strip("`") for row in rows(section("Log", SETTINGS)) if len(row) == 3}
    assert listed == {"event", *logged}


# Rejects


def source_of(name: str) -> str:
    return (ROOT / "pipeline" / name).read_text(encoding="utf-8")


def reject_codes(texts: list[str]) -> set[str]:
    """Every code that BadInput, Reject and `reject` are given."""
    return codes_given(texts, {"BadInput": 0, "reject": 0, "Reject": 2})


def codes_given(texts: list[str], positions: dict[str, int]) -> set[str]:
    """Every code that the named calls are given, found in the syntax; an unknown form is an error."""
    trees = [ast.parse(text) for text in texts]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    kinds = {text_of(call.args[2]) for call in calls if called(call) == "read_file"}
    helpers = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    codes: set[str] = set()
    for call in calls:
        position = positions.get(called(call))
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
    elif isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Call):
        for node in ast.walk(helpers[called(argument.value)]):
            if isinstance(node, ast.Return):
                assert isinstance(node.value, ast.Tuple)
                yield from codes_of(node.value.elts[0], kinds, helpers)
    else:
        # A code that is handed on, from an exception or from a parameter, was counted where it came from.
        assert ast.unparse(argument) in ("code", "exc.code", "one.code", "*one"), (
            f"a code of unknown form: {ast.unparse(argument)}"
        )


def listed_codes(text: str) -> set[str]:
    """The codes of the table in a text, each there once."""
    listed = [row[0].strip("`") for row in rows(text)[1:]]
    assert len(listed) == len(set(listed))
    return set(listed)


def codes_in_sql(insert: str) -> set[str]:
    """The codes in the queries with such a statement."""
    found = set()
    for path in (*(ROOT / "pipeline").rglob("*.sql"), *(ROOT / "supabase").rglob("*.sql")):
        for query in re.split(
            r"^-- name: \w+$|^CREATE OR REPLACE FUNCTION |;$", path.read_text(encoding="utf-8"), flags=re.MULTILINE
        ):
            if insert in query:
                found |= set(re.findall(r"'([a-z]+_[a-z_]+)'", query))
    return found


def test_the_table_of_notices_has_exactly_the_codes_of_the_code() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    in_sql = codes_in_sql("INSERT INTO ingest.notices") | codes_in_sql("message, is_notice)")
    assert listed_codes(section("Notices", REJECTS)) == in_sql | codes_given(texts, {"Deviation": 0, "Notice": 2})


def test_the_table_of_rejects_has_exactly_the_codes_of_the_code() -> None:
    listed = listed_codes(REJECTS.partition("## Notices")[0])
    in_sql = codes_in_sql("recognition_id, path, code, message)")
    assert listed == in_sql | reject_codes([path.read_text(encoding="utf-8") for path in SOURCES])


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


def test_the_reference_lists_all_clutter() -> None:
    table = rows(section("Every file is accounted for", DATASET))
    listed = {row[0]: tuple(re.findall(r"`([^`]+)`", row[1].replace(r"\r", "\r"))) for row in table}
    assert {who: listed.get(who) for who in CLUTTER} == CLUTTER
    assert {row[0].strip("`") for row in table} >= set(FILE_CLASSES)


# Architecture, links


def test_the_architecture_names_every_task_and_every_table() -> None:
    families = [name for name, one in vars(pipeline).items() if isinstance(one, type) and issubclass(one, luigi.Task)]
    assert len(families) >= 5
    assert [name for name in families if not re.search(rf"\b{name}\b", ARCHITECTURE)] == []
    migrations = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "supabase").rglob("*.sql")))
    tables = re.findall(r"^ *CREATE (?:TABLE|VIEW)(?: IF NOT EXISTS)? [a-z]+\.([a-z_]+)", migrations, re.MULTILINE)
    assert len(tables) >= 15
    assert [name for name in tables if name not in words(section("The tables", ARCHITECTURE))] == []


def named_tests() -> set[str]:
    """Return the names of all tests."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_each_promise_names_tests_that_there_are() -> None:
    table = rows(section("The promises", ARCHITECTURE))[1:]
    assert len(table) == 6
    for promise, _, shown in table:
        assert words(shown), promise
        assert words(shown) <= named_tests(), promise


def test_each_limit_and_each_kind_of_waiting_names_tests_that_there_are() -> None:
    text = (ROOT / "docs" / "reference" / "limits.md").read_text(encoding="utf-8")
    waits = rows(section("SIGTERM and Ctrl-C", text))[1:]
    *limits, _ = rows(section("Time and memory", text))[1:]
    for name, _, shown in limits + waits:
        assert words(shown), name
        assert words(shown) <= named_tests(), name
    of_waits = (ROOT / "tests" / "test_interrupts.py").read_text(encoding="utf-8")
    assert {name for _, _, shown in waits for name in words(shown)} == set(re.findall(r"def (test_\w+)", of_waits))


def test_the_architecture_has_four_pages_and_one_diagram() -> None:
    assert len(ARCHITECTURE.split()) < 2200
    blocks = re.split(r"\n(?=\S)", ARCHITECTURE)
    assert len([block for block in blocks if re.search(r"^ {4}.*[│┬┴┼─▼]", block, re.MULTILINE)]) == 1
    assert f" {MAXIMUM_SHARDS} shards" in ARCHITECTURE


def test_private_names_and_tricks_have_a_table() -> None:
    assert rows(section("Private names of other packages", ARCHITECTURE))[0] == ["name", "package", "why", "test"]
    performance = (ROOT / "docs" / "explanation" / "performance.md").read_text(encoding="utf-8")
    assert rows(section("Tricks: gain on the whole load", performance))[0][1] == "gain on the whole load"


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_and_headings_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert {path for path in DOCUMENTS if path.name != "README.md"} <= linked


def test_the_messages_under_troubleshooting_are_those_that_the_code_says() -> None:
    services = sorted((ROOT / "embedded_supabase").rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *services)]
    said = [path.read_text(encoding="utf-8") for path in (ROOT / "supabase").rglob("*.sql")]
    said += reject_codes(texts)
    for tree in map(ast.parse, texts):
        said += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    symptoms = [message for row in rows(TROUBLESHOOTING)[1:] for message in words(row[0])]
    assert len(symptoms) >= 15
    for symptom in symptoms:
        for part in filter(None, (part.strip() for part in symptom.split("…"))):
            assert any(part in text for text in said), part


def test_the_make_targets_in_contributing_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    code = "\n".join(re.findall(r"```sh\n(.*?)```", CONTRIBUTING, re.DOTALL))
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

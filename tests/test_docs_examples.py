"""Every command line and every statement in the documents is parsed, and runs where a test can run it.

The blocks of a document run in their order, in a folder with the settings of both environments and a dataset. Paths
such as /srv/datasets lead into the folder of the test. `make`, `pip` and `ssh` lines are checked and not run. The
result of a load that a document shows is that of its run.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import luigi.tools.range
import psycopg2
import pytest

import pipeline
from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from embedded_supabase.postgres.installation import binaries
from pipeline import cli
from pipeline.config import Settings
from pipeline.graph.luigid import answers
from tests.runner import Ended, ForkServer, start_forked
from tests.services import (
    REPOSITORY,
    MakeDataset,
    end_group,
    environment_file,
    give_data,
    subprocess_environment,
)
from tests.test_docs import CONTRIBUTING, DOCUMENTS, luigi_cfg, subcommands, words

DOCS = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
SECONDS = 120

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"(?:python -m pipeline|(?<![\w/.-])pipeline) (?=[a-z-]+\b)([^|;&>)\n]*)")
_BARE = re.compile(r"luigi --module pipeline ([^|;&>)\n]*)")
#: One command without anything that a shell would interpret; what starts services is left to a shell.
_COMMAND = re.compile(r"(python -m pipeline|pipeline|luigi) (?!up\b|down\b|init\b)([^|&;<>$`*?~]*)")
_LUIGI_OPTIONS = {"--workers", "--local-scheduler"}

#: What runs before a document's own blocks.
_LOAD = "python -m pipeline load --source /srv/datasets/RRS_Dataset --batch-id b1"
_ANNOTATE = "python -m pipeline load-qwen --file /srv/datasets/qwen_annotations.json --batch-id q1"
_LUIGID = "luigid --address 127.0.0.1 --port 8082 --state-path luigid.state"
PRELUDES: dict[str, tuple[str, ...]] = {
    "docs/guides/annotations.md": (_LOAD,),
    "docs/guides/from-the-older-script.md": (f"{_LOAD} --limit 1",),
    "docs/guides/reset-and-verify.md": (_LOAD, f"{_LOAD.removesuffix('b1')}b2 --force"),
    "docs/guides/several-machines.md": (_LUIGID, _LOAD),
    "docs/guides/your-app.md": (_LOAD, _ANNOTATE),
    "docs/reference/commands.md": (_LUIGID, f"{_LOAD} --limit 2"),
    "docs/reference/rejects.md": (_LOAD,),
}
#: Documents that begin with `up`, on a machine without settings.
ALONE = ("README.md", "docs/tutorial.md")
#: Parts of a Supabase project that example policies name.
_SUPABASE = """
CREATE SCHEMA auth;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql AS $$ SELECT gen_random_uuid() $$;
CREATE SCHEMA storage;
CREATE TABLE storage.objects (bucket_id text);
"""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and content of each block."""
    for match in _BLOCK.finditer(text):
        yield match[1], match[2]


def lines(block: str) -> list[str]:
    """Return the command lines of a shell block."""
    joined = block.replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, joined) if line and not line.startswith("#")]


def shell_lines(text: str) -> list[str]:
    return [line for language, block in blocks(text) if language == "sh" for line in lines(block)]


def words_of(call: str) -> list[str]:
    return shlex.split(call.replace('"', " "), comments=True)


# Every line is parsed


@pytest.mark.parametrize("name", DOCS)
def test_every_call_of_a_command_is_one_that_the_parser_takes(name: str) -> None:
    inline = [code for code in words(DOCS[name]) if "…" not in code and "COMMAND" not in code]
    for text in (*inline, *shell_lines(DOCS[name])):
        for call in _CALL.findall(text.replace("$(pipeline", "$( pipeline")):
            arguments = words_of(call)
            if {"--help", "--version"} & set(arguments):
                continue
            assert cli.parser().parse_args(arguments).command is not None, call


@pytest.mark.parametrize("name", DOCS)
def test_every_call_of_the_luigi_command_names_a_task_and_its_options(name: str) -> None:
    for call in _BARE.findall("\n".join([*words(DOCS[name]), *shell_lines(DOCS[name])])):
        family, *arguments = words_of(call)
        if family == "…":
            continue
        task = getattr(pipeline, family, None) or getattr(luigi.tools.range, family)
        parameters: list[tuple[str, object]] = task.get_params()
        known = {f"--{parameter.replace('_', '-')}" for parameter, _ in parameters} | _LUIGI_OPTIONS
        assert {one for one in arguments if one.startswith("--")} <= known, call


@pytest.mark.parametrize("name", DOCS)
def test_every_command_in_the_text_has_the_options_that_it_is_named_with(name: str) -> None:
    parsers = subcommands()
    for code in words(DOCS[name]):
        command, *arguments = code.split()
        if command in parsers:
            known = {option for action in parsers[command]._actions for option in action.option_strings}
            assert {one for one in arguments if one.startswith("-")} <= known, code


@pytest.mark.parametrize("name", DOCS)
def test_blocks_have_a_language_and_json_is_json(name: str) -> None:
    text = DOCS[name]
    assert text.count("```") == 2 * len(list(blocks(text)))
    for language, block in blocks(text):
        assert language in {"sh", "sql", "json", "yaml", "python", "js", "text", "mermaid"}, language
        if language == "json":
            json.loads(block)


# Every line runs


class Shell:
    """A folder in which the lines of a document run.

    Arguments:
        root: the folder that /srv and /tmp stand for; the working directory is below it.
        server: forks for a line that is one command of ours or of Luigi's; bash runs the others.
    """

    def __init__(self, root: Path, settings: Settings, server: ForkServer) -> None:
        self.folder, self.settings = root / "work", settings
        self._root, self._server = root, server
        self.printed = ""  # by all lines, on stdout
        self._started: list[subprocess.Popen[str]] = []

    def run(self, line: str) -> None:
        """Run a line, or check it where a test cannot run it."""
        for pattern, check in _CHECKED.items():
            if match := re.match(pattern, line):
                check(match)
                return
        if line.startswith("luigid "):
            self._start_luigid(line)
            return
        typed = self._here(line)
        if "pipeline init" in line:  # as from a terminal, on which its reader answers
            answers = " ".join(environment_file(self.settings).splitlines())
            typed = f"{answers} {typed} --non-interactive --source {self._root}/srv/datasets/RRS_Dataset"
        ended = self._fork(typed) or self._bash(typed)
        self.printed += ended.stdout
        assert ended.code in _codes(line), f"{line}\n{ended.code}\n{ended.stdout}\n{ended.stderr}"

    def execute(self, statements: str) -> None:
        """Run SQL as the owner of the tables."""
        with closing(psycopg2.connect(self.settings.database_url.reveal())) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statements)

    def run_python(self, program: str) -> None:
        """Run the task `Nightly` of a module with Luigi's own command."""
        (self.folder / "nightly.py").write_text(self._here(program), encoding="utf-8")
        ended = self._bash("luigi --module nightly Nightly --local-scheduler")
        assert ended.code == 0, ended.stderr

    def fill_in(self, path: Path) -> None:
        """Add settings to a file of variables, as its reader does."""
        with path.open("a", encoding="utf-8") as file:
            file.write(environment_file(self.settings))
            file.write(f"DATASET_DIR={self._root}/srv/datasets/RRS_Dataset\n")

    def close(self) -> None:
        """Stop what the lines started."""
        for process in self._started:
            end_group(process)
        if (self.folder / ".pipeline" / "postgres").exists():
            assert self._bash("python -m pipeline down").code == 0

    def _fork(self, line: str) -> Ended | None:
        """Run a line that is one command; return None for a line that needs a shell, or a process of its own."""
        match = _COMMAND.fullmatch(line)
        if match is None:
            return None
        output = Path(tempfile.mkdtemp(dir=self._root))
        program = "luigi" if match[1] == "luigi" else "pipeline"
        arguments = shlex.split(match[2], comments=True)
        return start_forked(self._server, output, self.folder, arguments, self._environment(), program).finish(SECONDS)

    def _bash(self, line: str) -> Ended:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr, [])

    def _environment(self) -> dict[str, str]:
        environment = subprocess_environment()
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}:{binaries()}"
        environment["PYTHONPATH"] += f":{self.folder}"
        return environment

    def _here(self, line: str) -> str:
        """Return a line with its paths below this folder; samples are small, and a worker does not wait for work.

        A sample with broken input keeps its size, in which that is less than a tenth.
        """
        line = re.sub(r"(?<![\w.])/(srv|tmp)(?=/)", rf"{self._root}/\1", line)
        line = re.sub(r"--recognitions \d+\b(?! --broken)", "--recognitions 20", line)
        line = line.replace("/object/sign/recognitions/", f"/object/sign/{self.settings.bucket}/")
        if " worker " in line:
            line = re.sub(r" --idle \d+", "", line) + " --idle 0"
        return line

    def _start_luigid(self, line: str) -> None:
        """Start luigid at a free port of loopback, and name that in luigi.cfg."""
        port = free_port()
        line = re.sub(r"--address \S+", "--address 127.0.0.1", re.sub(r"--port \d+", f"--port {port}", line))
        with (self.folder / "luigid.log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                encoding="utf-8",
                start_new_session=True,
            )
        self._started.append(process)
        url = f"http://127.0.0.1:{port}"
        assert wait_until(lambda: answers(url) or process.poll() is not None, SECONDS)
        assert process.poll() is None
        configuration = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
        changed = configuration.replace("scheduler_port = 8082", f"scheduler_url = {url}/")
        (self.folder / "luigi.cfg").write_text(changed, encoding="utf-8")


def _codes(line: str) -> set[int]:
    """Return the exit codes that a line may end with: what --check finds on this machine is not the document's."""
    return {0, 2, 3} if re.search(" --check| init ", line) else {0}


def _check_make(match: re.Match[str]) -> None:
    assert f"\n{match[1]}:" in (REPOSITORY / "Makefile").read_text(encoding="utf-8"), match[0]


def _check_extra(match: re.Match[str]) -> None:
    assert f'"{match[1]}"' in (REPOSITORY / "setup.py").read_text(encoding="utf-8"), match[0]


def _check_tests(match: re.Match[str]) -> None:
    assert (REPOSITORY / match[1]).is_file(), match[0]


def _check_port(match: re.Match[str]) -> None:
    assert match[1] == luigi_cfg()["core"]["scheduler_port"], match[0]


def _run_elsewhere(match: re.Match[str]) -> None:
    """Leave a line to another test."""


#: Lines that a test must not run, and what holds of them.
_CHECKED: dict[str, Callable[[re.Match[str]], None]] = {
    r"make (\S+)": _check_make,
    r"pip install (?:-e )?'\.\[(\w+)\]'$": _check_extra,
    r"pip install (?:--upgrade )?\.$": _run_elsewhere,  # tests/test_packaging.py
    r"python3 -m venv \.venv && \. \.venv/bin/activate$": _run_elsewhere,  # tests/test_packaging.py
    r"supabase migration up ": _run_elsewhere,  # tests/system/test_supabase_cli.py
    r"uvx --from \S+ pipeline ": _run_elsewhere,  # tests/system/test_uvx.py
    r"sudo (cp systemd/|systemctl )": _run_elsewhere,  # tests/test_init.py
    r"(?:[A-Z_]+=\d+ )*\.venv/bin/python -m pytest -q (?:--project app )?(\S+)$": _check_tests,
    r"ssh -N -L (\d+):127\.0\.0\.1:\1 first-machine$": _check_port,
}


@pytest.fixture
def shell(
    request: pytest.FixtureRequest,
    short_folder: Path,
    clean_environment: None,
    settings: Settings,
    own_dataset: MakeDataset,
    made_data: Path,
    fork_server: ForkServer,
) -> Iterator[Shell]:
    """A shell for the document that the test names, with what its first line expects."""
    name = request.node.callspec.params["name"]
    # The user of an embedded PostgreSQL must be able to reach this folder, so it is not below tmp_path. With a longer
    # name, its socket would be in a folder elsewhere, which stays.
    root = short_folder / uuid.uuid4().hex[:8]
    root.mkdir(mode=0o711)
    work, datasets = root / "work", root / "srv" / "datasets"
    for folder in (work, datasets, root / "srv" / "reports", root / "tmp", root / "app" / "supabase" / "migrations"):
        folder.mkdir(parents=True)
    (Path.home() / ".zfunc").mkdir()
    dataset = Path(shutil.move(own_dataset(12), datasets / "RRS_Dataset"))
    for link in (datasets / "2025-10", root / "srv" / "ds"):
        link.symlink_to(dataset)
    for copy in (datasets / "qwen_annotations.json", work / "new.json"):
        shutil.copy(dataset / "qwen_annotations.json", copy)
    shutil.copy(REPOSITORY / "luigi.cfg", work)
    shell = Shell(root, settings, fork_server)
    if name not in ALONE:
        shell.fill_in(work / ".env.local")
        shell.fill_in(work / ".env.production")
    if "python -m pipeline up" in shell_lines(DOCS[name]):
        give_data(work / ".pipeline", made_data)
    elif ".pipeline/env" in DOCS[name]:
        (work / ".pipeline").mkdir()
        (work / ".pipeline" / "env").touch(mode=0o600)
        shell.fill_in(work / ".pipeline" / "env")
    with closing(shell):
        yield shell
    shutil.rmtree(root)


RUNS = {"sh", "sql", "python"}
#: The lines of the README run with every test, those of the other documents with the slow ones.
RUNNING = [
    name if name == "README.md" else pytest.param(name, marks=pytest.mark.slow)
    for name, text in DOCS.items()
    if not RUNS.isdisjoint(dict(blocks(text)))
]


@pytest.mark.parametrize("name", RUNNING)
def test_every_block_of_a_document_runs(name: str, shell: Shell) -> None:
    if "auth.uid()" in DOCS[name]:
        shell.execute(_SUPABASE)
    for line in PRELUDES.get(name, ()):
        shell.run(line)
    for language, block in blocks(DOCS[name]):
        if language == "sh":
            for line in lines(block):
                shell.run(line)
        elif language == "sql":
            shell.execute(block)
        elif language == "python":
            shell.run_python(block)

    for line in results(DOCS[name]):
        assert line in shell.printed, line


def results(text: str) -> list[str]:
    """Return what a document shows of the result of a load, without what it leaves out and without times and rates."""
    shown = [block for language, block in blocks(text) if language == "text" and block.startswith("Batch b1 is done")]
    cut = (
        re.split(r"…| \([\d.]+ ?\w*/s|, avg|Total time: ", line)[0] for block in shown for line in block.splitlines()
    )
    return [line.rstrip() for line in cut if line.strip()]


def test_the_tutorial_shows_the_result_of_a_load() -> None:
    assert len(results(DOCS["docs/tutorial.md"])) > 10


def test_contributing_names_the_rooms_that_there_are() -> None:
    rooms = set(re.findall(r"`(pipeline/[a-z]+/)`", CONTRIBUTING))
    there = {f"pipeline/{path.parent.name}/" for path in (REPOSITORY / "pipeline").glob("*/__init__.py")}
    assert rooms == there

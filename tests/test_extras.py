"""Extras: a command whose libraries are absent names the extra, and no process imports what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.extras import extra
from tests.sweeps import sweep

#: Run a command where a module is not installed.
WITHOUT = "import sys; sys.modules[sys.argv[1]] = None; from pipeline.cli import main; sys.exit(main(sys.argv[2:]))"
#: Run the Storage server up to its arguments, and print the modules that it has imported.
STORAGE = """
import json, runpy, sys
sys.argv = ["storage", "--help"]
try:
    runpy.run_module("embedded_supabase.storage", run_name="__main__")
except SystemExit as exc:
    code = exc.code
print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    ("module", "name", "command"),
    sweep(
        [
            ("jwt", "embedded", ["up"]),
            ("jwt", "embedded", ["down"]),
            ("PIL", "embedded", ["sample", "data"]),
            ("PIL", "report", ["report", "--batch-id", "b1"]),
            ("jinja2", "report", ["report", "--batch-id", "b1"]),
        ]
    ),
)
def test_a_command_without_its_libraries_names_the_extra(
    tmp_path: Path, module: str, name: str, command: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, *command],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"This command needs {module}, which is not installed." in done.stderr
    assert f"Run `pip install '.[{name}]'` in the folder of the project, or " in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["pipeline.absent", "embedded_supabase.absent"])
def test_an_absent_module_of_our_own_is_no_absent_extra(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=module), extra("report"):
        __import__(module)


def test_the_storage_server_imports_nothing_of_the_loader() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STORAGE], capture_output=True, encoding="utf-8", timeout=60, check=True
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert "embedded_supabase.storage.server" in modules
    assert {name.partition(".")[0] for name in modules} & {"pipeline", "luigi", "sqlalchemy", "psycopg2"} == set()

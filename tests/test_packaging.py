"""setup.py: what is built from a checkout works outside of it, with its SQL and its migrations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.services import REPOSITORY

_ASK = """
import pipeline, pipeline.migrate, importlib.resources
files = sorted(entry.name for entry in importlib.resources.files("pipeline.sql").iterdir())
print(pipeline.__file__)
print(len([name for name in files if name.endswith(".sql")]))
print(*(f"{one.version}_{one.name}.sql" for one in pipeline.migrate.migrations()))
"""


def test_a_built_package_has_its_sql_and_its_migrations(tmp_path: Path) -> None:
    for name in ("setup.py", "requirements.txt", "README.md", "MANIFEST.in", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("pipeline", "supabase"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    library, elsewhere = tmp_path / "library", tmp_path / "elsewhere"
    build = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(library)]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True)
    elsewhere.mkdir()
    asked = subprocess.run(
        [sys.executable, "-c", _ASK],
        cwd=elsewhere,
        env={**environment, "PYTHONPATH": str(library)},
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    where, statements, migrations = asked.stdout.splitlines()
    assert where == str(library / "pipeline" / "__init__.py")
    assert int(statements) == len(list((REPOSITORY / "pipeline" / "sql").glob("*.sql")))
    assert migrations.split() == sorted(path.name for path in (REPOSITORY / "supabase" / "migrations").glob("*.sql"))

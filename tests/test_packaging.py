"""setup.py: a wheel and an sdist have all that is needed, nothing else, and run outside of the repository."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

from pipeline.config import Settings
from tests.services import REPOSITORY

#: Import every module, and say which files of the installation they and the data are.
_ASK = """
import importlib, json, pathlib, pkgutil
import pipeline, pipeline.database.migrate, pipeline.database.queries
names = [one.name for one in pkgutil.walk_packages(pipeline.__path__, "pipeline.") if "__main__" not in one.name]
files = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps({
    "modules": files,
    "statement": pipeline.database.queries.statement("now"),
    "migrations": [f"{one.version}_{one.name}.sql" for one in pipeline.database.migrate.migrations()],
}))
"""
_BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def run(
    *command: str | Path, cwd: Path, library: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that imports the package from a library, or from nowhere in particular."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if library is not None:
        environment["PYTHONPATH"] = str(library)
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**environment, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist, built from a copy of the working tree without what earlier builds left."""
    copy, out = tmp_path_factory.mktemp("tree") / "pipeline", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", ".git", ".hypothesis", "*.egg-info", "build")
    shutil.copytree(REPOSITORY, copy, ignore=left_out)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, ".", cwd=copy)
    run(sys.executable, "-c", _BUILD_SDIST, out, cwd=copy)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def library(
    request: pytest.FixtureRequest, built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder that the wheel, or the sdist, was installed into, and nothing else."""
    folder = tmp_path_factory.mktemp("library")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    archive = built[request.param == "sdist"]
    run(*pip, "--no-build-isolation", "--target", folder, archive, cwd=folder)
    yield folder
    shutil.rmtree(folder)


def sources() -> set[str]:
    """The files of the package, as they are to be in a wheel."""
    inside = {
        str(path.relative_to(REPOSITORY))
        for package in ("pipeline", "embedded_supabase")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return inside | {f"pipeline/migrations/{path.name}" for path in (REPOSITORY / "supabase/migrations").glob("*.sql")}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_no_other(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources()
    with zipfile.ZipFile(built[0]) as archive:  # the files at the top of the repository, not links to them
        for name in ("crontab.example", "env.example", "pipeline-load.timer"):
            [source] = [one for one in REPOSITORY.glob("*") if one.name.removeprefix(".") == name] or [
                REPOSITORY / "systemd" / name
            ]
            assert archive.read(f"pipeline/cli/templates/{name}") == source.read_bytes()
    assert {"pipeline/py.typed", "pipeline/database/queries/batches.sql", "pipeline/doctor/__init__.py"} <= names


@pytest.mark.slow
def test_the_sdist_has_what_it_takes_to_build_and_no_tests(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    migrations = {f"supabase/migrations/{path.name}" for path in (REPOSITORY / "supabase/migrations").glob("*.sql")}
    needed = {"setup.py", "pyproject.toml", "requirements.txt", "README.md", "luigi.cfg", "crontab.example"}
    needed |= {".env.example", "systemd/pipeline-load.timer"}
    assert names >= needed | migrations | {name for name in sources() if "/migrations/" not in name}
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks")]


@pytest.mark.slow
def test_the_metadata_tells_what_it_is_and_what_it_needs(built: tuple[Path, Path]) -> None:
    told = metadata(built[0])
    assert told["Name"] == "canteen-tray-loader"
    assert told["Summary"]
    assert set(told["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert told["Description-Content-Type"] == "text/markdown"
    text = told.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert text.decode("utf-8").strip() == (REPOSITORY / "README.md").read_text(encoding="utf-8").strip()
    classifiers = told.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)
    wanted = {line.split("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()}
    core = [one for one in told.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert len(core) == len(wanted - {""})
    assert set(told.get_all("Provides-Extra", [])) == {"all", "dev", "embedded", "notify", "report"}


@pytest.mark.slow
def test_all_of_it_is_imported_from_where_it_was_installed(library: Path, tmp_path: Path) -> None:
    told = json.loads(run(sys.executable, "-c", _ASK, cwd=tmp_path, library=library).stdout)
    assert len(told["modules"]) > 30
    # A package of data alone has no file of its own.
    assert {file for file in told["modules"].values() if file and not file.startswith(f"{library}/")} == set()
    assert "version" in told["statement"]
    assert told["migrations"] == sorted(path.name for path in (REPOSITORY / "supabase/migrations").glob("*.sql"))


@pytest.mark.slow
def test_the_console_script_and_the_module_are_the_same_command(library: Path, tmp_path: Path) -> None:
    module = run(sys.executable, "-m", "pipeline", "--help", cwd=tmp_path, library=library)
    script = run(library / "bin" / "pipeline", "--help", cwd=tmp_path, library=library)
    assert module.stdout == script.stdout
    assert "load-qwen" in module.stdout


@pytest.mark.slow
def test_it_loads_outside_of_the_repository(library: Path, workdir: Path, settings: Settings, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"

    def call(*arguments: str | Path) -> str:
        return run(sys.executable, "-m", "pipeline", *arguments, cwd=workdir, library=library).stdout

    call("sample", dataset, "--recognitions", "3")
    loaded = json.loads(call("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler", "--json"))
    assert (loaded["state"], loaded["images_processed"]) == ("done", 6)
    annotations = dataset / "qwen_annotations.json"
    assert "q1 is done" in call("load-qwen", "--file", annotations, "--batch-id", "q1", "--local-scheduler")
    call("verify")  # which exits with 5 when there is a difference
    assert json.loads(call("status", "--json"))["rows"]["images"] == 6
    assert json.loads(call("status", "--check", "--json"))["problems"] == 0
    written = json.loads(call("init", "--non-interactive", "--systemd", "--json"))["written"]
    assert {str(workdir / "luigi.cfg"), str(workdir / "systemd" / "pipeline-load.timer")} <= set(written)

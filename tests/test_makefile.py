"""Makefile: what is installed once is not installed again until the requirements change, and the share of a day."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.services import REPOSITORY

#: Installed for the demo, or for the tests, which have all that the demo needs.
_DEMO, _TESTS = (".venv/.installed-demo",), (".venv/.installed", ".venv/.installed-demo")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what make looks at."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "setup.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".venv").mkdir()
    return tmp_path


def recipe(clone: Path, *target: str) -> str:
    """Return the commands that a target would run."""
    return subprocess.run(
        ["make", "--dry-run", *target], cwd=clone, capture_output=True, encoding="utf-8", timeout=30, check=True
    ).stdout


def installs(clone: Path, target: str) -> bool:
    """Return whether a target would begin with an installation."""
    return "pip install" in recipe(clone, target)


@pytest.mark.parametrize(
    ("stamps", "target", "expected"),
    [((), "demo", True), ((), "test", True), (_DEMO, "demo", False), (_DEMO, "test", True), (_TESTS, "demo", False)]
    + [(_TESTS, target, False) for target in ("test", "test-slow", "check", "docs")],
)
def test_a_target_installs_what_is_not_installed(
    stamps: tuple[str, ...], target: str, expected: bool, clone: Path
) -> None:
    for stamp in stamps:
        (clone / stamp).touch()
    assert installs(clone, target) == expected


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "setup.py"])
@pytest.mark.parametrize("target", ["demo", "test"])
def test_changed_requirements_are_installed(name: str, target: str, clone: Path) -> None:
    for stamp in _TESTS:
        (clone / stamp).touch()
    stamped = (clone / _TESTS[0]).stat().st_mtime
    os.utime(clone / name, (stamped + 1, stamped + 1))
    assert installs(clone, target)


def test_the_installation_for_the_tests_serves_the_demo(clone: Path) -> None:
    assert "touch .venv/.installed .venv/.installed-demo" in recipe(clone, "test")


def test_the_slow_tests_run_in_shares_another_one_each_day(clone: Path) -> None:
    assert re.search(r"--share [0-2]/3 ", recipe(clone, "test-slow"))
    assert "--share 0/1 " in recipe(clone, "test-slow", "SHARE=0/1")
    assert "--share" not in recipe(clone, "test")

"""The first hour of somebody new, as a script of the commands that the documents name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedded_supabase.ports import free_port
from tests.services import subprocess_environment

pytestmark = pytest.mark.system


def test_the_first_hour_goes_through(clean_environment: None, short_folder: Path) -> None:
    folder = short_folder / "newcomer"
    folder.mkdir(mode=0o711)
    done = subprocess.run(
        ["sh", str(Path(__file__).with_name("newcomer.sh"))],
        cwd=folder,
        env=subprocess_environment({"BIN": str(Path(sys.executable).parent), "PORT": str(free_port())}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "All steps did what they say." in done.stdout
    assert {"demo.html", "report-first.html"} <= {path.name for path in folder.glob("*.html")}

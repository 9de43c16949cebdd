"""The alert rules of the guide, and the files that commands write, through Prometheus's own promtool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import annotating
from tests.annotating import Run
from tests.services import REPOSITORY, MakeDataset

pytestmark = pytest.mark.system
run = annotating.run
PROMTOOL = Path(sys.prefix) / "supabase" / "promtool"


def promtool(*arguments: str | Path, content: str = "") -> str:
    """Run promtool, and return what it says; a user who cannot install it skips the test."""
    if not PROMTOOL.exists() and os.geteuid() != 0:
        pytest.skip("needs promtool")
    done = subprocess.run(
        [PROMTOOL, *arguments], input=content, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_raise_what_the_guide_says() -> None:
    assert "8 rules found" in promtool("check", "rules", REPOSITORY / "docs" / "guides" / "alerts.rules.yml")
    assert "SUCCESS" in promtool("test", "rules", REPOSITORY / "tests" / "system" / "alerts.test.yml")


def test_the_files_follow_the_conventions_of_prometheus(run: Run, small_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset, file = small_dataset(14, broken=True), tmp_path / "metrics.prom"
    annotations = dataset / "qwen_annotations.json"
    load = ("load", "--source", dataset, "--max-rejects", "100%")
    for command in (load, ("load-qwen", "--file", annotations, "--max-rejects", "100%"), ("verify", "--deep")):
        assert run(*command, "--metrics-file", file).code == 0
        promtool("check", "metrics", content=file.read_text(encoding="utf-8"))

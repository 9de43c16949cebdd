"""The wheel under uvx: its commands run from an environment that uv makes, with packages from the index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

from tests import test_packaging
from tests.services import subprocess_environment

pytestmark = pytest.mark.system
built = test_packaging.built


def test_uvx_runs_the_commands_of_the_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, _ = built
    environment = {**subprocess_environment(), "UV_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH")

    def uvx(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [find_uv_bin(), "tool", "run", "--python", sys.executable, "--from", str(wheel), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
        )

    done = uvx("pipeline", "--help")
    if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
        pytest.skip(f"uv reaches no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    assert "load-qwen" in done.stdout
    # Its environment is in a cache, so that no nightly job may name it.
    refused = uvx("pipeline", "init", "--non-interactive")
    assert refused.returncode == 2, refused.stderr
    assert "is in a cache" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]

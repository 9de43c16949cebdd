"""The audit of packages fails for an advisory, and is skipped in words where nothing can be looked up."""

from __future__ import annotations

import json

import pytest

from embedded_supabase.ports import free_port
from tests import audit
from tests.services import REPOSITORY


def test_an_advisory_fails_the_check() -> None:
    vulnerability = {"id": "PYSEC-1", "fix_versions": ["2.0"]}
    packages = [
        {"name": "one", "version": "1.0", "vulns": [vulnerability]},
        {"name": "two", "version": "1.0", "vulns": []},
        {"name": "three", "skip_reason": "not found"},
    ]
    assert audit.verdict(json.dumps({"dependencies": packages})) == (1, "one 1.0: PYSEC-1, fixed in 2.0")
    assert audit.verdict(json.dumps({"dependencies": packages[1:]})) == (0, "pip-audit: no advisory for 1 packages.")


@pytest.mark.parametrize("report", ["", "Traceback", json.dumps({"dependencies": [{"name": "a", "skip_reason": "b"}]})])
def test_a_check_that_looked_nothing_up_says_so(report: str) -> None:
    code, text = audit.verdict(report)
    assert code == 0
    assert text.startswith("pip-audit: SKIPPED, ")


def test_an_unreachable_database_is_known_at_once() -> None:
    assert audit.unreachable(f"http://127.0.0.1:{free_port()}/") == "ConnectionError"
    assert "-m tests.audit" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")

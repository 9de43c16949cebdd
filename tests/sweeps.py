"""Parameters of a test that is a sweep: some of them run with the fast tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], every: int = 4) -> list[Any]:
    """Return the cases as parameters, tuples as several; the first and each so many later are not slow."""
    values = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*one, marks=[pytest.mark.slow] if nth % every else []) for nth, one in enumerate(values)]

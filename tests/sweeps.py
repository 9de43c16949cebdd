"""Parameters of a test that is a sweep: some of them run with the fast tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[tuple[Any, ...]], every: int = 4) -> list[Any]:
    """Return cases, each a value for each parameter, of which the first and each so many later are not slow.

    `zip(values)` makes cases of the values of one parameter.
    """
    return [pytest.param(*case, marks=[pytest.mark.slow] if nth % every else []) for nth, case in enumerate(cases)]

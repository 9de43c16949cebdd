"""Habits of Luigi's users: what each test about one shows, from which docs/habits.py makes docs/reference/luigi.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Habit:
    """A row of the table: what people do, what comes of it, and the test that shows it."""

    group: str
    what: str
    outcome: str
    test: str


#: The rows, in the order of the tests.
HABITS: list[Habit] = []


def habit(group: str, what: str, outcome: str) -> Callable[[_Test], _Test]:
    """Say what a test shows: `outcome` begins with `works`, `refused` or `fails in Luigi`."""

    def note(test: _Test) -> _Test:
        HABITS.append(Habit(group, what, outcome, test.__name__))
        return test

    return note

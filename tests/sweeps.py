"""Sweeps, tests with many cases: which of them run with the fast tests, and which of the slow ones on which day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

#: The moments of a sweep of kills are dealt out to so many cases, as `make test-slow` has shares.
PARTS = 3


def sweep(cases: Iterable[tuple[Any, ...]], every: int = 4) -> list[Any]:
    """Return cases, each a value for each parameter, of which the first and each so many later are not slow.

    `zip(values)` makes cases of the values of one parameter.
    """
    return [pytest.param(*case, marks=[pytest.mark.slow] if nth % every else []) for nth, case in enumerate(cases)]


@dataclass(frozen=True)
class Share:
    """A share of the slow cases of each test, `number` from 0 of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `NUMBER/COUNT`.

        Raises:
            pytest.UsageError: it is not a share.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise pytest.UsageError(f"{text} is not a share, such as 0/3 for the first of three")
        return cls(int(number), int(count))

    def take(self, tests: Sequence[Hashable | None]) -> list[bool]:
        """Return for each case whether it runs; the share of a test with fewer cases than shares is one case.

        Arguments:
            tests: for each case its test, None for a case that runs in any share.
        """
        of_test, seen = Counter(tests), Counter[Hashable]()
        taken = []
        for test in tests:
            shares = min(self.count, of_test[test])
            taken.append(test is None or seen[test] % shares == self.number % shares)
            seen[test] += 1
        return taken

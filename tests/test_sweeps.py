"""Sweeps: a share of the slow cases of each test runs, and all of them in all shares."""

from __future__ import annotations

import pytest

from tests.sweeps import Share, sweep


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("cases", [1, 2, 3, 5, 6, 17])
def test_all_shares_together_have_each_case_and_none_is_empty(count: int, cases: int) -> None:
    tests = ["other", *["sweep"] * cases, None]
    shares = [Share(number, count).take(tests) for number in range(count)]
    assert all(any(share[1:-1]) for share in shares)
    assert all(share[0] and share[-1] for share in shares)  # the one case of a test, and a case that is not slow
    assert all(any(share[case] for share in shares) for case in range(len(tests)))
    if cases >= count:
        assert [sum(share[case] for share in shares) for case in range(1, cases + 1)] == [1] * cases


def test_cases_of_several_tests_are_counted_apart() -> None:
    assert Share(1, 3).take(["a", "b", "a", "b", "a", "b"]) == [False, False, True, True, False, False]


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "/", "0/0", "a/b", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="is not a share"):
        Share.parse(text)


def test_the_first_case_of_a_sweep_and_each_so_many_later_are_fast() -> None:
    found = [bool(one.marks) for one in sweep(zip("abcde"), every=2)]
    assert found == [False, True, False, True, False]

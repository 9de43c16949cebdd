"""A share of the mutated files of tests/fuzz.py, and that it finds what it looks for. FUZZ_SEED chooses other files."""

from __future__ import annotations

import os
from contextlib import closing, suppress

import psycopg2
import pytest

from pipeline.dataset.documents import check_menu, check_receipt, json_of
from pipeline.errors import BadInput
from tests.fuzz import fuzz
from tests.mutations import ANNOTATIONS, MENU, PHOTO, RECEIPT, mutant

#: A fuzz whose checks fail in each way; what computes for ever is ended after three seconds.
_FAILING = """
import os, sys
from tests import fuzz

def fail(content):
    raise KeyError("unexpected")

def crash(content):
    os.abort()

def fill(content):
    bytearray(b"x") * (fuzz.MEGABYTES * 1_000_000)

def spin(content):
    while True:
        pass

fuzz.SECONDS = 1
fuzz.CHECKS.update(photo=fail, menu=crash, receipt=fill, annotations=spin)
sys.exit(fuzz.main())
"""


@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_only_bad_input_comes_out_of_mutated_files(count: int) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    print(f"FUZZ_SEED={seed}")
    report = fuzz(seed, count)
    assert not report.failures, str(report)
    assert report.codes.total() == count


@pytest.mark.slow
def test_failures_crashes_time_and_memory_are_found() -> None:
    first = {mutant(0, number)[0]: number for number in reversed(range(20))}
    found = {}
    for kind in (PHOTO, MENU, RECEIPT, ANNOTATIONS):
        report = fuzz(0, first[kind] + 1, first[kind], ("-c", _FAILING))
        [found[kind]] = [one.failure for one in report.failures]
    assert "KeyError: 'unexpected'" in found[PHOTO]
    assert "ends its process with -6" in found[MENU]
    assert "MB of memory" in found[RECEIPT]
    assert "ends its process with -24" in found[ANNOTATIONS]


def test_a_file_is_made_again_from_its_seed_and_number() -> None:
    assert [mutant(3, number) for number in range(30)] == [mutant(3, number) for number in range(30)]


@pytest.mark.slow
def test_jsonb_takes_every_mutated_document_that_is_accepted(database_url: str) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    print(f"FUZZ_SEED={seed}")
    taken = 0
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
        for number in range(4000):
            kind, content = mutant(seed, number)
            if kind not in (MENU, RECEIPT):
                continue
            with suppress(BadInput):
                check_menu(content) if kind == MENU else check_receipt(content)
                cursor.execute("SELECT %s::jsonb IS NULL", (json_of(content).decode(),))
                taken += 1
    assert taken > 50

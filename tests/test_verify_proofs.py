"""Verify on a budget: the longest unread objects first, what was read on record, and what the status says of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.storage import Storage
from tests import reset_support, verify_support, world
from tests.reset_support import Command, LoadBatch
from tests.services import MakeDataset
from tests.verify_support import Bucket, flip, put_fewer_bytes

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load
stored = verify_support.stored
DEEP = ("verify", "--deep", "--quiet", "--minutes", "20")


class Nights:
    """Verifications whose time is up after some objects; `read` has the keys of the last one in order."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self.most: float = 0
        self.read: list[str] = []
        self.after: Callable[[str], None] = lambda _: None
        self._lock = threading.Lock()

    def digest(self, inner: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
        def digest(storage: Storage, key: str, most: int) -> tuple[int, str]:
            with self._lock:
                if key not in self.read:  # what differs is read twice
                    self.read.append(key)
            self.after(key)
            return inner(storage, key, most)

        return digest

    def clock(self) -> float:
        return time.monotonic() + (3600 if len(self.read) >= self.most else 0)

    def __call__(self, most: float = 10**6, *options: str, code: int = 0) -> Any:
        self.most, self.read = most, []
        done = self._command(*DEEP, "--json", *options)
        assert done.code == code, done
        return json.loads(done.out)


@pytest.fixture
def night(command: Command, monkeypatch: pytest.MonkeyPatch) -> Nights:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", "1")  # so that few objects are under way when the time is up
    nights = Nights(command)
    monkeypatch.setattr("pipeline.steps.verify.time", SimpleNamespace(monotonic=nights.clock))
    monkeypatch.setattr(Storage, "digest", nights.digest(Storage.digest))
    return nights


def proven(dsn: str) -> set[str]:
    """The keys of the objects that were read."""
    keys = "batch_id || '/recognitions/' || recognition_id || '/camera' || camera_number || '.jpg'"
    return {key for (key,) in world.query(dsn, f"SELECT {keys} FROM ingest.proofs")}


def test_each_night_goes_on_where_the_last_one_ended(
    command: Command, load: LoadBatch, night: Nights, small_dataset: MakeDataset, stored: Bucket, dsn: str
) -> None:
    load(small_dataset(10), "b2")
    load(small_dataset(2, seed=9), "b1")
    assert proven(dsn) == set()
    keys, seen = stored.listed(), list[str]()
    first = night(6)
    assert 6 <= first["read"] < 14
    assert (first["left"], first["never_read"]) == (24 - first["read"],) * 2
    assert proven(dsn) == set(night.read)
    while len(seen) < 24:
        seen += night.read
        night(6)
    assert seen[20:24] == [key for key in keys if key.startswith("b1/")], "the batch that was loaded last"
    assert sorted(seen[:24]) == keys, "each once, before any is read again"
    assert set(night.read) <= set(keys)
    order = world.query(dsn, "SELECT recognition_id FROM ingest.proofs ORDER BY read_at, 1 LIMIT 1")
    night(1)
    assert f"/{order[0][0]}/" in night.read[0], "the longest unread first"
    assert len(set(night.read)) == len(night.read)
    last = night()
    assert (last["read"], last["left"], last["never_read"], len(night.read)) == (24, 0, 0, 24)
    assert command(*DEEP).out.endswith("Read 24 objects, the longest unread first; 0 left; 0 were never read.\n")


def test_one_batch_and_a_whole_deep_verify_are_on_record_too(
    command: Command, load: LoadBatch, night: Nights, small_dataset: MakeDataset, stored: Bucket, dsn: str
) -> None:
    load(small_dataset(2), "b1")
    load(small_dataset(2, seed=9), "b2")
    told = night(10**6, "--batch-id", "b2")
    assert (told["read"], told["left"], told["never_read"]) == (4, 0, 0)
    assert {key[:3] for key in proven(dsn)} == {"b2/"}
    assert command("verify", "--deep", "--quiet").code == 0
    assert proven(dsn) == set(stored.listed())
    night.read = []
    assert command("verify", "--quiet").code == 0
    assert night.read == []


def test_what_differs_is_told_every_night_until_it_is_repaired(
    command: Command, load: LoadBatch, night: Nights, small_dataset: MakeDataset, stored: Bucket, dsn: str
) -> None:
    load(small_dataset(4), "b1")
    assert night()["read"] == 8
    keys = stored.listed()
    flip(stored, keys[5])
    assert command("verify", "--quiet").code == 0, "size and MD5 are as listed"
    for _ in range(2):
        told = night(10**6, code=5)
        assert [one["key"] for one in told["differences"]] == [keys[5]]
        assert told["totals"] == {**dict.fromkeys(told["totals"], 0), "equal": 7, "damaged": 1}
        assert proven(dsn) == {*keys} - {keys[5]}
    assert night.read[0] == keys[5]
    assert night(1, "--repair", code=0)["repaired"] == 1
    assert night(1)["never_read"] == 0
    assert proven(dsn) == {*keys}


def test_what_the_comparison_finds_is_not_told_twice(
    load: LoadBatch, night: Nights, small_dataset: MakeDataset, stored: Bucket, dsn: str
) -> None:
    load(small_dataset(3), "b1")
    keys = stored.listed()
    stored.remove(keys[0])
    put_fewer_bytes(stored, keys[1])
    stored.put(keys[2], bytes(reversed(stored.read(keys[2]))))
    told = night(code=5)
    assert [one["key"] for one in told["differences"]] == keys[:3]
    assert proven(dsn) == {*keys[3:]}


def test_an_interrupted_verify_keeps_what_it_has_read(
    command: Command,
    load: LoadBatch,
    night: Nights,
    small_dataset: MakeDataset,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.steps.verify._RECORD_SECONDS", 0.0)
    load(small_dataset(6), "b1")

    def interrupt(_: str) -> None:
        if len(night.read) == 7:
            raise KeyboardInterrupt

    night.after, night.most = interrupt, 10**6
    assert command(*DEEP).code == 130
    kept = proven(dsn)
    assert 0 < len(kept) < 12
    night.after = lambda _: None
    assert night(12 - len(kept))["never_read"] == 0


def test_a_batch_that_is_reset_meanwhile_has_no_proof(
    command: Command, load: LoadBatch, night: Nights, small_dataset: MakeDataset, dsn: str
) -> None:
    load(small_dataset(2), "b1")

    def turn(state: str) -> None:
        world.query(dsn, f"UPDATE ingest.batches SET state = '{state}'")

    night.after = lambda _: turn("resetting")
    night()
    assert proven(dsn) == set()
    turn("done")
    night.after = lambda _: None
    night()
    assert len(proven(dsn)) == 4
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert proven(dsn) == set()


def test_the_status_says_how_old_the_oldest_proof_is(
    command: Command, load: LoadBatch, night: Nights, small_dataset: MakeDataset, dsn: str
) -> None:
    def said() -> str:
        return "".join(line for line in command("status").out.splitlines() if line.startswith("Content checks: "))

    assert said() == ""
    load(small_dataset(3), "b1")
    hint = ": `python -m pipeline verify --deep --minutes 20`"
    assert said() == f"Content checks: no object was read back yet{hint}"
    assert json.loads(command("status", "--json").out)["proofs"] == {
        "objects": 6,
        "never_read": 6,
        "oldest": None,
        "days": None,
    }
    night()
    assert said().startswith("Content checks: every object was read within the last day; the oldest proof is of 20")
    world.query(dsn, "UPDATE ingest.proofs SET read_at = '2025-10-03 04:00Z' WHERE camera_number = 2")
    world.query(dsn, "UPDATE ingest.proofs SET read_at = now() - interval '22 days 1 hour' WHERE camera_number = 2")
    assert "within the last 23 days; the oldest proof is of " in said()
    load(small_dataset(1, seed=9), "b2")
    world.query(dsn, "UPDATE ingest.proofs SET read_at = '2025-10-03 04:00Z' WHERE camera_number = 2")
    told = (
        "Content checks: 2 of 8 objects not read back yet; the oldest proof of the others is of 2025-10-03 04:00:00 UTC"
    )
    assert said() == f"{told}{hint}"


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1441", "ten", "", "1:30"])
def test_bad_numbers_of_minutes_are_refused(text: str, command: Command) -> None:
    done = command("verify", "--deep", "--minutes", text)
    assert (done.code, "argument --minutes: " in done.err) == (2, True)


def test_minutes_without_deep_are_refused(command: Command, workdir: Path) -> None:
    done = command("verify", "--minutes", "20")
    assert (done.code, done.err) == (2, "Error: --minutes belongs to --deep.\nHint: Add --deep.\n")

"""Power failures: nothing that was acknowledged is lost, nothing half is listed, and without any one sync that fails.

`make power` checks 10,000 states; here are a share of them, and each missing sync. docs/explanation/power-loss.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded_supabase.disk import Disk
from tests.power import sqlite, syncs
from tests.power.loads import loads
from tests.power.log import PACKAGE, PASSING, AccessSet, Made, Recorder, Renamed, Synced, Unlinked, Written
from tests.power.model import SECTOR, Model, Tree
from tests.power.postgres import first_loss, record_start
from tests.power.script import Client, Operation, Progress, Violation, check, script
from tests.power.states import Count, Recording, check_part, disks, first_recordings
from tests.sweeps import sweep

SEED = 7

pytestmark = pytest.mark.skipif(sqlite.library() is None, reason="the interpreter does not export its SQLite")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder for disks."""
    with disks() as folder:
        yield folder


@pytest.fixture(scope="module")
def recordings(folder: Path) -> list[Recording]:
    """A server alone, and one in a home."""
    return first_recordings(folder, str(SEED))


# The promises


@pytest.mark.parametrize("number", sweep(zip(range(2))))
def test_no_state_after_a_power_failure_breaks_a_promise(number: int) -> None:
    part = check_part((SEED, number, 100))
    assert part.found == []
    assert (part.count.states, part.count.twice > 0) == (100, True)
    assert len(part.count.contents) > 60


@pytest.mark.slow
@pytest.mark.parametrize("missing", syncs.SYNCS)
def test_a_missing_sync_is_noticed(recordings: list[Recording], folder: Path, missing: str) -> None:
    assert syncs.first_violation(recordings, missing, folder, SEED, Count()) is not None


def test_the_start_of_postgresql_is_durable_and_not_without_its_syncs(folder: Path) -> None:
    recorder = record_start(folder)
    assert first_loss(recorder, SEED) is None
    assert first_loss(recorder, SEED, syncs.POSTGRES_SYNC) == "the database is missing"


@pytest.mark.slow
def test_a_load_that_a_power_failure_ends_is_finished_by_the_same_command(short_folder: Path) -> None:
    chance = random.Random(SEED)
    path = short_folder / "power"
    path.mkdir(mode=0o711)
    with loads(path, recognitions=6) as runs:
        entries = runs.entries()
        assert len(entries) > 100
        runs.interrupted(chance.choice(entries), 1, chance)


# Which syncs there are


def test_every_sync_in_the_code_is_listed_with_what_it_protects(recordings: list[Recording]) -> None:
    ours = {name for name in syncs.SYNCS if not name.startswith("SQLite")}
    assert syncs.in_code() == ours | {syncs.POSTGRES_SYNC, syncs.NOT_RECORDED}
    assert {site for one in recordings for site in one.sites()} == set(syncs.SYNCS)


def test_files_are_synced_renamed_and_removed_by_the_disk_alone() -> None:
    found = {
        (str(file.relative_to(PACKAGE)), call)
        for file in PACKAGE.rglob("*.py")
        for call in re.findall(r"os\.fsync|os\.replace|os\.rename|os\.mkdir", file.read_text(encoding="utf-8"))
    }
    assert found == {("disk.py", "os.fsync"), ("disk.py", "os.rename")}


def test_the_guide_lists_the_syncs() -> None:
    assert syncs.MARKS[0] + syncs.table() + syncs.MARKS[1] in syncs.GUIDE.read_text(encoding="utf-8")


# The model and the recorder


def test_the_recorder_misses_no_change(recordings: list[Recording], folder: Path) -> None:
    for one in recordings:
        model = one.model()
        for entry in one.log:
            model.apply(entry)
        disk = folder / f"disk-{one.client.is_home}"
        paths = [path for path in disk.rglob("*") if path.is_file() and not path.name.endswith(PASSING)]
        assert {name: content for name, (_, content) in model.now().files.items()} == {
            str(path.relative_to(disk)): path.read_bytes() for path in paths
        }
        assert set(model.now().folders) == {str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_dir()}


def states(folder: Path, *entries: Made | Written | Renamed | Unlinked | AccessSet | Synced) -> list[Tree]:
    model = Model(folder, {".": 0})
    for entry in entries:
        model.apply(entry)
    chance = random.Random(SEED)
    return [model.after_power_failure(chance) for _ in range(3000)]


def contents(found: list[Tree]) -> set[frozenset[tuple[str, bytes]]]:
    return {frozenset((name, content) for name, (_, content) in tree.files.items()) for tree in found}


def test_a_renamed_file_can_be_empty_torn_twice_there_or_lost(tmp_path: Path) -> None:
    content = b"x" * SECTOR + b"y" * SECTOR
    written = (Made("a", 1, False, 0o600), Written(1, 0, content), Renamed("a", "b"))
    lost, whole, half = b"", content, bytes(SECTOR) + b"y" * SECTOR
    everything = contents(states(tmp_path, *written))
    for names in ((), ("a",), ("b",), ("a", "b")):
        for expected in (lost, whole, half):
            assert frozenset((name, expected) for name in names) in everything
    synced = contents(states(tmp_path, *written[:2], Synced(1, "file"), Renamed("a", "b"), Synced(0, "folder")))
    assert synced == {frozenset({("b", content)})}


def test_a_removed_file_can_come_back_until_its_folder_is_synced(tmp_path: Path) -> None:
    made = (Made("a", 1, False, 0o600), Synced(1, "file"), Synced(0, "folder"), Unlinked("a"))
    assert contents(states(tmp_path, *made)) == {frozenset(), frozenset({("a", b"")})}
    assert contents(states(tmp_path, *made, Synced(0, "folder"))) == {frozenset()}


def test_a_folder_has_its_mode_and_its_files_when_it_is_synced_itself(tmp_path: Path) -> None:
    made = (Made("d", 1, True, 0o700), Made("d/a", 2, False, 0o600), AccessSet(1, 0o711), Synced(0, "above"))
    found = states(tmp_path, *made)
    assert {tree.folders["d"] for tree in found} == {0o700, 0o711}
    assert {len(tree.files) for tree in found} == {0, 1}
    found = states(tmp_path, *made, Synced(1, "folder"))
    assert {(tree.folders["d"], len(tree.files)) for tree in found} == {(0o711, 1)}


def test_a_state_without_an_acknowledged_object_is_a_violation(tmp_path: Path) -> None:
    client = Client([[[Operation("bucket", ["b"])], [Operation("put", ["k"], b"content")]]], is_home=False)
    (tmp_path / "srv").mkdir()
    done = client.run(tmp_path, Disk(durable=False), Progress(), lambda progress: None)
    assert done.step == 2
    check(client, tmp_path, done)
    (stored,) = client.root(tmp_path).glob("objects/*/*")
    content = stored.read_bytes()
    stored.write_bytes(b"")
    with pytest.raises(Violation, match="k is listed, and its content is not that of its upload"):
        check(client, tmp_path, done)
    stored.write_bytes(content)
    (stored.parent / "left").write_bytes(b"")
    check(client, tmp_path, done)
    assert not (stored.parent / "left").exists()
    wrong = Client([[*client.steps, [Operation("put", ["m"], b"more")]]], is_home=False)
    with pytest.raises(Violation, match="lost or changed: m"):
        check(wrong, tmp_path, Progress(step=3))


def test_a_recorder_performs_what_it_records(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.make_folder(tmp_path / "d")
    with recorder.create(tmp_path / "d" / "a") as file:
        file.write(b"content")
        recorder.sync(file)
    recorder.rename(tmp_path / "d" / "a", tmp_path / "b")
    recorder.unlink(tmp_path / "absent")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert [type(entry) for entry in recorder.log] == [Made, Made, Written, Synced, Renamed]


def test_the_same_seed_gives_the_same_script() -> None:
    assert script("a") == script("a") != script("b")

"""What changed since it was loaded is loaded anew, in one batch, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import Settings
from pipeline.steps import changed
from pipeline.storage import Storage
from tests import annotating, world
from tests.annotating import RECEIPT, Run, give_receipt, ids_of
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn

#: What is done to the folder of a recognition.
Change = Callable[[Path, int], object]


def one_of(folder: Path, pattern: str) -> Path:
    [path] = folder.rglob(pattern)
    return path


def correct_the_receipt(folder: Path, number: int) -> None:
    give_receipt(folder.parents[1], number, RECEIPT)


def correct_the_menu(folder: Path, number: int) -> None:
    path = one_of(folder, "*AM.json")
    menu = json.loads(path.read_text(encoding="utf-8-sig"))
    menu[0]["Name"] += "!"
    path.write_text(json.dumps(menu), encoding="utf-8")


def repaint(path: Path) -> None:
    with Image.open(path) as photo:
        other = photo.convert("RGB").rotate(180)
    other.save(path, "JPEG")


def retake_a_photo(folder: Path, number: int) -> None:
    repaint(one_of(folder, "*Qualifying.jpg"))


def delete_the_receipt(folder: Path, number: int) -> None:
    one_of(folder, "*correct_dishes.json").unlink()


def delete_the_menu(folder: Path, number: int) -> None:
    one_of(folder, "*AM.json").unlink()


def export_again(folder: Path, number: int) -> None:
    """Export the recognition once more, with the same photos and another receipt."""
    later = folder.parents[1] / "export_99999999_000000" / folder.name
    shutil.copytree(folder, later)
    give_receipt(folder.parents[1], number, RECEIPT)
    assert one_of(later, "*correct_dishes.json").stat().st_size != one_of(folder, "*correct_dishes.json").stat().st_size


def replace_in_place(folder: Path, number: int) -> None:
    """Write a receipt of the same size and time over the former one, but for the nanoseconds."""
    path = one_of(folder, "*correct_dishes.json")
    facts = path.stat()
    text = path.read_bytes().replace(b'"Count": 1', b'"Count": 2').replace(b'"Count":1', b'"Count":2')
    assert text != path.read_bytes()
    path.write_bytes(text)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


CHANGES: tuple[Change, ...] = (
    correct_the_receipt,
    correct_the_menu,
    retake_a_photo,
    delete_the_receipt,
    delete_the_menu,
    export_again,
    replace_in_place,
)


def touch(folder: Path, number: int) -> None:
    for path in folder.rglob("*.*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))


def add_a_stray_file(folder: Path, number: int) -> None:
    (folder / "notes.txt").write_text("nothing to load", encoding="utf-8")


def export_the_same_again(folder: Path, number: int) -> None:
    shutil.copytree(folder, folder.parents[1] / "export_99999999_000000" / folder.name)


def move_to_another_export(folder: Path, number: int) -> None:
    later = folder.parents[1] / "export_99999999_000000"
    later.mkdir(exist_ok=True)
    shutil.move(folder, later)


EQUAL: tuple[Change, ...] = (touch, add_a_stray_file, export_the_same_again, move_to_another_export)


def change(dataset: Path, changes: Iterable[Change], numbers: Iterable[int]) -> None:
    found = world.folders(dataset)
    for work, number in zip(changes, numbers, strict=True):
        work(found[number], number)


def row_ids(dsn: str, numbers: list[int]) -> list[tuple[Any, ...]]:
    """Return the ids of photos, and of those items of a receipt that the new one has as well."""
    statement = """
        SELECT recognition_id, camera_number::text, id FROM public.images WHERE recognition_id = ANY (%(numbers)s)
        UNION ALL
        SELECT recognition_id, item_type::text, id FROM public.initial_tray_items
        WHERE recognition_id = ANY (%(numbers)s) AND item_type = 'PLATE'
        ORDER BY 1, 2, 3"""
    return world.query(dsn, statement.replace("%(numbers)s", "%s"), (numbers, numbers))


def looks(dsn: str) -> list[tuple[Any, ...]]:
    return world.query(
        dsn, "SELECT batch_id, batch_made, found, already_loaded, changed FROM ingest.looks ORDER BY looked_at"
    )


def test_exactly_what_changed_is_loaded_anew(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(16)
    numbers = ids_of(dataset)
    equal, changed = numbers[: len(EQUAL)], numbers[len(EQUAL) : len(EQUAL) + len(CHANGES)]
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    former, ids = tmp_path / "former", row_ids(dsn, changed)
    shutil.copytree(dataset, former)
    change(dataset, EQUAL, equal)
    change(dataset, CHANGES, changed)

    plain = run("load", "--source", dataset, "--batch-id", "look", "--json")
    assert (plain.code, json.loads(plain.out)["changed_since_load"]) == (0, len(changed))
    told = run("load", "--source", dataset, "--batch-id", "look")
    assert f"{len(changed)} recognitions changed since they were loaded: load --changed\n" in told.out
    dry = json.loads(run("load", "--source", dataset, "--changed", "--dry-run", "--json").out)
    assert (dry["recognitions"], dry["changed_since_load"], dry["batch_made"]) == (len(changed), len(changed), True)
    world.check(settings, (former, "b1", None))

    done = run("load", "--source", dataset, "--batch-id", "b2", "--changed", "--json")
    assert done.code == 0, done.err
    for name in ("found", "already_loaded", "changed_since_load", "beyond_limit", "known_rejects", "files"):
        assert dry[name] == json.loads(done.out)[name], name
    shown = run("status", "--batch-id", "b2").out
    assert f"{len(changed)} loaded recognitions are new versions of what changed.\n" in shown
    assert "changed since" not in shown
    nothing = run("load", "--source", dataset, "--changed", "--dry-run")
    assert nothing.out.startswith(f"Nothing to load: {dataset} has 16 recognitions. Nothing was written.\n")
    assert "16 already loaded" in nothing.out
    counters = json.loads(done.out)["counters"]
    assert (counters["objects_uploaded"], counters["objects_copied"]) == (1, 2 * len(changed) - 1)
    rest = [number for number in numbers if number not in changed]
    world.check(settings, (former, "b1", rest), (dataset, "b2", changed), superseded=[(former, "b1", changed)])
    assert row_ids(dsn, changed) == ids
    assert looks(dsn)[1:] == [("look", False, 16, 16, len(changed)), ("b2", True, 16, 16, len(changed))]

    again = run("load", "--source", dataset, "--batch-id", "b3", "--changed", "--json")
    assert (again.code, json.loads(again.out)["changed_since_load"]) == (0, 0)
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    world.check(settings, (former, "b1", None))


def test_what_was_found_equal_is_not_read_again(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(6)
    numbers = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    change(dataset, EQUAL, numbers[: len(EQUAL)])
    assert run("load", "--source", dataset, "--batch-id", "n1", "--changed").code == 0
    # Content that differs, with size and time as they were: only who reads it finds out.
    for path in dataset.rglob("*"):
        if path.suffix == ".json" and "recognition" in path.name:
            facts = path.stat()
            path.write_bytes(path.read_bytes()[::-1])
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    quiet = run("load", "--source", dataset, "--batch-id", "n2", "--changed", "--json")
    assert (quiet.code, json.loads(quiet.out)["changed_since_load"]) == (0, 0)
    assert [row[1] for row in looks(dsn)] == [True, False, False]


def test_new_and_changed_recognitions_are_one_batch(
    run: Run, own_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dataset = own_dataset(8)
    numbers = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "4").code == 0
    former = tmp_path / "former"
    shutil.copytree(dataset, former)
    change(dataset, [retake_a_photo], [numbers[1]])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed", "--limit", "2").code == 0
    rest = [numbers[0], *numbers[2:4]]
    parts = (former, "b1", rest), (dataset, "b2", [numbers[1], *numbers[4:6]])
    world.check(settings, *parts, superseded=[(former, "b1", [numbers[1]])])


def test_the_former_batch_can_be_reset_while_the_changed_one_is_live(
    run: Run, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(5)
    numbers = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    change(dataset, [correct_the_receipt, retake_a_photo], numbers[:2])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    world.check(settings, (dataset, "b2", numbers[:2]))


def test_a_former_object_that_is_gone_or_damaged_is_sent_again(
    run: Run, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(4)
    numbers = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    change(dataset, [correct_the_receipt] * 2, numbers[:2])
    keys = [f"b1/recognitions/{number}/camera1.jpg" for number in numbers[:2]]
    with closing(Storage(settings)) as storage:
        size = storage.find(keys[1])
        storage.remove(keys[:1])
        storage.upload(keys[1], bytes(size.size if size else 0))
    done = run("load", "--source", dataset, "--batch-id", "b2", "--changed", "--json")
    counters = json.loads(done.out)["counters"]
    assert (done.code, counters["objects_uploaded"]) == (0, 2 + 1)  # with the other photo of the damaged one
    wanted = world.expected(dataset, "b2", numbers[:2])
    stored = world.objects(settings)
    assert {row[2]: row[6] for row in wanted.images}.items() <= stored.items()


@pytest.mark.parametrize("options", [(), ("--changed",)], ids=["plain", "changed"])
def test_a_changed_recognition_that_cannot_be_used_keeps_its_version(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    dataset = own_dataset(6)
    numbers = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    former = tmp_path / "former"
    shutil.copytree(dataset, former)
    photo = one_of(world.folders(dataset)[numbers[0]], "*Main.jpg")
    photo.write_bytes(photo.read_bytes()[:-200])
    one_of(world.folders(dataset)[numbers[1]], "*Main.jpg").unlink()
    change(dataset, [correct_the_receipt], [numbers[2]])
    assert run("load", "--source", dataset, "--batch-id", "b2", *options).code == 0
    seen = json.loads(run("load", "--source", dataset, "--batch-id", "b3", *options, "--json").out)
    assert (seen["batch_made"], seen["known_rejects"]) == (False, 2 if options else 0)
    if not options:
        world.check(settings, (former, "b1", None))
        return
    assert [(row[0], row[1]) for row in annotating.rejects(dsn, "b2")] == [
        (numbers[1], "photo_count"),
        (numbers[0], "photo_truncated"),
    ]
    rest = [number for number in numbers if number != numbers[2]]
    parts = (former, "b1", rest), (dataset, "b2", [numbers[2]])
    world.check(settings, *parts, superseded=[(former, "b1", [numbers[2]])])


def test_strict_refuses_what_changed_into_something_unusable(
    run: Run, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(4)
    numbers = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    before = world.objects(settings)
    change(dataset, [correct_the_receipt], [numbers[0]])
    photo = one_of(world.folders(dataset)[numbers[1]], "*Main.jpg")
    photo.write_bytes(photo.read_bytes()[:-200])
    refused = run("load", "--source", dataset, "--batch-id", "b2", "--changed", "--strict")
    assert (refused.code, "photo_truncated" in refused.err) == (4, True)
    assert world.objects(settings) == before


def test_force_and_changed_exclude_each_other(run: Run, own_dataset: MakeDataset) -> None:
    done = run("load", "--source", own_dataset(4), "--force", "--changed")
    assert (done.code, "--changed" in done.err) == (2, True)


def test_a_look_locks_what_it_compared_only_at_its_end(
    run: Run, own_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own_dataset(3)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    for path in dataset.rglob("*.jpg"):
        os.utime(path)
    compare, free = changed._compare, []

    def beside(*arguments: Any) -> Any:
        free.append(len(world.query(dsn, "SELECT recognition_id FROM ingest.manifest FOR UPDATE NOWAIT")))
        return compare(*arguments)

    monkeypatch.setattr(changed, "_PAGE", 1)
    monkeypatch.setattr(changed, "_compare", beside)
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    assert free == [3, 3, 3]
    assert world.query(dsn, "SELECT count(*) FROM ingest.manifest WHERE seen IS NOT NULL") == [(3,)]

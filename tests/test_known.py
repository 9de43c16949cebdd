"""What the look before had is known; what vanished in between, or is another one, is told again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.steps.discover import discover
from tests import annotating, world
from tests.annotating import RECEIPT, Run, give_receipt, ids_of, key_of, value_of, write
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn


class Nights:
    """Loads of one source, night after night."""

    def __init__(self, run: Run, dsn: str, *command: str | Path) -> None:
        self._run, self._dsn, self._command, self._count = run, dsn, command, 0

    def night(self, *options: str | Path, code: int = 0) -> dict[str, Any]:
        """Load, and return the summary with the codes of what was told, but for the file of the sample itself."""
        self._count += 1
        done = self._run(*self._command, *options, "--batch-id", f"n{self._count}", "--json")
        assert done.code == code, done.err
        summary: dict[str, Any] = json.loads(done.out) if done.out else {}
        inputs = [*summary.get("rejected_inputs", ()), *summary.get("noticed_inputs", ())]
        told = sorted(one["code"] for one in inputs if one["code"] != "file_annotations")
        return {**summary, "told": told}


def photo_of(dataset: Path, number: int) -> Path:
    return next(world.folders(dataset)[number].rglob("*_Main.jpg"))


def use(dsn: str) -> None:
    """Let rows of others reference every item of a receipt."""
    world.query(
        dsn,
        "CREATE TABLE public.checks (item_id bigint REFERENCES public.initial_tray_items (id));"
        "INSERT INTO public.checks SELECT id FROM public.initial_tray_items WHERE item_type = 'FOOD'",
    )


def lose_a_photo(folder: Path) -> None:
    next(folder.rglob("*_Main.jpg")).unlink()


def cut_a_photo(folder: Path) -> None:
    photo = next(folder.rglob("*_Main.jpg"))
    photo.write_bytes(photo.read_bytes()[:-200])


def lose_the_receipt(folder: Path) -> None:
    next(folder.glob("*correct_dishes.json")).unlink()


def leave_a_note(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")


def leave_a_note_beside(folder: Path) -> None:
    leave_a_note(folder.parent)


def nest(folder: Path) -> None:
    (folder / "recognition_77").mkdir()


#: What happens to a recognition, and what is told of it; the last one was never loaded.
FAULTS: list[tuple[str, Callable[[Path], object]]] = [
    ("folder_vanished", shutil.rmtree),
    ("file_unknown", leave_a_note_beside),
    ("folder_nested", nest),
    ("in_use", lose_the_receipt),
    ("photo_count", lose_a_photo),
    ("photo_truncated", cut_a_photo),
    ("photo_count", lose_a_photo),
]


@pytest.mark.slow
def test_what_the_look_before_did_not_have_is_told_again(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(9)
    numbers = ids_of(dataset)[: len(FAULTS)]
    for number in numbers:
        give_receipt(dataset, number, RECEIPT)
    folders = [world.folders(dataset)[number] for number in numbers]
    good = [shutil.copytree(folder, dataset.parent / "good" / folder.name) for folder in folders]
    shutil.rmtree(folders[-1])
    nights = Nights(run, dsn, "load", "--source", dataset, "--changed")
    assert nights.night()["told"] == []
    use(dsn)
    wanted = sorted(code for code, _ in FAULTS)
    for _ in range(2):
        shutil.copytree(good[-1], folders[-1])
        for (_, work), folder in zip(FAULTS, folders, strict=True):
            work(folder)
        assert nights.night()["told"] == wanted
        # A load of a part looks at what is loaded, and at nothing that is new.
        for options in ((), ("--limit", "1"), ()):
            assert nights.night(*options)["told"] == []
        plain = json.loads(run("load", "--source", dataset, "--json").out)
        assert (plain["rejected"], plain["noticed"], plain["changed_since_load"]) == (0, 0, 1)  # which is in use
        assert nights.night()["told"] == []
        for folder, former in zip(folders, good, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(former, folder)
        shutil.rmtree(folders[-1])
        (folders[0].parent / "notes.txt").unlink()
        assert nights.night()["told"] == []


def test_a_version_keeps_its_notices_when_the_former_batch_is_reset(
    run: Run, own_dataset: MakeDataset, dsn: str
) -> None:
    dataset = own_dataset(4)
    first = ids_of(dataset)[0]
    photo, folder = photo_of(dataset, first), world.folders(dataset)[first]
    photo.write_bytes(photo.read_bytes() + b"more")
    leave_a_note(folder)
    nights = Nights(run, dsn, "load", "--source", dataset, "--changed")
    wanted = ["file_unknown", "photo_trailing_bytes"]
    assert (nights.night()["told"], nights.night()["told"]) == (wanted, [])
    give_receipt(dataset, first, RECEIPT)
    assert (nights.night()["told"], nights.night()["told"]) == (wanted, [])
    assert run("reset", "--batch-id", "n1", "--confirm").code == 0
    shown = json.loads(run("status", "--batch-id", "n3", "--json").out)
    assert sorted(one["code"] for one in shown["noticed_inputs"]) == wanted
    left = world.query(dsn, "SELECT code FROM ingest.notices ORDER BY code")
    assert left == [(code,) for code in wanted]
    assert world.query(dsn, "SELECT * FROM ingest.notices WHERE over_at IS NOT NULL") == []


@pytest.mark.parametrize("name", ["photo", "json"])
def test_a_file_that_changes_during_a_load_does_not_hold_its_batch(
    name: str, run: Run, own_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own_dataset(3)
    first = ids_of(dataset)[0]
    changing = photo_of(dataset, first) if name == "photo" else next(world.folders(dataset)[first].glob("*AM.json"))

    def discover_too_early(*arguments: Any, **options: Any) -> Any:
        found = discover(*arguments, **options)
        os.utime(changing)
        return found

    for number in ids_of(dataset)[1:]:
        shutil.rmtree(world.folders(dataset)[number])
    nights = Nights(run, dsn, "load", "--source", dataset)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.graph.tasks.discover", discover_too_early)
        for _ in range(2):  # each time it is told
            assert nights.night()["told"] == [f"{name}_changed"]
    assert nights.night()["recognitions_processed"] == 1


def test_a_reject_is_known_wherever_the_dataset_is(
    run: Run, own_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    first, second = ids_of(dataset)[:2]
    cut_a_photo(world.folders(dataset)[first])
    lose_a_photo(world.folders(dataset)[second])
    assert Nights(run, dsn, "load", "--source", dataset).night()["told"] == ["photo_count", "photo_truncated"]
    export = world.folders(dataset)[first].parent
    for moved in (tmp_path / "moved", tmp_path / "copied", tmp_path / "moved" / export.name):
        if not moved.exists():
            shutil.copytree(dataset, moved, copy_function=shutil.copyfile if moved.name == "copied" else shutil.copy2)
        for _ in range(2):
            told = json.loads(run("load", "--source", moved, "--json").out)
            assert (told["batch_made"], told["known_rejects"], told["rejected_inputs"]) == (False, 2, [])
    cut_a_photo(world.folders(moved)[first])  # as it is now, it was never rejected
    assert run("load", "--source", moved).code == 6


def test_a_plain_load_names_the_unfinished_batches_that_it_passes_over(
    run: Run, own_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dataset = own_dataset(4)
    first, second = ids_of(dataset)[:2]
    file = write(tmp_path / "boxes.json", {key_of(number): value_of("plate") for number in (first, second)})
    commands: dict[str, tuple[str | Path, ...]] = {
        "load": ("load", "--source", dataset),
        "qwen": ("load-qwen", "--file", file),
    }
    for name, command in commands.items():
        assert run(*command, "--batch-id", name).code == 0
    give_receipt(dataset, first, RECEIPT)
    write(file, {key_of(first): value_of("plate", left=40), key_of(second): value_of("plate")})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.graph.tasks.transform_batch", lambda *_, **__: 1 / 0)
        for option in ("changed", "force"):
            for name, command in commands.items():
                only = ("--limit", "2") if (name, option) == ("load", "force") else ()
                assert run(*command, f"--{option}", *only, "--batch-id", f"{name}-{option}").code == 3
    for name, command in commands.items():
        wanted = [f"{name}-changed", f"{name}-force"]
        told = json.loads(run(*command, "--json").out)
        assert (told["held_elsewhere"], told["held_by"]) == (0, wanted)
        assert "unfinished " + ", ".join(wanted) in run(*command).out
    # A dry run of an unfinished batch finds it on record.
    for options in (("--changed",), ("--force", "--limit", "2"), ("--batch-id", "load-changed", "--changed")):
        dry = run(*commands["load"], *options, "--dry-run")
        assert (dry.code, "is on record already" in dry.out) == (0, True), dry.err


def test_a_value_that_was_rejected_is_no_change_any_more(
    run: Run, own_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(4)
    first, second, third, _ = ids_of(dataset)
    values = {key_of(number): value_of("plate") for number in (first, second, third)}
    file = write(tmp_path / "boxes.json", values)
    assert run("load", "--source", dataset).code == 0
    nights = Nights(run, dsn, "load-qwen", "--file", file)
    nights.night()
    malformed = {"plates": {"qwen_detections": [{"bbox_2d": [5, 5, 5, 5], "label": "plate"}]}}
    write(file, {**values, key_of(first): malformed, key_of(second): "no object", key_of(third): value_of("dish_0")})
    for _ in range(2):
        plain = nights.night()
        assert (plain["changed_since_load"], plain["known_rejects"], plain["told"]) == (3, 0, [])
    assert nights.night("--changed")["told"] == ["box_malformed", "json_shape"]
    for options in ((), (), ("--changed",)):
        known = nights.night(*options)
        assert (known["changed_since_load"], known["known_rejects"], known["told"]) == (0, 2, [])
    write(file, {**values, key_of(first): malformed, key_of(third): value_of("dish_0")})
    assert nights.night()["changed_since_load"] == 0
    write(file, {**values, key_of(first): malformed, key_of(second): "no object", key_of(third): value_of("dish_0")})
    assert nights.night()["changed_since_load"] == 1  # it came back
    assert nights.night("--changed", code=6)["told"] == ["json_shape"]


def test_a_rejected_change_is_no_change_any_more(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(4)
    first, second = ids_of(dataset)[:2]
    nights = Nights(run, dsn, "load", "--source", dataset)
    nights.night()
    cut_a_photo(world.folders(dataset)[first])
    lose_a_photo(world.folders(dataset)[second])
    assert nights.night()["changed_since_load"] == 2
    nights.night("--changed", code=6)
    for options in ((), ("--changed",)):
        known = nights.night(*options)
        assert (known["changed_since_load"], known["known_rejects"], known["told"]) == (0, 2, [])


def test_a_recognition_of_two_sources_is_noticed(run: Run, own_dataset: MakeDataset, dsn: str, tmp_path: Path) -> None:
    dataset, other = own_dataset(3), tmp_path / "other"
    shutil.copytree(dataset, other)
    first = ids_of(dataset)[0]
    give_receipt(other, first, RECEIPT)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    for batch_id, source, former in (("b2", other, ("b1", dataset)), ("b3", dataset, ("b2", other))):
        assert run("load", "--source", source, "--batch-id", batch_id, "--changed").code == 0
        statement = "SELECT recognition_id, code, message FROM ingest.notices WHERE batch_id = %s"
        [(number, code, message)] = [
            row for row in world.query(dsn, statement, (batch_id,)) if row[1] != "file_annotations"
        ]
        assert (number, code) == (first, "other_source")
        assert f"batch {former[0]} loaded from {former[1].resolve()}" in message
    give_receipt(dataset, first, None)
    assert run("load", "--source", dataset, "--batch-id", "b4", "--changed").code == 0
    assert world.query(dsn, "SELECT * FROM ingest.notices WHERE batch_id = 'b4'") == []

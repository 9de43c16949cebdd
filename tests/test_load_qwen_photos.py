"""Annotations photo by photo: what a second file adds, what a forced one replaces, and what a reset gives back."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipeline.config import Settings
from pipeline.database import Database
from pipeline.steps.annotations import stage_annotations
from pipeline.steps.reset import reset_batch
from tests import annotating, world
from tests.annotating import Annotate, Annotations, Run, ids_of, key_of, rejects, value_of, write
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn

MAIN, QUALIFYING = "Main", "Qualifying"
STAGE = "pipeline.steps.discover.stage_annotations"


@pytest.fixture
def dataset(run: Run, small_dataset: MakeDataset) -> Path:
    """A loaded dataset of three recognitions."""
    folder = small_dataset(3)
    assert run("load", "--source", folder, "--batch-id", "b1").code == 0
    return folder


def check(settings: Settings, dataset: Path, tmp_path: Path, content: Annotations) -> None:
    """Assert that readers see exactly these annotations."""
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "wanted.json", content))


def test_a_second_file_adds_the_photos_of_the_other_camera(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = ids_of(dataset)
    main = {key_of(first): value_of("dish_0", "plate"), key_of(second): value_of("plate")}
    other = {key_of(first, QUALIFYING): value_of("dish_0", "plate", "plate", left=30)}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", main), "--batch-id", "q1").code == 0
    before = annotating.annotation_ids(dsn)
    done = run("load-qwen", "--file", write(tmp_path / "2.json", {**main, **other}), "--batch-id", "q2")
    assert done.code == 0
    assert done.out.startswith("Batch q2 is done: 1 recognition, 1 photo, 3 detections.")
    assert "Skipped: 2 photos already annotated." in done.out
    check(settings, dataset, tmp_path, {**main, **other})
    assert annotating.annotation_ids(dsn).items() > before.items()
    # A load of the photos again, and a reset of either file, leave what the other says.
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    check(settings, dataset, tmp_path, {**main, **other})
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    check(settings, dataset, tmp_path, other)
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    check(settings, dataset, tmp_path, {})


def test_a_forced_file_replaces_only_the_photos_that_it_has(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = ids_of(dataset)
    former = {
        key_of(number, camera): value_of("dish_0", "plate")
        for number in (first, second)
        for camera in (MAIN, QUALIFYING)
    }
    latter = {key_of(first): value_of("plate", "plate", left=40), key_of(second, QUALIFYING): value_of()}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", former), "--batch-id", "q1").code == 0
    done = run("load-qwen", "--file", write(tmp_path / "2.json", latter), "--batch-id", "q2", "--force")
    assert done.out.startswith("Batch q2 is done: 2 recognitions, 2 photos, 2 detections.")
    check(settings, dataset, tmp_path, {**former, **latter})
    plan = run("reset", "--batch-id", "q2", "--dry-run").out
    assert "batch q1: the former annotations of 2 recognitions are restored" in plan
    # q1 is shown only where q2 does not take its place.
    plan = run("reset", "--batch-id", "q1", "--dry-run").out
    assert "restored" not in plan
    assert plan.startswith("Reset of batch q1, load-qwen, done, started ")
    assert "public.initial_annotations: 4 rows are deleted" in plan
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    check(settings, dataset, tmp_path, former)
    assert run("verify", "--quiet").code == 0


BAD: dict[str, Any] = {
    "another shape": [],
    "no usable box": {"dishes": {"qwen_detections": [{"bbox_2d": [1, 2, 3], "label": "dish_0"}]}},
    "no known label": {"dishes": {"qwen_detections": [{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]}},
    "boxes outside the photo": {"dishes": {"qwen_detections": [{"bbox_2d": [900, 900, 990, 990], "label": "dish_0"}]}},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_photo_of_which_nothing_was_usable_is_taken_once_it_is_mended(
    bad: Any, run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = ids_of(dataset)
    good = {key_of(first): value_of("dish_0"), key_of(second): value_of("plate")}
    file = write(tmp_path / "a.json", {**good, key_of(first, QUALIFYING): bad})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert [number for number, _, _ in rejects(dsn)] == [first]
    check(settings, dataset, tmp_path, good)
    # With --force as well, a photo of which nothing is usable stays as it is.
    mended = {**good, key_of(first, QUALIFYING): value_of("dish_0", "plate", left=20)}
    done = run("load-qwen", "--file", write(file, mended), "--batch-id", "q2")
    assert done.out.startswith("Batch q2 is done: 1 recognition, 1 photo, 2 detections.")
    check(settings, dataset, tmp_path, mended)
    assert run("load-qwen", "--file", write(file, {key_of(first): bad}), "--batch-id", "q3", "--force").code == 6
    check(settings, dataset, tmp_path, mended)


def test_items_are_numbered_on_each_photo_whichever_file_it_comes_from(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    number = ids_of(dataset)[0]
    files = [
        {key_of(number): value_of("plate", "plate", "dish_60", "dish_60")},
        {key_of(number, QUALIFYING): value_of("plate", "plate", "plate", "dish_60")},
    ]
    for nth, content in enumerate(files, 1):
        assert run("load-qwen", "--file", write(tmp_path / f"{nth}.json", content), "--batch-id", f"q{nth}").code == 0
    check(settings, dataset, tmp_path, files[0] | files[1])
    items = [key for key in annotating.item_ids(dsn) if key[0] == number and key[2] == "MODEL"]
    assert sorted(items) == [
        (number, "FOOD", "MODEL", 61, 1),
        (number, "FOOD", "MODEL", 61, 2),
        *((number, "PLATE", "MODEL", 0, nth) for nth in (1, 2, 3)),
    ]
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    check(settings, dataset, tmp_path, files[0])


def test_an_unfinished_batch_keeps_both_photos_of_its_recognitions(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = ids_of(dataset)
    main = write(tmp_path / "1.json", {key_of(first): value_of("plate")})
    both = {key_of(first, QUALIFYING): value_of("dish_0"), key_of(second): value_of("dish_0")}
    annotating.break_transforms(dsn)
    assert run("load-qwen", "--file", main, "--batch-id", "q1").code == 3
    annotating.mend_transforms(dsn)
    done = run("load-qwen", "--file", write(tmp_path / "2.json", both), "--batch-id", "q2")
    assert "Skipped: 1 photo held by unfinished q1." in done.out
    assert run("load-qwen", "--file", main, "--batch-id", "q1").code == 0
    assert run("load-qwen", "--file", tmp_path / "2.json", "--batch-id", "q3").code == 0
    check(settings, dataset, tmp_path, {key_of(first): value_of("plate"), **both})


def test_a_photo_that_another_batch_annotated_meanwhile_is_left_and_its_neighbour_taken(
    dataset: Path, settings: Settings, database: Database, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = ids_of(dataset)
    theirs = {key_of(first): value_of("plate"), key_of(second, QUALIFYING): value_of("plate", "plate")}
    ours = {
        key_of(first): value_of("dish_0"),
        key_of(first, QUALIFYING): value_of("dish_0"),
        key_of(second, QUALIFYING): value_of("dish_0"),
    }
    part = write(tmp_path / "part.json", theirs)

    def stage_and_lose(*arguments: Any, **options: Any) -> str:
        monkeypatch.setattr(STAGE, stage_annotations)
        held_reason = stage_annotations(*arguments, **options)
        with closing(Database(settings)) as other:
            faster = Annotate(settings, other, part)
            faster.discover("q0")
            faster.transform("q0")
        return held_reason

    monkeypatch.setattr(STAGE, stage_and_lose)
    annotate = Annotate(settings, database, write(tmp_path / "all.json", ours))
    found = annotate.discover()
    assert (found.recognitions, found.photos, found.already_loaded) == (1, 1, 2)
    annotate.transform()
    check(settings, dataset, tmp_path, {**theirs, key_of(first, QUALIFYING): value_of("dish_0")})
    assert world.query(dsn, "SELECT count(*) FROM ingest.claims") == [(0,)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_of_each_photo_the_newest_batch_counts_after_any_loads_and_resets(
    seed: int, dataset: Path, settings: Settings, database: Database, dsn: str, tmp_path: Path
) -> None:
    random = Random(seed)
    keys = [key_of(number, camera) for number in ids_of(dataset) for camera in (MAIN, QUALIFYING)]
    batches: dict[str, Annotations] = {}  # those that are done, the oldest first

    def shown() -> Annotations:
        return {key: value for content in batches.values() for key, value in content.items()}

    for step in range(12):
        if batches and random.random() < 0.4:
            name = random.choice(list(batches))
            reset_batch(database, settings, name)
            del batches[name]
        else:
            name, force = f"q{step}", random.random() < 0.5
            chosen = random.sample(keys, random.randint(1, 4))
            content = {key: value_of(*["plate"] * random.randint(0, 3), "dish_0", left=10 + step) for key in chosen}
            annotate = Annotate(settings, database, write(tmp_path / f"{name}.json", content))
            annotate.discover(name, force=force)
            annotate.transform(name)
            taken = {key: value for key, value in content.items() if force or key not in shown()}
            if taken:  # else there is no batch
                batches[name] = taken
        wanted = world.wanted((dataset, "b1", None), qwen=write(tmp_path / "wanted.json", shown())).domain
        found = world.domain(dsn)
        assert world.without_ordinals(found) == world.without_ordinals(wanted)
        assert world.inconsistencies(settings) == []
    for name in batches:
        reset_batch(database, settings, name)
    check(settings, dataset, tmp_path, {})
    assert world.counts(dsn)["raw.detections"] == 0


FOREIGN = "".join(
    json.dumps({"image_name": key_of(number), "dishes": {}, "plates": {}}) + "\n" for number in range(1, 40)
)


@pytest.mark.parametrize("kind", ["foreign fields", "a key", "long keys"])
def test_rejects_of_annotations_are_counted_by_photo(
    kind: str, run: Run, small_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(12)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    usable = {key_of(number): value_of("plate") for number in ids_of(dataset)}
    lines = "".join(json.dumps({key: value}) + "\n" for key, value in usable.items())
    pairs = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in usable.items()]
    long = "x" * 400
    content = {
        "foreign fields": lines + FOREIGN,
        "a key": "{" + ", ".join(pairs + ['"recognition_photo.jpg": {}'] * 24) + "}",
        "long keys": "{" + ", ".join(pairs + [f'"{long}/{key_of(number)}": {{}}' for number in range(1, 25)]) + "}",
    }[kind]
    file = tmp_path / "annotations.json"
    file.write_text(content)
    held = run("load-qwen", "--file", file, "--batch-id", "q1")
    rejected = 39 if kind == "foreign fields" else 24
    assert held.code == 6
    assert f"{rejected} of {rejected + 12} photos are rejected" in held.err

"""The id of a row that others may reference never comes to mean another thing, whatever is loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipeline.config import Settings
from tests import annotating, world
from tests.annotating import RECEIPT, Run, Value, give_receipt, ids_of, key_of, value_of, write
from tests.meanings import meanings
from tests.random_trays import random_boxes, random_receipt
from tests.services import MakeDataset
from tests.sweeps import sweep

run = annotating.run
dsn = annotating.dsn


def in_front(values: dict[str, Value]) -> None:
    for value in values.values():
        value["dishes"]["qwen_detections"].insert(0, {"bbox_2d": [1, 1, 9, 9], "label": "dish_0"})
        value["plates"]["qwen_detections"].insert(0, {"bbox_2d": [2, 2, 9, 9], "label": "plate"})


def shuffled(values: dict[str, Value]) -> None:
    random = Random(7)
    for value in values.values():
        for kind in value.values():
            random.shuffle(kind["qwen_detections"])


def fewer(values: dict[str, Value]) -> None:
    for value in values.values():
        for kind in value.values():
            del kind["qwen_detections"][:1]


@pytest.mark.parametrize("change", [in_front, shuffled, fewer])
def test_no_annotation_comes_to_mean_another_box(
    run: Run,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    tmp_path: Path,
    change: Callable[[dict[str, Value]], None],
) -> None:
    dataset = own_dataset(3)
    for number in ids_of(dataset):
        give_receipt(dataset, number, RECEIPT)
    labels = ("dish_0", "dish_0", "dish_0", "dish_1", "dish_2", "dish_5", "dish_5", "plate", "plate")
    values: dict[str, Value] = {
        key_of(number, camera): value_of(*labels, left=10 + number % 7)
        for number in ids_of(dataset)
        for camera in ("Main", "Qualifying")
    }
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    first = meanings(dsn)
    change(values)
    done = run("load-qwen", "--file", write(tmp_path / "2.json", values), "--batch-id", "q2", "--force")
    assert done.code == 0, done.err
    second = meanings(dsn)
    for kind, meaning in second.items():
        kept = meaning.keys() & first[kind].keys()
        assert kept or not meaning, kind
        assert {one: meaning[one] for one in kept} == {one: first[kind][one] for one in kept}
    assert len(second["annotation"]) == sum(
        len(kind["qwen_detections"]) for v in values.values() for kind in v.values()
    )
    if change is shuffled:
        assert second == first
    assert world.inconsistencies(settings) == []
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    third = meanings(dsn)
    assert sorted(third["annotation"].values()) == sorted(first["annotation"].values())
    for kind, meaning in third.items():
        kept = meaning.keys() & second[kind].keys()
        assert {one: meaning[one] for one in kept} == {one: second[kind][one] for one in kept}
    assert world.inconsistencies(settings) == []


NEW = {"Count": 1, "Dishes": [{"Name": "Чай", "ExternalId": "900001"}]}
RECEIPTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "one more in front": lambda lines: [NEW, *lines],
    "the other way round": lambda lines: lines[::-1],
    "the first twice": lambda lines: [lines[0], *lines],
    "without the first": lambda lines: lines[1:],
    "another quantity": lambda lines: [{**lines[0], "Count": lines[0]["Count"] + 1}, *lines[1:]],
    "options in another order": lambda lines: [{**line, "Dishes": line["Dishes"][::-1]} for line in lines],
}


@pytest.mark.parametrize("change", sweep(zip(RECEIPTS.values()), 3), ids=RECEIPTS)
def test_no_line_option_or_item_comes_to_mean_another_dish(
    run: Run,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    tmp_path: Path,
    change: Callable[[list[Any]], list[Any]],
) -> None:
    dataset = own_dataset(2)
    for number in ids_of(dataset):
        give_receipt(dataset, number, RECEIPT)
    values = {key_of(number): value_of("dish_0", "dish_1", "dish_2", "plate") for number in ids_of(dataset)}
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    for table, column in (
        ("recipe_line_options", "model_score = id"),
        ("initial_annotations", "is_occluded = true"),
        ("initial_tray_items", "bottle_orientation = 'vertical'"),
    ):
        world.query(dsn, f"UPDATE public.{table} SET {column} WHERE {world.ours(f'public.{table}')}")
    first, receipt = meanings(dsn), change(RECEIPT)
    for number in ids_of(dataset):
        give_receipt(dataset, number, receipt)
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.code == 0, done.err
    second = meanings(dsn)
    for kind, meaning in second.items():
        kept = meaning.keys() & first[kind].keys()
        if kind != "pairing":
            assert {one: meaning[one] for one in kept} == {one: first[kind][one] for one in kept}
    assert second["annotation"] == first["annotation"]
    numbers = world.query(
        dsn,
        "SELECT count(*), count(DISTINCT (recipe_id, line_number)), max(line_number), min(line_number)"
        f" FROM public.recipe_lines WHERE {world.ours('public.recipe_lines')}",
    )
    assert numbers == [(2 * len(receipt), 2 * len(receipt), len(receipt), 1)]
    stayed = [line for line in second["line"] if line in first["line"]]
    assert stayed
    changed = "SELECT count(*) FROM public.recipe_line_options WHERE model_score IS DISTINCT FROM id AND recipe_line_id"
    assert world.query(dsn, f"{changed} = ANY (%s)", (stayed,)) == [(0,)]
    occluded = (
        f"SELECT bool_and(is_occluded) FROM public.initial_annotations WHERE {world.ours('public.initial_annotations')}"
    )
    assert world.query(dsn, occluded) == [(True,)]
    assert world.inconsistencies(settings) == []
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    third = meanings(dsn)
    assert sorted(value for _, value in third["line"].items()) == sorted(first["line"].values())
    assert third["annotation"] == first["annotation"]
    assert world.inconsistencies(settings) == []


LINES = [[{"Count": 1, "Dishes": [{"Name": name, "ExternalId": name}]}] for name in ("10", "20", "30")]
FIRST, SECOND, THIRD = (line for [line] in LINES)


def same_box(*labels: str, also: tuple[str, ...] = ()) -> Value:
    """A photo on which all of these labels have one box, and others have boxes elsewhere."""
    value = value_of(*labels, *also)
    for kind in value.values():
        for detection in kind["qwen_detections"]:
            if detection["label"] in labels:
                detection["bbox_2d"] = [5, 5, 60, 60]
    return value


#: The receipt and labels at first, then the receipt and the labels that come to one item.
MEETING: dict[str, tuple[list[Any], Value, list[Any], Value]] = {
    "one more line in front, then the label of the moved line": (
        [FIRST, SECOND],
        same_box("dish_0"),
        [THIRD, FIRST, SECOND],
        same_box("dish_0", "dish_1", also=("plate",)),
    ),
    "the first line goes, so that the second takes its place": (
        [FIRST, SECOND],
        same_box("dish_0", "dish_1"),
        [SECOND, THIRD],
        same_box("dish_0", "dish_1", also=("plate", "plate")),
    ),
    "a line comes back that the model alone saw": (
        [FIRST],
        same_box("dish_1", "dish_2"),
        [SECOND, FIRST, THIRD],
        same_box("dish_0", "dish_1", "dish_2"),
    ),
    "the labels follow the moved line": ([FIRST, SECOND], same_box("dish_0"), [SECOND, FIRST], same_box("dish_1")),
}


@pytest.mark.parametrize("case", sweep(zip(MEETING), len(MEETING)))
def test_labels_with_one_box_that_come_to_one_item_are_all_shown(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path, case: str
) -> None:
    receipt, value, latter_receipt, latter = MEETING[case]
    dataset = own_dataset(2)
    file = tmp_path / "annotations.json"

    def load(batch_id: str, lines: list[Any]) -> None:
        for number in ids_of(dataset):
            give_receipt(dataset, number, lines)
        done = run("load", "--source", dataset, "--batch-id", batch_id, "--force")
        assert done.code == 0, done.err

    def annotate(batch_id: str, value: Value) -> dict[str, dict[int, tuple[object, ...]]]:
        write(file, {key_of(number, camera): value for number in ids_of(dataset) for camera in ("Main", "Qualifying")})
        done = run("load-qwen", "--file", file, "--batch-id", batch_id, "--force")
        assert done.code == 0, done.err
        assert world.inconsistencies(settings) == []
        found = meanings(dsn)
        assert len(found["annotation"]) == 4 * sum(len(kind["qwen_detections"]) for kind in value.values())
        return found

    load("b1", receipt)
    first = annotate("q1", value)
    load("b2", latter_receipt)
    second = annotate("q2", latter)
    kept = first["annotation"].keys() & second["annotation"].keys()
    assert {one: second["annotation"][one] for one in kept} == {one: first["annotation"][one] for one in kept}
    assert annotate("q3", latter) == second
    shuffled({"": latter})
    for kind in latter.values():
        kind["qwen_detections"].reverse()
    assert annotate("q4", latter) == second
    for batch_id in ("q4", "q3", "q2", "b2"):
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0
        assert world.inconsistencies(settings) == []
    last = meanings(dsn)["annotation"]
    assert sorted(last.values()) == sorted(first["annotation"].values())


def test_a_box_that_a_person_drew_on_the_item_is_no_obstacle(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(1)
    [number] = ids_of(dataset)
    give_receipt(dataset, number, [FIRST])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    value = same_box("dish_0", "plate", "dish_4")
    file = write(tmp_path / "annotations.json", {key_of(number): value})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.query(dsn, "UPDATE public.initial_annotations SET source = 'HUMAN' WHERE label IS NOT NULL")
    for batch_id in ("q2", "q3"):
        done = run("load-qwen", "--file", file, "--batch-id", batch_id, "--force")
        assert done.code == 0, done.err
        rows = (
            f"SELECT source, count(*) FROM public.initial_annotations WHERE {world.ours('public.initial_annotations')}"
        )
        assert world.query(dsn, f"{rows} GROUP BY source ORDER BY source") == [("HUMAN", 3), ("MODEL", 3)]
        assert world.inconsistencies(settings) == []


#: Boxes that come back: label, x, y, w, h.
BOXES = (("dish_0", 10, 20.5, 50, 40), ("dish_1", 60, 20, 30, 30), ("dish_7", 5, 5, 9, 9), ("plate", 1, 1, 99, 88))


@pytest.mark.parametrize("seed", sweep(zip(range(1, 11)), 10))
def test_no_id_comes_to_mean_another_thing_whatever_is_loaded_again(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path, seed: int
) -> None:
    chosen, dataset = Random(seed), own_dataset(3)
    known: dict[str, dict[int, tuple[object, ...]]] = {}
    for at in range(8):
        if at and chosen.random() < 0.5:
            values = {
                key_of(number, camera): random_boxes(chosen, BOXES)
                for number in ids_of(dataset)
                for camera in ("Main", "Qualifying")
            }
            file = write(tmp_path / f"{at}.json", values)
            done = run("load-qwen", "--file", file, "--batch-id", f"q{at}", "--force")
        else:
            for number in chosen.sample(ids_of(dataset), 2):
                give_receipt(dataset, number, random_receipt(chosen, RECEIPT))
            done = run("load", "--source", dataset, "--batch-id", f"b{at}", "--force")
        assert done.code == 0, done.err
        assert world.inconsistencies(settings) == []
        found = meanings(dsn)
        del found["pairing"]
        for kind, rows in found.items():
            former = known.setdefault(kind, {})
            assert {one: meaning for one, meaning in rows.items() if former.get(one, meaning) != meaning} == {}
            former.update(rows)

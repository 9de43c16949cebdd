"""Loading annotations: what becomes rows, and what is left out."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Settings
from pipeline.dataset.annotations import ANNOTATIONS
from pipeline.sample.entries import BROKEN_ANNOTATIONS
from pipeline.steps import annotations as annotations_module
from tests import annotating, world
from tests.annotating import (
    RECEIPT,
    Run,
    give_receipt,
    ids_of,
    key_of,
    markers,
    read,
    rejects,
    value_of,
    write,
)
from tests.services import MakeDataset
from tests.sweeps import sweep

run = annotating.run
dsn = annotating.dsn


# From the file to the domain


def test_annotations_become_rows_as_the_file_says(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(12)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    before = world.dump(dsn)
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert (done.code, done.err) == (0, "")
    detections = len(world.expected(dataset, "b1", qwen=file).annotations)
    assert done.out.startswith(f"Batch q1 is done: 12 recognitions, 24 photos, {detections} detections.\n")
    assert "Rejected" not in done.out
    assert "Skipped" not in done.out
    world.check(settings, (dataset, "b1", None), qwen=file)
    assert markers(dsn) == [("copy", 1), ("discover", 0), ("load", 0), ("transform", 0)]
    assert world.query(dsn, "SELECT count(*) FROM ingest.claims") == [(0,)]
    after = world.dump(dsn)
    for name in set(world.DOMAIN) - {"initial_tray_items", "initial_annotations"}:
        assert after[name] == before[name]
    assert set(after["initial_tray_items"]) > set(before["initial_tray_items"])


def test_the_raw_rows_are_the_detections_of_the_file(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(12)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1").code == 0
    wanted = []
    for key, value in read(dataset / ANNOTATIONS).items():
        match = re.search(r"recognition_(\d+)/", key)
        assert match is not None
        camera = 1 if "Main" in key else 2
        found = [*value["dishes"]["qwen_detections"], *value["plates"]["qwen_detections"]]
        for detection, one in enumerate(found, 1):
            wanted.append(
                (
                    "q1",
                    int(match[1]),
                    camera,
                    detection,
                    one["label"],
                    *(Decimal(str(corner)) for corner in one["bbox_2d"]),
                )
            )
    rows = world.query(
        dsn,
        "SELECT batch_id, recognition_id, camera_number, detection, label, x1, y1, x2, y2 FROM raw.detections"
        " ORDER BY 2, 3, 4",
    )
    assert rows == sorted(wanted)


def shown(dsn: str, number: int) -> list[tuple[Any, ...]]:
    """Return camera, detection, and item (type, source, line, ordinal) of the annotations of a recognition."""
    return [(row[1], row[2], *row[5:]) for row in world.domain(dsn).annotations if row[0] == number]


def test_a_detection_belongs_to_an_item_of_its_line(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    give_receipt(dataset, first, RECEIPT)
    give_receipt(dataset, second, None)
    give_receipt(dataset, third, [])
    seen = ("dish_0", "dish_2", "dish_0", "dish_1", "dish_0", "dish_1", "dish_3", "dish_2", "dish_3", "dish_40")
    file = write(
        tmp_path / "a.json",
        {
            key_of(first): value_of(*seen, "plate", "plate"),
            key_of(first, "Qualifying"): value_of("dish_2", "dish_0", "dish_3", "plate", "plate", "plate"),
            key_of(second): value_of("dish_0", "dish_0", "plate"),
            key_of(second, "Qualifying"): value_of("dish_0", "dish_1"),
            key_of(third, "Qualifying"): value_of("dish_0"),
        },
    )
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    line, model = ("FOOD", "RECIPE_LINE_OPTION"), ("FOOD", "MODEL")
    plate = ("PLATE", "MODEL", 0)
    assert shown(dsn, first) == [
        (1, 1, *line, 1, 1),
        (1, 2, *line, 3, 1),
        (1, 3, *line, 1, 2),
        (1, 4, *line, 2, 1),
        (1, 5, *line, 1, 2),  # the third dish_0, of which the till knows two
        (1, 6, *line, 2, 1),
        (1, 7, *model, 4, 1),
        (1, 8, *line, 3, 2),
        (1, 9, *model, 4, 2),
        (1, 10, *model, 41, 1),
        (1, 11, *plate, 1),
        (1, 12, *plate, 2),
        (2, 1, *line, 3, 1),
        (2, 2, *line, 1, 1),
        (2, 3, *model, 4, 1),
        (2, 4, *plate, 1),
        (2, 5, *plate, 2),
        (2, 6, *plate, 3),
    ]
    assert shown(dsn, second) == [
        (1, 1, *model, 1, 1),
        (1, 2, *model, 1, 2),
        (1, 3, *plate, 1),
        (2, 1, *model, 1, 1),
        (2, 2, *model, 2, 1),
    ]
    assert shown(dsn, third) == [(2, 1, *model, 1, 1)]
    food = [row[2:6] for row in world.domain(dsn).items if row[0] == first and row[1] == "FOOD"]
    assert [row[1:3] for row in food if row[0] == "RECIPE_LINE_OPTION"] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (3, 1),
        (3, 2),
        (3, 3),
    ]
    assert {row[3] for row in food if row[0] == "MODEL"} == {None}
    world.check(settings, (dataset, "b1", None), qwen=file)


def test_labels_and_boxes_of_any_number_count_as_what_they_say(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(1)
    [number] = ids_of(dataset)
    give_receipt(dataset, number, RECEIPT)
    corners = [[0.1, 0.2, 100.30000000000001, 1.2e2], [0, 0, 0.001, 120.0], [1.0, 2, 3, 4], [10, 5e-1, 160, 7.25]]
    value = value_of(*["dish_0"] * 3, "dish_999999")
    for one, box in zip(value["dishes"]["qwen_detections"], corners, strict=True):
        one["bbox_2d"] = box
    file = write(tmp_path / "a.json", {key_of(number): value})
    padded = tmp_path / "padded.json"
    padded.write_text(file.read_text(encoding="utf-8").replace('"dish_0"', '"dish_00"', 1), encoding="utf-8")
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", padded, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=file)
    assert [row[3:5] for row in shown(dsn, number)] == [("RECIPE_LINE_OPTION", 1)] * 3 + [("MODEL", 1_000_000)]


def test_a_file_in_another_form_says_the_same(
    run: Run, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    plain = {f"данные/{key}": value for key, value in read(dataset / ANNOTATIONS).items()}
    windows = {key.replace("/", "\\"): value for key, value in plain.items()}
    text = json.dumps(dict(reversed(windows.items())), ensure_ascii=True, indent="\t", sort_keys=True)
    odd = tmp_path / "odd.json"
    odd.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", odd, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)


def test_the_file_is_found_where_the_setting_or_the_dataset_has_it(
    run: Run, own_dataset: MakeDataset, settings: Settings, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own_dataset(3)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    lost = run("load-qwen")
    assert lost.code == 2
    assert "QWEN_ANNOTATIONS" in lost.err
    monkeypatch.setenv("QWEN_ANNOTATIONS", str(write(workdir / "none.json", {})))
    empty = run("load-qwen")
    assert empty.code == 0
    assert f"Nothing to load: {workdir / 'none.json'} has 0 photos." in empty.out
    monkeypatch.delenv("QWEN_ANNOTATIONS")
    monkeypatch.setenv("DATASET_DIR", str(dataset))
    assert run("load-qwen").code == 0
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)


def test_of_several_keys_for_a_photo_the_one_that_sorts_last_counts(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    last = {
        key_of(first, export="export_10"): value_of("dish_0", "plate"),
        key_of(second, "Qualifying"): value_of("plate"),
    }
    others = {
        key_of(first): value_of("dish_1", left=100),
        key_of(first, export="export_2"): value_of("dish_2", left=200),
        key_of(first, export="EXPORT_9"): value_of("dish_3", left=300),
    }
    wanted = write(tmp_path / "last.json", last)
    file = tmp_path / "all.json"
    entries = [(key_of(second, "Qualifying"), value_of("dish_7")), *others.items(), *last.items()]
    file.write_text(
        "{" + ",".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries) + "}", encoding="utf-8"
    )
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert done.code == 0
    assert "the one that sorts last was taken, 4 earlier copies were left" in done.out
    assert rejects(dsn) == []
    world.check(settings, (dataset, "b1", None), qwen=wanted)


# What is left out


@pytest.mark.parametrize("page", [1, 2, 2000])
def test_every_defect_is_one_reject_and_nothing_else_is_lost(
    page: int,
    run: Run,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(annotations_module, "_PAGE", page)
    dataset, whole = small_dataset(6, broken=True), small_dataset(6)
    good = ids_of(whole)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%").code == 0
    done = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1")
    assert done.code == 0
    assert f"Rejected: {len(BROKEN_ANNOTATIONS)} (" in done.out
    assert "box_malformed 4" in done.out
    rows = world.query(
        dsn, "SELECT recognition_id, code, path, message, step FROM ingest.rejects WHERE batch_id = 'q1'"
    )
    assert len(rows) == len(BROKEN_ANNOTATIONS)
    unknown = max(
        int(number) for key in read(dataset / ANNOTATIONS) for number in re.findall(r"recognition_(\d+)/", key)
    )
    assert sorted((row[1], row[0]) for row in rows) == [
        ("annotation_key", None),
        *[("box_malformed", good[-1])] * 4,
        ("box_outside", good[-1]),
        ("json_shape", good[-1]),
        ("label_unknown", good[-1]),
        ("recognition_unknown", unknown),
    ]
    assert unknown not in good
    assert all(path in read(dataset / ANNOTATIONS) and message for _, _, path, message, _ in rows)
    assert {row[4] for row in rows} == {"discover"}
    # Of the photo whose value is an array there is nothing.
    wanted = {
        key: value
        for key, value in read(whole / ANNOTATIONS).items()
        if not (f"recognition_{good[-1]}/" in key and "Qualifying" in key)
    }
    world.check(settings, (dataset, "b1", good), qwen=write(tmp_path / "wanted.json", wanted))


def test_an_entry_that_is_no_json_or_no_photo_is_one_reject(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    ids = ids_of(dataset)
    deep = "[" * 100_000 + "]" * 100_000
    large = '"' + "x" * (3 << 20) + '"'
    spoilt = {
        key_of(ids[0]): '{"dishes": {"qwen_detections": [nil]}}',
        key_of(ids[1], "Qualifying"): deep,
        key_of(ids[2]): f'{{"dishes": {{"qwen_detections": []}}, "raw": {large}}}',
        key_of(ids[3]): "[]",
        f"recognition_{2**63}/Main.jpg": "{}",
        f"recognition_{'0' * 20}{'9' * 20}/Main.jpg": "{}",
        "recognition_7/Ma\\u0000in.jpg": "{}",
        "recognition_7/Main\\ud800.jpg": "{}",
        "": "null",
        "x" * 5000: "{}",
    }
    kept = {key_of(ids[4]): value_of("dish_0", "plate"), key_of(ids[5], "Qualifying"): value_of("plate")}
    entries = [*spoilt.items(), *((key, json.dumps(value)) for key, value in kept.items())]
    file = tmp_path / "a.json"
    file.write_text("{" + ",\n".join(f'"{key}": {value}' for key, value in entries) + "}", encoding="utf-8")
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run("load-qwen", "--file", file, "--batch-id", "q1", "--max-rejects", "100%")
    assert done.code == 0
    assert "Traceback" not in done.err
    assert sorted((code, number) for number, code, _ in rejects(dsn) if number is not None) == [
        ("json_broken", ids[0]),
        ("json_shape", ids[1]),
        ("json_shape", ids[3]),
        ("json_too_large", ids[2]),
    ]
    others = sorted(code for number, code, _ in rejects(dsn) if number is None)
    assert others == ["annotation_key"] * 4 + ["id_invalid"] * 2
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "kept.json", kept))


def test_bytes_that_are_no_utf8_spoil_their_entry_alone(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    ids = ids_of(dataset)
    kept = write(tmp_path / "kept.json", {key_of(ids[0]): value_of("dish_0"), key_of(ids[2]): value_of("plate")})
    text = write(
        tmp_path / "a.json",
        {
            key_of(ids[0]): {**value_of("dish_0"), "raw": "ЖЖ"},
            key_of(ids[1]): value_of("ЖЖ"),
            f"ЖЖ/{key_of(ids[1])}": value_of("dish_0"),
            key_of(ids[2]): value_of("plate"),
        },
    )
    file = tmp_path / "b.json"
    file.write_bytes(text.read_bytes().replace("ЖЖ".encode(), b"\xff\xd0"))
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert sorted(rejects(dsn), key=itemgetter(1)) == [
        (None, "annotation_key", "discover"),
        (ids[1], "label_unknown", "discover"),
    ]
    world.check(settings, (dataset, "b1", None), qwen=kept)


@pytest.mark.parametrize("content", sweep(zip([b"", b"[]", b'{"a": {}', b"PK\x03\x04", None])))
def test_a_file_that_is_broken_as_a_whole_is_one_sentence_and_nothing_is_written(
    content: bytes | None, run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    file = tmp_path / "a.json"
    # None: whole, but for the last byte.
    file.write_bytes((dataset / ANNOTATIONS).read_bytes().rstrip()[:-1] if content is None else content)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert (done.code, done.out) == (2, "")
    lines = done.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Error: The annotations file is not a JSON object: at byte ")
    assert lines[1] == f"Hint: The file is {file}. Create or copy it again; nothing was loaded."
    assert world.query(dsn, "SELECT id FROM ingest.batches") == [("b1",)]
    assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)


@pytest.mark.parametrize("name", ["nowhere.json", ".", "", "x" * 5000, "a\udcffb", "~nobody-of-that-name/x"])
def test_a_name_that_is_no_file_is_one_sentence(name: str, run: Run, dsn: str) -> None:
    done = run("load-qwen", "--file", name)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 2
    assert "--file" in done.err
    assert world.query(dsn, "SELECT count(*) FROM ingest.batches") == [(0,)]


def test_what_is_not_loaded_yet_is_a_reject_and_annotated_by_a_later_batch(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    file = dataset / ANNOTATIONS
    ids = ids_of(dataset)
    early = run("load-qwen", "--file", file, "--batch-id", "q0")
    assert early.code == 6
    assert early.err.startswith("Batch q0 is held: 0 recognitions")
    assert [code for _, code, _ in rejects(dsn, "q0")] == ["recognition_unknown"] * 12
    assert run("load", "--source", dataset, "--limit", "4", "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert (rejects(dsn), world.query(dsn, "SELECT known_rejects FROM ingest.looks WHERE batch_id = 'q1'")) == (
        [],
        [(4,)],
    )
    world.check(settings, (dataset, "b1", ids[:4]), qwen=file)
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    done = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert done.code == 0
    assert "Batch q2 is done: 2 recognitions, 4 photos" in done.out
    assert "Skipped: 8 photos already annotated." in done.out
    assert rejects(dsn, "q2") == []
    world.check(settings, (dataset, "b1", ids[:4]), (dataset, "b2", ids[4:]), qwen=file)


def test_what_is_wrong_with_photos_that_are_skipped_is_not_told_again(
    run: Run, small_dataset: MakeDataset, dsn: str
) -> None:
    dataset = small_dataset(6, broken=True)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    before = world.dump(dsn)
    done = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert done.code == 0
    assert "Skipped: 11 photos already annotated.\n" in done.out
    # Two are of no photo that could be skipped, and the photo of the third has no annotations yet.
    assert "Known rejects: 3, recorded by earlier loads and unchanged.\n" in done.out
    assert world.dump(dsn) == before
    # Counted again where they are looked at again.
    forced = run("load-qwen", "--file", file, "--batch-id", "q3", "--force")
    assert (forced.code, rejects(dsn, "q3")) == (0, [])
    assert f"Known rejects: {len(BROKEN_ANNOTATIONS)}," in forced.out

"""Loading annotations, as its users run it: what the domain shows afterwards, what is left out, and what is kept."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.batches.state import KIND_QWEN
from pipeline.cli import main
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.observe.metrics import Metrics
from pipeline.sample.broken import BROKEN_ANNOTATIONS
from pipeline.steps import annotations as annotations_module
from pipeline.steps.annotations import copy_annotations, stage_annotations
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import Discovery, Request, discover
from pipeline.steps.transform import transform_batch
from pipeline.storage import Storage
from tests import world
from tests.services import MakeDataset, RunPipeline, Start, free_port
from tests.test_luigi import finish

ANNOTATIONS = "qwen_annotations.json"
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline", "LoadQwen")

#: Where the steps call what reads the file.
STAGE = "pipeline.steps.discover.stage_annotations"
COPY_IN = "pipeline.steps.copy.copy_annotations"

Value = dict[str, Any]
Annotations = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, in the working directory."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.database_url.reveal()


def ids_of(dataset: Path) -> list[int]:
    return sorted(world.folders(dataset))


def key_of(number: int, camera: str = "Main", export: str = "export_1") -> str:
    return f"RRS_Dataset/{export}/recognition_{number}/photos/recognition_{number}_2025-10-11_{camera}.jpg"


def boxes(*labels: str, left: float = 10) -> list[Value]:
    """Boxes with these labels, each at another place."""
    return [{"bbox_2d": [left + n, 20.5, left + n + 50, 80], "label": label} for n, label in enumerate(labels)]


def value_of(*labels: str, left: float = 10) -> Value:
    """The value of a photo on which the model saw these."""
    everything = boxes(*labels, left=left)
    return {
        "dishes": {"qwen_detections": [one for one in everything if one["label"] != "plate"]},
        "plates": {"qwen_detections": [one for one in everything if one["label"] == "plate"]},
    }


def write(path: Path, content: Annotations) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def read(path: Path) -> Annotations:
    found: Annotations = json.loads(path.read_text(encoding="utf-8"))
    return found


def of(content: Annotations, numbers: Iterable[int]) -> Annotations:
    """Return the entries of these recognitions."""
    names = [f"recognition_{number}/" for number in numbers]
    return {key: value for key, value in content.items() if any(name in key for name in names)}


def rejects(dsn: str, batch_id: str = "q1") -> list[tuple[Any, ...]]:
    return world.query(
        dsn, "SELECT recognition_id, code, step FROM ingest.rejects WHERE batch_id = %s ORDER BY id", (batch_id,)
    )


def markers(dsn: str, batch_id: str = "q1") -> list[tuple[Any, ...]]:
    return world.query(dsn, "SELECT step, shard FROM ingest.batch_state WHERE batch_id = %s ORDER BY 1, 2", (batch_id,))


def annotated(dsn: str) -> set[int]:
    return {row[0] for row in world.domain(dsn).annotations}


def annotation_ids(dsn: str) -> dict[tuple[int, int, int], int]:
    """Return (recognition, camera, detection) -> id."""
    rows = world.query(
        dsn,
        "SELECT i.recognition_id, i.camera_number, a.detection, a.id"
        " FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id",
    )
    return {row[:3]: row[3] for row in rows}


def item_ids(dsn: str) -> dict[tuple[Any, ...], int]:
    """Return (recognition, type, source, line, ordinal) -> id."""
    rows = world.query(
        dsn, "SELECT recognition_id, item_type, source, line_number, ordinal, id FROM public.initial_tray_items"
    )
    return {row[:5]: row[5] for row in rows}


def break_copies(dsn: str) -> None:
    """Let every COPY of detections fail."""
    world.query(dsn, "ALTER TABLE raw.detections ADD CONSTRAINT never CHECK (detection < 0) NOT VALID")


def mend_copies(dsn: str) -> None:
    world.query(dsn, "ALTER TABLE raw.detections DROP CONSTRAINT never")


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
            wanted.append(("q1", int(match[1]), camera, detection, one["label"], *map(float, one["bbox_2d"])))
    rows = world.query(
        dsn,
        "SELECT batch_id, recognition_id, camera_number, detection, label, x1, y1, x2, y2 FROM raw.detections"
        " ORDER BY 2, 3, 4",
    )
    assert rows == sorted(wanted)


RECEIPT = [
    {"Count": 2, "Dishes": [{"Name": "Борщ", "ExternalId": "11"}, {"Name": "Щи", "ExternalId": "12"}]},
    {"Count": 1, "Dishes": [{"Name": "Хлеб", "ExternalId": "21"}]},
    {"Count": 3, "Dishes": [{"Name": "Чай", "ExternalId": "31"}]},
]


def give_receipt(dataset: Path, number: int, receipt: list[Any] | None) -> None:
    folder = world.folders(dataset)[number]
    for path in folder.glob("*correct_dishes.json"):
        path.unlink()
    if receipt is not None:
        path = folder / f"{number}_recognition_2025-10-11_correct_dishes.json"
        path.write_text(json.dumps(receipt, ensure_ascii=False), encoding="utf-8")


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
    corners = [[0.1, 0.2, 0.30000000000000004, 1e3], [-5, -0.5, 1_000_000, 7.25], [0, 0, 1e-9, 1], [1.0, 2, 3, 4]]
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
    assert re.match(r"Batch qwen_\d{8}_\d{6} is done: 0 recognitions, 0 photos, 0 detections\.\n", empty.out)
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
        key_of(first, export="export_2"): value_of("dish_0", "plate"),
        key_of(second, "Qualifying"): value_of("plate"),
    }
    others = {
        key_of(first): value_of("dish_1", left=100),
        key_of(first, export="export_10"): value_of("dish_2", left=200),
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
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
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
        ("json_shape", good[-1]),
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
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
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


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": {}', b"\x1f\x8b\x08\x00", None])
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
    assert lines[1].startswith("Hint: ")
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
    assert early.code == 0
    assert early.out.startswith("Batch q0 is done: 0 recognitions")
    assert [code for _, code, _ in rejects(dsn, "q0")] == ["recognition_unknown"] * 12
    assert run("load", "--source", dataset, "--limit", "4", "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert {number for number, _, _ in rejects(dsn)} == set(ids[4:])
    world.check(settings, (dataset, "b1", ids[:4]), qwen=file)
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    done = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert done.code == 0
    assert "Batch q2 is done: 2 recognitions, 4 photos" in done.out
    assert "Skipped: 4 already annotated." in done.out
    assert rejects(dsn, "q2") == []
    world.check(settings, (dataset, "b1", ids[:4]), (dataset, "b2", ids[4:]), qwen=file)


def test_what_is_wrong_with_photos_that_are_skipped_is_not_told_again(
    run: Run, small_dataset: MakeDataset, dsn: str
) -> None:
    dataset = small_dataset(6, broken=True)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    before = world.dump(dsn)
    done = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert done.code == 0
    assert done.out.startswith(
        "Batch q2 is done: 0 recognitions, 0 photos, 0 detections.\nSkipped: 6 already annotated.\n"
    )
    # These two are of no photo that could be skipped.
    assert sorted(code for _, code, _ in rejects(dsn, "q2")) == ["annotation_key", "recognition_unknown"]
    assert world.dump(dsn) == before
    # Told again where they are looked at again.
    assert run("load-qwen", "--file", file, "--batch-id", "q3", "--force").code == 0
    assert len(rejects(dsn, "q3")) == len(BROKEN_ANNOTATIONS)


# Again


def test_a_second_run_changes_nothing(
    run: Run, small_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    execute = Connection.execute

    def counted(self: Connection, name: str, **values: object) -> Sequence[Any]:
        asked.append(name)
        return execute(self, name, **values)

    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    numbers = []
    for seed, count in ((1, 2), (2, 9)):
        dataset = small_dataset(count, seed=seed)
        file = dataset / ANNOTATIONS
        assert run("load", "--source", dataset, "--batch-id", f"b{seed}").code == 0
        first = run("load-qwen", "--file", file, "--batch-id", f"q{seed}")
        assert first.code == 0
        before = world.dump(dsn), world.counts(dsn)
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "execute", counted)
            asked.clear()
            assert run("load-qwen", "--file", file, "--batch-id", f"q{seed}") == first
            numbers.append(len(asked))
        assert run("load-qwen", "--batch-id", f"q{seed}") == first
        assert (world.dump(dsn), world.counts(dsn)) == before
    assert numbers[0] == numbers[1] < 20


def test_a_finished_batch_does_not_need_its_file_any_more(
    run: Run, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(3)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    first = run("load-qwen", "--file", file, "--batch-id", "q1")
    file.rename(dataset / "moved.json")
    assert run("load-qwen", "--file", file, "--batch-id", "q1") == first
    world.check(settings, (dataset, "b1", None), qwen=dataset / "moved.json")


def test_a_forced_batch_is_a_new_version_that_keeps_the_ids_of_what_stays(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    give_receipt(dataset, first, RECEIPT)
    former = {
        key_of(first): value_of("dish_0", "dish_0", "dish_5", "dish_6", "plate", "plate"),
        key_of(first, "Qualifying"): value_of("dish_0", "plate", "plate", "plate"),
        key_of(second): value_of("dish_0", "plate"),
        key_of(third): value_of("plate"),
    }
    latter = {
        key_of(first): value_of("dish_2", "dish_0", "dish_5", "plate", left=300),
        key_of(first, "Qualifying"): value_of("dish_0", "dish_8", "dish_8", "dish_8", "plate", left=300),
        key_of(second): former[key_of(second)],
    }
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", former), "--batch-id", "q1").code == 0
    annotations, items = annotation_ids(dsn), item_ids(dsn)
    unchanged = {key: row for key, row in annotations.items() if key[0] != first}
    assert run("load-qwen", "--file", write(tmp_path / "2.json", latter), "--batch-id", "q2", "--force").code == 0
    # The recognition that the second file does not name keeps what it had.
    wanted = write(tmp_path / "3.json", {**latter, key_of(third): former[key_of(third)]})
    world.check(settings, (dataset, "b1", None), qwen=wanted)
    for now, before in ((annotation_ids(dsn), annotations), (item_ids(dsn), items)):
        kept = now.keys() & before.keys()
        assert {key: now[key] for key in kept} == {key: before[key] for key in kept}
        assert min(now[key] for key in now.keys() - kept) > max(before.values())
    assert annotation_ids(dsn).items() >= unchanged.items()
    assert (first, 1, 6) in annotations
    assert (first, 1, 6) not in annotation_ids(dsn)
    for gone in ((first, "FOOD", "MODEL", 7, 1), (first, "PLATE", "MODEL", 0, 2), (first, "PLATE", "MODEL", 0, 3)):
        assert gone in items
        assert gone not in item_ids(dsn)
    # The rows of both versions.
    assert world.query(dsn, "SELECT batch_id, count(*) FROM raw.detections GROUP BY 1 ORDER BY 1") == [
        ("q1", 13),
        ("q2", 11),
    ]


def test_a_forced_batch_that_says_the_same_changes_no_row(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1").code == 0
    rows = "SELECT ctid::text, xmin::text, id FROM public.{} ORDER BY 3"
    tables = ("initial_annotations", "initial_tray_items", "images", "recognitions")
    before = [world.query(dsn, rows.format(name)) for name in tables]
    assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q2", "--force").code == 0
    assert [world.query(dsn, rows.format(name)) for name in tables] == before


def test_a_forced_file_without_detections_clears_a_recognition_and_an_unforced_one_does_not(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    give_receipt(dataset, first, RECEIPT)
    full = {key_of(first): value_of("dish_0", "dish_7", "plate"), key_of(second): value_of("plate")}
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    bare = item_ids(dsn)
    assert run("load-qwen", "--file", write(tmp_path / "1.json", full), "--batch-id", "q1").code == 0
    empty = write(tmp_path / "2.json", {key_of(first): value_of(), key_of(first, "Qualifying"): value_of()})
    done = run("load-qwen", "--file", empty, "--batch-id", "q2")
    assert done.code == 0
    assert "Skipped: 1 already annotated." in done.out
    assert annotated(dsn) == {first, second}
    done = run("load-qwen", "--file", empty, "--batch-id", "q3", "--force")
    assert done.code == 0
    assert done.out.startswith("Batch q3 is done: 1 recognitions, 2 photos, 0 detections.")
    wanted = write(tmp_path / "3.json", {key_of(second): full[key_of(second)]})
    world.check(settings, (dataset, "b1", None), qwen=wanted)
    assert {key: row for key, row in item_ids(dsn).items() if key[0] == first} == {
        key: row for key, row in bare.items() if key[0] == first
    }
    # What is cleared has no annotations, so it is annotated again without --force.
    assert run("load-qwen", "--file", tmp_path / "1.json", "--batch-id", "q4").code == 0
    world.check(settings, (dataset, "b1", None), qwen=tmp_path / "1.json")


def test_a_forced_file_that_is_broken_for_a_recognition_leaves_it_as_it_was(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    full = {key_of(first): value_of("dish_0", "plate"), key_of(second): value_of("plate")}
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", full), "--batch-id", "q1").code == 0
    latter = {key_of(second): value_of("plate", "plate", left=50)}
    file = write(tmp_path / "2.json", {key_of(first): [], key_of(first, "Qualifying"): {}, **latter})
    assert run("load-qwen", "--file", file, "--batch-id", "q2", "--force").code == 0
    assert rejects(dsn, "q2") == [(first, "json_shape", "discover")] * 2
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "3.json", {**full, **latter}))


# Beside loads and resets


def test_a_forced_load_keeps_the_annotations_and_pairs_them_with_the_new_receipt(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    for number in (first, second):
        give_receipt(dataset, number, RECEIPT)
    give_receipt(dataset, third, None)
    file = write(
        tmp_path / "a.json",
        {
            key_of(number, camera): value_of("dish_0", "dish_0", "dish_0", "dish_1", "dish_2", "dish_3", "plate")
            for number in (first, second, third)
            for camera in ("Main", "Qualifying")
        },
    )
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    annotations, items = annotation_ids(dsn), item_ids(dsn)
    give_receipt(dataset, first, [{**RECEIPT[0], "Count": 3}, {**RECEIPT[1], "Count": 2}])
    give_receipt(dataset, second, None)
    give_receipt(dataset, third, RECEIPT[:1])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    world.check(settings, (dataset, "b2", None), qwen=file, superseded=[(dataset, "b1", None)])
    assert annotation_ids(dsn) == annotations
    now = item_ids(dsn)
    kept = now.keys() & items.keys()
    assert {key: now[key] for key in kept} == {key: items[key] for key in kept}
    assert (first, "FOOD", "RECIPE_LINE_OPTION", 1, 2) in kept
    assert (first, "FOOD", "RECIPE_LINE_OPTION", 3, 1) not in now
    assert (third, "FOOD", "RECIPE_LINE_OPTION", 1, 2) in now
    assert (third, "FOOD", "MODEL", 1, 1) not in now


def test_a_recognition_that_is_loaded_again_after_a_reset_has_its_annotations_again(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    empty = world.domain(dsn)
    assert (empty.recognitions, empty.items, empty.annotations) == ([], [], [])
    for batch_id in ("b1", "b2"):
        assert run("load", "--source", dataset, "--batch-id", batch_id).code == 0
        world.check(settings, (dataset, batch_id, None), qwen=file)
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0
    assert world.domain(dsn).annotations == []


def test_a_reset_of_annotations_gives_back_the_former_ones(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    former = write(tmp_path / "1.json", {key_of(first): value_of("dish_0", "plate"), key_of(second): value_of("plate")})
    latter = write(tmp_path / "2.json", {key_of(first): value_of("dish_9", "plate", "plate", left=50)})
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    before = world.dump(dsn)
    assert run("load-qwen", "--file", latter, "--batch-id", "q2", "--force").code == 0
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    after = world.dump(dsn)
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    world.check(settings, (dataset, "b1", None), qwen=former)
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    world.check(settings, (dataset, "b1", None))
    assert world.counts(dsn)["raw.detections"] == 0


def test_annotations_need_no_storage(
    run: Run, small_dataset: MakeDataset, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    with monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", f"http://127.0.0.1:{free_port()}")
        assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)


REFERENCE = """
    CREATE TABLE public.app_marks (item bigint REFERENCES public.initial_tray_items (id));
    INSERT INTO public.app_marks SELECT id FROM public.initial_tray_items WHERE item_type = %s
"""


def test_a_forced_file_that_would_delete_a_referenced_item_is_refused_and_changes_nothing(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    full = {key_of(first): value_of("dish_0", "plate", "plate", "plate"), key_of(second): value_of("plate")}
    former = write(tmp_path / "1.json", full)
    latter = write(tmp_path / "2.json", {**full, key_of(first): value_of("dish_0", "plate", left=70)})
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    world.query(dsn, REFERENCE, ("PLATE",))
    before = world.dump(dsn)
    arguments = ("load-qwen", "--file", latter, "--batch-id", "q2", "--force")
    for _ in range(2):
        refused = run(*arguments)
        assert refused.code == 4
        assert "app_marks (2 rows, to public.initial_tray_items)" in refused.err
        assert "Traceback" not in refused.err
        assert world.dump(dsn) == before
        assert world.query(dsn, "SELECT state FROM ingest.batches WHERE id = 'q2'") == [("loading",)]
    # A reference to what stays is no hindrance.
    world.query(
        dsn, "DELETE FROM public.app_marks WHERE item IN (SELECT id FROM public.initial_tray_items WHERE ordinal > 1)"
    )
    done = run(*arguments)
    assert (done.code, done.err) == (0, "")
    world.check(settings, (dataset, "b1", None), qwen=latter)
    assert world.query(dsn, "SELECT count(*) FROM public.app_marks") == [(2,)]


def test_a_forced_file_that_would_delete_a_referenced_annotation_is_refused(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(1)
    [number] = ids_of(dataset)
    former = write(tmp_path / "1.json", {key_of(number): value_of("plate", "plate")})
    latter = write(tmp_path / "2.json", {key_of(number): value_of("plate")})
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    world.query(
        dsn,
        "CREATE TABLE public.app_checks (annotation bigint REFERENCES public.initial_annotations (id));"
        "INSERT INTO public.app_checks SELECT id FROM public.initial_annotations",
    )
    refused = run("load-qwen", "--file", latter, "--batch-id", "q2", "--force")
    assert refused.code == 4
    assert "app_checks (1 rows, to public.initial_annotations)" in refused.err
    world.check(settings, (dataset, "b1", None), qwen=former)


# Which batch is meant


@pytest.mark.parametrize("option", ["--file", "--force"])
@pytest.mark.parametrize("finished", [True, False])
def test_the_same_id_with_other_parameters_is_refused(
    option: str, finished: bool, run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(3)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    if not finished:
        break_copies(dsn)
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == (0 if finished else 3)
    if not finished:
        mend_copies(dsn)
    other = write(tmp_path / "other.json", {})
    arguments = ["--file", str(other)] if option == "--file" else ["--file", str(file), "--force"]
    refused = run("load-qwen", "--batch-id", "q1", *arguments)
    assert (refused.code, refused.out) == (4, "")
    begun = f"--file {file.resolve()}" if option == "--file" else "no --force"
    assert f"Batch q1 was begun with {begun}." in refused.err
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=file)


def test_a_batch_is_of_one_kind(run: Run, small_dataset: MakeDataset, settings: Settings) -> None:
    dataset = small_dataset(3)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    refused = run("load-qwen", "--file", file, "--batch-id", "b1")
    assert (refused.code, refused.out) == (4, "")
    assert "Batch b1 holds a dataset." in refused.err
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    refused = run("load", "--source", dataset, "--batch-id", "q1")
    assert (refused.code, refused.out) == (4, "")
    assert "Batch q1 holds Qwen annotations." in refused.err
    world.check(settings, (dataset, "b1", None), qwen=file)


@pytest.mark.parametrize("batch_id", ["../q1", "q..1", " ", "-q", "q" * 101, "q/1", "q1\n"])
def test_an_id_that_cannot_be_one_is_refused(batch_id: str, run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    done = run("load-qwen", "--file", small_dataset(3) / ANNOTATIONS, f"--batch-id={batch_id}")
    assert (done.code, done.out) == (2, "")
    assert world.query(dsn, "SELECT id FROM ingest.batches") == []


def test_without_an_id_the_newest_unfinished_batch_like_it_is_resumed(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    ids = ids_of(dataset)
    file = dataset / ANNOTATIONS
    half = write(tmp_path / "half.json", of(read(file), ids[4:]))
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "2").code == 0
    break_copies(dsn)
    first = run("load-qwen", "--file", file, "--batch-id", "older")
    assert first.code == 3
    assert "To go on: python -m pipeline load-qwen --batch-id older" in first.err
    assert "Traceback" not in first.err
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    named = run("load-qwen", "--file", half, "--batch-id", "another-file")
    newer = run("load-qwen", "--file", file, "--batch-id", "newer")
    forced = run("load-qwen", "--file", file, "--batch-id", "forced", "--force")
    assert (named.code, newer.code, forced.code) == (3, 3, 0)  # of the forced one nothing was left to hold
    assert "Skipped: 6 held by unfinished another-file, newer, older." in forced.out
    # COPY, its marker and the rows of the same transaction: none of it.
    assert world.counts(dsn)["raw.detections"] == 0
    assert markers(dsn, "older") == [("discover", 0)]
    mend_copies(dsn)
    for batch_id, numbers in (("newer", ids[2:4]), ("older", ids[:2])):
        done = run("load-qwen", "--file", file)
        assert done.code == 0
        assert done.out.startswith(f"Batch {batch_id} is done: 2 recognitions")
        assert annotated(dsn) >= set(numbers)
    done = run("load-qwen", "--file", file)
    assert done.code == 0
    assert re.match(r"Batch qwen_\d{8}_\d{6} is done: 0 recognitions", done.out)
    assert "Skipped: 4 already annotated; 2 held by unfinished another-file." in done.out
    assert run("load-qwen", "--batch-id", "another-file").code == 0
    world.check(settings, (dataset, "b1", ids[:2]), (dataset, "b2", ids[2:]), qwen=file)


def test_two_unfinished_batches_never_share_a_recognition(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    ids = ids_of(dataset)
    file = dataset / ANNOTATIONS
    part = write(tmp_path / "part.json", of(read(file), ids[1:4]))
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    break_copies(dsn)
    assert run("load-qwen", "--file", part, "--batch-id", "q1").code == 3
    assert run("load-qwen", "--file", file, "--batch-id", "q2").code == 3
    claims = "SELECT batch_id, recognition_id FROM ingest.claims WHERE kind = 'qwen' ORDER BY 1, 2"
    manifest = "SELECT batch_id, recognition_id FROM ingest.manifest WHERE batch_id LIKE 'q%' ORDER BY 1, 2"
    wanted = [*(("q1", number) for number in ids[1:4]), *(("q2", number) for number in (ids[0], *ids[4:]))]
    assert world.query(dsn, claims) == wanted
    assert world.query(dsn, manifest) == wanted
    status = json.loads(run("status", "--json").out)
    assert {one["batch_id"] for one in status["unfinished"]} == {"q1", "q2"}
    told = run("status").out
    for batch_id in ("q1", "q2"):
        assert f"python -m pipeline load-qwen --batch-id {batch_id}" in told
    mend_copies(dsn)
    second = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert second.code == 0
    assert "Skipped: 3 held by unfinished q1." in second.out
    assert annotated(dsn) <= {ids[0], *ids[4:]}
    assert run("load-qwen", "--file", part, "--batch-id", "q1").code == 0
    assert world.query(dsn, claims) == []
    world.check(settings, (dataset, "b1", None), qwen=file)


# What it says


def test_json_tells_the_same_and_status_keeps_it(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(6, broken=True)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    told = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--json")
    assert told.code == 0
    loaded = json.loads(told.out)
    assert loaded.pop("failures") == []
    kept = json.loads(run("status", "--batch-id", "q1", "--json").out)
    assert loaded == kept
    detections = len(world.domain(dsn).annotations)
    assert (kept["kind"], kept["state"], kept["force"]) == ("qwen", "done", False)
    assert kept["source"] == str((dataset / ANNOTATIONS).resolve())
    assert (kept["recognitions_processed"], kept["images_processed"]) == (6, 11)
    assert kept["detections_processed"] == detections > 0
    assert "bytes_uploaded" not in kept
    assert set(kept["throughput"]) == {"recognitions_processed", "images_processed", "detections_processed"}
    assert kept["throughput"]["detections_processed"]["count"] == detections
    assert kept["rejects"] == {"annotation_key": 1, "box_malformed": 4, "json_shape": 1, "recognition_unknown": 1}
    assert kept["operations"]["db_bulk_copy"]["ops"] == 1
    assert {"transform_tray_items", "transform_annotations"} <= set(kept["operations"])
    assert "storage_upload" not in kept["operations"]


def test_the_numbers_are_told_as_text_and_kept(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1")
    detections = len(world.domain(dsn).annotations)
    assert "\nPerformance Metrics:\n  Total time: " in done.out
    for pattern in (
        r"    recognitions_processed: 6 \(\d+\.\d/s\)",
        r"    images_processed: 12 \(\d+\.\d/s\)",
        rf"    detections_processed: {detections} \(\d+\.\d/s\)",
        r"    db_bulk_copy: 1 ops, avg \d+\.\d\d ms, total \d+\.\d\d s",
        r"    transform_annotations: 1 ops, avg \d+\.\d\d ms, total \d+\.\d\d s",
    ):
        assert re.search(f"^{pattern}$", done.out, re.MULTILINE)
    assert "bytes_uploaded" not in done.out
    assert run("status", "--batch-id", "q1").out == done.out
    [row] = world.query(
        dsn, "SELECT recognitions, photos, detections, metrics ->> 'state' FROM ingest.batches WHERE id = 'q1'"
    )
    assert row == (6, 12, detections, "done")


def test_what_failed_is_told_as_json(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(3)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    break_copies(dsn)
    failed = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--json")
    assert failed.code == 3
    told = json.loads(failed.out)
    assert told["state"] == "loading"
    [failure] = [one for one in told["failures"] if one["task"].startswith("CopyQwenShard(")]
    assert failure["error"] == "DataError"


MEASURED = """
import sys
from pipeline.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")), file=sys.stderr)
raise SystemExit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_stays_bounded_whatever_the_values_hold(
    run: Run, start: Start, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    ids = ids_of(dataset)
    nested = "[" * 90 + "]" * 90
    large = f"[{','.join([nested] * ((5 << 19) // len(nested)))}]"
    wrong = '{"dishes": {"qwen_detections": [' + "0," * 500_000 + "0]}}"
    kept = {key_of(ids[4]): value_of("dish_0", "plate"), key_of(ids[5], "Qualifying"): value_of("plate")}
    entries = [(key_of(number), large) for number in ids[:2]] + [(key_of(ids[2]), wrong)]
    entries += [(key, json.dumps(value)) for key, value in kept.items()]
    file = tmp_path / "a.json"
    file.write_text("{" + ",\n".join(f'"{key}": {value}' for key, value in entries) + "}", encoding="utf-8")
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    measured = start(sys.executable, "-c", MEASURED, "load-qwen", "--file", file, "--batch-id", "q1")
    code, _, stderr = finish(measured)
    assert code == 0
    assert int(stderr) < 250_000
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "kept.json", kept))


# Luigi


def test_the_bare_command_and_ours_are_one_engine(
    run: Run, start: Start, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    arguments = ("--file", file, "--batch-id", "q1", "--local-scheduler")
    first = finish(start(*BARE, *arguments))
    assert (first[0], first[2]) == (0, "")
    assert first[1].startswith("Batch q1 is done: 6 recognitions, 12 photos, ")
    assert "Performance Metrics:" in first[1]
    assert finish(start(*BARE, *arguments)) == first
    assert run("load-qwen", *arguments) == Done(0, first[1], "")
    world.check(settings, (dataset, "b1", None), qwen=file)
    code, stdout, stderr = finish(start(*BARE, *arguments, "--force"))
    assert (code, stdout) == (40, "")
    assert "Error: Batch q1 was begun with no --force." in stderr


def test_workers_share_the_shards(
    run: Run, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(12)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run_pipeline(
        "load-qwen", "--file", file, "--batch-id", "q1", "--workers", "3", env={"PIPELINE_BATCH_SIZE": "2"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [row for row in markers(dsn) if row[0] == "copy"] == [("copy", shard) for shard in range(1, 7)]
    # A shard is a stretch of the file.
    places = world.query(dsn, "SELECT shard FROM ingest.manifest WHERE batch_id = 'q1' ORDER BY entry_positions[1]")
    assert [shard for (shard,) in places] == [shard for shard in range(1, 7) for _ in range(2)]
    world.check(settings, (dataset, "b1", None), qwen=file)


# Step by step: what only happens in between


class Annotate:
    """A batch `q1`, carried on step by step."""

    def __init__(self, settings: Settings, database: Database, file: Path) -> None:
        self.settings, self.database, self.file = settings, database, file
        self.metrics = Metrics()

    def discover(self, batch_id: str = "q1", *, batch_size: int = 100, force: bool = False) -> Discovery:
        batch = resolve_batch(
            self.settings, self.database, LoadRequest(batch_id, str(self.file), kind=KIND_QWEN, force=force)
        )
        request = Request(
            batch_id, batch.source, self.settings.bucket, kind=KIND_QWEN, force=force, batch_size=batch_size
        )
        found = discover(self.database, request)
        assert found is not None
        return found

    def copy(self, shard: int = 1, batch_id: str = "q1") -> None:
        with closing(Storage(self.settings, self.metrics)) as storage:
            copy_shard(self.database, storage, batch_id, shard, self.metrics, kind=KIND_QWEN)

    def transform(self, batch_id: str = "q1") -> None:
        with closing(Storage(self.settings, self.metrics)) as storage:
            transform_batch(self.database, storage, batch_id, self.metrics)


@pytest.fixture
def dataset(run: Run, own_dataset: MakeDataset) -> Path:
    """A dataset of six recognitions that batch b1 has loaded."""
    dataset = own_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    return dataset


@pytest.fixture
def annotate(dataset: Path, settings: Settings, database: Database) -> Annotate:
    return Annotate(settings, database, dataset / ANNOTATIONS)


def test_a_value_that_changed_since_discovery_is_a_reject_of_its_recognition(
    annotate: Annotate, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    ids = ids_of(dataset)
    whole = annotate.file.read_bytes()
    found = annotate.discover()
    assert (found.recognitions, found.photos, found.shards) == (6, 12, 1)
    # A few letters of the second photo of one, so that every other value stays where it was.
    second = whole.index(b"Qualifying.jpg", whole.index(f"recognition_{ids[2]}/".encode()))
    at = whole.index(b"bbox_2d", second)
    annotate.file.write_bytes(whole[:at] + b"BBOX_2D" + whole[at + 7 :])
    annotate.copy()
    annotate.transform()
    [(number, code, step)] = rejects(dsn)
    assert (number, code, step) == (ids[2], "json_changed", "copy")
    left = [one for one in ids if one != ids[2]]
    assert annotated(dsn) == set(left)
    assert world.query(dsn, "SELECT recognitions, photos FROM ingest.batches WHERE id = 'q1'") == [(5, 10)]
    annotate.file.write_bytes(whole)
    kept = write(tmp_path / "kept.json", of(read(annotate.file), left))
    world.check(settings, (dataset, "b1", None), qwen=kept)
    # Another batch may take it now.
    assert annotate.discover("q2").recognitions == 1
    annotate.copy(batch_id="q2")
    annotate.transform("q2")
    world.check(settings, (dataset, "b1", None), qwen=annotate.file)


def test_a_recognition_that_changed_is_free_for_another_batch_before_this_one_ends(
    annotate: Annotate, dataset: Path, settings: Settings, dsn: str
) -> None:
    annotate.discover(batch_size=3)
    whole = annotate.file.read_bytes()
    annotate.file.write_bytes(b" " + whole)
    annotate.copy(2)
    assert [row[1:] for row in rejects(dsn)] == [("json_changed", "copy")] * 3
    found = annotate.discover("q2")
    assert (found.recognitions, found.held_elsewhere, found.held_by) == (3, 3, ("q1",))
    annotate.copy(batch_id="q2")
    annotate.transform("q2")
    annotate.file.write_bytes(whole)
    annotate.copy(1)
    annotate.transform()
    world.check(settings, (dataset, "b1", None), qwen=annotate.file)


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_file_that_was_shortened_since_discovery_loses_what_is_gone_and_no_more(
    left: float, annotate: Annotate, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    annotate.discover(batch_size=2)
    whole = annotate.file.read_bytes()
    annotate.file.write_bytes(whole[: int(len(whole) * left)])
    for shard in (1, 2, 3):
        annotate.copy(shard)
    annotate.transform()
    annotate.file.write_bytes(whole)
    lost = {number for number, code, _ in rejects(dsn) if code == "json_changed"}
    kept = set(ids_of(dataset)) - lost
    assert len(rejects(dsn)) == len(lost)
    assert len(lost) == 6 if not left else 0 < len(lost) < 6
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "kept.json", of(read(annotate.file), kept)))


def test_a_forced_value_that_changed_leaves_the_former_annotations(
    run: Run, annotate: Annotate, dataset: Path, settings: Settings, dsn: str
) -> None:
    assert run("load-qwen", "--file", annotate.file, "--batch-id", "q0").code == 0
    before = world.dump(dsn)
    annotate.discover(force=True)
    whole = annotate.file.read_bytes()
    annotate.file.write_bytes(whole.replace(b"bbox_2d", b"BBOX_2D"))
    annotate.copy()
    annotate.transform()
    annotate.file.write_bytes(whole)
    assert [code for _, code, _ in rejects(dsn)] == ["json_changed"] * 6
    assert world.dump(dsn) == before
    world.check(settings, (dataset, "b1", None), qwen=annotate.file)


def test_a_file_that_vanished_leaves_the_batch_unfinished_until_it_is_back(
    run: Run, dataset: Path, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, moved = dataset / ANNOTATIONS, dataset / "moved.json"

    def vanish(*arguments: Any, **options: Any) -> tuple[int, int]:
        if file.exists():
            file.rename(moved)
        return copy_annotations(*arguments, **options)

    monkeypatch.setattr(COPY_IN, vanish)
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert f"The annotations file {file.resolve()} cannot be read: No such file or directory." in failed.err
    assert "To go on: python -m pipeline load-qwen --batch-id q1" in failed.err
    assert "Traceback" not in failed.err
    assert markers(dsn) == [("discover", 0)]
    assert rejects(dsn) == []
    away = run("load-qwen", "--batch-id", "q1")
    assert away.code == 2
    assert str(file) in away.err
    monkeypatch.setattr(COPY_IN, copy_annotations)
    moved.rename(file)
    assert run("load-qwen", "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=file)


def test_a_file_that_vanished_before_discovery_is_one_sentence_and_nothing_is_written(
    run: Run, dataset: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dataset / ANNOTATIONS

    def vanish(connection: Connection, path: Path, batch_id: str, *, force: bool) -> Any:
        file.unlink()
        return stage_annotations(connection, path, batch_id, force=force)

    monkeypatch.setattr(STAGE, vanish)
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert "cannot be read: No such file or directory" in failed.err
    assert world.query(dsn, "SELECT id FROM ingest.batches") == [("b1",)]


def test_what_another_discovery_took_meanwhile_is_told(
    annotate: Annotate, dataset: Path, settings: Settings, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(dataset)
    part = write(tmp_path / "part.json", of(read(annotate.file), ids[:4]))

    def stage_and_lose(connection: Connection, path: Path, batch_id: str, *, force: bool) -> Any:
        monkeypatch.setattr(STAGE, stage_annotations)
        found = stage_annotations(connection, path, batch_id, force=force)
        with closing(Database(settings)) as other:
            Annotate(settings, other, part).discover("q0")
        return found

    monkeypatch.setattr(STAGE, stage_and_lose)
    found = annotate.discover()
    assert (found.recognitions, found.held_elsewhere, found.held_by) == (2, 4, ("q0",))
    assert world.query(dsn, "SELECT held_elsewhere, held_by FROM ingest.batches WHERE id = 'q1'") == [(4, ["q0"])]
    annotate.copy()
    annotate.transform()
    assert annotated(dsn) == set(ids[4:])


@pytest.mark.parametrize("force", [False, True])
def test_what_another_batch_annotated_meanwhile_is_skipped_unless_forced(
    force: bool, annotate: Annotate, dataset: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = ids_of(dataset)
    part = write(tmp_path / "part.json", of(read(annotate.file), ids[:4]))

    def stage_and_lose(connection: Connection, path: Path, batch_id: str, *, force: bool) -> Any:
        monkeypatch.setattr(STAGE, stage_annotations)
        found = stage_annotations(connection, path, batch_id, force=force)
        with closing(Database(settings)) as other:
            faster = Annotate(settings, other, part)
            faster.discover("q0")
            faster.copy(batch_id="q0")
            faster.transform("q0")
        return found

    monkeypatch.setattr(STAGE, stage_and_lose)
    found = annotate.discover(force=force)
    assert (found.recognitions, found.already_loaded) == ((6, 0) if force else (2, 4))
    annotate.copy()
    annotate.transform()
    world.check(settings, (dataset, "b1", None), qwen=annotate.file)


def test_a_batch_whose_recognitions_were_reset_meanwhile_annotates_them_when_they_are_back(
    run: Run, annotate: Annotate, dataset: Path, settings: Settings, dsn: str
) -> None:
    annotate.discover()
    annotate.copy()
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    annotate.transform()
    assert world.domain(dsn).annotations == []
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    world.check(settings, (dataset, "b2", None), qwen=annotate.file)


def test_a_transform_that_fails_leaves_neither_rows_nor_marker(
    run: Run, dataset: Path, settings: Settings, dsn: str
) -> None:
    file = dataset / ANNOTATIONS
    before = world.dump(dsn)
    world.query(dsn, "ALTER TABLE public.initial_annotations ADD CONSTRAINT never CHECK (detection < 0)")
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert "Traceback" not in failed.err
    assert world.dump(dsn) == before
    assert markers(dsn) == [("copy", 1), ("discover", 0)]
    world.query(dsn, "ALTER TABLE public.initial_annotations DROP CONSTRAINT never")
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=file)

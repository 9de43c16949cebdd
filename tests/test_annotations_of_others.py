"""Annotations beside rows that others wrote, and beside photos that were replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Settings
from tests import annotating, world
from tests.annotating import Run, give_receipt, ids_of, key_of, value_of, write
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn


@pytest.fixture
def dataset(run: Run, own_dataset: MakeDataset) -> Path:
    """One recognition without a receipt, loaded as b1."""
    dataset = own_dataset(1)
    give_receipt(dataset, ids_of(dataset)[0], None)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    return dataset


def annotate(dsn: str, source: str = "HUMAN") -> None:
    """Draw a box on camera 1, of an item that the model saw if there is one, else of an item of our own."""
    world.query(
        dsn,
        "INSERT INTO public.initial_tray_items (recognition_id, item_type, source, ordinal)"
        f" SELECT id, 'PLATE', 'MANUAL', 7 FROM public.recognitions WHERE {world.ours('public.recognitions')}"
        " ON CONFLICT DO NOTHING;"
        "INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, bbox, source)"
        " SELECT i.id, (SELECT t.id FROM public.initial_tray_items t WHERE t.recognition_id = i.recognition_id"
        f" ORDER BY source::text DESC LIMIT 1), 77, '{{}}', '{source}'"
        f" FROM public.images i WHERE i.camera_number = 1 AND {world.ours('public.images')}",
    )


def of_others(dsn: str) -> list[tuple[object, ...]]:
    return world.query(
        dsn,
        "SELECT 'box', id, initial_tray_item_id, source FROM public.initial_annotations"
        f" WHERE source <> 'MODEL' AND {world.ours('public.initial_annotations')}"
        " UNION ALL"
        " SELECT 'item', id, NULL, source::text FROM public.initial_tray_items"
        f" WHERE source = 'MANUAL' AND {world.ours('public.initial_tray_items')} ORDER BY 1, 2",
    )


def boxes(dsn: str) -> list[tuple[object, ...]]:
    ours = world.ours("public.initial_annotations")
    return world.query(
        dsn,
        f"SELECT detection, bbox FROM public.initial_annotations WHERE source = 'MODEL' AND {ours} ORDER BY id",
    )


def notices(dsn: str, batch_id: str) -> list[tuple[object, ...]]:
    return world.query(dsn, "SELECT code FROM ingest.notices WHERE batch_id = %s AND step = 'transform'", (batch_id,))


@pytest.mark.parametrize("source", ["HUMAN", "MANUAL"])
def test_rows_of_others_stay_whatever_is_loaded_and_reset(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path, source: str
) -> None:
    [number] = ids_of(dataset)
    former = write(tmp_path / "1.json", {key_of(number): value_of("plate", "dish_3")})
    latter = write(tmp_path / "2.json", {key_of(number): value_of("dish_4")})
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    annotate(dsn, source)
    before = of_others(dsn)
    assert len(before) == 2
    for command in (
        ("load-qwen", "--file", latter, "--batch-id", "q2", "--force"),
        ("load", "--source", dataset, "--batch-id", "b2", "--force"),
        ("reset", "--batch-id", "q2", "--confirm"),
        ("reset", "--batch-id", "q1", "--confirm"),
        ("reset", "--batch-id", "b2", "--confirm"),
    ):
        done = run(*command)
        assert (done.code, of_others(dsn)) == (0, before), done.err
        assert world.inconsistencies(settings) == []
    refused = run("reset", "--batch-id", "b1", "--confirm")
    assert (refused.code, of_others(dsn)) == (4, before)
    assert "public.initial_annotations" in refused.err
    assert "public.initial_tray_items" in refused.err


def test_a_photo_that_only_others_annotated_is_annotated(run: Run, dataset: Path, dsn: str, tmp_path: Path) -> None:
    annotate(dsn)
    [number] = ids_of(dataset)
    file = write(tmp_path / "1.json", {key_of(number): value_of("plate")})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert (len(boxes(dsn)), len(of_others(dsn))) == (1, 2)


@pytest.mark.parametrize("bbox", ["[1, 2, 3, 4]", '"none"', "null", '{"x": "left", "y": {}, "w": null, "h": 4}'])
def test_a_box_of_others_in_another_form_stops_nothing(
    run: Run, dataset: Path, dsn: str, tmp_path: Path, bbox: str
) -> None:
    annotate(dsn, "MODEL")
    ours = world.ours("public.initial_annotations")
    world.query(dsn, f"UPDATE public.initial_annotations SET bbox = %s WHERE {ours}", (bbox,))
    [number] = ids_of(dataset)
    before, file = boxes(dsn), write(tmp_path / "1.json", {key_of(number): value_of("plate")})
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert (done.code, boxes(dsn)) == (0, before), done.err
    assert "1 photo changed since it was loaded" in done.out
    done = run("load-qwen", "--file", file, "--batch-id", "q2", "--changed")
    assert (done.code, [detection for detection, _ in boxes(dsn)]) == (0, [1]), done.err


def test_a_receipt_line_whose_item_others_annotated_is_not_removed(
    run: Run, own_dataset: MakeDataset, dsn: str
) -> None:
    dataset = own_dataset(1)
    [number] = ids_of(dataset)
    give_receipt(dataset, number, annotating.RECEIPT)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    annotate(dsn)
    before = of_others(dsn)
    give_receipt(dataset, number, None)
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert (done.code, "in_use 1" in done.out) == (0, True)
    assert of_others(dsn) == before


def replace(dataset: Path, size: tuple[int, int], orientation: int) -> None:
    [path] = dataset.rglob("*Main.jpg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", size, 128).save(path, exif=exif)


@pytest.mark.parametrize(("size", "orientation"), [((120, 160), 1), ((160, 120), 6), ((80, 60), 1)])
def test_boxes_of_another_photo_are_left_out_until_it_is_back(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path, size: tuple[int, int], orientation: int
) -> None:
    [number] = ids_of(dataset)
    file = write(tmp_path / "1.json", {key_of(number): value_of("plate")})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    before = boxes(dsn)
    replace(dataset, size, orientation)
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert (boxes(dsn), notices(dsn, "b2")) == ([], [("annotations_other_photo",)])
    assert world.inconsistencies(settings) == []
    assert run("load", "--source", dataset, "--batch-id", "b3", "--force").code == 0
    assert run("reset", "--batch-id", "b3", "--confirm").code == 0
    assert (boxes(dsn), notices(dsn, "q1")) == ([], [("annotations_other_photo",)])
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    assert boxes(dsn) == before != []
    assert world.inconsistencies(settings) == []


def test_a_held_batch_is_not_published_on_another_photo(run: Run, dataset: Path, dsn: str, tmp_path: Path) -> None:
    [number] = ids_of(dataset)
    fractions = {
        "plates": {"qwen_detections": [{"bbox_2d": [0.1, 0.1, 1, 1], "label": "plate"}]},
        "dishes": value_of()["dishes"],
    }
    file = write(tmp_path / "1.json", {key_of(number): fractions})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 6
    replace(dataset, (320, 240), 1)
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    done = run("publish", "--batch-id", "q1")
    assert (done.code, boxes(dsn), notices(dsn, "q1")) == (0, [], [("annotations_other_photo",)]), done.err

"""Boxes of annotations: what their numbers mean, where they end up on the stored photo, and which are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageOps

from pipeline.graph.tasks import LoadQwen
from tests import annotating, world
from tests.annotating import Run, ids_of, key_of, rejects, value_of, write
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn

CAMERAS = ("Main", "Qualifying")
#: The tag of EXIF.
ORIENTATION = 0x0112


def value(*corners: object, label: str = "dish_0") -> annotating.Value:
    return {"dishes": {"qwen_detections": [{"bbox_2d": box, "label": label} for box in corners]}}


def stored(dsn: str, number: int, camera: int = 1) -> list[tuple[Any, ...]]:
    """Return the boxes of a photo as readers see them, as text."""
    return world.query(
        dsn,
        "SELECT a.bbox ->> 'x', a.bbox ->> 'y', a.bbox ->> 'w', a.bbox ->> 'h' FROM public.initial_annotations a"
        " JOIN public.images i ON i.id = a.image_id WHERE i.recognition_id = %s AND i.camera_number = %s"
        " ORDER BY a.detection",
        (number, camera),
    )


def notices(dsn: str, batch_id: str = "q1") -> list[tuple[Any, ...]]:
    return world.query(
        dsn, "SELECT recognition_id, code, message FROM ingest.notices WHERE batch_id = %s ORDER BY id", (batch_id,)
    )


def held_reason(dsn: str, batch_id: str = "q1") -> str | None:
    reason: str | None = world.query(dsn, "SELECT held_reason FROM ingest.batches WHERE id = %s", (batch_id,))[0][0]
    return reason


@pytest.fixture
def loaded(run: Run, small_dataset: MakeDataset) -> list[int]:
    """The recognitions of a loaded dataset, whose photos have 160 x 120 pixels."""
    dataset = small_dataset(3)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    return ids_of(dataset)


@pytest.fixture
def turned(run: Run, own_dataset: MakeDataset) -> dict[tuple[int, int], Path]:
    """Photos of each EXIF orientation, black with a white rectangle, by recognition and camera; they are loaded."""
    dataset = own_dataset(4)
    photos, orientation = {}, 0
    for number, folder in sorted(world.folders(dataset).items()):
        for camera, name in enumerate(CAMERAS, 1):
            orientation += 1
            [path] = folder.rglob(f"*{name}*.jpg")
            image = Image.new("L", (160, 96))
            ImageDraw.Draw(image).rectangle((16, 32, 63, 47), fill=255)
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            image.save(path, quality=95, exif=exif)
            photos[number, camera] = path
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    return photos


def displayed_box(path: Path) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Return where a viewer shows the white rectangle of a photo, and the size that it shows the photo with."""
    with Image.open(path) as image:
        shown = ImageOps.exif_transpose(image)
        box = shown.point(lambda level: 255 * (level > 128)).getbbox()
        assert box is not None
        return box, shown.size


@pytest.mark.parametrize("coordinates", ["pixels", "1000", "1", "640x480"])
def test_boxes_on_turned_photos_come_to_lie_on_the_stored_photo(
    coordinates: str, run: Run, turned: dict[tuple[int, int], Path], dsn: str, tmp_path: Path
) -> None:
    content = {}
    for (number, camera), path in turned.items():
        (x1, y1, x2, y2), (width, height) = displayed_box(path)
        across, down = {"pixels": (width, height), "1000": (1000, 1000), "1": (1, 1), "640x480": (640, 480)}[
            coordinates
        ]
        box = [x1 * across / width, y1 * down / height, x2 * across / width, y2 * down / height]
        content[key_of(number, CAMERAS[camera - 1])] = value(box)
    file = write(tmp_path / "a.json", content)
    done = run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", coordinates, "--exif-turned")
    assert (done.code, done.err) == (0, "")
    assert len(turned) == 8
    for number, camera in turned:
        assert stored(dsn, number, camera) == [("16", "32", "48", "16")]
    assert rejects(dsn) == []
    status = json.loads(run("status", "--batch-id", "q1", "--json").out)
    assert (status["coordinates"], status["exif_turned"]) == (coordinates, True)


def test_without_the_option_photos_are_taken_as_they_are_stored(
    run: Run, turned: dict[tuple[int, int], Path], dsn: str, tmp_path: Path
) -> None:
    content = {
        key_of(number, CAMERAS[camera - 1]): value([16, 32, 64, 48], [10, 100, 30, 150]) for number, camera in turned
    }
    assert run("load-qwen", "--file", write(tmp_path / "a.json", content), "--batch-id", "q1").code == 0
    for number, camera in turned:
        assert stored(dsn, number, camera) == [("16", "32", "48", "16")]
    told = world.query(
        dsn, "SELECT message LIKE %s FROM ingest.rejects WHERE code = 'box_outside'", ("%--exif-turned",)
    )
    assert sorted(told) == [(False,)] + [(True,)] * 7  # all but the photo that is not turned


@pytest.mark.parametrize(
    ("coordinates", "corners", "wanted"),
    [
        ("1000", [0, 250, 500, 1000], ("0", "30", "80", "90")),
        ("1000", [333, 333, 666, 666.6], ("53.28", "39.96", "53.28", "40.032")),
        ("1", [0.25, 0, 1, 1], ("40", "0", "120", "120")),
        ("1", [0.1234567, 0.3, 0.7654321, 0.9], ("19.753", "36", "102.716", "72")),
        ("320x240", [100, 200, 320, 240], ("50", "100", "110", "20")),
        ("1280x960", [8.8, 4, 1280, 100.5], ("1.1", "0.5", "158.9", "12.063")),
        ("80x120", [10, 10, 20, 20], ("20", "10", "20", "10")),
    ],
)
def test_boxes_are_scaled_to_the_photo(
    coordinates: str,
    corners: list[float],
    wanted: tuple[str, ...],
    run: Run,
    loaded: list[int],
    dsn: str,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value(corners)})
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", coordinates).code == 0
    assert stored(dsn, loaded[0]) == [wanted]
    assert notices(dsn) == []


def test_numbers_are_stored_exactly(run: Run, loaded: list[int], dsn: str, tmp_path: Path) -> None:
    corners = [[10.1, 20.2, 110.3, 50.5], [0.1, 0.2, 100.4, 0.3], [1.0005, 2.00049, 30.12345, 1e2], [7, 8, 9.50, 10]]
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value(*corners)})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert stored(dsn, loaded[0]) == [
        ("10.1", "20.2", "100.2", "30.3"),
        ("0.1", "0.2", "100.3", "0.1"),
        ("1.001", "2", "29.122", "98"),
        ("7", "8", "2.5", "2"),
    ]
    texts = world.query(dsn, "SELECT x1::text, y1::text, x2::text, y2::text FROM raw.detections ORDER BY detection")
    assert texts[2:] == [("1.001", "2", "30.123", "100"), ("7", "8", "9.5", "10")]


# 2 % of 160 pixels are 3.2, of 120 are 2.4.
OVERHANGS = {
    "none": ([0, 0, 160, 120], ("0", "0", "160", "120"), False),
    "left": ([-3.2, 5, 20, 20], ("0", "5", "20", "15"), True),
    "right": ([100, 5, 163.2, 20], ("100", "5", "60", "15"), True),
    "top": ([5, -2.4, 20, 20], ("5", "0", "15", "20"), True),
    "bottom": ([5, 5, 20, 122.4], ("5", "5", "15", "115"), True),
    "all sides": ([-1, -1, 161, 121], ("0", "0", "160", "120"), True),
    "less than is stored": ([-0.0004, 5, 160.0004, 20], ("0", "5", "160", "15"), False),
}
OUTSIDE = {
    "far": [500, 500, 600, 600],
    "right": [160, 5, 163, 20],
    "left": [-3, 5, 0, 20],
    "below": [5, 120, 20, 122],
    "above": [5, -2, 20, 0],
    "too far left": [-3.21, 5, 20, 20],
    "too far right": [100, 5, 163.21, 20],
    "too far up": [5, -2.41, 20, 20],
    "too far down": [5, 5, 20, 122.41],
    "around the photo": [-100, -100, 300, 300],
}


@pytest.mark.parametrize(("corners", "wanted", "is_clipped"), OVERHANGS.values(), ids=OVERHANGS)
def test_a_small_overhang_is_clipped_and_noticed(
    corners: list[float],
    wanted: tuple[str, ...],
    is_clipped: bool,
    run: Run,
    loaded: list[int],
    dsn: str,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value(corners, [1, 1, 5, 5])})
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert done.code == 0
    assert stored(dsn, loaded[0]) == [wanted, ("1", "1", "4", "4")]
    assert [row[:2] for row in notices(dsn)] == [(loaded[0], "box_clipped")] * is_clipped
    assert ("box_clipped 1" in done.out) == is_clipped


def test_a_box_outside_its_photo_is_rejected_and_the_others_stay(
    run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    boxes = [[1, 1, 5, 5], *OUTSIDE.values(), [2, 2, 6, 6], [3, 3, 3.0004, 9]]
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value(*boxes)})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert stored(dsn, loaded[0]) == [("1", "1", "4", "4"), ("2", "2", "4", "4")]
    assert sorted(rejects(dsn)) == [
        *[(loaded[0], "box_malformed", "discover")],
        *[(loaded[0], "box_outside", "discover")] * len(OUTSIDE),
    ]
    messages = [row[0] for row in world.query(dsn, "SELECT message FROM ingest.rejects WHERE batch_id = 'q1'")]
    assert "the box 500, 500, 600, 600 of dish_0 lies outside the photo of 160 x 120 pixels" in messages
    # Numbered without gaps.
    assert world.query(dsn, "SELECT detection FROM raw.detections ORDER BY 1") == [(1,), (2,)]


def test_equal_boxes_of_a_label_are_one_annotation_and_one_notice(
    run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    loop = [[1, 1, 5, 5]] * 40 + [[2, 2, 6, 6], [1.0001, 1, 5, 4.9996]] + [[0, 0, 161, 9], [0, 0, 160, 9]]
    content = {
        key_of(loaded[0]): {
            **value(*loop),
            "plates": {"qwen_detections": [{"bbox_2d": [1, 1, 5, 5], "label": "plate"}]},
        },
        key_of(loaded[0], "Qualifying"): value([1, 1, 5, 5]),
        key_of(loaded[1]): value([1, 1, 5, 5], [1, 1, 5, 5]),
    }
    assert run("load-qwen", "--file", write(tmp_path / "a.json", content), "--batch-id", "q1").code == 0
    small = ("1", "1", "4", "4")
    assert stored(dsn, loaded[0]) == [small, ("2", "2", "4", "4"), ("0", "0", "160", "9"), small]
    assert stored(dsn, loaded[0], 2) == stored(dsn, loaded[1]) == [small]
    told = {(number, code): message for number, code, message in notices(dsn)}
    assert set(told) == {(loaded[0], "box_repeated"), (loaded[0], "box_clipped"), (loaded[1], "box_repeated")}
    assert "41" in told[loaded[0], "box_repeated"]
    assert world.query(dsn, "SELECT sum(detections) FROM ingest.batches WHERE id = 'q1'") == [(6,)]


# Files that contradict their frame


def make_large(dsn: str) -> None:
    """Let all photos on record have the size that photos of a till have."""
    for table in ("public.images", "raw.photos"):
        world.query(dsn, f"UPDATE {table} SET width = 1280, height = 960")


def test_a_file_without_a_corner_beyond_1_is_held(run: Run, loaded: list[int], dsn: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([0.1, 0.2, 0.5, 1.0])})
    held = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert (held.code, "--coordinates 1" in held.err) == (6, True)
    assert "--coordinates 1" in (held_reason(dsn) or "")
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", "1").code == 0
    assert held_reason(dsn) is None
    assert stored(dsn, loaded[0]) == [("16", "24", "64", "96")]


@pytest.mark.parametrize("numbers", [[0.1, 0.2, 0.5, 1.03], [0, 0, 1, 2]])
def test_a_single_corner_beyond_1_is_enough_for_pixels(
    numbers: list[float], run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    content = {key_of(loaded[0]): value([0.1, 0.1, 0.9, 0.9]), key_of(loaded[1]): value(numbers)}
    assert run("load-qwen", "--file", write(tmp_path / "a.json", content), "--batch-id", "q1").code == 0
    assert held_reason(dsn) is None


@pytest.mark.parametrize(
    ("photos", "boxes", "farthest", "held"),
    [(20, 10, 1000, True), (19, 11, 1000, False), (20, 9, 1000, False), (20, 10, 1020.5, False)],
)
def test_a_file_without_a_corner_beyond_1000_on_large_photos_is_held_or_noticed(
    photos: int,
    boxes: int,
    farthest: float,
    held: bool,
    run: Run,
    small_dataset: MakeDataset,
    dsn: str,
    tmp_path: Path,
) -> None:
    dataset = small_dataset(12)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    make_large(dsn)
    keys = [key_of(number, camera) for number in ids_of(dataset) for camera in CAMERAS][:photos]
    content = {key: value(*([n, n, farthest, 900] for n in range(boxes))) for key in keys}
    run("load-qwen", "--file", write(tmp_path / "a.json", content), "--batch-id", "q1")
    told = [row for row in notices(dsn) if row[1] == "coordinates_suspect"]
    assert bool(held_reason(dsn)) == held
    assert bool(told) == (not held and farthest == 1000)
    messages = [row[2] for row in told] or [held_reason(dsn) or ""]
    assert ("--coordinates 1000" in messages[0]) == (farthest == 1000)


def test_small_photos_and_other_frames_are_no_contradiction(
    run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([1, 2, 100, 100])})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    make_large(dsn)
    for batch_id, coordinates in (("q2", "1000"), ("q3", "1280x960")):
        options = ("--force", "--coordinates", coordinates)
        assert run("load-qwen", "--file", file, "--batch-id", batch_id, *options).code == 0
    for batch_id in ("q1", "q2", "q3"):
        assert (held_reason(dsn, batch_id), notices(dsn, batch_id)) == (None, [])


def test_a_file_whose_photos_are_annotated_is_not_held(run: Run, loaded: list[int], dsn: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([0.1, 0.2, 0.5, 1.0])})
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", "1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q2").code == 0
    assert world.query(dsn, "SELECT id FROM ingest.batches WHERE kind = 'qwen'") == [("q1",)]


# The options


@pytest.mark.parametrize("coordinates", ["", "2", "1000.0", "pixel", "0x10", "640X480", "640x", "-1", "1000x1000x1"])
def test_other_coordinates_are_wrong_usage(coordinates: str, run: Run, dsn: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {})
    done = run("load-qwen", "--file", file, "--batch-id", "q1", f"--coordinates={coordinates}")
    assert (done.code, done.out) == (2, "")
    assert f"--coordinates is {coordinates!r}" in done.err
    assert world.query(dsn, "SELECT id FROM ingest.batches") == []


def test_a_batch_is_resumed_with_the_same_frame_only(run: Run, loaded: list[int], dsn: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([100, 200, 500, 600])})
    annotating.break_transforms(dsn)
    options = ("--coordinates", "1000", "--exif-turned")
    stopped = run("load-qwen", "--file", file, "--batch-id", "q1", *options)
    assert stopped.code == 3
    command = "python -m pipeline load-qwen --batch-id q1 --coordinates 1000 --exif-turned"
    assert command in stopped.err
    assert command in run("status").out
    annotating.mend_transforms(dsn)
    refused = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert refused.code == 4
    assert "was started with --coordinates 1000, --exif-turned." in refused.err
    refused = run("load-qwen", "--file", file, "--batch-id", "q1", *options[:2])
    assert refused.code == 4
    other = run("load-qwen", "--file", file)
    assert (other.code, "belongs to unfinished q1" in other.err) == (3, True)
    done = run("load-qwen", "--file", file, *options)
    assert done.out.startswith("Batch q1 is done: 1 recognition")
    assert stored(dsn, loaded[0]) == [("16", "24", "64", "48")]


def test_luigi_takes_the_frame_as_parameters() -> None:
    parameters = dict(LoadQwen.get_params())  # type: ignore[no-untyped-call]
    assert parameters["coordinates"].parse("1000") == "1000"
    assert {"coordinates", "exif_turned"} <= set(parameters)


def test_values_of_the_file_stay_in_one_frame_whatever_the_photo(
    run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    for table in ("public.images", "raw.photos"):
        world.query(dsn, f"UPDATE {table} SET width = 120, height = 160 WHERE camera_number = 2")
    content = {key_of(loaded[0], camera): value_of("plate") for camera in CAMERAS}
    for found in content.values():
        found["plates"]["qwen_detections"][0]["bbox_2d"] = [250, 500, 500, 1000]
    file = write(tmp_path / "a.json", content)
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", "1000").code == 0
    assert stored(dsn, loaded[0]) == [("40", "60", "40", "60")]
    assert stored(dsn, loaded[0], 2) == [("30", "80", "30", "80")]


@pytest.mark.parametrize("coordinates", ["pixels", "1000", "1280x960"])
def test_fractions_are_held_under_every_frame_but_1(
    coordinates: str, run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([0.1, 0.2, 0.5, 1.02])})
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", coordinates).code == 6
    done = run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", "1")
    assert done.code == 6
    assert "--coordinates 1" in done.err
    assert done.err.index("reset --batch-id q1") < done.err.index("publish --batch-id q1")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_photos_without_detections_are_noticed_once_a_file(
    force: tuple[str, ...], run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    content: annotating.Annotations = {
        key_of(one): {"dishes": {"qwen_detections": []}, "plates": {"qwen_detections": []}} for one in loaded[1:]
    }
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([1, 2, 100, 100])} | content)
    assert run("load-qwen", "--file", file, "--batch-id", "q1", *force).code == 0
    told = world.query(dsn, "SELECT code, message FROM ingest.notices WHERE batch_id = 'q1'")
    assert [(code, message[-3:]) for code, message in told] == [("annotations_empty", ": 2")]


def test_a_repeated_box_outside_its_photo_is_one_reject_in_numbers_of_the_file(
    run: Run, loaded: list[int], dsn: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.json", {key_of(loaded[0]): value([1, 2, 100, 100], *[[1100, 2, 1200, 9]] * 40)})
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--coordinates", "1000").code == 0
    messages = world.query(dsn, "SELECT message FROM ingest.rejects WHERE batch_id = 'q1' AND code = 'box_outside'")
    assert len(messages) == 1
    assert "1100, 2, 1200, 9" in messages[0][0]
    assert "40 times" in messages[0][0]

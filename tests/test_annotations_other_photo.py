"""Annotations belong to the content of a photo: they go with it, stay away from another one, and come back with it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import Settings
from tests import annotating, world
from tests.annotating import Annotations, Run, break_transforms, ids_of, key_of, mend_transforms, value_of, write
from tests.runner import ForkServer, Runner
from tests.services import MakeDataset
from tests.sweeps import sweep

run = annotating.run
dsn = annotating.dsn

CAMERAS = {1: "Main", 2: "Qualifying"}
CODE = "annotations_other_photo"
OURS = world.ours("public.initial_annotations")
#: The boxes of the former photos, and of the latter ones.
FORMER, LATTER = value_of("dish_0", "dish_7", "plate"), value_of("dish_0", "plate", left=20)
#: Camera -> label, box and number of each.
Boxes = dict[int, list[tuple[Any, ...]]]


@pytest.fixture
def dataset(run: Run, own_dataset: MakeDataset) -> Path:
    """One recognition, loaded as b1."""
    dataset = own_dataset(1)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    return dataset


def values(dataset: Path, value: Any = FORMER, cameras: Iterable[int] = CAMERAS) -> Annotations:
    [number] = ids_of(dataset)
    return {key_of(number, CAMERAS[camera]): value for camera in cameras}


@pytest.fixture
def file(run: Run, dataset: Path, tmp_path: Path) -> Path:
    """The annotations of both photos, loaded as q1."""
    file = write(tmp_path / "annotations.json", values(dataset))
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    return file


def photos(dataset: Path, cameras: Iterable[int] = CAMERAS) -> list[Path]:
    return [next(dataset.rglob(f"*{CAMERAS[camera]}.jpg")) for camera in cameras]


def repaint(dataset: Path, cameras: Iterable[int] = CAMERAS) -> dict[Path, bytes]:
    """Replace photos by others of the same size and orientation; return what they were."""
    former = {path: path.read_bytes() for path in photos(dataset, cameras)}
    for path in former:
        with Image.open(path) as photo:
            exif, other = photo.getexif(), photo.convert("RGB").rotate(180)
        other.save(path, "JPEG", exif=exif)
        assert path.read_bytes() != former[path]
    return former


def put_back(former: Mapping[Path, bytes]) -> None:
    for path, content in former.items():
        path.write_bytes(content)


def boxes(dsn: str) -> Boxes:
    """Return the boxes of the model on the photo of each camera."""
    statement = (
        "SELECT i.camera_number, a.label, a.bbox, a.detection FROM public.initial_annotations a"
        f" JOIN public.images i ON i.id = a.image_id WHERE a.source = 'MODEL' AND i.{world.ours('public.images')}"
        " ORDER BY 1, a.detection"
    )
    found: Boxes = {camera: [] for camera in CAMERAS}
    for camera, *box in world.query(dsn, statement):
        found[camera].append(tuple(box))
    return found


def rows(dsn: str, cameras: Iterable[int]) -> list[tuple[Any, ...]]:
    """Return the boxes of photos with their ids and all that people set."""
    statement = (
        "SELECT a::text FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id"
        f" WHERE i.camera_number = ANY (%s) AND i.{world.ours('public.images')} ORDER BY a.id"
    )
    return world.query(dsn, statement, ([*cameras],))


def notices(dsn: str, batch_id: str) -> list[str]:
    statement = "SELECT step FROM ingest.notices WHERE batch_id = %s AND code = %s ORDER BY id"
    return [step for (step,) in world.query(dsn, statement, (batch_id, CODE))]


def open_notices(dsn: str) -> list[str]:
    """Return the batches that have a notice of a photo without its annotations which is not over."""
    statement = "SELECT batch_id FROM ingest.notices WHERE code = %s AND over_at IS NULL ORDER BY id"
    return [batch_id for (batch_id,) in world.query(dsn, statement, (CODE,))]


@pytest.mark.parametrize("option", ["--changed", "--force"])
@pytest.mark.parametrize("cameras", sweep(zip([(1, 2), (1,), (2,)])), ids=str)
def test_boxes_go_with_the_content_of_their_photo_and_come_back_with_it(
    run: Run, dataset: Path, file: Path, settings: Settings, dsn: str, option: str, cameras: tuple[int, ...]
) -> None:
    others = CAMERAS.keys() - set(cameras)
    world.query(dsn, f"UPDATE public.initial_annotations SET is_occluded = true WHERE {OURS}")
    before, stayed = boxes(dsn), rows(dsn, others)
    assert all(before.values())
    repaint(dataset, cameras)
    done = run("load", "--source", dataset, "--batch-id", "b2", option, "--json")
    assert (done.code, json.loads(done.out)["notices"][CODE]) == (0, len(cameras)), done.err
    after = {camera: [] if camera in cameras else found for camera, found in before.items()}
    assert boxes(dsn) == after
    assert notices(dsn, "b2") == ["transform"] * len(cameras)
    assert world.inconsistencies(settings) == []

    plain = run("load-qwen", "--file", file, "--batch-id", "q2", "--json")
    told = json.loads(plain.out)
    assert (plain.code, told["batch_made"], told["notices"]) == (0, False, {CODE: len(cameras)})
    assert (told["found"], told["already_loaded"], told["changed_since_load"]) == (2, len(others), 0)
    assert (boxes(dsn), notices(dsn, "q2")) == (after, ["discover"] * len(cameras))
    again = run("load-qwen", "--file", file, "--batch-id", "q3", "--changed")
    assert (again.code, boxes(dsn), notices(dsn, "q3")) == (0, after, [])

    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    assert (boxes(dsn), rows(dsn, others)) == (before, stayed)
    assert world.inconsistencies(settings) == []
    assert run("load-qwen", "--file", file, "--batch-id", "q4", "--changed").code == 0
    assert (boxes(dsn), notices(dsn, "q4")) == (before, [])


@pytest.mark.parametrize("size", [(1280, 960), (200, 150)], ids=str)
def test_former_values_stay_away_from_a_photo_of_another_size(
    run: Run, dataset: Path, file: Path, settings: Settings, dsn: str, size: tuple[int, int]
) -> None:
    before = boxes(dsn)
    [path] = photos(dataset, [1])
    Image.new("RGB", size, (9, 99, 199)).save(path)
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q2").code == 0
    assert (boxes(dsn), notices(dsn, "q2")) == ({**before, 1: []}, ["discover"])
    assert world.inconsistencies(settings) == []


@pytest.mark.parametrize("is_forced", [False, True], ids=["values", "force"])
def test_another_photo_gets_other_values_or_the_former_ones_by_force(
    run: Run, dataset: Path, file: Path, settings: Settings, dsn: str, is_forced: bool
) -> None:
    former = boxes(dsn)
    repaint(dataset, [1])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
    if not is_forced:
        write(file, {**values(dataset), **values(dataset, LATTER, [1])})
    assert run("load-qwen", "--file", file, "--batch-id", "q2", *["--force"] * is_forced).code == 0
    latter = boxes(dsn)
    assert (len(latter[1]), latter[2], notices(dsn, "q2")) == (3 if is_forced else 2, former[2], [])
    # These values belong to this photo now, and to the former one as well where they were forced.
    assert run("load-qwen", "--file", file, "--batch-id", "q3").code == 0
    assert (boxes(dsn), notices(dsn, "q3")) == (latter, [])
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    assert boxes(dsn) == former
    assert notices(dsn, "q2") == ["transform"]
    assert run("load-qwen", "--file", file, "--batch-id", "q4", "--changed").code == 0
    assert (boxes(dsn), notices(dsn, "q4")) == (former, [] if is_forced else ["discover"])
    assert run("load", "--source", dataset, "--batch-id", "b3", "--changed").code == 0
    assert boxes(dsn) == latter
    assert world.inconsistencies(settings) == []


def test_a_photo_that_comes_back_has_its_boxes_again(
    run: Run, dataset: Path, file: Path, settings: Settings, dsn: str
) -> None:
    before = boxes(dsn)
    former = repaint(dataset, [2])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
    assert boxes(dsn) == {**before, 2: []}
    put_back(former)
    assert run("load", "--source", dataset, "--batch-id", "b3", "--changed").code == 0
    assert (boxes(dsn), notices(dsn, "b3"), open_notices(dsn)) == (before, [], [])
    assert run("reset", "--batch-id", "b3", "--confirm").code == 0
    assert (boxes(dsn), open_notices(dsn)) == ({**before, 2: []}, ["q1"])
    assert json.loads(run("status", "--batch-id", "q1", "--json").out)["notices"] == {CODE: 1}
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    assert (boxes(dsn), open_notices(dsn)) == (before, [])
    assert world.inconsistencies(settings) == []


RESETS = [
    ("b2", "q2", "q1", "b3", "b1"),
    ("q1", "b3", "q2", "b2", "b1"),
    ("b1", "b3", "q1", "b2", "q2"),
    ("q2", "b3", "b2", "b1", "q1"),
    ("b3", "b2", "b1", "q2", "q1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("order", RESETS, ids="-".join)
def test_after_resets_in_any_order_boxes_are_those_of_the_photo_shown(
    run: Run, dataset: Path, file: Path, settings: Settings, dsn: str, order: tuple[str, ...]
) -> None:
    by_content: dict[str, Boxes] = {"former": boxes(dsn)}
    former = repaint(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
    write(file, values(dataset, LATTER))
    assert run("load-qwen", "--file", file, "--batch-id", "q2").code == 0
    by_content["latter"] = boxes(dsn)
    put_back(former)
    assert run("load", "--source", dataset, "--batch-id", "b3", "--changed").code == 0
    photo = {"b1": "former", "b2": "latter", "b3": "former"}
    annotated = {"former": "q1", "latter": "q2"}
    left = ["b1", "q1", "b2", "q2", "b3"]
    for name in ("", *order):
        if name:
            assert run("reset", "--batch-id", name, "--confirm").code == 0
            left.remove(name)
        shown = [photo[one] for one in left if one in photo][-1:]
        wanted = by_content[shown[0]] if shown and annotated[shown[0]] in left else {1: [], 2: []}
        assert boxes(dsn) == wanted, (name, left)
        assert world.inconsistencies(settings) == []
    world.nothing(settings)


def test_annotations_discovered_before_the_photo_changed_are_left_out(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "1.json", values(dataset))
    break_transforms(dsn)
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 3
    mend_transforms(dsn)
    repaint(dataset, [1])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
    assert run("load-qwen", "--file", file).code == 0
    found = boxes(dsn)
    assert (found[1], len(found[2]), notices(dsn, "q1")) == ([], 3, ["transform"])
    assert run("load-qwen", "--file", file, "--batch-id", "q2").code == 0
    assert (boxes(dsn), notices(dsn, "q2")) == (found, ["discover"])
    assert world.inconsistencies(settings) == []


@pytest.fixture
def runner(workdir: Path, fork_server: ForkServer) -> Runner:
    return Runner(fork_server, workdir, {"PIPELINE_THREAD_COUNT": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("moment", [3, 12, 20])
def test_boxes_go_and_come_back_once_where_runs_are_killed_between(
    run: Run, runner: Runner, dataset: Path, file: Path, settings: Settings, dsn: str, moment: int
) -> None:
    before = boxes(dsn)
    repaint(dataset)
    load: tuple[str | Path, ...] = ("load", "--source", dataset, "--batch-id", "b2", "--changed")
    reset = ("reset", "--batch-id", "b2", "--confirm")
    nothing: Boxes = {1: [], 2: []}

    def killed(command: tuple[str | Path, ...], wanted: Boxes) -> None:
        first = runner(*command, kill_after=moment)
        assert first.code in (-signal.SIGKILL, 0), first.stderr
        # The annotations file is loaded by another run in between; it finds one photo or the other.
        assert run("load-qwen", "--file", file).code == 0
        assert boxes(dsn) in (before, nothing)
        assert world.inconsistencies(settings) == []
        assert runner(*command).code == 0
        assert boxes(dsn) == wanted
        assert world.inconsistencies(settings) == []

    killed(load, nothing)
    killed(reset, before)

"""The small inputs of tests/cases, each with its right outcome: exit codes, rejects, notices, files, rows and boxes.

A case is a folder with a dataset `ds` and perhaps annotations files. Rows and objects are compared with the files
themselves; every file that is not used must be named by a reject or a notice, or be clutter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.config import Settings
from tests import world
from tests.services import RunPipeline

CASES = Path(__file__).parent / "cases"
EXPORT = "export_1"
MENU, RECEIPT = re.compile(r"_AM\.json", re.IGNORECASE), re.compile(r"_(correct_dishes|CD)\.json", re.IGNORECASE)

_FOUND = "SELECT DISTINCT code, regexp_replace(path, '^.*/', '') FROM ingest.{}"
_BOXES = """
    SELECT p.recognition_id, p.camera_number, i.item_type, a.bbox::text
    FROM public.initial_annotations a
    JOIN public.images p ON p.id = a.image_id
    JOIN public.initial_tray_items i ON i.id = a.initial_tray_item_id
    ORDER BY p.recognition_id, p.camera_number, a.detection
"""


@dataclass(frozen=True)
class Case:
    """An input and what is right.

    Attributes:
        folders: recognition -> its folder below `ds`, of those that readers see afterwards.
        annotated: the options of each run of load-qwen after the load, with its exit code.
        loaded: the exit code of the load.
        rejects: code and last part of the path; so are the notices.
        classes: the files below `ds` by class; those that are not named here are none.
        boxes: recognition, camera, type of the item, and the box as it is stored.
        unread: names of menus and receipts that are not used.
    """

    name: str
    folders: Mapping[int, str] = field(default_factory=dict)
    annotated: tuple[tuple[str, int], ...] = ()
    loaded: int = 0
    rejects: Iterable[tuple[str, str]] = ()
    notices: Iterable[tuple[str, str]] = ()
    classes: Mapping[str, int] = field(default_factory=dict)
    boxes: Iterable[tuple[int, int, str, str]] = ()
    unread: frozenset[str] = frozenset()


def photo(recognition: int, camera: str = "Main") -> str:
    return f"recognition_{recognition}_2025-10-11_{camera}.jpg"


def folders(*numbers: int, **others: str) -> dict[int, str]:
    usual = {number: f"{EXPORT}/recognition_{number}" for number in numbers}
    return {**usual, **{int(number.removeprefix("n")): f"{EXPORT}/{name}" for number, name in others.items()}}


def box(x: str, y: str, w: str, h: str) -> str:
    return f'{{"h": {h}, "w": {w}, "x": {x}, "y": {y}}}'


QWEN = "--file qwen_annotations.json"
SUSPECT = ("coordinates_suspect", "qwen_annotations.json")

UNREAD = (
    "2071_recognition_2025-10-11_AM (1).json",
    "2071_recognition_2025-10-11_correct_dishes (1).json",
    "2072_recognition_2025-10-11_AM.json.gz",
    "2072_recognition_2025-10-11_correct_dishes.json.bak",
    "2073_recognition_2025-10-11_AM.jsonl",
    "2073_recognition_2025-10-11_correct_dishes.txt",
    "2074-AM.json",
    "2074-correct_dishes.json",
    "2076_recognition_2025-10-11_AM.json.json",
    "ActiveMenu.json",
    "receipt.json",
    "2078_recognition_2025-10-11_AM .json",
    "2080_recognition_2025-10-11_АМ.json",  # Cyrillic
    "2080_recognition_2025-10-11_correct dishes.json",
)
NEARLY = ("recognition_2043 (1)", "recognition_2044 - Copy", "recognition-2045", "recognition_2046_")

TABLE = (
    Case(
        "box_negative",  # over the edge by 40 of 1280 pixels, which is more than 2 %
        folders(4005),
        annotated=((QWEN, 6),),
        rejects=[("box_outside", photo(4005))],
        notices=[SUSPECT],
        classes={"used": 4},
    ),
    Case(
        "box_normalised_1000",  # numbers from 0 to 1000 on a photo of 1280 x 960
        folders(4001),
        annotated=((QWEN, 6),),
        rejects=[("box_outside", photo(4001))],
        notices=[SUSPECT],
        classes={"used": 4},
    ),
    Case(
        "box_normalised_1000",
        folders(4001),
        annotated=((f"{QWEN} --coordinates 1000", 0),),
        classes={"used": 4},
        boxes=[
            (4001, 1, "FOOD", box("102.4", "96", "1164.8", "844.8")),
            (4001, 1, "FOOD", box("640", "480", "638.72", "480")),
        ],
    ),
    Case(
        "box_outside_photo",
        folders(4004),
        annotated=((QWEN, 6),),
        rejects=[("box_outside", photo(4004))],
        classes={"used": 4},
    ),
    Case(
        "qwen_key_wrong_folder",  # the key's folder names 4048, its file 4049
        folders(4048, 4049),
        annotated=((QWEN, 6),),
        rejects=[("annotation_key", photo(4049))],
        classes={"used": 8},
    ),
    Case(
        "qwen_two_files_by_camera",  # the second file brings the other camera
        folders(4058),
        annotated=(("--file s_main.json", 0), ("--file s_qual.json", 0)),
        notices=[("coordinates_suspect", "s_main.json"), ("coordinates_suspect", "s_qual.json")],
        classes={"used": 4},
        boxes=[
            (4058, 1, "FOOD", box("100", "100", "300", "300")),
            (4058, 2, "FOOD", box("11", "11", "88", "88")),
        ],
    ),
    Case(
        "json_duplicate_keys",  # two Counts in a receipt, two ExternalIds in a menu; 3005 is whole
        folders(3005),
        rejects=[
            ("json_broken", "3004_recognition_2025-10-11_correct_dishes.json"),
            ("json_broken", "3046_recognition_2025-10-11_AM.json"),
        ],
        classes={"used": 4, "rejected": 8},
    ),
    *(
        Case(
            name,
            loaded=6,
            rejects=[("photo_undecodable", photo(number))],
            classes={"rejected": 4},
        )
        for name, number in (("photo_crlf_damage", 126), ("photo_cut_with_EOI", 111), ("photo_flipped_bytes", 115))
    ),
    Case(
        "t02_macosx_zip_EXPORT",  # __MACOSX sorts behind EXPORT_1, and is no export
        {2011: "EXPORT_1/recognition_2011"},
        classes={"used": 4, "clutter": 1},
    ),
    Case(
        "t03_recycle",  # recognitions in recycle bins were deleted, thumbnails are no photos
        folders(2021),
        classes={"used": 4, "clutter": 20},
    ),
    Case(
        "t04_Photos_case",  # `Photos` and `PHOTOS` are `photos`, `images` is not
        folders(2031, 2032, 2034),
        rejects=[("photo_count", "recognition_2033")],
        classes={"used": 12, "rejected": 4},
    ),
    Case(
        "t05_folder_names_not_matched",
        folders(2041, n2042="Recognition_2042", n2047="RECOGNITION_2047"),
        notices=[("folder_name", name) for name in NEARLY],
        classes={"used": 12, "passed_over": 16},
    ),
    Case(
        "t08_menu_names",
        folders(*range(2071, 2081)),
        notices=[("file_unknown", name) for name in UNREAD],
        classes={"used": 40 - len(UNREAD), "passed_over": len(UNREAD)},
        unread=frozenset(UNREAD),
    ),
    Case(
        "t15_photo_of_other_recognition",  # the folder is 2141's, all files name 2142
        loaded=6,
        rejects=[("photo_other_recognition", photo(2142))],
        classes={"rejected": 4},
    ),
)


def name_of(case: Case) -> str:
    return " ".join([case.name, *(options for options, _ in case.annotated if "--coordinates" in options)])


def test_every_case_is_in_the_table() -> None:
    assert {case.name for case in TABLE} == {path.name for path in CASES.iterdir()}


@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_a_case_has_its_right_outcome(case: Case, run_pipeline: RunPipeline, settings: Settings) -> None:
    folder = CASES / case.name
    dataset = folder / "ds"
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    assert done.returncode == case.loaded, done.stderr
    for number, (options, code) in enumerate(case.annotated, 1):
        option, file, *others = options.split()
        done = run_pipeline("load-qwen", option, folder / file, *others, "--batch-id", f"q{number}")
        assert done.returncode == code, done.stderr

    dsn = settings.database_url.reveal()
    assert set(world.query(dsn, _FOUND.format("rejects"))) == set(case.rejects)
    assert set(world.query(dsn, _FOUND.format("notices"))) == set(case.notices)
    assert world.query(dsn, _BOXES) == list(case.boxes)
    check_rows(case, dataset, dsn)
    assert world.inconsistencies(settings) == []
    assert world.dangling(settings) == []
    [(classes,)] = world.query(dsn, "SELECT files FROM ingest.batches WHERE id = 'b1'")
    assert {name: count for name, count in classes.items() if count} == case.classes
    assert sum(classes.values()) == sum(path.is_file() for path in dataset.rglob("*"))
    if "json_broken" in dict(case.rejects):
        messages = world.query(dsn, "SELECT message FROM ingest.rejects ORDER BY path")
        assert ["Count" in messages[0][0], "ExternalId" in messages[1][0]] == [True, True]


def check_rows(case: Case, dataset: Path, dsn: str) -> None:
    """Compare photos, menus and receipts of the domain with the files."""
    photos, menus, receipts = [], set(), set()
    for number, name in sorted(case.folders.items()):
        files = [path for path in (dataset / name).rglob("*") if path.is_file() and path.name not in case.unread]
        for camera, word in ((1, "Main"), (2, "Qualifying")):
            [content] = [path.read_bytes() for path in files if path.name == photo(number, word)]
            photos.append((number, camera, hashlib.sha256(content).hexdigest()))
        menus |= {number for path in files if MENU.search(path.name)}
        receipts |= {number for path in files if RECEIPT.search(path.name)}
    found = world.domain(dsn)
    assert [row[0] for row in found.recognitions] == sorted(case.folders)
    assert [(row[0], row[1], row[6]) for row in found.images] == photos
    assert {row[0] for row in found.menus} == menus
    assert {row[0] for row in found.lines} == receipts

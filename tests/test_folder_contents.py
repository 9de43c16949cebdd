"""What is used of a recognition's folder, and what becomes of everything else in it; no file is opened."""

from __future__ import annotations

import errno
import os
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from pipeline.dataset.clutter import is_clutter
from pipeline.dataset.layout import list_folders
from pipeline.dataset.names import last, near_recognition, other_recognition
from pipeline.dataset.passed import SPECIAL
from pipeline.dataset.recognition import inspect_folder
from pipeline.dataset.records import Folder, Inspected, Notice, Recognition, Reject

PAIR = ("photos/recognition_7_2025-10-11_Main.jpg", "photos/recognition_7_2025-10-11_Qualifying.jpg")
DAY = "7_recognition_2025-10-11"
LACKS = "the recognition is loaded without a menu and a receipt"


def look(tmp_path: Path, *names: str) -> Inspected:
    """Inspect a recognition of these files; all of them are in a class."""
    folder = tmp_path / "recognition_7"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    found = inspect_folder(tmp_path, Folder(7, folder.name))
    assert found.files.total() == sum(len(files) for _, _, files in os.walk(folder))
    assert len(found.notices) <= found.files["passed_over"] + found.files["rejected"]
    return found


def used(found: Inspected) -> tuple[str | None, ...]:
    assert isinstance(found.result, Recognition), found.result
    files = (*found.result.photos, found.result.menu, found.result.receipt)
    return tuple(file.path.removeprefix("recognition_7/") if file else None for file in files)


def noticed(found: Inspected) -> list[tuple[str, str]]:
    assert all(notice.recognition_id == 7 for notice in found.notices)
    return [(notice.code, notice.path.removeprefix("recognition_7/")) for notice in found.notices]


@pytest.mark.parametrize(
    "names",
    [
        ("Photos/x_Main.jpg", "Photos/x_Qualifying.jpg"),
        ("PHOTOS/x_Main.JPEG", "x_Qualifying.JPG"),
        ("photos/x_Main.jpe", "photos/x_Qualifying.JFIF"),
        ("photos/x_Main (1).jpg", "photos/x_Qualifying - Copy.jpg"),
        ("photos/7_recognition_2025-10-11_Main.jpg", "photos/7_recognition_20251011_Qualifying.jpg"),
        ("photos/2025-10-11_recognition_Main.jpg", "photos/20251011_recognition_Qualifying.jpg"),
        ("photos/recognition_007_Main.jpg", "photos/recognition_2025-10-11_Qualifying.jpg"),
    ],
)
def test_photos_under_usual_and_unusual_names_are_used(tmp_path: Path, names: tuple[str, str]) -> None:
    found = look(tmp_path, *names)
    assert used(found) == (*names, None, None)
    assert noticed(found) == []


def test_the_year_after_the_word_recognition_is_part_of_a_date(tmp_path: Path) -> None:
    found = look(tmp_path, "7_recognition_2025-10-11_Main.jpg", "7_recognition_2025-10-11_Qualifying.jpg").result
    assert isinstance(found, Recognition)
    assert found.captured_on == date(2025, 10, 11)


@pytest.mark.parametrize(
    "date", ["2025-10-11", "2025_10_11", "11.10.2025", "11-10-2025", "1_1_2025", "20251011", "11.10.25"]
)
@pytest.mark.parametrize("separator", ["_", "-"])
def test_the_number_beside_any_date_is_that_of_the_recognition(date: str, separator: str) -> None:
    for number in ("3", "003", "4045", "100024"):
        for name in (
            f"recognition_{number}{separator}{date}_Main.jpg",
            f"{date}{separator}{number}_recognition_AM.json",
        ):
            assert other_recognition(name, 2) == number, name
            assert other_recognition(name, int(number)) is None
    for name in (f"recognition{separator}{date}_Main.jpg", f"{date}{separator}recognition_12-30-45_Main.jpg"):
        assert other_recognition(name, 2) is None, name


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("recognition_7_12-30-45_2025-10-11_Main.jpg", "7"),
        ("recognition 3 2025 10 11 Main.jpg", "3"),
        ("1_recognition_2_Main.jpg", None),
        ("recognition_20251011123000_Main.jpg", None),
        ("20251011123000_recognition_Main.jpg", None),
        ("recognition_2025-13-45_Main.jpg", None),
        ("recognition 2025 10 11_Main.jpg", None),
        ("2_Main.jpg", None),
        ("IMG_1234_Main.jpg", None),
    ],
)
def test_a_date_is_no_number_of_a_recognition(name: str, other: str | None) -> None:
    assert other_recognition(name, 2) == other


@pytest.mark.parametrize(
    "name",
    [
        "recognition_7_2025-10-11_Main (1).jpg",
        "recognition_7_2025-10-11_Main(2).JPG",
        "recognition_7_2025-10-11_Main - Copy.jpg",
        "recognition_7_2025-10-11_Qualifying - Copy (3).jpg",
        "recognition_7_2025-10-11_Qualifying copy 2.jpeg",
        "recognition_7_2025-10-11_Main 2.jpg",
        "recognition_7_2025-10-11_Main - Cópia.jpg",
        "recognition_7_2025-10-11_Main — копия.jpg",
        "recognition_7_2025-10-11_Main - копия.jpg",
        "recognition_7_2025-10-11_Main_copy.jpg",
        "Copy of recognition_7_2025-10-11_Main.jpg",
        "Копия recognition_7_2025-10-11_Main.jpg",
        "recognition_7_2025-10-11_Main.jfif",
    ],
)
@pytest.mark.parametrize("folder", ["photos/", ""])
def test_a_copy_besides_two_photos_is_passed_over(tmp_path: Path, folder: str, name: str) -> None:
    found = look(tmp_path, *PAIR, folder + name)
    assert used(found) == (*PAIR, None, None)
    assert noticed(found) == [("file_unknown", folder + name)]
    assert found.files == {"used": 2, "passed_over": 1}


@pytest.mark.parametrize(
    ("names", "code", "told"),
    [
        (
            ["photos/x_Main.jpg", "photos/x_Qualifying.png"],
            "photo_count",
            "1 photo instead of two; in the folder: x_Main.jpg, x_Q",
        ),
        (
            ["photos/x_Main.heic", "photos/x_Qualifying.webp"],
            "photo_count",
            "0 photos instead of two; in the folder: x_Main",
        ),
        (["images/x_Main.jpg", "images/x_Qualifying.jpg"], "photo_count", "in the folder: images/"),
        ([PAIR[0], f"{PAIR[1]}.part"], "photo_count", "_Qualifying.jpg.part"),
        (
            [*PAIR, "photos/recognition_7_Side.jpg"],
            "photo_count",
            "3 photos instead of two; in the folder: recogn",
        ),
        ([*PAIR, "photos/recognition_7_Main_thumb.jpg"], "photo_count", "recognition_7_Main_thumb.jpg"),
        ([PAIR[0], "photos/recognition_7_2025-10-11_Main (1).jpg"], "photo_cameras", "in the folder: recognition_7"),
        ([PAIR[0], "photos/.x_Qualifying.jpg"], "photo_count", ".x_Qualifying.jpg"),
        ([PAIR[0], "photos/recognition_8_2025-10-11_Qualifying.jpg"], "photo_other_recognition", "recognition 8"),
        ([PAIR[0], "photos/Recognition-8_Qualifying.jpg"], "photo_other_recognition", "recognition 8"),
        ([PAIR[0], "photos/8_recognition_2025-10-11_Qualifying.jpg"], "photo_other_recognition", "recognition 8"),
        ([*PAIR, "8_recognition_2025-10-11_AM.json"], "json_other_recognition", "recognition 8"),
        ([*PAIR, "recognition_8_correct_dishes.json"], "json_other_recognition", "recognition 8"),
        (["export_1/x/y/photos/x_Main.jpg"], "photo_count", "0 photos instead of two; in the folder: export_1/"),
    ],
)
def test_what_is_rejected_says_what_lies_there(tmp_path: Path, names: list[str], code: str, told: str) -> None:
    found = look(tmp_path, *names, "notes.txt", "photos/Thumbs.db")
    assert isinstance(found.result, Reject)
    assert found.result.code == code
    assert told in found.result.message
    assert found.files == {"rejected": len(names) + 1, "clutter": 1}
    assert found.notices == []


@pytest.mark.parametrize("names", [[PAIR[0]], ["x_Main.jpg", "y_Main.jpg"], [*PAIR, "8_recognition_AM.json"], [*PAIR]])
def test_recognitions_in_the_folder_of_another_one_are_named(tmp_path: Path, names: list[str]) -> None:
    found = look(tmp_path, *names, *(f"export/recognition_9/{name}" for name in PAIR))
    assert [one.code for one in found.notices] == ["folder_nested"]
    assert "recognition_7/export/recognition_9 for one: name recognition_7 with" in found.notices[0].message


def test_a_recognition_directly_in_another_one_is_nested(tmp_path: Path) -> None:
    found = look(tmp_path, *PAIR, *(f"recognition_9/{name}" for name in PAIR))
    assert noticed(found) == [("folder_nested", "recognition_7")]
    assert "recognition_7/recognition_9 for one: name recognition_7 with --source" in found.notices[0].message


def test_the_objects_of_the_embedded_storage_are_not_named_as_a_dataset(tmp_path: Path) -> None:
    found = look(tmp_path, *PAIR, ".pipeline/storage/b1/recognitions/9/camera1.jpg")
    assert noticed(found) == [("folder_unknown", ".pipeline")]


@pytest.mark.parametrize("kind", ["dangling", "loop", "pipe"])
@pytest.mark.parametrize("name", [PAIR[1], "AM.json"])
def test_a_photo_or_document_that_is_no_regular_file_is_named(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "recognition_7"
    (folder / "photos").mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("nowhere" if kind == "dangling" else last(name))
    found = look(tmp_path, *(one for one in PAIR if one != name))
    if name == "AM.json":
        assert used(found) == (*PAIR, None, None)
        assert found.notices == [Notice(7, f"recognition_7/{name}", "file_special", f"{SPECIAL}; {LACKS}")]
    else:
        assert isinstance(found.result, Reject)
        assert "recognition_7_2025-10-11_Qualifying.jpg" in found.result.message


def test_a_folder_under_the_name_of_a_document_is_named(tmp_path: Path) -> None:
    found = look(tmp_path, *PAIR, "AM.json/x.txt")
    assert noticed(found) == [("folder_unknown", "AM.json")]
    assert found.notices[0].message.endswith(LACKS)


@pytest.mark.parametrize(
    ("menu", "receipt"),
    [
        (f"{DAY}_AM.json", f"{DAY}_correct_dishes.json"),
        ("am.JSON", "cd.Json"),
        (f"photos/{DAY}_AM.json", f"photos/{DAY}_Correct_Dishes.JSON"),
    ],
)
def test_documents_in_any_letter_case_and_in_photos_are_used(tmp_path: Path, menu: str, receipt: str) -> None:
    found = look(tmp_path, *PAIR, menu, receipt)
    assert used(found) == (*PAIR, menu, receipt)
    assert found.notices == []


@pytest.mark.parametrize(
    "name",
    [
        f"{DAY}_AM (1).json",
        f"{DAY}_AM.json.gz",
        f"{DAY}_AM.json.json",
        f"{DAY}_AM .json",
        f"{DAY}_AM.jsonl",
        f"{DAY}_AM",
        f"photos/{DAY}_AM.txt",
        "7-AM.json",
        f"{DAY}_АМ.json",  # Cyrillic
        f"{DAY}_Меню.json",
        "ActiveMenu.json",
        f"{DAY}_correct_dishes (1).json",
        f"{DAY}_correct-dishes.json",
        f"{DAY}_correct dishes.json",
        f"{DAY}_correct_dishes.json.bak",
        f"{DAY}_correct_dishes.json.part",
        "7-CD.json",
        f"{DAY}_СD.json",  # Cyrillic
        "receipt.json",
        "data.json",
    ],
)
def test_a_document_under_another_name_is_named_and_not_used(tmp_path: Path, name: str) -> None:
    found = look(tmp_path, *PAIR, name)
    assert used(found) == (*PAIR, None, None)
    assert noticed(found) == [("file_unknown", name)]
    assert found.notices[0].message == f"no recognition uses the file; {LACKS}"


@pytest.mark.parametrize(
    ("names", "lacks"), [(["AM.json"], "a receipt"), (["CD.json"], "a menu"), (["AM.json", "CD.json"], "")]
)
def test_what_is_not_used_says_what_the_recognition_lacks(tmp_path: Path, names: list[str], lacks: str) -> None:
    [found] = look(tmp_path, *PAIR, *names, "x.json").notices
    assert found.message == "no recognition uses the file" + (
        f"; the recognition is loaded without {lacks}" if lacks else ""
    )


def test_of_two_documents_the_other_one_is_named(tmp_path: Path) -> None:
    names = (f"{DAY}_AM.json", "7_recognition_2025-10-10_AM.json", f"photos/{DAY}_AM.json", f"{DAY}_AM (1).json")
    found = look(tmp_path, *PAIR, *names)
    assert used(found) == (*PAIR, names[0], None)
    assert sorted(noticed(found)) == sorted(("file_unknown", name) for name in names[1:])


def test_other_files_and_folders_are_named_one_by_one(tmp_path: Path) -> None:
    found = look(tmp_path, *PAIR, "notes.txt", "old.zip", ".hidden", "thumbs/a.jpg", "thumbs/b/c.jpg", "photos/x/y.jpg")
    assert used(found) == (*PAIR, None, None)
    assert sorted(noticed(found)) == [
        ("file_archive", "old.zip"),
        ("file_unknown", ".hidden"),
        ("file_unknown", "notes.txt"),
        ("folder_unknown", "photos/x"),
        ("folder_unknown", "thumbs"),
    ]
    assert found.files == {"used": 2, "passed_over": 6}


def test_the_path_that_cannot_be_read_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recognition_7"
    folder.mkdir()

    def refusing(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb"):
        pass
    monkeypatch.setattr(os, "stat", refusing)
    found = inspect_folder(tmp_path, Folder(7, folder.name))
    message = "the file cannot be read: Permission denied"
    assert found.result == Reject(7, "recognition_7/caf\ufffd.jpg", "folder_unreadable", message)
    assert found.notices == []


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "._7_AM.json", "THUMBS.DB", "Desktop.ini", "__MACOSX", ".Trash-1000", "$Recycle.Bin", "@eaDir"],
)
def test_clutter_is_counted_as_a_file_and_as_a_folder(tmp_path: Path, name: str) -> None:
    assert is_clutter(name)
    found = look(tmp_path, *PAIR, name, f"photos/{name}/x_Main.jpg", f"photos/{name}/recognition_8/x_Main.jpg")
    assert used(found) == (*PAIR, None, None)
    assert found.notices == []
    assert found.files == {"used": 2, "clutter": 3}


@pytest.mark.parametrize(
    "name", ["recognition_7", "photos", "DS_Store", "export_1", "Thumbs.db.jpg", "recycle", "a.part"]
)
def test_other_names_are_no_clutter(name: str) -> None:
    assert not is_clutter(name)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("recognition_2043 (1)", "2043"),
        ("recognition_2043 - Copy", "2043"),
        ("recognition-2044", "2044"),
        (" recognition_2045", "2045"),
        ("recognition_2046.bak", "2046"),
        ("recognition_2046_", "2046"),
        ("Копия recognition_2047", "2047"),
        ("recognition2048", "2048"),
        ("recogniton_2049", "2049"),
        ("2050 (2)", "2050"),
        ("2051 - Copy", "2051"),
        ("export_20251024_121255", None),
        ("2025-10-24", None),
        ("notes", None),
    ],
)
def test_names_that_are_nearly_those_of_recognitions(tmp_path: Path, name: str, number: str | None) -> None:
    assert near_recognition(name) == number
    (tmp_path / "export" / name).mkdir(parents=True)
    (tmp_path / "export" / "1").mkdir()
    found = [one for one in list_folders(tmp_path, Counter()) if isinstance(one, Notice)]
    assert [(one.code, one.path) for one in found] == [
        ("folder_name" if number else "folder_unknown", f"export/{name}")
    ]
    assert (number or "holds no recognition") in found[0].message


def test_photos_and_documents_outside_of_recognitions_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "export" / "1").mkdir(parents=True)
    for name in ("recognition_400_Main.jpg", "export/AM.json", "export/1_recognition_correct_dishes.json"):
        (tmp_path / name).write_text("x")
    found = [one for one in list_folders(tmp_path, Counter()) if isinstance(one, Notice)]
    assert {(one.code, one.message) for one in found} == {("file_unknown", "no recognition uses the file")}
    assert len(found) == 3


def test_recognition_folders_in_any_letter_case_are_found(tmp_path: Path) -> None:
    for name in ("Recognition_1", "RECOGNITION_2", "a/reCognition_3"):
        (tmp_path / name).mkdir(parents=True)
    found = [one for one in list_folders(tmp_path, Counter()) if isinstance(one, Folder)]
    assert sorted((one.recognition_id, one.path) for one in found) == [
        (1, "Recognition_1"),
        (2, "RECOGNITION_2"),
        (3, "a/reCognition_3"),
    ]


def test_the_newest_export_has_the_lowest_rank_and_the_source_is_newer(tmp_path: Path) -> None:
    order = ["5", "export_100/5", "Export_20/5", "export_10/5", "export_9/5", "2025-10-09/5", "2025-9-30/5"]
    for name in order:
        (tmp_path / name).mkdir(parents=True)
    found = [one for one in list_folders(tmp_path, Counter()) if isinstance(one, Folder)]
    assert [one.path for one in found] == order
    assert [one.rank for one in found] == sorted({one.rank for one in found})

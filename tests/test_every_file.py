"""Each file below the source is in one class, and what is passed over is named, by a load of real files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.database import Database
from pipeline.dataset.layout import list_folders
from pipeline.dataset.records import Folder
from pipeline.steps.discover import Request, discover
from tests import world
from tests.services import MakeDataset, RunPipeline

MIXED = "36 files below the source: 8 used, 4 not taken, 7 rejected, 7 passed over, 10 clutter"


def below(source: Path) -> int:
    """How many files there are, counted without the product's code; links to folders do not count."""
    return sum(len(names) for _, _, names in os.walk(source))


def tray(own_dataset: MakeDataset, folder: Path, number: int, seed: int = 0) -> Path:
    """Make a recognition of two photos and two documents, and return its folder."""
    made = next(own_dataset(1, seed=seed, first_id=number).glob(f"export_*/recognition_{number}"))
    shutil.copytree(made, folder)
    return folder


def classes(settings: Settings, source: Path, batch_id: str = "b1") -> dict[str, int]:
    """The classes of a batch or look that are not empty; they add up to all files below the source."""
    statement = """
        SELECT coalesce(b.files, l.seen -> 'files')
        FROM ingest.looks l LEFT JOIN ingest.batches b ON b.id = l.batch_id WHERE l.batch_id = %s"""
    ((found,),) = world.query(settings.database_url.reveal(), statement, (batch_id,))
    assert sum(found.values()) == below(source)
    return {name: count for name, count in found.items() if count}


def noticed(settings: Settings, batch_id: str = "b1") -> list[tuple[str, str]]:
    statement = "SELECT code, path FROM ingest.notices WHERE batch_id = %s ORDER BY path, code"
    return [(code, path) for code, path in world.query(settings.database_url.reveal(), statement, (batch_id,))]


def loaded(settings: Settings) -> list[int]:
    return [
        row[0] for row in world.query(settings.database_url.reveal(), "SELECT id FROM public.recognitions ORDER BY 1")
    ]


@pytest.fixture
def mixed(own_dataset: MakeDataset, tmp_path: Path) -> Path:
    """A dataset with files of every class that a first load has."""
    source = tmp_path / "mixed"
    for export, number in (("export_9", 1), ("export_10", 1), ("export_10", 2), ("export_10", 3)):
        tray(own_dataset, source / export / f"recognition_{number}", number, seed=len(export))
    next((source / "export_10/recognition_3").rglob("*_Main.jpg")).unlink()
    hidden = {"recognition_4 (1)": 4, "2025/export_1/recognition_5": 5, "__MACOSX/recognition_6": 6, "#recycle/7": 7}
    for name, number in hidden.items():
        tray(own_dataset, source / "export_10" / name, number)
    clutter = ("export_9/.DS_Store", "export_10/recognition_1/photos/Thumbs.db")
    for name in ("notes.txt", "old.zip", "empty/x/y.txt", *clutter):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    return source


def test_a_load_counts_each_file_once_and_names_what_it_passes_over(
    run_pipeline: RunPipeline, settings: Settings, mixed: Path
) -> None:
    done = run_pipeline("load", "--source", mixed, "--batch-id", "b1")
    assert done.returncode == 0
    assert loaded(settings) == [1, 2]
    assert classes(settings, mixed) == {"used": 8, "not_taken": 4, "rejected": 7, "passed_over": 7, "clutter": 10}
    assert noticed(settings) == [
        ("folder_unknown", "empty"),
        ("folder_nested", "export_10/2025"),
        ("folder_name", "export_10/recognition_4 (1)"),
        ("file_unknown", "notes.txt"),
        ("file_archive", "old.zip"),
    ]
    assert f"Files: {MIXED}." in done.stdout


def test_letters_that_only_resemble_those_of_a_name_are_not_taken_for_them(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "letters"
    folders = {"recognıtıon_5": 5, "RECOGNİTİON_6": 6, "export/recognıtion_7": 7, "export/ｒecognition_8": 8}
    for name, number in {"export/RECOGNITION_1": 1, **folders}.items():
        tray(own_dataset, source / name, number)
    files = ("9_Main.jfıf", "9_correct_diſhes.json", "9_AM.jſon", "9_Main.JFİF")
    for name in files:
        (source / "export/RECOGNITION_1" / name).write_bytes(b"{}")
    (source / "recognition_٩").mkdir()
    checked = run_pipeline("status", "--check", "--source", source)
    assert checked.returncode == 0
    assert "1 usable recognition, " in checked.stdout
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    assert loaded(settings) == [1]
    assert set(noticed(settings)) == {
        *(("folder_name", name) for name in folders if name != "export/ｒecognition_8"),
        *(("folder_unknown", name) for name in ("export/ｒecognition_8", "recognition_٩")),
        *(("file_unknown", f"export/RECOGNITION_1/{name}") for name in files),
    }


def test_summary_dry_run_status_doctor_and_report_show_the_same_numbers(
    run_pipeline: RunPipeline, settings: Settings, mixed: Path, tmp_path: Path
) -> None:
    dry = run_pipeline("load", "--source", mixed, "--dry-run", "--json")
    checked = run_pipeline("status", "--check", "--source", mixed)
    assert MIXED in checked.stdout
    assert MIXED in run_pipeline("load", "--source", mixed, "--dry-run").stdout
    assert MIXED in run_pipeline("load", "--source", mixed, "--batch-id", "b1").stdout
    assert MIXED in run_pipeline("status", "--batch-id", "b1").stdout
    summary = json.loads(run_pipeline("status", "--batch-id", "b1", "--json").stdout)
    assert json.loads(dry.stdout)["files"] == summary["files"]
    assert json.loads(dry.stdout)["notices"] == summary["notices"]
    page = tmp_path / "page.html"
    assert run_pipeline("report", "--batch-id", "b1", "--out", page).returncode == 0
    assert MIXED in page.read_text(encoding="utf-8")
    assert "export_10/recognition_4 (1)" in page.read_text(encoding="utf-8")
    reset = run_pipeline("reset", "--batch-id", "b1", "--confirm")
    assert reset.returncode == 0
    assert MIXED in run_pipeline("status", "--batch-id", "b1").stdout


def test_files_that_another_batch_has_are_unchanged_or_not_taken(
    run_pipeline: RunPipeline, settings: Settings, small_dataset: MakeDataset, database: Database
) -> None:
    dataset = small_dataset(6)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1", "--limit", "2").returncode == 0
    assert classes(settings, dataset) == {"used": 8, "not_taken": 16, "passed_over": 1}
    assert noticed(settings) == [("file_annotations", "qwen_annotations.json")]
    discover(database, Request("b2", str(dataset), settings.bucket, limit=1))
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b3").returncode == 0
    assert classes(settings, dataset, "b3") == {"used": 12, "unchanged": 8, "not_taken": 4, "passed_over": 1}
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b2", "--limit", "1").returncode == 0
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b4").returncode == 0
    assert classes(settings, dataset, "b4") == {"unchanged": 24, "passed_over": 1}
    assert noticed(settings, "b4") == []


def test_files_of_what_an_upload_or_a_copy_rejects_are_rejected(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(6)
    first, second, *_ = sorted(dataset.glob("export_*/recognition_*"))
    photo = next(first.rglob("*_Main.jpg"))
    photo.write_bytes(photo.read_bytes()[:-900])
    (first / "notes.txt").write_text("x")
    next(second.glob("*_correct_dishes.json")).write_text("[")
    third = next(sorted(dataset.glob("export_*/recognition_*"))[2].rglob("*_Main.jpg"))
    third.write_bytes(third.read_bytes() + b"tail")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    assert classes(settings, dataset) == {"used": 16, "rejected": 8, "passed_over": 2}
    name = str(third.relative_to(dataset))
    stray = str((first / "notes.txt").relative_to(dataset))
    assert noticed(settings) == sorted(
        [("file_unknown", stray), ("photo_trailing_bytes", name), ("file_annotations", "qwen_annotations.json")],
        key=lambda one: one[1],
    )


def test_exports_are_in_natural_order_and_a_copy_without_two_photos_hides_none(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for export in ("export_8", "export_9", "export_10", "Export_11"):
        tray(own_dataset, source / export / "recognition_7", 7, seed=int(export[7:]))
    for name in ("export_10", "Export_11"):
        next((source / name).rglob("*_Qualifying.jpg")).unlink()
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    photos = "SELECT photo_paths[1] FROM ingest.manifest"
    ((taken,),) = world.query(settings.database_url.reveal(), photos)
    assert taken.startswith("export_9/recognition_7/")
    assert classes(settings, source) == {"used": 4, "not_taken": 4, "passed_over": 6}
    assert noticed(settings) == [
        ("copy_incomplete", "Export_11/recognition_7"),
        ("copy_incomplete", "export_10/recognition_7"),
    ]
    assert world.query(settings.database_url.reveal(), "SELECT count(*) FROM ingest.rejects") == [(0,)]


def test_of_copies_in_one_folder_the_others_are_named(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for name in ("export_1/recognition_203", "export_1/203", "export_1/recognition_0203", "export_0/203"):
        tray(own_dataset, source / name, 203, seed=len(name))
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    assert classes(settings, source) == {"used": 4, "not_taken": 12}
    assert noticed(settings) == [("copy_beside", "export_1/203"), ("copy_beside", "export_1/recognition_0203")]


def test_of_a_loaded_recognition_the_copy_that_was_loaded_is_unchanged(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for export in ("export_1", "export_2"):
        tray(own_dataset, source / export / "recognition_7", 7)
    next((source / "export_2").rglob("*_Main.jpg")).unlink()
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    tray(own_dataset, source / "export_2" / "recognition_8", 8)
    tray(own_dataset, source / "export_3" / "recognition_7", 7)
    assert run_pipeline("load", "--source", source, "--batch-id", "b2").returncode == 0
    assert classes(settings, source, "b2") == {"used": 4, "unchanged": 4, "not_taken": 7}


def test_of_copies_without_two_photos_the_newest_is_rejected(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for export in ("export_1", "export_2"):
        next(tray(own_dataset, source / export / "recognition_7", 7).rglob("*_Main.jpg")).unlink()
    tray(own_dataset, source / "export_2" / "recognition_8", 8)
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    rejects = world.query(settings.database_url.reveal(), "SELECT code, path FROM ingest.rejects")
    assert rejects == [("photo_count", "export_2/recognition_7")]
    assert classes(settings, source) == {"used": 4, "not_taken": 3, "rejected": 3}
    assert "4 used, 3 not taken, 3 rejected" in run_pipeline("status", "--check", "--source", source).stdout


def test_odd_entries_are_passed_over_and_links_into_the_dataset_are_not_followed(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    whole = tray(own_dataset, source / "export_1" / "recognition_7", 7)
    outside = tray(own_dataset, tmp_path / "outside" / "recognition_8", 8)
    (source / "linked").symlink_to(outside.parent)
    (source / "again").symlink_to(source / "export_1")
    (source / "export_1" / "around").symlink_to(tmp_path)
    (source / "export_1" / "recognition_9").symlink_to(whole)
    (whole / "nowhere").symlink_to(tmp_path / "missing")
    (whole / "itself").symlink_to(whole / "itself")
    (whole / "images").symlink_to(outside)
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(whole / "socket"))
    with open(os.fsencode(source) + b"/caf\xe9.txt", "wb"):
        pass
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    assert loaded(settings) == [7, 8]
    ((found,),) = world.query(settings.database_url.reveal(), "SELECT files FROM ingest.batches")
    assert sum(found.values()) == below(source) + below(outside)
    assert {name: count for name, count in found.items() if count} == {"used": 8, "passed_over": 5}
    prefix = "export_1/recognition_7"
    assert noticed(settings) == sorted(
        [
            ("folder_link", "again"),
            ("folder_link", "export_1/around"),
            ("folder_link", "export_1/recognition_9"),
            ("folder_unknown", f"{prefix}/images"),
            ("file_special", f"{prefix}/itself"),
            ("file_special", f"{prefix}/nowhere"),
            ("file_special", f"{prefix}/socket"),
            ("file_special", "pipe"),
            ("file_unknown", "caf\ufffd.txt"),
        ],
        key=lambda one: one[1],
    )


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("2025/export_1/recognition_7", "2025/export_1/recognition_7 for one: name 2025 with --source"),
        ("year 2025/export_1/recognition_7", "recognition_7 for one: name year 2025 with --source"),
        ("a/b/c/d/recognition_7", "recognition_7 for one: name a/b/c with --source"),
        ("recognition_7 (1)", "recognition_7 (1): the name resembles recognition_7"),
        ("export_1/recognition-7", "export_1/recognition-7: the name resembles recognition_7"),
    ],
)
def test_a_source_whose_recognitions_are_elsewhere_says_where(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path, path: str, told: str
) -> None:
    source = tmp_path / "source"
    tray(own_dataset, source / path, 7)
    done = run_pipeline("load", "--source", source)
    if path.startswith("2025/"):  # the name of a recognition
        assert done.returncode == 6
        ((message,),) = world.query(settings.database_url.reveal(), "SELECT message FROM ingest.notices")
    else:
        assert done.returncode == 2
        message = done.stderr
    assert told in message


def test_a_nested_export_is_named_once_and_its_files_are_passed_over(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for name, number in (("export_1/recognition_7", 7), ("export_1/export_2/recognition_8", 8)):
        tray(own_dataset, source / name, number)
    tray(own_dataset, source / "export_1/recognition_7/recognition_9", 9)
    assert run_pipeline("load", "--source", source, "--batch-id", "b1").returncode == 0
    assert loaded(settings) == [7]
    wanted = [
        ("folder_nested", "export_1/export_2"),
        ("folder_nested", "export_1/recognition_7"),
    ]
    assert noticed(settings) == wanted
    assert classes(settings, source) == {"used": 4, "passed_over": 8}
    # Told once for each source, whether its recognition is new or loaded.
    again = tmp_path / "again"
    source.rename(again)
    assert run_pipeline("load", "--source", again, "--batch-id", "b2").returncode == 0
    assert noticed(settings, "b2") == wanted


def test_a_loaded_recognition_whose_folder_vanished_stays_and_is_named_once(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(3)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    gone = min(dataset.glob("export_*/recognition_*"))
    shutil.rmtree(gone)
    for batch_id, expected in (("b2", ["folder_vanished"]), ("b3", [])):
        assert run_pipeline("load", "--source", dataset, "--batch-id", batch_id).returncode == 0
        found = noticed(settings, batch_id)
        assert [code for code, path in found if path == f"{gone.parent.name}/{gone.name}"] == expected
    assert len(loaded(settings)) == 3


def test_strict_regards_rejects_and_no_notices(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(2)
    (dataset / "recognition_9 - Copy").mkdir()
    assert run_pipeline("load", "--source", dataset, "--strict").returncode == 0
    (dataset / "recognition_9").mkdir()
    refused = run_pipeline("load", "--source", dataset, "--strict", "--force")
    assert refused.returncode == 4
    assert "1 input is not usable" in refused.stderr


def test_an_export_that_cannot_be_read_is_one_reject(
    run_pipeline: RunPipeline, settings: Settings, own_dataset: MakeDataset
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    dataset = own_dataset(2)
    closed = dataset / "export_closed"
    closed.mkdir(mode=0)
    try:
        assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    finally:
        closed.chmod(0o755)
    rejects = world.query(settings.database_url.reveal(), "SELECT code, path FROM ingest.rejects")
    assert rejects == [("folder_unreadable", "export_closed")]
    assert len(loaded(settings)) == 2


def test_folders_that_cannot_be_read_are_named_in_every_class(
    run_pipeline: RunPipeline,
    settings: Settings,
    own_dataset: MakeDataset,
    tmp_path: Path,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "source"
    for export, number in (("export_2", 1), ("export_2", 2), ("export_1", 2), ("export_2", 3), ("export_2", 4)):
        (tray(own_dataset, source / export / f"recognition_{number}", number) / "deep").mkdir()
    assert run_pipeline("load", "--source", source, "--batch-id", "b1", "--limit", "1").returncode == 0
    shutil.rmtree(source / "export_2/recognition_4/photos")
    scandir = os.scandir

    def refusing(path: str | Path) -> object:
        if str(path).endswith(("/deep", "export_1/recognition_2", "export_2/recognition_1/photos")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    discover(database, Request("b2", str(source), settings.bucket))
    assert noticed(settings, "b2") == [
        ("folder_unknown", "export_1/recognition_2"),  # an older copy
        ("folder_unknown", "export_2/recognition_1/deep"),  # loaded
        ("folder_unknown", "export_2/recognition_1/photos"),
        ("folder_unknown", "export_2/recognition_2/deep"),
        ("folder_unknown", "export_2/recognition_3/deep"),
        ("folder_unknown", "export_2/recognition_4/deep"),  # rejected
    ]
    rejects = world.query(settings.database_url.reveal(), "SELECT code, path FROM ingest.rejects")
    assert rejects == [("photo_count", "export_2/recognition_4")]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("export", "export2"),
        ("ds", "ds10"),
        ("export_9", "export_10"),
        ("2025 a", "march"),
        ("a1b", "a1b2"),
        ("A", "a"),
    ],
)
def test_exports_of_any_two_names_have_an_order(tmp_path: Path, earlier: str, later: str) -> None:
    for name in (earlier, later):
        (tmp_path / name / "recognition_7").mkdir(parents=True, exist_ok=True)
    found = [one for one in list_folders(tmp_path, Counter()) if isinstance(one, Folder)]
    assert [one.path for one in sorted(found, key=lambda one: one.rank)] == [
        f"{later}/recognition_7",
        f"{earlier}/recognition_7",
    ]

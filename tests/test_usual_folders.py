"""usual.py: a folder that has only what an export writes is read as the rules for any folder read it."""

from __future__ import annotations

import os
import tempfile
from datetime import date
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.dataset import recognition
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES
from pipeline.dataset.recognition import inspect_folder
from pipeline.dataset.records import Folder, Inspected, Recognition
from pipeline.dataset.usual import find_usual
from tests.services import MakeDataset

NUMBERS = (0, 1, 7, 11, 2025, 202510, 20251011, 20251332, 20251011120000, 2**63 - 1)
DAYS = ("2025-10-11", "2000-01-01", "0999-12-31", "2025-13-01", "2025-02-30", "0000-01-01", "2025-1-1", "20251011")
LARGEST = (MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES)
SIZES = (0, 1, 120_000, *LARGEST, *(size + 1 for size in LARGEST))


def names(number: int, day: str) -> list[str]:
    stem = f"recognition_{number}_{day}"
    documents = [f"{number}_recognition_{day}_AM.json", f"{number}_recognition_{day}_correct_dishes.json"]
    return [f"photos/{stem}_Main.jpg", f"photos/{stem}_Qualifying.jpg", *documents]


def both(source: Path, folder: Folder) -> tuple[Recognition | None, Inspected]:
    """Return what is found in a usual folder, and what the rules for any folder find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognition, "find_usual", lambda *_: None)
        by_rules = inspect_folder(source, folder)
    return find_usual(source, folder), by_rules


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("documents", [0, 1, 2])
@pytest.mark.parametrize("number", NUMBERS)
def test_what_an_export_writes_is_usual(tmp_path: Path, number: int, documents: int) -> None:
    folder = tmp_path / "export_1" / f"recognition_{number}"
    for name in names(number, "2025-10-12")[: 2 + documents]:
        write(folder / name, 9)
    usual, by_rules = both(tmp_path, Folder(number, f"export_1/{folder.name}"))
    assert usual is not None
    assert usual.captured_on == date(2025, 10, 12)
    assert inspect_folder(tmp_path, Folder(number, f"export_1/{folder.name}")) == by_rules
    assert by_rules.result == usual


def test_the_folders_of_a_dataset_are_usual(small_dataset: MakeDataset) -> None:
    dataset = small_dataset(6)
    paths = [path.relative_to(dataset) for path in dataset.glob("*/recognition_*")]
    assert len(paths) == 6
    for path in paths:
        number = int(path.name.removeprefix("recognition_"))
        assert find_usual(dataset, Folder(number, str(path))) is not None


@st.composite
def folders(draw: st.DrawFn) -> tuple[int, str, dict[str, int | str]]:
    """Draw a number, the name of its folder, and the sizes of its files, or what is in a file's place."""
    number, day = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(DAYS))
    usual = names(number, day)
    others = names(draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(DAYS)))
    odd = [name.replace("photos/", "") for name in usual[:2]] + [name.upper() for name in usual]
    odd += ["photos/.DS_Store", "Thumbs.db", "notes.txt", "photos/x.png", f"photos/{day}/{number}_Main.jpg", "PHOTOS/x"]
    odd += [f"photos/photos/{usual[0]}", f"recognition_{number}/{usual[0]}", f"photos/{number}_Main.jpg", ".hidden/x"]
    chosen = set(usual) - draw(st.sets(st.sampled_from(usual), max_size=2))
    chosen |= draw(st.sets(st.sampled_from(others + odd), max_size=draw(st.sampled_from((0, 0, 1, 3)))))
    odd_kinds: list[int | str] = [*SIZES, "folder", "link", "dangling", "link to a folder"]
    kinds = st.sampled_from([9] * 3 * len(odd_kinds) + odd_kinds)
    named = draw(st.sampled_from((f"recognition_{number}", f"RECOGNITION_0{number}", str(number))))
    return number, named, {name: draw(kinds) for name in sorted(chosen)}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(folders())
@example((7, "recognition_7", dict.fromkeys(names(7, "2025-10-11"), "link")))
@example((20251011, "20251011", dict.fromkeys(names(20251011, "0999-12-31"), 9)))
def test_a_usual_folder_is_read_as_the_rules_read_it(drawn: tuple[int, str, dict[str, int | str]]) -> None:
    number, named, files = drawn
    with tempfile.TemporaryDirectory() as place:
        source, elsewhere = Path(place, "source"), Path(place, "elsewhere")
        write(elsewhere / "file", 9)
        (source / named).mkdir(parents=True)
        for name, kind in files.items():
            path = source / named / name
            if any(above.exists() and not above.is_dir() for above in path.parents) or os.path.lexists(path):
                continue  # another name of the draw is a file where this one has a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(kind, int):
                write(path, kind)
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to(elsewhere / {"link": "file", "dangling": "none"}.get(kind, ""))
        usual, by_rules = both(source, Folder(number, named))
        if usual is not None:
            assert by_rules == Inspected(usual, [], by_rules.files)
        assert inspect_folder(source, Folder(number, named)) == by_rules


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_link_in_place_of_the_folder_of_photos_is_for_the_rules(tmp_path: Path, is_inside: bool) -> None:
    source = tmp_path / "source"
    elsewhere = (source if is_inside else tmp_path) / "elsewhere"
    for name in names(7, "2025-10-11"):
        path = Path(name)
        write((elsewhere if path.parent.name else source / "7") / path.name, 9)
    (source / "7" / "photos").symlink_to(elsewhere)
    usual, by_rules = both(source, Folder(7, "7"))
    assert usual is None
    assert isinstance(by_rules.result, Recognition) is not is_inside

"""Where the annotations file is looked for, and which names are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config import load_settings
from pipeline.dataset.annotations import ANNOTATIONS, find_annotations
from pipeline.dataset.layout import find_source, usual_sources
from pipeline.errors import SettingsError, UsageError

# Where the file is


@pytest.fixture
def places(clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The usual places, all there and empty, in their order; the first two are folders of a dataset."""
    home = Path(os.environ["HOME"])
    here = tmp_path / "here"
    found = {
        "setting": tmp_path / "named",
        "dataset": here / "RRS_Dataset 2",
        ".": here,
        "Downloads": home / "Downloads",
        "home": home,
    }
    for folder in found.values():
        folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    return found


def test_the_usual_places_are_looked_at_in_their_order(places: dict[str, Path]) -> None:
    names = ["dataset", ".", "Downloads", "home"]
    for name in names:
        (places[name] / ANNOTATIONS).touch()
    for name in names:
        found = find_annotations(None, None, None)
        assert found == (places[name] / ANNOTATIONS).resolve()
        assert found.is_absolute()
        found.unlink()
    with pytest.raises(UsageError, match=r"none was found.*qwen_annotations\.json.*~/Downloads") as caught:
        find_annotations(None, None, None)
    assert "--file" in caught.value.hint
    assert "QWEN_ANNOTATIONS" in caught.value.hint


def test_the_folder_of_the_dataset_comes_before_the_usual_ones(places: dict[str, Path]) -> None:
    for folder in places.values():
        (folder / ANNOTATIONS).touch()
    assert find_annotations(None, None, str(places["setting"])) == (places["setting"] / ANNOTATIONS).resolve()
    (places["setting"] / ANNOTATIONS).unlink()
    assert find_annotations(None, None, str(places["setting"])) == (places["."] / ANNOTATIONS).resolve()


def test_a_name_comes_before_the_setting_and_both_before_every_place(places: dict[str, Path], tmp_path: Path) -> None:
    for folder in places.values():
        (folder / ANNOTATIONS).touch()
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.touch()
    second.touch()
    assert find_annotations(str(first), str(second), str(places["setting"])) == first.resolve()
    assert find_annotations(None, str(second), str(places["setting"])) == second.resolve()
    assert find_annotations("", str(second), None) == second.resolve()


@pytest.mark.parametrize("missing", ["given", "setting"])
def test_a_named_file_that_is_not_there_is_not_looked_for_elsewhere(missing: str, places: dict[str, Path]) -> None:
    (places["."] / ANNOTATIONS).touch()
    given, setting = ("gone.json", None) if missing == "given" else (None, "gone.json")
    with pytest.raises(UsageError, match=r"gone\.json does not exist"):
        find_annotations(given, setting, None)


def test_a_folder_of_that_name_is_not_the_file(places: dict[str, Path]) -> None:
    (places["dataset"] / ANNOTATIONS).mkdir()
    (places["."] / ANNOTATIONS).symlink_to("nowhere")
    (places["Downloads"] / ANNOTATIONS).symlink_to(ANNOTATIONS)
    (places["home"] / ANNOTATIONS).touch()
    assert find_annotations(None, None, None) == (places["home"] / ANNOTATIONS).resolve()


@pytest.mark.parametrize("dataset", ["~nobody-of-that-name/x", "x" * 5000, "a\0b", "a\udcffb", "nowhere"])
def test_a_setting_of_the_dataset_that_is_no_path_does_not_hide_the_other_places(
    dataset: str, places: dict[str, Path]
) -> None:
    (places["home"] / ANNOTATIONS).touch()
    assert find_annotations(None, None, dataset) == (places["home"] / ANNOTATIONS).resolve()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_place_without_permission_does_not_hide_the_others(places: dict[str, Path]) -> None:
    (places["home"] / ANNOTATIONS).touch()
    places["Downloads"].chmod(0)
    try:
        assert find_annotations(None, None, None) == (places["home"] / ANNOTATIONS).resolve()
    finally:
        places["Downloads"].chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_home_without_permission_has_no_dataset_and_no_settings(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places["home"].chmod(0)
    try:
        assert list(usual_sources()) == [Path("RRS_Dataset 2")]
        with pytest.raises(SettingsError, match="There is neither"):
            load_settings(environ={"PIPELINE_HOME": str(places["setting"])}, directory=places["home"])
        monkeypatch.chdir(places["setting"])
        with pytest.raises(UsageError, match="No dataset was named"):
            find_source(None, None)
    finally:
        places["home"].chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.touch(mode=0)
    with pytest.raises(UsageError, match=r"a\.json cannot be accessed: Permission denied"):
        find_annotations(str(file), None, None)


def test_a_link_and_a_tilde_and_a_relative_name_are_resolved(places: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "файл 1.json"
    file.touch()
    (places["."] / "link").symlink_to(file)
    (places["home"] / "link").symlink_to(file)
    for name in ("link", "./link", "~/link", str(file), f"../{file.name}"):
        assert find_annotations(name, None, None) == file.resolve()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "/",
        "nowhere.json",
        "~nobody-of-that-name/x",
        "x" * 5000,
        "a\0b",
        f"a{chr(0xDCFF)}b",
        f"a{chr(0xD800)}b",
    ],
    ids=["nothing", "here", "root", "nowhere", "an unknown user", "too long", "NUL", "not UTF-8", "half a pair"],
)
def test_a_name_that_is_no_file(name: str, places: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="annotations file") as caught:
        find_annotations(name, None, None)
    assert "--file" in caught.value.hint
    caught.value.message.encode()
    assert len(caught.value.message) < 400


def test_a_file_whose_name_is_not_utf8_is_refused_for_it_cannot_be_recorded(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.json"
    try:
        with open(path, "wb"):
            pass
    except OSError:
        pytest.skip("the file system takes no such name")
    (tmp_path / "link").symlink_to(os.fsdecode(path))
    for name in (os.fsdecode(path), str(tmp_path / "link")):
        with pytest.raises(UsageError, match=r"annotations file, .*/\ufffd\.json, is not UTF-8"):
            find_annotations(name, None, None)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR)  # else whoever opens it waits for a writer
    try:
        with pytest.raises(UsageError, match="annotations file"):
            find_annotations(str(pipe), None, None)
    finally:
        os.close(descriptor)

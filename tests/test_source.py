"""When a file is lost, and when the dataset is: what may be rejected for want of a file."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from pipeline.dataset.records import Reject
from pipeline.errors import SourceUnavailable
from pipeline.steps.source import require_source

PHOTO = "export_1/recognition_7/photos/7_Main.jpg"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dataset of two recognitions; the first one's photo is lost."""
    for number in (7, 8):
        (tmp_path / f"export_1/recognition_{number}/photos").mkdir(parents=True)
        (tmp_path / f"export_1/recognition_{number}/photos/{number}_Main.jpg").write_bytes(b"photo")
    (tmp_path / PHOTO).unlink()
    return tmp_path


def lost(code: str = "photo_vanished", path: str = PHOTO) -> list[Reject]:
    return [Reject(7, path, code, "a sentence")]


def test_a_file_that_is_lost_while_all_around_it_is_there_is_a_reject(source: Path) -> None:
    require_source(source, lost())
    shutil.rmtree(source / "export_1/recognition_7")
    require_source(source, lost())
    require_source(source, lost("folder_unreadable", "export_1/recognition_7"))


def test_where_the_source_or_an_export_is_gone_or_empty_nothing_is_rejected(source: Path) -> None:
    export = source / "export_1"
    for folder, path in ((export, PHOTO), (source, "recognition_7/photos/7_Main.jpg")):
        shutil.rmtree(folder)
        with pytest.raises(SourceUnavailable, match=f"{folder} is gone, or has no recognition in it"):
            require_source(source, lost(path=path))
        folder.mkdir(parents=True)
        (folder / "lost+found").mkdir()
        with pytest.raises(SourceUnavailable, match=f"{folder} is gone, or has no recognition in it"):
            require_source(source, lost("json_unreadable", path))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_export_that_cannot_be_listed_is_not_called_gone(
    number: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceUnavailable, match=f"{source / 'export_1'} cannot be read: {os.strerror(number)}"):
        require_source(source, lost())


@pytest.mark.parametrize("code", ["photo_unreadable", "json_unreadable", "folder_unreadable"])
def test_a_limit_of_the_machine_rejects_no_file(code: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    path = PHOTO.replace("7", "8") if code != "folder_unreadable" else "export_1/recognition_8"
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(SourceUnavailable, match="Too many open files") as caught:
        require_source(source, lost(code, path))
    assert "ulimit -n" in caught.value.hint


def test_a_file_that_can_be_read_again_was_away_for_a_moment(source: Path) -> None:
    (source / PHOTO).write_bytes(b"photo")
    with pytest.raises(SourceUnavailable, match="was temporarily unavailable"):
        require_source(source, lost("photo_unreadable"))
    with pytest.raises(SourceUnavailable, match="was temporarily unavailable") as caught:
        require_source(source, rejects := lost("folder_unreadable", "export_1/recognition_7"))
    assert caught.value.message.endswith(f": {rejects[0].message}.")
    require_source(source, lost("photo_changed"))


@pytest.mark.parametrize("code", ["photo_vanished", "photo_changed", "json_unreadable"])
def test_a_host_that_only_helps_says_of_no_file_that_it_is_lost(code: str, source: Path) -> None:
    with pytest.raises(SourceUnavailable, match="is not the file that discovery saw"):
        require_source(source, lost(code), may_reject=False)


def test_what_is_wrong_in_a_file_itself_any_host_may_say(source: Path) -> None:
    require_source(source / "nowhere", lost("photo_truncated"), may_reject=False)

"""Find a recognition in a folder that has only what an export writes, without the rules for any content."""

from __future__ import annotations

import os
import re
import stat
from datetime import date
from pathlib import Path

from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES, modified
from pipeline.dataset.records import File, Folder, Recognition

_PHOTOS = "photos"
_MAIN = re.compile(r"recognition_([0-9]+)_((?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2})_Main\.jpg")


def find_usual(source: Path, folder: Folder) -> Recognition | None:
    """Return the recognition of a folder in which each file is usable and named as an export names it.

    It is the one that `inspect_folder` finds by its rules, in a third of the time. The result is None where those may
    find another, or a reason to reject it.
    """
    number, directory = folder.recognition_id, f"{source}/{folder.path}"
    try:
        with os.scandir(directory) as entries:
            own = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        if not own.pop(_PHOTOS, False):
            return None
        names = sorted(os.listdir(f"{directory}/{_PHOTOS}"))
        main = _MAIN.fullmatch(names[0]) if names else None
        if main is None or main[1] != str(number):
            return None
        day = main[2]
        menu, receipt = f"{number}_recognition_{day}_AM.json", f"{number}_recognition_{day}_correct_dishes.json"
        if names[1:] != [f"recognition_{number}_{day}_Qualifying.jpg"] or not own.keys() <= {menu, receipt}:
            return None
        photos = [_file(source, f"{folder.path}/{_PHOTOS}/{name}", MAXIMUM_PHOTO_BYTES) for name in names]
        documents = [
            _file(source, f"{folder.path}/{name}", MAXIMUM_DOCUMENT_BYTES) if name in own else None
            for name in (menu, receipt)
        ]
        return Recognition(number, (photos[0], photos[1]), documents[0], documents[1], date.fromisoformat(day))
    except (OSError, ValueError):  # the rules say what is wrong with a file, and there is no such day
        return None


def _file(source: Path, path: str, maximum: int) -> File:
    """Return a regular file, or one that a link leads to; raises ValueError for another, or one of another size."""
    facts = os.stat(f"{source}/{path}")
    if not (stat.S_ISREG(facts.st_mode) and 0 < facts.st_size <= maximum):
        raise ValueError
    return File(path, facts.st_size, modified(facts))

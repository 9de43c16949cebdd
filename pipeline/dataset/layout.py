"""Find the dataset, and the folders of its recognitions by their names.

<source>/[<export>/]recognition_<digits>/[photos/]*Main*.jpg, *Qualifying*.jpg, *AM.json, *correct_dishes.json
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.dataset.clutter import is_clutter
from pipeline.dataset.names import FOLDER, near_recognition
from pipeline.dataset.passed import as_text, count_below, is_folder, is_searched, pass_file, pass_folder
from pipeline.dataset.records import CLUTTER, MAXIMUM_BIGINT, REJECTED, Folder, Notice, Reject, is_text
from pipeline.errors import UsageError

MAXIMUM_PHOTO_BYTES = 32 << 20
MAXIMUM_DOCUMENT_BYTES = 3 << 20

_DIGITS = re.compile(r"([0-9]+)")


def find_source(given: str | None, setting: str | None) -> Path:
    """Return the absolute path of the dataset's folder: `given`, else the setting, else the first in default places.

    Raises what `find_input` raises.
    """
    name = given or setting or next(map(str, usual_sources()), None)
    places = "./dataset, ./RRS_Dataset*, ~/Downloads/RRS_Dataset* and ~/RRS_Dataset*"
    return find_input("dataset", "folder", name, places, "Name its folder with --source or DATASET_DIR.")


def find_input(what: str, kind: str, name: str | None, places: str, hint: str) -> Path:
    """Return the absolute path of the folder or file with a name, which was looked for in `places` if there is none.

    Raises UsageError if there is none, its path is not UTF-8, or it does not exist, is of another kind, or cannot be
    read.
    """
    if not name:
        raise UsageError(f"No {what} was named and none was found: looked for {places}.", hint)
    try:
        path = Path(name).expanduser().resolve()
        for text in (name, str(path)):  # a link may lead to such a path
            if not is_text(text):
                message = f"The path of the {what}, {as_text(text)[:200]}, is not UTF-8."
                raise UsageError(message, f"Rename it. {hint}")
        if kind == "folder" and path.is_dir():
            return path
        if kind == "file" and path.is_file():
            with open(path, "rb"):
                return path
        problem = f"is not a {kind}" if path.exists() else "does not exist"
    except (OSError, RuntimeError, ValueError) as exc:
        why = (isinstance(exc, OSError) and exc.strerror) or str(exc).rstrip(".")
        raise UsageError(f"The {what} {as_text(name)[:200]} cannot be accessed: {why}.", hint) from exc
    raise UsageError(f"The {what} {path} {problem}.", hint)


def usual_sources() -> Iterator[Path]:
    """Yield the existing folders in the default places, in order."""
    home = Path(os.path.expanduser("~"))  # `Path.home()` raises an error for a user without one
    places = ((Path(), "dataset"), (Path(), "RRS_Dataset*"), (home / "Downloads", "RRS_Dataset*"))
    for folder, pattern in (*places, (home, "RRS_Dataset*")):
        # These functions of the standard library find nothing where a folder may not be searched; Path's raise.
        yield from filter(os.path.isdir, (folder / name for name in sorted(glob.glob(pattern, root_dir=folder))))


def list_folders(source: Path, files: Counter[str]) -> Iterator[Folder | Reject | Notice]:
    """Yield the folders of recognitions, the newest export first, and what is rejected or passed over by its name.

    Exports are in natural order, and the source itself is newer than all. Add to `files` the number of files that are
    clutter, rejected or passed over. Raises UsageError if the source cannot be read.
    """
    exports: list[str] = []
    try:
        yield from _level(source, "", 0, files, exports)
    except OSError as exc:
        message = f"The folder {source} cannot be read: {exc.strerror}."
        raise UsageError(message, "Check its owner and mode, then run again.") from exc
    for rank, export in enumerate(sorted(exports, key=_natural, reverse=True), 1):
        try:
            if holds_recognitions(source / export, near_recognition):
                yield from _level(source, export, rank, files)
            else:
                yield pass_folder(source, export, files)
        except OSError as exc:
            yield Reject(None, as_text(export), "folder_unreadable", f"the folder cannot be read: {exc.strerror}")


def _level(
    source: Path, folder: str, rank: int, files: Counter[str], exports: list[str] | None = None
) -> Iterator[Folder | Reject | Notice]:
    """Yield what is in the source, and add its exports to the list; or yield what is in an export, without a list."""
    with os.scandir(source / folder) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_clutter(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    files.update(count_below(source, path, CLUTTER).files)
                else:
                    files[CLUTTER] += not is_folder(entry)
            elif not is_folder(entry):
                yield pass_file(entry, path, files)
            elif entry.is_symlink() and is_searched(source, entry):
                yield Notice(None, as_text(path), "folder_link", "the link leads to a folder that is searched anyway")
            elif match := FOLDER.fullmatch(entry.name):
                found = _folder(path, match[1], rank)
                if isinstance(found, Reject):
                    files.update(count_below(source, path, REJECTED).files)
                yield found
            elif exports is None or entry.name.startswith("."):
                yield pass_folder(source, path, files)
            else:
                exports.append(entry.name)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Return the key of the natural order, in which export_10 follows export_9 and Export_9."""
    parts = _DIGITS.split(name.casefold())  # of which every second one is a number
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def holder_of(path: str) -> str:
    """Return the export of a path relative to the source, empty if its recognition is in the source itself."""
    first, _, rest = path.partition("/")
    return first if rest and not FOLDER.fullmatch(first) else ""


def holds_recognitions(directory: Path, is_one: Callable[[str], object] = FOLDER.fullmatch) -> bool:
    """Return whether a folder contains recognitions, by their names; raises OSError if it cannot be listed."""
    with os.scandir(directory) as entries:
        return any(is_one(entry.name) and is_folder(entry) for entry in entries)


def _folder(path: str, digits: str, rank: int) -> Folder | Reject:
    if not is_text(path):
        return Reject(None, as_text(path), "path_encoding", "the folder's name is not UTF-8")
    number = int(digits)  # which accepts up to 4,300 digits; a file name has at most 255
    if number > MAXIMUM_BIGINT:
        return Reject(None, path, "id_invalid", f"the number {digits} is too large for a bigint")
    return Folder(number, path, rank)


def modified(facts: os.stat_result) -> int:
    """Return the modification time in ns since 1970, clamped to a bigint."""
    return max(-MAXIMUM_BIGINT, min(MAXIMUM_BIGINT, facts.st_mtime_ns))

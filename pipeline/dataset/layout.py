"""Find the recognitions of a dataset by the names and sizes of its folders and files.

<source>/[<export>/]recognition_<digits>/[photos/]*Main*.jpg, *Qualifying*.jpg, *AM.json, *correct_dishes.json
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.dataset.dates import captured_on
from pipeline.dataset.records import MAXIMUM_BIGINT, File, Folder, Recognition, Reject, is_text
from pipeline.errors import UsageError

MAXIMUM_PHOTO_BYTES = 32 << 20
MAXIMUM_DOCUMENT_BYTES = 3 << 20

_FOLDER = re.compile(r"(?:recognition_)?([0-9]+)")
_MENU = re.compile(r"(?:.*_)?AM\.json", re.IGNORECASE)
_RECEIPT = re.compile(r"(?:.*_)?(?:correct_dishes|CD)\.json", re.IGNORECASE)
#: A byte that is not UTF-8, as Python decodes it in a path.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def find_source(given: str | None, setting: str | None) -> Path:
    """Return the absolute path of the dataset's folder: `given`, else the setting, else the first in default places.

    Raises UsageError if there is none, or the one named does not exist, is not a folder, or cannot be read.
    """
    hint = "Name its folder with --source or DATASET_DIR."
    name = given or setting or next(map(str, usual_sources()), None)
    if name is None:
        places = "./dataset, ./RRS_Dataset*, ~/Downloads/RRS_Dataset* and ~/RRS_Dataset*"
        raise UsageError(f"No dataset was named and none was found: looked for {places}.", hint)
    with accessing("dataset", name, hint) as path:
        if path.is_dir():
            return path
        problem = "is not a folder" if path.exists() else "does not exist"
    raise UsageError(f"The dataset {path} {problem}.", hint)


@contextmanager
def accessing(what: str, name: str, hint: str) -> Iterator[Path]:
    """Yield the absolute path; raise UsageError if it is not UTF-8, or if it or the block fails to access it."""
    try:
        path = Path(name).expanduser().resolve()
        for text in (name, str(path)):  # a link may lead to such a path
            if not is_text(text):
                message = f"The path of the {what}, {_as_text(text)[:200]}, is not UTF-8."
                raise UsageError(message, f"Rename it. {hint}")
        yield path
    except (OSError, RuntimeError, ValueError) as exc:
        why = (isinstance(exc, OSError) and exc.strerror) or str(exc).rstrip(".")
        raise UsageError(f"The {what} {_as_text(name)[:200]} cannot be accessed: {why}.", hint) from exc


def usual_sources() -> Iterator[Path]:
    """Yield the existing folders in the default places, in order."""
    home = Path.home()
    places = ((Path(), "dataset"), (Path(), "RRS_Dataset*"), (home / "Downloads", "RRS_Dataset*"))
    for folder, pattern in (*places, (home, "RRS_Dataset*")):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_dir())


def list_folders(source: Path) -> Iterator[Folder | Reject]:
    """Yield the folders of recognitions, unsorted; raise UsageError if the source or an export cannot be read."""
    exports = []
    for name in _folders(source):
        if _FOLDER.fullmatch(name):
            yield _folder(name)
        elif not name.startswith(".") and name != "lost+found":  # of the file system; only root can read it
            exports.append(name)
    for export in sorted(exports):
        for name in filter(_FOLDER.fullmatch, _folders(source / export)):
            yield _folder(f"{export}/{name}")


def _folders(directory: Path) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                # Only isdir() returns False for a link to itself.
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry)):
                    yield entry.name
    except OSError as exc:
        message = f"The folder {directory} cannot be read: {exc.strerror}."
        raise UsageError(message, "Check its owner and mode, then run again.") from exc


def holder_of(path: str) -> str:
    """Return the export of a path relative to the source, empty if its recognition is in the source itself."""
    first, _, rest = path.partition("/")
    return first if rest and not _FOLDER.fullmatch(first) else ""


def holds_recognitions(directory: Path) -> bool:
    """Return whether a folder can be listed and contains recognitions."""
    try:
        return any(_FOLDER.fullmatch(name) for name in _folders(directory))
    except UsageError:
        return False


def _folder(path: str) -> Folder | Reject:
    if not is_text(path):
        return Reject(None, _as_text(path), "path_encoding", "the folder's name is not UTF-8")
    digits = path.rsplit("/", 1)[-1].removeprefix("recognition_")
    number = int(digits)  # which accepts up to 4,300 digits; a file name has at most 255
    if number > MAXIMUM_BIGINT:
        return Reject(None, path, "id_invalid", f"the number {digits} is too large for a bigint")
    return Folder(number, path)


def _as_text(path: str) -> str:
    return _SURROGATE.sub("\ufffd", path)


def inspect_folder(source: Path, folder: Folder) -> Recognition | Reject:
    """Return a recognition by the names and sizes of its files, or the reason to reject it; open no file."""

    def reject(code: str, message: str, path: str = folder.path) -> Reject:
        return Reject(folder.recognition_id, path, code, message)

    try:
        files, folders = _list(source, folder.path)
        below = _list(source, f"{folder.path}/photos")[0] if "photos" in folders else []
    except OSError as exc:
        return reject("folder_unreadable", f"the folder cannot be read: {exc.strerror}")
    for file in (*files, *below):
        if not is_text(file.path):
            return reject("path_encoding", f"the name of {_as_text(file.path)} is not UTF-8")

    photos = [file for file in (*files, *below) if file.path.lower().endswith((".jpg", ".jpeg"))]
    if len(photos) != 2:
        return reject("photo_count", f"{len(photos)} photos instead of two")
    cameras = {camera_of(photo.path): photo for photo in photos}
    if set(cameras) != {1, 2}:
        return reject("photo_cameras", "the photos are not one Main and one Qualifying")
    for photo in sorted(photos, key=lambda file: file.path):
        if photo.size == 0:
            return reject("photo_empty", "the file is empty", photo.path)
        if photo.size > MAXIMUM_PHOTO_BYTES:
            return reject("photo_too_large", f"the file has {photo.size} bytes", photo.path)

    menu, receipt = _last(files, _MENU), _last(files, _RECEIPT)
    for document in (menu, receipt):
        if document is not None and document.size > MAXIMUM_DOCUMENT_BYTES:
            return reject("json_too_large", f"the file has {document.size} bytes", document.path)
    day = captured_on(cameras[1].path, folder.recognition_id)
    return Recognition(folder.recognition_id, (cameras[1], cameras[2]), menu, receipt, day)


def modified(facts: os.stat_result) -> int:
    """Return the modification time in ns since 1970, clamped to a bigint."""
    return max(-MAXIMUM_BIGINT, min(MAXIMUM_BIGINT, facts.st_mtime_ns))


def _list(source: Path, folder: str) -> tuple[list[File], set[str]]:
    """Return the files and the folder names in a folder, without hidden ones."""
    files, folders = [], set()
    with os.scandir(source / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            with suppress(FileNotFoundError):  # a dangling link, or a deleted file
                facts = entry.stat()
                if stat.S_ISREG(facts.st_mode):
                    files.append(File(f"{folder}/{entry.name}", facts.st_size, modified(facts)))
                elif stat.S_ISDIR(facts.st_mode):
                    folders.add(entry.name)
    return files, folders


def camera_of(path: str) -> int | None:
    """Return the camera in a photo's name, 1 for Main and 2 for Qualifying; None if it names neither or both."""
    name = path.rsplit("/", 1)[-1].lower()
    cameras = [camera for camera, word in enumerate(("main", "qualifying"), 1) if word in name]
    return cameras[0] if len(cameras) == 1 else None


def _last(files: list[File], pattern: re.Pattern[str]) -> File | None:
    """Return the matching file that sorts last; of several exports, the last one is used as well."""
    named = [file for file in files if pattern.fullmatch(file.path.rsplit("/", 1)[-1])]
    return max(named, key=lambda file: file.path, default=None)

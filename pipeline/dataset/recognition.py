"""Find the photos and documents of a recognition by the names and sizes of its files; open none."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from pipeline.dataset.dates import captured_on
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES, modified
from pipeline.dataset.names import MENU, RECEIPT, camera_of, describe, is_copy, is_photo, last, other_recognition
from pipeline.dataset.passed import SPECIAL, Below, as_text, count_below, uncounted
from pipeline.dataset.records import (
    CLUTTER,
    NOT_TAKEN,
    PASSED_OVER,
    REJECTED,
    USED,
    Deviation,
    File,
    Folder,
    Inspected,
    Notice,
    Recognition,
    Reject,
    is_text,
)
from pipeline.dataset.usual import find_usual
from pipeline.units import counted

#: Names that the message of a reject lists.
_SHOWN = 6


def inspect_copies(source: Path, recognition_id: int, paths: Sequence[str]) -> Inspected:
    """Inspect the folders of a recognition, newest first, until one has two photos; the newest one if none has."""
    looked: list[Inspected] = []
    for path in paths:
        found = inspect_folder(source, Folder(recognition_id, path))
        looked.append(found)
        if not is_incomplete(found):
            break
    else:
        del looked[1:]
    *incomplete, chosen = looked
    taken = paths[len(incomplete)]
    for number, path in enumerate(path for path in paths if path != taken):
        below = count_below(source, path, PASSED_OVER if number < len(incomplete) else NOT_TAKEN)
        chosen.files.update(below.files)
        chosen.notices.extend(uncounted(recognition_id, path, below))
        if number < len(incomplete) and isinstance(newer := looked[number].result, Reject):
            message = f"{newer.message}; the copy {taken} takes its place"
            chosen.notices.append(Notice(recognition_id, path, "copy_incomplete", message))
        elif path.rpartition("/")[0] == taken.rpartition("/")[0]:
            message = f"the same folder has {taken} as well, which takes its place"
            chosen.notices.append(Notice(recognition_id, path, "copy_beside", message))
    return chosen


def is_incomplete(found: Inspected) -> bool:
    """Return whether a folder has no two photos of its recognition, so that an older copy of it may be used instead."""
    return isinstance(found.result, Reject) and found.result.code.startswith("photo_")


def inspect_folder(source: Path, folder: Folder) -> Inspected:
    """Return the recognition of a folder, or the reason to reject it, and what is passed over in it."""
    if usual := find_usual(source, folder):
        return Inspected(usual, [], Counter({USED: len(usual.files)}))
    number = folder.recognition_id
    below = count_below(source, folder.path, REJECTED, is_listed=True)
    files = _files(source, below)
    unread = next((path for path in below.own if path in below.unread), None)
    result: Recognition | Reject
    if unread is not None:
        result = Reject(number, as_text(unread), "folder_unreadable", below.unread.pop(unread))
    else:
        result = _choose(folder, files, below)
    notices = uncounted(number, folder.path, below)
    if isinstance(result, Reject):
        return Inspected(result, notices, below.files)
    used = {file.path for file in result.files}
    lacks = [what for what, file in (("a menu", result.menu), ("a receipt", result.receipt)) if file is None]
    without = f"; the recognition is loaded without {' and '.join(lacks)}" if lacks else ""
    inner = {path for path in below.folders if not f"{below.nested}/".startswith(f"{path}/")} - below.unread.keys()
    unused = [(path, describe(last(path))) for path in sorted(set(below.regular) - used)]
    unused += [(path, Deviation("file_special", SPECIAL)) for path in sorted(below.others)]
    unused += [(path, Deviation("folder_unknown", "the folder is not searched")) for path in sorted(inner)]
    notices += [Notice(number, as_text(path), one.code, one.message + without) for path, one in unused]
    counts = {USED: len(used), PASSED_OVER: below.files[REJECTED] - len(used), CLUTTER: below.files[CLUTTER]}
    return Inspected(result, notices, +Counter(counts))


def _files(source: Path, below: Below) -> list[File]:
    """Return the files that are the recognition's own; one whose status cannot be read is added to what is unread."""
    files = []
    for path in below.regular:
        try:
            facts = os.stat(f"{source}/{path}")
            files.append(File(path, facts.st_size, modified(facts)))
        except FileNotFoundError:  # it was deleted
            continue
        except OSError as exc:
            below.own.append(path)
            below.unread[path] = f"the file cannot be read: {exc.strerror}"
    return files


def _choose(folder: Folder, files: list[File], below: Below) -> Recognition | Reject:
    """Return the recognition by the names and sizes of the files."""

    def reject(code: str, message: str) -> Reject:
        return Reject(folder.recognition_id, folder.path, code, message)

    photos = [file for file in files if is_photo(file.path)]
    pair = _by_camera(photos)
    if pair is None:
        whole = [file for file in photos if not is_copy(file.path)]
        usual = [file for file in whole if file.path.lower().endswith((".jpg", ".jpeg"))]
        pair = _by_camera(whole) or _by_camera(usual)
    if pair is None:
        if 2 in (len(photos), len(whole)):
            return reject("photo_cameras", f"the photos are not one Main and one Qualifying{_names(below)}")
        return reject("photo_count", f"{counted(len(photos), 'photo')} instead of two{_names(below)}")
    menu, receipt = _last(folder, files, MENU), _last(folder, files, RECEIPT)
    day = captured_on(pair[0].path, folder.recognition_id)
    found = Recognition(folder.recognition_id, pair, menu, receipt, day)
    return _unusable(found) or found


def _unusable(found: Recognition) -> Reject | None:
    """Return the reason to reject a recognition by the names or sizes of its files."""

    def reject(code: str, message: str) -> Reject:
        return Reject(found.recognition_id, as_text(file.path), code, message)

    for file in found.files:
        if not is_text(file.path):
            return reject("path_encoding", f"the name of {as_text(file.path)} is not UTF-8")
    for file in sorted(found.photos, key=attrgetter("path")):
        if other := other_recognition(file.path, found.recognition_id):
            return reject("photo_other_recognition", f"the photo's name is that of recognition {other}")
        if file.size == 0:
            return reject("photo_empty", "the file is empty")
        if file.size > MAXIMUM_PHOTO_BYTES:
            return reject("photo_too_large", f"the file has {file.size} bytes")
    for file in filter(None, (found.menu, found.receipt)):
        if other := other_recognition(file.path, found.recognition_id):
            return reject("json_other_recognition", f"the document's name is that of recognition {other}")
        if file.size > MAXIMUM_DOCUMENT_BYTES:
            return reject("json_too_large", f"the file has {file.size} bytes")
    return None


def _by_camera(photos: Sequence[File]) -> tuple[File, File] | None:
    """Return the photos of camera 1 and 2 if there are these two and no other."""
    cameras = {camera_of(photo.path): photo for photo in photos}
    return (cameras[1], cameras[2]) if len(photos) == 2 and set(cameras) == {1, 2} else None


def _names(below: Below) -> str:
    """Return the end of a message that names what may be a photo: all but documents, cameras first."""
    names = [last(path) for path in (*below.regular, *below.others)]
    names = [name for name in names if not MENU.fullmatch(name) and not RECEIPT.fullmatch(name)]
    names += [f"{last(path)}/" for path in below.folders]
    names.sort(key=lambda name: (camera_of(name) is None, name))
    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; in the folder: {', '.join(map(as_text, names[:_SHOWN]))}{rest}" if names else ""


def _last(folder: Folder, files: list[File], pattern: re.Pattern[str]) -> File | None:
    """Return the matching file that sorts last; one in the recognition's own folder comes before one in photos/."""
    named = [file for file in files if pattern.fullmatch(last(file.path)) and not last(file.path).startswith(".")]
    return max(named, key=lambda file: (file.path.count("/") == folder.path.count("/") + 1, file.path), default=None)

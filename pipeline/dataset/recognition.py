"""Find the photos and documents of a recognition by the names and sizes of its files; open none."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from pipeline.dataset.clutter import is_clutter
from pipeline.dataset.dates import captured_on
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES, modified
from pipeline.dataset.names import (
    MENU,
    RECEIPT,
    camera_of,
    is_copy,
    is_photo,
    is_usual_photo,
    last,
    near_document,
    other_recognition,
)
from pipeline.dataset.passed import (
    add_clutter,
    as_text,
    count_below,
    is_folder,
    is_photos,
    is_regular,
    pass_file,
    pass_folder,
    special,
    uncounted,
)
from pipeline.dataset.records import (
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


@dataclass
class _Content:
    """What is in the folder of a recognition and in `photos`, and what is passed over or clutter there."""

    files: list[File] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    photo_folders: list[str] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def inspect_folder(source: Path, folder: Folder) -> Inspected:
    """Return the recognition of a folder, or the reason to reject it, and what is passed over in it."""
    content = _Content()
    try:
        _list(source, folder.recognition_id, folder.path, content)
        for path in content.photo_folders:
            _list(source, folder.recognition_id, path, content)
        result = _choose(folder, content)
        if isinstance(result, Recognition):
            for path in content.folders:
                content.notices.append(pass_folder(source, path, content.counts, folder.recognition_id))
            without = "; the recognition is loaded without it"
            content.notices = [
                replace(one, message=one.message + without) if near_document(last(one.path)) else one
                for one in content.notices
            ]
            _pass_files(result, content)
            return Inspected(result, content.notices, content.counts)
    except OSError as exc:
        message = f"the folder cannot be read: {exc.strerror}"
        path = os.path.relpath(exc.filename, source) if exc.filename else folder.path  # photos/, or a file in it
        result = Reject(folder.recognition_id, as_text(path), "folder_unreadable", message)
    below = count_below(source, folder.path, REJECTED)
    below.unread = "" if result.code == "folder_unreadable" else below.unread  # which the reject names
    return Inspected(result, uncounted(folder.recognition_id, folder.path, below), below.files)


def _list(source: Path, number: int, folder: str, content: _Content) -> None:
    """Add what is in a folder."""
    with os.scandir(f"{source}/{folder}") as entries:  # joining paths takes as long as the call
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if is_clutter(entry.name):
                add_clutter(source, entry, path, content.counts)
            elif is_folder(entry):
                is_inner = folder not in content.photo_folders and is_photos(source, entry)
                (content.photo_folders if is_inner else content.folders).append(path)
            elif is_regular(entry):
                with suppress(FileNotFoundError):  # it was deleted
                    facts = entry.stat()
                    content.files.append(File(path, facts.st_size, modified(facts)))
            else:
                content.notices.append(pass_file(path, content.counts, number, special(entry)))


def _choose(folder: Folder, content: _Content) -> Recognition | Reject:
    """Return the recognition by the names and sizes of the files."""

    def reject(code: str, message: str) -> Reject:
        return Reject(folder.recognition_id, folder.path, code, message)

    files = content.files
    photos = [file for file in files if is_photo(file.path)]
    pair = _by_camera(photos)
    if pair is None:
        whole = [file for file in photos if not is_copy(file.path)]
        pair = _by_camera(whole) or _by_camera([file for file in whole if is_usual_photo(file.path)])
    if pair is None:
        if 2 in (len(photos), len(whole)):
            return reject("photo_cameras", f"the photos are not one Main and one Qualifying{_names(content)}")
        return reject("photo_count", f"{counted(len(photos), 'photo')} instead of two{_names(content)}")
    menu, receipt = _last(folder, files, MENU), _last(folder, files, RECEIPT)
    day = captured_on(pair[0].path, folder.recognition_id)
    found = Recognition(folder.recognition_id, pair, menu, receipt, day)
    return _unusable(found) or found


def _unusable(found: Recognition) -> Reject | None:
    """Return the reason to reject a recognition by the names or sizes of its files."""

    def reject(code: str, message: str) -> Reject:
        return Reject(found.recognition_id, as_text(file.path), code, message)

    for file in filter(None, (*found.photos, found.menu, found.receipt)):
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


def _names(content: _Content) -> str:
    """Return the end of a message that names what may be a photo: all but documents, cameras first."""
    names = [last(file.path) for file in content.files if not near_document(last(file.path))]
    names += [f"{last(path)}/" for path in content.folders]
    names += [f"{last(one.path)} ({one.message})" for one in content.notices]
    names.sort(key=lambda name: (camera_of(name) is None, name))
    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; in the folder: {', '.join(map(as_text, names[:_SHOWN]))}{rest}" if names else ""


def _last(folder: Folder, files: list[File], pattern: re.Pattern[str]) -> File | None:
    """Return the matching file that sorts last; one in the recognition's own folder comes before one in photos/."""
    named = [file for file in files if pattern.fullmatch(last(file.path)) and not last(file.path).startswith(".")]
    return max(named, key=lambda file: (file.path.count("/") == folder.path.count("/") + 1, file.path), default=None)


def _pass_files(recognition: Recognition, content: _Content) -> None:
    """Count the files, and add notices of those that are not used."""
    used = {file.path for file in (*recognition.photos, recognition.menu, recognition.receipt) if file is not None}
    content.counts[USED] += len(used)
    for path in sorted(file.path for file in content.files if file.path not in used):
        why = _why(last(path), recognition)
        content.notices.append(pass_file(path, content.counts, recognition.recognition_id, why))


def _why(name: str, recognition: Recognition) -> Deviation | None:
    """Return why a file of a recognition is not used, None if it is neither a photo nor nearly a document."""
    if is_photo(name):
        first, second = (last(photo.path) for photo in recognition.photos)
        return Deviation("photo_copy", f"a copy or another format: {first} and {second} are used")
    kind = None if name.startswith(".") else near_document(name)
    if kind is None:
        return None
    taken = {"menu": recognition.menu, "receipt": recognition.receipt}.get(kind)
    if taken is not None:
        return Deviation("document_copy", f"another {kind} is used: {last(taken.path)}")
    form = {"menu": "AM.json", "receipt": "correct_dishes.json"}.get(kind, "AM.json or correct_dishes.json")
    message = f"it looks like a {kind} and is not used: its name is not {form}, alone or after an underscore"
    without = f"; the recognition is loaded without a {kind}" if kind != "document" else ""
    return Deviation("document_name", message + without)

"""Files and folders that are passed over: each has a notice, and their files are counted without opening one."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.clutter import is_clutter
from pipeline.dataset.names import FOLDER, describe, last, near_recognition
from pipeline.dataset.records import CLUTTER, PASSED_OVER, Deviation, Notice
from pipeline.units import counted

#: A byte that is not UTF-8, as Python decodes it in a path.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def as_text(path: str) -> str:
    """Return a path with replacement characters for bytes that are not UTF-8."""
    return _SURROGATE.sub("\ufffd", path)


@dataclass
class Below:
    """The number of files below a folder, by class, and the paths of folders in it, each empty if there is none.

    Attributes:
        nested: the first folder that is named as a recognition's.
        unread: what is wrong with a folder that cannot be read, whose files are not counted.
    """

    files: Counter[str]
    nested: str = ""
    unread: str = ""


def count_below(source: Path, path: str, as_class: str) -> Below:
    """Count the files below a folder: clutter, and all others in one class.

    A link to a file is a file. A link to a folder is not followed and does not count, except for a folder `photos`.
    """
    below = Below(Counter())
    pending = [(path, CLUTTER if is_clutter(last(path)) else as_class)]
    while pending:
        folder, outer = pending.pop()
        try:
            with os.scandir(f"{source}/{folder}") as entries:
                for entry in entries:
                    found = CLUTTER if is_clutter(entry.name) else outer
                    if is_folder(entry) and (not entry.is_symlink() or (folder == path and is_photos(source, entry))):
                        inner = f"{folder}/{entry.name}"
                        pending.append((inner, found))
                        if found != CLUTTER and not below.nested and FOLDER.fullmatch(entry.name):
                            below.nested = inner
                    elif not is_folder(entry):
                        below.files[found] += 1
        except OSError as exc:
            below.unread = f"{folder} cannot be read: {exc.strerror}"
    return below


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; False for a link to itself, unlike `entry.is_dir()`."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry))


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a regular file or a link to one."""
    return entry.is_file(follow_symlinks=False) or (entry.is_symlink() and os.path.isfile(entry))


def is_photos(source: Path, entry: os.DirEntry[str]) -> bool:
    """Return whether a folder in a recognition's folder is that of its photos, or a link to such a folder elsewhere."""
    return entry.name.lower() == "photos" and not (entry.is_symlink() and is_searched(source, entry))


def is_searched(source: Path, link: os.DirEntry[str]) -> bool:
    """Return whether a link leads to the source, to a folder in it, or to one that contains it."""
    own, target = Path(os.path.realpath(source)), Path(os.path.realpath(link))
    return target.is_relative_to(own) or own.is_relative_to(target)


def add_clutter(source: Path, entry: os.DirEntry[str], path: str, files: Counter[str]) -> None:
    """Count a file that is clutter, or all below such a folder."""
    if entry.is_dir(follow_symlinks=False):
        files.update(count_below(source, path, CLUTTER).files)
    elif not is_folder(entry):
        files[CLUTTER] += 1


def special(entry: os.DirEntry[str]) -> Deviation:
    """Return why an entry that is neither a regular file nor a folder is passed over."""
    if entry.is_symlink():
        return Deviation("file_special", "the link leads to no regular file")
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode), "device")
    return Deviation("file_special", f"a {kind} is not read")


def pass_file(path: str, files: Counter[str], number: int | None = None, one: Deviation | None = None) -> Notice:
    """Count a file and return its notice; without a reason, its name gives one."""
    files[PASSED_OVER] += 1
    one = one or describe(last(path))
    return Notice(number, as_text(path), *one)


def pass_folder(source: Path, path: str, files: Counter[str], number: int | None = None) -> Notice:
    """Count the files below a folder, clutter among them, and return its notice."""
    if os.path.islink(source / path):
        return Notice(number, as_text(path), "folder_unknown", "the link leads to a folder, and is not followed")
    below = count_below(source, path, PASSED_OVER)
    files.update(below.files)
    one = _why(last(path), below)
    return Notice(number, as_text(path), *one)


def uncounted(number: int, path: str, below: Below) -> list[Notice]:
    """Return notices of folders below a recognition's that cannot be read, and of recognitions there."""
    found = [Deviation("folder_unknown", as_text(below.unread))] if below.unread else []
    found += [_nested(below)] if below.nested else []
    return [Notice(number, as_text(path), *one) for one in found]


def _nested(below: Below) -> Deviation:
    """Return what to do about recognitions that are in a folder where none is looked for."""
    outer = below.nested.split("/")[:-1]
    if len(outer) > 1 and not FOLDER.fullmatch(outer[-1]):
        del outer[-1]  # an export, beside which there may be others
    message = f"recognitions below it are not loaded, {as_text(below.nested)} for one"
    return Deviation("folder_nested", f"{message}: name {as_text('/'.join(outer))} with --source")


def _why(name: str, below: Below) -> Deviation:
    if below.unread:
        return Deviation("folder_unknown", as_text(below.unread))
    content = f"it has {counted(sum(below.files.values()), 'file')}"
    if below.nested:
        return _nested(below)
    if FOLDER.fullmatch(name):
        return Deviation("folder_nested", f"a recognition in the folder of another one is not loaded; {content}")
    if nearly := near_recognition(name):
        message = f"the name resembles recognition_{nearly}, and only a folder of exactly that name is loaded"
        return Deviation("folder_name", f"{message}; {content}")
    return Deviation("folder_unknown", f"the folder holds no recognition; {content}")

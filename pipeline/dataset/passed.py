"""Files and folders that are passed over: each has a notice, and their files are counted without opening one."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dataset.clutter import is_clutter
from pipeline.dataset.names import FOLDER, describe, last, near_recognition
from pipeline.dataset.records import CLUTTER, PASSED_OVER, Deviation, Notice
from pipeline.units import counted

SPECIAL = "a link that leads nowhere, a named pipe, a socket or a device is not read"
#: A byte that is not UTF-8, as Python decodes it in a path.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def as_text(path: str) -> str:
    """Return a path with replacement characters for bytes that are not UTF-8."""
    return _SURROGATE.sub("\ufffd", path)


@dataclass
class Below:
    """What is below a folder.

    Attributes:
        files: the number of files by class.
        unread: what is wrong with folders that cannot be read, by path; their files are not counted.
        nested: the first folder that is named as a recognition's, empty if there is none.
        own: the folder and its `photos`, if what is in them is listed.
        regular, others: paths of the files in these, and of what is neither a regular file nor a folder.
        folders: paths of the other folders in these, and of links to folders.
    """

    files: Counter[str] = field(default_factory=Counter)
    unread: dict[str, str] = field(default_factory=dict)
    nested: str = ""
    own: list[str] = field(default_factory=list)
    regular: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def count_below(source: Path, path: str, as_class: str, *, is_listed: bool = False) -> Below:
    """Count the files below a folder, clutter and all others in one class; list what is its own if `is_listed`.

    A link to a file is a file. A link to a folder is not followed and does not count, except for a folder `photos`.
    """
    below = Below(own=[path] if is_listed else [])
    pending = [(path, CLUTTER if is_clutter(last(path)) else as_class)]
    while pending:
        folder, outer = pending.pop()
        try:
            with os.scandir(f"{source}/{folder}") as entries:  # joining paths takes as long as the call
                for entry in entries:
                    inner, found = f"{folder}/{entry.name}", CLUTTER if is_clutter(entry.name) else outer
                    lists = folder in below.own and found != CLUTTER
                    if not is_folder(entry):
                        below.files[found] += 1
                        if lists:
                            (below.regular if is_regular(entry) else below.others).append(inner)
                        continue
                    is_inner = folder == path and is_photos(source, entry)
                    if lists:
                        (below.own if is_inner else below.folders).append(inner)
                    if is_inner or not entry.is_symlink():
                        pending.append((inner, found))
                        is_named = found != CLUTTER and not below.nested and FOLDER.fullmatch(entry.name)
                        if is_named and "/." not in f"/{inner}":  # as the objects of the embedded Storage are
                            below.nested = inner
        except OSError as exc:
            below.unread[folder] = f"the folder cannot be read: {exc.strerror}"
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


def pass_file(entry: os.DirEntry[str], path: str, files: Counter[str]) -> Notice:
    """Count a file that is in no recognition's folder, and return its notice."""
    files[PASSED_OVER] += 1
    one = describe(entry.name) if is_regular(entry) else Deviation("file_special", SPECIAL)
    return Notice(None, as_text(path), *one)


def pass_folder(source: Path, path: str, files: Counter[str]) -> Notice:
    """Count the files below a folder, clutter among them, and return its notice."""
    if os.path.islink(source / path):
        return Notice(None, as_text(path), "folder_unknown", "the link leads to a folder, and is not followed")
    below = count_below(source, path, PASSED_OVER)
    files.update(below.files)
    content = f"it has {counted(sum(below.files.values()), 'file')}"
    if below.unread:
        why = "; ".join(f"{as_text(one)}: {why}" for one, why in below.unread.items())
        one = Deviation("folder_unknown", why)
    elif below.nested:
        one = _nested(below)
    elif last(path).startswith("."):
        one = Deviation("folder_unknown", f"a folder whose name begins with a dot is not searched; {content}")
    elif nearly := near_recognition(last(path)):
        message = f"the name resembles recognition_{nearly}, and only a folder of exactly that name is loaded"
        one = Deviation("folder_name", f"{message}; {content}")
    else:
        one = Deviation("folder_unknown", f"the folder holds no recognition; {content}")
    return Notice(None, as_text(path), *one)


def uncounted(number: int, path: str, below: Below) -> list[Notice]:
    """Return notices of folders below a recognition's that cannot be read, and of recognitions there."""
    found = [(folder, Deviation("folder_unknown", why)) for folder, why in below.unread.items()]
    found += [(path, _nested(below))] if below.nested else []
    return [Notice(number, as_text(folder), *one) for folder, one in found]


def _nested(below: Below) -> Deviation:
    """Return what to do about recognitions that are in a folder where none is looked for."""
    outer = below.nested.split("/")[:-1]
    if len(outer) > 1 and not FOLDER.fullmatch(outer[-1]):
        del outer[-1]  # an export, beside which there may be others
    message = f"recognitions below it are not loaded, {as_text(below.nested)} for one"
    return Deviation("folder_nested", f"{message}: name {as_text('/'.join(outer))} with --source")

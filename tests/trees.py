"""Random trees of files for tests/test_trees.py, and a model of what a load makes of each, without the loader's code.

A tree remembers what every file was planted as; only menus and receipts are read again, by the module json.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from hypothesis import strategies as st
from PIL import Image

#: Photos that are shown whole, with their notice; and others.
SHOWN = {"whole": "", "padded": "photo_padding", "trailing": "photo_trailing_bytes", "no_end": "photo_no_end"}
DAMAGED = ("cut", "closed", "arithmetic", "text", "png_inside")
#: Not under the name of a photo, or not there at all.
ABSENT = ("png", "missing")
#: Names of documents that a load understands; the others only look like one.
MENUS, RECEIPTS = ("{0}_recognition_2025-10-11_AM.json", "AM.json"), ("{0}_recognition_2025-10-11_CD.json", "CD.json")
NEAR_DOCUMENTS = ("AM (1).json", "-AM.json", "AM.json.gz", "menu.txt", "CD - Copy.json")
FOLDERS = ("recognition_{0}", "recognition_{0}", "recognition_{0}", "{0}", "Recognition_{0}")
NEAR_FOLDERS = ("recognition_{0} (1)", "recognition-{0}", "recognition_{0} - Copy", "recognition_{0}.bak")
CLUTTER = (".DS_Store", "._x.jpg", "Thumbs.db", "desktop.ini", "@eaDir/x.jpg/SYNOPHOTO_THUMB_XL.jpg")
BINS = ("__MACOSX", "$RECYCLE.BIN", ".Trash-1000/files", "#recycle")
STRAYS = ("notes.txt", "backup.zip", "photo.tif")
#: In natural order.
EXPORTS = ("export_1", "export_9", "export_10")


@dataclass(frozen=True)
class Planted:
    """A recognition's folder: how it and its files are named, and what each file is."""

    number: int
    export: str
    folder: str = FOLDERS[0]
    photos: str = "photos"
    main: str = "whole"
    qualifying: str = "whole"
    ending: str = ".jpg"
    copy: bool = False
    menu: str | None = None
    receipt: str | None = None
    menu_name: str = MENUS[0]
    receipt_name: str = RECEIPTS[0]
    near: tuple[str, ...] = ()
    clutter: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.export}/{self.folder.format(self.number)}"

    @property
    def is_near(self) -> bool:
        return self.folder in NEAR_FOLDERS

    @property
    def has_two_photos(self) -> bool:
        return not {self.main, self.qualifying} & set(ABSENT) and self.photos != "images"

    @property
    def has_shown_photos(self) -> bool:
        return self.has_two_photos and {self.main, self.qualifying} <= set(SHOWN)


@dataclass(frozen=True)
class Tree:
    planted: tuple[Planted, ...]
    bins: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    clutter: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What a load has to make of a tree; paths are relative to it.

    Attributes:
        loaded: recognition -> its folder.
        used: files of these.
        older: files of copies that a newer one supersedes.
        clutter: files that are only counted.
        others: files that are rejected or passed over, so that each has to be named, or its folder.
        notices: code and path of those on photos that are used.
    """

    loaded: dict[int, Planted] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    older: set[str] = field(default_factory=set)
    clutter: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    notices: set[tuple[str, str]] = field(default_factory=set)


# Strategies


def _subsets(names: Iterable[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(tuple(names)), max_size=2, unique=True).map(tuple)


def _states(*bad: str) -> st.SearchStrategy[str]:
    """Choose what a file is: mostly whole, since all files of a recognition have to be."""
    return st.one_of(st.just("whole"), st.just("whole"), st.sampled_from(sorted(SHOWN)), st.sampled_from(bad))


def documents(whole: list[dict[str, Any]]) -> st.SearchStrategy[str | None]:
    """Choose the text of a document: whole, none, cut somewhere, with a key twice, or of another shape."""
    text = json.dumps(whole, ensure_ascii=False)
    twice = text.replace('"Name"', '"Name": "", "Name"', 1)
    others = (twice, text[1:-1] + ",", "{}", "null", "", "[" + text + "]", "\ufeff" + text, text + "\n", text + "x")
    cut = st.integers(0, len(text)).map(lambda end: text[:end])
    return st.one_of(st.none(), st.just(text), st.just(text), st.sampled_from(others), cut)


@st.composite
def planted(draw: st.DrawFn) -> Planted:
    """Choose a recognition's folder."""
    number, export = draw(st.integers(1, 5)), draw(st.sampled_from(EXPORTS))
    dish = {"ExternalId": f"{number}", "Name": f"Dish {number} of {export}", "Category": "c", "Price": 1}
    return Planted(
        number,
        export,
        draw(st.one_of(st.sampled_from(FOLDERS), st.sampled_from(FOLDERS), st.sampled_from(NEAR_FOLDERS))),
        draw(st.sampled_from(("photos", "photos", "Photos", "PHOTOS", "", "images"))),
        draw(_states(*DAMAGED, *ABSENT)),
        draw(_states(*DAMAGED, *ABSENT)),
        draw(st.sampled_from((".jpg", ".jpg", ".JPG", ".jpeg", ".jfif"))),
        draw(st.booleans()),
        draw(documents([dish, {**dish, "ExternalId": "x"}])),
        draw(documents([{"Count": 2, "Dishes": [dish]}])),
        draw(st.sampled_from(MENUS)),
        draw(st.sampled_from(RECEIPTS)),
        draw(_subsets(NEAR_DOCUMENTS)),
        draw(_subsets(CLUTTER)),
        draw(_subsets(STRAYS)),
    )


#: One recognition is always whole, since a batch with nothing usable is held.
WHOLE = Planted(90, EXPORTS[0])


def trees() -> st.SearchStrategy[Tree]:
    """Choose a tree; a recognition is at most once in an export."""
    several = st.lists(planted(), min_size=1, max_size=7, unique_by=lambda one: (one.export, one.number))
    places = several.map(lambda found: (WHOLE, *found))
    return st.builds(Tree, places, _subsets(BINS), _subsets(STRAYS), _subsets(CLUTTER[:4]))


# Files


@cache
def _photo() -> bytes:
    stream = io.BytesIO()
    Image.frombytes("L", (64, 48), random.Random(0).randbytes(64 * 48)).save(stream, "JPEG")
    return stream.getvalue()


def photo(state: str, comment: str) -> bytes:
    """Return a photo that no other file is equal to, damaged as its state says."""
    whole = _photo()
    text = comment.encode()
    start = whole[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
    rest, half = whole[2:], len(whole) // 2
    frame = rest.index(b"\xff\xc0") + 1
    contents = {
        "whole": rest,
        "padded": bytes(100) + rest,
        "trailing": rest + b"trailer",
        "no_end": rest[:-2],
        "cut": rest[:half],
        "closed": rest[:half] + b"\xff\xd9",
        "arithmetic": rest[:frame] + b"\xc9" + rest[frame + 1 :],
    }
    if state in contents:
        return start + contents[state]
    return text + b" is no photo" if state == "text" else b"\x89PNG\r\n\x1a\n" + text


def _files(one: Planted) -> Iterator[tuple[str, str, bytes]]:
    """Yield the files of a folder: what each is, its path, and its content."""
    place = f"{one.path}/{one.photos}".rstrip("/")
    for camera, state in (("Main", one.main), ("Qualifying", one.qualifying)):
        name = f"recognition_{one.number}_2025-10-11_{camera}"
        if state == "png":
            yield "stray", f"{place}/{name}.png", photo(state, f"{one.path} {camera}")
        elif state != "missing":
            yield "photo", f"{place}/{name}{one.ending}", photo(state, f"{one.path} {camera}")
    if one.copy and one.has_two_photos:
        name = f"recognition_{one.number}_2025-10-11_Main (1)"
        yield "stray", f"{place}/{name}{one.ending}", photo("whole", f"{one.path} copy")
    for role, text, name in (("menu", one.menu, one.menu_name), ("receipt", one.receipt, one.receipt_name)):
        if text is not None:
            yield role, f"{one.path}/{name.format(one.number)}", text.encode()
    for name in (*one.near, *one.strays):
        yield "stray", f"{one.path}/{name}", b"[]"
    for name in one.clutter:
        yield "clutter", f"{one.path}/{name}", b"x"


def plant(tree: Tree, folder: Path) -> Outcome:
    """Write a tree, and return what a load has to make of it."""
    found = Outcome()
    copies: dict[int, list[Planted]] = {}
    for one in tree.planted:
        if not one.is_near:
            copies.setdefault(one.number, []).append(one)
    chosen = {number: _chosen(some) for number, some in copies.items()}
    for one in tree.planted:
        taken = chosen.get(one.number)
        files = list(_files(one))
        for _, path, content in files:
            _write(folder / path, content)
        roles: dict[str, list[str]] = {}
        for role, path, _ in files:
            roles.setdefault(role, []).append(path)
        found.clutter.update(roles.pop("clutter", ()))
        is_older = taken is not None and EXPORTS.index(one.export) < EXPORTS.index(taken.export)
        if one is taken and is_usable(one):
            found.loaded[one.number] = one
            found.others.update(roles.pop("stray", ()))
            found.used.update(path for paths in roles.values() for path in paths)
            for path, state in zip(roles["photo"], (one.main, one.qualifying), strict=True):
                found.notices |= {(SHOWN[state], path)} if SHOWN[state] else set()
        else:
            rest = found.older if is_older and not one.is_near else found.others
            rest.update(path for paths in roles.values() for path in paths)
    for name in tree.bins:
        deleted = Planted(80, f"{name}")
        for _, path, content in _files(deleted):
            _write(folder / path, content)
            found.clutter.add(path)
    for name in tree.clutter:
        _write(folder / name, b"x")
        found.clutter.add(name)
    for name in tree.strays:
        _write(folder / name, b"x")
        found.others.add(name)
    return found


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# The model


def _chosen(copies: list[Planted]) -> Planted:
    """Return the copy that counts: the newest with two photos, else the newest."""
    newest = sorted(copies, key=lambda one: EXPORTS.index(one.export), reverse=True)
    return next((one for one in newest if one.has_two_photos), newest[0])


def is_usable(one: Planted) -> bool:
    return (
        one.has_shown_photos and entries(one.menu, "menu") is not None and entries(one.receipt, "receipt") is not None
    )


def entries(text: str | None, kind: str) -> list[dict[str, Any]] | None:
    """Return what a document says, nothing if there is none; None if it cannot be used."""
    if text is None:
        return []
    try:
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_without_doubles)
    except ValueError:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return None
    needed = {"Count", "Dishes"} if kind == "receipt" else {"ExternalId", "Name"}
    return value if all(needed <= set(entry) for entry in value) else None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def is_named(path: str, named: set[str], planted: Iterable[Planted]) -> bool:
    """Return whether a path, a folder of it, or a file in the same recognition's folder is in a list of paths."""
    folders = {str(parent) for parent in PurePosixPath(path).parents} - {"."}
    if path in named or folders & named:
        return True
    own = next((one.path for one in planted if path.startswith(f"{one.path}/")), None)
    return own is not None and any(name.startswith(f"{own}/") for name in named)

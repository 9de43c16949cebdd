"""Pure: a dataset on disk -> recognitions or rejects. Nothing here knows of a database or a network.

<source>/[<export>/]recognition_<digits>/[photos/]*Main*.jpg, *Qualifying*.jpg, *AM.json, *correct_dishes.json
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NoReturn

from pipeline.errors import BadInput, UsageError

#: The largest value of PostgreSQL's bigint.
MAXIMUM_BIGINT = 2**63 - 1
MAXIMUM_PHOTO_BYTES = 32 << 20
MAXIMUM_DOCUMENT_BYTES = 3 << 20
MAXIMUM_COUNT = 1000
MAXIMUM_ITEMS = 10_000
#: Letters of an ExternalId, which is indexed: an entry of a B-tree has at most 2,704 bytes.
MAXIMUM_EXTERNAL_ID = 500
MAXIMUM_DEPTH = 100

_parsing = threading.Lock()

_LOST_AND_FOUND = "lost+found"  # of the file system, and root's
_FOLDER = re.compile(r"(?:recognition_)?([0-9]+)")
_DATE = re.compile(r"(?<![0-9])([0-9]{4})-([0-9]{2})-([0-9]{2})(?![0-9])")
_MENU = re.compile(r"(?:.*_)?AM\.json", re.IGNORECASE)
_RECEIPT = re.compile(r"(?:.*_)?(?:correct_dishes|CD)\.json", re.IGNORECASE)
_EXPONENT = re.compile(r"[eE][+-]?0*([0-9]+)$")


@dataclass(frozen=True)
class Folder:
    """A recognition's folder: its number and its path relative to the source."""

    recognition_id: int
    path: str


@dataclass(frozen=True)
class File:
    """A file as discovery saw it: path relative to the source, bytes, modification time in ns since 1970."""

    path: str
    size: int
    mtime: int


@dataclass(frozen=True)
class Recognition:
    """A usable recognition: the photos of camera 1 and 2, and its documents where it has them."""

    recognition_id: int
    photos: tuple[File, File]
    menu: File | None
    receipt: File | None
    captured_on: date | None


@dataclass(frozen=True)
class Reject:
    """An input that is left out, with a code and a sentence."""

    recognition_id: int | None
    path: str
    code: str
    message: str


def find_source(given: str | None, setting: str | None) -> Path:
    """Return the dataset's folder: the one given, the setting's, else the first of the usual places.

    Raises:
        UsageError: there is none, it is not a folder, or it may not be read.
    """
    if given or setting:
        return named_source(given or setting or "")
    for path in usual_sources():
        return path.resolve()
    raise UsageError(
        "No dataset was named and none was found: looked for ./dataset, ./RRS_Dataset*, "
        "~/Downloads/RRS_Dataset* and ~/RRS_Dataset*.",
        "Name its folder with --source or DATASET_DIR.",
    )


def usual_sources() -> Iterator[Path]:
    """Yield the folders of the usual places that exist, in their order."""
    home = Path.home()
    places = ((Path(), "dataset"), (Path(), "RRS_Dataset*"), (home / "Downloads", "RRS_Dataset*"))
    for folder, pattern in (*places, (home, "RRS_Dataset*")):
        for path in sorted(folder.glob(pattern)) if folder.is_dir() else []:
            if path.is_dir():
                yield path


def named_source(text: str) -> Path:
    """Return the folder that a text names, as an absolute path.

    Raises:
        UsageError: it does not exist, is not a folder, or is not a path at all.
    """
    hint = "Name its folder with --source or DATASET_DIR."
    shown = _as_text(text)
    if not is_text(text):
        raise UsageError(f"The path of the dataset, {shown}, is not UTF-8.", "Rename it, or link to it.")
    try:
        path = Path(text).expanduser().resolve()
        is_folder = path.is_dir()
        exists = is_folder or path.exists()
    except (OSError, RuntimeError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise UsageError(f"The dataset {shown[:200]} is out of reach: {why}.", hint) from exc
    if not exists:
        raise UsageError(f"The dataset {path} does not exist.", hint)
    if not is_folder:
        raise UsageError(f"The dataset {path} is not a folder.", hint)
    return path


def list_folders(source: Path) -> Iterator[Folder | Reject]:
    """Yield the folders of recognitions, in no order and without holding them.

    Raises:
        UsageError: the source or an export cannot be read.
    """
    exports = []
    for name in _folders(source):
        if _FOLDER.fullmatch(name):
            yield _folder(name, name)
        elif not name.startswith(".") and name != _LOST_AND_FOUND:
            exports.append(name)
    for export in sorted(exports):
        for name in _folders(source / export):
            if _FOLDER.fullmatch(name):
                yield _folder(name, f"{export}/{name}")


def _folders(directory: Path) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if _is_folder(entry):
                    yield entry.name
    except OSError as exc:
        raise UsageError(
            f"The folder {directory} cannot be read: {exc.strerror}.", "Check its owner and mode, then run again."
        ) from exc


def holder_of(path: str) -> str:
    """Return the folder, relative to the source, that the recognition of a path is in: an export, or the source."""
    first, _, rest = path.partition("/")
    return first if rest and not _FOLDER.fullmatch(first) else ""


def holds_recognitions(directory: Path) -> bool:
    """Return whether a folder can be listed and has recognitions in it."""
    try:
        with os.scandir(directory) as entries:
            return any(_FOLDER.fullmatch(entry.name) for entry in entries)
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself


def _folder(name: str, path: str) -> Folder | Reject:
    digits = name.removeprefix("recognition_")
    if not is_text(path):
        return Reject(None, _as_text(path), "path_encoding", "the folder's name is not UTF-8")
    # int() refuses more than 4,300 digits, and a file name has at most 255.
    number = int(digits)
    if number > MAXIMUM_BIGINT:
        return Reject(None, path, "id_invalid", f"the number {digits} is beyond what a bigint holds")
    return Folder(number, path)


def is_text(path: str) -> bool:
    """Return whether a text can be written as UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_text(path: str) -> str:
    return os.fsencode(path).decode(errors="replace")


def inspect_folder(source: Path, folder: Folder) -> Recognition | Reject:
    """Look at the names and sizes of a recognition's files; nothing is opened."""

    def reject(code: str, message: str, path: str = folder.path) -> Reject:
        return Reject(folder.recognition_id, path, code, message)

    try:
        files, folders = _list(source, folder.path)
        below = _list(source, f"{folder.path}/photos")[0] if "photos" in folders else []
    except OSError as exc:
        return reject("folder_unreadable", f"the folder cannot be read: {exc.strerror}")

    photos = sorted(
        (file for file in (*files, *below) if file.path.lower().endswith((".jpg", ".jpeg"))),
        key=lambda file: file.path,
    )
    bad_name = next((file for file in (*files, *below) if not is_text(file.path)), None)
    if bad_name is not None:
        return reject("path_encoding", f"the name of {_as_text(bad_name.path)} is not UTF-8")
    if len(photos) != 2:
        return reject("photo_count", f"{len(photos)} photos instead of two")
    cameras = {camera_of(photo.path): photo for photo in photos}
    if set(cameras) != {1, 2}:
        return reject("photo_cameras", "the photos are not one Main and one Qualifying")
    for photo in photos:
        if photo.size == 0:
            return reject("photo_empty", "the file is empty", photo.path)
        if photo.size > MAXIMUM_PHOTO_BYTES:
            return reject("photo_too_large", f"the file has {photo.size} bytes", photo.path)

    menu = _last(files, _MENU)
    receipt = _last(files, _RECEIPT)
    for document in (menu, receipt):
        if document is not None and document.size > MAXIMUM_DOCUMENT_BYTES:
            return reject("json_too_large", f"the file has {document.size} bytes", document.path)
    return Recognition(folder.recognition_id, (cameras[1], cameras[2]), menu, receipt, _captured_on(cameras[1].path))


def modified(facts: os.stat_result) -> int:
    """Return the time of the last change in ns since 1970, as far as a bigint goes."""
    return max(-MAXIMUM_BIGINT, min(MAXIMUM_BIGINT, facts.st_mtime_ns))


def _list(source: Path, folder: str) -> tuple[list[File], set[str]]:
    """Return the files of a folder and the names of the folders in it, without those that begin with a dot."""
    files, folders = [], set()
    with os.scandir(source / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                facts = entry.stat()
            except FileNotFoundError:
                continue  # a link that leads nowhere, or a file that vanished
            if stat.S_ISREG(facts.st_mode):
                files.append(File(f"{folder}/{entry.name}", facts.st_size, modified(facts)))
            elif stat.S_ISDIR(facts.st_mode):
                folders.add(entry.name)
    return files, folders


def camera_of(path: str) -> int | None:
    """Return the camera that a photo's name tells, 1 for Main and 2 for Qualifying; None when it tells none or both."""
    name = path.rsplit("/", 1)[-1].lower()
    if ("main" in name) == ("qualifying" in name):
        return None
    return 1 if "main" in name else 2


def _last(files: list[File], pattern: re.Pattern[str]) -> File | None:
    """Return the file that sorts last, as with exports."""
    named = [file for file in files if pattern.fullmatch(file.path.rsplit("/", 1)[-1])]
    return max(named, key=lambda file: file.path, default=None)


def _captured_on(path: str) -> date | None:
    for match in _DATE.finditer(path.rsplit("/", 1)[-1]):
        try:
            return date(*map(int, match.groups()))
        except ValueError:
            continue
    return None


def _one_at_a_time(check: Callable[[bytes], str]) -> Callable[[bytes], str]:
    """Let no two documents be parsed at once: their values take many times the bytes of the file."""

    @functools.wraps(check)
    def wrapped(content: bytes) -> str:
        with _parsing:
            return check(content)

    return wrapped


@_one_at_a_time
def check_menu(content: bytes) -> str:
    """Return the JSON text of a menu as it is in the file, when it is an array of entries that jsonb takes.

    Raises:
        BadInput: json_broken, json_nul or json_shape.
    """
    text, menu = _parse(content)
    if not isinstance(menu, list):
        raise BadInput("json_shape", "the menu is not an array")
    for number, entry in enumerate(menu, 1):
        where = f"entry {number} of the menu"
        if not isinstance(entry, dict):
            raise BadInput("json_shape", f"{where} is not an object")
        _require_id(entry, where)
        if not isinstance(entry.get("Name"), str):
            raise BadInput("json_shape", f"{where} has no Name")
        for field in ("Category", "Price"):
            if isinstance(entry.get(field), (dict, list)):
                raise BadInput("json_shape", f"{where} has a {field} that is not a single value")
    return text


@_one_at_a_time
def check_receipt(content: bytes) -> str:
    """Return the JSON text of a receipt as it is in the file, when it is an array of lines that jsonb takes.

    Raises:
        BadInput: json_broken, json_nul, json_shape or receipt_count.
    """
    text, receipt = _parse(content)
    if not isinstance(receipt, list):
        raise BadInput("json_shape", "the receipt is not an array")
    items = 0
    for number, line in enumerate(receipt, 1):
        where = f"line {number} of the receipt"
        if not isinstance(line, dict):
            raise BadInput("json_shape", f"{where} is not an object")
        count = line.get("Count")
        if not isinstance(count, int) or isinstance(count, bool):
            raise BadInput("json_shape", f"{where} has no whole number as Count")
        if not 1 <= count <= MAXIMUM_COUNT:
            raise BadInput("receipt_count", f"{where} has a Count of {str(count)[:20]}")
        items += count
        if items > MAXIMUM_ITEMS:
            raise BadInput("receipt_count", f"the lines up to {number} of the receipt count {items} dishes")
        dishes = line.get("Dishes")
        if not isinstance(dishes, list) or not dishes:
            raise BadInput("json_shape", f"{where} has no Dishes")
        for dish in dishes:
            if not isinstance(dish, dict) or not isinstance(dish.get("Name"), str):
                raise BadInput("json_shape", f"{where} has a dish without Name")
            _require_id(dish, where)
    return text


def json_of(content: bytes) -> bytes:
    """Return the JSON of a document with the content of one that `check_menu` or `check_receipt` let pass."""
    return content.removeprefix(codecs.BOM_UTF8)


def _require_id(entry: dict[str, object], where: str) -> None:
    external_id = entry.get("ExternalId")
    if not isinstance(external_id, (str, int)) or isinstance(external_id, bool) or external_id == "":
        raise BadInput("json_shape", f"{where} has no ExternalId")
    if len(str(external_id)) > MAXIMUM_EXTERNAL_ID:
        raise BadInput("json_shape", f"{where} has an ExternalId of more than {MAXIMUM_EXTERNAL_ID} letters")


def _parse(content: bytes) -> tuple[str, object]:
    """Return the text and the value of a JSON document that jsonb takes as it is."""
    try:
        text = json_of(content).decode()
    except UnicodeDecodeError as exc:
        raise BadInput("json_broken", f"the file is not UTF-8 at byte {exc.start}") from exc
    try:
        value = json.loads(
            text, parse_constant=_no_constant, parse_float=_number, parse_int=_integer, object_pairs_hook=_object
        )
    except json.JSONDecodeError as exc:
        raise BadInput(
            "json_broken", f"the file is not JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}"
        ) from exc
    except RecursionError as exc:
        raise BadInput("json_shape", "the file is nested too deeply") from exc
    _require_jsonb(value, 0)
    return text, value


def _no_constant(name: str) -> NoReturn:
    raise BadInput("json_broken", f"the file is not JSON: {name}")


def _number(text: str) -> float:
    # numeric ends at 131,072 digits before and 16,383 after the point; no price comes near.
    exponent = _EXPONENT.search(text)
    if len(text) > 1000 or (exponent and len(exponent[1]) > 3):
        raise BadInput("json_shape", "a number is larger than the database takes")
    return float(text)


def _integer(text: str) -> int:
    if len(text) > 1000:
        raise BadInput("json_shape", "a number is larger than the database takes")
    return int(text)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        # jsonb keeps the last of two equal keys, but reads both.
        for _, hidden in pairs:
            _require_jsonb(hidden, 0)
    return value


def _require_jsonb(value: object, depth: int) -> None:
    """Raise on what JSON allows and jsonb refuses: NUL characters, half surrogate pairs; and on extreme nesting."""
    if depth > MAXIMUM_DEPTH:
        raise BadInput("json_shape", "the file is nested too deeply")
    if isinstance(value, str):
        if "\0" in value:
            raise BadInput("json_nul", "a string contains a NUL character")
        if not value.isascii() and not is_text(value):
            raise BadInput("json_broken", "a string contains half a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_jsonb(key, depth)
            _require_jsonb(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _require_jsonb(item, depth + 1)

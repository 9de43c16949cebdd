"""Broken and unusual input for sample datasets: one recognition of every kind that a load rejects or notices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES
from pipeline.sample.photo import as_png, without_decodable_data

BROKEN: dict[str, str] = {
    "photo_count_one": "one photo only",
    "photo_count_three": "three photos",
    "photo_cameras": "two photos, both of camera Main",
    "photo_empty": "a photo of 0 bytes",
    "photo_truncated": "a JPEG of which the second half is missing",
    "photo_garbage": "random bytes named .jpg",
    "photo_undecodable": "a JPEG with whole headers and garbage in its tables and picture",
    "photo_png": "a PNG named .jpg",
    "photo_arithmetic": "a JPEG whose header says that it is arithmetic-coded",
    "photo_dimensions": "a JPEG whose header says that it is 65,535 pixels wide and high",
    "photo_other": "a photo whose name has the number of another recognition",
    "menu_other": "AM.json whose name has the number of another recognition",
    "menu_broken": "AM.json ends in the middle",
    "menu_shape": "AM.json is an object, not an array",
    "menu_entry": "an entry of AM.json has no ExternalId",
    "menu_nul": "a string of AM.json contains the NUL character",
    "menu_utf8": "AM.json is not UTF-8",
    "menu_twice": "an entry of AM.json has the key Name twice",
    "menu_too_large": "AM.json has more than 3 MiB",
    "receipt_broken": "correct_dishes.json ends in the middle",
    "receipt_shape": "correct_dishes.json is an object, not an array",
    "receipt_count_zero": "a line of the receipt has Count 0",
    "receipt_count_text": 'a line of the receipt has Count "two"',
    "id_too_large": "a recognition number that no bigint can hold",
}

# What is unusual about recognitions that are loaded.
UNUSUAL: dict[str, str] = {
    "photo_no_end": "a JPEG without its end marker",
    "photo_trailing_bytes": "a JPEG that is followed by other bytes",
    "photo_padding": "a JPEG with zero bytes between its segments",
    "photo_header": "a JPEG of version 2 of JFIF",
    "photo_copy": "a third photo that is a copy by its name",
    "photo_date_unknown": "photos with a date of two-digit years in their names",
    "photo_date_unlikely": "photos with a date of 1970 in their names",
    "menu_single": "AM.json is one entry, not an array",
    "menu_price": "a Price of AM.json is no amount",
    "receipt_fraction": "a line of the receipt has Count 0.35",
    "menu_name": "AM.json has the name of a copy",
    "menu_copy": "another AM.json is in photos",
    "copy_incomplete": "a copy with one photo in the later export",
    "copy_beside": "two whole copies in the later export",
    "entry_special": "a link that leads nowhere",
    "entry_folder": "a folder of thumbnails",
    "entry_strays": "an archive, notes, and folders and a link in the later export that are not searched",
}
#: The export that has copies of unusual recognitions and what is not searched.
LATER = "export_20251025_090000"
#: Links of unusual recognitions, and where they lead; paths are relative to the folder of the recognition.
LINKS = {"entry_special": ("photos/till.log", "nowhere"), "entry_strays": (f"../../{LATER}/again", ".")}

TOO_LARGE = "99999999999999999999"


def spoil(kind: str, files: dict[str, bytes], main: str, menu: str, receipt: str) -> None:
    """Change the files of a recognition in the way of that kind, and in no other.

    Arguments:
        kind: a name of `BROKEN` or `UNUSUAL`.
        files: path to content, changed in place; `main`, `menu` and `receipt` are among its paths.
            New paths may lead out of the recognition's folder, into `LATER`.
    """
    if kind.startswith(("copy_", "entry_")):
        files.update(_beside(kind, files, main))
    elif kind == "menu_name":
        files["AM (1).json"] = files.pop(menu)
    elif kind == "menu_copy":
        files[f"photos/{menu}"] = files[menu]
    elif kind.startswith("photo_"):
        _spoil_photos(kind, files, main)
    elif kind == "menu_other":
        files[f"9{menu}"] = files.pop(menu)
    elif kind.startswith("menu_"):
        files[menu] = _spoil_menu(kind, files[menu])
    elif kind.startswith("receipt_"):
        files[receipt] = _spoil_receipt(kind, files[receipt])


def _spoil_photos(kind: str, files: dict[str, bytes], main: str) -> None:
    qualifying = main.replace("_Main.jpg", "_Qualifying.jpg")
    second = main.replace("_Main.jpg", "_1_Main.jpg")
    if kind == "photo_count_one":
        del files[qualifying]
    elif kind == "photo_count_three":
        files[second] = files[main]
    elif kind == "photo_cameras":
        files[second] = files.pop(qualifying)
    elif kind == "photo_copy":
        files[main.replace("_Main.jpg", "_Main (1).jpg")] = files[main]
    elif kind == "photo_other":
        files["recognition_9".join(main.rsplit("recognition_", 1))] = files.pop(main)
    elif kind in _DATES:
        for path in (main, qualifying):
            files[re.sub(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", _DATES[kind], path)] = files.pop(path)
    else:
        files[main] = _PHOTOS[kind](files[main])


def _beside(kind: str, files: dict[str, bytes], main: str) -> dict[str, bytes]:
    """Return what is in the folder of a recognition, or in the later export, besides the files of the recognition."""
    number, later = main.split("_")[1], f"../../{LATER}"
    if kind == "copy_incomplete":
        return {f"{later}/recognition_{number}/{main}": files[main]}
    if kind == "copy_beside":
        folders = (f"{later}/{number}", f"{later}/recognition_{number}")
        return {f"{folder}/{path}": content for folder in folders for path, content in files.items()}
    if kind == "entry_folder":
        return {"thumbs/Main.jpg": files[main]}
    if kind == "entry_strays":
        folders = (f"{later}/recognition_{number} (1)", f"{later}/export_20240101/recognition_{number}")
        return {
            "old.zip": b"PK\5\6" + bytes(18),
            "notes.txt": b"-",
            **{f"{one}/{main}": files[main] for one in folders},
        }
    return {}


def _too_large(content: bytes) -> bytes:
    start = content.index(_FRAME) + len(_FRAME)
    return content[:start] + b"\xff" * 4 + content[start + 4 :]


#: The marker of a baseline frame, its length with three components, and eight bits a sample.
_FRAME = b"\xff\xc0\0\x11\x08"
_PHOTOS: dict[str, Callable[[bytes], bytes]] = {
    "photo_empty": lambda content: b"",
    "photo_truncated": lambda content: content[: len(content) // 2],
    "photo_garbage": lambda content: b"\0" + Random("garbage").randbytes(len(content)),
    "photo_undecodable": without_decodable_data,
    "photo_png": as_png,
    "photo_arithmetic": lambda content: content.replace(_FRAME, b"\xff\xc9\0\x11\x08", 1),
    "photo_dimensions": _too_large,
    "photo_no_end": lambda content: content[:-2],
    "photo_trailing_bytes": lambda content: content + b"made by the till",
    "photo_padding": lambda content: content.replace(_FRAME, bytes(16) + _FRAME, 1),
    "photo_header": lambda content: content.replace(b"JFIF\0\1", b"JFIF\0\2", 1),
}
_DATES = {"photo_date_unknown": "11.10.25", "photo_date_unlikely": "1970-01-01"}


def _spoil_menu(kind: str, content: bytes) -> bytes:
    if kind == "menu_broken":
        # Cut behind a bracket, so that what is left is UTF-8 still.
        return content[: content.index(b"{", len(content) // 2) + 1]
    if kind == "menu_utf8":
        # 0xFF occurs nowhere in UTF-8.
        return content.replace(b'"Name": "', b'"Name": "\xff', 1)
    if kind == "menu_twice":
        return content.replace(b'"Name": "', b'"Name": "", "Name": "', 1)
    if kind == "menu_too_large":
        return content + b" " * MAXIMUM_DOCUMENT_BYTES
    entries: list[dict[str, Any]] = json.loads(content.decode("utf-8-sig"))
    if kind == "menu_shape":
        return _json({"Menu": entries})
    if kind == "menu_entry":
        del entries[1]["ExternalId"]
    elif kind == "menu_nul":
        entries[1]["Name"] += "\0"
    elif kind == "menu_single":
        return _json(entries[0])
    elif kind == "menu_price":
        entries[1]["Price"] = "по запросу"
    return _json(entries)


def _spoil_receipt(kind: str, content: bytes) -> bytes:
    if kind == "receipt_broken":
        return content[: content.rindex(b"{") + 1]
    lines: list[dict[str, Any]] = json.loads(content)
    if kind == "receipt_shape":
        return _json({"Lines": lines})
    lines[0]["Count"] = {"receipt_count_zero": 0, "receipt_count_text": "two", "receipt_fraction": 0.35}[kind]
    return _json(lines)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()

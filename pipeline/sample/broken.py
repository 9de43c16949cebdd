"""Broken input for sample datasets: one recognition, or one annotation, of every kind that a load has to reject."""

from __future__ import annotations

import json
from random import Random
from typing import Any

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
    "menu_broken": "AM.json ends in the middle",
    "menu_shape": "AM.json is an object, not an array",
    "menu_entry": "an entry of AM.json has no ExternalId",
    "menu_nul": "a string of AM.json contains the NUL character",
    "menu_utf8": "AM.json is not UTF-8",
    "receipt_broken": "correct_dishes.json ends in the middle",
    "receipt_shape": "correct_dishes.json is an object, not an array",
    "receipt_count_zero": "a line of the receipt has Count 0",
    "receipt_count_text": 'a line of the receipt has Count "two"',
    "id_too_large": "a recognition number that no bigint can hold",
}

# What is wrong in qwen_annotations.json. The first five are with the last good recognition, if there is one.
BROKEN_ANNOTATIONS: dict[str, str] = {
    "box_three_numbers": "a box of three numbers",
    "box_text": "a box that is a string",
    "box_inverted": "a box whose right edge is left of its left edge",
    "box_null": "a box with null for a number",
    "value_shape": "the value of a photo is an array, not an object",
    "key_without_camera": "a key that names neither Main nor Qualifying",
    "unknown_recognition": "a key that names a recognition that is not in the dataset",
}

TOO_LARGE = "99999999999999999999"

_BAD_BOXES: tuple[object, ...] = ([10, 20, 30], "10, 20, 60, 80", [60, 20, 10, 80], [10, 20, None, 80])


def spoil(kind: str, files: dict[str, bytes], main: str, menu: str, receipt: str) -> None:
    """Break the files of a recognition in the way of that kind, and in no other.

    Arguments:
        kind: a name of `BROKEN`.
        files: path to content, changed in place; `main`, `menu` and `receipt` are among its paths.
    """
    if kind.startswith("photo_"):
        _spoil_photos(kind, files, main)
    elif kind.startswith("menu_"):
        files[menu] = _spoil_menu(kind, files[menu])
    elif kind.startswith("receipt_"):
        files[receipt] = _spoil_receipt(kind, files[receipt])


def bad_detections() -> list[dict[str, object]]:
    """Return detections that are not usable, one for each kind of malformed box."""
    return [{"bbox_2d": box, "label": "dish_0"} for box in _BAD_BOXES]


def _spoil_photos(kind: str, files: dict[str, bytes], main: str) -> None:
    qualifying = main.replace("_Main.jpg", "_Qualifying.jpg")
    second = main.replace("_Main.jpg", "_1_Main.jpg")
    content = files[main]
    if kind == "photo_count_one":
        del files[qualifying]
    elif kind == "photo_count_three":
        files[second] = content
    elif kind == "photo_cameras":
        files[second] = files.pop(qualifying)
    elif kind == "photo_empty":
        files[main] = b""
    elif kind == "photo_truncated":
        files[main] = content[: len(content) // 2]
    elif kind == "photo_garbage":
        files[main] = b"\0" + Random("garbage").randbytes(len(content))
    elif kind == "photo_undecodable":
        files[main] = without_decodable_data(content)
    elif kind == "photo_png":
        files[main] = as_png(content)


def _spoil_menu(kind: str, content: bytes) -> bytes:
    if kind == "menu_broken":
        # Cut behind a bracket, so that what is left is UTF-8 still.
        return content[: content.index(b"{", len(content) // 2) + 1]
    if kind == "menu_utf8":
        # 0xFF occurs nowhere in UTF-8.
        return content.replace(b'"Name": "', b'"Name": "\xff', 1)
    entries: list[dict[str, Any]] = json.loads(content.decode("utf-8-sig"))
    if kind == "menu_shape":
        return _json({"Menu": entries})
    if kind == "menu_entry":
        del entries[1]["ExternalId"]
    elif kind == "menu_nul":
        entries[1]["Name"] += "\0"
    return _json(entries)


def _spoil_receipt(kind: str, content: bytes) -> bytes:
    if kind == "receipt_broken":
        return content[: content.rindex(b"{") + 1]
    lines: list[dict[str, Any]] = json.loads(content)
    if kind == "receipt_shape":
        return _json({"Lines": lines})
    lines[0]["Count"] = {"receipt_count_zero": 0, "receipt_count_text": "two"}[kind]
    return _json(lines)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()

"""Check menus and receipts: their JSON syntax, their structure, and the limits of jsonb."""

from __future__ import annotations

import codecs
import gc
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.dataset.kinds import JSON_ARRAY, JSON_OBJECT, kind_of
from pipeline.dataset.records import Deviation, is_text
from pipeline.errors import BadInput

MAXIMUM_COUNT = 1000
MAXIMUM_ITEMS = 10_000
#: Maximum characters of an ExternalId, since a B-tree entry has at most 2,704 bytes.
MAXIMUM_EXTERNAL_ID = 500
#: Maximum characters of a Name, which each item of a receipt line is stored with.
MAXIMUM_NAME = 1000
MAXIMUM_DEPTH = 100

#: Maximum characters of a value that a message shows.
_SHOWN = 60
#: A bracket or a string of valid JSON.
_TOKEN = re.compile(r'[][{}]|"[^"\\]*(?:\\.[^"\\]*)*"')
_EXPONENT = re.compile(r"[eE][+-]?0*([0-9]+)$")

# One document is parsed at a time, because parsed values take many times the size of the file.
_parsing = threading.Lock()


def check_menu(content: bytes) -> tuple[Deviation, ...]:
    """Check that a menu is an array of valid entries, and return what is unusual about it, each kind once.

    Raises BadInput json_broken, json_nul or json_shape.
    """
    found: dict[str, Deviation] = {}
    with _parsing:
        for where, entry in _parse(content, "menu", "entry", ("ExternalId", "Name"), found):
            _check_dish(entry, where)
            for field in ("Category", "Price"):
                if isinstance(entry.get(field), (dict, list)):
                    raise BadInput("json_shape", f"{where} has a {field} that is not a single value")
    return tuple(found.values())


def check_receipt(content: bytes) -> tuple[Deviation, ...]:
    """Check that a receipt is an array of valid lines; as for a menu, and BadInput receipt_count."""
    found: dict[str, Deviation] = {}
    items = 0
    with _parsing:
        for where, line in _parse(content, "receipt", "line", ("Count", "Dishes"), found):
            items += _check_count(line, where, found)
            if items > MAXIMUM_ITEMS:
                raise BadInput("receipt_count", f"the receipt has {items} dishes up to {where}")
            dishes = _field(line, "Dishes", (list, dict), where)
            if isinstance(dishes, dict):
                _add(found, Deviation("json_single_object", f"{where} has one object as Dishes, not an array"))
                dishes = [dishes]
            if not dishes:
                raise BadInput("json_shape", f"{where} has no dish")
            for number, dish in enumerate(dishes, 1):
                if not isinstance(dish, dict):
                    raise BadInput("json_shape", f"{where} has {_shown(dish)} as a dish, not an object")
                _check_dish(dish, f"dish {number} of {where}")
    return tuple(found.values())


def json_of(content: bytes) -> bytes:
    """Return the JSON of a checked document: its content without a byte order mark."""
    return content.removeprefix(codecs.BOM_UTF8)


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the object of these members (a hook of the JSON decoder); raise BadInput if a key is there twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadInput("json_broken", f"the key {_shown(key)[1:-1]} is there twice in one object")
    return value


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block: deep in a nested value, a finalizer that runs then would have no stack left."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _check_count(line: dict[str, object], where: str, found: dict[str, Deviation]) -> int:
    """Return the number of items of a receipt line: its Count, or one if that is the amount of weighed goods."""
    count = _field(line, "Count", (int, float), where)
    if not 0 < count <= MAXIMUM_COUNT:
        raise BadInput("receipt_count", f"{where} has a Count of {str(count)[:20]}")
    if count == int(count):
        return int(count)
    _add(found, Deviation("receipt_fraction", f"{where} has a Count of {count}: it is one item of that amount"))
    return 1


def _check_dish(entry: dict[str, object], where: str) -> None:
    """Check ExternalId and Name of an entry of a menu, or of a dish of a receipt."""
    external_id, name = _field(entry, "ExternalId", (str, int), where), _field(entry, "Name", (str,), where)
    if not str(external_id).strip():
        raise BadInput("json_shape", f"{where} has {_shown(external_id)} as ExternalId")
    for field, value, most in (("ExternalId", external_id, MAXIMUM_EXTERNAL_ID), ("Name", name, MAXIMUM_NAME)):
        if len(str(value)) > most:
            raise BadInput("json_shape", f"{where} has more than {most:,} characters as {field}")


def _field(entry: dict[str, object], name: str, kinds: tuple[type, ...], where: str) -> Any:
    """Return the value of a required field; raise BadInput json_shape if it is missing or of another type."""
    if name not in entry:
        raise BadInput("json_shape", f"{where} has no {name}; its fields are {_keys(entry)}")
    value = entry[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise BadInput("json_shape", f"{where} has {_shown(value)} as {name}")
    return value


def _keys(entry: dict[str, object]) -> str:
    return ", ".join(_shown(key)[1:-1] for key in list(entry)[:5]) or "none"


def _add(found: dict[str, Deviation], deviation: Deviation) -> None:
    found.setdefault(deviation.code, deviation)


def _shown(value: object) -> str:
    """Return a value as JSON on one line, shortened, without what a database cannot store."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…{text[-1]}"
    return text.encode(errors="replace").decode()


def _parse(
    content: bytes, document: str, part: str, fields: tuple[str, ...], found: dict[str, Deviation]
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the objects of a JSON array that jsonb accepts unchanged, each with its name for errors.

    One object with these fields, which some tools write for an array of one, is added to what was found and yielded.
    """
    try:
        text = json_of(content).decode()
        numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _number, "parse_int": _number}
        with uncollected():
            value = json.loads(text, object_pairs_hook=unique_keys, **numbers)
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        kind = kind_of(content)
        if kind in ("", JSON_ARRAY, JSON_OBJECT):
            kind = f"no JSON, or cut: {exc}"
            if isinstance(exc, UnicodeDecodeError):
                kind = f"not UTF-8, or cut (byte {exc.start + 1})"
        raise BadInput("json_broken", f"the file is {kind}") from exc
    except RecursionError as exc:
        raise BadInput("json_shape", "the file is nested too deeply") from exc
    _require_jsonb(text)
    if isinstance(value, dict) and all(field in value for field in fields):
        _add(found, Deviation("json_single_object", f"the {document} is one object, not an array"))
        value = [value]
    if isinstance(value, dict):
        raise BadInput("json_shape", f"the {document} is an object, not an array; its fields are {_keys(value)}")
    if not isinstance(value, list):
        raise BadInput("json_shape", f"the {document} is {_shown(value)}, not an array")
    for number, entry in enumerate(value, 1):
        where = f"{part} {number} of the {document}"
        if not isinstance(entry, dict):
            raise BadInput("json_shape", f"{where} is {_shown(entry)}, not an object")
        yield where, entry


def _no_constant(name: str) -> NoReturn:
    raise BadInput("json_broken", f"the file contains {name}, which is not JSON")


def _number(text: str) -> float:
    # jsonb stores all digits that an exponent stands for, and readers use 64-bit floats.
    exponent = _EXPONENT.search(text)
    value = float(text)
    if len(text) > 1000 or (exponent and len(exponent[1]) > 2) or math.isinf(value):
        shown = text if len(text) <= 20 else f"{text[:20]}…"
        raise BadInput("json_shape", f"the number {shown} is too large or has too many digits")
    return int(text) if text.removeprefix("-").isdigit() else value


def _require_jsonb(text: str) -> None:
    """Raise BadInput on what JSON allows and jsonb rejects: NUL characters, half surrogate pairs, deep nesting."""
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in "[{") - (token in "]}")
        if depth > MAXIMUM_DEPTH:
            raise BadInput("json_shape", "the file is nested too deeply")
        string = json.loads(token) if "\\u" in token else ""
        if "\0" in string:
            raise BadInput("json_nul", "a string contains a NUL character")
        if not is_text(string):
            raise BadInput("json_broken", "a string contains half a surrogate pair")

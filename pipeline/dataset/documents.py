"""Check menus and receipts: their JSON syntax, their structure, and the limits of jsonb."""

from __future__ import annotations

import codecs
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import NoReturn

from pipeline.dataset.kinds import JSON_ARRAY, JSON_OBJECT, kind_of
from pipeline.dataset.prices import is_price
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
    found: list[Deviation] = []
    with _parsing:
        for where, entry in _parse(content, "menu", "entry", ("ExternalId", "Name"), found):
            _check_dish(entry, where, found)
            for field in ("Category", "Price"):
                if isinstance(entry.get(field), (dict, list)):
                    raise BadInput("json_shape", f"{where} has a {field} that is not a single value")
                other = _spelled(entry, field)
                if other is not None:
                    found.append(Deviation("json_field", f"{where} has the field {other}, which is not {field}"))
            price = entry.get("Price")
            if price is not None and not is_price(price):
                found.append(Deviation("price_unknown", f"{where} has the Price {_shown(price)}, which is no amount"))
    return _merged(found)


def check_receipt(content: bytes) -> tuple[Deviation, ...]:
    """Check that a receipt is an array of valid lines; as for a menu, and BadInput receipt_count."""
    found: list[Deviation] = []
    items = 0
    with _parsing:
        for where, line in _parse(content, "receipt", "line", ("Count", "Dishes"), found):
            items += _check_count(line, where, found)
            if items > MAXIMUM_ITEMS:
                raise BadInput("receipt_count", f"the receipt has {items} dishes up to {where}")
            dishes = line.get("Dishes")
            if isinstance(dishes, dict):
                found.append(Deviation("json_single_object", f"{where} has one object as Dishes, not an array"))
                dishes = [dishes]
            if not isinstance(dishes, list) or not dishes:
                raise _unusable(line, "Dishes", where)
            for number, dish in enumerate(dishes, 1):
                if not isinstance(dish, dict):
                    raise BadInput("json_shape", f"{where} has {_shown(dish)} as a dish, not an object")
                what = f"dish {number} of {where}"
                _check_dish(dish, what, found)
    return _merged(found)


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


def _check_count(line: dict[str, object], where: str, found: list[Deviation]) -> int:
    """Return the number of items of a receipt line: its Count, or one if that is the amount of weighed goods."""
    count = line.get("Count")
    if not isinstance(count, (int, float)) or isinstance(count, bool):
        raise _unusable(line, "Count", where)
    if not 0 < count <= MAXIMUM_COUNT:
        raise BadInput("receipt_count", f"{where} has a Count of {str(count)[:20]}")
    if count == int(count):
        return int(count)
    found.append(Deviation("receipt_fraction", f"{where} has a Count of {count}: it is one item of that amount"))
    return 1


def _check_dish(entry: dict[str, object], where: str, found: list[Deviation]) -> None:
    """Check ExternalId and Name of an entry of a menu, or of a dish of a receipt."""
    name = entry.get("Name")
    if not isinstance(name, str):
        raise _unusable(entry, "Name", where)
    if len(name) > MAXIMUM_NAME:
        raise BadInput("json_shape", f"{where} has a Name of more than {MAXIMUM_NAME:,} characters")
    external_id = entry.get("ExternalId")
    if not isinstance(external_id, (str, int)) or isinstance(external_id, bool) or not str(external_id).strip():
        raise _unusable(entry, "ExternalId", where)
    if len(str(external_id)) > MAXIMUM_EXTERNAL_ID:
        raise BadInput("json_shape", f"{where} has an ExternalId of more than {MAXIMUM_EXTERNAL_ID} characters")
    if isinstance(external_id, str) and external_id != external_id.strip():
        message = f"{where} has the ExternalId {_shown(external_id)}, and its spaces are kept"
        found.append(Deviation("json_id_spaces", message))


def _unusable(entry: dict[str, object], field: str, where: str) -> BadInput:
    """Return the error that says what an object has in place of a usable field."""
    if field in entry:
        return BadInput("json_shape", f"{where} has {_shown(entry[field])} as {field}")
    other = _spelled(entry, field)
    if other is not None:
        return BadInput("json_shape", f"{where} has the field {other}, which is not {field}")
    return BadInput("json_shape", f"{where} has no {field}")


def _spelled(entry: dict[str, object], field: str) -> str | None:
    """Return a key that differs from a missing field in letter case, spaces, dashes or underscores only."""
    if field in entry:
        return None
    keys = (key for key in entry if re.sub(r"[\s_-]", "", key).casefold() == field.casefold())
    return next((_shown(key)[1:-1] for key in keys), None)


def _shown(value: object) -> str:
    """Return a value as JSON on one line, shortened, without what a database cannot store."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…{text[-1]}"
    return text.encode(errors="replace").decode()


def _merged(found: list[Deviation]) -> tuple[Deviation, ...]:
    """Return the first deviation of each kind, with the number of the others."""
    counts = Counter(one.code for one in found)
    first = {one.code: one for one in reversed(found)}
    return tuple(
        one if counts[code] == 1 else one._replace(message=f"{one.message} (and {counts[code] - 1} more)")
        for code, one in first.items()
    )


def _parse(
    content: bytes, document: str, part: str, fields: tuple[str, ...], found: list[Deviation]
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the objects of a JSON array that jsonb accepts unchanged, each with its name for errors.

    One object with these fields, which some tools write for an array of one, is added to what was found and yielded.
    """
    try:
        text = json_of(content).decode()
        value = json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_float=_number, parse_int=_number
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        kind = kind_of(content)
        what = f"no JSON, or cut: {exc}" if kind in ("", JSON_ARRAY, JSON_OBJECT) else kind
        raise BadInput("json_broken", f"the file is {what}") from exc
    except RecursionError as exc:
        raise BadInput("json_shape", "the file is nested too deeply") from exc
    _require_jsonb(text)
    if isinstance(value, dict) and all(field in value for field in fields):
        found.append(Deviation("json_single_object", f"the {document} is one object, not an array"))
        value = [value]
    if isinstance(value, dict):
        held = ", ".join(_shown(key)[1:-1] for key in list(value)[:5]) or "no fields"
        raise BadInput("json_shape", f"the {document} is an object ({held}), not an array")
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

"""Check menus and receipts: their JSON syntax, their structure, and the limits of jsonb."""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Iterator
from typing import NoReturn

from pipeline.dataset.records import is_text
from pipeline.errors import BadInput

MAXIMUM_COUNT = 1000
MAXIMUM_ITEMS = 10_000
#: Maximum characters of an ExternalId, since a B-tree entry has at most 2,704 bytes.
MAXIMUM_EXTERNAL_ID = 500
MAXIMUM_DEPTH = 100

#: A bracket or a string of valid JSON.
_TOKEN = re.compile(r'[][{}]|"[^"\\]*(?:\\.[^"\\]*)*"')
_EXPONENT = re.compile(r"[eE][+-]?0*([0-9]+)$")

# One document is parsed at a time, because parsed values take many times the size of the file.
_parsing = threading.Lock()


def check_menu(content: bytes) -> None:
    """Raise BadInput unless a menu is an array of valid entries: json_broken, json_nul or json_shape."""
    with _parsing:
        for where, entry in _parse(content, "menu", "entry"):
            _require_id(entry, where)
            if not isinstance(entry.get("Name"), str):
                raise BadInput("json_shape", f"{where} has no Name")
            for field in ("Category", "Price"):
                if isinstance(entry.get(field), (dict, list)):
                    raise BadInput("json_shape", f"{where} has a {field} that is not a single value")


def check_receipt(content: bytes) -> None:
    """Raise BadInput unless a receipt is an array of valid lines: as for a menu, or receipt_count."""
    items = 0
    with _parsing:
        for where, line in _parse(content, "receipt", "line"):
            count = line.get("Count")
            if not isinstance(count, int) or isinstance(count, bool):
                raise BadInput("json_shape", f"{where} has no whole number as Count")
            if not 1 <= count <= MAXIMUM_COUNT:
                raise BadInput("receipt_count", f"{where} has a Count of {str(count)[:20]}")
            items += count
            if items > MAXIMUM_ITEMS:
                raise BadInput("receipt_count", f"the receipt has {items} dishes up to {where}")
            dishes = line.get("Dishes")
            if not isinstance(dishes, list) or not dishes:
                raise BadInput("json_shape", f"{where} has no Dishes")
            for dish in dishes:
                if not isinstance(dish, dict) or not isinstance(dish.get("Name"), str):
                    raise BadInput("json_shape", f"{where} has a dish without Name")
                _require_id(dish, where)


def json_of(content: bytes) -> bytes:
    """Return the JSON of a checked document: its content without a byte order mark."""
    return content.removeprefix(codecs.BOM_UTF8)


def _require_id(entry: dict[str, object], where: str) -> None:
    external_id = entry.get("ExternalId")
    if not isinstance(external_id, (str, int)) or isinstance(external_id, bool) or external_id == "":
        raise BadInput("json_shape", f"{where} has no ExternalId")
    if len(str(external_id)) > MAXIMUM_EXTERNAL_ID:
        raise BadInput("json_shape", f"{where} has an ExternalId of more than {MAXIMUM_EXTERNAL_ID} characters")


def _parse(content: bytes, document: str, part: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the objects of a JSON array that jsonb accepts unchanged, each with its name for errors."""
    try:
        text = json_of(content).decode()
        value = json.loads(text, parse_constant=_no_constant, parse_float=_number, parse_int=_number)
    except UnicodeDecodeError as exc:
        raise BadInput("json_broken", f"the file is not UTF-8 at byte {exc.start}") from exc
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno}, column {exc.colno}"
        raise BadInput("json_broken", f"the file is not JSON at {where}: {exc.msg}") from exc
    except RecursionError as exc:
        raise BadInput("json_shape", "the file is nested too deeply") from exc
    _require_jsonb(text)
    if not isinstance(value, list):
        raise BadInput("json_shape", f"the {document} is not an array")
    for number, entry in enumerate(value, 1):
        where = f"{part} {number} of the {document}"
        if not isinstance(entry, dict):
            raise BadInput("json_shape", f"{where} is not an object")
        yield where, entry


def _no_constant(name: str) -> NoReturn:
    raise BadInput("json_broken", f"the file is not JSON: {name}")


def _number(text: str) -> float:
    # PostgreSQL's numeric has at most 131,072 digits before and 16,383 after the point.
    exponent = _EXPONENT.search(text)
    if len(text) > 1000 or (exponent and len(exponent[1]) > 3):
        raise BadInput("json_shape", "a number is too large for the database")
    return int(text) if text.removeprefix("-").isdigit() else float(text)


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

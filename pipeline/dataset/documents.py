"""Check menus and receipts: their JSON syntax, their structure, and the limits of jsonb."""

from __future__ import annotations

import codecs
import functools
import json
import re
import threading
from collections.abc import Callable
from typing import NoReturn

from pipeline.dataset.records import is_text
from pipeline.errors import BadInput

MAXIMUM_COUNT = 1000
MAXIMUM_ITEMS = 10_000
#: Maximum characters of an ExternalId, since a B-tree entry has at most 2,704 bytes.
MAXIMUM_EXTERNAL_ID = 500
MAXIMUM_DEPTH = 100

_parsing = threading.Lock()

_EXPONENT = re.compile(r"[eE][+-]?0*([0-9]+)$")


def _one_at_a_time(check: Callable[[bytes], str]) -> Callable[[bytes], str]:
    """Serialise calls to bound memory: parsed values take many times the size of the file."""

    @functools.wraps(check)
    def wrapped(content: bytes) -> str:
        with _parsing:
            return check(content)

    return wrapped


@_one_at_a_time
def check_menu(content: bytes) -> str:
    """Return the JSON text of a menu if it is an array of valid entries that jsonb accepts.

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
    """Return the JSON text of a receipt if it is an array of valid lines that jsonb accepts.

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
    """Return the JSON of a checked document: its content without a byte order mark."""
    return content.removeprefix(codecs.BOM_UTF8)


def _require_id(entry: dict[str, object], where: str) -> None:
    external_id = entry.get("ExternalId")
    if not isinstance(external_id, (str, int)) or isinstance(external_id, bool) or external_id == "":
        raise BadInput("json_shape", f"{where} has no ExternalId")
    if len(str(external_id)) > MAXIMUM_EXTERNAL_ID:
        raise BadInput("json_shape", f"{where} has an ExternalId of more than {MAXIMUM_EXTERNAL_ID} characters")


def _parse(content: bytes) -> tuple[str, object]:
    """Return the text and the value of a JSON document that jsonb accepts unchanged."""
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
    # PostgreSQL's numeric has at most 131,072 digits before and 16,383 after the point.
    exponent = _EXPONENT.search(text)
    if len(text) > 1000 or (exponent and len(exponent[1]) > 3):
        raise BadInput("json_shape", "a number is too large for the database")
    return float(text)


def _integer(text: str) -> int:
    if len(text) > 1000:
        raise BadInput("json_shape", "a number is too large for the database")
    return int(text)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        # jsonb keeps the last of two equal keys, but parses both.
        for _, hidden in pairs:
            _require_jsonb(hidden, 0)
    return value


def _require_jsonb(value: object, depth: int) -> None:
    """Raise BadInput on what JSON allows and jsonb rejects: NUL characters, half surrogate pairs, deep nesting."""
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

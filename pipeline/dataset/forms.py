"""Forms in which tools write annotations besides one plain JSON object, each announced once where it was read."""

from __future__ import annotations

import codecs
import json
import re
import string

from pipeline.dataset.documents import unique_keys
from pipeline.dataset.jpeg import kind_of
from pipeline.dataset.records import Deviation

GZIP = Deviation("annotations_gzip", "the file is compressed with gzip")
FENCED = Deviation("annotations_fenced", "JSON is in a block of Markdown, between lines of ```")
LINES = Deviation("annotations_jsonl", "the file has one JSON object on each line")
NESTED = Deviation("annotations_nested_text", "JSON is in strings, as text")

_FENCE = "```"
_TABLE = re.compile(rb"[^\n{}\[\]]*[,;\t][^\n{}\[\]]*\n")


def unwrapped(value: object, forms: set[Deviation]) -> object:
    """Return the object or array that a string contains as JSON, any other value as it is; add its form to `forms`.

    Raises BadInput json_broken if a key is there twice in one object.
    """
    if not isinstance(value, str):
        return value
    text, form = value.strip(), NESTED
    if len(text) > 2 * len(_FENCE) and text.startswith(_FENCE) and text.endswith(_FENCE):
        text, form = text.strip("`").lstrip(string.ascii_letters).strip(), FENCED
    if not text.startswith(("{", "[")):
        return value
    try:
        found: object = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return value
    forms.add(form)
    return found


def what_it_is(head: bytes) -> str:
    """Return what a file is that is no JSON object, by its first bytes: a noun phrase, or empty if that is unknown."""
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "filled with zero bytes"
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        return f"{encoding[:6].upper()} text, not UTF-8"
    if head.startswith(codecs.BOM_UTF8 * 2):
        return "text with two byte order marks"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        return "nothing but white space"
    kind = kind_of(head)
    if kind not in ("not a JPEG", "a JSON document"):
        return kind
    if head.startswith(b"\xff\xd8"):
        return "a JPEG image"
    if text.startswith(b"["):
        return "a JSON array"
    if b"```" in text and not text.startswith((b"```", b"{")):
        return "text around a block of Markdown, which has to be removed"
    return "a table of text (CSV)" if _TABLE.match(text) else ""

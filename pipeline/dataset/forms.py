"""Forms in which tools write annotations besides one plain JSON object, each announced once where it was read."""

from __future__ import annotations

import json
import string

from pipeline.dataset.documents import uncollected, unique_keys
from pipeline.dataset.records import Deviation

GZIP = Deviation("annotations_gzip", "the file is compressed with gzip")
FENCED = Deviation("annotations_fenced", "JSON is in a block of Markdown, between lines of ```")
LINES = Deviation("annotations_jsonl", "the file has one JSON object on each line")
NESTED = Deviation("annotations_nested_text", "JSON is in strings, as text")

_FENCE = "```"


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
        with uncollected():
            found: object = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return value
    forms.add(form)
    return found

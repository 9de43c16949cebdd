"""Validation and parsing of the names, limits and fields in requests."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from embedded_supabase.storage.errors import (
    ApiError,
    invalid_bucket_name,
    invalid_key,
    invalid_mime_type,
    schema,
    too_large,
)
from embedded_supabase.storage.records import Bucket

#: Maximum size of an object, as set by `supabase start`: 50 MiB.
GLOBAL_LIMIT = 50 << 20

_LEGAL = r"A-Za-z0-9_!.*'()&$@=;:+,? \-"
_KEY = re.compile(rf"[{_LEGAL}/]+", re.ASCII)
_BUCKET = re.compile(rf"[{_LEGAL}]{{1,100}}", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", re.IGNORECASE | re.ASCII)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"
#: Characters that a header cannot contain (RFC 9110, 5.5).
_NO_HEADER_TEXT = re.compile(r"[^\t\x20-\x7e\xa0-\xff]")
_MIME_PATTERN = re.compile(rf"({_TOKEN}/({_TOKEN}|\*)|\*)")
_CONTENT_TYPE = re.compile(rf"\s*{_TOKEN}/{_TOKEN}\s*(;.*)?", re.DOTALL)


def check_key(key: str) -> str:
    """Return a valid key.

    Raises:
        ApiError: the key contains other characters than the API allows, or a segment `.` or `..`.
    """
    if not _KEY.fullmatch(key):
        raise invalid_key(key)
    if {".", ".."}.intersection(key.split("/")):
        raise invalid_key(key, " contains dot path segment")
    return key


def check_bucket_name(name: str) -> str:
    """Return a valid name for a new bucket.

    Raises:
        ApiError: the API does not allow the name.
    """
    if not _BUCKET.fullmatch(name) or name != name.strip(" ") or name.endswith("--table-s3"):
        raise invalid_bucket_name()
    return name


def check_content_type(text: str) -> str:
    """Return a valid content type.

    Raises:
        ApiError: it is not of the form type/subtype.
    """
    if not _CONTENT_TYPE.fullmatch(text) or _NO_HEADER_TEXT.search(text):
        raise ApiError(415, "invalid_mime_type", "Invalid Content-Type header", "InvalidMimeType")
    return text


def check_mime_type(bucket: Bucket, mime_type: str) -> None:
    """Raise ApiError unless the bucket allows the type."""
    allowed = bucket.allowed_mime_types
    if not allowed:
        return
    kind, _, subtype = mime_type.partition("/")
    for pattern in allowed:
        wanted, _, detail = pattern.partition("/")
        if kind == wanted and detail in ("*", subtype):
            return
    raise invalid_mime_type(mime_type)


def size_limit(bucket: Bucket) -> int:
    """Return the maximum size of an object in a bucket, in bytes."""
    return GLOBAL_LIMIT if bucket.file_size_limit is None else min(GLOBAL_LIMIT, bucket.file_size_limit)


def file_size_limit(value: Any) -> int | None:
    """Return a limit in bytes from a number or a text such as 1.5MB.

    Raises:
        ApiError: it is neither, or exceeds the server's own limit.
    """
    if value is None:
        return None
    match = _SIZE.fullmatch(str(value))
    if match is None:
        raise schema("body/file_size_limit must be a number of bytes or a text such as 1.5MB")
    size = float(match[1]) * _UNITS[(match[2] or "B").upper()]
    if size > GLOBAL_LIMIT:
        raise too_large()
    return int(size)


def allowed_mime_types(value: Any) -> list[str] | None:
    """Return a list of allowed types.

    Raises:
        ApiError: it is not a list, or an entry is not of the form type/subtype or type/*.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        raise schema("body/allowed_mime_types must be array")
    for entry in value:
        if not isinstance(entry, str) or not _MIME_PATTERN.fullmatch(entry):
            raise invalid_mime_type(str(entry))
    return list(value)


def parse_boolean(value: Any, name: str) -> bool:
    """Return a boolean; true, false, 1, 0 and the texts "true" and "false" are accepted.

    Raises:
        ApiError: the value is something else.
    """
    if value in (True, "true"):
        return True
    if value in (False, "false"):
        return False
    raise schema(f"body/{name} must be boolean")


def parse_integer(value: Any, name: str, least: int, default: int) -> int:
    """Return an integer from a number or a text, `default` for None.

    Raises:
        ApiError: the value is not an integer, or less than `least`.
    """
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise schema(f"{name} must be integer") from exc
    if isinstance(value, float) and value != number:
        raise schema(f"{name} must be integer")
    if number < least:
        raise schema(f"{name} must be >= {least}")
    return number


def text_field(body: dict[str, Any], name: str, default: str | None = None) -> str:
    """Return a member as text; numbers and booleans are converted, null is the empty text.

    Raises:
        ApiError: it is missing and there is no default, or it is a list or an object.
    """
    if name not in body:
        if default is not None:
            return default
        raise schema(f"body must have required property '{name}'")
    value = body[name]
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        raise schema(f"body/{name} must be string")
    text = value if isinstance(value, str) else json.dumps(value)
    if not is_unicode(text):
        raise schema(f"body/{name} must be string")
    return text


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; JSON allows lone surrogates, which cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def header_text(text: str) -> str:
    """Return the text with every character that a header cannot contain replaced by a question mark."""
    return _NO_HEADER_TEXT.sub("?", text)


def header_metadata(text: str) -> dict[str, Any]:
    """Return the base64-encoded JSON object in x-metadata; a malformed value is ignored, as the API does."""
    if not text:
        return {}
    try:
        value = json.loads(base64.b64decode(text, validate=True), parse_constant=_reject_constant)
    except (binascii.Error, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def form_metadata(text: str) -> dict[str, Any]:
    """Return the JSON object in a form field; malformed JSON is ignored, as the API does.

    Raises:
        ApiError: the value is JSON but not an object.
    """
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        raise ApiError(400, "Error", "invalid input syntax for type json", "InvalidRequest")
    return value


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

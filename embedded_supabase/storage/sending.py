"""Send an object or a range of it."""

from __future__ import annotations

import email.utils
import errno
import re
from datetime import datetime, timezone
from urllib.parse import quote

import tornado.httputil
import tornado.iostream

from embedded_supabase.storage.errors import ApiError
from embedded_supabase.storage.handler import Handler
from embedded_supabase.storage.records import Object
from embedded_supabase.storage.requests import header_text

CHUNK = 256 << 10


async def send(handler: Handler, found: Object) -> None:
    """Send an object, or the requested range of it (RFC 9110)."""
    headers = handler.request.headers
    modified = datetime.fromisoformat(found.updated_at.replace("Z", "+00:00"))
    mimetype = re.sub("^text/html", "text/plain", found.mimetype, flags=re.IGNORECASE)
    handler.set_header("ETag", f'"{found.etag}"')
    handler.set_header("Last-Modified", email.utils.format_datetime(modified.astimezone(timezone.utc), usegmt=True))
    handler.set_header("Cache-Control", header_text(found.cache_control))
    handler.set_header("Accept-Ranges", "bytes")
    handler.set_header("X-Robots-Tag", "none")
    if _is_not_modified(headers, found, modified):
        handler.clear_header("Content-Type")
        handler.set_status(304)
        return
    handler.set_header("Content-Type", header_text(mimetype))
    if (name := handler.get_query_argument("download", None)) is not None:
        attachment = f"; filename*=UTF-8''{quote(name, safe='')}" if name else ""
        handler.set_header("Content-Disposition", f"attachment{attachment}")
    first, last = 0, found.size - 1
    if "Range" in headers and handler.request.method == "GET":
        first, last = _range(headers["Range"], found.size)
        handler.set_status(206)
        handler.set_header("Content-Range", f"bytes {first}-{last}/{found.size}")
    handler.set_header("Content-Length", str(last - first + 1))
    if handler.request.method == "HEAD":
        return
    with open(handler.store.content_path(found), "rb") as file:
        file.seek(first)
        remaining = last - first + 1
        while remaining:
            chunk = file.read(min(CHUNK, remaining))
            if not chunk:
                raise OSError(errno.EIO, "the file of the object is shorter than its size in the index")
            remaining -= len(chunk)
            handler.write(chunk)
            try:
                await handler.flush()
            except tornado.iostream.StreamClosedError:
                return  # the client closed the connection


def _is_not_modified(headers: tornado.httputil.HTTPHeaders, found: Object, modified: datetime) -> bool:
    if "If-None-Match" in headers:
        known = [tag.strip().removeprefix("W/") for tag in headers["If-None-Match"].split(",")]
        return f'"{found.etag}"' in known or "*" in known
    try:
        since = email.utils.parsedate_to_datetime(headers["If-Modified-Since"])
        return int(modified.timestamp()) <= since.timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return False  # an invalid date is ignored


def _range(text: str, size: int) -> tuple[int, int]:
    """Return the first and last byte of a range.

    Raises:
        ApiError: the range is malformed, there is more than one, or it begins after the end.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.strip(), re.ASCII)
    if match is not None and (match[1] or match[2]):
        first = int(match[1]) if match[1] else max(0, size - int(match[2]))
        last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
        if first <= last:
            return first, last
    raise ApiError(416, "invalid_range", "The requested range is not satisfiable", "InvalidRange", http=416)

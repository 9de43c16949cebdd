"""A client of Supabase Storage: objects, the bucket, and retries."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timezone
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import backoff
from dateutil.parser import isoparse
from urllib3.response import BaseHTTPResponse as Response

from pipeline.config import Settings
from pipeline.errors import (
    AccessDenied,
    Interrupted,
    ObjectExists,
    ObjectNotFound,
    PipelineError,
    SettingsError,
    StorageError,
    StorageOverloaded,
    StorageUnavailable,
)
from pipeline.observe.metrics import Metrics
from pipeline.storage.errors import JSON_LIMIT, error_of, json_of, read_up_to
from pipeline.storage.key import restricted_role
from pipeline.storage.limiter import ConcurrencyLimiter
from pipeline.storage.transport import Transport

logger = logging.getLogger(__name__)

#: The API's limit of keys in a bulk delete and of entries in a page of a list.
PAGE = 1000
#: Bytes of a response about a page of objects, and pages of a list.
_PAGE_LIMIT, _MOST_PAGES = 1 << 22, 20_000
#: Seconds: the maximum of our own waits, and of an operation from which no attempt begins any more.
_LONGEST_WAIT, OPERATION_TIMEOUT = 30.0, 600.0
#: Additional attempts after an overload, compared with other transient errors.
_OVERLOAD_TRIES = 6

_MD5 = re.compile("[0-9a-f]{32}")
_PHOTO_TYPE = "image/jpeg"
_FORMAT_HINT = "Check NEXT_PUBLIC_SUPABASE_URL, and what is between this machine and Storage."

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class StoredObject:
    """An object in the bucket: its key, its size in bytes, and its MD5 if the ETag is one."""

    key: str
    size: int
    md5: str | None


def _digest_of(response: Response, most: int) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for chunk in response.stream(1 << 16):
        size += len(chunk)
        digest.update(chunk)
        if size > most:
            break
    return size, digest.hexdigest()


class Storage:
    """A client for one bucket, by default that of the settings; a batch keeps the one that is on record."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None, bucket: str | None = None) -> None:
        self._settings = settings
        self.bucket = bucket or settings.bucket
        self._metrics = metrics or Metrics()
        self.threads = settings.tuning.thread_count
        self._transport = Transport(settings, self.threads)
        self.proxied = self._transport.proxied
        self._stopped = threading.Event()
        self.limiter = ConcurrencyLimiter(self.threads)
        self._tries, self._base = settings.tuning.retry_max_attempts + 1, settings.tuning.retry_backoff_factor

    def part(self, metrics: Metrics) -> Storage:
        """Return a client with the same connections and limiter, but its own metrics and its own `stop`."""
        other = copy.copy(self)
        other._metrics, other._stopped = metrics, threading.Event()
        return other

    def upload(self, key: str, content: bytes) -> None:
        """Store an object under a key; replace an existing one."""
        headers = {"Content-Type": _PHOTO_TYPE, "x-upsert": "true", "Cache-Control": "max-age=3600"}
        with self._metrics.timed("storage_upload"):
            stored = self._send("POST", self._path("/object", key), content, headers)
        name = stored.get("Key") if isinstance(stored, dict) else None
        if name != f"{self.bucket}/{key}":
            raise StorageError(f"Storage stored {key} under another key, {str(name)[:200]!r}.")
        self._metrics.count("bytes_uploaded", len(content))
        self._metrics.count("objects_uploaded")

    def copy(self, source: str, key: str) -> None:
        """Store the content of one object under another key as well; replace an existing one. Raises ObjectNotFound."""
        body = {"bucketId": self.bucket, "sourceKey": source, "destinationKey": key}
        with self._metrics.timed("storage_copy"):
            self._send("POST", "/object/copy", body, {"x-upsert": "true"})
        self._metrics.count("objects_copied")

    def digest(self, key: str, most: int) -> tuple[int, str]:
        """Stream an object; return its size in bytes and its SHA-256 (hex). Raises ObjectNotFound.

        What has more than `most` bytes is not read to its end.
        """
        path = self._path("/object/authenticated", key)
        with self._metrics.timed("storage_read"):
            size, sha256 = self._send("GET", path, read=lambda one: _digest_of(one, most), most=most)
        return int(size), str(sha256)

    def read(self, key: str, most: int) -> bytes:
        """Read an object; raise ObjectNotFound, or StorageError if it has more than `most` bytes."""
        path = self._path("/object/authenticated", key)
        with self._metrics.timed("storage_read"):
            return bytes(self._send("GET", path, read=lambda one: read_up_to(one, most), most=most))

    def find(self, key: str) -> StoredObject | None:
        """Request one object by its key; return None if there is none."""
        try:
            found = self._send("GET", self._path("/object/info/authenticated", key))
        except ObjectNotFound:
            return None
        return _parsed(lambda: _stored(key, {"size": found["size"], "eTag": found.get("etag")}))

    def _path(self, resource: str, key: str = "") -> str:
        return f"{resource}/{quote(self.bucket, safe='')}" + (f"/{quote(key)}" if key else "")

    def list_objects(self, prefix: str, after: str = "", last: str | None = None) -> Iterator[StoredObject]:
        """Yield the objects with a prefix (not only a folder) and a key after `after`, up to `last`, in byte order.

        Raises StorageError if the pages do not advance in that order, or do not end.
        """
        # Only list-v2 without a delimiter, sorted by name, lists all objects. Its cursor is base64 of "l:" + last key.
        ours = cursor = base64.b64encode(f"l:{after}".encode()).decode() if after else None
        previous = ""
        for _ in range(_MOST_PAGES):
            body = {"prefix": prefix, "limit": PAGE, "with_delimiter": False, **({"cursor": cursor} if cursor else {})}
            try:
                with self._metrics.timed("storage_list"):
                    page = self._send("POST", self._path("/object/list-v2"), body, most=_PAGE_LIMIT)
            except StorageError as exc:
                if cursor is None or cursor != ours or exc.code != "InvalidParameter":
                    raise
                # The server has another cursor format: list from the start of the prefix instead.
                logger.warning("Storage rejects the list cursor; listing %s from its start.", prefix)
                cursor = None
                continue
            entries, cursor = _page(page)
            for entry in entries:
                if entry.key <= previous or not entry.key.startswith(prefix):
                    message = f"Storage lists {entry.key[:200]!r} below {prefix!r} after {previous!r}, out of order."
                    raise StorageError(message, _FORMAT_HINT)
                previous = entry.key
                if last is not None and entry.key > last:
                    return
                if entry.key > after:
                    yield entry
            if cursor is None:
                return
            if not entries:
                break
        raise StorageError(f"The list of objects below {prefix!r} does not end.", _FORMAT_HINT)

    def remove(self, keys: Sequence[str]) -> list[str]:
        """Delete objects by their exact keys, a thousand a request; return the keys that were not deleted."""
        deleted: set[str] = set()
        for start in range(0, len(keys), PAGE):
            body = {"prefixes": list(keys[start : start + PAGE])}
            with self._metrics.timed("storage_remove"):
                gone = self._send("DELETE", self._path("/object"), body, most=_PAGE_LIMIT)
            deleted.update(_parsed(partial(_names, gone)))
        return [key for key in keys if key not in deleted]

    def remove_all(self, keys: Sequence[str]) -> int:
        """Delete objects by their exact keys; return how many were not there. Raises StorageError if one still is.

        Neither a list nor the response proves that an object is gone: each that was not deleted is requested.
        """
        remaining = self.remove(keys)
        if kept := next((key for key in remaining if self.find(key) is not None), None):
            message = f"Storage still holds objects that it was asked to delete, {kept} for one."
            raise StorageError(message, "Look at the Storage server's log.")
        return len(remaining)

    def ensure_bucket(self) -> dict[str, Any]:
        """Create the bucket, private, if it does not exist; return its settings, as `find_bucket` does.

        Raises AccessDenied if the key is restricted, SettingsError if the bucket does not accept photos.
        """
        self.require_service_key()
        found = self.find_bucket()
        if found is None:
            with suppress(ObjectExists):  # another run was faster
                self._send("POST", "/bucket", {"id": self.bucket, "name": self.bucket, "public": False})
                logger.info("storage: created the private bucket %s", self.bucket)
            found = self._bucket_of(self._send("GET", self._path("/bucket")))
        types = found.get("allowed_mime_types") or [_PHOTO_TYPE]
        if not {_PHOTO_TYPE, "image/*"}.intersection(types):
            message = f"The bucket {self.bucket} accepts only {', '.join(map(str, types))[:200]}."
            raise SettingsError(message, f"Add {_PHOTO_TYPE} to its allowed MIME types, in the dashboard.")
        return found

    def require_service_key(self) -> None:
        """Raise AccessDenied if the key itself says that row-level security may hide objects from it."""
        if role := restricted_role(self._settings.key.reveal()):
            message = f"The key is one of the role {role}, from which Storage hides objects."
            raise AccessDenied(message, "Set SUPABASE_SERVICE_ROLE_KEY to the service role key of this very project.")

    def find_bucket(self) -> dict[str, Any] | None:
        """Return the bucket's settings, None if it does not exist; raise AccessDenied if key or host is refused.

        `created_at` is a datetime: servers write the same time in several forms.
        """
        self.check_host()
        try:
            return self._bucket_of(self._send("GET", self._path("/bucket")))
        except ObjectNotFound:
            return None

    def _bucket_of(self, found: Any) -> dict[str, Any]:
        """Return the settings in a response about the bucket."""
        if not isinstance(found, dict) or found.get("id") != self.bucket:
            found = {}  # something else answers
        created = _parsed(lambda: isoparse(found["created_at"]))
        return {**found, "created_at": created if created.tzinfo else created.replace(tzinfo=timezone.utc)}

    def list_buckets(self) -> list[str]:
        """Return the ids of the project's buckets."""
        found = self._send("GET", "/bucket")
        return _parsed(lambda: [str(one["id"]) for one in found])

    def ask_for_bucket(self) -> tuple[dict[str, Any] | PipelineError, str]:
        """Request the bucket, without retries; return its settings or the response's error, and the header Date."""
        path = self._path("/bucket")
        with self._transport.request("GET", path) as response:
            date = response.headers.get("Date", "")
            if not 200 <= response.status < 300:
                return error_of(response, f"GET {path}"), date
            return self._bucket_of(json_of(response, JSON_LIMIT, f"GET {path}")), date

    def check_host(self) -> None:
        """Raise AccessDenied if the host of the project's URL has no address."""
        if self.proxied:
            return
        parts = urlsplit(self._settings.storage_url)
        try:
            socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as exc:
            if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN:
                message = f"The address of the Storage host {parts.hostname} cannot be looked up now."
                raise StorageUnavailable(message, self._transport.hint_unreachable) from exc
            hint = "Check NEXT_PUBLIC_SUPABASE_URL for a typing error, and that this machine is online."
            raise AccessDenied(f"The Storage host {parts.hostname} is unknown.", hint) from exc

    def stop(self) -> None:
        """Start no further request; those in flight complete."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections of all threads."""
        self._transport.close()

    def _send(self, *arguments: Any, **keywords: Any) -> Any:
        """Send a request; retry after transient errors, more often after overload than after others in a row.

        A Retry-After is followed to the second. No attempt begins after the timeout of the operation.
        """
        deadline, attempt, in_a_row = time.monotonic() + OPERATION_TIMEOUT, 0, 0
        while True:
            try:
                return self._send_once(*arguments, **keywords)
            except StorageUnavailable as exc:
                wait = exc.retry_after or backoff.full_jitter(min(self._base**attempt, _LONGEST_WAIT))
                attempt += 1
                in_a_row = 0 if isinstance(exc, StorageOverloaded) else in_a_row + 1
                is_last = in_a_row == self._tries or attempt == self._tries + _OVERLOAD_TRIES
                if is_last or not exc.is_retried or time.monotonic() + wait > deadline:
                    raise
                self._metrics.count(f"retries_{exc.code or type(exc).__name__}")
                logger.info("storage: %s Trying again in %.1f s.", exc.message, wait)
            time.sleep(wait)

    def _send_once(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        read: Callable[[Response], Any] | None = None,
        most: int = JSON_LIMIT,
    ) -> Any:
        """Send one request, whose body is bytes or a value for JSON; return what `read` returns, by default JSON.

        `most` is the most bytes of the response.
        """
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        with self.limiter.slot() as generation:
            if self._stopped.is_set():
                raise Interrupted("The upload was interrupted.")
            try:
                with self._transport.request(method, path, body, headers, most if read else 0) as response:
                    if not 200 <= response.status < 300:
                        raise error_of(response, f"{method} {path}")
                    result = read(response) if read else json_of(response, most, f"{method} {path}")
            except StorageOverloaded:
                self.limiter.overloaded(generation)  # before the slot is free for another request
                raise
            self.limiter.succeeded()
            return result


def _names(entries: Any) -> list[str]:
    return [str(one["name"]) for one in entries]


def _page(body: Any) -> tuple[list[StoredObject], str | None]:
    """Return the objects of a page of a list, and the cursor of the next page if there is one."""
    entries = _parsed(lambda: [_stored(one["name"], one.get("metadata") or {}) for one in body["objects"]])
    return entries, _parsed(lambda: str(body["nextCursor"]) if body["hasNext"] else None)


def _parsed(read: Callable[[], Parsed]) -> Parsed:
    """Return what `read` makes of a response; raise StorageError if that has another format."""
    try:
        return read()
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as exc:
        raise StorageError("Storage answers in an unknown format.", _FORMAT_HINT) from exc


def _stored(key: str, metadata: dict[str, Any]) -> StoredObject:
    etag = str(metadata.get("eTag") or "").strip('"').lower()
    return StoredObject(str(key), int(metadata.get("size", -1)), etag if _MD5.fullmatch(etag) else None)

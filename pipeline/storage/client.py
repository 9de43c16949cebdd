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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import backoff
from urllib3.response import BaseHTTPResponse as Response

from pipeline.config import Settings
from pipeline.errors import (
    AccessDenied,
    Interrupted,
    ObjectExists,
    ObjectNotFound,
    PipelineError,
    StorageError,
    StorageOverloaded,
    StorageUnavailable,
)
from pipeline.observe.metrics import Metrics
from pipeline.storage.errors import error_of
from pipeline.storage.limiter import ConcurrencyLimiter
from pipeline.storage.transport import Transport

logger = logging.getLogger(__name__)

#: The API's limit of keys in a bulk delete and of entries in a page of a list.
PAGE = 1000
#: Seconds: the maximum of our own waits, and of a Retry-After that is honoured.
_LONGEST_WAIT, _LONGEST_RETRY_AFTER = 30.0, 60.0
#: Additional attempts after an overload, compared with other transient errors.
_OVERLOAD_TRIES = 6

_MD5 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredObject:
    """An object in the bucket: its key, its size in bytes, and its MD5 if the ETag is one."""

    key: str
    size: int
    md5: str | None


def _digest_of(response: Response) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for chunk in response.stream(1 << 16):
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _waits(base: float, tries: int) -> Generator[float, Any, None]:
    """Yield the seconds before each attempt, sent its error; raise the last of `tries` in a row other than overload."""
    steps = backoff.expo(base, max_value=_LONGEST_WAIT)
    next(steps)
    exc = yield 0.0
    in_a_row = 0
    for step in steps:
        in_a_row = 0 if isinstance(exc, StorageOverloaded) else in_a_row + 1
        if in_a_row == tries:
            raise exc
        exc = yield max(backoff.full_jitter(step), min(exc.retry_after, _LONGEST_RETRY_AFTER))


class Storage:
    """A client for one bucket."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self.bucket = settings.bucket
        self._metrics = metrics or Metrics()
        self.threads = settings.tuning.thread_count
        self._transport = Transport(settings, self.threads)
        self.proxied = self._transport.proxied
        self._stopped = threading.Event()
        self.limiter = ConcurrencyLimiter(self.threads)
        tries = settings.tuning.retry_max_attempts + 1
        # Decorated once: it takes 50 us, a fifth of the processor time of an upload.
        self._retrying: Any = backoff.on_exception(
            _waits,
            StorageUnavailable,
            max_tries=tries + _OVERLOAD_TRIES,
            on_backoff=_on_backoff,
            jitter=None,
            logger=None,
            base=settings.tuning.retry_backoff_factor,
            tries=tries,
        )(lambda client, *arguments, **keywords: client._send_once(*arguments, **keywords))

    def part(self, metrics: Metrics) -> Storage:
        """Return a client with the same connections and limiter, but its own metrics and its own `stop`."""
        other = copy.copy(self)
        other._metrics, other._stopped = metrics, threading.Event()
        return other

    def upload(self, key: str, content: bytes, content_type: str = "image/jpeg") -> None:
        """Store an object under a key; replace an existing one."""
        headers = {"Content-Type": content_type, "x-upsert": "true", "Cache-Control": "max-age=3600"}
        with self._metrics.timed("storage_upload"):
            stored = self._send("POST", self._path("/object", key), content, headers)
        name = stored.get("Key") if isinstance(stored, dict) else None
        if name != f"{self.bucket}/{key}":
            raise StorageError(f"Storage stored {key} under another key, {name}.")
        self._metrics.count("bytes_uploaded", len(content))
        self._metrics.count("objects_uploaded")

    def digest(self, key: str) -> tuple[int, str]:
        """Stream an object; return its size in bytes and its SHA-256 (hex). Raises ObjectNotFound."""
        with self._metrics.timed("storage_read"):
            size, sha256 = self._send("GET", self._path("/object/authenticated", key), read=_digest_of)
        return int(size), str(sha256)

    def read(self, key: str, most: int) -> bytes:
        """Read an object; raise ObjectNotFound, or StorageError if it has more than `most` bytes."""
        with self._metrics.timed("storage_read"):
            content = self._send("GET", self._path("/object/authenticated", key), read=lambda one: one.read(most + 1))
        if len(content) > most:
            raise StorageError(f"The object {key} has more than {most} bytes.")
        return bytes(content)

    def _path(self, resource: str, key: str = "") -> str:
        return f"{resource}/{quote(self.bucket, safe='')}" + (f"/{quote(key)}" if key else "")

    def list_objects(self, prefix: str, after: str = "", last: str | None = None) -> Iterator[StoredObject]:
        """Yield the objects with a prefix (not only a folder) and a key after `after`, up to `last`, in byte order."""
        # Only list-v2 without a delimiter, sorted by name, lists all objects. Its cursor is base64 of "l:" + last key.
        ours = cursor = base64.b64encode(f"l:{after}".encode()).decode() if after else None
        while True:
            body = {"prefix": prefix, "limit": PAGE, "with_delimiter": False, **({"cursor": cursor} if cursor else {})}
            try:
                with self._metrics.timed("storage_list"):
                    page = self._send("POST", self._path("/object/list-v2"), body)
            except StorageError as exc:
                if cursor is None or cursor != ours or exc.code != "InvalidParameter":
                    raise
                # The server has another cursor format: list from the start of the prefix instead.
                logger.warning("Storage rejects the list cursor; listing %s from its start.", prefix)
                cursor = None
                continue
            entries, cursor = _page(page)
            for entry in entries:
                if last is not None and entry.key > last:
                    return
                if entry.key > after:
                    yield entry
            if cursor is None:
                return

    def remove(self, keys: Sequence[str]) -> int:
        """Delete objects by their exact keys, a thousand a request; return the number of deleted objects."""
        removed = 0
        for start in range(0, len(keys), PAGE):
            body = {"prefixes": list(keys[start : start + PAGE])}
            with self._metrics.timed("storage_remove"):
                removed += len(self._send("DELETE", self._path("/object"), body))
        return removed

    def ensure_bucket(self) -> bool:
        """Create the bucket, private, if it does not exist; return whether it was created."""
        if self.find_bucket() is not None:
            return False
        try:
            self._send("POST", "/bucket", {"id": self.bucket, "name": self.bucket, "public": False})
        except ObjectExists:
            return False
        logger.info("storage: created the private bucket %s", self.bucket)
        return True

    def find_bucket(self) -> dict[str, Any] | None:
        """Return the bucket's settings, None if it does not exist; raise AccessDenied if key or host is refused."""
        self.check_host()
        try:
            return dict(self._send("GET", self._path("/bucket")))
        except ObjectNotFound:
            return None

    def ask_for_bucket(self) -> tuple[dict[str, Any] | PipelineError, str]:
        """Request the bucket, without retries; return its settings or the response's error, and the header Date."""
        path = self._path("/bucket")
        with self._transport.request("GET", path) as response:
            date = response.headers.get("Date", "")
            if not 200 <= response.status < 300:
                return error_of(response, f"GET {path}"), date
            return dict(self._json_of(response)), date

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
        """Send a request; retry after transient errors, more often after overload than after others in a row."""
        return self._retrying(self, *arguments, **keywords)

    def _send_once(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        read: Callable[[Response], Any] | None = None,
    ) -> Any:
        """Send one request, whose body is bytes or a value for JSON; return what `read` returns, by default JSON."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with self.limiter.slot() as generation:
            if self._stopped.is_set():
                raise Interrupted("The upload was interrupted.")
            try:
                with self._transport.request(method, path, body, headers) as response:
                    if not 200 <= response.status < 300:
                        raise error_of(response, f"{method} {path}")
                    result = (read or self._json_of)(response)
            except StorageOverloaded:
                self.limiter.overloaded(generation)  # before the slot is free for another request
                raise
            self.limiter.succeeded()
            return result

    def _json_of(self, response: Response) -> Any:
        try:
            return json.loads(response.data)
        except ValueError as exc:
            message = f"Storage at {self._settings.storage_url} answers with something that is not JSON."
            hint = "Check NEXT_PUBLIC_SUPABASE_URL: is it the API's address, not the dashboard's?"
            raise StorageUnavailable(message, hint) from exc


def _on_backoff(details: Any) -> None:
    client, exc = details["args"][0], details["exception"]
    client._metrics.count(f"retries_{exc.code or type(exc).__name__}")
    logger.info("storage: %s Trying again in %.1f s.", exc.message, details["wait"])


def _page(body: Any) -> tuple[list[StoredObject], str | None]:
    """Return the objects of a page of a list, and the cursor of the next page if there is one."""
    try:
        entries = [_stored(one["name"], one.get("metadata") or {}) for one in body["objects"]]
        return entries, str(body["nextCursor"]) if body.get("hasNext") else None
    except (TypeError, KeyError, AttributeError, ValueError) as exc:
        message = "Storage answers with a list of an unknown format."
        raise StorageError(message, "Check NEXT_PUBLIC_SUPABASE_URL.") from exc


def _stored(key: str, metadata: dict[str, Any]) -> StoredObject:
    etag = str(metadata.get("eTag") or "").strip('"').lower()
    return StoredObject(key, int(metadata.get("size", -1)), etag if _MD5.fullmatch(etag) else None)

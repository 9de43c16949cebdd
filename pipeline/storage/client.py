"""The one door to Supabase Storage: its HTTP API, its error codes, and when to try again.

The API answers nearly every error with HTTP 400 and puts the truth into the body (`code`, `statusCode`), so errors are
told apart by that code (https://github.com/supabase/storage, src/internal/errors/codes.ts).
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import backoff

from pipeline.config import Settings, redact
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
from pipeline.observe.logger import get_logger
from pipeline.observe.metrics import Metrics
from pipeline.storage.limiter import Gate
from pipeline.storage.transport import Answer, Wire

logger = get_logger(__name__)

#: Keys of one bulk delete, and entries of one page of a list: the API's own limits.
PAGE = 1000
_LONGEST_WAIT = 30.0
#: Overload says "later", not "no": it is tried this many times more than another transient error.
_PATIENCE = 6

_EXISTS = frozenset({"KeyAlreadyExists", "ResourceAlreadyExists", "BucketAlreadyExists"})
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey"})
_DENIED = frozenset({"AccessDenied", "InvalidJWT", "ExpiredToken", "SignatureDoesNotMatch", "InvalidAccessKeyId"})
_DEFECTS = frozenset({"DatabaseSchemaMismatch", "DatabaseInvalidObjectDefinition"})
_OVERLOAD = frozenset({"SlowDown", "DatabaseTimeout", "LockTimeout", "DatabaseReadOnly"})
_TRANSIENT = frozenset(
    {
        "ResourceLocked",
        "InternalError",
        "DatabaseError",
        "DatabaseTransactionAborted",
        "Aborted",
        "AbortedTerminate",
        "TransactionError",
        "NoAvailableShard",
    }
)
_OVERLOAD_STATUS = frozenset({429, 503, 544})
_TRANSIENT_STATUS = frozenset({408, 423, 425, 499})
_MD5 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredObject:
    """An object in the bucket: its key, its bytes, and the MD5 of its content where the ETag is one."""

    key: str
    size: int
    md5: str | None


def _json_of(answer: Answer) -> Any:
    return json.loads(answer.data)


def _digest_of(answer: Answer) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for chunk in answer.stream(1 << 16):
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _content_of(answer: Answer, most: int) -> bytes:
    """Return the content, or one byte more than is wanted of one that is larger."""
    content = bytearray()
    for chunk in answer.stream(1 << 16):
        content += chunk
        if len(content) > most:
            break
    del content[most + 1 :]
    return bytes(content)


class Storage:
    """A bucket, seen through the API."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._base = settings.storage_url
        self._bucket = self.bucket = settings.bucket
        self._metrics = metrics or Metrics()
        self._wire = Wire(settings)
        self._stopped = threading.Event()
        self.threads = settings.tuning.thread_count
        self.gate = Gate(self.threads)
        self._tries = settings.tuning.retry_max_attempts + 1

    def part(self, metrics: Metrics) -> Storage:
        """Return the same bucket, with the same connections and gate, counted elsewhere and stopped by itself."""
        other = copy.copy(self)
        other._metrics, other._stopped = metrics, threading.Event()
        return other

    # Objects

    def upload(self, key: str, content: bytes, content_type: str = "image/jpeg") -> None:
        """Store an object under a key, in the place of what may be there."""
        with self._metrics.timed("storage_upload"):
            answer = self._send(
                "POST",
                f"/object/{quote(self._bucket, safe='')}/{quote(key, safe='/')}",
                body=content,
                headers={"Content-Type": content_type, "x-upsert": "true", "Cache-Control": "max-age=3600"},
            )
        stored = answer.get("Key") if isinstance(answer, dict) else None
        if stored != f"{self._bucket}/{key}":
            raise StorageError(f"Storage stored {key} under another key, {stored}.")
        self._metrics.count("bytes_uploaded", len(content))
        self._metrics.count("objects_uploaded")

    def digest(self, key: str) -> tuple[int, str]:
        """Read an object and return its bytes and their SHA-256 (hex); it is not held in memory.

        Raises:
            ObjectNotFound: there is none.
        """
        path = f"/object/authenticated/{quote(self._bucket, safe='')}/{quote(key, safe='/')}"
        with self._metrics.timed("storage_read"):
            size, sha256 = self._send("GET", path, _digest_of)
        return int(size), str(sha256)

    def read(self, key: str, most: int) -> bytes:
        """Read an object of at most so many bytes into memory.

        Raises:
            ObjectNotFound: there is none.
            StorageError: it is larger.
        """
        path = f"/object/authenticated/{quote(self._bucket, safe='')}/{quote(key, safe='/')}"
        with self._metrics.timed("storage_read"):
            content = bytes(self._send("GET", path, lambda answer: _content_of(answer, most)))
        if len(content) > most:
            raise StorageError(f"The object {key} has more than {most} bytes.")
        return content

    def list_objects(self, prefix: str, after: str = "", last: str | None = None) -> Iterator[StoredObject]:
        """Yield the objects whose keys begin with a prefix, in byte order of the keys.

        Arguments:
            prefix: plain text, not a folder.
            after: yield only keys beyond this one.
            last: stop beyond this one.
        """
        # Only list-v2 without delimiter, sorted by name, is complete. Its cursor is base64 of "l:" and the last key.
        ours = cursor = base64.b64encode(f"l:{after}".encode()).decode() if after else None
        while True:
            body: dict[str, Any] = {"prefix": prefix, "limit": PAGE, "with_delimiter": False}
            if cursor:
                body["cursor"] = cursor
            try:
                with self._metrics.timed("storage_list"):
                    page = self._send("POST", f"/object/list-v2/{quote(self._bucket, safe='')}", value=body)
            except StorageError as exc:
                if cursor is None or cursor != ours or exc.code != "InvalidParameter":
                    raise
                # A server that words its cursors differently: read from the start of the prefix instead.
                logger.warning("Storage does not take our list cursor; listing %s from its start.", prefix)
                cursor = None
                continue
            entries, cursor = _page(page)
            for entry in entries:
                if entry.key <= after:
                    continue
                if last is not None and entry.key > last:
                    return
                yield entry
            if cursor is None:
                return

    def remove(self, keys: Sequence[str]) -> int:
        """Delete objects by their exact keys, at most a thousand; return how many there were."""
        if not keys:
            return 0
        with self._metrics.timed("storage_remove"):
            gone = self._send("DELETE", f"/object/{quote(self._bucket, safe='')}", value={"prefixes": list(keys)})
        return len(gone)

    def remove_all(self, keys: Sequence[str]) -> None:
        """Delete any number of objects by their exact keys, a thousand a call."""
        for start in range(0, len(keys), PAGE):
            self.remove(keys[start : start + PAGE])

    # The bucket

    def ensure_bucket(self) -> bool:
        """Make sure that the bucket exists, private when it is made now; return whether it was made.

        Raises:
            AccessDenied: the key is refused, or the host is unknown.
        """
        self.check_host()
        try:
            self._send("GET", f"/bucket/{quote(self._bucket, safe='')}")
        except ObjectNotFound:
            try:
                self._send("POST", "/bucket", value={"id": self._bucket, "name": self._bucket, "public": False})
            except ObjectExists:
                return False
            logger.info("storage: made the private bucket %s", self._bucket)
            return True
        return False

    def find_bucket(self) -> dict[str, Any] | None:
        """Return the bucket's settings, None when it does not exist."""
        self.check_host()
        try:
            found = self._send("GET", f"/bucket/{quote(self._bucket, safe='')}")
        except ObjectNotFound:
            return None
        return dict(found)

    def ask_for_bucket(self) -> tuple[dict[str, Any] | PipelineError, str]:
        """Ask once for the bucket; return its settings, or the error that the answer means, and the answer's Date.

        Raises:
            StorageUnavailable: there is no answer, or one that is not JSON.
        """
        path = f"/bucket/{quote(self._bucket, safe='')}"
        with self._wire.request("GET", path) as response:
            date = response.headers.get("Date", "")
            if not 200 <= response.status < 300:
                return error_of(response, f"GET {path}"), date
            try:
                return dict(_json_of(response)), date
            except (ValueError, TypeError) as exc:
                raise self._no_json() from exc

    @property
    def proxied(self) -> bool:
        """Return whether a proxy of the environment carries the requests."""
        return self._wire.proxied

    def check_host(self) -> None:
        """Raise AccessDenied when the host of the project's URL has no address."""
        if self._wire.proxied:
            return
        parts = urlsplit(self._base)
        try:
            socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as exc:
            if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN:
                raise StorageUnavailable(
                    f"The address of the Storage host {parts.hostname} cannot be looked up now.",
                    self._wire.hint_unreachable,
                ) from exc
            raise AccessDenied(
                f"The Storage host {parts.hostname} is unknown.",
                "Check NEXT_PUBLIC_SUPABASE_URL for a typing error, and that this machine is online.",
            ) from exc

    # The wire

    def stop(self) -> None:
        """Let no further request begin; those in flight end by themselves."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections of all threads."""
        self._wire.close()

    def _send(self, method: str, path: str, *arguments: Any, **keywords: Any) -> Any:
        """Send a request, and again after a transient error; overload has more tries in all than others in a row."""
        try:
            return self._send_once(method, path, *arguments, **keywords)
        except StorageUnavailable as exc:
            failed: StorageUnavailable | None = exc
        in_a_row = 0

        def gives_up(exc: Exception) -> bool:
            nonlocal in_a_row
            in_a_row = 0 if isinstance(exc, StorageOverloaded) else in_a_row + 1
            return in_a_row >= self._tries

        def again() -> Any:
            nonlocal failed
            if failed is not None:  # the first try, which most often is the only one: no retry is set up for that
                try:
                    raise failed
                finally:
                    failed = None
            return self._send_once(method, path, *arguments, **keywords)

        # Waits of 1, 2, 4 … seconds at most, each drawn evenly from zero up (full jitter).
        retry = backoff.on_exception(
            backoff.expo,
            StorageUnavailable,
            max_tries=self._tries + _PATIENCE,
            giveup=gives_up,
            on_backoff=self._on_backoff,
            jitter=backoff.full_jitter,
            logger=None,
            base=self._settings.tuning.retry_backoff_factor,
            max_value=_LONGEST_WAIT,
        )
        return retry(again)()

    def _send_once(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], Any] = _json_of,
        *,
        body: bytes | None = None,
        value: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send one request, its body as it is or a value as JSON; return what `read` makes of the answer."""
        if value is not None:
            body, headers = json.dumps(value).encode(), {"Content-Type": "application/json"}
        with self.gate.pass_through():
            if self._stopped.is_set():
                raise Interrupted("The upload was interrupted.")
            try:
                with self._wire.request(method, path, body, headers) as response:
                    if 200 <= response.status < 300:
                        answer = read(response)
                        self.gate.succeeded()
                        return answer
                    error = error_of(response, f"{method} {path.split('?')[0]}")
            except ValueError as exc:
                raise self._no_json() from exc
            if isinstance(error, StorageOverloaded):
                self.gate.overloaded()  # before the place is somebody else's, who would be refused as well
        try:
            raise error
        finally:
            del error  # or error, traceback and frame keep each other alive, and with them the connection

    def _no_json(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"Storage at {self._base} answers with something that is not JSON.",
            "Check NEXT_PUBLIC_SUPABASE_URL: is it the API's address, not the dashboard's?",
        )

    def _on_backoff(self, details: Any) -> None:
        exc = details["exception"]
        code = getattr(exc, "code", "") or type(exc).__name__
        self._metrics.count(f"retries_{code}")
        logger.info("storage: %s Trying again in %.1f s.", exc.message, details["wait"])


def _page(answer: Any) -> tuple[list[StoredObject], str | None]:
    """Return the objects of a page of a list, and the cursor of the next one if there is one."""
    try:
        entries = [_stored(one["name"], one.get("metadata") or {}) for one in answer["objects"]]
        return entries, str(answer["nextCursor"]) if answer.get("hasNext") else None
    except (TypeError, KeyError, AttributeError, ValueError) as exc:
        raise StorageError(
            "Storage answers with a list of a shape that is not its own.", "Check NEXT_PUBLIC_SUPABASE_URL."
        ) from exc


def _stored(key: str, metadata: dict[str, Any]) -> StoredObject:
    etag = str(metadata.get("eTag") or "").strip('"').lower()
    return StoredObject(key, int(metadata.get("size", -1)), etag if _MD5.fullmatch(etag) else None)


def error_of(response: Answer, request: str) -> PipelineError:
    """Tell from an answer that is no success what it means: by the body's code, else by the status."""
    try:
        body = _json_of(response)
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    code = str(body.get("code") or "")
    status = response.status
    if str(body.get("statusCode", "")).isdigit():
        status = int(body["statusCode"])
    message = redact(str(body.get("message") or response.reason or "no message"))
    said = f"Storage answers {code or status} to {request}: {message}"

    if code in _EXISTS:
        return ObjectExists(said, "", code)
    if code in _MISSING:
        return ObjectNotFound(said, "", code)
    if code in _DENIED or status in (401, 403):
        return AccessDenied(
            f"Storage refuses the key ({code or status}: {message}).",
            "Check SUPABASE_SERVICE_ROLE_KEY: it must be the service role key of this very project.",
        )
    if code in _DEFECTS:
        return StorageError(said, "The Storage server does not fit its database: look at its log.", code)
    if code in _OVERLOAD or status in _OVERLOAD_STATUS:
        return _coded(StorageOverloaded(said, "Storage is overloaded; run the same command again later."), code, status)
    # "Client Error" comes from the HTTP parser, with a number for a status: the request was cut on its way.
    cut = body.get("error") == "Bad Request" and body.get("statusCode") == 400 and not code
    if code in _TRANSIENT or status >= 500 or status in _TRANSIENT_STATUS or cut:
        return _coded(StorageUnavailable(said, "Run the same command again."), code, status)
    if 300 <= status < 400 or (status == 404 and not code):
        return StorageError(said, "Check NEXT_PUBLIC_SUPABASE_URL: there is no Storage API at that address.", code)
    return StorageError(said, "", code or str(status))


def _coded(error: StorageUnavailable, code: str, status: int) -> StorageUnavailable:
    error.code = code or str(status)
    return error

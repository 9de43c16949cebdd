"""The pipeline's error for an error response of the Storage API.

Most errors have HTTP status 400, with the real status and a code in the body (`statusCode`, `code`): the code decides
(https://github.com/supabase/storage, src/internal/errors/codes.ts). A response that is not JSON does not come from
Storage but from something on the way to it; docs/reference/storage-answers.md lists what is said then.
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from urllib3.response import BaseHTTPResponse as Response

from pipeline.config import redact
from pipeline.errors import (
    AccessDenied,
    ObjectExists,
    ObjectNotFound,
    PipelineError,
    SettingsError,
    StorageError,
    StorageOverloaded,
    StorageUnavailable,
)

_EXISTS = frozenset({"KeyAlreadyExists", "ResourceAlreadyExists", "BucketAlreadyExists"})
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey"})
_DENIED = frozenset({"AccessDenied", "InvalidJWT", "ExpiredToken", "SignatureDoesNotMatch", "InvalidAccessKeyId"})
_DEFECTS = frozenset({"DatabaseSchemaMismatch", "DatabaseInvalidObjectDefinition"})
_OVERLOAD = frozenset({"SlowDown", "DatabaseTimeout", "LockTimeout", "DatabaseReadOnly"})
_ABORTED = frozenset({"DatabaseTransactionAborted", "Aborted", "AbortedTerminate", "TransactionError"})
_TRANSIENT = _ABORTED | {"ResourceLocked", "InternalError", "DatabaseError", "NoAvailableShard"}
_OVERLOAD_STATUS = frozenset({429, 503, 544})
_TRANSIENT_STATUS = frozenset({408, 423, 425, 499})
_PAUSED = 540
#: Bytes of a response that is neither a page of a list nor an object.
JSON_LIMIT = 1 << 20
_TITLE = re.compile(rb"<title[^>]*>(.{0,300}?)</title", re.IGNORECASE | re.DOTALL)
#: Characters that are shown of a name or a code, and of a message or an address.
_NAME, _MESSAGE = 80, 300

_AGAIN = "Run the same command again."
_CHECK_URL = "There is no Storage API there: set NEXT_PUBLIC_SUPABASE_URL to https://<project>.supabase.co, no path."
_MOVED = "Set NEXT_PUBLIC_SUPABASE_URL to the beginning of that address, up to the host."
PORTAL = (
    "Log in to the network, if it has a login page (a captive portal). "
    "Else check NEXT_PUBLIC_SUPABASE_URL: is it the API's address, not the dashboard's?"
)
_BLOCKED = "A firewall or proxy refuses this machine or request, and the key was not examined: allow it there."
#: What to do about a status of something that is not Storage.
_HINTS = {
    401: _BLOCKED,
    403: _BLOCKED,
    413: "Raise the limit of a request's body there, `client_max_body_size` of nginx.",
    511: PORTAL,
}


def read_up_to(response: Response, most: int) -> bytes:
    """Return the body of a response; raise StorageError if it has more than `most` bytes."""
    content = b""
    while len(content) <= most and (part := response.read(most + 1 - len(content))):
        content += part  # a read at the end finds out whether all of it came
    if len(content) > most:
        message = f"{_sender(response, content)} sends more than {most} bytes, which is no response of Storage."
        raise StorageError(message, _CHECK_URL)
    return content


def json_of(response: Response, most: int, request: str) -> Any:
    """Return the JSON of a successful response; raise StorageUnavailable if it is something else."""
    content = read_up_to(response, most)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as exc:
        sender = _sender(response, content)
        raise StorageUnavailable(f"{sender} answers {request} with something that is not JSON.", PORTAL) from exc


def _sender(response: Response, content: bytes) -> str:
    """Return who seems to have sent a response that is not of Storage, with the title of its page."""
    name = (
        "Cloudflare" if "CF-RAY" in response.headers else response.headers.get("Server") or response.headers.get("Via")
    )
    found = _TITLE.search(content)
    title = f' ("{_line(found[1].decode(errors="replace"), _NAME)}")' if found and found[1].strip() else ""
    return f"{_line(name or 'Something', _NAME)}, not Storage,{title}"


def _line(text: str, most: int) -> str:
    """Return the beginning of a text of the server in one line, without secrets."""
    return redact(" ".join(text.split()))[:most]


def error_of(response: Response, request: str) -> PipelineError:
    """Return the error that a response means: by the code in its body, else by its status."""
    content = read_up_to(response, JSON_LIMIT)
    if 300 <= response.status < 400:
        return _error_of_redirect(response, content, request)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        text = f"{_sender(response, content)} answers {response.status} to {request}."
        return _error_of_status(response, response.status, text, "", _HINTS.get(response.status, ""))
    given = str(body.get("statusCode", ""))
    status = int(given) if re.fullmatch("[1-5][0-9]{2}", given) else response.status
    code = re.sub(r"\W", "", str(body.get("code") or ""))[:_NAME]
    message = _line(str(body.get("message") or response.reason or "no message"), _MESSAGE).rstrip(".")
    text = f"Storage answers {code or status} to {request}: {message}."

    if code in _EXISTS:
        return ObjectExists(text, "", code)
    if code in _MISSING:
        return ObjectNotFound(text, "", code)
    if code == "InvalidMimeType":
        return SettingsError(text, "Add image/jpeg to the allowed MIME types of the bucket, in the dashboard.", code)
    if code in _DENIED or status in (401, 403):
        hint = "Check SUPABASE_SERVICE_ROLE_KEY: it must be the service role key of this very project."
        return AccessDenied(f"Storage refuses the key ({code or status}: {message}).", hint)
    if code in _DEFECTS:
        return StorageError(text, "The Storage server does not fit its database: look at its log.", code)
    # The server's HTTP parser answers a truncated request with a numeric statusCode and without a code.
    truncated = body.get("error") == "Bad Request" and body.get("statusCode") == 400 and not code
    return _error_of_status(response, 408 if truncated else status, text, code or str(status), "")


def _error_of_status(response: Response, status: int, text: str, code: str, hint: str) -> PipelineError:
    """Return the error for a status; `code` and `hint` are those of its body and of its sender, where known."""
    error: StorageUnavailable | None = None
    if code in _OVERLOAD or status in _OVERLOAD_STATUS:
        error = StorageOverloaded(text, "Storage is overloaded; run the same command again later.")
    elif status == _PAUSED:
        error = StorageUnavailable(f"The project is paused: {text}", f"Restore it in the dashboard. {_AGAIN}")
        error.is_retried = False
    elif code in _TRANSIENT or status >= 500 or status in _TRANSIENT_STATUS:
        error = StorageUnavailable(text, hint or _AGAIN)
    if error is not None:
        error.code, error.retry_after = code or str(status), _retry_after(response)
        return error
    if status == 404:  # and not of an object or a bucket
        return SettingsError(text, _CHECK_URL, code or str(status))
    return StorageError(text, hint, code or str(status))


def _error_of_redirect(response: Response, content: bytes, request: str) -> PipelineError:
    """Return the error for a redirect: the API itself has moved where the path is the same, as from http to https."""
    to = response.headers.get("Location", "")
    text = (
        f"{_sender(response, content)} answers {response.status} to {request} and redirects to {_line(to, _MESSAGE)}."
    )
    if to.endswith(request.partition(" ")[2]):
        return SettingsError(text, _MOVED)
    return StorageError(text, PORTAL, str(response.status))


def _retry_after(response: Response) -> float:
    """Return the seconds of the header Retry-After, which may be a date by the clock of the server; 0 without it."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
        date = response.headers.get("Date")
        now = parsedate_to_datetime(date) if date is not None else datetime.now(timezone.utc)
        return max(0.0, (moment - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date, one without a time zone, or beyond the year 9999
        return 0.0

"""The pipeline's error for an error response of the Storage API.

Most errors have HTTP status 400, with the real status and a code in the body (`statusCode`, `code`): the code decides
(https://github.com/supabase/storage, src/internal/errors/codes.ts). A response that is not JSON does not come from
Storage but from something on the way to it; docs/reference/storage-answers.md lists what is said then.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from urllib3.exceptions import InvalidHeader
from urllib3.response import BaseHTTPResponse as Response
from urllib3.util import Retry

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

_PAUSED = "540"
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
_CHECK_KEY = "Check SUPABASE_SERVICE_ROLE_KEY: it must be the service role key of this very project."
_CHECK_TYPES = "Add image/jpeg to the allowed MIME types of the bucket, in the dashboard."
_CHECK_SERVER = "The Storage server does not fit its database: look at its log."
_LATER = "Storage is overloaded; run the same command again later."
_BLOCKED = "A firewall or proxy refuses this machine or request, and the key was not examined: allow it there."
#: What a code or a status means, and what to do.
_MEANINGS: tuple[tuple[str, type[PipelineError], str], ...] = (
    ("KeyAlreadyExists ResourceAlreadyExists BucketAlreadyExists", ObjectExists, ""),
    ("NoSuchBucket NoSuchKey", ObjectNotFound, ""),
    ("404", SettingsError, _CHECK_URL),  # not of an object or a bucket
    ("AccessDenied InvalidJWT ExpiredToken SignatureDoesNotMatch InvalidAccessKeyId 401 403", AccessDenied, _CHECK_KEY),
    ("InvalidMimeType", SettingsError, _CHECK_TYPES),
    ("DatabaseSchemaMismatch DatabaseInvalidObjectDefinition", StorageError, _CHECK_SERVER),
    ("SlowDown DatabaseTimeout LockTimeout DatabaseReadOnly 429 503 544", StorageOverloaded, _LATER),
    ("DatabaseTransactionAborted Aborted AbortedTerminate TransactionError", StorageUnavailable, _AGAIN),
    ("ResourceLocked InternalError DatabaseError NoAvailableShard 408 423 425 499", StorageUnavailable, _AGAIN),
    (_PAUSED, StorageUnavailable, f"Restore it in the dashboard. {_AGAIN}"),
)
_OF_STORAGE = {code: (kind, hint) for codes, kind, hint in _MEANINGS for code in codes.split()}
#: What the status of a page means, which is not of Storage.
_OF_PAGES: dict[str, tuple[type[PipelineError], str]] = {
    **_OF_STORAGE,
    "401": (StorageError, _BLOCKED),
    "403": (StorageError, _BLOCKED),
    "413": (StorageError, "Raise the limit of a request's body there, `client_max_body_size` of nginx."),
    "511": (StorageUnavailable, PORTAL),
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
    name = response.headers.get("Server") or response.headers.get("Via") or "Something"
    found = _TITLE.search(content)
    title = f' ("{_line(found[1].decode(errors="replace"), _NAME)}")' if found and found[1].strip() else ""
    return f"{_line(name, _NAME)}, not Storage,{title}"


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
    if isinstance(body, dict):
        given = str(body.get("statusCode", ""))
        status = given if re.fullmatch("[1-5][0-9]{2}", given) else str(response.status)
        code = re.sub(r"\W", "", str(body.get("code") or ""))[:_NAME] or status
        message = _line(str(body.get("message") or response.reason or "no message"), _MESSAGE).rstrip(".")
        text, meanings = f"Storage answers {code} to {request}: {message}.", _OF_STORAGE
        # The server's HTTP parser answers a truncated request with a numeric statusCode and without a code.
        if body.get("error") == "Bad Request" and body.get("statusCode") == 400 and not body.get("code"):
            status = "408"
    else:
        code = status = str(response.status)
        text, meanings = f"{_sender(response, content)} answers {status} to {request}.", _OF_PAGES
    otherwise = (StorageUnavailable, _AGAIN) if status >= "500" else (StorageError, "")
    kind, hint = meanings.get(code) or meanings.get(status) or otherwise
    if kind is AccessDenied:
        text = f"Storage refuses the key ({code}: {message})."
    elif status == _PAUSED:
        text = f"The project is paused: {text}"
    error = kind(text, hint, code)
    if isinstance(error, StorageUnavailable):
        error.is_retried = status != _PAUSED
        with suppress(InvalidHeader, ValueError, OverflowError):  # no time, or one that is too large
            error.retry_after = Retry().get_retry_after(response) or 0.0
    return error


def _error_of_redirect(response: Response, content: bytes, request: str) -> PipelineError:
    """Return the error for a redirect: the API itself has moved where the path is the same, as from http to https."""
    to, sender = response.headers.get("Location", ""), _sender(response, content)
    text = f"{sender} answers {response.status} to {request} and redirects to {_line(to, _MESSAGE)}."
    if to.endswith(request.partition(" ")[2]):
        return SettingsError(text, _MOVED)
    return StorageError(text, PORTAL, str(response.status))

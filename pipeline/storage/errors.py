"""The pipeline's error for an error response of the Storage API.

Most errors have HTTP status 400, with the real status and a code in the body (`statusCode`, `code`): the code decides
(https://github.com/supabase/storage, src/internal/errors/codes.ts).
"""

from __future__ import annotations

import json
from typing import Any

import urllib3
import urllib3.exceptions
from urllib3.response import BaseHTTPResponse as Response

from pipeline.config import redact
from pipeline.errors import (
    AccessDenied,
    ObjectExists,
    ObjectNotFound,
    PipelineError,
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


def error_of(response: Response, request: str) -> PipelineError:
    """Return the error that a response means: by the code in its body, else by its status."""
    try:
        parsed = json.loads(response.data)
    except ValueError:
        parsed = None
    body: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    status = int(body["statusCode"]) if str(body.get("statusCode", "")).isdigit() else response.status
    code = str(body.get("code") or "")
    message = redact(str(body.get("message") or response.reason or "no message"))
    text = f"Storage answers {code or status} to {request}: {message}"

    if code in _EXISTS:
        return ObjectExists(text, "", code)
    if code in _MISSING:
        return ObjectNotFound(text, "", code)
    if code in _DENIED or status in (401, 403):
        hint = "Check SUPABASE_SERVICE_ROLE_KEY: it must be the service role key of this very project."
        return AccessDenied(f"Storage refuses the key ({code or status}: {message}).", hint)
    if code in _DEFECTS:
        return StorageError(text, "The Storage server does not fit its database: look at its log.", code)
    error: StorageUnavailable | None = None
    if code in _OVERLOAD or status in _OVERLOAD_STATUS:
        error = StorageOverloaded(text, "Storage is overloaded; run the same command again later.")
    # The server's HTTP parser answers a truncated request with a numeric statusCode and without a code.
    truncated = body.get("error") == "Bad Request" and body.get("statusCode") == 400 and not code
    if error is None and (code in _TRANSIENT or status >= 500 or status in _TRANSIENT_STATUS or truncated):
        error = StorageUnavailable(text, "Run the same command again.")
    if error is not None:
        error.code, error.retry_after = code or str(status), _retry_after(response)
        return error
    if 300 <= status < 400 or (status == 404 and not code):
        return StorageError(text, "Check NEXT_PUBLIC_SUPABASE_URL: there is no Storage API at that address.", code)
    return StorageError(text, "", code or str(status))


def _retry_after(response: Response) -> float:
    try:
        return urllib3.Retry().get_retry_after(response) or 0.0
    except urllib3.exceptions.InvalidHeader:
        return 0.0

"""What an error response of the Storage API means.

The API answers nearly every error with HTTP 400 and puts the status and a code into the body (`statusCode`, `code`), so
the code decides (https://github.com/supabase/storage, src/internal/errors/codes.ts).
"""

from __future__ import annotations

import json

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


def error_of(response: Response, request: str) -> PipelineError:
    """Return the error that a response means: by the code of its body, else by its status."""
    try:
        body = json.loads(response.data)
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

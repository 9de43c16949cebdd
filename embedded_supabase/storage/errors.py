"""The errors of the Storage API and their response bodies.

Source: https://github.com/supabase/storage, src/internal/errors/codes.ts. Almost every error is a response with HTTP
status 400, whose body contains the actual status as text.
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error of the API.

    Arguments:
        status: the actual status, `statusCode` in the body.
        error: the label that older clients read.
        message: the text for users.
        code: the error code.
        http: the HTTP status of the response.
    """

    def __init__(self, status: int, error: str, message: str, code: str, http: int = 400) -> None:
        super().__init__(message)
        self.http = http
        self.body: dict[str, Any] = {"statusCode": str(status), "error": error, "message": message, "code": code}


def bucket_missing() -> ApiError:
    """Return the error for a bucket that does not exist or is not visible."""
    return ApiError(404, "Bucket not found", "Bucket not found", "NoSuchBucket")


def key_missing() -> ApiError:
    """Return the error for an object that does not exist or is not visible."""
    return ApiError(404, "not_found", "Object not found", "NoSuchKey")


def key_exists(code: str = "KeyAlreadyExists") -> ApiError:
    """Return the error for a key that exists, or for a bucket whose id or name exists."""
    return ApiError(409, "Duplicate", "The resource already exists", code)


def bucket_not_empty() -> ApiError:
    """Return the error for deleting a bucket that holds objects."""
    return ApiError(409, "ResourceNotEmpty", "The bucket you tried to delete is not empty", "ResourceNotEmpty")


def too_large() -> ApiError:
    """Return the error for an object that exceeds the size limit."""
    return ApiError(413, "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge")


def invalid_mime_type(mime_type: str) -> ApiError:
    """Return the error for a type that the bucket does not allow."""
    return ApiError(415, "invalid_mime_type", f"mime type {mime_type} is not supported", "InvalidMimeType")


def invalid_key(key: str, why: str = "") -> ApiError:
    """Return the error for a key with characters that the API does not allow."""
    return ApiError(400, "InvalidKey", f"Invalid key: {key}{why}", "InvalidKey")


def invalid_bucket_name() -> ApiError:
    """Return the error for a bucket name that the API does not allow."""
    return ApiError(400, "Invalid Input", "Bucket name invalid", "InvalidBucketName")


def invalid_parameter(message: str) -> ApiError:
    """Return the error for a malformed parameter."""
    return ApiError(400, "InvalidParameter", message, "InvalidParameter")


def schema(message: str) -> ApiError:
    """Return the error for a request that violates its schema."""
    return ApiError(400, "Error", message, "InvalidRequest")


def denied(message: str = "new row violates row-level security policy") -> ApiError:
    """Return the error for an invalid token, or a role without write access."""
    return ApiError(403, "Unauthorized", message, "AccessDenied")


def too_many() -> ApiError:
    """Return the error for more concurrent requests than the server allows."""
    return ApiError(429, "too_many_connections", "Too many connections, try again later", "SlowDown", http=429)


def bad_address(path: str) -> ApiError:
    """Return the error for a path that cannot be decoded; the web framework's own, whose `statusCode` is a number."""
    error = ApiError(400, "Bad Request", f"'{path}' is not a valid url component", "FST_ERR_BAD_URL")
    error.body["statusCode"] = 400
    return error


def headers_too_large() -> ApiError:
    """Return the error for headers that are too large; the web framework's own."""
    error = ApiError(
        431, "Request Header Fields Too Large", "Exceeded maximum allowed HTTP header size", "InvalidRequest", http=431
    )
    error.body["statusCode"] = 431
    return error


def internal(message: str) -> ApiError:
    """Return the error for a failure of the server or its disk."""
    return ApiError(500, "Internal", message, "InternalError", http=500)

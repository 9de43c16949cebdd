"""What all routes share: keys, bodies that come in pieces, and errors as the API words them."""

from __future__ import annotations

import errno
import json
import os
import re
import sqlite3
from typing import Any

import tornado.httputil
import tornado.web

from embedded_supabase.storage.auth import SERVICE, role_of
from embedded_supabase.storage.bodies import FormBody, JsonBody, RawBody
from embedded_supabase.storage.errors import ApiError, bad_address, denied, headers_too_large, internal, schema
from embedded_supabase.storage.faults import FaultInjector
from embedded_supabase.storage.requests import is_unicode
from embedded_supabase.storage.store import ObjectStore

#: Bytes of all headers of a request.
HEADER_LIMIT = 16 << 10


@tornado.web.stream_request_body
class Handler(tornado.web.RequestHandler):
    """What all routes share: keys, bodies that come in pieces, errors as the API words them.

    An error that is known before the body has come is kept until then: an answer in the middle of a body would cost
    the client its connection.
    """

    #: What the route answers, where a base class can do more.
    methods: tuple[str, ...] = ("GET", "HEAD", "POST", "PUT", "DELETE")

    store: ObjectStore
    secret: str
    faults: FaultInjector
    role: str
    body: JsonBody | RawBody | FormBody
    error: ApiError | None

    def initialize(self, store: ObjectStore, secret: str, faults: FaultInjector) -> None:
        """Take what all requests share."""
        self.store = store
        self.secret = secret
        self.faults = faults
        self._has_place = False
        self.body = JsonBody()
        self.role = "anon"
        self.error = None

    def set_default_headers(self) -> None:
        """Answer JSON, and name no software."""
        self.clear_header("Server")
        self.set_header("Content-Type", "application/json; charset=utf-8")

    def compute_etag(self) -> None:
        """Send no ETag of our own."""

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        """Return an argument of the path or, with a name, of the query; `prepare` refuses a path that is no UTF-8."""
        return super().decode_argument(value, name) if name else value.decode("utf-8", "surrogateescape")

    def prepare(self) -> None:
        """Check the key, and what the route can check before its body comes."""
        if self.request.method == "OPTIONS":
            return
        if sum(len(name) + len(value) + 4 for name, value in self.request.headers.get_all()) > HEADER_LIMIT:
            self.error = headers_too_large()
            return
        if self.request.method not in self.methods:
            self.error = route_missing(self.request)
            return
        if re.search(r"%(?![0-9A-Fa-f]{2})", self.request.path) or not all(map(is_unicode, self.path_args)):
            self.error = bad_address(self.request.path)
            return
        try:
            if self.request.path.removeprefix("/storage/v1").startswith("/object/"):
                self.faults.enter()
                self._has_place = True
            self.authenticate()
            self.begin()
        except ApiError as exc:
            self.error = exc
        except tornado.web.HTTPError:
            self.error = bad_address(self.request.path)  # its query is no UTF-8
        except (OSError, sqlite3.Error) as exc:
            self.error = disk_error(exc)

    def authenticate(self) -> None:
        """Learn the role from the key, which most routes need."""
        authorization = self.request.headers.get("Authorization")
        if authorization is None:
            raise schema("headers must have required property 'authorization'")
        self.role = role_of(authorization, self.secret)

    def begin(self) -> None:
        """Check what can be checked before the body comes; a route may set another body here."""

    def data_received(self, chunk: bytes) -> None:
        """Take a part of the body; after an error it is only read."""
        if self.error is not None:
            return
        try:
            self.body.write(chunk)
        except ApiError as exc:
            self._fail(exc)
        except OSError as exc:
            self._fail(disk_error(exc))

    def _fail(self, error: ApiError) -> None:
        self.error = error
        self.body.abandon()

    def check(self) -> None:
        """Raise the error that came up before the answer, if any."""
        if self.error is not None:
            raise self.error

    def json_body(self) -> dict[str, Any]:
        """Return the body, which has to be a JSON object.

        Raises:
            ApiError: it is not.
        """
        self.check()
        assert isinstance(self.body, JsonBody)
        value = self.body.read(self.request.headers.get("Content-Type", ""))
        if not isinstance(value, dict):
            raise schema("body must be object")
        return value

    def optional_body(self) -> None:
        """Check a body that says nothing: none, or a JSON object."""
        self.check()
        assert isinstance(self.body, JsonBody)
        self.body.read(self.request.headers.get("Content-Type", ""))

    def require_service(self) -> None:
        """Raise ApiError for a role that row-level security lets do nothing."""
        if self.role != SERVICE:
            raise denied()

    def answer(self, value: Any) -> None:
        """Answer with JSON."""
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer with the body of an error."""
        exc = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(exc, (OSError, sqlite3.Error)):
            exc = disk_error(exc)
        if isinstance(exc, ApiError):
            error = exc
        elif status_code == 400:
            error = bad_address(self.request.path)
        elif status_code in (404, 405):
            error = route_missing(self.request)
        else:
            error = internal("Internal Server Error")
        self.set_status(error.http)
        self.set_default_headers()
        self.answer(error.body)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log what is a defect or a full disk; an error of the API is an answer."""
        if not isinstance(value, ApiError):
            super().log_exception(typ, value, tb)

    def on_connection_close(self) -> None:
        """Forget an upload whose sender went away."""
        super().on_connection_close()
        self._end()

    def on_finish(self) -> None:
        """Remove what was received and not stored."""
        self._end()

    def _end(self) -> None:
        self.body.abandon()
        if self._has_place:
            self._has_place = False
            self.faults.leave()

    def options(self, *_: str) -> None:
        """Answer a browser that asks whether it may."""
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE")
        self.set_header("Access-Control-Allow-Headers", "*")
        self.set_status(204)
        self.clear_header("Content-Type")


def disk_error(exc: OSError | sqlite3.Error) -> ApiError:
    """Return the error of the API that an error of the disk or of the index means."""
    if isinstance(exc, OSError):
        return internal(exc.strerror or str(exc))
    full = getattr(exc, "sqlite_errorname", "") == "SQLITE_FULL" or "full" in str(exc)
    return internal(os.strerror(errno.ENOSPC) if full else str(exc))


def route_missing(request: tornado.httputil.HTTPServerRequest) -> ApiError:
    """Return the error of a path that no route takes."""
    path = request.path.removeprefix("/storage/v1")
    error = ApiError(404, "Not Found", f"Route {request.method}:{path} not found", "InvalidRequest", http=404)
    if not re.match(r"/(object|bucket)(/|$)", path):
        # The web framework answers itself, in its own way.
        error.body = {"message": str(error), "error": "Not Found", "statusCode": 404}
    return error


class Missing(Handler):
    """Any other path."""

    methods = ()


class Status(Handler):
    """Whether the server is there."""

    def authenticate(self) -> None:
        """Ask for no key."""

    def get(self) -> None:
        """Answer 200."""
        self.answer({"status": "ok"})


def object_of(body: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a member of a body that is an object, an empty one where it is missing."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise schema(f"body/{name} must be object")
    return value


def required(body: dict[str, Any], name: str) -> Any:
    """Return a member of a body that has to be there."""
    if body.get(name) is None:
        raise schema(f"body must have required property '{name}'")
    return body[name]

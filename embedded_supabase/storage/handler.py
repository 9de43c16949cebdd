"""The base of all routes: authentication, streamed bodies, error responses."""

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

#: Limit of all headers of a request, in bytes.
HEADER_LIMIT = 16 << 10


@tornado.web.stream_request_body
class Handler(tornado.web.RequestHandler):
    """The base of all routes: authentication, streamed bodies, error responses.

    An error that is detected before the end of the body is sent after it, because a response in the middle of the body
    would force the client to reconnect.
    """

    #: The methods of the route; a base class may implement more.
    methods: tuple[str, ...] = ("GET", "HEAD", "POST", "PUT", "DELETE")

    store: ObjectStore
    secret: str
    faults: FaultInjector
    role: str
    body: JsonBody | RawBody | FormBody
    error: ApiError | None

    def initialize(self, store: ObjectStore, secret: str, faults: FaultInjector) -> None:
        """Set the objects that all requests share."""
        self.store = store
        self.secret = secret
        self.faults = faults
        self._holds_slot = False
        self.body = JsonBody()
        self.role = "anon"
        self.error = None

    def set_default_headers(self) -> None:
        """Set the content type to JSON, and remove the name of the software."""
        self.clear_header("Server")
        self.set_header("Content-Type", "application/json; charset=utf-8")

    def compute_etag(self) -> None:
        """Disable the ETags that Tornado computes."""

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        """Decode an argument of the path or, with a name, of the query; `prepare` rejects a path that is not UTF-8."""
        return super().decode_argument(value, name) if name else value.decode("utf-8", "surrogateescape")

    def prepare(self) -> None:
        """Run all checks that do not need the body."""
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
                self.faults.acquire()
                self._holds_slot = True
            self.authenticate()
            self.begin()
        except ApiError as exc:
            self.error = exc
        except tornado.web.HTTPError:
            self.error = bad_address(self.request.path)  # the query is not UTF-8
        except (OSError, sqlite3.Error) as exc:
            self.error = disk_error(exc)

    def authenticate(self) -> None:
        """Set the role from the header `Authorization`."""
        authorization = self.request.headers.get("Authorization")
        if authorization is None:
            raise schema("headers must have required property 'authorization'")
        self.role = role_of(authorization, self.secret)

    def begin(self) -> None:
        """Run the route's checks before the body; a route may set another body here."""

    def data_received(self, chunk: bytes) -> None:
        """Pass a chunk to the body; discard it after an error."""
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
        """Raise the error that was detected before the end of the body, if any."""
        if self.error is not None:
            raise self.error

    def json_body(self) -> dict[str, Any]:
        """Return the body, a JSON object.

        Raises:
            ApiError: the body is something else.
        """
        self.check()
        assert isinstance(self.body, JsonBody)
        value = self.body.read(self.request.headers.get("Content-Type", ""))
        if not isinstance(value, dict):
            raise schema("body must be object")
        return value

    def optional_body(self) -> None:
        """Validate a body whose content is ignored: empty or JSON."""
        self.check()
        assert isinstance(self.body, JsonBody)
        self.body.read(self.request.headers.get("Content-Type", ""))

    def require_service(self) -> None:
        """Raise ApiError unless the role is the service role."""
        if self.role != SERVICE:
            raise denied()

    def respond(self, value: Any) -> None:
        """Send a JSON response."""
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Send an error response."""
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
        self.respond(error.body)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log unexpected errors only; an ApiError is a regular response."""
        if not isinstance(value, ApiError):
            super().log_exception(typ, value, tb)

    def on_connection_close(self) -> None:
        """Remove the file of an upload whose client disconnected."""
        super().on_connection_close()
        self._release()

    def on_finish(self) -> None:
        """Remove a received file that was not stored."""
        self._release()

    def _release(self) -> None:
        self.body.abandon()
        if self._holds_slot:
            self._holds_slot = False
            self.faults.release()

    def options(self, *_: str) -> None:
        """Respond to a CORS preflight request."""
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE")
        self.set_header("Access-Control-Allow-Headers", "*")
        self.set_status(204)
        self.clear_header("Content-Type")


def disk_error(exc: OSError | sqlite3.Error) -> ApiError:
    """Return the API error for an error of the disk or the index."""
    if isinstance(exc, OSError):
        return internal(exc.strerror or str(exc))
    full = getattr(exc, "sqlite_errorname", "") == "SQLITE_FULL" or "full" in str(exc)
    return internal(os.strerror(errno.ENOSPC) if full else str(exc))


def route_missing(request: tornado.httputil.HTTPServerRequest) -> ApiError:
    """Return the error for a path without a route."""
    path = request.path.removeprefix("/storage/v1")
    error = ApiError(404, "Not Found", f"Route {request.method}:{path} not found", "InvalidRequest", http=404)
    if not re.match(r"/(object|bucket)(/|$)", path):
        # The web framework's own error.
        error.body = {"message": str(error), "error": "Not Found", "statusCode": 404}
    return error


class Missing(Handler):
    """Paths without a route."""

    methods = ()


class Status(Handler):
    """`/status`: the health check."""

    def authenticate(self) -> None:
        """Require no key."""

    def get(self) -> None:
        """Return status 200."""
        self.respond({"status": "ok"})


def object_field(body: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a member that is a JSON object, {} if it is missing."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise schema(f"body/{name} must be object")
    return value


def required_field(body: dict[str, Any], name: str) -> Any:
    """Return a member, or raise ApiError if it is missing."""
    if body.get(name) is None:
        raise schema(f"body must have required property '{name}'")
    return body[name]

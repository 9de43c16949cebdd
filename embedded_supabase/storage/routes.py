"""The routes of the Storage server: what is asked, what it does with the `ObjectStore`, and what it answers.

Statuses and bodies follow https://github.com/supabase/storage.
"""

from __future__ import annotations

import email.utils
import errno
import json
import os
import re
import sqlite3
import sys
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

import tornado.httpserver
import tornado.httputil
import tornado.iostream
import tornado.netutil
import tornado.web
from python_multipart.multipart import parse_options_header

from embedded_supabase.storage.auth import SERVICE, claims_of, role_of, sign
from embedded_supabase.storage.bodies import FormBody, JsonBody, RawBody
from embedded_supabase.storage.errors import (
    ApiError,
    bad_address,
    bucket_missing,
    denied,
    headers_too_large,
    internal,
    key_exists,
    key_missing,
    schema,
    too_large,
)
from embedded_supabase.storage.faults import Strain
from embedded_supabase.storage.requests import (
    allowed_mime_types,
    check_bucket_name,
    check_content_type,
    check_key,
    check_mime_type,
    file_size_limit,
    header_metadata,
    header_text,
    is_unicode,
    size_limit,
    text_of,
    truth,
    whole_number,
)
from embedded_supabase.storage.store import Attributes, Bucket, Object, ObjectStore, now, sorting_of

#: Bytes of all headers of a request.
HEADER_LIMIT = 16 << 10
CHUNK = 256 << 10
#: The longest boundary of a form (RFC 2046, 5.1.1).
_BOUNDARY_LIMIT = 70
_SIGNED_UPLOAD_SECONDS = 60


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
    strain: Strain
    role: str
    body: JsonBody | RawBody | FormBody
    error: ApiError | None

    def initialize(self, store: ObjectStore, secret: str, strain: Strain) -> None:
        """Take what all requests share."""
        self.store = store
        self.secret = secret
        self.strain = strain
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
            self.error = _route_missing(self.request)
            return
        if re.search(r"%(?![0-9A-Fa-f]{2})", self.request.path) or not all(map(is_unicode, self.path_args)):
            self.error = bad_address(self.request.path)
            return
        try:
            if self.request.path.removeprefix("/storage/v1").startswith("/object/"):
                self.strain.enter()
                self._has_place = True
            self.authenticate()
            self.begin()
        except ApiError as exc:
            self.error = exc
        except tornado.web.HTTPError:
            self.error = bad_address(self.request.path)  # its query is no UTF-8
        except (OSError, sqlite3.Error) as exc:
            self.error = _disk_error(exc)

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
            self._fail(_disk_error(exc))

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
            exc = _disk_error(exc)
        if isinstance(exc, ApiError):
            error = exc
        elif status_code == 400:
            error = bad_address(self.request.path)
        elif status_code in (404, 405):
            error = _route_missing(self.request)
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
            self.strain.leave()

    def options(self, *_: str) -> None:
        """Answer a browser that asks whether it may."""
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE")
        self.set_header("Access-Control-Allow-Headers", "*")
        self.set_status(204)
        self.clear_header("Content-Type")


def _disk_error(exc: OSError | sqlite3.Error) -> ApiError:
    if isinstance(exc, OSError):
        return internal(exc.strerror or str(exc))
    full = getattr(exc, "sqlite_errorname", "") == "SQLITE_FULL" or "full" in str(exc)
    return internal(os.strerror(errno.ENOSPC) if full else str(exc))


def _route_missing(request: tornado.httputil.HTTPServerRequest) -> ApiError:
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


# Buckets


class Buckets(Handler):
    """All buckets."""

    def get(self) -> None:
        """List them."""
        self.check()
        limit = whole_number(self.get_query_argument("limit", None), "querystring/limit", 1, sys.maxsize)
        offset = whole_number(self.get_query_argument("offset", None), "querystring/offset", 0, 0)
        order = {name: self.get_query_argument(f"sort{name.title()}", "") for name in ("column", "order")}
        sorting = sorting_of(order, ("id", "name", "created_at", "updated_at"))
        search = self.get_query_argument("search", "").lower()
        found = [bucket for bucket in self.store.list_buckets() if search in bucket.name.lower()]
        found.sort(key=lambda bucket: str(getattr(bucket, sorting.column)), reverse=sorting.descending)
        shown = found[offset : offset + limit] if self.role == SERVICE else []
        self.answer([{**bucket.as_dict(), "type": "STANDARD"} for bucket in shown])

    def post(self) -> None:
        """Create one."""
        body = self.json_body()
        name = text_of(body, "name")
        bucket_id = text_of(body, "id", "") or name
        for text in (name, bucket_id):
            check_bucket_name(text)
        self.require_service()
        moment = now()
        self.store.create_bucket(
            Bucket(
                bucket_id,
                name,
                truth(body["public"], "public") if body.get("public") is not None else False,
                file_size_limit(body.get("file_size_limit")),
                allowed_mime_types(body.get("allowed_mime_types")),
                moment,
                moment,
            )
        )
        self.answer({"name": name})


class OneBucket(Handler):
    """A bucket by its id."""

    def _find(self, bucket_id: str) -> Bucket:
        if self.role != SERVICE:
            raise bucket_missing()
        return self.store.find_bucket(bucket_id)

    def get(self, bucket_id: str) -> None:
        """Show it."""
        self.check()
        self.answer(self._find(bucket_id).as_dict())

    def put(self, bucket_id: str) -> None:
        """Change its settings."""
        body = self.json_body()
        if not {"public", "file_size_limit", "allowed_mime_types"}.intersection(body):
            raise schema("body must have required property 'public'")
        bucket = self._find(bucket_id)
        changes: dict[str, Any] = {}
        if body.get("public") is not None:
            changes["public"] = truth(body["public"], "public")
        if "file_size_limit" in body:
            changes["file_size_limit"] = file_size_limit(body["file_size_limit"])
        if "allowed_mime_types" in body:
            changes["allowed_mime_types"] = allowed_mime_types(body["allowed_mime_types"])
        self.store.update_bucket(replace(bucket, **changes))
        self.answer({"message": "Successfully updated"})

    def delete(self, bucket_id: str) -> None:
        """Delete it when it is empty."""
        self.optional_body()
        self._find(bucket_id)
        self.store.delete_bucket(bucket_id)
        self.answer({"message": "Successfully deleted"})


class EmptyBucket(OneBucket):
    """The objects of a bucket, all of them."""

    methods = ("POST",)

    def post(self, bucket_id: str) -> None:
        """Delete them, at once, though the API only promises to do it soon."""
        self.optional_body()
        self._find(bucket_id)
        self.store.empty_bucket(bucket_id)
        self.answer({"message": "Empty bucket has been queued. Completion may take up to an hour."})


# Objects


class Upload(Handler):
    """What raw, multipart and signed uploads share."""

    _bucket_id: str
    _key: str
    _upsert: bool
    _is_in_time = False

    def authenticate(self) -> None:
        """Learn the role, after a look at the type of the upload, which the API parses first."""
        content_type = self.request.headers.get("Content-Type")
        if self.request.method in ("POST", "PUT") and content_type is not None:
            check_content_type(content_type)
        super().authenticate()

    def receive(self, bucket_id: str, key: str, upsert: bool) -> None:
        """Check an upload in the order of the API, and get ready for its body."""
        self._bucket_id, self._key, self._upsert = bucket_id, key, upsert
        bucket = self.store.find_bucket(bucket_id)
        headers = self.request.headers
        content_type = headers.get("Content-Type", "application/octet-stream")
        kind, options = parse_options_header(content_type.encode("latin-1"))
        is_form = kind == b"multipart/form-data"
        if not is_form:
            check_mime_type(bucket, content_type)
            declared = headers.get("Content-Length", "")
            # What is no number is refused with the framing of the request.
            if declared.isdecimal() and int(declared) > size_limit(bucket):
                raise too_large()
        check_key(key)
        self.require_writer()
        if not upsert and self.store.find(bucket_id, key) is not None:
            raise key_exists()
        limit = 0 if key.endswith(".emptyFolderPlaceholder") else size_limit(bucket)
        if not is_form:
            metadata = header_metadata(headers.get("x-metadata", ""))
            attributes = Attributes(content_type, headers.get("Cache-Control", "no-cache"), metadata)
            self.body = RawBody(self.store.receive(), limit, attributes)
            return
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= _BOUNDARY_LIMIT:
            raise schema("Multipart: Boundary not found")
        self.body = FormBody(
            self.store.receive(), limit, boundary, lambda mime_type: check_mime_type(bucket, mime_type)
        )

    def require_writer(self) -> None:
        """Raise ApiError when the role may not write."""
        self.require_service()

    async def keep(self) -> Object:
        """Store what was received; return when it may be answered."""
        self.check()
        assert not isinstance(self.body, JsonBody)
        attributes = self.body.finish()
        stored = self.store.put(self._bucket_id, self._key, self.body.incoming, attributes)
        self._is_in_time = await self.strain.hold_back(self.request.request_time())
        return stored

    def on_finish(self) -> None:
        """Tell how late the answer was, which is on its way now."""
        super().on_finish()
        if self._is_in_time:
            self.strain.answered(self.request.request_time())


class OneObject(Upload):
    """An object by bucket and key; a private bucket seen without a good key does not exist."""

    is_anonymous: bool

    def authenticate(self) -> None:
        """Learn the role; for reading a missing or bad key is nobody's."""
        self.is_anonymous = False
        try:
            super().authenticate()
        except ApiError as exc:
            if self.request.method not in ("GET", "HEAD") or exc.http != 400:
                raise
            self.is_anonymous = True

    def begin(self) -> None:
        """Get ready for an upload."""
        if self.request.method in ("POST", "PUT"):
            bucket_id, key = self.path_args
            upsert = self.request.method == "PUT" or self.request.headers.get("x-upsert") == "true"
            self.receive(bucket_id, key, upsert)

    def visible(self, bucket_id: str, key: str) -> Object:
        """Return the object if this role sees it.

        Raises:
            ApiError: there is none, or it is in a private bucket.
        """
        bucket = self.store.find_bucket(bucket_id)
        if not bucket.public and self.role != SERVICE:
            raise bucket_missing() if self.is_anonymous else key_missing()
        return self.store.get(bucket_id, key)

    async def post(self, *_: str) -> None:
        """Store an object, in the place of another only with `x-upsert: true`."""
        found = await self.keep()
        self.answer({"Key": f"{found.bucket_id}/{found.name}", "Id": found.id})

    put = post

    async def get(self, bucket_id: str, key: str) -> None:
        """Send an object."""
        self.check()
        await send(self, self.visible(bucket_id, key))

    async def head(self, bucket_id: str, key: str) -> None:
        """Send the headers of an object."""
        await self.get(bucket_id, key)

    def delete(self, bucket_id: str, key: str) -> None:
        """Delete an object."""
        self.optional_body()
        self.store.get(bucket_id, key)
        if self.role != SERVICE:
            raise denied("Access denied")
        self.store.delete(bucket_id, [key])
        self.answer({"message": "Successfully deleted"})


class AuthenticatedObject(OneObject):
    """An object, by a route that insists on a key."""

    methods = ("GET", "HEAD")

    def authenticate(self) -> None:
        """Learn the role from a good key."""
        self.is_anonymous = False
        Handler.authenticate(self)

    def begin(self) -> None:
        """Expect no upload."""


class PublicObject(OneObject):
    """An object of a public bucket."""

    methods = ("GET", "HEAD")

    def authenticate(self) -> None:
        """Ask for no key."""

    def begin(self) -> None:
        """Expect no upload."""

    def visible(self, bucket_id: str, key: str) -> Object:
        """Return the object of a public bucket.

        Raises:
            ApiError: there is none.
        """
        if not self.store.find_bucket(bucket_id).public:
            raise bucket_missing()
        return self.store.get(bucket_id, key)


class Info(OneObject):
    """What is known of an object."""

    methods = ("GET", "HEAD")

    def begin(self) -> None:
        """Expect no upload."""

    async def get(self, bucket_id: str, key: str) -> None:
        """Tell it."""
        self.check()
        found = self.visible(bucket_id, key)
        self.answer(
            {
                "id": found.id,
                "name": found.name,
                "version": found.version,
                "bucket_id": found.bucket_id,
                "size": found.size,
                "content_type": found.mimetype,
                "cache_control": found.cache_control,
                "etag": f'"{found.etag}"',
                "metadata": found.user_metadata,
                "last_modified": found.updated_at,
                "created_at": found.created_at,
            }
        )


class PublicInfo(Info):
    """What is known of an object of a public bucket."""

    authenticate = PublicObject.authenticate
    visible = PublicObject.visible


class AuthenticatedInfo(Info):
    """What is known of an object, by a route that insists on a key."""

    authenticate = AuthenticatedObject.authenticate


class BulkDelete(Handler):
    """Objects of a bucket by exact keys, which the API calls prefixes."""

    def delete(self, bucket_id: str) -> None:
        """Delete those that there are."""
        keys = self.json_body().get("prefixes")
        if not isinstance(keys, list):
            raise schema("body must have required property 'prefixes'")
        if not keys:
            raise schema("body/prefixes must NOT have fewer than 1 items")
        if not all(isinstance(key, str) for key in keys):
            raise schema("body/prefixes/0 must be string")
        legal = [key for key in keys if key.isascii()]
        gone = self.store.delete(bucket_id, legal) if self.role == SERVICE else []
        self.answer([found.row() for found in gone])


class ListFolder(Handler):
    """The first list: one level of a folder."""

    def post(self, bucket_id: str) -> None:
        """List."""
        body = self.json_body()
        folder = text_of(body, "prefix")
        limit = min(whole_number(body.get("limit"), "body/limit", 1, 100), 1500)
        offset = whole_number(body.get("offset"), "body/offset", 0, 0)
        sorting = sorting_of(_object_of(body, "sortBy"), ("name", "created_at", "updated_at", "last_accessed_at"))
        search = text_of(body, "search", "")
        found = self.store.list_folder(bucket_id, folder, search, limit, offset, sorting)
        self.answer(found if self.role == SERVICE else [])


class ListObjects(Handler):
    """The second list: whole keys, page by page."""

    def post(self, bucket_id: str) -> None:
        """List."""
        body = self.json_body()
        found = self.store.list_objects(
            bucket_id,
            text_of(body, "prefix", ""),
            min(whole_number(body.get("limit"), "body/limit", 1, 1000), 1000),
            text_of(body, "cursor", "") or None,
            delimiter=truth(body.get("with_delimiter") or False, "with_delimiter"),
            sorting=sorting_of(_object_of(body, "sortBy")),
        )
        if self.role != SERVICE:
            found = {"hasNext": False, "folders": [], "objects": []}
        self.answer(found)


class Move(Handler):
    """Another key for an object."""

    def post(self) -> None:
        """Move."""
        source, target, key = _source_and_target(self, self.json_body())
        self.store.move(source, target, key)
        self.answer({"message": "Successfully moved"})


class Copy(Handler):
    """An object a second time."""

    def post(self) -> None:
        """Copy."""
        body = self.json_body()
        source, target, key = _source_and_target(self, body)
        if self.request.headers.get("x-upsert") != "true" and self.store.find(target, key) is not None:
            raise key_exists()
        changes = _object_of(body, "metadata")
        attributes = Attributes(source.mimetype, source.cache_control, source.user_metadata)
        if body.get("copyMetadata") is not None and not truth(body["copyMetadata"], "copyMetadata"):
            attributes = Attributes(user_metadata=header_metadata(self.request.headers.get("x-metadata", "")))
        attributes = Attributes(
            text_of(changes, "mimetype", "") or attributes.mimetype,
            text_of(changes, "cacheControl", "") or attributes.cache_control,
            attributes.user_metadata,
        )
        copied = self.store.copy(source, target, key, attributes)
        self.answer({"Key": f"{target}/{key}", "Id": copied.id, **copied.row()})


def _source_and_target(handler: Handler, body: dict[str, Any]) -> tuple[Object, str, str]:
    """Return the object that is moved or copied, and the bucket and key that it is to have.

    Raises:
        ApiError: one of the three is not what it has to be, or this role may not write.
    """
    bucket_id, source_key, key = (text_of(body, name) for name in ("bucketId", "sourceKey", "destinationKey"))
    target = text_of(body, "destinationBucket", "") or bucket_id
    check_key(key)
    source = handler.store.get(bucket_id, source_key)
    handler.require_service()
    try:
        handler.store.find_bucket(target)
    except ApiError as exc:
        message = "The related resource does not exist"
        raise ApiError(404, "Not found", message, "InvalidRequest") from exc
    return source, target, key


def _object_of(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise schema(f"body/{name} must be object")
    return value


# Signed addresses


class SignedObject(Handler):
    """An object for whoever has its address."""

    def authenticate(self) -> None:
        """Ask for no key when the address has a token."""
        if self.request.method == "POST":
            super().authenticate()

    def post(self, bucket_id: str, key: str) -> None:
        """Sign an address."""
        seconds = whole_number(_required(self.json_body(), "expiresIn"), "body/expiresIn", 1, 0)
        self.answer({"signedURL": self.address(bucket_id, key, seconds)})

    def address(self, bucket_id: str, key: str, seconds: int) -> str:
        """Return the signed address of an object.

        Raises:
            ApiError: there is none, or this role does not see it.
        """
        if self.role != SERVICE or not is_unicode(key) or self.store.find(bucket_id, key) is None:
            raise key_missing()
        token = sign(self.secret, {"url": f"{bucket_id}/{key}"}, seconds)
        return f"/object/sign/{quote(bucket_id)}/{quote(key)}?token={token}"

    async def get(self, bucket_id: str, key: str) -> None:
        """Send the object."""
        self.check()
        claims = claims_of(self.get_query_argument("token", ""), self.secret)
        if claims.get("url") != f"{bucket_id}/{key}":
            raise ApiError(400, "InvalidSignature", "Invalid signature", "InvalidSignature")
        await send(self, self.store.get(bucket_id, key))

    head = get


class SignedObjects(SignedObject):
    """Several objects for whoever has their addresses."""

    methods = ("POST",)

    def post(self, bucket_id: str, _: str) -> None:
        """Sign addresses."""
        body = self.json_body()
        seconds = whole_number(_required(body, "expiresIn"), "body/expiresIn", 1, 0)
        paths = _required(body, "paths")
        if not isinstance(paths, list) or not paths:
            raise schema("body/paths must NOT have fewer than 1 items")
        entries = []
        for path in map(str, paths):
            try:
                entries.append({"error": None, "path": path, "signedURL": self.address(bucket_id, path, seconds)})
            except ApiError:
                message = "Either the object does not exist or you do not have access to it"
                entries.append({"error": message, "path": path, "signedURL": None})
        self.answer(entries)


class SignedUpload(Upload):
    """An upload for whoever has its address."""

    def authenticate(self) -> None:
        """Ask for no key when the address has a token."""
        if self.request.method == "POST":
            super().authenticate()

    def begin(self) -> None:
        """Check the token, and get ready for the body."""
        if self.request.method != "PUT":
            return
        check_content_type(self.request.headers.get("Content-Type", "application/octet-stream"))
        bucket_id, key = self.path_args
        claims = claims_of(self.get_query_argument("token", ""), self.secret)
        if claims.get("upload") != f"{bucket_id}/{key}":
            raise ApiError(400, "InvalidSignature", "Invalid signature", "InvalidSignature")
        self.receive(bucket_id, key, bool(claims.get("upsert")))

    def require_writer(self) -> None:
        """Trust the token."""

    def post(self, bucket_id: str, key: str) -> None:
        """Sign an address."""
        self.optional_body()
        self.store.find_bucket(bucket_id)
        check_key(key)
        self.require_service()
        upsert = self.request.headers.get("x-upsert") == "true"
        if not upsert and self.store.find(bucket_id, key) is not None:
            raise key_exists()
        claims = {"upload": f"{bucket_id}/{key}", "upsert": upsert}
        token = sign(self.secret, claims, _SIGNED_UPLOAD_SECONDS)
        address = f"/object/upload/sign/{quote(bucket_id)}/{quote(key)}?token={token}"
        self.answer({"url": address, "token": token})

    async def put(self, *_: str) -> None:
        """Store an object."""
        found = await self.keep()
        self.answer({"Key": f"{found.bucket_id}/{found.name}"})


def _required(body: dict[str, Any], name: str) -> Any:
    if body.get(name) is None:
        raise schema(f"body must have required property '{name}'")
    return body[name]


# Sending


async def send(handler: Handler, found: Object) -> None:
    """Send an object, or the range of it that is asked for (RFC 9110)."""
    headers = handler.request.headers
    modified = datetime.fromisoformat(found.updated_at.replace("Z", "+00:00"))
    mimetype = re.sub("^text/html", "text/plain", found.mimetype, flags=re.IGNORECASE)
    handler.set_header("ETag", f'"{found.etag}"')
    handler.set_header("Last-Modified", email.utils.format_datetime(modified.astimezone(timezone.utc), usegmt=True))
    handler.set_header("Cache-Control", header_text(found.cache_control))
    handler.set_header("Accept-Ranges", "bytes")
    handler.set_header("X-Robots-Tag", "none")
    if _is_known(headers, found, modified):
        handler.clear_header("Content-Type")
        handler.set_status(304)
        return
    handler.set_header("Content-Type", header_text(mimetype))
    if (name := handler.get_query_argument("download", None)) is not None:
        attachment = f"; filename*=UTF-8''{quote(name, safe='')}" if name else ""
        handler.set_header("Content-Disposition", f"attachment{attachment}")
    first, last = 0, found.size - 1
    if "Range" in headers and handler.request.method == "GET":
        first, last = _range(headers["Range"], found.size)
        handler.set_status(206)
        handler.set_header("Content-Range", f"bytes {first}-{last}/{found.size}")
    handler.set_header("Content-Length", str(last - first + 1))
    if handler.request.method == "HEAD":
        return
    with open(handler.store.content_path(found), "rb") as file:
        file.seek(first)
        left = last - first + 1
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise OSError(errno.EIO, "the object's file is shorter than its row says")
            left -= len(chunk)
            handler.write(chunk)
            try:
                await handler.flush()
            except tornado.iostream.StreamClosedError:
                return  # the client has seen enough


def _is_known(headers: tornado.httputil.HTTPHeaders, found: Object, modified: datetime) -> bool:
    if "If-None-Match" in headers:
        known = [tag.strip().removeprefix("W/") for tag in headers["If-None-Match"].split(",")]
        return f'"{found.etag}"' in known or "*" in known
    try:
        since = email.utils.parsedate_to_datetime(headers["If-Modified-Since"])
        return int(modified.timestamp()) <= since.timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return False  # a date that cannot be read is ignored


def _range(text: str, size: int) -> tuple[int, int]:
    """Return the first and last byte of a range.

    Raises:
        ApiError: it is none, more than one, or beyond the end.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.strip(), re.ASCII)
    if match is not None and (match[1] or match[2]):
        first = int(match[1]) if match[1] else max(0, size - int(match[2]))
        last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
        if first <= last:
            return first, last
    raise ApiError(416, "invalid_range", "The requested range is not satisfiable", "InvalidRange", http=416)


# All of them

_ROUTES: tuple[tuple[str, type[Handler]], ...] = (
    (r"/status", Status),
    (r"/bucket/?", Buckets),
    (r"/bucket/([^/]+)/empty", EmptyBucket),
    (r"/bucket/([^/]+)", OneBucket),
    (r"/object/move", Move),
    (r"/object/copy", Copy),
    (r"/object/list/([^/]+)", ListFolder),
    (r"/object/list-v2/([^/]+)", ListObjects),
    (r"/object/info/public/([^/]+)/(.+)", PublicInfo),
    (r"/object/info/authenticated/([^/]+)/(.+)", AuthenticatedInfo),
    (r"/object/info/([^/]+)/(.+)", Info),
    (r"/object/upload/sign/([^/]+)/(.+)", SignedUpload),
    (r"/object/sign/([^/]+)/(.+)", SignedObject),
    (r"/object/sign/([^/]+)()", SignedObjects),
    (r"/object/public/([^/]+)/(.+)", PublicObject),
    (r"/object/authenticated/([^/]+)/(.+)", AuthenticatedObject),
    (r"/object/([^/]+)/(.+)", OneObject),
    (r"/object/([^/]+)", BulkDelete),
)


def application(store: ObjectStore, secret: str, strain: Strain) -> tornado.web.Application:
    """Return the routes over a store."""
    shared = {"store": store, "secret": secret, "strain": strain}
    return tornado.web.Application(
        [(rf"(?:/storage/v1)?{pattern}", handler, shared) for pattern, handler in _ROUTES],
        default_handler_class=Missing,
        default_handler_args=shared,
        log_function=lambda handler: None,
    )

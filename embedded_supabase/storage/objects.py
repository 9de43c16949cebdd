"""Routes: upload, read, info, delete, move and copy of objects."""

from __future__ import annotations

from typing import Any

from python_multipart.multipart import parse_options_header

from embedded_supabase.storage.auth import SERVICE
from embedded_supabase.storage.bodies import FormBody, JsonBody, RawBody
from embedded_supabase.storage.errors import (
    ApiError,
    bucket_missing,
    denied,
    key_exists,
    key_missing,
    schema,
    too_large,
)
from embedded_supabase.storage.handler import Handler, object_field
from embedded_supabase.storage.records import Attributes, Object
from embedded_supabase.storage.requests import (
    check_content_type,
    check_key,
    check_mime_type,
    header_metadata,
    parse_boolean,
    size_limit,
    text_field,
)
from embedded_supabase.storage.sending import send

#: Maximum length of the boundary of a form (RFC 2046, 5.1.1).
_BOUNDARY_LIMIT = 70


class Upload(Handler):
    """The base of raw, multipart and signed uploads."""

    _bucket_id: str
    _key: str
    _upsert: bool
    _was_delayed = False

    def authenticate(self) -> None:
        """Set the role; the API checks the content type of an upload first."""
        content_type = self.request.headers.get("Content-Type")
        if self.request.method in ("POST", "PUT") and content_type is not None:
            check_content_type(content_type)
        super().authenticate()

    def prepare_upload(self, bucket_id: str, key: str, upsert: bool) -> None:
        """Check an upload in the order of the API, and open the file for its body."""
        self._bucket_id, self._key, self._upsert = bucket_id, key, upsert
        bucket = self.store.find_bucket(bucket_id)
        headers = self.request.headers
        content_type = headers.get("Content-Type", "application/octet-stream")
        kind, options = parse_options_header(content_type.encode("latin-1"))
        is_form = kind == b"multipart/form-data"
        if not is_form:
            check_mime_type(bucket, content_type)
            declared = headers.get("Content-Length", "")
            # Tornado rejects a Content-Length that is not a number.
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
        """Raise ApiError unless the role may write."""
        self.require_service()

    async def store_upload(self) -> Object:
        """Store the received object; return when the response may be sent."""
        self.check()
        assert not isinstance(self.body, JsonBody)
        attributes = self.body.finish()
        stored = await self.store.put(self._bucket_id, self._key, self.body.incoming, attributes)
        self._was_delayed = await self.faults.delay(self.request.request_time())
        return stored

    def on_finish(self) -> None:
        """Record when the response of a delayed upload was sent."""
        super().on_finish()
        if self._was_delayed:
            self.faults.record_response(self.request.request_time())


class OneObject(Upload):
    """`/object/<bucket>/<key>`; without a valid token, a private bucket appears not to exist."""

    is_anonymous: bool

    def authenticate(self) -> None:
        """Set the role; a read with a missing or invalid token is anonymous."""
        self.is_anonymous = False
        try:
            super().authenticate()
        except ApiError as exc:
            if self.request.method not in ("GET", "HEAD") or exc.http != 400:
                raise
            self.is_anonymous = True

    def begin(self) -> None:
        """Prepare an upload."""
        if self.request.method in ("POST", "PUT"):
            bucket_id, key = self.path_args
            upsert = self.request.method == "PUT" or self.request.headers.get("x-upsert") == "true"
            self.prepare_upload(bucket_id, key, upsert)

    def visible(self, bucket_id: str, key: str) -> Object:
        """Return the object if it is visible to the role.

        Raises:
            ApiError: it does not exist, or is in a private bucket.
        """
        bucket = self.store.find_bucket(bucket_id)
        if not bucket.public and self.role != SERVICE:
            raise bucket_missing() if self.is_anonymous else key_missing()
        return self.store.get(bucket_id, key)

    async def post(self, *_: str) -> None:
        """Store an object; replace an existing one only with `x-upsert: true`."""
        found = await self.store_upload()
        self.respond({"Key": f"{found.bucket_id}/{found.name}", "Id": found.id})

    put = post

    async def get(self, bucket_id: str, key: str) -> None:
        """Send an object."""
        self.check()
        await send(self, self.visible(bucket_id, key))

    async def head(self, bucket_id: str, key: str) -> None:
        """Send the headers of an object."""
        await self.get(bucket_id, key)

    async def delete(self, bucket_id: str, key: str) -> None:
        """Delete an object."""
        self.optional_body()
        self.store.get(bucket_id, key)
        if self.role != SERVICE:
            raise denied("Access denied")
        await self.store.delete(bucket_id, [key])
        self.respond({"message": "Successfully deleted"})


class AuthenticatedObject(OneObject):
    """`/object/authenticated/<bucket>/<key>`: requires a token."""

    methods = ("GET", "HEAD")

    def authenticate(self) -> None:
        """Set the role; the token is required."""
        self.is_anonymous = False
        Handler.authenticate(self)


class PublicObject(OneObject):
    """`/object/public/<bucket>/<key>`: requires no token."""

    methods = ("GET", "HEAD")

    def authenticate(self) -> None:
        """Require no token."""

    def visible(self, bucket_id: str, key: str) -> Object:
        """Return the object of a public bucket.

        Raises:
            ApiError: it does not exist, or the bucket is private.
        """
        if not self.store.find_bucket(bucket_id).public:
            raise bucket_missing()
        return self.store.get(bucket_id, key)


class Info(OneObject):
    """`/object/info/<bucket>/<key>`: the metadata of an object."""

    methods = ("GET", "HEAD")

    async def get(self, bucket_id: str, key: str) -> None:
        """Return the metadata."""
        self.check()
        found = self.visible(bucket_id, key)
        self.respond(
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
    """`/object/info/public/<bucket>/<key>`: requires no token."""

    authenticate = PublicObject.authenticate
    visible = PublicObject.visible


class AuthenticatedInfo(Info):
    """`/object/info/authenticated/<bucket>/<key>`: requires a token."""

    authenticate = AuthenticatedObject.authenticate


class BulkDelete(Handler):
    """`/object/<bucket>`: several objects by their exact keys, which the API calls prefixes."""

    async def delete(self, bucket_id: str) -> None:
        """Delete the objects that exist."""
        keys = self.json_body().get("prefixes")
        if not isinstance(keys, list):
            raise schema("body must have required property 'prefixes'")
        if not keys:
            raise schema("body/prefixes must NOT have fewer than 1 items")
        if not all(isinstance(key, str) for key in keys):
            raise schema("body/prefixes/0 must be string")
        valid = [key for key in keys if key.isascii()]
        deleted = await self.store.delete(bucket_id, valid) if self.role == SERVICE else []
        self.respond([found.row() for found in deleted])


class Move(Handler):
    """`/object/move`."""

    async def post(self) -> None:
        """Move an object."""
        source, target, key = _source_and_target(self, self.json_body())
        await self.store.move(source, target, key)
        self.respond({"message": "Successfully moved"})


class Copy(Handler):
    """`/object/copy`."""

    async def post(self) -> None:
        """Copy an object."""
        body = self.json_body()
        source, target, key = _source_and_target(self, body)
        if self.request.headers.get("x-upsert") != "true" and self.store.find(target, key) is not None:
            raise key_exists()
        changes = object_field(body, "metadata")
        attributes = Attributes(source.mimetype, source.cache_control, source.user_metadata)
        if body.get("copyMetadata") is not None and not parse_boolean(body["copyMetadata"], "copyMetadata"):
            attributes = Attributes(user_metadata=header_metadata(self.request.headers.get("x-metadata", "")))
        attributes = Attributes(
            text_field(changes, "mimetype", "") or attributes.mimetype,
            text_field(changes, "cacheControl", "") or attributes.cache_control,
            attributes.user_metadata,
        )
        copied = await self.store.copy(source, target, key, attributes)
        self.respond({"Key": f"{target}/{key}", "Id": copied.id, **copied.row()})


def _source_and_target(handler: Handler, body: dict[str, Any]) -> tuple[Object, str, str]:
    """Return the source object, the target bucket and the target key of a move or copy.

    Raises:
        ApiError: the source or the target bucket does not exist, the key is invalid, or the role may not write.
    """
    bucket_id, source_key, key = (text_field(body, name) for name in ("bucketId", "sourceKey", "destinationKey"))
    target = text_field(body, "destinationBucket", "") or bucket_id
    check_key(key)
    source = handler.store.get(bucket_id, source_key)
    handler.require_service()
    try:
        handler.store.find_bucket(target)
    except ApiError as exc:
        message = "The related resource does not exist"
        raise ApiError(404, "Not found", message, "InvalidRequest") from exc
    return source, target, key

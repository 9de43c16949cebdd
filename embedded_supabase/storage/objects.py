"""The routes of single objects: upload, read, info, delete, move and copy."""

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
from embedded_supabase.storage.handler import Handler, object_of
from embedded_supabase.storage.records import Attributes, Object
from embedded_supabase.storage.requests import (
    check_content_type,
    check_key,
    check_mime_type,
    header_metadata,
    size_limit,
    text_of,
    truth,
)
from embedded_supabase.storage.sending import send

#: The longest boundary of a form (RFC 2046, 5.1.1).
_BOUNDARY_LIMIT = 70


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
        self._is_in_time = await self.faults.hold_back(self.request.request_time())
        return stored

    def on_finish(self) -> None:
        """Tell how late the answer was, which is on its way now."""
        super().on_finish()
        if self._is_in_time:
            self.faults.answered(self.request.request_time())


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
        changes = object_of(body, "metadata")
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

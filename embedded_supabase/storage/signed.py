"""Routes: signed URLs for downloads and uploads."""

from __future__ import annotations

from urllib.parse import quote

from embedded_supabase.storage.auth import SERVICE, claims_of, sign
from embedded_supabase.storage.errors import ApiError, key_exists, key_missing, schema
from embedded_supabase.storage.handler import Handler, required_field
from embedded_supabase.storage.objects import Upload
from embedded_supabase.storage.requests import check_content_type, check_key, is_unicode, parse_integer
from embedded_supabase.storage.sending import send

_SIGNED_UPLOAD_SECONDS = 60


class SignedObject(Handler):
    """`/object/sign/<bucket>/<key>`: sign a URL, and download with its token."""

    def authenticate(self) -> None:
        """Require a key for signing only; the URL contains its own token."""
        if self.request.method == "POST":
            super().authenticate()

    def post(self, bucket_id: str, key: str) -> None:
        """Return a signed URL."""
        seconds = parse_integer(required_field(self.json_body(), "expiresIn"), "body/expiresIn", 1, 0)
        self.respond({"signedURL": self.signed_url(bucket_id, key, seconds)})

    def signed_url(self, bucket_id: str, key: str, seconds: int) -> str:
        """Return the signed URL of an object.

        Raises:
            ApiError: the object does not exist or is not visible to the role.
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
    """`/object/sign/<bucket>`: sign several URLs."""

    methods = ("POST",)

    def post(self, bucket_id: str, _: str) -> None:
        """Return signed URLs."""
        body = self.json_body()
        seconds = parse_integer(required_field(body, "expiresIn"), "body/expiresIn", 1, 0)
        paths = required_field(body, "paths")
        if not isinstance(paths, list) or not paths:
            raise schema("body/paths must NOT have fewer than 1 items")
        entries = []
        for path in map(str, paths):
            try:
                entries.append({"error": None, "path": path, "signedURL": self.signed_url(bucket_id, path, seconds)})
            except ApiError:
                message = "Either the object does not exist or you do not have access to it"
                entries.append({"error": message, "path": path, "signedURL": None})
        self.respond(entries)


class SignedUpload(Upload):
    """`/object/upload/sign/<bucket>/<key>`: sign a URL, and upload with its token."""

    def authenticate(self) -> None:
        """Require a key for signing only; the URL contains its own token."""
        if self.request.method == "POST":
            super().authenticate()

    def begin(self) -> None:
        """Check the token, and prepare the upload."""
        if self.request.method != "PUT":
            return
        check_content_type(self.request.headers.get("Content-Type", "application/octet-stream"))
        bucket_id, key = self.path_args
        claims = claims_of(self.get_query_argument("token", ""), self.secret)
        if claims.get("upload") != f"{bucket_id}/{key}":
            raise ApiError(400, "InvalidSignature", "Invalid signature", "InvalidSignature")
        self.prepare_upload(bucket_id, key, bool(claims.get("upsert")))

    def require_writer(self) -> None:
        """Accept any role; the token has been checked."""

    def post(self, bucket_id: str, key: str) -> None:
        """Return a signed URL."""
        self.optional_body()
        self.store.find_bucket(bucket_id)
        check_key(key)
        self.require_service()
        upsert = self.request.headers.get("x-upsert") == "true"
        if not upsert and self.store.find(bucket_id, key) is not None:
            raise key_exists()
        claims = {"upload": f"{bucket_id}/{key}", "upsert": upsert}
        token = sign(self.secret, claims, _SIGNED_UPLOAD_SECONDS)
        url = f"/object/upload/sign/{quote(bucket_id)}/{quote(key)}?token={token}"
        self.respond({"url": url, "token": token})

    async def put(self, *_: str) -> None:
        """Store an object."""
        found = await self.store_upload()
        self.respond({"Key": f"{found.bucket_id}/{found.name}"})

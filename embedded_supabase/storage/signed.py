"""Signed addresses: objects and uploads for everybody who has the address."""

from __future__ import annotations

from urllib.parse import quote

from embedded_supabase.storage.auth import SERVICE, claims_of, sign
from embedded_supabase.storage.errors import ApiError, key_exists, key_missing, schema
from embedded_supabase.storage.handler import Handler, required
from embedded_supabase.storage.objects import Upload
from embedded_supabase.storage.requests import check_content_type, check_key, is_unicode, whole_number
from embedded_supabase.storage.sending import send

_SIGNED_UPLOAD_SECONDS = 60


class SignedObject(Handler):
    """An object for whoever has its address."""

    def authenticate(self) -> None:
        """Ask for no key when the address has a token."""
        if self.request.method == "POST":
            super().authenticate()

    def post(self, bucket_id: str, key: str) -> None:
        """Sign an address."""
        seconds = whole_number(required(self.json_body(), "expiresIn"), "body/expiresIn", 1, 0)
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
        seconds = whole_number(required(body, "expiresIn"), "body/expiresIn", 1, 0)
        paths = required(body, "paths")
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

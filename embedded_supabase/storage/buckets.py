"""Routes: buckets."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from embedded_supabase.storage.auth import SERVICE
from embedded_supabase.storage.errors import bucket_missing, schema
from embedded_supabase.storage.handler import Handler
from embedded_supabase.storage.records import Bucket, now, sorting_of
from embedded_supabase.storage.requests import (
    allowed_mime_types,
    check_bucket_name,
    file_size_limit,
    parse_boolean,
    parse_integer,
    text_field,
)


class Buckets(Handler):
    """`/bucket`: all buckets."""

    def get(self) -> None:
        """List the buckets."""
        self.check()
        limit = parse_integer(self.get_query_argument("limit", None), "querystring/limit", 1, sys.maxsize)
        offset = parse_integer(self.get_query_argument("offset", None), "querystring/offset", 0, 0)
        order = {name: self.get_query_argument(f"sort{name.title()}", "") for name in ("column", "order")}
        sorting = sorting_of(order, ("id", "name", "created_at", "updated_at"))
        search = self.get_query_argument("search", "").lower()
        found = [bucket for bucket in self.store.list_buckets() if search in bucket.name.lower()]
        found.sort(key=lambda bucket: str(getattr(bucket, sorting.column)), reverse=sorting.descending)
        visible = found[offset : offset + limit] if self.role == SERVICE else []
        self.respond([{**bucket.as_dict(), "type": "STANDARD"} for bucket in visible])

    async def post(self) -> None:
        """Create a bucket."""
        body = self.json_body()
        name = text_field(body, "name")
        bucket_id = text_field(body, "id", "") or name
        for text in (name, bucket_id):
            check_bucket_name(text)
        self.require_service()
        timestamp = now()
        await self.store.create_bucket(
            Bucket(
                bucket_id,
                name,
                parse_boolean(body["public"], "public") if body.get("public") is not None else False,
                file_size_limit(body.get("file_size_limit")),
                allowed_mime_types(body.get("allowed_mime_types")),
                timestamp,
                timestamp,
            )
        )
        self.respond({"name": name})


class OneBucket(Handler):
    """`/bucket/<id>`: one bucket."""

    def _find(self, bucket_id: str) -> Bucket:
        if self.role != SERVICE:
            raise bucket_missing()
        return self.store.find_bucket(bucket_id)

    def get(self, bucket_id: str) -> None:
        """Return the bucket."""
        self.check()
        self.respond(self._find(bucket_id).as_dict())

    async def put(self, bucket_id: str) -> None:
        """Change the settings of the bucket."""
        body = self.json_body()
        if not {"public", "file_size_limit", "allowed_mime_types"}.intersection(body):
            raise schema("body must have required property 'public'")
        bucket = self._find(bucket_id)
        changes: dict[str, Any] = {}
        if body.get("public") is not None:
            changes["public"] = parse_boolean(body["public"], "public")
        if "file_size_limit" in body:
            changes["file_size_limit"] = file_size_limit(body["file_size_limit"])
        if "allowed_mime_types" in body:
            changes["allowed_mime_types"] = allowed_mime_types(body["allowed_mime_types"])
        await self.store.update_bucket(replace(bucket, **changes))
        self.respond({"message": "Successfully updated"})

    async def delete(self, bucket_id: str) -> None:
        """Delete the bucket if it is empty."""
        self.optional_body()
        self._find(bucket_id)
        await self.store.delete_bucket(bucket_id)
        self.respond({"message": "Successfully deleted"})


class EmptyBucket(OneBucket):
    """`/bucket/<id>/empty`: all objects of a bucket."""

    methods = ("POST",)

    async def post(self, bucket_id: str) -> None:
        """Delete all objects immediately; the API allows a delay."""
        self.optional_body()
        self._find(bucket_id)
        await self.store.empty_bucket(bucket_id)
        self.respond({"message": "Empty bucket has been queued. Completion may take up to an hour."})

"""The routes of buckets."""

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
    text_of,
    truth,
    whole_number,
)


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

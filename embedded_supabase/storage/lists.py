"""Routes: the two list operations."""

from __future__ import annotations

from embedded_supabase.storage.auth import SERVICE
from embedded_supabase.storage.handler import Handler, object_field
from embedded_supabase.storage.records import sorting_of
from embedded_supabase.storage.requests import parse_boolean, parse_integer, text_field


class ListFolder(Handler):
    """`/object/list/<bucket>`: one level of a folder (v1)."""

    def post(self, bucket_id: str) -> None:
        """Return a page of the list."""
        body = self.json_body()
        folder = text_field(body, "prefix")
        limit = min(parse_integer(body.get("limit"), "body/limit", 1, 100), 1500)
        offset = parse_integer(body.get("offset"), "body/offset", 0, 0)
        sorting = sorting_of(object_field(body, "sortBy"), ("name", "created_at", "updated_at", "last_accessed_at"))
        search = text_field(body, "search", "")
        found = self.store.listing.list_folder(bucket_id, folder, search, limit, offset, sorting)
        self.respond(found if self.role == SERVICE else [])


class ListObjects(Handler):
    """`/object/list-v2/<bucket>`: keys in pages (v2)."""

    def post(self, bucket_id: str) -> None:
        """Return a page of the list."""
        body = self.json_body()
        found = self.store.listing.list_objects(
            bucket_id,
            text_field(body, "prefix", ""),
            min(parse_integer(body.get("limit"), "body/limit", 1, 1000), 1000),
            text_field(body, "cursor", "") or None,
            delimiter=parse_boolean(body.get("with_delimiter") or False, "with_delimiter"),
            sorting=sorting_of(object_field(body, "sortBy")),
        )
        if self.role != SERVICE:
            found = {"hasNext": False, "folders": [], "objects": []}
        self.respond(found)

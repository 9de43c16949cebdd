"""The two lists of objects."""

from __future__ import annotations

from embedded_supabase.storage.auth import SERVICE
from embedded_supabase.storage.handler import Handler, object_of
from embedded_supabase.storage.records import sorting_of
from embedded_supabase.storage.requests import text_of, truth, whole_number


class ListFolder(Handler):
    """The first list: one level of a folder."""

    def post(self, bucket_id: str) -> None:
        """List."""
        body = self.json_body()
        folder = text_of(body, "prefix")
        limit = min(whole_number(body.get("limit"), "body/limit", 1, 100), 1500)
        offset = whole_number(body.get("offset"), "body/offset", 0, 0)
        sorting = sorting_of(object_of(body, "sortBy"), ("name", "created_at", "updated_at", "last_accessed_at"))
        search = text_of(body, "search", "")
        found = self.store.listing.list_folder(bucket_id, folder, search, limit, offset, sorting)
        self.answer(found if self.role == SERVICE else [])


class ListObjects(Handler):
    """The second list: whole keys, page by page."""

    def post(self, bucket_id: str) -> None:
        """List."""
        body = self.json_body()
        found = self.store.listing.list_objects(
            bucket_id,
            text_of(body, "prefix", ""),
            min(whole_number(body.get("limit"), "body/limit", 1, 1000), 1000),
            text_of(body, "cursor", "") or None,
            delimiter=truth(body.get("with_delimiter") or False, "with_delimiter"),
            sorting=sorting_of(object_of(body, "sortBy")),
        )
        if self.role != SERVICE:
            found = {"hasNext": False, "folders": [], "objects": []}
        self.answer(found)

"""Buckets and objects, and their representation in the API."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from embedded_supabase.storage.errors import invalid_parameter

_SORTABLE = ("name", "created_at", "updated_at")


def now() -> str:
    """Return the current UTC time in the format of the API, with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Bucket:
    """A bucket; None as limit or types means no restriction."""

    id: str
    name: str
    public: bool
    file_size_limit: int | None
    allowed_mime_types: list[str] | None
    created_at: str
    updated_at: str

    def as_dict(self) -> dict[str, Any]:
        """Return the representation in responses."""
        return {
            "id": self.id,
            "name": self.name,
            "owner": "",
            "public": self.public,
            "file_size_limit": self.file_size_limit,
            "allowed_mime_types": self.allowed_mime_types,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        }


@dataclass(frozen=True)
class Attributes:
    """The attributes of an object that the uploader sets."""

    mimetype: str = "application/octet-stream"
    cache_control: str = "no-cache"
    user_metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Object:
    """An object; `etag` is the MD5 of its content in hex, `version` names its file."""

    bucket_id: str
    name: str
    id: str
    version: str
    size: int
    etag: str
    mimetype: str
    cache_control: str
    user_metadata: dict[str, Any]
    created_at: str
    updated_at: str

    def metadata(self) -> dict[str, Any]:
        """Return the metadata in the format of the API."""
        return {
            "eTag": f'"{self.etag}"',
            "size": self.size,
            "mimetype": self.mimetype,
            "cacheControl": self.cache_control,
            "lastModified": self.updated_at,
            "contentLength": self.size,
            "httpStatusCode": 200,
        }

    def entry(self, name: str | None = None) -> dict[str, Any]:
        """Return the entry in a list; `name` replaces the full key."""
        return {
            "name": self.name if name is None else name,
            "id": self.id,
            "updated_at": self.updated_at,
            "created_at": self.created_at,
            "last_accessed_at": self.updated_at,
            "metadata": self.metadata(),
        }

    def row(self) -> dict[str, Any]:
        """Return the row of storage.objects that delete and copy respond with."""
        return {
            **self.entry(),
            "bucket_id": self.bucket_id,
            "owner": "",
            "owner_id": "",
            "version": self.version,
            "user_metadata": self.user_metadata,
        }


@dataclass(frozen=True)
class Sorting:
    """The order of a list."""

    column: str = "name"
    descending: bool = False


def sorting_of(value: dict[str, Any], columns: Sequence[str] = _SORTABLE) -> Sorting:
    """Return the order in a request.

    Raises:
        ApiError: the column or the direction is unknown.
    """
    column, order = value.get("column") or "name", str(value.get("order") or "asc").lower()
    if column not in columns or order not in ("asc", "desc"):
        raise invalid_parameter("Invalid Parameter sortBy")
    return Sorting("updated_at" if column == "last_accessed_at" else column, order == "desc")


def bucket_of(row: sqlite3.Row) -> Bucket:
    """Return the bucket of a row of the index."""
    values = dict(row)
    types = values["allowed_mime_types"]
    return Bucket(**{**values, "public": bool(values["public"]), "allowed_mime_types": types and json.loads(types)})


def object_of_row(row: sqlite3.Row) -> Object:
    """Return the object of a row of the index."""
    values = dict(row)
    return Object(**{**values, "user_metadata": json.loads(values["user_metadata"])})

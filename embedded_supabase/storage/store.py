"""Objects as files, and an index of them in SQLite; no HTTP in it.

Below the root:

    index.sqlite    buckets and objects: which key is which file
    objects/ab/…    the contents, one file for each version of an object, named by a random UUID
    incoming/…      uploads that are under way

A file's name has nothing of its key, so no key leads out of the folder. An upload is written to `incoming`, renamed
into `objects`, and counts from the commit of its row; before that nobody sees it. Files that no row names, left by a
kill, are removed at the next start. One process at a time opens a store.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from embedded_supabase.storage.errors import (
    bucket_exists,
    bucket_missing,
    bucket_not_empty,
    invalid_parameter,
    key_exists,
    key_missing,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS buckets (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, public INTEGER NOT NULL, file_size_limit INTEGER,
    allowed_mime_types TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS objects (
    bucket_id TEXT NOT NULL REFERENCES buckets (id), name TEXT NOT NULL, id TEXT NOT NULL, version TEXT NOT NULL,
    size INTEGER NOT NULL, etag TEXT NOT NULL, mimetype TEXT NOT NULL, cache_control TEXT NOT NULL,
    user_metadata TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    PRIMARY KEY (bucket_id, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS objects_lower ON objects (bucket_id, lower(name), name);
"""
#: Sorts after every key: UTF-8 keeps the order of code points.
_LAST = chr(0x10FFFF)
_SORTABLE = ("name", "created_at", "updated_at")


def now() -> str:
    """Return the time as the API writes it, in UTC with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Bucket:
    """A bucket; no limit and no list of types mean that it takes everything."""

    id: str
    name: str
    public: bool
    file_size_limit: int | None
    allowed_mime_types: list[str] | None
    created_at: str
    updated_at: str

    def as_dict(self) -> dict[str, Any]:
        """Return the bucket as the API shows it."""
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
    """What an uploader says of an object."""

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
        """Return the metadata as the API shows it."""
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
        """Return the object as a list shows it, under another name if one is given."""
        return {
            "name": self.name if name is None else name,
            "id": self.id,
            "updated_at": self.updated_at,
            "created_at": self.created_at,
            "last_accessed_at": self.updated_at,
            "metadata": self.metadata(),
        }

    def row(self) -> dict[str, Any]:
        """Return the object as a row of storage.objects, as deleting and copying show it."""
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


class Incoming:
    """An upload that is under way: a file that nobody sees."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "xb")  # noqa: SIM115 (it lives as long as the upload)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._finished = False
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Add to the content.

        Raises:
            OSError: the disk does not take it.
        """
        self._file.write(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)

    def finish(self, target: Path) -> str:
        """Move the file to its place, and return the MD5 of its content in hex."""
        self._file.close()
        _move(self._path, target)
        self._finished = True
        return self._md5.hexdigest()

    def abandon(self) -> None:
        """Remove the file; nothing happens after `finish`."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # what a full disk did not take, it does not take now
            self._file.close()
        self._path.unlink(missing_ok=True)


class ObjectStore:
    """Buckets and objects in a folder."""

    def __init__(self, root: Path) -> None:
        """Open the store, making it if there is none, and remove what a kill has left."""
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        for folder in (self._objects, self._incoming):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._index = sqlite3.connect(root / "index.sqlite", isolation_level=None)
        self._index.row_factory = sqlite3.Row
        # A kill of this process loses nothing that was committed; the log is synced when it is folded in.
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            self._index.execute(f"PRAGMA {pragma}")
        self._index.executescript(_SCHEMA)
        self._sweep()

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def _sweep(self) -> None:
        for path in self._incoming.iterdir():
            path.unlink()
        named = {version for (version,) in self._index.execute("SELECT version FROM objects")}
        for folder in self._objects.iterdir():
            for path in folder.iterdir():
                if path.name not in named:
                    path.unlink()

    # Buckets

    def create_bucket(self, bucket: Bucket) -> None:
        """Add a bucket.

        Raises:
            ApiError: its id or name is taken.
        """
        try:
            self._index.execute(
                "INSERT INTO buckets VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    bucket.id,
                    bucket.name,
                    bucket.public,
                    bucket.file_size_limit,
                    None if bucket.allowed_mime_types is None else json.dumps(bucket.allowed_mime_types),
                    bucket.created_at,
                    bucket.updated_at,
                ),
            )
        except sqlite3.IntegrityError as exc:
            raise bucket_exists() from exc

    def update_bucket(self, bucket: Bucket) -> None:
        """Write the settings of a bucket that exists."""
        self._index.execute(
            "UPDATE buckets SET public = ?, file_size_limit = ?, allowed_mime_types = ?, updated_at = ? WHERE id = ?",
            (
                bucket.public,
                bucket.file_size_limit,
                None if bucket.allowed_mime_types is None else json.dumps(bucket.allowed_mime_types),
                now(),
                bucket.id,
            ),
        )

    def find_bucket(self, bucket_id: str) -> Bucket:
        """Return a bucket.

        Raises:
            ApiError: there is none.
        """
        row = self._index.execute("SELECT * FROM buckets WHERE id = ?", (bucket_id,)).fetchone()
        if row is None:
            raise bucket_missing()
        return _bucket(row)

    def list_buckets(self) -> list[Bucket]:
        """Return all buckets by name."""
        return [_bucket(row) for row in self._index.execute("SELECT * FROM buckets ORDER BY name")]

    def empty_bucket(self, bucket_id: str) -> None:
        """Delete all objects of a bucket."""
        self.find_bucket(bucket_id)
        rows = self._index.execute("SELECT name FROM objects WHERE bucket_id = ?", (bucket_id,)).fetchall()
        self.delete(bucket_id, [name for (name,) in rows])

    def delete_bucket(self, bucket_id: str) -> None:
        """Delete an empty bucket.

        Raises:
            ApiError: there is none, or it is not empty.
        """
        self.find_bucket(bucket_id)
        try:
            self._index.execute("DELETE FROM buckets WHERE id = ?", (bucket_id,))
        except sqlite3.IntegrityError as exc:
            raise bucket_not_empty() from exc

    # Objects

    def receive(self) -> Incoming:
        """Begin an upload."""
        return Incoming(self._incoming / str(uuid.uuid4()))

    def put(self, bucket_id: str, key: str, incoming: Incoming, attributes: Attributes) -> Object:
        """Make an upload the content of a key, in the place of what may be there."""
        version = str(uuid.uuid4())
        etag = incoming.finish(self._path(version))
        return self._write(bucket_id, key, version, incoming.size, etag, attributes)

    def _write(self, bucket_id: str, key: str, version: str, size: int, etag: str, attributes: Attributes) -> Object:
        former = self.find(bucket_id, key)
        moment = now()
        found = Object(
            bucket_id,
            key,
            former.id if former else str(uuid.uuid4()),
            version,
            size,
            etag,
            attributes.mimetype,
            attributes.cache_control,
            attributes.user_metadata,
            former.created_at if former else moment,
            moment,
        )
        try:
            self._index.execute(
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    found.bucket_id,
                    found.name,
                    found.id,
                    found.version,
                    found.size,
                    found.etag,
                    found.mimetype,
                    found.cache_control,
                    json.dumps(found.user_metadata),
                    found.created_at,
                    found.updated_at,
                ),
            )
        except sqlite3.Error as exc:
            self._path(version).unlink(missing_ok=True)
            if isinstance(exc, sqlite3.IntegrityError):
                raise bucket_missing() from exc  # it was deleted while the body came in
            raise
        if former:
            self._path(former.version).unlink(missing_ok=True)
        return found

    def find(self, bucket_id: str, key: str) -> Object | None:
        """Return an object, None when there is none."""
        row = self._index.execute("SELECT * FROM objects WHERE bucket_id = ? AND name = ?", (bucket_id, key)).fetchone()
        return _object(row) if row is not None else None

    def get(self, bucket_id: str, key: str) -> Object:
        """Return an object.

        Raises:
            ApiError: there is none.
        """
        found = self.find(bucket_id, key)
        if found is None:
            raise key_missing()
        return found

    def content_path(self, found: Object) -> Path:
        """Return the file of an object."""
        return self._path(found.version)

    def delete(self, bucket_id: str, keys: Sequence[str]) -> list[Object]:
        """Delete objects by their exact keys, in one transaction; return those that there were."""
        gone = []
        self._index.execute("BEGIN IMMEDIATE")
        try:
            for key in dict.fromkeys(keys):
                found = self.find(bucket_id, key)
                if found is not None:
                    self._index.execute("DELETE FROM objects WHERE bucket_id = ? AND name = ?", (bucket_id, key))
                    gone.append(found)
            self._index.execute("COMMIT")
        finally:
            # A transaction that stays open would take in, and lose, every write that is acknowledged after it.
            if self._index.in_transaction:
                self._index.execute("ROLLBACK")
        for found in gone:
            self._path(found.version).unlink(missing_ok=True)
        return gone

    def move(self, source: Object, bucket_id: str, key: str) -> None:
        """Give an object another key, and perhaps another bucket.

        Raises:
            ApiError: the key is taken.
        """
        if (source.bucket_id, source.name) == (bucket_id, key):
            return
        try:
            self._index.execute(
                "UPDATE objects SET bucket_id = ?, name = ?, updated_at = ? WHERE bucket_id = ? AND name = ?",
                (bucket_id, key, now(), source.bucket_id, source.name),
            )
        except sqlite3.IntegrityError as exc:
            raise key_exists("ResourceAlreadyExists") from exc

    def copy(self, source: Object, bucket_id: str, key: str, attributes: Attributes) -> Object:
        """Store the content of an object under another key as well."""
        version = str(uuid.uuid4())
        incoming = self._incoming / version
        try:
            shutil.copyfile(self._path(source.version), incoming)
            _move(incoming, self._path(version))
        except OSError:
            incoming.unlink(missing_ok=True)
            raise
        return self._write(bucket_id, key, version, source.size, source.etag, attributes)

    # Lists

    def list_folder(
        self, bucket_id: str, folder: str, search: str, limit: int, offset: int, sorting: Sorting
    ) -> list[dict[str, Any]]:
        """Return one level of a folder as the first list call does: names relative, letter case ignored."""
        base = folder if not folder or folder.endswith("/") else f"{folder}/"
        prefix = (base + search).lower()
        folders: dict[str, dict[str, Any]] = {}
        files: list[tuple[str, Object]] = []
        for row in self._index.execute(
            "SELECT * FROM objects WHERE bucket_id = ? AND lower(name) >= ? AND lower(name) < ?"
            " ORDER BY lower(name), name",
            (bucket_id, prefix, prefix + _LAST),
        ):
            name, separator, _ = row["name"][len(base) :].partition("/")
            if separator:
                folders.setdefault(
                    name.lower(),
                    dict.fromkeys(("name", "id", "updated_at", "created_at", "last_accessed_at", "metadata"))
                    | {"name": name},
                )
            else:
                files.append((name, _object(row)))
        entries = [*folders.values(), *(found.entry(name) for name, found in files)]
        if sorting.column == "name":
            entries.sort(key=lambda entry: str(entry["name"]).lower(), reverse=sorting.descending)
        else:
            # Folders have no times: they come first, by name, as NULLs do in the server's own order.
            entries.sort(key=lambda entry: str(entry["name"]).lower())
            entries.sort(key=lambda entry: entry[sorting.column] or "", reverse=sorting.descending)
        return entries[offset : offset + limit]

    def list_objects(
        self, bucket_id: str, prefix: str, limit: int, cursor: str | None, *, delimiter: bool, sorting: Sorting
    ) -> dict[str, Any]:
        """Return a page of the second list call: full keys in byte order, recursive, or one level by `delimiter`."""
        position = _Cursor.read(cursor, sorting) if cursor else None
        if not delimiter:
            entries = self._recursive(bucket_id, prefix, position, sorting, limit + 1)
        elif sorting.column == "name":
            entries = self._level(bucket_id, prefix, position, sorting)
        else:
            entries = self._level_by_time(bucket_id, prefix, position, sorting)
        page = list(itertools.islice(entries, limit + 1))
        result: dict[str, Any] = {"hasNext": len(page) > limit}
        if len(page) > limit:
            last = page[limit - 1][0]
            result |= {"nextCursor": last.text(sorting), "nextCursorKey": last.key}
        result["folders"] = [_folder(at.key) for at, found in page[:limit] if found is None]
        result["objects"] = [
            found.entry() | ({"key": found.name.rpartition("/")[2]} if delimiter else {})
            for _, found in page[:limit]
            if found is not None
        ]
        return result

    def _recursive(
        self, bucket_id: str, prefix: str, position: _Cursor | None, sorting: Sorting, limit: int
    ) -> Iterator[tuple[_Cursor, Object | None]]:
        for found in self._keys(bucket_id, prefix, position, sorting, limit):
            yield _Cursor(found.name, getattr(found, sorting.column)), found

    def _level(
        self, bucket_id: str, prefix: str, position: _Cursor | None, sorting: Sorting
    ) -> Iterator[tuple[_Cursor, Object | None]]:
        """Yield objects, and folders (keys with a slash at the end) without one, skipping what is in the folders."""
        while True:
            if position and position.key.endswith("/") and len(position.key) > len(prefix) and not sorting.descending:
                position = _Cursor(position.key + _LAST, "")
            page = self._keys(bucket_id, prefix, position, sorting, 1)
            if not page:
                return
            folder, separator, _ = page[0].name[len(prefix) :].partition("/")
            position = _Cursor(f"{prefix}{folder}/" if separator else page[0].name, "")
            yield position, None if separator else page[0]

    def _level_by_time(
        self, bucket_id: str, prefix: str, position: _Cursor | None, sorting: Sorting
    ) -> Iterator[tuple[_Cursor, Object | None]]:
        """Yield like `_level` by time; folders have none and come before everything, or after it when descending."""
        entries: dict[_Cursor, Object | None] = {}
        for found in self._keys(bucket_id, prefix, None, Sorting(), -1):
            folder, separator, _ = found.name[len(prefix) :].partition("/")
            if separator:
                entries[_Cursor(f"{prefix}{folder}/", "")] = None
            else:
                entries[_Cursor(found.name, getattr(found, sorting.column))] = found
        for at in sorted(entries, key=lambda at: (at.value, at.key), reverse=sorting.descending):
            ahead = position is None or (at.value, at.key) > (position.value, position.key)
            if (position is None or ahead != sorting.descending) and at != position:
                yield at, entries[at]

    def _keys(
        self, bucket_id: str, prefix: str, position: _Cursor | None, sorting: Sorting, limit: int
    ) -> list[Object]:
        order, beyond = ("DESC", "<") if sorting.descending else ("ASC", ">")
        column = sorting.column
        condition, values = "", []
        if position is not None and column == "name":
            condition, values = f"AND name {beyond} ?", [position.key]
        elif position is not None:
            condition = f"AND ({column}, name) {beyond} (?, ?)"
            values = [position.value, position.key]
        ordering = f"name {order}" if column == "name" else f"{column} {order}, name {order}"
        rows = self._index.execute(
            f"SELECT * FROM objects WHERE bucket_id = ? AND name >= ? AND name < ? {condition} "
            f"ORDER BY {ordering} LIMIT ?",
            (bucket_id, prefix, prefix + _LAST, *values, limit),
        )
        return [_object(row) for row in rows]

    # Files

    def _path(self, version: str) -> Path:
        return self._objects / version[:2] / version


def _move(path: Path, target: Path) -> None:
    """Move a file into a folder, which is made when it is not there."""
    try:
        os.rename(path, target)
    except FileNotFoundError:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(path, target)


@dataclass(frozen=True)
class _Cursor:
    """Where a list goes on: the last key, and with another order than by name the value that it had there."""

    key: str
    value: str

    def text(self, sorting: Sorting) -> str:
        lines = [f"l:{self.key}"]
        if sorting != Sorting():
            lines += [f"o:{'desc' if sorting.descending else 'asc'}", f"c:{sorting.column}", f"a:{self.value}"]
        return base64.b64encode("\n".join(lines).encode()).decode()

    @classmethod
    def read(cls, text: str, sorting: Sorting) -> _Cursor:
        try:
            lines = base64.b64decode(text, validate=True).decode().split("\n")
        except (binascii.Error, UnicodeError) as exc:
            raise invalid_parameter("Invalid Parameter cursor") from exc
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        if "l" not in values or (sorting.column != "name" and "a" not in values):
            raise invalid_parameter("Invalid Parameter cursor")
        return cls(values["l"], values.get("a", ""))


def _folder(key: str) -> dict[str, Any]:
    times = dict.fromkeys(("id", "updated_at", "created_at", "last_accessed_at", "metadata"))
    return {"key": key[:-1].rpartition("/")[2], "name": key, **times}


def sorting_of(value: dict[str, Any], columns: Sequence[str] = _SORTABLE) -> Sorting:
    """Return the order that a request names.

    Raises:
        ApiError: a column or direction that the API does not know.
    """
    column, order = value.get("column") or "name", str(value.get("order") or "asc").lower()
    if column not in columns or order not in ("asc", "desc"):
        raise invalid_parameter("Invalid Parameter sortBy")
    return Sorting("updated_at" if column == "last_accessed_at" else column, order == "desc")


def _bucket(row: sqlite3.Row) -> Bucket:
    values = dict(row)
    types = values["allowed_mime_types"]
    return Bucket(**{**values, "public": bool(values["public"]), "allowed_mime_types": types and json.loads(types)})


def _object(row: sqlite3.Row) -> Object:
    values = dict(row)
    return Object(**{**values, "user_metadata": json.loads(values["user_metadata"])})

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

import json
import shutil
import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path

from embedded_supabase.storage.errors import (
    bucket_exists,
    bucket_missing,
    bucket_not_empty,
    key_exists,
    key_missing,
)
from embedded_supabase.storage.files import Incoming, move_file
from embedded_supabase.storage.listing import Listing
from embedded_supabase.storage.records import Attributes, Bucket, Object, bucket_of, now, object_of_row

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
        self.listing = Listing(self._index)
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
        return bucket_of(row)

    def list_buckets(self) -> list[Bucket]:
        """Return all buckets by name."""
        return [bucket_of(row) for row in self._index.execute("SELECT * FROM buckets ORDER BY name")]

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
        return object_of_row(row) if row is not None else None

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
            move_file(incoming, self._path(version))
        except OSError:
            incoming.unlink(missing_ok=True)
            raise
        return self._write(bucket_id, key, version, source.size, source.etag, attributes)

    # Lists

    # Files

    def _path(self, version: str) -> Path:
        return self._objects / version[:2] / version

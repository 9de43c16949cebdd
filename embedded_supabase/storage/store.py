"""Objects as files, and an index of them in SQLite; independent of HTTP.

Below the root:

    index.sqlite    buckets and objects: which key belongs to which file
    objects/ab/…    the contents, one file for each version of an object, named by a random UUID
    incoming/…      uploads in progress

The name of a file is independent of the key, so no key can refer to a path outside the folder.

The order of writes makes every acknowledged change durable. An upload is written to `incoming`, synced, and renamed
into `objects`; the folder is synced; then the row is committed, and the commit is synced. A replaced or deleted file is
removed after the commit. A file without a row is left by a crash and removed at the next start. One process at a time
opens a store.

Methods that write are coroutines: syncs run in threads. Files are removed in the event loop, so a caller that finds an
object and opens its file without an `await` in between never misses it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from embedded_supabase.disk import DURABLE, Disk
from embedded_supabase.storage.errors import (
    bucket_missing,
    bucket_not_empty,
    key_exists,
    key_missing,
)
from embedded_supabase.storage.files import Incoming, copy_file
from embedded_supabase.storage.index import SCHEMA, GroupCommit, connect
from embedded_supabase.storage.listing import Listing
from embedded_supabase.storage.records import Attributes, Bucket, Object, bucket_of, now, object_of_row

_SYNC_THREADS = 16


class ObjectStore:
    """Buckets and objects in a folder, which is created if it is empty.

    Arguments:
        root: the folder.
        disk: performs the changes of files and folders.
    """

    def __init__(self, root: Path, disk: Disk = DURABLE) -> None:
        self._disk = disk
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        for folder in (self._objects, self._incoming):
            disk.make_folder(folder)
        for name in sorted({f"{number:02x}" for number in range(256)}.difference(os.listdir(self._objects))):
            disk.make_folder(self._objects / name)
        self._index = connect(root / "index.sqlite", durable=disk.durable)
        self._index.executescript(SCHEMA)
        self._commits = GroupCommit(connect(root / "index.sqlite", durable=disk.durable), durable=disk.durable)
        self._threads = ThreadPoolExecutor(_SYNC_THREADS, "sync") if disk.durable else None
        self.listing = Listing(self._index)
        self._sweep()
        # SQLite syncs the root, with the first commit of its log.
        disk.sync_folder(self._objects)
        disk.sync_folder(root.parent)

    def close(self) -> None:
        """Finish syncs and commits that have begun, and close the index."""
        if self._threads is not None:
            self._threads.shutdown()
        self._commits.close()
        self._index.close()

    def _sweep(self) -> None:
        for name in os.listdir(self._incoming):
            self._disk.unlink(self._incoming / name)
        named = {version for (version,) in self._index.execute("SELECT version FROM objects")}
        for folder in list(os.scandir(self._objects)):
            for version in os.listdir(folder):
                if version not in named:
                    self._disk.unlink(Path(folder.path, version))

    # Buckets

    async def create_bucket(self, bucket: Bucket) -> None:
        """Add a bucket.

        Raises:
            ApiError: its id or name exists.
        """

        def change(index: sqlite3.Connection) -> None:
            values = (bucket.id, bucket.name, *_settings(bucket), bucket.created_at, bucket.updated_at)
            try:
                index.execute("INSERT INTO buckets VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            except sqlite3.IntegrityError as exc:
                raise key_exists("BucketAlreadyExists") from exc

        await self._commits.run(change)

    async def update_bucket(self, bucket: Bucket) -> None:
        """Write the settings of an existing bucket."""
        statement = (
            "UPDATE buckets SET public = ?, file_size_limit = ?, allowed_mime_types = ?, updated_at = ? WHERE id = ?"
        )
        await self._commits.run(lambda index: index.execute(statement, (*_settings(bucket), now(), bucket.id)).rowcount)

    def find_bucket(self, bucket_id: str) -> Bucket:
        """Return a bucket.

        Raises:
            ApiError: it does not exist.
        """
        row = self._index.execute("SELECT * FROM buckets WHERE id = ?", (bucket_id,)).fetchone()
        if row is None:
            raise bucket_missing()
        return bucket_of(row)

    def list_buckets(self) -> list[Bucket]:
        """Return all buckets by name."""
        return [bucket_of(row) for row in self._index.execute("SELECT * FROM buckets ORDER BY name")]

    async def empty_bucket(self, bucket_id: str) -> None:
        """Delete all objects of a bucket."""
        self.find_bucket(bucket_id)
        rows = self._index.execute("SELECT name FROM objects WHERE bucket_id = ?", (bucket_id,)).fetchall()
        await self.delete(bucket_id, [name for (name,) in rows])

    async def delete_bucket(self, bucket_id: str) -> None:
        """Delete an empty bucket.

        Raises:
            ApiError: it does not exist, or is not empty.
        """
        self.find_bucket(bucket_id)

        def change(index: sqlite3.Connection) -> None:
            try:
                index.execute("DELETE FROM buckets WHERE id = ?", (bucket_id,))
            except sqlite3.IntegrityError as exc:
                raise bucket_not_empty() from exc

        await self._commits.run(change)

    # Objects

    def receive(self) -> Incoming:
        """Begin an upload."""
        return Incoming(self._incoming / str(uuid.uuid4()), self._disk)

    async def put(self, bucket_id: str, key: str, incoming: Incoming, attributes: Attributes) -> Object:
        """Store an upload under a key, and replace an existing object.

        Raises:
            ApiError: the bucket does not exist.
            OSError: the file cannot be written.
        """
        version = str(uuid.uuid4())
        etag = incoming.seal()
        await self._run(partial(incoming.finish, self._path(version)))
        return await self._write(bucket_id, key, version, incoming.size, etag, attributes)

    async def _write(
        self, bucket_id: str, key: str, version: str, size: int, etag: str, attributes: Attributes
    ) -> Object:
        def change(index: sqlite3.Connection) -> tuple[Object, Object | None]:
            former = _find(index, bucket_id, key)
            timestamp = now()
            stored = Object(
                bucket_id,
                key,
                former.id if former else str(uuid.uuid4()),
                version,
                size,
                etag,
                attributes.mimetype,
                attributes.cache_control,
                attributes.user_metadata,
                former.created_at if former else timestamp,
                timestamp,
            )
            values = {**vars(stored), "user_metadata": json.dumps(stored.user_metadata)}
            places = ", ".join(f":{name}" for name in values)
            try:
                index.execute(f"INSERT OR REPLACE INTO objects ({', '.join(values)}) VALUES ({places})", values)
            except sqlite3.IntegrityError as exc:
                raise bucket_missing() from exc  # deleted during the upload
            return stored, former

        try:
            stored, former = await self._commits.run(change)
        except Exception:
            self._remove([version])
            raise
        if former:
            self._remove([former.version])
        return stored

    def find(self, bucket_id: str, key: str) -> Object | None:
        """Return an object, None if it does not exist."""
        return _find(self._index, bucket_id, key)

    def get(self, bucket_id: str, key: str) -> Object:
        """Return an object.

        Raises:
            ApiError: it does not exist.
        """
        found = self.find(bucket_id, key)
        if found is None:
            raise key_missing()
        return found

    def content_path(self, found: Object) -> Path:
        """Return the file of an object."""
        return self._path(found.version)

    async def delete(self, bucket_id: str, keys: Sequence[str]) -> list[Object]:
        """Delete objects by their exact keys, in one transaction; return those that existed."""

        def change(index: sqlite3.Connection) -> list[Object]:
            deleted = []
            for key in dict.fromkeys(keys):
                found = _find(index, bucket_id, key)
                if found is not None:
                    index.execute("DELETE FROM objects WHERE bucket_id = ? AND name = ?", (bucket_id, key))
                    deleted.append(found)
            return deleted

        deleted = await self._commits.run(change)
        self._remove(found.version for found in deleted)
        return deleted

    async def move(self, source: Object, bucket_id: str, key: str) -> None:
        """Give an object another key, optionally in another bucket.

        Raises:
            ApiError: the key exists, or the object was deleted meanwhile.
        """
        if (source.bucket_id, source.name) == (bucket_id, key):
            return
        statement = "UPDATE objects SET bucket_id = ?, name = ?, updated_at = ? WHERE bucket_id = ? AND name = ?"

        def change(index: sqlite3.Connection) -> None:
            try:
                moved = index.execute(statement, (bucket_id, key, now(), source.bucket_id, source.name)).rowcount
            except sqlite3.IntegrityError as exc:
                raise key_exists("ResourceAlreadyExists") from exc
            if not moved:
                raise key_missing()

        await self._commits.run(change)

    async def copy(self, source: Object, bucket_id: str, key: str, attributes: Attributes) -> Object:
        """Store the content of an object under another key.

        Raises:
            ApiError: the bucket does not exist.
            OSError: the file cannot be written.
        """
        version = str(uuid.uuid4())
        content = open(self._path(source.version), "rb")  # noqa: SIM115 (closed by copy_file)
        path, target = self._incoming / version, self._path(version)
        await self._run(partial(copy_file, content, path, target, self._disk))
        return await self._write(bucket_id, key, version, source.size, source.etag, attributes)

    # Files

    async def _run(self, work: Callable[[], None]) -> None:
        """Run work that syncs files in a thread."""
        if self._threads is None:
            work()
        else:
            await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _remove(self, versions: Iterable[str]) -> None:
        for version in versions:
            self._disk.unlink(self._path(version))

    def _path(self, version: str) -> Path:
        return self._objects / version[:2] / version


def _find(index: sqlite3.Connection, bucket_id: str, key: str) -> Object | None:
    row = index.execute("SELECT * FROM objects WHERE bucket_id = ? AND name = ?", (bucket_id, key)).fetchone()
    return object_of_row(row) if row is not None else None


def _settings(bucket: Bucket) -> tuple[bool, int | None, str | None]:
    types = bucket.allowed_mime_types
    return bucket.public, bucket.file_size_limit, None if types is None else json.dumps(types)

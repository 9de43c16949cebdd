"""The two list operations of the API, as queries on the index."""

from __future__ import annotations

import base64
import binascii
import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from embedded_supabase.storage.errors import invalid_parameter
from embedded_supabase.storage.records import Object, Sorting, object_of_row

#: Sorts after every key; UTF-8 preserves the order of code points.
_LAST = chr(0x10FFFF)


class Listing:
    """List operations on an index."""

    def __init__(self, index: sqlite3.Connection) -> None:
        self._index = index

    def list_folder(
        self, bucket_id: str, folder: str, search: str, limit: int, offset: int, sorting: Sorting
    ) -> list[dict[str, Any]]:
        """Return one level of a folder (list v1): relative names, case-insensitive order and matching."""
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
                files.append((name, object_of_row(row)))
        entries = [*folders.values(), *(found.entry(name) for name, found in files)]
        if sorting.column == "name":
            entries.sort(key=lambda entry: str(entry["name"]).lower(), reverse=sorting.descending)
        else:
            # Folders have no timestamps and sort first, by name, as NULLs do on the official server.
            entries.sort(key=lambda entry: str(entry["name"]).lower())
            entries.sort(key=lambda entry: entry[sorting.column] or "", reverse=sorting.descending)
        return entries[offset : offset + limit]

    def list_objects(
        self, bucket_id: str, prefix: str, limit: int, cursor: str | None, *, delimiter: bool, sorting: Sorting
    ) -> dict[str, Any]:
        """Return a page of keys in byte order (list v2), recursive, or one level with `delimiter`."""
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
        """Yield the objects and folders of one level; a folder is a key with a final slash, and None as its object."""
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
        """Yield as `_level` does, in order of time; folders have no time and sort first, or last when descending."""
        entries: dict[_Cursor, Object | None] = {}
        for found in self._keys(bucket_id, prefix, None, Sorting(), -1):
            folder, separator, _ = found.name[len(prefix) :].partition("/")
            if separator:
                entries[_Cursor(f"{prefix}{folder}/", "")] = None
            else:
                entries[_Cursor(found.name, getattr(found, sorting.column))] = found
        for at in sorted(entries, key=lambda at: (at.value, at.key), reverse=sorting.descending):
            after = position is None or (at.value, at.key) > (position.value, position.key)
            if (position is None or after != sorting.descending) and at != position:
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
        return [object_of_row(row) for row in rows]


@dataclass(frozen=True)
class _Cursor:
    """The position in a list: the last key and, unless the order is by name, the value of the sort column."""

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

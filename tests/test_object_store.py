"""The files and the index under the Storage server: lists against models, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Coroutine, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedded_supabase.disk import Disk
from embedded_supabase.storage.errors import ApiError
from embedded_supabase.storage.records import Attributes, Bucket, Object, Sorting, now, sorting_of
from embedded_supabase.storage.store import ObjectStore

T = TypeVar("T")

KEYS = st.lists(st.text("ab/.-~ B", min_size=1, max_size=6), max_size=25, unique=True)
PREFIXES = st.text("ab/.- B", max_size=3)
#: Few pages would hide what is lost at their edges.
LIMITS = st.integers(1, 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A store that the tests of lists share, each example with a bucket of its own."""
    with closing(ObjectStore(tmp_path_factory.mktemp("store"), Disk(durable=False))) as store:
        yield store


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ObjectStore]:
    """A store of this test's own, with the bucket `b`."""
    with closing(ObjectStore(tmp_path, Disk(durable=False))) as store:
        add_bucket(store, "b")
        yield store


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits: a store that is not durable runs everything at once."""
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    result: T = finished.value.value
    return result


def add_bucket(store: ObjectStore, name: str = "") -> str:
    name = name or uuid.uuid4().hex
    run(store.create_bucket(Bucket(name, name, False, None, None, now(), now())))
    return name


def put(store: ObjectStore, bucket: str, key: str, content: bytes = b"") -> Object:
    incoming = store.receive()
    incoming.write(content)
    return run(store.put(bucket, key, incoming, Attributes()))


def filled(store: ObjectStore, keys: list[str]) -> str:
    bucket = add_bucket(store)
    for key in keys:
        put(store, bucket, key)
    return bucket


def read(store: ObjectStore, bucket: str, key: str) -> bytes:
    return store.content_path(store.get(bucket, key)).read_bytes()


def files(folder: Path) -> list[Path]:
    return sorted(path for name in ("objects", "incoming") for path in (folder / name).rglob("*") if path.is_file())


def pages(store: ObjectStore, bucket: str, prefix: str, limit: int, **how: Any) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        page = store.listing.list_objects(bucket, prefix, limit, cursor, **how)
        assert len(page["objects"]) + len(page["folders"]) <= limit
        yield page
        if not page["hasNext"]:
            return
        assert len(page["objects"]) + len(page["folders"]) == limit
        assert page["nextCursor"] != cursor
        cursor = page["nextCursor"]


# Lists


@settings(deadline=None, max_examples=60)
@given(keys=KEYS, prefix=PREFIXES, limit=LIMITS, descending=st.booleans())
def test_pages_of_the_second_list_are_the_sorted_keys(
    store: ObjectStore, keys: list[str], prefix: str, limit: int, descending: bool
) -> None:
    bucket = filled(store, keys)
    found = []
    for page in pages(store, bucket, prefix, limit, delimiter=False, sorting=Sorting("name", descending)):
        assert page["folders"] == []
        found += [entry["name"] for entry in page["objects"]]
    assert found == sorted((key for key in keys if key.startswith(prefix)), reverse=descending)
    run(store.empty_bucket(bucket))


@settings(deadline=None, max_examples=60)
@given(keys=KEYS, prefix=PREFIXES, limit=LIMITS, column=st.sampled_from(["name", "created_at", "updated_at"]))
@example(keys=["b//"], prefix="b/", limit=1, column="name")
@pytest.mark.parametrize("descending", [False, True])
def test_pages_of_a_level_are_its_objects_and_folders(
    store: ObjectStore, keys: list[str], prefix: str, limit: int, column: str, descending: bool
) -> None:
    bucket = filled(store, keys)
    objects, folders, pages_of_names = [], [], []
    for page in pages(store, bucket, prefix, limit, delimiter=True, sorting=Sorting(column, descending)):
        objects += page["objects"]
        folders += page["folders"]
        pages_of_names.append(sorted(entry["name"] for entry in (*page["objects"], *page["folders"])))
    rests = [(key, *key[len(prefix) :].partition("/")[:2]) for key in keys if key.startswith(prefix)]
    expected_folders = {f"{prefix}{name}/" for _, name, slash in rests if slash}
    expected_objects = {key for key, _, slash in rests if not slash}
    assert sorted(entry["name"] for entry in folders) == sorted(expected_folders)
    assert sorted(entry["name"] for entry in objects) == sorted(expected_objects)
    assert all(entry["key"] == entry["name"].rpartition("/")[2] for entry in objects)
    assert all(entry["key"] == entry["name"][:-1].rpartition("/")[2] for entry in folders)
    if column == "name":
        ordered = sorted(expected_folders | expected_objects, reverse=descending)
        expected_pages = [sorted(ordered[at : at + limit]) for at in range(0, len(ordered), limit)]
        assert pages_of_names == (expected_pages or [[]])
    else:
        moments = [(entry[column], entry["name"]) for entry in objects]
        assert moments == sorted(moments, reverse=descending)
    run(store.empty_bucket(bucket))


@settings(deadline=None, max_examples=60)
@given(keys=KEYS, prefix=PREFIXES, limit=LIMITS, descending=st.booleans())
def test_pages_of_the_second_list_by_time_are_complete(
    store: ObjectStore, keys: list[str], prefix: str, limit: int, descending: bool
) -> None:
    bucket = filled(store, keys)
    sorting = Sorting("updated_at", descending)
    found = [
        (entry["updated_at"], entry["name"])
        for page in pages(store, bucket, prefix, limit, delimiter=False, sorting=sorting)
        for entry in page["objects"]
    ]
    expected = [(store.get(bucket, key).updated_at, key) for key in keys if key.startswith(prefix)]
    assert found == sorted(expected, reverse=descending)
    run(store.empty_bucket(bucket))


@settings(deadline=None, max_examples=60)
@given(keys=KEYS, folder=st.text("ab/B", max_size=3), search=st.text("ab.", max_size=1), limit=LIMITS)
@pytest.mark.parametrize("descending", [False, True])
def test_pages_of_the_first_list_are_one_level_of_a_folder(
    store: ObjectStore, keys: list[str], folder: str, search: str, limit: int, descending: bool
) -> None:
    bucket = filled(store, keys)
    found: list[dict[str, Any]] = []
    while True:
        page = store.listing.list_folder(bucket, folder, search, limit, len(found), Sorting("name", descending))
        found += page
        if len(page) < limit:
            break
    base = folder if not folder or folder.endswith("/") else f"{folder}/"
    rests = [key[len(base) :].partition("/") for key in keys if key.lower().startswith((base + search).lower())]
    expected = [(name, False) for name, slash, _ in rests if not slash]
    expected += [(name, True) for name in {name.lower() for name, slash, _ in rests if slash}]
    shown = [(entry["name"].lower() if entry["id"] is None else entry["name"], entry["id"] is None) for entry in found]
    assert sorted(shown) == sorted(expected)
    names = [entry["name"].lower() for entry in found]
    assert names == sorted(names, reverse=descending)
    run(store.empty_bucket(bucket))


def test_a_list_sees_its_own_bucket_only(own: ObjectStore) -> None:
    add_bucket(own, "c")
    put(own, "b", "k")
    put(own, "c", "other")
    assert [entry["name"] for entry in own.listing.list_folder("b", "", "", 9, 0, Sorting())] == ["k"]
    listed = own.listing.list_objects("b", "", 9, None, delimiter=False, sorting=Sorting())
    assert [entry["name"] for entry in listed["objects"]] == ["k"]


def test_a_list_goes_on_after_a_key_that_has_gone(own: ObjectStore) -> None:
    for key in "abcd":
        put(own, "b", key)
    first = own.listing.list_objects("b", "", 2, None, delimiter=False, sorting=Sorting())
    run(own.delete("b", ["b", "c"]))
    put(own, "b", "bb")
    second = own.listing.list_objects("b", "", 2, first["nextCursor"], delimiter=False, sorting=Sorting())
    assert [entry["name"] for entry in second["objects"]] == ["bb", "d"]


@pytest.mark.parametrize("value", [{"column": "size"}, {"order": "up"}, {"column": ["name"]}, {"order": 1}])
def test_an_unknown_order_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        sorting_of(value)
    assert raised.value.body["code"] == "InvalidParameter"


@pytest.mark.parametrize("value", [{}, {"column": None, "order": None}, {"column": "name", "order": "ASC"}])
def test_the_order_is_by_name_unless_another_is_named(value: dict[str, Any]) -> None:
    assert sorting_of(value) == Sorting("name", descending=False)


# Objects


def test_an_object_is_its_last_upload(own: ObjectStore, tmp_path: Path) -> None:
    first = put(own, "b", "k", b"one")
    second = put(own, "b", "k", b"three")
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert second.version != first.version
    assert (second.size, second.etag) == (5, hashlib.md5(b"three").hexdigest())
    assert own.get("b", "k") == second
    assert read(own, "b", "k") == b"three"
    assert files(tmp_path) == [own.content_path(second)]


def test_a_reader_keeps_the_version_that_it_opened(own: ObjectStore) -> None:
    with open(own.content_path(put(own, "b", "k", b"one")), "rb") as file:
        put(own, "b", "k", b"two")
        run(own.delete("b", ["k"]))
        assert file.read() == b"one"


def test_an_abandoned_upload_leaves_nothing(own: ObjectStore, tmp_path: Path) -> None:
    incoming = own.receive()
    incoming.write(b"x" * 100_000)
    incoming.abandon()
    incoming.abandon()
    assert files(tmp_path) == []


def test_an_upload_is_not_abandoned_after_it_was_stored(own: ObjectStore) -> None:
    incoming = own.receive()
    incoming.write(b"content")
    run(own.put("b", "k", incoming, Attributes()))
    incoming.abandon()
    assert read(own, "b", "k") == b"content"


def test_an_upload_to_a_bucket_that_has_gone_leaves_nothing(own: ObjectStore, tmp_path: Path) -> None:
    incoming = own.receive()
    run(own.delete_bucket("b"))
    with pytest.raises(ApiError) as raised:
        run(own.put("b", "k", incoming, Attributes()))
    assert raised.value.body["code"] == "NoSuchBucket"
    assert files(tmp_path) == []


def test_moving_keeps_the_file_and_copying_makes_another(own: ObjectStore, tmp_path: Path) -> None:
    found = put(own, "b", "k", b"content")
    run(own.move(found, "b", "m"))
    assert own.find("b", "k") is None
    moved = own.get("b", "m")
    assert (moved.id, moved.version) == (found.id, found.version)
    copied = run(own.copy(moved, "b", "c", Attributes("image/png")))
    assert (copied.size, copied.etag, copied.mimetype) == (moved.size, moved.etag, "image/png")
    assert len(files(tmp_path)) == 2
    run(own.delete("b", ["m"]))
    assert read(own, "b", "c") == b"content"


def test_emptying_a_bucket_removes_its_files_only(own: ObjectStore, tmp_path: Path) -> None:
    add_bucket(own, "c")
    for key in ("k1", "k2"):
        put(own, "b", key)
    kept = put(own, "c", "k1")
    run(own.empty_bucket("b"))
    assert files(tmp_path) == [own.content_path(kept)]
    run(own.delete_bucket("b"))
    with pytest.raises(ApiError) as raised:
        run(own.delete_bucket("c"))
    assert raised.value.body["code"] == "ResourceNotEmpty"


# After a kill


def test_the_next_start_removes_what_no_row_names_and_keeps_the_rest(tmp_path: Path) -> None:
    with closing(ObjectStore(tmp_path, Disk(durable=False))) as store:
        add_bucket(store, "b")
        kept = put(store, "b", "k", b"content")
        incoming = store.receive()
        incoming.write(b"under way")
        stray = tmp_path / "objects" / "ab" / str(uuid.uuid4())
        stray.write_bytes(b"renamed, but never committed")
    with closing(ObjectStore(tmp_path, Disk(durable=False))) as store:
        assert files(tmp_path) == [store.content_path(kept)]
        assert store.get("b", "k") == kept
        assert read(store, "b", "k") == b"content"
    incoming.abandon()


# A disk that is full


def fill(incoming: Any) -> None:
    """Let an upload go to a device that is always full."""
    incoming._file.close()
    incoming._file = open("/dev/full", "wb")  # noqa: SIM115 (it lives as long as the upload)


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_dev_full
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_full_disk_stores_nothing_and_leaves_no_file(own: ObjectStore, tmp_path: Path, size: int) -> None:
    former = put(own, "b", "k", b"former")
    incoming = own.receive()
    fill(incoming)

    def write_and_put() -> None:
        incoming.write(b"x" * size)
        run(own.put("b", "k", incoming, Attributes()))

    with pytest.raises(OSError, match="No space left on device"):
        write_and_put()
    incoming.abandon()
    assert files(tmp_path) == [own.content_path(former)]
    assert read(own, "b", "k") == b"former"
    put(own, "b", "k", b"later")
    assert read(own, "b", "k") == b"later"


def test_a_copy_that_fails_leaves_no_file(own: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = put(own, "b", "k", b"content")

    def copy_half(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(3))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", copy_half)
        with pytest.raises(OSError, match="No space left on device"):
            run(own.copy(found, "b", "c", Attributes()))
    assert files(tmp_path) == [own.content_path(found)]
    assert own.find("b", "c") is None


def limit_index(store: ObjectStore, pages: int) -> None:
    """Let the index have so many pages at most; less than it has means no more than now."""
    store._commits._connection.execute(f"PRAGMA max_page_count = {pages}")


def test_an_index_that_cannot_grow_stores_nothing_and_works_again_with_room(own: ObjectStore, tmp_path: Path) -> None:
    former = put(own, "b", "k", b"former")
    limit_index(own, 1)
    stored = {former.name}

    def put_many() -> None:
        for number in range(10_000):
            stored.add(put(own, "b", f"{number}-{'x' * 200}", b"content").name)

    with pytest.raises(sqlite3.OperationalError, match="full"):
        put_many()
    listed = own.listing.list_objects("b", "", 1000, None, delimiter=False, sorting=Sorting())["objects"]
    assert {entry["name"] for entry in listed} == stored
    assert len(files(tmp_path)) == len(stored)
    assert read(own, "b", "k") == b"former"
    limit_index(own, 1 << 20)
    put(own, "b", "later", b"later")
    assert read(own, "b", "later") == b"later"


class Failing:
    """An index whose commit fails, as it does when the disk is full."""

    def __init__(self, index: sqlite3.Connection) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return self._index.execute(statement, values)


def test_a_delete_that_cannot_commit_deletes_nothing_and_leaves_no_transaction_open(
    own: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(own, "b", "k", b"content")
    with monkeypatch.context() as patch:
        patch.setattr(own._commits, "_connection", Failing(own._commits._connection))
        with pytest.raises(sqlite3.OperationalError):
            run(own.delete("b", ["k"]))
    assert read(own, "b", "k") == b"content"
    put(own, "b", "after", b"content")
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as another:
        names = another.execute("SELECT name FROM objects ORDER BY name").fetchall()
    assert names == [("after",), ("k",)]
    assert [found.name for found in run(own.delete("b", ["k"]))] == ["k"]


def test_a_key_without_utf8_does_not_spoil_the_keys_beside_it(own: ObjectStore) -> None:
    put(own, "b", "k")
    with pytest.raises(UnicodeEncodeError):
        run(own.delete("b", ["k", "\ud800"]))
    assert own.find("b", "k") is not None
    assert [found.name for found in run(own.delete("b", ["k"]))] == ["k"]


# Rows


def test_metadata_survives_the_index(own: ObjectStore) -> None:
    metadata = {"text": "é\ud800", "list": [1, None], "nested": {"a": 1.5}}
    run(own.put("b", "k", own.receive(), Attributes("image/png", "max-age=1", metadata)))
    found = own.get("b", "k")
    assert (found.mimetype, found.cache_control, found.user_metadata) == ("image/png", "max-age=1", metadata)
    assert json.loads(json.dumps(found.row()))["user_metadata"] == metadata

"""The order of writes of a durable Storage server: sync the file, rename it, sync the folder, commit, respond."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tornado.httpclient
import tornado.httpserver
import tornado.netutil

from embedded_supabase.disk import Disk
from embedded_supabase.storage.auth import mint_key
from embedded_supabase.storage.faults import FaultInjector
from embedded_supabase.storage.handler import Handler
from embedded_supabase.storage.records import Attributes, Bucket, now
from embedded_supabase.storage.routes import application
from embedded_supabase.storage.store import ObjectStore

SECRET = "a secret for tests, at least 32 bytes long"
STORED = ["sync file", "rename", "sync folder", "commit"]
COPY = {"bucketId": "b", "sourceKey": "k", "destinationKey": "other"}


def record(patch: pytest.MonkeyPatch, store: ObjectStore) -> list[str]:
    """Return a list that every later sync, rename, commit, removal and response is appended to."""
    events: list[str] = []
    fsync, rename, unlink, finish = os.fsync, os.rename, Path.unlink, Handler.finish

    def recorded_sync(descriptor: int) -> None:
        fsync(descriptor)
        assert threading.current_thread() is not threading.main_thread()
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")

    def recorded_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append("rename")

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        events.append("remove")
        unlink(path, missing_ok)

    def recorded_finish(handler: Handler, chunk: Any = None) -> Any:
        events.append(f"respond {handler.get_status()}")
        return finish(handler, chunk)

    def recorded_statement(statement: str) -> None:
        if statement == "COMMIT":
            assert threading.current_thread() is not threading.main_thread()
            events.append("commit")

    patch.setattr(os, "fsync", recorded_sync)
    patch.setattr(os, "rename", recorded_rename)
    patch.setattr(Path, "unlink", recorded_unlink)
    patch.setattr(Handler, "finish", recorded_finish)
    store._commits._connection.set_trace_callback(recorded_statement)
    return events


async def events_of(
    store: ObjectStore, patch: pytest.MonkeyPatch, method: str, path: str, body: bytes | dict[str, Any] | None
) -> list[str]:
    """Send a request to a server of a store, and return what happened until the response."""
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server = tornado.httpserver.HTTPServer(application(store, SECRET, FaultInjector()))
    server.add_sockets(sockets)
    client = tornado.httpclient.AsyncHTTPClient(force_instance=True)
    headers = {"Authorization": f"Bearer {mint_key(SECRET)}"}
    if isinstance(body, dict):
        body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    events = record(patch, store)
    try:
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}{path}"
        request = tornado.httpclient.HTTPRequest(url, method, headers, body, allow_nonstandard_methods=True)
        assert (await client.fetch(request)).code == 200
    finally:
        client.close()
        server.stop()
        await server.close_all_connections()
    return events


async def fill(store: ObjectStore) -> None:
    """Create the bucket `b` with the object `k`."""
    await store.create_bucket(Bucket("b", "b", False, None, None, now(), now()))
    incoming = store.receive()
    incoming.write(b"content")
    await store.put("b", "k", incoming, Attributes())


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        pytest.param("POST", "/object/b/new", b"content", [*STORED, "respond 200"], id="upload"),
        pytest.param("PUT", "/object/b/k", b"content", [*STORED, "remove", "respond 200"], id="overwrite"),
        pytest.param("DELETE", "/object/b/k", None, ["commit", "remove", "respond 200"], id="delete"),
        pytest.param(
            "DELETE", "/object/b", {"prefixes": ["k"]}, ["commit", "remove", "respond 200"], id="delete-several"
        ),
        pytest.param("POST", "/bucket/b/empty", None, ["commit", "remove", "respond 200"], id="empty"),
        pytest.param("POST", "/object/move", COPY, ["commit", "respond 200"], id="move"),
        pytest.param("POST", "/object/copy", COPY, [*STORED, "respond 200"], id="copy"),
        pytest.param("POST", "/bucket", {"name": "c"}, ["commit", "respond 200"], id="create-bucket"),
    ],
)
def test_a_change_is_durable_before_its_response(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None,
    expected: list[str],
) -> None:
    async def events() -> list[str]:
        await fill(store)
        with monkeypatch.context() as patch:
            return await events_of(store, patch, method, path, body)

    store = ObjectStore(tmp_path)
    try:
        assert asyncio.run(events()) == expected
        for connection in (store._index, store._commits._connection):
            assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL: a commit syncs the log
    finally:
        store.close()


def test_uploads_that_wait_for_a_commit_share_the_next(tmp_path: Path) -> None:
    commits: list[str] = []

    async def upload_many() -> None:
        await fill(store)
        store._commits._connection.set_trace_callback(lambda one: commits.append(one) if one == "COMMIT" else None)
        blocked = asyncio.get_running_loop().run_in_executor(store._commits._thread, release.wait)
        uploads = [asyncio.ensure_future(store.put("b", f"k{n}", store.receive(), Attributes())) for n in range(40)]
        while len(store._commits._pending) < len(uploads) - 1:  # the first waits for the thread
            await asyncio.sleep(0.001)
        release.set()
        await asyncio.gather(blocked, *uploads)

    release = threading.Event()
    store = ObjectStore(tmp_path)
    try:
        asyncio.run(upload_many())
        assert len(store.listing._index.execute("SELECT name FROM objects").fetchall()) == 41
        assert len(commits) == 2
    finally:
        release.set()
        store.close()


def test_a_change_that_fails_does_not_affect_the_others_of_its_group(tmp_path: Path) -> None:
    async def change_many() -> list[Any]:
        await fill(store)
        uploads = [store.put(bucket, "new", store.receive(), Attributes()) for bucket in ("absent", "b", "none")]
        return await asyncio.gather(*uploads, store.delete("b", ["\ud800"]), return_exceptions=True)

    store = ObjectStore(tmp_path)
    try:
        outcomes = asyncio.run(change_many())
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "ApiError",
            "Object",
            "ApiError",
            "UnicodeEncodeError",
        ]
        assert store.find("b", "new") == outcomes[1]
        kept = [path for folder in (tmp_path / "objects").iterdir() for path in folder.iterdir()]
        assert len(kept) == 2
        assert list((tmp_path / "incoming").iterdir()) == []
    finally:
        store.close()


@pytest.mark.parametrize("failing", [stat.S_ISREG, stat.S_ISDIR])
def test_a_file_that_cannot_be_synced_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Callable[[int], bool]
) -> None:
    def fail(descriptor: int) -> None:
        if failing(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")

    async def change() -> None:
        await fill(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="Input/output error"):
                await store.put("b", "k", store.receive(), Attributes())
            with pytest.raises(OSError, match="Input/output error"):
                await store.copy(store.get("b", "k"), "b", "other", Attributes())

    store = ObjectStore(tmp_path)
    try:
        asyncio.run(change())
        assert store.content_path(store.get("b", "k")).read_bytes() == b"content"
        kept = [path for folder in (tmp_path / "objects").iterdir() for path in folder.iterdir()]
        assert len(kept) == 1
        assert list((tmp_path / "incoming").iterdir()) == []
    finally:
        store.close()


def test_a_store_that_is_not_durable_syncs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    store = ObjectStore(tmp_path, Disk(durable=False))
    try:
        asyncio.run(fill(store))
        assert store._commits._connection.execute("PRAGMA synchronous").fetchone()[0] == 0
        assert synced == []
    finally:
        store.close()

"""Both versions of the list request of the embedded Storage server."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests import storage_server_support
from tests.services import StorageServer
from tests.storage_server_support import Client, create_bucket
from tests.sweeps import sweep

client = storage_server_support.client
full = storage_server_support.full

NASTY = ["f099.jpg", "f099.jpg-2", "f099.jpg.json", "f099.jpg/in", "f099.jpg ", "f099.jpg!", "F099.jpg", "f099.jpg+"]


@pytest.fixture(scope="module")
def many(storage_server: StorageServer) -> Iterator[tuple[Client, str, list[str]]]:
    """A bucket of two pages, with keys that lists are known to lose."""
    client, bucket = Client(storage_server), f"bucket-{uuid.uuid4().hex}"
    keys = [f"p/f{number:03}.jpg{tail}" for number in range(380) for tail in ("", "-2", ".json", "/x")]
    keys += [f"q/{key}" for key in NASTY] + NASTY + [f"r{number}/x" for number in range(50)]
    with closing(client.connection):
        create_bucket(client, bucket)
        for key in keys:
            assert client.upload(bucket, key, b"").status == 200
        yield client, bucket, sorted(keys)


def pages(client: Client, bucket: str, **body: Any) -> Iterator[dict[str, Any]]:
    while True:
        page = client.send("POST", f"/object/list-v2/{bucket}", body).json
        assert page["hasNext"] == ("nextCursor" in page) == ("nextCursorKey" in page)
        yield page
        if not page["hasNext"]:
            return
        last = page["nextCursorKey"]
        assert base64.b64decode(page["nextCursor"]).decode().split("\n")[0] == f"l:{last}"
        assert page["nextCursor"] != body.get("cursor")
        body["cursor"] = page["nextCursor"]


@pytest.mark.parametrize(("limit", "prefix"), sweep([(7, "p/f"), (1000, ""), (None, ""), (1, "p/f0"), (1, "q/")]))
def test_the_second_list_is_complete(many: tuple[Client, str, list[str]], limit: int | None, prefix: str) -> None:
    client, bucket, keys = many
    found = []
    for page in pages(client, bucket, limit=limit, prefix=prefix):
        assert page["folders"] == []
        assert len(page["objects"]) == min(limit or 1000, 1000) or not page["hasNext"]
        found += [entry["name"] for entry in page["objects"]]
    assert found == [key for key in keys if key.startswith(prefix)]


@pytest.mark.parametrize(("limit", "prefix"), [(1000, "p/"), (7, "q/"), (1, ""), (100, "p/f0"), (3, "f099.jpg")])
def test_a_level_of_the_second_list_is_complete(many: tuple[Client, str, list[str]], limit: int, prefix: str) -> None:
    client, bucket, keys = many
    found = []
    for page in pages(client, bucket, limit=limit, prefix=prefix, with_delimiter=True):
        assert len(page["objects"]) + len(page["folders"]) <= limit
        found += [entry["name"] for entry in (*page["objects"], *page["folders"])]
    rests = ((key, key[len(prefix) :].partition("/")) for key in keys if key.startswith(prefix))
    assert sorted(found) == sorted({f"{prefix}{rest[0]}/" if rest[1] else key for key, rest in rests})
    assert len(found) == len(set(found))


@pytest.mark.parametrize("limit", [1500, 9999, 100])
def test_the_first_list_is_complete_in_pages(many: tuple[Client, str, list[str]], limit: int) -> None:
    client, bucket, keys = many
    found: list[str] = []
    while True:
        body = {"prefix": "p", "limit": limit, "offset": len(found)}
        page = client.send("POST", f"/object/list/{bucket}", body).json
        found += [entry["name"] for entry in page]
        assert len(page) <= min(limit, 1500)
        if len(page) < min(limit, 1500):
            break
    names = {(key.split("/")[1], key.count("/") == 2) for key in keys if key.startswith("p/")}
    assert sorted(found) == sorted(name for name, _ in names)


def test_entries_of_the_first_list(client: Client, full: str) -> None:
    client.upload(full, "Q/1")
    client.upload(full, "q/2")
    client.upload(full, "FLAT")
    folder, flat, merged = client.send("POST", f"/object/list/{full}", {"prefix": ""}).json
    nothing = dict.fromkeys(("id", "updated_at", "created_at", "last_accessed_at", "metadata"))
    assert folder == {"name": "a", **nothing}
    assert (flat["name"], merged) == ("FLAT", {"name": "Q", **nothing})
    (entry,) = client.send("POST", f"/object/list/{full}", {"prefix": "a/"}).json
    info = client.info(full, "a/b.txt")
    assert set(entry) == {"name", "id", "updated_at", "created_at", "last_accessed_at", "metadata"}
    assert entry["metadata"] == {
        "eTag": info["etag"],
        "size": 10,
        "mimetype": "text/plain",
        "cacheControl": "no-cache",
        "lastModified": info["last_modified"],
        "contentLength": 10,
        "httpStatusCode": 200,
    }

    def names(**body: Any) -> list[str]:
        return [entry["name"] for entry in client.send("POST", f"/object/list/{full}", {"prefix": None, **body}).json]

    assert names(search="fl") == names(search="FLAT") == ["FLAT"]
    assert names(search="lat") == names(prefix="/") == names(prefix="/a") == []
    assert names(prefix="Q") == names(prefix="q") == ["1", "2"]
    wrong: list[dict[str, Any]] = [
        {},
        {"prefix": []},
        *({"prefix": ""} | more for more in ({"limit": 0}, {"limit": 1.5})),
    ]
    for body in (*wrong, {"prefix": "", "offset": -1}):
        assert client.send("POST", f"/object/list/{full}", body).error[:2] == (400, "400")
    assert client.send("POST", f"/object/list/{full}", {"prefix": "", "sortBy": {"column": "x"}}).status == 400


def test_entries_of_the_second_list(client: Client, full: str) -> None:
    found = client.send("POST", f"/object/list-v2/{full}", {}).json
    assert set(found) == {"hasNext", "folders", "objects"}
    (entry,) = found["objects"]
    assert (entry["name"], entry["metadata"]["size"]) == ("a/b.txt", 10)
    level = client.send("POST", f"/object/list-v2/{full}", {"with_delimiter": True}).json
    nothing = dict.fromkeys(("id", "updated_at", "created_at", "last_accessed_at", "metadata"))
    assert level["folders"] == [{"key": "a", "name": "a/", **nothing}]
    assert client.send("POST", f"/object/list-v2/{full}", {"prefix": "A"}).json["objects"] == []
    for limit in (0, -1, "x", 1e400, [1]):
        answer = client.send("POST", f"/object/list-v2/{full}", {"limit": limit})
        assert (answer.status, answer.error[4]) == (400, "InvalidRequest")
    for cursor in ("%", "bm8=", "/w=="):
        answer = client.send("POST", f"/object/list-v2/{full}", {"cursor": cursor})
        assert (answer.status, answer.error[4]) == (400, "InvalidParameter")
    assert client.send("POST", f"/object/list-v2/{full}").status == 400

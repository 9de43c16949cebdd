"""Object keys of the embedded Storage server: which are legal, deleting, moving and copying."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests import storage_server_support
from tests.storage_server_support import (
    DUPLICATE,
    NO_BUCKET,
    NO_KEY,
    Answer,
    Client,
    create_bucket,
    file,
    form,
    incoming,
    stored,
)

client = storage_server_support.client
full = storage_server_support.full


def tree(folder: Path) -> set[str]:
    """Return the paths of a folder but for the server's own files, whose names are UUIDs."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {
        path for path in found if not re.fullmatch(r"root(/objects|/incoming)?(/[0-9a-f]{2})?(/[0-9a-f-]{36})?", path)
    }


# Keys


@pytest.mark.parametrize(
    "key",
    [
        "AZaz09_!.*'()&$@=;:+,?-",
        "a b",
        " lead",
        "trail ",
        "/x",
        "a//b",
        "a/",
        "//",
        "...",
        "a/.b",
        "a..b/..c",
        "x" * 255,
        "/".join(["y" * 200] * 4),
        "object/move",
    ],
)
def test_legal_keys_are_stored_literally(client: Client, bucket: str, key: str) -> None:
    create_bucket(client, bucket)
    assert client.upload(bucket, key, key.encode()).json["Key"] == f"{bucket}/{key}"
    assert client.keys(bucket) == [key]
    assert client.content(bucket, key) == key.encode()
    escaped = "".join(f"%{byte:02x}" for byte in key.encode())
    assert client.send("GET", f"/object/{bucket}/{escaped}").body == key.encode()
    assert client.send("DELETE", f"/object/{bucket}", {"prefixes": [key]}).json[0]["name"] == key
    assert client.keys(bucket) == []


@pytest.mark.parametrize("character", [*'"#%<>[]\\^{}|~`\x00\x01\n\x7f', "ä", "€", "\u2028"])
def test_illegal_characters_are_refused_encoded_or_not(client: Client, bucket: str, character: str) -> None:
    create_bucket(client, bucket)
    expected = (400, "400", "InvalidKey", f"Invalid key: a{character}b", "InvalidKey")
    path = f"/object/{bucket}/a{quote(character)}b"
    assert client.send("POST", path, b"x").error == expected
    assert client.send("PUT", path, b"x").error == expected
    assert client.send("GET", path).error == NO_KEY
    assert client.send("DELETE", path).error == NO_KEY
    if character in '"<>[]\\^{}|~`':
        assert client.send("POST", f"/object/{bucket}/a{character}b", b"x").error == expected
    assert client.send("DELETE", f"/object/{bucket}", {"prefixes": [f"a{character}b"]}).json == []
    assert (client.keys(bucket), incoming(client.server)) == ([], [])


def test_a_path_is_decoded_once(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    assert client.send("POST", f"/object/{bucket}/a%2Fb%2fc+d%3F", b"x").json["Key"] == f"{bucket}/a/b/c+d?"
    assert client.send("POST", f"/object/{bucket}/a%2520b", b"x").error[3] == "Invalid key: a%20b"
    assert client.send("POST", f"/object/{bucket}/cut?off", b"x").json["Key"] == f"{bucket}/cut"


@pytest.mark.parametrize("path", ["a%", "a%zz", "a%4", "%ff", "%c3%28", "%ed%a0%80"])
def test_a_path_that_cannot_be_decoded_is_refused(client: Client, full: str, path: str) -> None:
    for method in ("GET", "DELETE", "POST"):
        answer = client.send(method, f"/object/{full}/{path}", b"" if method == "POST" else None)
        assert answer.status == 400
        assert answer.json == {
            "statusCode": 400,
            "error": "Bad Request",
            "message": f"'/object/{full}/{path}' is not a valid url component",
            "code": "FST_ERR_BAD_URL",
        }
    assert client.keys(full) == ["a/b.txt"]


@pytest.mark.parametrize(
    "key",
    ["..", ".", "../x", "a/../x", "a/..", "./x", "a/./x", "../../../../../../tmp/x", "%2e%2e/x", "a%2F..%2F..%2Fx"],
)
def test_no_key_leads_out_of_the_folder(client: Client, bucket: str, key: str) -> None:
    create_bucket(client, bucket)
    client.upload(bucket, "k")
    before, files = tree(client.server.root.parent), len(stored(client.server))
    decoded = key.replace("%2e", ".").replace("%2F", "/")
    expected = (400, "400", "InvalidKey", f"Invalid key: {decoded} contains dot path segment", "InvalidKey")
    assert client.send("POST", f"/object/{bucket}/{key}", b"x").error == expected
    assert client.send("PUT", f"/object/{bucket}/{key}", b"x").error == expected
    assert client.send("POST", f"/object/{bucket}/{key}", *form(file(b"x"))).error == expected
    assert client.send("POST", f"/object/upload/sign/{bucket}/{key}").error == expected
    for call in ("move", "copy"):
        body = {"bucketId": bucket, "sourceKey": "k", "destinationKey": decoded}
        assert client.send("POST", f"/object/{call}", body).error == expected
    assert client.send("POST", f"/object/../{key}", b"x").error == NO_BUCKET
    assert client.send("GET", f"/object/{bucket}/{key}").error == NO_KEY
    assert (tree(client.server.root.parent), len(stored(client.server))) == (before, files)
    assert client.keys(bucket) == ["k"]


# Deleting, moving, copying


def test_deleting_one_object(client: Client, full: str) -> None:
    assert client.send("DELETE", f"/object/{full}/a").error == NO_KEY
    answer = client.send("DELETE", f"/object/{full}/a/b.txt", headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error[4]) == (400, "InvalidRequest")
    before = len(stored(client.server))
    assert client.send("DELETE", f"/object/{full}/a/b.txt").json == {"message": "Successfully deleted"}
    assert client.send("DELETE", f"/object/{full}/a/b.txt").error == NO_KEY
    assert len(stored(client.server)) == before - 1


def test_deleting_many_takes_exact_keys_and_answers_what_there_was(client: Client, full: str) -> None:
    for key in ("a/c", "a/d", "e"):
        client.upload(full, key)
    info = client.info(full, "a/c")
    body = {"prefixes": ["a", "a/", "a/c", "a/c", "no", "ä", "\ud800", "e"]}
    gone = client.send("DELETE", f"/object/{full}", body).json
    assert [row["name"] for row in gone] == ["a/c", "e"]
    assert set(gone[0]) == {
        *("name", "bucket_id", "owner", "owner_id", "version", "id", "updated_at", "created_at"),
        *("last_accessed_at", "metadata", "user_metadata"),
    }
    assert (gone[0]["id"], gone[0]["version"], gone[0]["bucket_id"]) == (info["id"], info["version"], full)
    assert client.keys(full) == ["a/b.txt", "a/d"]
    wrong: list[dict[str, Any]] = [{"prefixes": []}, {}, {"prefixes": None}, {"prefixes": "a/d"}, {"keys": ["a/d"]}]
    for body in wrong:
        assert client.send("DELETE", f"/object/{full}", body).error[:2] == (400, "400")
    assert client.send("DELETE", f"/object/{full}").error[:2] == (400, "400")
    assert client.keys(full) == ["a/b.txt", "a/d"]


def test_moving_never_overwrites(client: Client, full: str) -> None:
    create_bucket(client, f"{full}-2")
    client.upload(full, "taken", b"taken")
    info = client.info(full, "a/b.txt")

    def move(key: str, **other: str) -> Answer:
        body = {"bucketId": full, "sourceKey": "a/b.txt", "destinationKey": key, **other}
        return client.send("POST", "/object/move", body, {"x-upsert": "true"})

    assert move("taken").error == (400, "409", "Duplicate", "The resource already exists", "ResourceAlreadyExists")
    assert move("x", sourceKey="no").error == NO_KEY
    answer = move("x", destinationBucket="no")
    assert (answer.error[1], *answer.error[3:]) == ("404", "The related resource does not exist", "InvalidRequest")
    assert move("~").error[4] == "InvalidKey"
    assert client.keys(full) == ["a/b.txt", "taken"]
    assert move("a/b.txt").json == {"message": "Successfully moved"}
    assert move("there", destinationBucket=f"{full}-2").json == {"message": "Successfully moved"}
    assert (client.keys(full), client.keys(f"{full}-2")) == (["taken"], ["there"])
    assert client.content(f"{full}-2", "there") == b"0123456789"
    assert client.info(f"{full}-2", "there")["id"] == info["id"]


def test_copying_overwrites_when_told(client: Client, full: str) -> None:
    create_bucket(client, f"{full}-2")
    metadata = base64.b64encode(b'{"a": 1}').decode()
    client.upload(full, "source", b"source", content_type="image/png", x_metadata=metadata, cache_control="7")

    def copy(key: str, upsert: str = "", **other: Any) -> Answer:
        body = {"bucketId": full, "sourceKey": "source", "destinationKey": key, **other}
        return client.send("POST", "/object/copy", body, {"x-upsert": upsert})

    assert copy("a/b.txt").error == DUPLICATE
    assert copy("a/b.txt", "TRUE").error == DUPLICATE
    assert copy("x", sourceKey="no").error == NO_KEY
    assert copy("x", destinationBucket="no").error[1] == "404"
    answer = copy("a/b.txt", "true").json
    info = client.info(full, "a/b.txt")
    assert (answer["Key"], answer["Id"], answer["id"]) == (f"{full}/a/b.txt", info["id"], info["id"])
    assert client.content(full, "a/b.txt") == b"source"
    assert (info["content_type"], info["cache_control"], info["metadata"]) == ("image/png", "7", {"a": 1})
    changed = {"mimetype": "image/webp", "cacheControl": "max-age=1"}
    assert copy("k", destinationBucket=f"{full}-2", copyMetadata=False, metadata=changed).status == 200
    info = client.info(f"{full}-2", "k")
    assert (info["content_type"], info["cache_control"], info["metadata"]) == ("image/webp", "max-age=1", {})
    assert info["id"] != client.info(full, "source")["id"]
    client.send("DELETE", f"/object/{full}/source")
    assert client.content(f"{full}-2", "k") == b"source"
    assert copy("source", sourceKey="a/b.txt", upsert="true").status == 200

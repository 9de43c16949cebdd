"""Uploads to the embedded Storage server, as a body and as a multipart form."""

from __future__ import annotations

import base64
import hashlib
import os
import uuid

import pytest

from embedded_supabase.storage.auth import mint_key
from tests import storage_server_support
from tests.storage_server_support import (
    DUPLICATE,
    LARGE,
    NO_BUCKET,
    NO_JWS,
    NO_WRITER,
    Client,
    create_bucket,
    exchange,
    file,
    form,
    incoming,
)

client = storage_server_support.client
full = storage_server_support.full

TOO_LARGE = (400, "413", "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge")


def field(name: str, value: str | bytes) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', value.encode() if isinstance(value, str) else value


# Uploads


def test_an_upload_answers_key_and_id_and_is_readable_at_once(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    content = os.urandom(300_000)
    metadata = base64.b64encode(b'{"camera": {"n": 1}, "name": "\\ud800"}').decode()
    answer = client.upload(
        bucket, "a b/c", content, content_type="image/jpeg; q=1", cache_control="max-age=7", x_metadata=metadata
    )
    assert (answer.status, answer.json) == (200, {"Key": f"{bucket}/a b/c", "Id": answer.json["Id"]})
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert {"ETag", "Server"}.isdisjoint(answer.headers)
    info = client.info(bucket, "a b/c")
    assert info["id"] == answer.json["Id"]
    for name in ("created_at", "last_modified", "version"):
        assert info.pop(name)
    assert info == {
        "id": str(uuid.UUID(answer.json["Id"])),
        "name": "a b/c",
        "bucket_id": bucket,
        "size": 300_000,
        "content_type": "image/jpeg; q=1",
        "cache_control": "max-age=7",
        "etag": f'"{hashlib.md5(content).hexdigest()}"',
        "metadata": {"camera": {"n": 1}, "name": "\ud800"},
    }
    assert client.content(bucket, "a b/c") == content


def test_an_overwrite_keeps_the_id_and_forgets_the_rest(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    metadata = base64.b64encode(b'{"a": 1}').decode()
    client.upload(bucket, "k", b"one", content_type="image/png", cache_control="60", x_metadata=metadata)
    before = client.info(bucket, "k")
    assert (before["metadata"], before["cache_control"]) == ({"a": 1}, "60")
    assert client.upload(bucket, "k", b"three", x_upsert="true").json["Id"] == before["id"]
    after = client.info(bucket, "k")
    assert (after["id"], after["created_at"]) == (before["id"], before["created_at"])
    assert after["version"] != before["version"]
    assert (after["size"], after["metadata"], after["cache_control"]) == (5, {}, "no-cache")
    assert after["content_type"] == "application/octet-stream"


def test_only_the_exact_word_true_overwrites(client: Client, full: str) -> None:
    for word in ("TRUE", "1", "True", "yes", "false", ""):
        assert client.upload(full, "a/b.txt", b"other", x_upsert=word).error == DUPLICATE
    assert client.upload(full, "a/b.txt", b"other").error == DUPLICATE
    assert client.content(full, "a/b.txt") == b"0123456789"
    assert client.upload(full, "a/b.txt", b"other", x_upsert="true").status == 200
    assert client.content(full, "a/b.txt") == b"other"


def test_put_overwrites_and_creates(client: Client, full: str) -> None:
    for key in ("a/b.txt", "new"):
        answer = client.send("PUT", f"/object/{full}/{key}", b"put", {"x-upsert": "false"})
        assert answer.json["Key"] == f"{full}/{key}"
        assert client.content(full, key) == b"put"


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_what_looks_like_a_form_or_json_is_stored_as_it_is(client: Client, bucket: str, content_type: str) -> None:
    create_bucket(client, bucket)
    assert client.upload(bucket, "k", b"{a=1&b", content_type=content_type).status == 200
    assert client.content(bucket, "k") == b"{a=1&b"
    assert client.info(bucket, "k")["content_type"] == content_type


@pytest.mark.parametrize("content_type", ["", "image", "image/", "/png", "image/png/x y", "a b/c"])
def test_a_malformed_type_is_refused_before_anything_else(client: Client, full: str, content_type: str) -> None:
    for path, authorization in ((f"/object/{full}/k", ""), ("/object/no/k", ""), (f"/object/{full}/k", None)):
        answer = client.send("POST", path, b"x", {"Content-Type": content_type}, authorization=authorization)
        assert answer.error[:2] == (400, "415")
        assert answer.error[3] == "Invalid Content-Type header"
    assert client.keys(full) == ["a/b.txt"]


@pytest.mark.parametrize("metadata", ["%%%", "bm8=", "W10=", "InQi", base64.b64encode(b'{"a": NaN}').decode()])
def test_metadata_that_is_no_json_object_is_dropped(client: Client, bucket: str, metadata: str) -> None:
    create_bucket(client, bucket)
    assert client.upload(bucket, "k", x_metadata=metadata).status == 200
    assert client.info(bucket, "k")["metadata"] == {}


def test_an_empty_body_is_an_empty_object(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    assert client.upload(bucket, "length", b"").status == 200
    assert client.send("POST", f"/object/{bucket}/chunked", iter([b""])).status == 200
    assert client.send("POST", f"/object/{bucket}/form", *form(file(b""))).status == 200
    bare = (
        f"POST /object/{bucket}/bare HTTP/1.1\r\nHost: x\r\nAuthorization: {client.server.key}\r\nConnection: close\r\n"
    )
    assert exchange(client.server, bare.encode() + b"\r\n").startswith(b"HTTP/1.1 200 ")
    for key in ("length", "chunked", "form", "bare"):
        assert client.content(bucket, key) == b""
        assert client.info(bucket, key)["etag"] == '"d41d8cd98f00b204e9800998ecf8427e"'


def test_a_folder_placeholder_is_empty(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    for body in (b"x", iter([b"x"])):
        answer = client.send("POST", f"/object/{bucket}/a/.emptyFolderPlaceholder", body)
        assert answer.error == TOO_LARGE
    assert client.upload(bucket, "a/.emptyFolderPlaceholder", b"").status == 200
    assert client.keys(bucket) == ["a/.emptyFolderPlaceholder"]


@pytest.mark.parametrize("size", [1000, 1001])
@pytest.mark.parametrize("kind", ["declared", "chunked", "form"])
def test_a_bucket_takes_objects_up_to_its_limit(client: Client, bucket: str, size: int, kind: str) -> None:
    create_bucket(client, bucket, file_size_limit=1000)
    path, content = f"/object/{bucket}/k", b"x" * size
    if kind == "form":
        answer = client.send("POST", path, *form(field("note", "y" * 2000), file(content)))
    else:
        answer = client.send("POST", path, content if kind == "declared" else iter([content]))
    if size > 1000:
        assert answer.error == TOO_LARGE
        assert (client.keys(bucket), incoming(client.server)) == ([], [])
    else:
        assert answer.status == 200
        assert client.content(bucket, "k") == content


@pytest.mark.parametrize(
    ("content_type", "taken"),
    [("image/png", True), ("image/png; q=1", False), ("image/jpeg", False), ("text/x", True), ("text", False)],
)
@pytest.mark.parametrize("as_form", [False, True])
def test_a_bucket_takes_its_types(client: Client, bucket: str, content_type: str, taken: bool, as_form: bool) -> None:
    create_bucket(client, bucket, allowed_mime_types=["image/png", "text/*", "*"])
    path = f"/object/{bucket}/k"
    if as_form:
        answer = client.send("POST", path, *form(file(b"x", content_type)))
    else:
        answer = client.send("POST", path, b"x", {"Content-Type": content_type})
    if taken:
        assert client.info(bucket, "k")["content_type"] == content_type
    elif "/" in content_type:
        message = f"mime type {content_type} is not supported"
        assert answer.error == (400, "415", "invalid_mime_type", message, "InvalidMimeType")
    else:
        assert answer.error[1] == "415"
    assert client.keys(bucket) == (["k"] if taken else [])


def test_an_upload_without_a_type_to_a_bucket_with_types_is_refused(client: Client, bucket: str) -> None:
    create_bucket(client, bucket, allowed_mime_types=["image/png"])
    assert client.upload(bucket, "k").error[3] == "mime type application/octet-stream is not supported"


def test_checks_come_in_the_order_of_the_api(client: Client, full: str, bucket: str) -> None:
    client.send("PUT", f"/bucket/{full}", {"allowed_mime_types": ["image/png"], "file_size_limit": 5})
    bad_key = f"/object/{full}/%7E"
    anon = "Bearer " + mint_key(client.server.secret, "anon")
    assert client.send("POST", "/object/no/~", b"x" * 9, authorization="no").error == NO_JWS
    assert client.send("POST", "/object/no/~", b"x" * 9, authorization=anon).error == NO_BUCKET
    assert client.send("POST", bad_key, b"x" * 9, authorization=anon).error[4] == "InvalidMimeType"
    png = {"Content-Type": "image/png"}
    assert client.send("POST", bad_key, b"x" * 9, png, authorization=anon).error == TOO_LARGE
    assert client.send("POST", bad_key, b"x", png, authorization=anon).error[4] == "InvalidKey"
    assert client.send("POST", f"/object/{full}/a/b.txt", b"x", png, authorization=anon).error == NO_WRITER
    assert client.send("POST", f"/object/{full}/a/b.txt", b"x", png).error == DUPLICATE


# Multipart forms


def test_fields_before_the_file_describe_it(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    parts = [field("cacheControl", "60"), field("userMetadata", '{"a": [1]}'), field("contentType", "image/webp")]
    answer = client.send("POST", f"/object/{bucket}/k", *form(*parts, file(b"content", name=""), file(b"second")))
    assert answer.json["Key"] == f"{bucket}/k"
    info = client.info(bucket, "k")
    assert (info["cache_control"], info["metadata"], info["content_type"]) == ("max-age=60", {"a": [1]}, "image/webp")
    assert client.content(bucket, "k") == b"content"


def test_fields_after_the_file_are_lost(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    parts = [file(b"c" * 600_000, "image/gif"), field("cacheControl", "60"), field("metadata", '{"a": 1}')]
    assert client.send("POST", f"/object/{bucket}/k", *form(*parts)).status == 200
    info = client.info(bucket, "k")
    assert (info["cache_control"], info["metadata"], info["content_type"]) == ("no-cache", {}, "image/gif")
    assert info["size"] == 600_000


@pytest.mark.parametrize(("metadata", "taken"), [("[1]", False), ('"text"', False), ("{broken", True), ("", True)])
def test_metadata_in_a_form_is_an_object_or_broken(client: Client, bucket: str, metadata: str, taken: bool) -> None:
    create_bucket(client, bucket)
    answer = client.send("POST", f"/object/{bucket}/k", *form(field("metadata", metadata), file(b"x")))
    if taken:
        assert client.info(bucket, "k")["metadata"] == {}
    else:
        assert answer.error[:2] == (400, "400")
        assert answer.error[3] == "invalid input syntax for type json"
        assert (client.keys(bucket), incoming(client.server)) == ([], [])


def test_a_field_is_cut_near_a_mebibyte(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    long = '{"a": "' + "x" * (3 << 20) + '"}'
    assert client.send("POST", f"/object/{bucket}/k", *form(field("metadata", long), file(b"x"))).status == 200
    assert client.info(bucket, "k")["metadata"] == {}


def test_a_form_without_a_file_has_no_content(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    answer = client.send("POST", f"/object/{bucket}/k", *form(field("file", "content")))
    assert (answer.status, answer.error[1], answer.error[3]) == (400, "400", "No content provided")
    assert (client.keys(bucket), incoming(client.server)) == ([], [])


@pytest.mark.parametrize("content", [b"x", b"x" * LARGE])
def test_a_form_without_its_end_stores_nothing(client: Client, bucket: str, content: bytes) -> None:
    create_bucket(client, bucket)
    answer = client.send("POST", f"/object/{bucket}/k", *form(file(content), end=False))
    message = "Request stream closed before upload could begin"
    assert (answer.status, answer.error[1], answer.error[3]) == (400, "400", message)
    assert (client.keys(bucket), incoming(client.server)) == ([], [])


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        ("multipart/form-data; boundary=limit", b"no form at all"),
        ("multipart/form-data; boundary=limit", b"--limit\r\nno header\r\n\r\nx\r\n--limit--\r\n"),
    ],
)
def test_a_broken_form_is_refused(client: Client, bucket: str, content_type: str, body: bytes) -> None:
    create_bucket(client, bucket)
    answer = client.send("POST", f"/object/{bucket}/k", body, {"Content-Type": content_type})
    assert answer.error[:2] == (400, "400")
    assert (client.keys(bucket), incoming(client.server)) == ([], [])


def test_texts_that_no_header_can_hold_do_not_spoil_an_object(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    body, header = form(field("contentType", "image/png;\r\nX: y"), file(b"x"))
    assert client.send("POST", f"/object/{bucket}/k", body, header).error[1] == "415"
    body, header = form(field("cacheControl", "1\r\nX-Evil: é€"), file(b"content"))
    assert client.send("POST", f"/object/{bucket}/k", body, header).status == 200
    answer = client.send("GET", f"/object/{bucket}/k")
    assert (answer.status, answer.body, answer.headers["X-Evil"]) == (200, b"content", None)

"""The embedded Storage server as its clients see it: what it answers, what it stores, and what survives."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx
import pytest
from storage3 import SyncStorageClient
from storage3.exceptions import StorageApiError
from storage3.types import CreateSignedUploadUrlOptions

from benchmarks.bench import running_storage as running_strained
from embedded_supabase.files import wait_until
from embedded_supabase.storage.auth import mint_key
from embedded_supabase.storage.faults import FaultInjector
from tests.services import StorageServer, end, running_storage, subprocess_environment

SECONDS = 20.0
LARGE = 3 << 20

DUPLICATE = (400, "409", "Duplicate", "The resource already exists", "KeyAlreadyExists")
NO_BUCKET = (400, "404", "Bucket not found", "Bucket not found", "NoSuchBucket")
NO_KEY = (400, "404", "not_found", "Object not found", "NoSuchKey")
TOO_LARGE = (400, "413", "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge")
NO_HEADER = (400, "400", "Error", "headers must have required property 'authorization'", "InvalidRequest")
NO_WRITER = (400, "403", "Unauthorized", "new row violates row-level security policy", "AccessDenied")
NO_JWS = (400, "403", "Unauthorized", "Invalid Compact JWS", "AccessDenied")
BAD_RANGE = (416, "416", "invalid_range", "The requested range is not satisfiable", "InvalidRange")


class Answer(NamedTuple):
    """What the server answered."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | int, str, str, str]:
        """The status and the four fields of an error's body, which has no others."""
        body = self.json
        assert set(body) == {"statusCode", "error", "message", "code"}
        return self.status, body["statusCode"], body["error"], body["message"], body["code"]


class Client:
    """One connection to the server, and a key."""

    def __init__(self, server: StorageServer) -> None:
        self.server = server
        self.address = urlsplit(server.url)
        self.connection = http.client.HTTPConnection("127.0.0.1", self.address.port or 0, timeout=SECONDS)

    def send(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        authorization: str | None = "",
    ) -> Answer:
        """Send a request; without another authorization as the service role, with None as nobody."""
        sent = dict(headers or {})
        if authorization is not None:
            sent["Authorization"] = authorization or f"Bearer {self.server.key}"
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        self.connection.request(method, path, body, sent)
        answer = self.connection.getresponse()
        return Answer(answer.status, answer.msg, answer.read())

    def upload(self, bucket: str, key: str, content: bytes = b"content", **headers: str) -> Answer:
        return self.send(
            "POST", f"/object/{bucket}/{quote(key)}", content, {k.replace("_", "-"): v for k, v in headers.items()}
        )

    def content(self, bucket: str, key: str) -> bytes:
        answer = self.send("GET", f"/object/{bucket}/{quote(key)}")
        assert answer.status == 200, answer
        return answer.body

    def keys(self, bucket: str) -> list[str]:
        """Return the keys of a bucket with fewer than a thousand objects."""
        found = self.send("POST", f"/object/list-v2/{bucket}", {}).json
        assert not found["hasNext"]
        return [entry["name"] for entry in found["objects"]]

    def info(self, bucket: str, key: str) -> dict[str, Any]:
        answer = self.send("GET", f"/object/info/{bucket}/{quote(key)}")
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json
        return found


@pytest.fixture
def client(storage_server: StorageServer) -> Iterator[Client]:
    client = Client(storage_server)
    with closing(client.connection):
        yield client


@pytest.fixture
def full(client: Client, bucket: str) -> str:
    """A private bucket with one object, `a/b.txt`."""
    create_bucket(client, bucket)
    assert client.upload(bucket, "a/b.txt", b"0123456789", content_type="text/plain").status == 200
    return bucket


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[StorageServer]:
    """A server that this test may hurt."""
    with running_storage(tmp_path) as server:
        yield server


def create_bucket(client: Client, bucket: str, **settings: Any) -> None:
    answer = client.send("POST", "/bucket", {"name": bucket, **settings})
    assert (answer.status, answer.json) == (200, {"name": bucket})


def token(claims: Any, secret: str, algorithm: str = "HS256") -> str:
    """Return a JSON Web Token made by hand, so that it can be wrong."""

    def encoded(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).decode().rstrip("=")

    signed = f"{encoded(json.dumps({'alg': algorithm, 'typ': 'JWT'}).encode())}.{encoded(json.dumps(claims).encode())}"
    digest = {"HS256": "sha256", "HS512": "sha512"}.get(algorithm)
    signature = hmac.new(secret.encode(), signed.encode(), digest).digest() if digest else b""
    return f"{signed}.{encoded(signature)}"


def form(*parts: tuple[str, bytes], boundary: str = "limit", end: bool = True) -> tuple[bytes, dict[str, str]]:
    """Return a multipart body and its header; a part is its own headers, and its content."""
    body = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode(), data) for head, data in parts)
    if end:
        body += b"--%s--\r\n" % boundary.encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def field(name: str, value: str | bytes) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', value.encode() if isinstance(value, str) else value


def file(content: bytes, content_type: str | None = "image/png", name: str = "file") -> tuple[str, bytes]:
    head = f'Content-Disposition: form-data; name="{name}"; filename="x.png"'
    return head + (f"\r\nContent-Type: {content_type}" if content_type else ""), content


def exchange(server: StorageServer, request: bytes) -> bytes:
    """Send bytes on a new connection and return all that comes back until the server closes it."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), SECONDS) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
        return received


def start_upload(server: StorageServer, path: str, headers: str, begin: bytes, method: str = "POST") -> socket.socket:
    """Begin an upload by hand, and wait until the server has a file for it."""
    connection = socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), SECONDS)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n{headers}\r\n\r\n"
    connection.sendall(head.encode() + begin)
    assert wait_until(lambda: incoming(server) != [], SECONDS)
    return connection


def incoming(server: StorageServer) -> list[Path]:
    return list((server.root / "incoming").iterdir())


def stored(server: StorageServer) -> list[Path]:
    return [path for folder in (server.root / "objects").iterdir() for path in folder.iterdir()]


def tree(folder: Path) -> set[str]:
    """Return the paths of a folder but for the server's own files, whose names are UUIDs."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {
        path for path in found if not re.fullmatch(r"root(/objects|/incoming)?(/[0-9a-f]{2})?(/[0-9a-f-]{36})?", path)
    }


# The official client


@pytest.fixture
def official(storage_server: StorageServer) -> Iterator[SyncStorageClient]:
    headers = {"apiKey": storage_server.key, "Authorization": f"Bearer {storage_server.key}"}
    with httpx.Client(trust_env=False, timeout=SECONDS) as session:
        yield SyncStorageClient(f"{storage_server.url}/storage/v1/", headers, http_client=session)


def test_the_official_client_manages_buckets(official: SyncStorageClient, bucket: str) -> None:
    assert official.create_bucket(bucket, options={"file_size_limit": 2000}) == {"name": bucket}
    with pytest.raises(StorageApiError) as raised:
        official.create_bucket(bucket)
    assert (raised.value.code, raised.value.status) == ("Duplicate", "409")
    found = official.get_bucket(bucket)
    assert (found.id, found.name, found.public, found.file_size_limit) == (bucket, bucket, False, 2000)
    assert bucket in [other.id for other in official.list_buckets()]
    assert official.update_bucket(bucket, {"public": True, "allowed_mime_types": ["image/*"]}) == {
        "message": "Successfully updated"
    }
    found = official.get_bucket(bucket)
    assert (found.public, found.allowed_mime_types, found.file_size_limit) == (True, ["image/*"], 2000)
    official.from_(bucket).upload("a.png", b"x", {"content-type": "image/png"})
    with pytest.raises(StorageApiError) as raised:
        official.delete_bucket(bucket)
    assert (raised.value.code, raised.value.status) == ("ResourceNotEmpty", "409")
    official.empty_bucket(bucket)
    assert official.delete_bucket(bucket) == {"message": "Successfully deleted"}
    with pytest.raises(StorageApiError) as raised:
        official.get_bucket(bucket)
    assert (raised.value.code, raised.value.status) == ("Bucket not found", "404")


def test_the_official_client_uploads_replaces_and_reads(
    official: SyncStorageClient, bucket: str, tmp_path: Path
) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    answer = objects.upload("folder/a b.txt", b"one", {"metadata": {"camera": 1}})
    assert (answer.path, answer.full_path) == ("folder/a b.txt", f"{bucket}/folder/a b.txt")
    info = objects.info("folder/a b.txt")
    assert info["content_type"] == "text/plain;charset=UTF-8"
    assert info["cache_control"] == "max-age=3600"
    assert info["metadata"] == {"camera": 1}
    with pytest.raises(StorageApiError) as raised:
        objects.upload("folder/a b.txt", b"two")
    assert (raised.value.code, raised.value.status) == ("Duplicate", "409")
    assert objects.download("folder/a b.txt") == b"one"
    objects.upload("folder/a b.txt", b"two", {"upsert": "true"})
    assert objects.download("folder/a b.txt") == b"two"
    path = tmp_path / "photo"
    path.write_bytes(os.urandom(700_000))
    objects.update("folder/a b.txt", path, {"content-type": "image/jpeg", "cache-control": "60"})
    with open(path, "rb") as handle:
        objects.upload("new", handle)
    assert objects.download("folder/a b.txt") == objects.download("new") == path.read_bytes()
    assert objects.exists("new")
    assert not objects.exists("old")
    with pytest.raises(StorageApiError) as raised:
        objects.download("old")
    assert (raised.value.code, raised.value.status) == ("not_found", "404")


def test_the_official_client_lists(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    for key in ("b/1", "b/2", "b/c/3", "a", "C"):
        objects.upload(key, key.encode())
    assert [(entry["name"], entry["id"] is None) for entry in objects.list()] == [
        ("a", False),
        ("b", True),
        ("C", False),
    ]
    assert [entry["name"] for entry in objects.list("b")] == ["1", "2", "c"]
    assert [entry["name"] for entry in objects.list("b", {"limit": 1, "offset": 1})] == ["2"]
    assert [entry["name"] for entry in objects.list("b", {"search": "C"})] == ["c"]
    descending = objects.list("", {"sortBy": {"column": "name", "order": "desc"}})
    assert [entry["name"] for entry in descending] == ["C", "b", "a"]
    first = objects.list_v2({"limit": 3})
    assert [found.name for found in first.objects] == ["C", "a", "b/1"]
    assert first.hasNext
    second = objects.list_v2({"limit": 3, "cursor": first.nextCursor or ""})
    assert ([found.name for found in second.objects], second.hasNext) == (["b/2", "b/c/3"], False)
    level = objects.list_v2({"prefix": "b/", "with_delimiter": True})
    assert [(found.key, found.name) for found in level.folders] == [("c", "b/c/")]
    assert [(found.key, found.name) for found in level.objects] == [("1", "b/1"), ("2", "b/2")]


def test_the_official_client_moves_copies_and_removes(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    objects.upload("a", b"content")
    assert objects.move("a", "b") == {"message": "Successfully moved"}
    copied = objects.copy("b", "c")
    assert copied["Key"] == f"{bucket}/c"
    assert objects.download("c") == objects.download("b") == b"content"
    removed = objects.remove(["b", "missing", "c", "c"])
    assert [entry["name"] for entry in removed] == ["b", "c"]
    assert objects.list() == []


def test_the_official_client_signs_addresses(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    objects.upload("folder/a b", b"content")
    signed = objects.create_signed_url("folder/a b", 60, {"download": "name.txt"})
    with httpx.Client(trust_env=False, timeout=SECONDS) as nobody:
        answer = nobody.get(signed["signedURL"] or "")
        assert (answer.status_code, answer.content) == (200, b"content")
        assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''name.txt"
        good, bad = objects.create_signed_urls(["folder/a b", "missing"], 60)
        assert nobody.get(good["signedURL"] or "").content == b"content"
        assert bad["signedURL"] is None
        assert bad["error"] == "Either the object does not exist or you do not have access to it"
        public = objects.get_public_url("folder/a b")
        assert nobody.get(public).json()["code"] == "NoSuchBucket"
        official.update_bucket(bucket, {"public": True})
        assert nobody.get(public).content == b"content"


def test_the_official_client_uploads_to_a_signed_address(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    signed = objects.create_signed_upload_url("a")
    answer = objects.upload_to_signed_url("a", signed["token"], b"one")
    assert answer.full_path == f"{bucket}/a"
    with pytest.raises(StorageApiError) as raised:
        objects.upload_to_signed_url("a", signed["token"], b"two")
    assert (raised.value.code, raised.value.status) == ("Duplicate", "409")
    with pytest.raises(StorageApiError) as raised:
        objects.upload_to_signed_url("b", signed["token"], b"two")
    assert raised.value.code == "InvalidSignature"
    again = objects.create_signed_upload_url("a", CreateSignedUploadUrlOptions(upsert="true"))
    for content in (b"two", b"three"):
        objects.upload_to_signed_url("a", again["token"], content)
        assert objects.download("a") == content


# Keys of the API, and roles


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda secret: None, NO_HEADER, id="no-header"),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role"}, secret + "!"),
            (400, "403", "Unauthorized", "signature verification failed", "AccessDenied"),
            id="other-secret",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role", "exp": time.time() - 5}, secret),
            (400, "403", "Unauthorized", '"exp" claim timestamp check failed', "AccessDenied"),
            id="expired",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role", "nbf": time.time() + 500}, secret),
            (400, "403", "Unauthorized", '"nbf" claim timestamp check failed', "AccessDenied"),
            id="not-yet",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role"}, secret, "none"),
            (400, "403", "Unauthorized", '"alg" (Algorithm) Header Parameter value not allowed', "AccessDenied"),
            id="alg-none",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role"}, secret, "HS512"),
            (400, "403", "Unauthorized", '"alg" (Algorithm) Header Parameter value not allowed', "AccessDenied"),
            id="alg-HS512",
        ),
        pytest.param(lambda secret: "Bearer sb_secret_abc", NO_JWS, id="no-jwt"),
        pytest.param(lambda secret: "Bearer", NO_JWS, id="empty-bearer"),
        pytest.param(lambda secret: " ", NO_JWS, id="empty"),
        pytest.param(lambda secret: "Basic dTpw", NO_JWS, id="basic"),
        pytest.param(lambda secret: "Bearer " + token(["service_role"], secret), NO_JWS, id="claims-are-a-list"),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "postgres"}, secret),
            (500, "500", "DatabaseError", "database error, code: 22023", "DatabaseError"),
            id="unknown-role",
        ),
    ],
)
def test_a_key_that_proves_nothing_is_refused(
    client: Client, full: str, make: Callable[[str], str | None], expected: tuple[int, str, str, str, str]
) -> None:
    authorization = make(client.server.secret)
    for method, path, body in (
        ("POST", f"/object/list/{full}", {"prefix": ""}),
        ("POST", f"/object/{full}/new", b"content"),
        ("GET", f"/object/authenticated/{full}/a/b.txt", None),
        ("GET", "/bucket", None),
    ):
        assert client.send(method, path, body, authorization=authorization).error == expected
    reading = client.send("GET", f"/object/{full}/a/b.txt", authorization=authorization)
    assert reading.error == (expected if expected[0] == 500 else NO_BUCKET)
    assert client.send("GET", f"/object/info/{full}/a/b.txt", authorization=authorization).error == reading.error
    assert client.keys(full) == ["a/b.txt"]


@pytest.mark.parametrize("word", ["Bearer ", "bearer ", "BEARER  ", ""])
@pytest.mark.parametrize("claims", [{}, {"iat": 2**40}, {"exp": 2**40}, {"aud": "x", "iss": "y", "sub": 1}])
def test_a_good_key_is_taken_however_it_is_sent(client: Client, word: str, claims: dict[str, Any]) -> None:
    authorization = word + token({"role": "service_role", **claims}, client.server.secret)
    assert client.send("GET", "/bucket", authorization=authorization).status == 200


@pytest.mark.parametrize("claims", [{"role": "anon"}, {"role": "authenticated"}, {}], ids=["anon", "user", "no-role"])
def test_other_roles_see_nothing_and_change_nothing(client: Client, full: str, claims: dict[str, str]) -> None:
    authorization = "Bearer " + token(claims, client.server.secret)

    def send(method: str, path: str, body: bytes | dict[str, Any] | None = None) -> Answer:
        return client.send(method, path, body, authorization=authorization)

    assert send("GET", "/bucket").json == []
    assert send("GET", f"/bucket/{full}").error == NO_BUCKET
    assert send("PUT", f"/bucket/{full}", {"public": True}).error == NO_BUCKET
    assert send("DELETE", f"/bucket/{full}").error == NO_BUCKET
    assert send("POST", f"/bucket/{full}/empty").error == NO_BUCKET
    assert send("POST", "/bucket", {"name": f"{full}-2"}).error == NO_WRITER
    assert send("POST", f"/object/list/{full}", {"prefix": ""}).json == []
    assert send("POST", f"/object/list-v2/{full}", {}).json == {"hasNext": False, "folders": [], "objects": []}
    assert send("GET", f"/object/{full}/a/b.txt").error == NO_KEY
    assert send("GET", f"/object/authenticated/{full}/a/b.txt").error == NO_KEY
    assert send("GET", f"/object/info/{full}/a/b.txt").error == NO_KEY
    assert send("POST", f"/object/{full}/new", b"x").error == NO_WRITER
    assert send("POST", f"/object/{full}/a/b.txt", b"x").error == NO_WRITER
    assert send("PUT", f"/object/{full}/a/b.txt", b"x").error == NO_WRITER
    assert send("POST", f"/object/upload/sign/{full}/new").error == NO_WRITER
    assert send("POST", f"/object/sign/{full}/a/b.txt", {"expiresIn": 60}).error == NO_KEY
    move = {"bucketId": full, "sourceKey": "a/b.txt", "destinationKey": "c"}
    assert send("POST", "/object/move", move).status == 400
    assert send("POST", "/object/copy", move).status == 400
    assert send("DELETE", f"/object/{full}/a/b.txt").error == (
        (400, "403", "Unauthorized", "Access denied", "AccessDenied")
    )
    assert send("DELETE", f"/object/{full}", {"prefixes": ["a/b.txt"]}).json == []
    assert client.keys(full) == ["a/b.txt"]
    assert client.content(full, "a/b.txt") == b"0123456789"
    assert incoming(client.server) == []


def test_a_public_bucket_is_open_to_all_and_a_private_one_is_not(client: Client, full: str) -> None:
    for role in ("service_role", "anon"):
        authorization = f"Bearer {mint_key(client.server.secret, role)}"
        public = client.send("GET", f"/object/public/{full}/a/b.txt", authorization=authorization)
        assert public.error == NO_BUCKET
    client.send("PUT", f"/bucket/{full}", {"public": True})
    for path in ("/object/public/", "/object/", "/object/info/public/", "/object/info/"):
        for sent in (None, "Bearer no", "Bearer " + token({"role": "anon"}, client.server.secret)):
            assert client.send("GET", f"{path}{full}/a/b.txt", authorization=sent).status == 200
            assert client.send("GET", f"{path}{full}/no", authorization=sent).error == NO_KEY
    assert client.send("GET", f"/object/authenticated/{full}/a/b.txt", authorization=None).error == NO_HEADER


# Buckets


def test_a_bucket_is_shown_with_its_settings(client: Client, bucket: str) -> None:
    settings = {"public": "true", "file_size_limit": "1.5MB", "allowed_mime_types": ["image/png", "text/*", "*"]}
    create_bucket(client, bucket, id=f"{bucket}-id", unknown=[1], **settings)
    assert client.send("GET", f"/bucket/{bucket}").error == NO_BUCKET
    found = client.send("GET", f"/bucket/{bucket}-id").json
    for name in ("created_at", "updated_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop(name))
    shown = {"id": f"{bucket}-id", "name": bucket, "owner": "", "public": True, "file_size_limit": 1_500_000}
    assert found == {**shown, "allowed_mime_types": ["image/png", "text/*", "*"]}
    entries = [entry for entry in client.send("GET", "/bucket").json if entry["name"] == bucket]
    assert [entry["type"] for entry in entries] == ["STANDARD"]


def test_a_number_for_a_name_is_its_text(client: Client) -> None:
    number = uuid.uuid4().int
    assert client.send("POST", "/bucket", {"name": number}).json == {"name": str(number)}
    assert client.send("GET", f"/bucket/{number}").json["name"] == str(number)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, None), (7, 7), ("7", 7), ("7B", 7), ("2KB", 2000), ("1.5mb", 1_500_000), ("0.02GB", 20_000_000)],
)
def test_a_size_limit_is_bytes_or_a_text_with_a_unit(
    client: Client, bucket: str, limit: str | int | None, expected: int | None
) -> None:
    create_bucket(client, bucket, file_size_limit=limit)
    assert client.send("GET", f"/bucket/{bucket}").json["file_size_limit"] == expected


@pytest.mark.parametrize(
    ("settings", "status", "code"),
    [
        ({"file_size_limit": "many"}, "400", "InvalidRequest"),
        ({"file_size_limit": -1}, "400", "InvalidRequest"),
        ({"file_size_limit": True}, "400", "InvalidRequest"),
        ({"file_size_limit": "51MiB"}, "400", "InvalidRequest"),
        ({"file_size_limit": (50 << 20) + 1}, "413", "EntityTooLarge"),
        ({"file_size_limit": "9GB"}, "413", "EntityTooLarge"),
        ({"file_size_limit": "9" * 6000}, "413", "EntityTooLarge"),
        ({"allowed_mime_types": "image/png"}, "400", "InvalidRequest"),
        ({"allowed_mime_types": ["image"]}, "415", "InvalidMimeType"),
        ({"allowed_mime_types": [1]}, "415", "InvalidMimeType"),
        ({"public": "yes"}, "400", "InvalidRequest"),
        ({"public": []}, "400", "InvalidRequest"),
    ],
)
def test_bad_settings_of_a_bucket_are_refused_and_nothing_changes(
    client: Client, bucket: str, settings: dict[str, Any], status: str, code: str
) -> None:
    answer = client.send("POST", "/bucket", {"name": bucket, **settings})
    assert (answer.error[0], answer.error[1], answer.error[4]) == (400, status, code)
    assert client.send("GET", f"/bucket/{bucket}").error == NO_BUCKET
    create_bucket(client, bucket)
    before = client.send("GET", f"/bucket/{bucket}").json
    for nothing in ({}, {"name": bucket}):
        assert client.send("PUT", f"/bucket/{bucket}", nothing).error[4] == "InvalidRequest"
    answer = client.send("PUT", f"/bucket/{bucket}", settings)
    assert (answer.error[0], answer.error[1], answer.error[4]) == (400, status, code)
    assert client.send("GET", f"/bucket/{bucket}").json == before


@pytest.mark.parametrize(
    "name", ["x" * 101, "", " a", "a ", "a/b", "ä", "a\n", "a%b", 'a"b', "x--table-s3", None, "a#"]
)
def test_bad_bucket_names_are_refused(client: Client, name: str | None) -> None:
    expected = (400, "400", "Invalid Input", "Bucket name invalid", "InvalidBucketName")
    assert client.send("POST", "/bucket", {"name": name}).error == expected


def test_every_legal_character_makes_a_bucket_name(client: Client) -> None:
    name = f"{uuid.uuid4().hex} _!.*'()&$@=;:+,?-"
    create_bucket(client, name)
    assert client.send("GET", f"/bucket/{quote(name, safe='')}").json["id"] == name
    assert client.upload(quote(name, safe=""), "k").json["Key"] == f"{name}/k"
    create_bucket(client, (name + "x" * 100)[:100])


def test_requests_for_a_bucket_that_is_missing_or_taken(client: Client, full: str) -> None:
    taken = (400, "409", "Duplicate", "The resource already exists", "BucketAlreadyExists")
    assert client.send("POST", "/bucket", {"name": full}).error == taken
    assert client.send("POST", "/bucket", {"name": full, "id": f"{full}-2"}).error == taken
    assert client.send("POST", "/bucket", {"name": f"{full}-2", "id": full}).error == taken
    for method, path, body in (
        ("GET", "/bucket/no", None),
        ("PUT", "/bucket/no", {"public": True}),
        ("DELETE", "/bucket/no", {}),
        ("POST", "/bucket/no/empty", {}),
        ("GET", "/object/no/k", None),
        ("GET", "/object/public/no/k", None),
        ("GET", "/object/info/no/k", None),
        ("POST", "/object/no/k", b"x"),
        ("PUT", "/object/no/k", b"x"),
        ("POST", "/object/upload/sign/no/k", None),
    ):
        assert client.send(method, path, body).error == NO_BUCKET, (method, path)
    assert client.send("DELETE", "/object/no/k").error == NO_KEY
    assert client.send("DELETE", "/object/no", {"prefixes": ["k"]}).json == []
    assert client.send("POST", "/object/list/no", {"prefix": ""}).json == []
    assert client.send("POST", "/object/list-v2/no", {}).json == {"hasNext": False, "folders": [], "objects": []}


def test_a_bucket_is_deleted_when_it_is_empty(client: Client, full: str) -> None:
    answer = client.send("DELETE", f"/bucket/{full}")
    assert answer.error[:3] + answer.error[4:] == (400, "409", "ResourceNotEmpty", "ResourceNotEmpty")
    queued = {"message": "Empty bucket has been queued. Completion may take up to an hour."}
    assert client.send("POST", f"/bucket/{full}/empty").json == queued
    assert wait_until(lambda: client.keys(full) == [], SECONDS)
    assert client.send("DELETE", f"/bucket/{full}", {}).json == {"message": "Successfully deleted"}
    assert client.send("GET", f"/bucket/{full}").error == NO_BUCKET


def test_buckets_are_listed_by_name_in_pages(client: Client, bucket: str) -> None:
    for name in ("b", "a", "c"):
        create_bucket(client, f"{bucket}-{name}")

    def names(query: str) -> list[str]:
        found = client.send("GET", f"/bucket?search={bucket}&{query}").json
        return [entry["name"][-1] for entry in found]

    assert names("") == ["a", "b", "c"]
    assert names("limit=2") == ["a", "b"]
    assert names("limit=2&offset=2") == ["c"]
    assert names("sortColumn=name&sortOrder=desc") == ["c", "b", "a"]
    assert names("sortColumn=id&sortOrder=desc") == ["c", "b", "a"]
    assert sorted(names("sortColumn=created_at")) == ["a", "b", "c"]
    assert names("sortColumn=") == ["a", "b", "c"]
    assert client.send("GET", "/bucket?limit=0").status == 400
    assert client.send("GET", "/bucket?sortColumn=owner").status == 400


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


# Reading


def test_a_download_has_the_headers_of_the_api(client: Client, full: str) -> None:
    expected = {
        "ETag": '"781e5e245d69b566979b86e28d23f2c7"',
        "Content-Type": "text/plain",
        "Content-Length": "10",
        "Cache-Control": "no-cache",
        "Accept-Ranges": "bytes",
        "X-Robots-Tag": "none",
        "Content-Encoding": None,
        "Content-Disposition": None,
    }
    for path in (
        f"/object/{full}/a/b.txt",
        f"/object/authenticated/{full}/a/b.txt",
        f"/storage/v1/object/{full}/a/b.txt",
    ):
        for method, body in (("GET", b"0123456789"), ("HEAD", b"")):
            answer = client.send(method, path, headers={"Accept-Encoding": "gzip"})
            assert (answer.status, answer.body) == (200, body)
            assert {name: answer.headers[name] for name in expected} == expected
            modified = parsedate_to_datetime(answer.headers["Last-Modified"])
            assert abs(time.time() - modified.timestamp()) < 60


@pytest.mark.parametrize("path", ["object/{}/no", "object/no/no", "object/authenticated/{}/no", "object/public/{}/no"])
def test_head_of_what_is_missing_is_a_400_without_a_body(client: Client, full: str, path: str) -> None:
    answer = client.send("HEAD", f"/{path.format(full)}")
    assert (answer.status, answer.body) == (400, b"")


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-0", 0, 0), ("2-5", 2, 5), ("7-", 7, 9), ("-3", 7, 9), ("-30", 0, 9), ("3-99", 3, 9), ("0-", 0, 9)],
)
def test_a_range_is_a_part(client: Client, full: str, asked: str, first: int, last: int) -> None:
    answer = client.send("GET", f"/object/{full}/a/b.txt", headers={"Range": f"bytes={asked}"})
    assert (answer.status, answer.body) == (206, b"0123456789"[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/10"
    assert answer.headers["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize(
    "asked",
    ["bytes=10-", "bytes=5-2", "bytes=-", "bytes=-0", "bytes=0-1,3-4", "bytes=a-b", "x", f"bytes={'9' * 5000}-"],
)
def test_a_range_that_is_none_is_416(client: Client, full: str, asked: str) -> None:
    answer = client.send("GET", f"/object/{full}/a/b.txt", headers={"Range": asked})
    assert answer.error == BAD_RANGE
    assert answer.headers["ETag"] is None


def test_an_empty_object_has_no_ranges(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    client.upload(bucket, "k", b"")
    assert client.send("GET", f"/object/{bucket}/k", headers={"Range": "bytes=0-"}).error == BAD_RANGE


def test_what_the_client_has_is_not_sent_again(client: Client, full: str) -> None:
    path = f"/object/{full}/a/b.txt"
    known = client.send("HEAD", path).headers
    tag, modified = known["ETag"], parsedate_to_datetime(known["Last-Modified"])
    earlier = format_datetime(modified.replace(year=modified.year - 1), usegmt=True)
    for headers, status in (
        ({"If-None-Match": tag}, 304),
        ({"If-None-Match": f'"other", W/{tag}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": '"other"', "If-Modified-Since": known["Last-Modified"]}, 200),
        ({"If-Modified-Since": known["Last-Modified"]}, 304),
        ({"If-Modified-Since": earlier}, 200),
        ({"If-Modified-Since": "soon"}, 200),
        ({"If-Modified-Since": "Mon, 01 Jan 99999 00:00:00 GMT"}, 200),
    ):
        for method in ("GET", "HEAD"):
            answer = client.send(method, path, headers=headers)
            assert answer.status == status, headers
            assert answer.body == (b"0123456789" if (method, status) == ("GET", 200) else b"")
            assert answer.headers["ETag"] == tag


@pytest.mark.parametrize(
    ("query", "disposition"),
    [
        ("download", "attachment"),
        ("download=", "attachment"),
        ("download=a%20b%22%0d%0a%C3%A9.png", "attachment; filename*=UTF-8''a%20b%22"),
        ("other=1", None),
    ],
)
def test_a_download_can_have_a_name(client: Client, full: str, query: str, disposition: str | None) -> None:
    found = client.send("GET", f"/object/{full}/a/b.txt?{query}").headers["Content-Disposition"]
    assert found == disposition if disposition is None else found.startswith(disposition)


@pytest.mark.parametrize(
    ("stored_type", "served"),
    [("text/html", "text/plain"), ("TEXT/HTML; charset=utf-8", "text/plain; charset=utf-8"), ("text/css", "text/css")],
)
def test_html_is_served_as_text(client: Client, bucket: str, stored_type: str, served: str) -> None:
    create_bucket(client, bucket)
    client.upload(bucket, "k", b"<script>", content_type=stored_type)
    assert client.send("GET", f"/object/{bucket}/k").headers["Content-Type"] == served
    assert client.info(bucket, "k")["content_type"] == stored_type


def file_of(client: Client, bucket: str, key: str) -> Path:
    version = str(client.info(bucket, key)["version"])
    return client.server.root / "objects" / version[:2] / version


def test_an_object_whose_file_is_gone_is_an_internal_error_until_it_is_deleted(client: Client, full: str) -> None:
    file_of(client, full, "a/b.txt").unlink()
    path = f"/object/{full}/a/b.txt"
    answer = client.send("GET", path)
    assert answer.error == (500, "500", "Internal", "No such file or directory", "InternalError")
    assert answer.headers["ETag"] is None
    assert client.send("HEAD", path).status == 200
    assert client.info(full, "a/b.txt")["size"] == 10
    assert client.send("DELETE", path).status == 200
    assert client.keys(full) == []


def test_a_file_that_is_too_short_is_not_passed_off_as_whole(client: Client, full: str) -> None:
    os.truncate(file_of(client, full, "a/b.txt"), 4)
    with pytest.raises(http.client.IncompleteRead) as raised:
        client.send("GET", f"/object/{full}/a/b.txt")
    assert raised.value.partial == b"0123"
    client.connection.close()
    assert client.send("GET", "/status").status == 200


# Signed addresses


def test_a_signed_address_opens_one_object_until_it_expires(client: Client, full: str) -> None:
    client.upload(full, "other")
    signed = client.send("POST", f"/object/sign/{full}/a/b.txt", {"expiresIn": 60}).json["signedURL"]
    answer = client.send("GET", signed, authorization=None)
    assert (answer.status, answer.body) == (200, b"0123456789")
    assert client.send("HEAD", signed, authorization=None).status == 200
    assert client.send("GET", signed.replace("a/b.txt", "other"), authorization=None).error[4] == "InvalidSignature"
    assert client.send("GET", f"{signed}x", authorization=None).error[4] == "InvalidJWT"
    assert client.send("GET", signed.partition("?")[0], authorization=None).status == 400
    expired = token({"url": f"{full}/a/b.txt", "exp": time.time() - 5}, client.server.secret)
    assert client.send("GET", f"/object/sign/{full}/a/b.txt?token={expired}").error[4] == "InvalidJWT"
    service = client.server.key
    assert client.send("GET", f"/object/sign/{full}/a/b.txt?token={service}").error[4] == "InvalidSignature"
    assert client.send("POST", f"/object/sign/{full}/no", {"expiresIn": 60}).error == NO_KEY
    wrong: list[dict[str, Any]] = [{}, {"expiresIn": 0}, {"expiresIn": "x"}, {"expiresIn": None}]
    for body in wrong:
        assert client.send("POST", f"/object/sign/{full}/a/b.txt", body).error[4] == "InvalidRequest"


def test_addresses_are_signed_in_bulk(client: Client, full: str) -> None:
    body = {"expiresIn": 60, "paths": ["a/b.txt", "no", "\ud800"]}
    good, *bad = client.send("POST", f"/object/sign/{full}", body).json
    assert client.send("GET", good["signedURL"], authorization=None).body == b"0123456789"
    assert [(entry["signedURL"], bool(entry["error"])) for entry in bad] == [(None, True)] * 2
    for wrong in ({"expiresIn": 60}, {"expiresIn": 60, "paths": []}, {"paths": ["a"]}):
        assert client.send("POST", f"/object/sign/{full}", wrong).error[4] == "InvalidRequest"


def test_a_signed_upload_stores_one_key_and_needs_nothing_else(client: Client, full: str) -> None:
    answer = client.send("POST", f"/object/upload/sign/{full}/c%20d").json
    assert answer["url"].endswith(f"?token={answer['token']}")
    stored_answer = client.send("PUT", answer["url"], b"content", {"Content-Type": "image/png"}, authorization=None)
    assert stored_answer.json == {"Key": f"{full}/c d"}
    assert client.info(full, "c d")["content_type"] == "image/png"
    assert client.send("PUT", answer["url"], b"again", authorization=None).error == DUPLICATE
    elsewhere = answer["url"].replace("c%20d", "e")
    assert client.send("PUT", elsewhere, b"x", authorization=None).error[4] == "InvalidSignature"
    assert client.send("PUT", answer["url"].partition("?")[0], b"x").error[4] == "InvalidJWT"
    bad_type = client.send("PUT", answer["url"], b"x", {"Content-Type": "x"}, authorization=None)
    assert bad_type.error[1] == "415"
    assert client.send("POST", f"/object/upload/sign/{full}/a/b.txt").error == DUPLICATE
    assert client.content(full, "c d") == b"content"
    assert incoming(client.server) == []


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


# Lists

NASTY = ["f099.jpg", "f099.jpg-2", "f099.jpg.json", "f099.jpg/in", "f099.jpg ", "f099.jpg!", "F099.jpg", "f099.jpg+"]


@pytest.fixture(scope="module")
def many(storage_server: StorageServer) -> Iterator[tuple[Client, str, list[str]]]:
    """A bucket of more than two pages, with keys that lists are known to lose."""
    client, bucket = Client(storage_server), f"bucket-{uuid.uuid4().hex}"
    keys = [f"p/f{number:03}.jpg{tail}" for number in range(560) for tail in ("", "-2", ".json", "/x")]
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


@pytest.mark.parametrize(("limit", "prefix"), [(1000, ""), (5000, ""), (None, ""), (7, "p/f"), (1, "p/f0"), (1, "q/")])
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


# Requests of the wrong shape


def test_unknown_routes(client: Client) -> None:
    for method, path in (("GET", "/x"), ("POST", "/"), ("PATCH", "/x"), ("GET", "/upload/resumable")):
        answer = client.send(method, path)
        message = f"Route {method}:{path} not found"
        assert (answer.status, answer.json) == (404, {"message": message, "error": "Not Found", "statusCode": 404})
    for method, path in (
        ("GET", "/object"),
        ("PATCH", "/object/b/k"),
        ("DELETE", "/bucket"),
        ("POST", "/bucket/a/b/c"),
    ):
        answer = client.send(method, path)
        assert answer.error == (404, "404", "Not Found", f"Route {method}:{path} not found", "InvalidRequest")


def test_a_browser_may_ask_before_it_sends(client: Client) -> None:
    for path in ("/object/b/k", "/bucket", "/object/list/b"):
        answer = client.send("OPTIONS", path, authorization=None)
        assert (answer.status, answer.body, answer.headers["Access-Control-Allow-Origin"]) == (204, b"", "*")


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'{"name": 1e}'])
def test_what_is_no_json_is_refused(client: Client, body: bytes) -> None:
    answer = client.send("POST", "/bucket", body, {"Content-Type": "application/json"})
    assert (answer.error[0], answer.error[1], answer.error[2], answer.error[4]) == (
        (400, "400", "FastifyError", "InvalidRequest")
    )


@pytest.mark.parametrize("body", [{}, {"id": "x"}])
def test_a_bucket_needs_a_name(client: Client, body: dict[str, Any]) -> None:
    expected = (400, "400", "Error", "body must have required property 'name'", "InvalidRequest")
    assert client.send("POST", "/bucket", body).error == expected


def test_json_beyond_a_mebibyte_is_a_real_413_and_the_connection_goes_on(client: Client, full: str) -> None:
    body = {"prefixes": ["x" * 1000] * 1100}
    answer = client.send("DELETE", f"/object/{full}", body)
    assert (answer.status, answer.error[4]) == (413, "EntityTooLarge")
    before = client.connection.sock
    assert client.keys(full) == ["a/b.txt"]
    assert client.connection.sock is before


@pytest.mark.parametrize("request_line", ["GET /object/b/a b HTTP/1.1", "nonsense", "GET / HTTP/9.9"])
def test_malformed_requests_are_refused_and_the_socket_is_closed(client: Client, request_line: str) -> None:
    assert exchange(client.server, f"{request_line}\r\nHost: x\r\n\r\n".encode()).startswith(b"HTTP/1.1 400 ")


def test_headers_beyond_16_kib_are_not_taken(client: Client, full: str) -> None:
    answer = client.upload(full, "k", x_metadata="x" * (17 << 10))
    message = "Exceeded maximum allowed HTTP header size"
    assert answer.error[1:4] == (431, "Request Header Fields Too Large", message)
    assert answer.status == 431
    assert client.upload(full, "l", x_metadata="x" * (15 << 10)).status == 200
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        client.upload(full, "m", x_metadata="x" * (600 << 10))
    client.connection.close()
    assert client.keys(full) == ["a/b.txt", "l"]


def test_a_query_that_cannot_be_decoded_is_refused(client: Client, full: str) -> None:
    for path in (f"/object/upload/sign/{full}/k?token=%ff", f"/object/{full}/k?download=%ff"):
        before = client.connection.sock
        answer = client.send("PUT" if "sign" in path else "GET", path, b"x" * LARGE if "sign" in path else None)
        assert answer.status == 400
        assert client.send("GET", "/status").status == 200
        assert client.connection.sock is before


# Connections


def test_a_connection_serves_many_requests_and_pipelined_ones(client: Client, full: str) -> None:
    client.send("GET", "/status")
    before = client.connection.sock
    for _ in range(50):
        assert client.send("GET", f"/object/{full}/a/b.txt").status == 200
    assert client.connection.sock is before
    one = f"GET /object/{full}/a/b.txt HTTP/1.1\r\nHost: x\r\nAuthorization: {client.server.key}\r\n"
    received = exchange(client.server, f"{one}\r\n{one}\r\n{one}Connection: close\r\n\r\n".encode())
    assert received.count(b"0123456789") == 3


@pytest.mark.parametrize("kind", ["duplicate", "declared size", "chunked size", "form size", "mime", "key", "anon"])
def test_an_early_error_keeps_the_connection(client: Client, bucket: str, kind: str) -> None:
    create_bucket(
        client, bucket, file_size_limit=LARGE - 1 if "size" in kind else None, allowed_mime_types=["image/png"]
    )
    png = {"Content-Type": "image/png"}
    client.send("POST", f"/object/{bucket}/taken", b"x", png)
    before = client.connection.sock
    key = {"duplicate": "taken", "key": "~"}.get(kind, "k")
    raw, form_headers = form(file(b"x" * LARGE)) if kind == "form size" else (b"x" * LARGE, png)
    headers = {"Content-Type": "text/plain"} if kind == "mime" else form_headers
    body = iter([raw[: LARGE // 2], raw[LARGE // 2 :]]) if kind == "chunked size" else raw
    authorization = f"Bearer {mint_key(client.server.secret, 'anon')}" if kind == "anon" else ""
    answer = client.send("POST", f"/object/{bucket}/{key}", body, headers, authorization=authorization)
    expected = {"duplicate": "409", "mime": "415", "key": "400", "anon": "403"}.get(kind, "413")
    assert (answer.status, answer.error[1]) == (400, expected)
    assert incoming(client.server) == []
    assert client.keys(bucket) == ["taken"]
    assert client.connection.sock is before


# Uploads that do not come to their end


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("framing", ["length", "chunked", "form"])
@pytest.mark.parametrize("key", ["new", "a/b.txt"])
def test_an_upload_that_breaks_off_changes_nothing(client: Client, full: str, how: str, framing: str, key: str) -> None:
    before = client.info(full, "a/b.txt")
    number_of_files = len(stored(client.server))
    body, header = form(file(b"x" * 5000))
    headers, begin = {
        "length": ("Content-Length: 9000", b"x" * 5000),
        "chunked": ("Transfer-Encoding: chunked", b"fff\r\n" + b"x" * 0xFFF + b"\r\nff\r\nx"),
        "form": (f"Content-Type: {header['Content-Type']}\r\nContent-Length: {len(body)}", body[:-4]),
    }[framing]
    with start_upload(client.server, f"/object/{full}/{key}", headers, begin, "PUT") as connection:
        if how == "half-close":
            connection.shutdown(socket.SHUT_WR)
            assert b"HTTP/1.1 200" not in connection.recv(1 << 16)
        elif how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert wait_until(lambda: incoming(client.server) == [], SECONDS)
    assert client.keys(full) == ["a/b.txt"]
    assert client.info(full, "a/b.txt") == before
    assert client.content(full, "a/b.txt") == b"0123456789"
    assert len(stored(client.server)) == number_of_files


def test_a_broken_chunk_is_refused_and_stores_nothing(client: Client, full: str) -> None:
    head = f"PUT /object/{full}/k HTTP/1.1\r\nHost: x\r\nAuthorization: {client.server.key}\r\n"
    received = exchange(client.server, f"{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n".encode())
    assert received.startswith(b"HTTP/1.1 400 ")
    assert client.keys(full) == ["a/b.txt"]
    assert incoming(client.server) == []


def test_a_bucket_that_goes_during_an_upload_takes_nothing(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    before = len(stored(client.server))
    with start_upload(client.server, f"/object/{bucket}/k", "Content-Length: 2", b"x") as connection:
        assert client.send("DELETE", f"/bucket/{bucket}").status == 200
        connection.sendall(b"y")
        assert b'"code": "NoSuchBucket"' in connection.recv(1 << 16)
    assert (incoming(client.server), len(stored(client.server))) == ([], before)


def test_an_object_is_invisible_until_it_is_whole(client: Client, full: str) -> None:
    with start_upload(client.server, f"/object/{full}/k", "Content-Length: 2", b"x") as connection:
        assert client.keys(full) == ["a/b.txt"]
        connection.sendall(b"y")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert client.content(full, "k") == b"xy"


def test_a_download_that_breaks_off_leaves_the_server_well(own_server: StorageServer, tmp_path: Path) -> None:
    client = Client(own_server)
    with closing(client.connection):
        create_bucket(client, "b")
        client.upload("b", "k", b"x" * (20 << 20))
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", client.address.port or 0), SECONDS) as connection:
                head = f"GET /object/b/k HTTP/1.1\r\nHost: x\r\nAuthorization: {own_server.key}\r\n\r\n"
                connection.sendall(head.encode())
                assert connection.recv(100)
        with start_upload(own_server, "/object/b/broken", "Content-Length: 9", b"x"):
            pass
        assert wait_until(lambda: incoming(own_server) == [], SECONDS)
        assert client.content("b", "k") == b"x" * (20 << 20)
    assert (tmp_path / "log").read_text(encoding="utf-8") == ""


# Many at once


def sealed(size: int) -> bytes:
    """Return content that tells whether it is whole: its digest is its begin."""
    content = os.urandom(size)
    return hashlib.sha256(content).digest() + content


def is_whole(content: bytes) -> bool:
    return hashlib.sha256(content[32:]).digest() == content[:32]


def test_readers_never_see_a_mix_of_versions(storage_server: StorageServer, client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    keys = ["k0", "k1", "k2"]
    for key in keys:
        client.upload(bucket, key, sealed(1000))
    writing = threading.Event()
    writing.set()

    def write(number: int) -> int:
        own = Client(storage_server)
        with closing(own.connection):
            for turn in range(25):
                key, content = keys[(number + turn) % 3], sealed(100_000 + 1000 * number + turn)
                method = "PUT" if turn % 2 else "POST"
                answer = own.send(method, f"/object/{bucket}/{key}", content, {"x-upsert": "true"})
                assert answer.json["Key"] == f"{bucket}/{key}"
        return 25

    def read(number: int) -> int:
        own, count = Client(storage_server), 0
        with closing(own.connection):
            while writing.is_set() or count < 5:
                answer = own.send("GET", f"/object/{bucket}/{keys[(number + count) % 3]}")
                assert answer.status == 200
                assert is_whole(answer.body)
                assert answer.headers["ETag"] == f'"{hashlib.md5(answer.body).hexdigest()}"'
                count += 1
        return count

    with ThreadPoolExecutor(16) as pool:
        readers = [pool.submit(read, number) for number in range(8)]
        try:
            written = [future.result() for future in [pool.submit(write, number) for number in range(8)]]
        finally:
            writing.clear()
        assert sum(written) == 200
        assert all(future.result() >= 5 for future in readers)
    assert client.keys(bucket) == keys
    assert all(is_whole(client.content(bucket, key)) for key in keys)
    assert incoming(storage_server) == []


def test_creating_one_key_at_once_leaves_one_whole_object(
    storage_server: StorageServer, client: Client, bucket: str
) -> None:
    create_bucket(client, bucket)

    def create(number: int) -> bool:
        own = Client(storage_server)
        with closing(own.connection):
            answer = own.upload(bucket, "k", sealed(50_000 + number))
        assert answer.status == 200 or answer.error == DUPLICATE
        return answer.status == 200

    files = len(stored(storage_server))
    with ThreadPoolExecutor(8) as pool:
        assert any(pool.map(create, range(24)))
    assert is_whole(client.content(bucket, "k"))
    assert len(stored(storage_server)) == files + 1


# The process


def peak_memory(server: StorageServer) -> int:
    """Return the most memory that the server ever had, in bytes."""
    pid = json.loads((server.root / "server.json").read_text(encoding="utf-8"))["pid"]
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_large_objects_do_not_pass_through_memory(own_server: StorageServer) -> None:
    client = Client(own_server)
    content = os.urandom(1 << 20) * 40
    with closing(client.connection):
        create_bucket(client, "b")
        assert client.upload("b", "raw", content).status == 200
        assert client.send("POST", "/object/b/form", *form(file(content))).status == 200
        assert client.send("POST", "/object/b/chunked", iter([content])).status == 200
        for key in ("raw", "form", "chunked"):
            assert client.content("b", key) == content
        with socket.create_connection(("127.0.0.1", client.address.port or 0), SECONDS) as slow:
            slow.sendall(f"GET /object/b/raw HTTP/1.1\r\nHost: x\r\nAuthorization: {own_server.key}\r\n\r\n".encode())
            assert slow.recv(100)
            assert client.send("GET", "/status").status == 200
    assert peak_memory(own_server) < 120 << 20


def server_command(folder: Path, *more: str) -> list[str]:
    files = ["--root", str(folder / "root"), "--secret-file", str(folder / "secret")]
    return [sys.executable, "-m", "embedded_supabase.storage", *files, *more]


def test_a_second_server_on_the_same_folder_refuses(own_server: StorageServer, tmp_path: Path) -> None:
    before = (own_server.root / "server.json").read_bytes()
    second = subprocess.run(
        server_command(tmp_path),
        env=subprocess_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert second.returncode == 1
    assert second.stderr == f"error: another server works on {own_server.root}\n"
    assert (own_server.root / "server.json").read_bytes() == before
    client = Client(own_server)
    with closing(client.connection):
        assert client.send("GET", "/bucket").json == []


def test_a_port_that_is_taken_is_an_error(own_server: StorageServer, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret").write_text("another secret, also at least 32 bytes long", encoding="ascii")
    second = subprocess.run(
        server_command(other, "--port", str(urlsplit(own_server.url).port)),
        env=subprocess_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert (second.returncode, second.stdout) == (1, "")
    assert re.fullmatch(r"error: .*[Aa]ddress already in use.*\n", second.stderr)
    assert not (other / "root" / "server.json").exists()


def test_the_server_listens_on_loopback_only(storage_server: StorageServer) -> None:
    port = urlsplit(storage_server.url).port or 0
    for family, address in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            assert probe.connect_ex((address, port)) != 0
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_even_during_an_upload(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "secret").write_text("a secret, at least 32 bytes long ....\n", encoding="ascii")
    process = subprocess.Popen(
        server_command(tmp_path), env=subprocess_environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        record = tmp_path / "root" / "server.json"
        assert wait_until(record.exists, SECONDS)
        found = json.loads(record.read_text(encoding="ascii"))
        assert found["pid"] == process.pid
        secret = "a secret, at least 32 bytes long ...."
        server = StorageServer(f"http://127.0.0.1:{found['port']}", secret, mint_key(secret), tmp_path / "root")
        client = Client(server)
        with closing(client.connection):
            create_bucket(client, "b")
            client.upload("b", "k", b"x" * (20 << 20))
            with (
                start_upload(server, "/object/b/new", "Content-Length: 9", b"x"),
                socket.create_connection(("127.0.0.1", found["port"]), SECONDS) as slow,
            ):
                slow.sendall(f"GET /object/b/k HTTP/1.1\r\nHost: x\r\nAuthorization: {server.key}\r\n\r\n".encode())
                assert slow.recv(100)
                process.send_signal(number)
                assert process.wait(SECONDS) == 0
        assert not record.exists()
        assert incoming(server) == []
        assert len(stored(server)) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        end(process)


def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_nothing_half(tmp_path: Path) -> None:
    acknowledged: dict[str, bytes] = {}
    sent: dict[str, set[bytes]] = {}
    lock = threading.Lock()

    def upload(server: StorageServer, number: int) -> None:
        client = Client(server)
        with closing(client.connection), suppress(OSError, http.client.HTTPException):
            for turn in range(100_000):
                # Every third upload overwrites the thread's own first key.
                key, content = f"{number}/{turn if turn % 3 else 0}", sealed(30_000 + turn)
                with lock:
                    sent.setdefault(key, set()).add(content)
                answer = client.send("PUT", f"/object/b/{key}", content)
                assert answer.status == 200
                with lock:
                    acknowledged[key] = content
                    sent[key] = {content}

    with running_storage(tmp_path) as server:
        client = Client(server)
        with closing(client.connection):
            create_bucket(client, "b")
        pid = json.loads((server.root / "server.json").read_text(encoding="utf-8"))["pid"]
        with (
            start_upload(server, "/object/b/half", "Content-Length: 100000", b"x" * 5000),
            ThreadPoolExecutor(4) as pool,
        ):
            futures = [pool.submit(upload, server, number) for number in range(4)]
            try:
                assert wait_until(lambda: len(acknowledged) >= 100, SECONDS)
            finally:
                os.kill(pid, signal.SIGKILL)
            for future in futures:
                future.result()
        assert incoming(server) != []
    with running_storage(tmp_path) as server:
        client = Client(server)
        with closing(client.connection):
            keys = client.keys("b")
            assert set(acknowledged) <= set(keys) <= set(sent)
            for key in keys:
                content = client.content("b", key)
                assert content in sent[key] | {acknowledged.get(key, b"")}
                assert client.info("b", key)["etag"] == f'"{hashlib.md5(content).hexdigest()}"'
            assert incoming(server) == []
            assert len(stored(server)) == len(keys)
            assert client.upload("b", "after").status == 200


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
def test_a_full_disk_is_an_internal_error_and_passes(own_server: StorageServer) -> None:
    pid = json.loads((own_server.root / "server.json").read_text(encoding="utf-8"))["pid"]
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)

    def limit_files(size: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))

    client = Client(own_server)
    with closing(client.connection):
        create_bucket(client, "b")
        client.upload("b", "k", b"former")
        client.upload("b", "large", b"x" * 400_000)
        before = client.connection.sock
        limit_files(200_000)
        full_disk = (500, "500", "Internal", "File too large", "InternalError")
        for body in (b"y" * 500_000, iter([b"y" * 500_000])):
            assert client.send("PUT", "/object/b/k", body).error == full_disk
        assert client.send("PUT", "/object/b/k", *form(file(b"y" * 500_000))).error == full_disk
        copy = {"bucketId": "b", "sourceKey": "large", "destinationKey": "copy"}
        assert client.send("POST", "/object/copy", copy).error == full_disk
        limit_files(0)  # now the index cannot grow either
        for answer in (
            client.upload("b", "empty", b""),
            client.send("DELETE", "/object/b", {"prefixes": ["k", "large"]}),
            client.send("DELETE", "/object/b/k"),
            client.send("POST", "/bucket", {"name": "c"}),
            client.send("POST", "/object/move", {"bucketId": "b", "sourceKey": "k", "destinationKey": "m"}),
        ):
            assert (answer.error[0], answer.error[1], answer.error[4]) == (500, "500", "InternalError")
        assert client.keys("b") == ["k", "large"]
        assert client.content("b", "k") == b"former"
        assert client.content("b", "large") == b"x" * 400_000
        assert incoming(own_server) == []
        assert len(stored(own_server)) == 2
        limit_files(unlimited[0])
        assert client.send("PUT", "/object/b/k", b"y" * 500_000).status == 200
        assert client.connection.sock is before
        gone = client.send("DELETE", "/object/b", {"prefixes": ["large"]}).json
        assert [row["name"] for row in gone] == ["large"]
        client.upload("b", "last")
    os.kill(pid, signal.SIGKILL)
    with running_storage(own_server.root.parent) as again:
        client = Client(again)
        with closing(client.connection):
            assert client.keys("b") == ["k", "last"]
            assert client.content("b", "k") == b"y" * 500_000


# Far away, or with its hands full


FOREVER = ("--latency", "1000000")
SLOW_DOWN = (429, "429", "too_many_connections", "Too many connections, try again later", "SlowDown")


@pytest.fixture
def strained(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Return a function that makes a client, with a connection of its own, of a server with these options."""
    with ExitStack() as stack:
        servers: dict[tuple[str, ...], StorageServer] = {}

        def connect(*options: str) -> Client:
            if options not in servers:
                folder = tmp_path / f"strained{len(servers)}"
                url, key, _ = stack.enter_context(running_strained(folder, *options))
                servers[options] = StorageServer(url, "", key, folder / "root")
            client = Client(servers[options])
            stack.enter_context(closing(client.connection))
            return client

        yield connect


def begin_upload(client: Client, key: str) -> None:
    """Send an upload without waiting for its answer."""
    client.connection.request("POST", f"/object/b/{key}", b"content", {"Authorization": f"Bearer {client.server.key}"})


def test_an_upload_is_answered_only_after_the_latency(strained: Callable[..., Client]) -> None:
    client = strained("--latency", "300")
    create_bucket(client, "b")
    for method in ("POST", "PUT"):
        begin = time.monotonic()
        assert client.send(method, f"/object/b/{method}", b"content").status == 200
        assert time.monotonic() - begin >= 0.29  # the server has another clock
    assert client.keys("b") == ["POST", "PUT"]


def test_answers_come_after_the_latency_on_average_however_late_each_is(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal waited
        waited += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    strain = FaultInjector(0.042)

    def answer(body: float, late: float) -> float:
        """Answer an upload whose body took so long; return when."""
        nonlocal waited
        waited = body
        if asyncio.run(strain.hold_back(body)):
            strain.answered(waited + late)
        return waited + late

    assert answer(0.001, 0.002) == pytest.approx(0.044)
    assert [answer(0.001, 0.002) for _ in range(2000)][-1] == pytest.approx(0.042, abs=1e-5)
    assert answer(1.0, 0.002) == 1.002  # of which the server knows nothing
    assert answer(0.001, 0.002) == pytest.approx(0.042, abs=1e-5)
    assert [answer(0.001, 0.060) for _ in range(2000)][-1] == 0.061  # a server that cannot keep up does not wait
    assert [answer(0.001, 0.0) for _ in range(2000)][-1] == pytest.approx(0.042, abs=1e-5)


def test_an_upload_that_is_held_back_is_stored_and_holds_up_nobody(strained: Callable[..., Client]) -> None:
    client, other = strained(*FOREVER), strained(*FOREVER)
    create_bucket(other, "b")
    begin_upload(client, "k")
    assert wait_until(lambda: other.keys("b") == ["k"], SECONDS)
    assert other.content("b", "k") == b"content"
    assert select.select([client.connection.sock], [], [], 0)[0] == []
    client.connection.close()
    assert other.content("b", "k") == b"content"


def test_more_object_requests_than_the_capacity_are_refused_until_one_ends(strained: Callable[..., Client]) -> None:
    options = (*FOREVER, "--capacity", "2")
    busy, client = [strained(*options), strained(*options)], strained(*options)
    create_bucket(client, "b")
    for number, one in enumerate(busy):
        begin_upload(one, f"k{number}")
    assert wait_until(lambda: len(stored(client.server)) == 2, SECONDS)
    assert client.upload("b", "refused", b"x" * LARGE).error == SLOW_DOWN
    sock = client.connection.sock
    assert client.send("POST", "/object/list-v2/b", {}).error == SLOW_DOWN
    assert client.send("DELETE", "/object/b/k0").error == SLOW_DOWN
    assert client.send("GET", "/bucket/b").status == 200
    busy[0].connection.close()
    assert wait_until(lambda: client.send("POST", "/object/list-v2/b", {}).status == 200, SECONDS)
    assert client.connection.sock is sock
    assert client.keys("b") == ["k0", "k1"]
    assert incoming(client.server) == []


def test_an_upload_that_breaks_off_gives_its_place_back(strained: Callable[..., Client]) -> None:
    client = strained("--capacity", "1")
    create_bucket(client, "b")
    broken = start_upload(client.server, "/object/b/k", "Content-Length: 100", b"begin")
    assert client.upload("b", "k").error == SLOW_DOWN
    broken.close()
    assert wait_until(lambda: client.upload("b", "k").status == 200, SECONDS)
    assert client.upload("b", "k2").status == 200

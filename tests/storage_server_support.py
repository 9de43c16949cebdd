"""A client of the embedded Storage server, and the requests and errors that its tests share."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest

from embedded_supabase.files import wait_until
from tests.services import StorageServer, running_storage

SECONDS = 20.0
LARGE = 3 << 20
DUPLICATE = (400, "409", "Duplicate", "The resource already exists", "KeyAlreadyExists")
NO_BUCKET = (400, "404", "Bucket not found", "Bucket not found", "NoSuchBucket")
NO_KEY = (400, "404", "not_found", "Object not found", "NoSuchKey")
NO_WRITER = (400, "403", "Unauthorized", "new row violates row-level security policy", "AccessDenied")
NO_JWS = (400, "403", "Unauthorized", "Invalid Compact JWS", "AccessDenied")


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


def form(*parts: tuple[str, bytes], boundary: str = "limit", end: bool = True) -> tuple[bytes, dict[str, str]]:
    """Return a multipart body and its header; a part is its own headers, and its content."""
    body = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode(), data) for head, data in parts)
    if end:
        body += b"--%s--\r\n" % boundary.encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


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


def sealed(size: int) -> bytes:
    """Return content that tells whether it is whole: its digest is its begin."""
    content = os.urandom(size)
    return hashlib.sha256(content).digest() + content

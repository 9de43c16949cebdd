"""Malformed, interrupted and concurrent requests to the embedded Storage server."""

from __future__ import annotations

import hashlib
import http.client
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from embedded_supabase.files import wait_until
from embedded_supabase.storage.auth import mint_key
from tests import storage_server_support
from tests.services import StorageServer
from tests.storage_server_support import (
    DUPLICATE,
    LARGE,
    SECONDS,
    Client,
    create_bucket,
    exchange,
    file,
    form,
    incoming,
    sealed,
    start_upload,
    stored,
)

client = storage_server_support.client
full = storage_server_support.full
own_server = storage_server_support.own_server


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

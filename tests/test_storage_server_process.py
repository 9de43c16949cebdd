"""The embedded Storage server's process: memory, signals, kill -9, a full disk."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from embedded_supabase.files import wait_until
from embedded_supabase.storage.auth import mint_key
from tests import storage_server_support
from tests.services import StorageServer, end, running_storage, subprocess_environment
from tests.storage_server_support import (
    SECONDS,
    Client,
    create_bucket,
    file,
    form,
    incoming,
    sealed,
    start_upload,
    stored,
)

client = storage_server_support.client
own_server = storage_server_support.own_server


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
    assert second.stderr == f"error: another server uses {own_server.root}\n"
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

    with running_storage(tmp_path, durable=True) as server:
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
    with running_storage(tmp_path, durable=True) as server:
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

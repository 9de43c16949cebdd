"""transport.py: what goes over a connection, what does not, and the ways there: TLS and proxies."""

from __future__ import annotations

import base64
import select
import socket
import ssl
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
import urllib3
from urllib3.connection import HTTPConnection

from embedded_supabase.ports import free_port
from pipeline.errors import PipelineError, StorageError, StorageUnavailable
from pipeline.storage.transport import Transport
from tests.scripted import KEY, SECONDS, Answer, ScriptedServer, leave_surroundings, settings_for

if TYPE_CHECKING:
    from typing_extensions import Self

#: More than one piece, and no whole number of them.
LARGE = bytes(range(256)) * 10_000 + b"end"


class Tunnels:
    """A proxy that opens tunnels (RFC 9110, 9.3.6) to where it is told to, whatever name is asked for."""

    def __init__(self, target: int, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self.heads: list[bytes] = []
        self._target, self._answer = target, answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve)]

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                thread = threading.Thread(target=self._carry, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as origin, suppress(ConnectionError):
            self._open(client)
            while True:
                for side in select.select([client, origin], [], [], SECONDS)[0]:
                    if not (data := side.recv(1 << 16)):
                        return
                    (origin if side is client else client).sendall(data)

    def _open(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        self.heads.append(head)
        client.sendall(self._answer)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(SECONDS)


class Socks(Tunnels):
    """The same by SOCKS 5 (RFC 1928), with the name of a host."""

    def _open(self, client: socket.socket) -> None:
        methods = client.recv(2)[1]
        client.recv(methods, socket.MSG_WAITALL)
        client.sendall(b"\x05\x00")  # no authentication
        length = client.recv(5, socket.MSG_WAITALL)[4]
        self.heads.append(client.recv(length + 2, socket.MSG_WAITALL)[:-2])
        client.sendall(b"\x05\x00\x00\x01" + bytes(6))


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_surroundings(monkeypatch)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the authority, and nobody else."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))


def context_of(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
def plain() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def secure(authority: trustme.CA) -> Iterator[ScriptedServer]:
    """A server whose certificate is for 127.0.0.1."""
    with ScriptedServer(context_of(authority, "127.0.0.1")) as server:
        yield server


@pytest.fixture
def elsewhere(authority: trustme.CA) -> Iterator[ScriptedServer]:
    """A server whose certificate is for another host, which only a proxy finds."""
    with ScriptedServer(context_of(authority, "abc.supabase.invalid")) as server:
        yield server


def port_of(server: ScriptedServer) -> int:
    return int(server.url.rpartition(":")[2])


def ask(transport: Transport, body: bytes | None = None) -> tuple[int, bytes]:
    with transport.request("POST", "/object/b/k", body, {"Content-Type": "image/jpeg"}) as answer:
        return answer.status, answer.data


def failure(url: str) -> PipelineError:
    with closing(Transport(settings_for(url), 4)) as transport, pytest.raises(PipelineError) as caught:
        ask(transport)
    assert KEY not in caught.value.message
    return caught.value


# Requests and answers


@pytest.mark.parametrize("size", [0, 1, 1 << 20, len(LARGE)])
def test_a_body_of_any_size_arrives_as_it_is(plain: ScriptedServer, size: int) -> None:
    plain.will(Answer(body=1))
    with closing(Transport(settings_for(plain.url), 4)) as transport:
        assert ask(transport, LARGE[:size]) == (200, b"1")
    (request,) = plain.requests
    assert request.body == LARGE[:size]
    assert request.path == "/storage/v1/object/b/k"
    assert request.headers == {
        "host": plain.url.removeprefix("http://"),
        "accept-encoding": "identity",
        "user-agent": "pipeline",
        "apikey": KEY,
        "authorization": f"Bearer {KEY}",
        "content-type": "image/jpeg",
        "content-length": str(size),
    }


def test_an_answer_that_nobody_read_is_not_taken_for_the_next(plain: ScriptedServer) -> None:
    plain.will(Answer(body="first"), Answer(body="second"))
    with closing(Transport(settings_for(plain.url), 4)) as transport:
        with transport.request("GET", "/one"):
            pass
        assert ask(transport) == (200, b'"second"')
    assert len({request.port for request in plain.requests}) == 2


def test_whoever_breaks_off_in_an_answer_begins_the_next_on_another_connection(plain: ScriptedServer) -> None:
    plain.will(Answer(body="first"), Answer(body="second"))
    with closing(Transport(settings_for(plain.url), 4)) as transport:
        with pytest.raises(KeyboardInterrupt), transport.request("GET", "/one"):
            raise KeyboardInterrupt
        assert ask(transport) == (200, b'"second"')


@pytest.mark.parametrize("streams", [False, True])
def test_half_an_answer_is_none(plain: ScriptedServer, streams: bool) -> None:
    plain.will(Answer(body="all of it", cut=3))
    with (
        closing(Transport(settings_for(plain.url), 4)) as transport,
        pytest.raises(StorageUnavailable, match="IncompleteRead"),
        transport.request("GET", "/one") as answer,
    ):
        assert list(answer.stream(4)) if streams else answer.data


def test_a_response_with_two_lengths_is_not_read(plain: ScriptedServer) -> None:
    plain.will(Answer(body=1, headers={"Content-Length": "2"}))  # beside the server's own
    found = failure(plain.url)
    assert isinstance(found, StorageUnavailable)
    assert "InvalidHeader" in found.message


def test_a_wire_that_was_closed_opens_another_connection_and_closes_that_as_well(plain: ScriptedServer) -> None:
    plain.will(Answer(body=1))
    transport = Transport(settings_for(plain.url), 4)
    for _ in range(2):
        assert ask(transport) == (200, b"1")
        transport.close()
    assert len({request.port for request in plain.requests}) == 2


@pytest.mark.parametrize("stalls", [False, True])
def test_a_body_has_its_time_limit_for_each_block(stalls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.transport.CONNECT_TIMEOUT", 0.5)
    over = threading.Event()

    def receive() -> None:
        client, _ = listening.accept()
        with client:
            left = 1 << 24
            while left > 0:
                over.wait(SECONDS if stalls else 0.06)  # a second for the whole body
                if over.is_set():
                    return
                left -= len(client.recv(1 << 20, socket.MSG_WAITALL))
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
            client.recv(1 << 20)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=receive)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with closing(Transport(settings_for(url), 1)) as transport:
            if stalls:
                with pytest.raises(StorageUnavailable, match="TimeoutError"):
                    ask(transport, bytes(1 << 24))
            else:
                assert ask(transport, bytes(1 << 24)) == (200, b"1")
        over.set()
        thread.join(SECONDS)


# Ways


@pytest.mark.usefixtures("trusted")
def test_tls_carries_what_is_large_over_one_connection(secure: ScriptedServer) -> None:
    secure.will(Answer(body="x" * 100_000))
    with closing(Transport(settings_for(secure.url), 4)) as transport:
        for _ in range(3):
            assert ask(transport, LARGE) == (200, b'"' + b"x" * 100_000 + b'"')
    assert all(request.body == LARGE for request in secure.requests)
    assert len({request.port for request in secure.requests}) == 1


def check_refused(server: ScriptedServer) -> None:
    server.will(Answer())
    found = failure(server.url)
    assert isinstance(found, StorageError)
    assert "certificate" in found.message
    assert server.requests == []


def test_a_certificate_of_an_authority_that_nobody_knows_is_refused(secure: ScriptedServer) -> None:
    check_refused(secure)


@pytest.mark.usefixtures("trusted")
def test_a_certificate_of_another_host_is_refused(elsewhere: ScriptedServer) -> None:
    check_refused(elsewhere)


@pytest.mark.parametrize("content", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAA\n"])
def test_a_file_of_certificates_without_any_is_named_in_the_hint(
    secure: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad.pem").write_bytes(content)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "bad.pem"))
    found = failure(secure.url)
    assert isinstance(found, StorageError)
    assert "REQUESTS_CA_BUNDLE" in found.hint


@pytest.mark.usefixtures("trusted")
def test_a_server_of_other_tls_versions_is_not_said_to_have_a_wrong_certificate(authority: trustme.CA) -> None:
    context = context_of(authority, "127.0.0.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.minimum_version = ssl.TLSVersion.TLSv1
    with ScriptedServer(context) as server:
        found = failure(server.url)
    assert isinstance(found, StorageError)
    assert "certificate" not in found.message
    assert "TLS 1.2" in found.hint


#: Records of TLS: data that is not encrypted with the key, and an alert in plain text.
FORGED = bytes((23, 3, 3, 0, 64)) + bytes(64)
ALERT = bytes((21, 3, 3, 0, 2, 2, 20))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx"], ids=["nothing", "status", "head"]
)
@pytest.mark.parametrize(
    "then",
    [FORGED, ALERT, b"HTTP/1.1 502 Bad Gateway\r\n\r\n", bytes(100), b""],
    ids=["forged record", "alert", "HTTP", "zeros", "end"],
)
def test_tls_that_breaks_within_a_response_is_an_interrupted_connection(
    authority: trustme.CA, said: bytes, then: bytes
) -> None:
    def respond() -> None:
        connection, _ = listening.accept()
        with context_of(authority, "127.0.0.1").wrap_socket(connection, server_side=True) as tls:
            tls.recv(1 << 16)
            tls.sendall(said)
            with socket.socket(fileno=tls.detach()) as plain:
                plain.sendall(then)
                plain.shutdown(socket.SHUT_WR)
                with suppress(ConnectionError):
                    while plain.recv(1 << 16):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=respond)
        thread.start()
        found = failure(f"https://127.0.0.1:{listening.getsockname()[1]}")
        thread.join(SECONDS)
    assert isinstance(found, StorageUnavailable)


@pytest.mark.usefixtures("trusted")
def test_a_proxy_is_asked_for_a_tunnel_and_sees_neither_key_nor_path(
    elsewhere: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.will(Answer(body=1, headers={"Connection": "close"}), Answer(body=2))
    with Tunnels(port_of(elsewhere)) as tunnels:
        monkeypatch.setenv("https_proxy", f"http://user:pa55word@127.0.0.1:{tunnels.port}")
        with closing(Transport(settings_for("https://abc.supabase.invalid"), 4)) as transport:
            assert [ask(transport, b"x") for _ in range(3)] == [(200, b"1"), (200, b"2"), (200, b"2")]
    login = base64.b64encode(b"user:pa55word")
    assert len(tunnels.heads) == 2, "again after the server closed the first connection"
    for head in tunnels.heads:
        assert head.startswith(b"CONNECT abc.supabase.invalid:443 HTTP/1.")
        assert b"Basic " + login in head
        assert KEY.encode() not in head
    for request in elsewhere.requests:
        assert request.path == "/storage/v1/object/b/k"
        assert request.headers["host"] == "abc.supabase.invalid"
        assert "proxy-authorization" not in request.headers


def test_a_proxy_that_opens_no_tunnel_is_a_bad_moment(
    elsewhere: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tunnels(port_of(elsewhere), b"HTTP/1.1 503 Service Unavailable\r\n\r\n") as tunnels:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{tunnels.port}")
        assert isinstance(failure("https://abc.supabase.invalid"), StorageUnavailable)


@pytest.mark.parametrize("environment", ["embedded", "local"])
def test_a_proxy_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch, environment: str) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:pa55word@127.0.0.1:{free_port()}")
    settings = settings_for("http://127.0.0.1:9", environment)
    with closing(Transport(settings, 1)) as transport, pytest.raises(StorageUnavailable) as caught:
        ask(transport)
    message, hint = caught.value.message, caught.value.hint
    assert message.startswith("Storage at http://127.0.0.1:9/storage/v1, through the proxy 127.0.0.1:")
    assert "cannot be reached (ConnectionRefusedError)" in message
    assert "pa55word" not in message
    assert "HTTP_PROXY" in hint


def test_a_proxy_that_does_not_speak_tls_is_not_said_to_have_storages_certificate(
    plain: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.will(Answer())
    monkeypatch.setenv("https_proxy", plain.url.replace("http://", "https://"))
    found = failure("https://abc.supabase.invalid")
    assert isinstance(found, StorageUnavailable)
    assert "certificate" not in found.message


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_socks_proxy_is_used(
    scheme: str, plain: ScriptedServer, elsewhere: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socks")
    server = plain if scheme == "http" else elsewhere
    server.will(Answer(body=1))
    with Socks(port_of(server)) as proxy:
        monkeypatch.setenv("all_proxy", f"socks5h://127.0.0.1:{proxy.port}")
        with closing(Transport(settings_for(f"{scheme}://abc.supabase.invalid"), 4)) as transport:
            assert ask(transport, LARGE) == (200, b"1")
    assert proxy.heads == [b"abc.supabase.invalid"]
    assert server.requests[0].body == LARGE


def test_connections_are_still_those_of_their_pool(plain: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = []

    class Own(HTTPConnection):
        def connect(self) -> None:
            connected.append(self.port)
            super().connect()

    monkeypatch.setattr(urllib3.HTTPConnectionPool, "ConnectionCls", Own)
    plain.will(Answer(body=1))
    with closing(Transport(settings_for(plain.url), 4)) as transport:
        assert ask(transport) == (200, b"1")
    assert connected == [port_of(plain)]


@pytest.mark.parametrize(
    "proxy",
    [
        "http://loader:s3cr/etpw@127.0.0.1:3128",
        "http://loader:s3 cretpw@127.0.0.1:99999",
        "http://loader:s3cretpw@[::1",
        "socks6://loader:s3cretpw@127.0.0.1:1080",
        "ftp://loader:s3cretpw@127.0.0.1:21",
        "http://",
    ],
)
def test_a_proxy_with_a_wrong_address_is_refused_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    found = failure("http://127.0.0.1:9")
    assert isinstance(found, StorageError)
    assert "HTTP_PROXY" in found.hint
    told = found.message + "".join(traceback.format_exception(found))
    assert not [part for part in ("s3cr", "cretpw") if part in told]


def test_a_project_with_a_wrong_host_name_is_named() -> None:
    found = failure(f"http://{'a' * 64}.example")
    assert isinstance(found, StorageError)
    assert "NEXT_PUBLIC_SUPABASE_URL" in found.hint

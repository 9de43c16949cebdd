"""A server of one's own on loopback that answers what it is told to."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import SSLContext
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.config import Settings
from tests.services import StorageServer, local_settings

SECONDS = 20.0
KEY = "sb_secret_0123456789abcdef"
#: What decides which way requests take, and whom they trust.
_SURROUNDINGS = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "netrc", "requests_ca_bundle", "curl_ca_bundle")


@dataclass(frozen=True)
class Request:
    """What a client sent, and from which port, that is, over which connection."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    port: int


@dataclass(frozen=True)
class Answer:
    """What to answer: JSON, or bytes of some other kind; `cut` ends the connection so many bytes too early."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


class Reset(Answer):
    """Break the connection instead of answering."""


class Silence(Answer):
    """Read the request and say nothing until the test is over."""


Reply = Answer | Callable[[Request], Answer]


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128


class ScriptedServer:
    """A server on loopback that gives its answers one after the other, the last one for ever, and notes requests.

    Arguments:
        tls: speak TLS, with this context.
    """

    def __init__(self, tls: SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.over = threading.Event()
        self._replies: deque[Reply] = deque()
        self._lock = threading.Lock()
        self.connections: list[socket.socket] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = SECONDS
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                script.connections.append(self.connection)

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                script._answer(self, Request(self.command, self.path, headers, body, self.client_address[1]))

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def will(self, *replies: Reply) -> None:
        """Set what is answered from now on, and forget the requests so far."""
        self._replies = deque(replies)
        self.requests.clear()

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            reply = self._replies.popleft() if len(self._replies) > 1 else self._replies[0]
        answer = reply if isinstance(reply, Answer) else reply(request)
        if isinstance(answer, Silence):
            self.over.wait(SECONDS)
        if isinstance(answer, (Reset, Silence)):
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            return
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        handler.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) - answer.cut])
        handler.wfile.flush()
        handler.close_connection = handler.close_connection or answer.cut > 0 or "Connection" in answer.headers

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join(SECONDS)


def stored(request: Request) -> Answer:
    """Answer an upload as Storage does."""
    return Answer(body={"Key": unquote(request.path.removeprefix("/storage/v1/object/")), "Id": "x"})


def settings_for(url: str, environment: str = "local", **tuning: Any) -> Settings:
    """Return the settings of a server without a database, for a bucket named photos."""
    settings = local_settings("postgresql://nowhere/none", StorageServer(url, "", KEY, Path()), "photos", Path())
    return replace(settings, environment=environment, tuning=replace(settings.tuning, **tuning))


def leave_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to servers straight, and trust whom everybody trusts, whatever the environment says."""
    for name in _SURROUNDINGS:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

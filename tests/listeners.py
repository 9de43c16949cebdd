"""What is told of a command: a monitor's HTTP server and a mail server, both on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from embedded_supabase.ports import free_port


class Heard(NamedTuple):
    """A request."""

    method: str
    path: str
    body: str


class Listener:
    """An HTTP server that records what it is sent; it responds with one status after another, then with the last."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.statuses = [200]
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                listener.heard.append(Heard(self.command, self.path, body.decode()))
                self.send_response(listener.statuses.pop(0) if len(listener.statuses) > 1 else listener.statuses[0])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        """Return the paths of all requests, and forget them."""
        paths = [one.path for one in self.heard]
        self.heard.clear()
        return paths

    def titles(self) -> list[str]:
        """Return the titles of all notifications of apprise's json://, and forget them."""
        titles = [json.loads(one.body)["title"] for one in self.heard]
        self.heard.clear()
        return titles

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def listening() -> Iterator[Listener]:
    """Run a listener during the block."""
    listener = Listener()
    try:
        yield listener
    finally:
        listener.close()


class _Mails:
    def __init__(self) -> None:
        self.mails: list[str] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content: Any = envelope.content
        self.mails.append(content.decode())
        return "250 OK"


@contextmanager
def mail_server() -> Iterator[tuple[int, list[str]]]:
    """Run a mail server during the block; yield its port, and the mails that it takes."""
    handler = _Mails()
    controller = Controller(handler, hostname="127.0.0.1", port=free_port())
    controller.start()
    try:
        yield controller.port, handler.mails
    finally:
        controller.stop()

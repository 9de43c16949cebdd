"""A pooler before PostgreSQL, as small as it can be: enough to find out whether the doctor can tell its mode."""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

from psycopg2.extensions import parse_dsn

from tests.proxies import _NEGOTIATIONS, SECONDS, _read_answer

if TYPE_CHECKING:
    from typing_extensions import Self

#: The process that it names to every client, which is none of the server's.
NAMED = 7


class Pooler(socketserver.ThreadingTCPServer):
    """A pooler on a free port of loopback, running for a `with` block.

    Arguments:
        dsn: of the server, on a socket of this machine, where everybody is trusted.
        by_transaction: a client keeps a server's connection for a transaction only, and else until it leaves.
    """

    daemon_threads = False

    def __init__(self, dsn: str, *, by_transaction: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Client)
        parameters = parse_dsn(dsn)
        self._address = f"{parameters['host']}/.s.PGSQL.{parameters.get('port', '5432')}"
        self._startup = _message(
            b"", struct.pack("!i", 196608) + _words("user", parameters["user"], "database", parameters["dbname"])
        )
        self.by_transaction = by_transaction
        name = quote(parameters["dbname"], safe="")
        self.url = f"postgresql://{parameters['user']}@127.0.0.1:{self.server_address[1]}/{name}"
        self._free: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="pooler")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        for server in self._all:
            server.close()

    def begin(self) -> bytes:
        """Return what the server says to whoever comes in, with the process that we name."""
        server, said = self._open()
        self.give_back(server)
        answer = b""
        while said:
            length = 1 + int(struct.unpack_from("!i", said, 1)[0])
            answer += said[:length] if said[:1] != b"K" else _message(b"K", struct.pack("!ii", NAMED, 0))
            said = said[length:]
        return answer

    def take(self) -> socket.socket:
        """Return the server's connection that became free last, else a new one."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._open()[0]

    def give_back(self, server: socket.socket) -> None:
        """Let the next one have it."""
        with self._lock:
            self._free.append(server)

    def _open(self) -> tuple[socket.socket, bytes]:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.settimeout(SECONDS)
        server.connect(self._address)
        with self._lock:
            self._all.append(server)
        server.sendall(self._startup)
        return server, _read_answer(server)


class _Client(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(ConnectionError):  # who only looks whether somebody listens leaves at once
            self._relay()

    def _relay(self) -> None:
        assert isinstance(self.server, Pooler)
        self.request.settimeout(SECONDS)
        while struct.unpack_from("!i", self._read())[0] in _NEGOTIATIONS:
            self.request.sendall(b"N")  # neither TLS nor GSSAPI
        self.request.sendall(self.server.begin())
        server: socket.socket | None = None
        while (kind := self.request.recv(1)) not in (b"", b"X"):
            server = server or self.server.take()
            server.sendall(_message(kind, self._read()))
            answer = _read_answer(server)
            if self.server.by_transaction and answer[-1:] == b"I":
                self.server.give_back(server)  # before the client hears of the end
                server = None
            self.request.sendall(answer)

    def _read(self) -> bytes:
        """Read what follows the letter of a message, without its length."""
        length = struct.unpack("!i", self._exactly(4))[0]
        return self._exactly(length - 4)

    def _exactly(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            part = self.request.recv(count - len(received))
            if not part:
                raise ConnectionAbortedError("the client has left")
            received += part
        return received


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!i", len(content) + 4) + content


def _words(*words: str) -> bytes:
    return b"".join(word.encode() + b"\0" for word in words) + b"\0"

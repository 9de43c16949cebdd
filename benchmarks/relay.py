"""A relay before a server that makes it as far away as is asked for, and counts what passes."""

from __future__ import annotations

import asyncio
import re
import struct
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_QUERY = ord("Q")
#: A statement of ours: comments, strings, identifiers in quotes, and whatever else is no semicolon.
_STATEMENT = re.compile(r"""(?:--[^\n]*|E'(?:[^'\\]|\\.)*'|'[^']*'|"[^"]*"|[^;'"])+""")


class Relay:
    """A relay for the length of a `with` block, in a thread of its own.

    Attributes:
        port: where it listens, on loopback.
        turns: how often a client began to speak: round trips, and with HTTP/1.1 requests.
        statements: the words of the statements that passed, with their number, if it was told to look for them; a
            message may have several.
        connections: how many there were.
    """

    def __init__(self, server: str | tuple[str, int], delay: float = 0.0, *, postgres: bool = False) -> None:
        """Name the server, by the path of its socket or by host and port.

        Arguments:
            delay: seconds that everything takes in each direction, the making of a connection included.
            postgres: look for queries in what passes.
        """
        self._server, self._delay, self._postgres = server, delay, postgres
        self.port = 0
        self.forget()
        self._loop = asyncio.new_event_loop()
        self._listens = threading.Event()
        self._open: set[asyncio.Transport] = set()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="relay")

    def __enter__(self) -> Self:
        self._thread.start()
        self._listens.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    def forget(self) -> None:
        """Begin to count anew."""
        self.turns = self.connections = 0
        self.statements: Counter[str] = Counter()

    async def _serve(self) -> None:
        listening = await self._loop.create_server(lambda: _Client(self), "127.0.0.1", 0)
        self.port = listening.sockets[0].getsockname()[1]
        self._listens.set()
        await self._over.wait()
        listening.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        for transport in list(self._open):
            transport.abort()
        while self._open:
            await asyncio.sleep(0)

    def connect(self, protocol: Callable[[], _Side]) -> Awaitable[object]:
        """Connect to the server."""
        if isinstance(self._server, str):
            return self._loop.create_unix_connection(protocol, self._server)
        return self._loop.create_connection(protocol, *self._server)


class _Side(asyncio.Protocol):
    """One end of a connection: what comes is passed on to the other end when it is due."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.other: _Side | None = None
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._due: deque[bytes | None] = deque()
        self._earliest = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.relay._open.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:
            self.relay._open.discard(self.transport)
        self.pass_on(None)

    def pass_on(self, data: bytes | None) -> None:
        """Send on, None for the end, after the delay, in order."""
        self._due.append(data)
        self._loop.call_at(max(self._loop.time() + self.relay._delay, self._earliest), self._send)

    def _send(self) -> None:
        data = self._due.popleft()
        transport = self.other.transport if self.other is not None else None
        if transport is None:
            return
        if data is None:
            transport.close()
        else:
            transport.write(data)


class _Client(_Side):
    """The client's end, which counts."""

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay)
        self._speaks = False
        self._parser = _Queries(relay.statements) if relay._postgres else None
        self._connecting: asyncio.Task[None] | None = None
        # What came before the server was there: in Python 3.11.2 reading goes on although it was paused.
        self._early: list[bytes] | None = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.relay.connections += 1
        self._earliest = self._loop.time() + 3 * self.relay._delay  # there and back, before the first byte
        assert self.transport is not None
        self.transport.pause_reading()
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        self.other = server = _Server(self.relay, self)
        await self.relay.connect(lambda: server)
        early, self._early = self._early or [], None
        for data in early:
            self.pass_on(data)
        assert self.transport is not None
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if not self._speaks:
            self._speaks = True
            self.relay.turns += 1
        if self._parser is not None:
            self._parser.feed(data)
        if self._early is not None:
            self._early.append(data)
        else:
            self.pass_on(data)

    def hears(self) -> None:
        """Know that the server spoke."""
        self._speaks = False


class _Server(_Side):
    """The server's end."""

    def __init__(self, relay: Relay, client: _Client) -> None:
        super().__init__(relay)
        self.other = self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.hears()
        self.pass_on(data)


class _Queries:
    """Find the simple queries in what a client of PostgreSQL says (PostgreSQL manual, Message Formats)."""

    def __init__(self, found: Counter[str]) -> None:
        self._found = found
        self._pending = bytearray()
        self._started = False

    def feed(self, data: bytes) -> None:
        """Take what passed."""
        self._pending += data
        while True:
            start = 1 if self._started else 0
            if len(self._pending) < start + 4:
                return
            length = start + int(struct.unpack_from("!i", self._pending, start)[0])
            if len(self._pending) < length:
                return
            message = bytes(self._pending[:length])
            del self._pending[:length]
            if not self._started:
                # A first message of eight bytes asks for TLS or GSSAPI; the one that starts the session is longer.
                self._started = length > 8
            elif message[0] == _QUERY:
                self._found.update(split_statements(message[5:-1].decode("utf-8", "replace")))


def split_statements(text: str) -> list[str]:
    """Return the statements of a message; a semicolon in a string or in a comment ends none."""
    return [statement for part in _STATEMENT.findall(text) if (statement := part.strip())]

"""A network that is not to be relied on: a proxy before Storage and one before PostgreSQL that do harm by plan.

A plan is asked about every request, or every message of a client, in turn. What it answers is a fault or None.
"""

from __future__ import annotations

import json
import re
import select
import socket
import socketserver
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from psycopg2.extensions import parse_dsn

if TYPE_CHECKING:
    from typing_extensions import Self

SECONDS = 30.0
#: How long something is under way that nobody waits for any more.
LATE_SECONDS = 0.2
#: Between two bytes of an answer that drips.
DRIP_SECONDS = 0.05

_BUCKET = re.compile(r"bucket-[0-9a-f]{32}")
_END_OF_CONNECTION = struct.pack("ii", 1, 0)
_STARTUP_OF_3_0 = 196608
_NEGOTIATIONS = (80877103, 80877104)
_CANCEL = 80877102

Asked = TypeVar("Asked")


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server with a thread for each connection, all of which have ended once it is closed."""

    allow_reuse_address = True
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.failures: list[BaseException] = []

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # and nothing before: a reset is to be one

    def handle_error(self, request: object, client_address: object) -> None:
        failure = sys.exc_info()[1]
        assert failure is not None
        if not isinstance(failure, ConnectionError):  # a client may go away when it likes
            self.failures.append(failure)


class _Proxy:
    """What both proxies are: a server on a free port of loopback, running for a `with` block."""

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        self.lock = threading.Lock()
        self.over = threading.Event()
        self._server = _Server(handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="proxy")
        self._clients: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self.cut_all()
        self._server.server_close()
        if value is None and self._server.failures:
            raise self._server.failures[0]

    def opened(self, client: socket.socket) -> None:
        """Remember a connection, so that it can be cut."""
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self._clients.add(client)
        if self.over.is_set():
            cut(client)

    def closed(self, client: socket.socket) -> None:
        """Forget a connection before it is closed."""
        with self.lock:
            self._clients.discard(client)

    def cut_all(self) -> None:
        """Cut every connection there is now."""
        with self.lock:
            for client in self._clients:
                cut(client)


def cut(connection: socket.socket) -> None:
    """Make the thread that reads a connection close it, and close it with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _END_OF_CONNECTION)
    with suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RD)


# Plans


def first(tries: int, fault: Asked, matches: Callable[[Any], bool] = lambda _: True) -> Callable[[Any], Asked | None]:
    """Do the same to the first tries of everything that matches; `tries` may be beyond all bounds."""
    return lambda asked: fault if matches(asked) and asked.nth <= tries else None


def mixed(
    seed: int, share: float, faults: Sequence[Asked], matches: Callable[[Any], bool] = lambda _: True
) -> Callable[[Any], Asked | None]:
    """Do any of several things to a share of what matches, the same for a seed in whatever order it all comes."""

    def plan(asked: Any) -> Asked | None:
        if not matches(asked):
            return None
        chance = Random(f"{seed} {asked.what} {asked.nth}")
        return chance.choice(faults) if chance.random() < share else None

    return plan


# Storage


@dataclass(frozen=True)
class Answer:
    """What is answered in the server's place."""

    status: int
    content: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        delay: seconds before anything else.
        taken: the share of the request that is read; less than all of it, and the connection is reset.
        answer: what is said in the server's place, which hears nothing of the request; or what finds that out from its
            path and body.
        edit: what changes the server's answer.
        drips: pass the answer on a byte at a time, until the client has enough.
        told: the share of the answer that is passed on; less than all of it, and the connection is closed.
        late: seconds after the client's connection was cut, at which the request gets to the server.
        silent: say nothing, and keep the connection until the client has enough.
        closes: close the connection after the answer, without a word about it.
        stalls: keep the connection after the part that is told, until the client has enough.
    """

    name: str
    delay: float = 0.0
    taken: float = 1.0
    answer: Answer | Callable[[str, bytes], Answer] | None = None
    edit: Callable[[Answer], Answer] = lambda answer: answer
    drips: bool = False
    told: float = 1.0
    late: float = 0.0
    silent: bool = False
    closes: bool = False
    stalls: bool = False

    def __str__(self) -> str:
        return self.name


def error(status: int, label: str, code: str, message: str, http: int = 400) -> Fault:
    """Return an error in the form of the protocol, most of which come as HTTP 400."""
    body = {"statusCode": str(status), "error": label, "code": code, "message": message}
    return Fault(f"{status} {code}", answer=Answer(http, json.dumps(body).encode()))


def page(status: int, title: str) -> Fault:
    """Return what a gateway says itself, in HTML."""
    text = f"<html><head><title>{status} {title}</title></head><body><h1>{title}</h1></body></html>"
    return Fault(f"{status} page", answer=Answer(status, text.encode(), "text/html"))


SLOW = Fault("slow", delay=0.05)
RESET = Fault("reset", taken=0.0)
REQUEST_CUT = Fault("request cut", taken=0.5)
REQUEST_LATE = Fault("request late", late=LATE_SECONDS)
ANSWER_LOST = Fault("answer lost", told=0.0)
ANSWER_CUT = Fault("answer cut", told=0.5)
SILENT = Fault("silent", silent=True)
STALLED = Fault("stalled", told=0.5, stalls=True)
IDLE_CLOSED = Fault("idle closed", closes=True)
SLOW_DOWN = error(429, "too_many_connections", "SlowDown", "Too many connections issued to the database", 429)
DATABASE_TIMEOUT = error(544, "DatabaseTimeout", "DatabaseTimeout", "The connection to the database timed out", 544)
INTERNAL = error(500, "Internal", "InternalError", "Internal Server Error", 500)
LOCK_TIMEOUT = error(503, "acquiring_lock_timeout", "LockTimeout", "acquiring lock timeout")
RESOURCE_LOCKED = error(423, "resource_locked", "ResourceLocked", "The resource is locked")
BAD_GATEWAY = page(502, "Bad Gateway")
NO_SERVICE = page(503, "Service Unavailable")
PORTAL = page(200, "Welcome to the network of this hotel")

#: The answer, or the lack of one, is no word on how many are welcome.
TRANSIENT = (
    RESET,
    REQUEST_CUT,
    ANSWER_LOST,
    ANSWER_CUT,
    INTERNAL,
    RESOURCE_LOCKED,
    BAD_GATEWAY,
)
OVERLOAD = (SLOW_DOWN, DATABASE_TIMEOUT, LOCK_TIMEOUT, NO_SERVICE)
#: None of these is an error for who speaks HTTP well.
HARMLESS = (SLOW, IDLE_CLOSED)


@dataclass(frozen=True)
class Request:
    """A request: without its query, the nth of this method and path, and how many are under way with it."""

    method: str
    path: str
    nth: int
    under_way: int

    @property
    def what(self) -> str:
        """Return what it asks for, whatever the bucket is called."""
        return _BUCKET.sub("bucket", f"{self.method} {self.path}")

    @property
    def is_upload(self) -> bool:
        """Say whether it stores an object."""
        return self.method == "POST" and self.path.endswith(".jpg")


class StorageProxy(_Proxy):
    """A proxy before a Storage server; `plan` may be set at any time, None does no harm."""

    def __init__(self, upstream: str, plan: Callable[[Request], Fault | None] | None = None) -> None:
        super().__init__(self._handler())
        parts = urlsplit(upstream)
        self._upstream = parts.hostname or "", parts.port or 80
        self.url = f"http://127.0.0.1:{self.port}"
        self.plan = plan
        self.seen: list[tuple[Request, Fault | None]] = []
        self._tries: Counter[tuple[str, str]] = Counter()
        self.under_way = 0

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.seen.clear()
            self._tries.clear()

    def tries(self, matches: Callable[[Request], bool] = lambda request: request.is_upload) -> Counter[str]:
        """Return how often each thing was asked for, of the requests that match."""
        with self.lock:
            return Counter(request.what for request, _ in self.seen if matches(request))

    def met(self) -> Counter[Fault]:
        """Return how often each fault was met."""
        with self.lock:
            return Counter(fault for _, fault in self.seen if fault is not None)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            upstream: HTTPConnection

            def setup(self) -> None:
                super().setup()
                self.upstream = HTTPConnection(*proxy._upstream, timeout=SECONDS)
                proxy.opened(self.connection)

            def finish(self) -> None:
                proxy.closed(self.connection)
                self.upstream.close()
                super().finish()

            def relay(self) -> None:
                path = urlsplit(self.path).path
                with proxy.lock:
                    proxy._tries[self.command, path] += 1
                    proxy.under_way += 1
                    request = Request(self.command, path, proxy._tries[self.command, path], proxy.under_way)
                try:
                    plan = proxy.plan
                    fault = plan(request) if plan is not None else None
                    with proxy.lock:
                        proxy.seen.append((request, fault))
                    answer = proxy._treat(self, fault or Fault("none"))
                finally:
                    # Before the client hears of it, who may then begin another one.
                    with proxy.lock:
                        proxy.under_way -= 1
                self.connection.sendall(answer)
                if fault is not None and fault.stalls:
                    self.rfile.read(1)

            do_GET = do_POST = do_PUT = do_DELETE = relay

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _treat(self, handler: Any, fault: Fault) -> bytes:
        """Return the bytes of the answer, as far as they are passed on."""
        if fault.delay:
            self.over.wait(fault.delay)
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(int(length * fault.taken))
        handler.close_connection |= fault.taken < 1 or len(body) < length or bool(fault.late)
        if fault.taken < 1:
            cut(handler.connection)
        if fault.late:
            with suppress(OSError):  # the client was faster
                handler.connection.shutdown(socket.SHUT_RDWR)
            self.over.wait(fault.late)
            self._forward(handler, body)
        if handler.close_connection:
            return b""
        if isinstance(fault.answer, Answer):
            answer = fault.answer
        elif fault.answer is not None:
            answer = fault.answer(handler.path, body)
        else:
            answer = fault.edit(self._forward(handler, body))
        if fault.silent:
            handler.close_connection = not handler.rfile.read(1)
            assert handler.close_connection
            return b""
        if fault.closes or fault.told < 1:
            handler.close_connection = True
        if not fault.told:
            return b""
        lines = [f"HTTP/1.1 {answer.status} {BaseHTTPRequestHandler.responses.get(answer.status, ('Said',))[0]}"]
        headers = (("Content-Type", answer.content_type), ("Content-Length", str(len(answer.content))), *answer.headers)
        lines += [f"{name}: {value}" for name, value in headers]
        head = "\r\n".join([*lines, "", ""])
        if fault.drips:
            handler.close_connection = True
            with suppress(OSError):  # the client has enough
                for byte in head.encode() + answer.content:
                    handler.connection.sendall(bytes([byte]))
                    self.over.wait(DRIP_SECONDS)
            return b""
        # Cut in the body: who takes a part of a JSON text or of a photo for the whole is to be found out.
        return head.encode() + answer.content[: int(len(answer.content) * fault.told)]

    def _forward(self, handler: Any, body: bytes) -> Answer:
        handler.upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            handler.upstream.putheader(name, value)
        handler.upstream.endheaders(body)
        answer = handler.upstream.getresponse()
        return Answer(answer.status, answer.read(), answer.headers.get("Content-Type", ""))


# PostgreSQL


@dataclass(frozen=True)
class Harm:
    """What happens to a message of a client, and to its connection.

    Attributes:
        forwards: the server gets the message, and its answer is awaited.
        told: the share of that answer which the client gets before the connection is closed.
        late: seconds that the server's connection outlives the client's, before the message gets there or does not.
        said: the message of the server's that is sent instead, before the connection is closed.
    """

    name: str
    forwards: bool = False
    told: float = 0.0
    late: float = 0.0
    said: bytes = b""

    def __str__(self) -> str:
        return self.name


def fatal(name: str, code: str, message: str) -> Harm:
    """Return an error that a server ends a connection with."""
    fields = (b"SFATAL", b"VFATAL", b"C" + code.encode(), b"M" + message.encode(), b"")
    content = b"".join(one + b"\0" for one in fields)
    return Harm(name, said=b"E" + struct.pack("!i", len(content) + 4) + content)


#: The message is lost, and the connection with it.
LOST = Harm("message lost")
#: It arrives, and the answer is lost with the connection.
UNANSWERED = Harm("answer lost", forwards=True)
#: It arrives, and the connection ends in the middle of the answer.
HALF_ANSWERED = Harm("answer cut", forwards=True, told=0.5)
#: It arrives when its client has given it up.
LATE = Harm("message late", forwards=True, late=LATE_SECONDS)
#: It is lost, and the server hears of that later than its client.
HALF_OPEN = Harm("half open", late=LATE_SECONDS)
STARTING_UP = fatal("starting up", "57P03", "the database system is starting up")
SHUTTING_DOWN = fatal("shutting down", "57P01", "terminating connection due to administrator command")


@dataclass(frozen=True)
class Message:
    """A message of a client.

    Attributes:
        kind: the letter of the protocol, empty for the first one of a connection.
        text: of a query; for data and the end of a COPY, that of the COPY.
        application: the name that the client gave itself.
        nth: the nth of this application, kind and text.
        transaction: the queries since the last BEGIN, a line each.
        carried: bytes that its connection has carried to the server before it.
        connection: the connection's number, from 1.
    """

    kind: str
    text: str
    application: str
    nth: int
    transaction: str
    carried: int
    connection: int

    @property
    def what(self) -> str:
        """Return what it is about."""
        return f"{self.application} {self.kind} {self.text}"

    @property
    def is_commit(self) -> bool:
        """Say whether it commits a transaction."""
        return self.kind == "Q" and self.text.endswith("COMMIT")

    @property
    def is_connect(self) -> bool:
        """Say whether it is the first of its connection."""
        return not self.kind


@dataclass
class _Session:
    """A connection: its two ends, and what was received and belongs to a message that is not whole yet."""

    client: socket.socket
    number: int
    server: socket.socket | None = None
    application: str = ""
    text: str = ""
    transaction: list[str] = field(default_factory=list)
    carried: int = 0
    pending: bytearray = field(default_factory=bytearray)


class DatabaseProxy(_Proxy):
    """A proxy before a PostgreSQL on a socket of this machine; `plan` and `delay` may be set at any time.

    Attributes:
        url: the address of the same database through the proxy.
        plan: asked for every message; None does no harm.
        delay: seconds that whatever comes is held back, in each direction.
        hung: once it is set, nothing is passed on any more, connections and cancellations are taken all the same.
    """

    def __init__(self, dsn: str, plan: Callable[[Message], Harm | None] | None = None) -> None:
        super().__init__(self._handler())
        parameters = parse_dsn(dsn)
        self._address = f"{parameters['host']}/.s.PGSQL.{parameters.get('port', '5432')}"
        user = quote(parameters["user"], safe="")
        if "password" in parameters:
            user += f":{quote(parameters['password'], safe='')}"
        self.url = f"postgresql://{user}@127.0.0.1:{self.port}/{quote(parameters['dbname'], safe='')}"
        self.plan = plan
        self.delay = 0.0
        self.hung = threading.Event()
        self.seen: list[tuple[Message, Harm | None]] = []
        self._asked: Counter[tuple[str, str, str]] = Counter()
        self._connections = 0

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.seen.clear()
            self._asked.clear()

    def count(self, matches: Callable[[Message], bool]) -> int:
        """Return how many messages came that match."""
        with self.lock:
            return sum(matches(message) for message, _ in self.seen)

    def met(self) -> list[tuple[Message, Harm]]:
        """Return the messages that harm was done to."""
        with self.lock:
            return [(message, harm) for message, harm in self.seen if harm is not None]

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(SECONDS)
                proxy.opened(self.request)
                with proxy.lock:
                    proxy._connections += 1
                    session = _Session(self.request, proxy._connections)
                try:
                    proxy._relay(session)
                finally:
                    proxy.closed(self.request)
                    if session.server is not None:
                        session.server.close()

        return Handler

    def _relay(self, session: _Session) -> None:
        """Pass on what comes from either side, until one of them ends or a plan does."""
        while True:
            ends = [session.client, *([session.server] if session.server is not None else [])]
            for end in select.select(ends, [], [])[0]:
                received = end.recv(1 << 16)
                if not received:
                    return
                if self.delay:
                    self.over.wait(self.delay)
                if end is session.server:
                    session.client.sendall(received)
                    continue
                session.pending += received
                if not self._take(session):
                    return

    def _take(self, session: _Session) -> bool:
        """Pass on the whole messages that were received of a client; return whether its connection goes on."""
        while True:
            if self.hung.is_set():
                self.over.wait()
                return False
            first_one = session.server is None
            start = 0 if first_one else 1
            if len(session.pending) < start + 4:
                return True
            length = start + int(struct.unpack_from("!i", session.pending, start)[0])
            if len(session.pending) < length:
                return True
            raw = bytes(session.pending[:length])
            del session.pending[:length]
            if first_one:
                if struct.unpack_from("!i", raw, 4)[0] in _NEGOTIATIONS:
                    session.client.sendall(b"N")  # neither TLS nor GSSAPI
                    continue
                if not self._begin(session, raw):
                    return False
                continue
            kind = chr(raw[0])
            if kind == "Q":
                session.text = raw[5:-1].decode()
                if session.text.startswith("BEGIN"):
                    session.transaction.clear()
                session.transaction.append(session.text)
            if not self._pass_on(session, kind, raw):
                return False

    def _begin(self, session: _Session, raw: bytes) -> bool:
        """Connect to the server for the first message of a client."""
        code = struct.unpack_from("!i", raw, 4)[0]
        if code == _STARTUP_OF_3_0:
            words = raw[8:].decode().split("\0")
            session.application = dict(zip(words[::2], words[1::2], strict=False)).get("application_name", "")
            harm = self._ask(session, "")
            if harm is not None:
                session.client.sendall(harm.said)
                if not harm.said:
                    cut(session.client)
                return False
        else:
            assert code == _CANCEL
        session.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        session.server.settimeout(SECONDS)
        session.server.connect(self._address)
        session.server.sendall(raw)
        session.carried += len(raw)
        return True

    def _ask(self, session: _Session, kind: str) -> Harm | None:
        with self.lock:
            key = session.application, kind, session.text
            self._asked[key] += 1
            nth = self._asked[key]
        transaction = "\n".join(session.transaction)
        message = Message(kind, session.text, session.application, nth, transaction, session.carried, session.number)
        plan = self.plan
        harm = plan(message) if plan is not None else None
        with self.lock:
            self.seen.append((message, harm))
        return harm

    def _pass_on(self, session: _Session, kind: str, raw: bytes) -> bool:
        assert session.server is not None
        harm = self._ask(session, kind)
        if harm is None:
            session.server.sendall(raw)
            session.carried += len(raw)
            return True
        if harm.late:
            # The client hears of the end now; the server works on its message meanwhile.
            self.closed(session.client)
            session.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _END_OF_CONNECTION)
            session.client.close()
            self.over.wait(harm.late)
        if harm.forwards:
            session.server.sendall(raw)
            answer = _read_answer(session.server)
            if harm.told:
                session.client.sendall(answer[: int(len(answer) * harm.told)])
        elif harm.said:
            session.client.sendall(harm.said)
        elif not harm.late:
            cut(session.client)
        return False


def _read_answer(server: socket.socket) -> bytes:
    """Read the messages of a server up to the one that says that it is ready for another query."""
    received, start = b"", 0
    while True:
        part = server.recv(1 << 16)
        if not part:
            return received
        received += part
        while len(received) >= start + 5:
            length = 1 + int(struct.unpack_from("!i", received, start + 1)[0])
            if len(received) < start + length:
                break
            if received[start : start + 1] == b"Z":
                return received
            start += length

"""The wire to the Storage API: a connection for each thread, and what can go wrong on it.

requests knows the way (proxies, certificates), urllib3 opens connections along it, http.client reads the answers.
Requests are written here (HTTP/1.1, RFC 9112), each in one piece: an upload by urllib3 is four calls to the kernel
more, and the interpreter may be somebody else's after each. It takes 0.4 ms of processor time that way, 0.2 this way,
and more than 0.7 with a session of requests.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import requests
import requests.adapters
import requests.utils
import urllib3
import urllib3.exceptions
import urllib3.util

from pipeline.config import Settings, redact
from pipeline.errors import SettingsError, StorageError, StorageUnavailable

#: Seconds, to connect and to shake hands.
CONNECT_TIMEOUT = 10.0
#: Seconds for a piece of a body, and between two bytes of an answer.
READ_TIMEOUT = 60.0

#: Bytes that are sent at once; the first piece of a body goes with the head.
_PIECE = 1 << 20
#: The other side has closed; what it said before can still be read, such as that the body is too large.
_CLOSED = (errno.EPIPE, errno.ECONNRESET, errno.EPROTOTYPE)

_PORTS = {"http": 80, "https": 443}


class Answer:
    """An answer of any status; its body can be read within the block of its request.

    Attributes:
        status: the code.
        reason: the words after it.
        headers: a mapping in which letter case does not count.
    """

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status, self.reason, self.headers = response.status, response.reason, response.headers

    @cached_property
    def data(self) -> bytes:
        """Return the whole body."""
        return self._response.read()

    def stream(self, size: int) -> Iterator[bytes]:
        """Yield the body in pieces of so many bytes at most."""
        while piece := self._response.read(size):
            yield piece
        if self._response.length:
            raise http.client.IncompleteRead(b"", self._response.length)


class _Line:
    """The connection of a thread, opened where there is none or the other side has closed it.

    Arguments:
        pool: knows how to open it.
        prefix: what a path is put behind, more than a path where a proxy is asked.
        tunnelled: a proxy is asked, and sees nothing of what goes through.
        headers: sent with every request.
    """

    def __init__(self, pool: Any, prefix: str, headers: Mapping[str, str], *, tunnelled: bool) -> None:
        self._pool, self._prefix, self._is_tunnelled = pool, prefix, tunnelled
        self._headers = _fields({**headers, **({} if tunnelled else pool.proxy_headers)})
        self._connection = pool._new_conn()

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send a request and return its answer, whose body is still to be read; `close` after any error."""
        if not self._connection.is_connected:
            self._connect()
        sock = self._connection.sock
        if sock is None:
            raise http.client.NotConnected
        if body is not None:
            headers = {**headers, "Content-Length": str(len(body))}
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}{_fields(headers)}\r\n".encode("ascii")
        content = memoryview(body or b"")
        try:
            sock.sendall(head + content[:_PIECE])
            for start in range(_PIECE, len(content), _PIECE):
                sock.sendall(content[start : start + _PIECE])
        except OSError as exc:
            if exc.errno not in _CLOSED:
                raise
        response = http.client.HTTPResponse(sock, method=method)
        try:
            response.begin()
            _check_framing(response)
        except BaseException:
            response.close()  # or the socket stays open for it
            raise
        return response

    def _connect(self) -> None:
        self.close()
        connection = self._connection
        connection.timeout = CONNECT_TIMEOUT
        try:
            if self._is_tunnelled:
                self._pool._prepare_proxy(connection)
            else:
                connection.connect()
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as exc:
            if connection.proxy and not connection.has_connected_to_proxy:
                raise urllib3.exceptions.ProxyError("the proxy cannot be reached", exc) from exc
            raise
        connection.sock.settimeout(READ_TIMEOUT)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()


def _fields(headers: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _check_framing(response: http.client.HTTPResponse) -> None:
    """Refuse a body of which it is not clear where it ends, or that is not the one that was asked for."""
    lengths = response.headers.get_all("Content-Length") or []
    if len(lengths) > 1 or not all(length.strip().isdecimal() for length in lengths):
        raise urllib3.exceptions.InvalidHeader(f"Content-Length: {', '.join(lengths)}")
    encoding = response.headers.get("Content-Encoding") or "identity"
    if encoding.strip().lower() != "identity":
        raise urllib3.exceptions.DecodeError(f"Content-Encoding: {encoding}")


def _host_of(url: urllib3.util.Url) -> str:
    """Return the host as a request names it: without the scheme's own port, a zone (RFC 6874), and a dot at the end."""
    host = re.sub(r"%.*(?=\])", "", str(url.host)).rstrip(".")
    return host if url.port in (None, _PORTS.get(str(url.scheme))) else f"{host}:{url.port}"


class Wire:
    """Send requests, each over the connection of its thread in its process; nothing is tried again."""

    def __init__(self, settings: Settings) -> None:
        self._base = settings.storage_url
        self._is_embedded = settings.environment == "embedded"
        key = settings.key.reveal()
        # The key goes both ways: the gateway reads `apikey`, the server reads `Authorization`.
        self._headers = {"User-Agent": "pipeline", "apikey": key, "Authorization": f"Bearer {key}"}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._lines: list[_Line] = []

    @property
    def proxied(self) -> bool:
        """Return whether a proxy carries the requests, and so looks names up."""
        return requests.utils.select_proxy(self._base, self._proxies) is not None

    @cached_property
    def _proxies(self) -> dict[str, str]:
        return dict(requests.utils.get_environ_proxies(self._base))

    @contextmanager
    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Answer]:
        """Send a request; give the answer, of any status, to be read within the block.

        Arguments:
            path: below the API's address, percent-encoded.

        Raises:
            StorageUnavailable: no connection, no answer, or half of one.
            StorageError: the server's certificate is not accepted, or nothing can be sent that way.
            SettingsError: there is no such file of certificates.
        """
        try:
            line = self._line()
            keep = False
            try:
                with closing(line.ask(method, path, body, headers or {})) as response:
                    yield Answer(response)
                    keep = response.isclosed() and not response.will_close  # closed is said of an answer that is read
            finally:
                if not keep:
                    line.close()
        except (ssl.SSLError, urllib3.exceptions.SSLError, urllib3.util.ssl_match_hostname.CertificateError) as exc:
            if _is_cut(_cause(exc)):
                raise self._unreachable(exc) from exc
            raise StorageError(
                f"The TLS certificate of {self._base} is not accepted.",
                "Set REQUESTS_CA_BUNDLE to the authority's certificate.",
            ) from exc
        except (urllib3.exceptions.LocationValueError, requests.exceptions.RequestException) as exc:
            raise StorageError(f"Storage cannot be asked: {redact(str(exc))}", "Check the settings.") from exc
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: BaseException) -> StorageUnavailable:
        name = type(_cause(exc)).__name__
        return StorageUnavailable(f"Storage at {self._base} cannot be reached ({name}).", self.hint_unreachable)

    @property
    def hint_unreachable(self) -> str:
        """Return what to do when there is no answer."""
        if self._is_embedded:
            return "Start it with `python -m pipeline up`."
        return "Check the network and NEXT_PUBLIC_SUPABASE_URL, then run the same command again."

    def close(self) -> None:
        """Close the connections of all threads, none of which may be at a request; a further request opens another."""
        with self._lock:
            for line in self._lines:
                line.close()

    def _line(self) -> _Line:
        """Return the line of this thread in its process."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.line, self._local.pid = self._new_line(), os.getpid()
            with self._lock:
                self._lines.append(self._local.line)
        return self._local.line  # type: ignore[no-any-return]

    def _new_line(self) -> _Line:
        url = urllib3.util.parse_url(self._base)
        first = requests.PreparedRequest()
        first.url = self._base
        adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=1)
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        pool: Any = adapter.get_connection_with_tls_context(first, verify, proxies=self._proxies)
        try:
            adapter.cert_verify(pool, self._base, verify, None)  # type: ignore[no-untyped-call]
        except OSError as exc:
            raise SettingsError(f"{exc}.", "Set REQUESTS_CA_BUNDLE to a file of certificates, or unset it.") from exc
        prefix = urllib3.util.parse_url(adapter.request_url(first, self._proxies)).url  # in ASCII
        headers = {"Host": _host_of(url), "Accept-Encoding": "identity", **self._headers}
        return _Line(pool, prefix, headers, tunnelled=pool.proxy is not None and url.scheme == "https")


def _is_cut(error: BaseException) -> bool:
    """Return whether a handshake was given up by the other side, as by one that is about to restart."""
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
        return True
    return isinstance(error, ssl.SSLError) and error.reason == "TLSV1_ALERT_INTERNAL_ERROR"


def _cause(exc: BaseException) -> BaseException:
    """Return the error below the wrappers, such as ConnectionRefusedError."""
    inner: Any = exc
    while True:
        candidates = [getattr(inner, "original_error", None), *getattr(inner, "args", ()), inner.__cause__]
        below = next((one for one in candidates if isinstance(one, BaseException) and one is not inner), None)
        if below is None:
            return inner  # type: ignore[no-any-return]
        inner = below

"""HTTP requests to the Storage API, sent with urllib3.

requests reads proxies and certificates from the environment. urllib3 follows no redirect and does not retry: `client`
retries, by the error code of the API.
"""

from __future__ import annotations

import http.client
import io
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import requests
import requests.adapters
import requests.utils
import urllib3
import urllib3.exceptions
import urllib3.util
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import BaseHTTPResponse as Response

from pipeline.config import Settings, command_line
from pipeline.errors import SettingsError, StorageError, StorageUnavailable
from pipeline.storage.deadline import TimedResponse, seconds_left

#: Seconds to connect, with the TLS handshake, and to send a block of a body; bytes in a block.
CONNECT_TIMEOUT = 10.0
_BLOCK = 1 << 18
#: Seconds of an attempt, from connecting to the last byte of the response, for a slow but sound network; and bytes to
#: send or to receive that allow one second more.
READ_TIMEOUT = 60.0
_SLOWEST = 1 << 16
#: Reasons of OpenSSL for a handshake that may succeed the next time.
_INTERRUPTED = (
    "TLSV1_ALERT_INTERNAL_ERROR",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
    "SSLV3_ALERT_BAD_RECORD_MAC",
    "TLSV1_ALERT_DECRYPT_ERROR",
)
_TIMEOUTS = (TimeoutError, urllib3.exceptions.ReadTimeoutError)


def _seconds_for(count: int) -> float:
    return READ_TIMEOUT + count / _SLOWEST


class _Connection(HTTPConnection):
    """Send the head of a request in one message with its body: in two, they wake the server twice.

    Sending ends at a deadline, and so does reading the response, headers included.
    """

    _awaits_head, _head, _deadline = False, b"", 0.0
    response_class: Any

    def connect(self) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT  # of the request for a proxy's tunnel, and its response
        self._deadline, self.response_class = max(deadline, self._deadline), partial(TimedResponse, deadline=deadline)
        super().connect()

    def request(self, method: str, url: str, body: Any = None, *arguments: Any, **keywords: Any) -> None:
        self._awaits_head, self._head = body is not None, b""
        self._deadline = time.monotonic() + _seconds_for(len(body.getbuffer()) if body is not None else 0)
        super().request(method, url, body, *arguments, **keywords)

    def getresponse(self) -> Any:
        assert isinstance(self.timeout, float)  # what the pool has left of the attempt
        self.response_class = partial(TimedResponse, deadline=time.monotonic() + self.timeout)
        return super().getresponse()

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(min(CONNECT_TIMEOUT, seconds_left(self._deadline)))
        if self._awaits_head:
            self._awaits_head, self._head = False, data
        else:
            head, self._head = self._head, b""
            super().send(head + data if head else data)


class _TLSConnection(_Connection, HTTPSConnection):
    def send(self, data: Any) -> None:
        try:
            super().send(data)
        except ssl.SSLError as exc:
            raise ConnectionAbortedError(str(exc)) from exc


class Transport:
    """Send requests, without retries, over a pool of connections of this process."""

    def __init__(self, settings: Settings, connections: int) -> None:
        self._base, self._connections = settings.storage_url, connections
        self._proxies = dict(requests.utils.get_environ_proxies(self._base))
        proxy = requests.utils.select_proxy(self._base, self._proxies)
        #: Whether requests go through a proxy, which then resolves the host name.
        self.proxied = proxy is not None
        self._where = f"Storage at {self._base}"
        #: What to do when there is no response.
        self.hint_unreachable = "Check the network and NEXT_PUBLIC_SUPABASE_URL, then run the same command again."
        if proxy is not None:
            self._where += f", through the proxy {proxy.rpartition('@')[2]},"
            self.hint_unreachable = (
                "Check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, then run the same command again."
            )
        elif settings.environment == "embedded":
            self.hint_unreachable = f"Start it with `{command_line('up')}`."
        key = settings.key.reveal()
        # The gateway reads the key from `apikey`, the server from `Authorization`.
        credentials = {"apikey": key, "Authorization": f"Bearer {key}"}
        self._headers = {"User-Agent": "pipeline", "Accept-Encoding": "identity", **credentials}
        self._pool: Any = None
        self._prefix = ""
        self._pid = 0

    @contextmanager
    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        expected: int = 0,
    ) -> Iterator[Response]:
        """Send a request to a percent-encoded path; yield the response, of any status, to be read within the block.

        The attempt lasts READ_TIMEOUT, and longer for what is sent and for `expected` bytes of the response. Raises
        StorageUnavailable without a complete response, StorageError if the certificate or an address is not accepted or
        the server does not speak TLS, SettingsError if the file of certificates does not exist.
        """
        length = {} if body is None else {"Content-Length": str(len(body))}
        try:
            pool = self._open_pool()
            response = pool.urlopen(
                method,
                self._prefix + path,
                # urllib3 applies the connect timeout to each block of a file, but to bytes as a whole.
                io.BytesIO(body) if body else None,
                {**self._headers, **length, **(headers or {})},
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=urllib3.Timeout(total=_seconds_for(len(body or b"") + expected), connect=CONNECT_TIMEOUT),
                preload_content=False,
                decode_content=False,
            )
            try:
                yield response
            finally:
                if not response.closed:
                    response.close()  # the next request would read the rest of this body
                response.release_conn()
        except (ssl.SSLError, urllib3.exceptions.SSLError, urllib3.util.ssl_match_hostname.CertificateError) as exc:
            cause = _cause(exc)
            if _is_interrupted(cause):
                raise self._unreachable(exc) from exc
            is_certificate = isinstance(cause, ssl.SSLCertVerificationError)
            if isinstance(cause, ssl.SSLError) and cause.library == "SSL" and not is_certificate:
                raise StorageError(
                    f"There is no TLS connection to {self._base}: {cause.reason or cause}.",
                    "Check NEXT_PUBLIC_SUPABASE_URL: the server of an https address must speak TLS 1.2 or newer.",
                ) from exc
            raise StorageError(
                f"The TLS certificate of {self._base} is not accepted.",
                "Set REQUESTS_CA_BUNDLE to the authority's certificate.",
            ) from exc
        except urllib3.exceptions.LocationValueError:
            raise self._invalid() from None
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: BaseException) -> StorageUnavailable:
        cause = _cause(exc)
        what = "does not respond in time" if isinstance(cause, _TIMEOUTS) else "cannot be reached"
        return StorageUnavailable(f"{self._where} {what} ({type(cause).__name__}).", self.hint_unreachable)

    def _invalid(self) -> StorageError:
        """Return the error of an address; that of a library may contain parts of the password of a proxy."""
        if not self.proxied:
            return StorageError(f"{self._base} is not a valid address.", "Check NEXT_PUBLIC_SUPABASE_URL.")
        return StorageError(
            f"Storage at {self._base} cannot be asked through a proxy whose address is not valid.",
            "Check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY: percent-encode special characters in the password, and "
            "install PySocks for a SOCKS proxy.",
        )

    def close(self) -> None:
        """Close the connections of this process; a further request opens new ones."""
        if self._pool is not None and self._pid == os.getpid():
            self._pool.close()
        self._pool = None

    def _open_pool(self) -> Any:
        """Return the pool of this process; a pool inherited through a fork is not used."""
        if self._pool is None or self._pid != os.getpid():
            first = requests.PreparedRequest()
            first.url = self._base
            adapter = requests.adapters.HTTPAdapter(1, self._connections, pool_block=True)
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
            try:
                pool: Any = adapter.get_connection_with_tls_context(first, verify, proxies=self._proxies)
                adapter.cert_verify(pool, self._base, verify, None)  # type: ignore[no-untyped-call]
            except (ValueError, requests.exceptions.RequestException):
                raise self._invalid() from None
            except OSError as exc:
                raise SettingsError(f"{exc}.", "Set REQUESTS_CA_BUNDLE to a file of certificates.") from exc
            pool.conn_kw["blocksize"] = _BLOCK
            ours = _TLSConnection if isinstance(pool, urllib3.HTTPSConnectionPool) else _Connection
            pool.ConnectionCls = type("Connection", (ours, pool.ConnectionCls), {})  # through a SOCKS proxy, its own
            self._prefix = urllib3.util.parse_url(adapter.request_url(first, self._proxies)).url  # in ASCII
            self._pool, self._pid = pool, os.getpid()
        return self._pool


def _is_interrupted(error: BaseException) -> bool:
    """Return whether the handshake was closed by the server, as during a restart, or damaged on the way."""
    return isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) or (
        isinstance(error, ssl.SSLError) and error.reason in _INTERRUPTED
    )


def _cause(exc: BaseException) -> BaseException:
    """Return the innermost error, such as ConnectionRefusedError."""
    inner = [getattr(exc, "original_error", None), *exc.args, exc.__cause__]
    return next((_cause(one) for one in inner if isinstance(one, BaseException) and one is not exc), exc)

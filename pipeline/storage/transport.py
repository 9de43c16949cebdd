"""HTTP to the Storage API: urllib3's pool, reached the way that requests would take.

requests reads proxies and certificates from the environment as users expect it. urllib3 sends, without redirects and
retries: whether to try again is decided by the error code of the API, in `client`.
"""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import requests
import requests.adapters
import requests.utils
import urllib3
import urllib3.connection
import urllib3.exceptions
import urllib3.util
from urllib3.response import BaseHTTPResponse as Response

from pipeline.config import Settings, redact
from pipeline.errors import SettingsError, StorageError, StorageUnavailable

#: Seconds to connect, with the TLS handshake; and for each further million bytes of a body to be sent.
CONNECT_TIMEOUT = 10.0
#: Seconds between two bytes of a response.
READ_TIMEOUT = 60.0


class _SendsLongBodies:
    """A connection whose time limit for sending grows with the body; urllib3 applies that of connecting to both."""

    sock: Any
    timeout: float | None

    def request(self, method: str, url: str, body: Any = None, *arguments: Any, **keywords: Any) -> None:
        """Connect, then send."""
        if self.sock is None:
            self.connect()  # type: ignore[attr-defined]
        self.timeout = READ_TIMEOUT * (1 + (len(body) >> 20 if body else 0))
        super().request(method, url, body, *arguments, **keywords)  # type: ignore[misc]


class _Connection(_SendsLongBodies, urllib3.connection.HTTPConnection):
    pass


class _SecureConnection(_SendsLongBodies, urllib3.connection.HTTPSConnection):
    pass


class Transport:
    """Send requests over the connections of this process; nothing is tried again.

    Arguments:
        connections: requests that may be in flight at once; a further one waits.
    """

    def __init__(self, settings: Settings, connections: int) -> None:
        self._base = settings.storage_url
        self._is_embedded = settings.environment == "embedded"
        self._connections = connections
        key = settings.key.reveal()
        # Both headers carry the key: the gateway reads `apikey`, the server reads `Authorization`.
        self._headers = {
            "User-Agent": "pipeline",
            "Accept-Encoding": "identity",
            "apikey": key,
            "Authorization": f"Bearer {key}",
        }
        self._pool: Any = None
        self._prefix = ""
        self._pid = 0

    @property
    def proxied(self) -> bool:
        """Return whether a proxy carries the requests, and so resolves host names."""
        return requests.utils.select_proxy(self._base, self._proxies) is not None

    @cached_property
    def _proxies(self) -> dict[str, str]:
        return dict(requests.utils.get_environ_proxies(self._base))

    @contextmanager
    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Response]:
        """Send a request; yield the response, of any status, to be read within the block.

        Arguments:
            path: below the API's address, percent-encoded.

        Raises:
            StorageUnavailable: no connection, no response, or a part of one.
            StorageError: the server's certificate is not accepted, or the address cannot be used.
            SettingsError: the file of certificates does not exist.
        """
        try:
            pool = self._open_pool()
            response = pool.urlopen(
                method,
                self._prefix + path,
                body,
                {**self._headers, **(headers or {})},
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT),
                preload_content=False,
                decode_content=False,
            )
            try:
                yield response
            finally:
                if not response.closed:
                    response.close()  # what is left of the body would be taken for the next response
                response.release_conn()
        except (ssl.SSLError, urllib3.exceptions.SSLError, urllib3.util.ssl_match_hostname.CertificateError) as exc:
            if _is_interrupted(_cause(exc)):
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
        """Return what to do when there is no response."""
        if self._is_embedded:
            return "Start it with `python -m pipeline up`."
        return "Check the network and NEXT_PUBLIC_SUPABASE_URL, then run the same command again."

    def close(self) -> None:
        """Close the connections of this process; a further request opens new ones."""
        if self._pool is not None and self._pid == os.getpid():
            self._pool.close()
        self._pool = None

    def _open_pool(self) -> Any:
        """Return the pool of this process; one that was inherited through a fork is not used."""
        if self._pool is None or self._pid != os.getpid():
            first = requests.PreparedRequest()
            first.url = self._base
            adapter = requests.adapters.HTTPAdapter(1, self._connections, pool_block=True)
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
            pool: Any = adapter.get_connection_with_tls_context(first, verify, proxies=self._proxies)
            try:
                adapter.cert_verify(pool, self._base, verify, None)  # type: ignore[no-untyped-call]
            except OSError as exc:
                raise SettingsError(f"{exc}.", "Set REQUESTS_CA_BUNDLE to a file of certificates.") from exc
            pool.ConnectionCls = _SecureConnection if pool.scheme == "https" else _Connection
            self._prefix = urllib3.util.parse_url(adapter.request_url(first, self._proxies)).url  # in ASCII
            self._pool, self._pid = pool, os.getpid()
        return self._pool


def _is_interrupted(error: BaseException) -> bool:
    """Return whether the server broke a handshake off, as one that is about to restart does."""
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

"""The wire to the Storage API: a connection for each thread, and what can go wrong on it.

requests knows the way (proxies, certificates), urllib3 below it carries the requests: a session of requests takes
0.7 ms of processor time for an upload, its adapter 0.4, this less than 0.3.
"""

from __future__ import annotations

import os
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

from pipeline.config import Settings, redact
from pipeline.errors import SettingsError, StorageError, StorageUnavailable

#: Seconds.
CONNECT_TIMEOUT = 10.0
#: Seconds between two bytes of an answer.
READ_TIMEOUT = 60.0

Answer = urllib3.BaseHTTPResponse


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
        self._adapters: list[requests.adapters.HTTPAdapter] = []

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
            pool, prefix = self._way()
            answer = pool.urlopen(
                method,
                prefix + path,
                body,
                {**self._headers, **(headers or {})},
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT),
                preload_content=False,
            )
            with closing(answer):
                yield answer
        except urllib3.exceptions.SSLError as exc:
            if _is_cut(_cause(exc)):
                raise self._unreachable(exc) from exc
            raise StorageError(
                f"The TLS certificate of {self._base} is not accepted.",
                "Set REQUESTS_CA_BUNDLE to the authority's certificate.",
            ) from exc
        except (urllib3.exceptions.LocationValueError, requests.exceptions.RequestException) as exc:
            raise StorageError(f"Storage cannot be asked: {redact(str(exc))}", "Check the settings.") from exc
        except urllib3.exceptions.HTTPError as exc:
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
        """Close the connections of all threads."""
        with self._lock:
            for adapter in self._adapters:
                adapter.close()
            self._adapters.clear()

    def _way(self) -> tuple[Any, str]:
        """Return this thread's pool, of one connection, and what a path is put behind: more where a proxy is asked."""
        if getattr(self._local, "pid", None) != os.getpid():
            adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=1)
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
            first = requests.PreparedRequest()
            first.url = self._base
            pool = adapter.get_connection_with_tls_context(first, verify, proxies=self._proxies)
            try:
                adapter.cert_verify(pool, self._base, verify, None)  # type: ignore[no-untyped-call]
            except OSError as exc:
                raise SettingsError(
                    f"{exc}.", "Set REQUESTS_CA_BUNDLE to a file of certificates, or unset it."
                ) from exc
            self._local.way, self._local.pid = (pool, adapter.request_url(first, self._proxies)), os.getpid()
            with self._lock:
                self._adapters.append(adapter)
        return self._local.way  # type: ignore[no-any-return]


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

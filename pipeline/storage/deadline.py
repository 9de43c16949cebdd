"""HTTP responses that end by a deadline: the timeout of a socket begins anew with each byte that arrives."""

from __future__ import annotations

import http.client
import io
import ssl
import time
import urllib.request
from functools import cache, partial
from typing import Any


def seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline; raise TimeoutError after it."""
    if (seconds := deadline - time.monotonic()) > 0:
        return seconds
    raise TimeoutError("timed out")


class _TimedReader(io.RawIOBase):
    """Read from a socket until a deadline."""

    def __init__(self, sock: Any, raw: Any, deadline: float) -> None:
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        self._sock.settimeout(seconds_left(self._deadline))
        try:
            return self._raw.readinto(buffer)
        except ssl.SSLError as exc:  # after the handshake, it is no question of certificates or versions
            raise ConnectionAbortedError(str(exc)) from exc

    def close(self) -> None:
        self._raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """A response whose headers and body are read until a deadline."""

    def __init__(self, sock: Any, *arguments: Any, deadline: float, **keywords: Any) -> None:
        super().__init__(sock, *arguments, **keywords)
        self.fp = io.BufferedReader(_TimedReader(sock, self.fp.detach(), deadline))


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPRedirectHandler):
    """Read a response until its deadline. A redirect is an HTTPError: urllib would read all of its body."""

    def do_open(self, http_class: Any, req: urllib.request.Request, **arguments: Any) -> Any:
        deadline = time.monotonic() + float(req.timeout or 0)

        def connect(*where: Any, **how: Any) -> Any:
            connection = http_class(*where, **how)
            connection.response_class = partial(TimedResponse, deadline=deadline)
            return connection

        return super().do_open(connect, req, **arguments)

    def redirect_request(self, *_: Any) -> None:
        return None


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Handler)  # which may load the certificates of the system


def open_url(url: str, body: bytes | None, seconds: float) -> Any:
    """Open a URL as `urllib.request.urlopen` does, but let its response end within so many seconds.

    Raises OSError, ValueError or http.client.HTTPException.
    """
    return _opener().open(url, body, seconds)

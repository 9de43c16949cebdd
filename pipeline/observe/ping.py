"""Tell a monitor of scheduled jobs when a command begins and how it ends, by the protocol of healthchecks.io.

`<url>/start`, then `<url>` after a success or `<url>/<exit code>` after anything else, each a POST; the second one
carries the end of the log (https://healthchecks.io/docs/http_api/). A ping delays a command by a few seconds at most,
and never makes it fail.
"""

from __future__ import annotations

import logging
import threading
import time
from urllib.parse import urlsplit

import requests

from pipeline.config import Secret

logger = logging.getLogger(__name__)

#: The name of a thread that sends a ping.
PING = "ping"
#: Most of a log that the monitor is sent; what it takes is at least that.
BODY_BYTES = 10_000
#: How long a command waits for the monitor, at its begin and at its end. The first request goes on afterwards.
_START_SECONDS, _END_SECONDS = 1.0, 5.0
#: Of one attempt, to connect and to wait for the response; an end that was lost would be a false alarm.
_TIMEOUT = (3.0, 3.0)
_ATTEMPTS = 3
_HEADERS = {"User-Agent": "pipeline"}
_PAUSE_SECONDS = 0.5


def is_usable(url: Secret) -> bool:
    """Return whether a text is a URL of HTTP."""
    try:
        parts = urlsplit(url.reveal())
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class Ping:
    """The pings of one run of a command; one that the monitor does not take is a warning."""

    def __init__(self, url: Secret) -> None:
        self._url = url
        self._last: threading.Thread | None = None

    def start(self) -> None:
        """Report the begin."""
        self._send("/start", "", _START_SECONDS)

    def finish(self, code: int, text: str) -> None:
        """Report the exit code, with the end of a text."""
        if not self._send(f"/{code}" if code else "", text, _END_SECONDS):
            logger.warning("The monitor of PING_URL did not respond within %.0f s.", _END_SECONDS)

    def _send(self, suffix: str, text: str, seconds: float) -> bool:
        """Send a ping after the one before it; return whether it ended within so many seconds."""
        if not is_usable(self._url):
            logger.warning("PING_URL is not a URL such as https://hc-ping.com/<uuid>: nothing is pinged.")
            return True
        parts = urlsplit(self._url.reveal())
        url = parts._replace(path=parts.path.rstrip("/") + suffix, fragment="").geturl()
        body = text.encode(errors="backslashreplace")[-BODY_BYTES:].decode(errors="ignore").encode()
        thread = threading.Thread(target=_post, args=(url, body, self._last), name=PING, daemon=True)
        self._last = thread
        thread.start()
        thread.join(seconds)
        return not thread.is_alive()


def _post(url: str, body: bytes, earlier: threading.Thread | None) -> None:
    """Send a request after an earlier one, a few times if need be."""
    failure = ""
    if earlier is not None:
        earlier.join(_TIMEOUT[0])
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE_SECONDS if attempt else 0)
        try:
            with requests.post(url, body, timeout=_TIMEOUT, headers=_HEADERS, stream=True) as response:
                failure = "" if response.ok else f"responded with status {response.status_code}"
                if response.status_code < 500:
                    break
        except (OSError, ValueError) as exc:
            # Only a plain one, as of a wrong REQUESTS_CA_BUNDLE, has a message without the URL.
            failure = f"cannot be reached ({exc if type(exc) is OSError else type(exc).__name__})"
    if failure:
        logger.warning("The monitor of PING_URL %s.", failure)

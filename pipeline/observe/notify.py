"""Send notifications with apprise, the extra `[notify]`, to the URLs of NOTIFY_URLS."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from contextlib import suppress
from typing import Any

from pipeline.config import Secret

logger = logging.getLogger(__name__)

#: Without a time limit of its own, apprise starts no thread that Python would wait for.
_ASSET: dict[str, Any] = {"async_mode": False, "service_timeout": 0, "allow_templates": False, "body_format": "text"}
#: How long a command waits for all of them at its end.
_SECONDS = 15.0


def is_installed() -> bool:
    """Return whether apprise is installed."""
    return importlib.util.find_spec("apprise") is not None


def read_services(urls: Secret) -> tuple[list[Any], int]:
    """Return the services of apprise that URLs name, and how many entries are none."""
    import apprise  # imported here because few commands have something to tell
    from apprise.utils.parse import parse_urls

    logging.getLogger(apprise.LOGGER_NAME).setLevel(logging.CRITICAL + 1)  # its messages contain parts of the URLs
    asset = apprise.AppriseAsset(app_id="pipeline", app_desc="", app_url="", **_ASSET)
    services, unknown = [], 0
    for url in parse_urls(urls.reveal()):  # type: ignore[no-untyped-call]
        service = apprise.Apprise(asset=asset)
        if service.add(url):
            services.append(service)
        else:
            unknown += 1
    return services, unknown


def notify(urls: Secret, title: str, body: str, *, good: bool) -> bool:
    """Send a text to every URL at once, within seconds; return whether at least one service took it."""
    services, unknown = read_services(urls)
    if unknown:
        logger.warning("%d of NOTIFY_URLS cannot be used by apprise.", unknown)
    taken: list[bool] = []

    def send(service: Any) -> None:
        with suppress(Exception):  # a plugin may raise anything, with the URL in its message
            taken.append(bool(service.notify(body=body, title=title, notify_type="success" if good else "failure")))

    threads = [threading.Thread(target=send, args=(one,), name="notify", daemon=True) for one in services]
    deadline = time.monotonic() + _SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failed := len(services) - sum(taken):
        logger.warning("%d of %d notifications were not taken within %.0f s.", failed, len(services), _SECONDS)
    return any(taken)

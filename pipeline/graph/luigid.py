"""Luigi's configuration, luigid, and calls of it whose loss does no harm: one attempt each, with a short timeout."""

from __future__ import annotations

import configparser
import http.client
import json
import logging
import time
import urllib.parse
import urllib.request
from importlib import resources
from typing import Any

import luigi.interface
from luigi.rpc import RemoteScheduler

from pipeline.config import redact
from pipeline.observe.progress import StatusMessage

logger = logging.getLogger(__name__)

_STATUS_SECONDS, _CALL_SECONDS, _PAUSE_SECONDS = 1.0, 3.0, 30.0
_MARKUP = str.maketrans("<>&", "‹›+")  # the visualiser would interpret these characters as HTML


def use_packaged_settings() -> None:
    """Let Luigi use the packaged luigi.cfg where the user's has nothing: by default most failures exit with 0."""
    packaged = configparser.ConfigParser(interpolation=None)
    packaged.read_string(resources.files("pipeline.graph").joinpath("luigi.cfg").read_text(encoding="utf-8"))
    packaged.remove_option("core", "scheduler_url")  # it would win over a `scheduler_host` of the user
    configuration = luigi.configuration.get_config()
    for section in ("core", "worker", "execution_summary", "retcode"):
        for option, value in packaged.items(section):
            if not configuration.has_option(section, option):
                configuration.set(section, option, value)
    # Luigi reads these two without its parameter classes, and would warn that they are unused.
    luigi.interface.core.ignore_unconsumed |= {"rpc_retry_attempts", "rpc_retry_wait"}


def scheduler_url() -> str:
    """Return the address of luigid, as Luigi's configuration has it."""
    core = luigi.interface.core()
    return core.scheduler_url or f"http://{core.scheduler_host}:{core.scheduler_port}/"


class LuigidUnavailable(Exception):
    """luigid does not answer, or the server at its address is not a luigid."""


def answers(url: str) -> bool:
    """Return whether a luigid answers at the URL within a second."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=1) as response:
            return bool(response.status < 400)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def call(url: str, function: str, timeout: float = _CALL_SECONDS, **arguments: Any) -> Any:
    """Call a function of luigid's HTTP API (luigi.server) and return its response; raises LuigidUnavailable."""
    body = urllib.parse.urlencode({"data": json.dumps(arguments)}).encode()
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/{function}", body, timeout) as response:
            return json.load(response)["response"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as exc:
        raise LuigidUnavailable(f"{url}: {exc}") from exc


class SharedScheduler(RemoteScheduler):
    """luigid with the retries of Luigi's configuration, except for a ping."""

    def ping(self, **arguments: Any) -> Any:
        """Report that the worker is alive; Luigi would retry for a minute, and block every fork meanwhile."""
        try:
            return call(scheduler_url(), "ping", **arguments)
        except LuigidUnavailable as exc:
            logger.info("luigid did not take a ping: %s", exc)
            return None


class StatusReporter:
    """Set status messages in luigid, but pause after a failed call; Luigi's own functions would fail the task."""

    def __init__(self, url: str) -> None:
        self._url, self._paused_until = url, 0.0

    def report(self, task_id: str, report: StatusMessage) -> None:
        """Set the status message of a task, and its progress in percent where that is known."""
        if time.monotonic() < self._paused_until:
            return
        text, done = redact(report[0]).translate(_MARKUP), report[1]
        task: dict[str, Any] = {"timeout": _STATUS_SECONDS, "task_id": task_id}
        try:
            call(self._url, "set_task_status_message", **task, status_message=text)
            if done is not None:
                call(self._url, "set_task_progress_percentage", **task, progress_percentage=done)
        except LuigidUnavailable as exc:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            logger.info("luigid did not take a status message: %s", exc)


def percent(done: int, total: int) -> int | None:
    """Return how much is done in percent, None where the total is not known."""
    return min(100, done * 100 // total) if total else None

"""Luigi's configuration, and calls of luigid: each has a deadline, those whose loss does no harm a short one."""

from __future__ import annotations

import configparser
import http.client
import json
import logging
import os
import queue
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import luigi.interface
from luigi.execution_summary import execution_summary
from luigi.retcodes import retcode
from luigi.rpc import RemoteScheduler, RPCError
from luigi.scheduler import scheduler
from luigi.worker import worker

from pipeline.config import redact
from pipeline.errors import SettingsError
from pipeline.observe.progress import StatusMessage

logger = logging.getLogger(__name__)

Response = TypeVar("Response")

_STATUS_SECONDS, _CALL_SECONDS, _PAUSE_SECONDS = 1.0, 3.0, 30.0
#: For an attempt; for how long luigid may be silent before a run ends, unless Luigi's own retries would take less.
_ATTEMPT_SECONDS, _SILENT_SECONDS = 10.0, 60.0
#: What Luigi reads without its parameter classes, and would warn about as unused.
_RPC = {
    "rpc_retry_attempts": luigi.NumericalParameter(var_type=int, min_value=0, max_value=10_000),
    "rpc_retry_wait": luigi.NumericalParameter(var_type=int, min_value=0, max_value=10_000),
    "rpc_connect_timeout": luigi.FloatParameter(default=10.0),
    "rpc_log_retries": luigi.BoolParameter(default=True),
}
_MARKUP = str.maketrans("<>&", "‹›+")  # the visualiser would interpret these characters as HTML


def use_packaged_settings() -> None:
    """Let Luigi use the packaged luigi.cfg where the user's has nothing: by default most failures exit with 0.

    Raises SettingsError if a value of a section that Luigi reads is malformed, or if it does not read a luigi.toml.
    """
    if "LUIGI_CONFIG_PARSER" not in os.environ and Path("luigi.toml").is_file():
        hint = "Set LUIGI_CONFIG_PARSER=toml; or cfg, if luigi.cfg is meant."
        raise SettingsError("Luigi does not read the luigi.toml in this folder.", hint)
    packaged = configparser.ConfigParser(interpolation=None)
    packaged.read_string(resources.files("pipeline.graph").joinpath("luigi.cfg").read_text(encoding="utf-8"))
    packaged.remove_option("core", "scheduler_url")  # it would win over a `scheduler_host` of the user
    configuration = luigi.configuration.get_config()
    for section in ("core", "worker", "execution_summary", "retcode"):
        for option, value in packaged.items(section):
            if not configuration.has_option(section, option):
                configuration.set(section, option, value)
    luigi.interface.core.ignore_unconsumed |= set(_RPC)
    for settings in (luigi.interface.core, worker, retcode, execution_summary, scheduler):
        section = settings.get_task_family()  # type: ignore[no-untyped-call]
        known = settings.get_params()  # type: ignore[no-untyped-call]
        for option, parameter in [*known, *(_RPC.items() if section == "core" else ())]:
            try:
                parameter.task_value(section, option)
            except (ValueError, TypeError, configparser.Error) as exc:
                message = f"Luigi's configuration has a wrong value of {option} in [{section}]: {exc.__cause__ or exc}."
                raise SettingsError(" ".join(message.split()), "Correct it there, or remove it.") from exc


def scheduler_url() -> str:
    """Return the address of luigid, as Luigi's configuration has it."""
    core = luigi.interface.core()
    return core.scheduler_url or f"http://{core.scheduler_host}:{core.scheduler_port}/"


class LuigidUnavailable(Exception):
    """luigid does not answer, or the server at its address is not a luigid."""


def _within(seconds: float, exchange: Callable[[float], Response]) -> Response:
    """Return what an exchange with luigid returns, called with its timeout; raise LuigidUnavailable.

    A timeout of a socket is for each read, and looking up a host has none, so a thread waits in place of the caller.
    """
    outcome: queue.SimpleQueue[Response | LuigidUnavailable] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put(exchange(seconds))
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as exc:
            outcome.put(LuigidUnavailable(str(exc) or type(exc).__name__))

    threading.Thread(target=work, name="luigid", daemon=True).start()
    try:
        result = outcome.get(timeout=seconds)
    except queue.Empty:
        raise LuigidUnavailable(f"no response within {seconds:.0f} s") from None
    if isinstance(result, LuigidUnavailable):
        raise result
    return result


def answers(url: str) -> bool:
    """Return whether a luigid answers at the URL within a second."""

    def ask(timeout: float) -> bool:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as response:
            return bool(response.status < 400)

    try:
        return _within(1.0, ask)
    except LuigidUnavailable:
        return False


def call(url: str, function: str, timeout: float = _CALL_SECONDS, **arguments: Any) -> Any:
    """Call a function of luigid's HTTP API (luigi.server) and return its response; raises LuigidUnavailable."""
    body = urllib.parse.urlencode({"data": json.dumps(arguments)}).encode()

    def ask(timeout: float) -> Any:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/{function}", body, timeout) as response:
            return json.load(response)["response"]

    try:
        return _within(timeout, ask)
    except LuigidUnavailable as exc:
        raise LuigidUnavailable(f"{url}: {exc}") from exc


class SharedScheduler(RemoteScheduler):
    """luigid; calls are repeated until it has been silent for a minute, a ping is not."""

    def __init__(self, url: str) -> None:
        super().__init__(url)  # type: ignore[no-untyped-call]
        self._address = url.rstrip("/")
        self._pause, attempts = (_RPC[one].task_value("core", one) for one in ("rpc_retry_wait", "rpc_retry_attempts"))
        self._patience = min(_SILENT_SECONDS, self._pause * attempts)
        self._silent_since: float | None = None

    def _fetch(self, url_suffix: str, body: Any) -> str:
        """Send a request in place of Luigi, which counts its attempts, whatever time each takes."""
        url = self._address + url_suffix
        while True:
            began = time.monotonic()
            self._silent_since = began if self._silent_since is None else self._silent_since
            left = self._silent_since + self._patience - began
            try:
                text = _within(max(1.0, min(_ATTEMPT_SECONDS, left)), lambda timeout: self._post(url, body, timeout))
            except LuigidUnavailable as exc:
                if time.monotonic() + self._pause > self._silent_since + self._patience:
                    silent = time.monotonic() - self._silent_since
                    message = f"{self._address} has not responded for {silent:.0f} s ({exc})"
                    raise RPCError(message, exc) from exc
                logger.info("luigid at %s does not respond: %s", self._address, exc)
                time.sleep(self._pause)
            else:
                self._silent_since = None
                return text

    def _post(self, url: str, body: Any, timeout: float) -> str:
        text = str(self._fetcher.fetch(url, body, timeout))
        json.loads(text)["response"]  # of luigid, and not of another server
        return text

    def ping(self, **arguments: Any) -> Any:
        """Report that the worker is alive; a retry would block every fork meanwhile."""
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

"""Luigi's configuration, and calls of luigid: each has a deadline, those whose loss does no harm a short one."""

from __future__ import annotations

import configparser
import http.client
import json
import logging
import os
import time
import urllib.parse
from importlib import resources
from pathlib import Path
from typing import Any

import luigi.interface
import tenacity
from luigi.cmdline_parser import CmdlineParser
from luigi.execution_summary import execution_summary
from luigi.retcodes import retcode
from luigi.rpc import RemoteScheduler, RPCError
from luigi.scheduler import scheduler
from luigi.setup_logging import InterfaceLogging
from luigi.worker import worker

from pipeline.config import redact
from pipeline.errors import SettingsError
from pipeline.observe.logger import say
from pipeline.observe.progress import StatusMessage
from pipeline.storage.deadline import open_url
from pipeline.units import size

logger = logging.getLogger(__name__)

_STATUS_SECONDS, _CALL_SECONDS, _PAUSE_SECONDS = 1.0, 3.0, 30.0
#: For how long luigid may be silent before a run ends, unless Luigi's own retries end earlier.
_SILENT_SECONDS = 60.0
#: Most bytes of a response: of a list of all tasks, and of the response that shows whether this is a luigid.
_MOST_BYTES, _MOST_PROOF_BYTES = 1 << 24, 1 << 16
#: Of a call: luigid cannot be reached, or another server answers.
_FAILURES = (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException)
#: What Luigi reads without its parameter classes, and warns about as unused wherever luigi.cfg has it; luigid may
#: restart in the middle of a run, so the defaults are ours.
_RPC: dict[str, Any] = {
    "rpc_retry_attempts": luigi.NumericalParameter(default=30, var_type=int, min_value=0, max_value=10_000),
    "rpc_retry_wait": luigi.NumericalParameter(default=2, var_type=int, min_value=0, max_value=10_000),
    "rpc_connect_timeout": luigi.FloatParameter(default=10.0),
    "rpc_log_retries": luigi.BoolParameter(default=True),
}
_MARKUP = str.maketrans("<>&", "‹›+")  # the visualiser would interpret these characters as HTML


def choose_parser(*, late: bool = False) -> None:
    """Let Luigi read the luigi.toml of this folder where there is no luigi.cfg, or the one in LUIGI_CONFIG_PATH.

    Raises SettingsError if both are there, if the file cannot be read, or if Luigi has read its own settings before
    (`late`).
    """
    if "LUIGI_CONFIG_PARSER" in os.environ:
        return
    named = Path(os.environ.get("LUIGI_CONFIG_PATH", ""))
    if named.suffix != ".toml" and not os.path.isfile("luigi.toml"):
        return
    if late or os.path.isfile("luigi.cfg"):
        which = named if named.suffix == ".toml" else "the luigi.toml in this folder"
        hint = "Set LUIGI_CONFIG_PARSER=toml; or cfg, if luigi.cfg is meant."
        raise SettingsError(f"Luigi does not read {which}.", hint)
    os.environ["LUIGI_CONFIG_PARSER"] = "toml"
    try:
        InterfaceLogging.config = luigi.configuration.get_config()  # it has the other parser from its import on
    except (ValueError, TypeError, AttributeError, LookupError) as exc:  # of the file, or of Luigi about it
        message = f"Luigi's configuration luigi.toml cannot be read: {exc}."
        raise SettingsError(" ".join(message.split()), "Correct it: each section once, then `name = value`.") from exc


def read_again() -> None:
    """Let Luigi read its configuration once more, whose file may be new."""
    luigi.configuration.get_config().reload()


def use_packaged_settings() -> None:
    """Let Luigi use the packaged luigi.cfg where the user's has nothing: by default most failures exit with 0.

    Raises SettingsError if a value of a section that Luigi reads is malformed, or a luigi.toml would be passed over.
    """
    packaged = configparser.ConfigParser(interpolation=None)
    packaged.read_string(resources.files("pipeline.graph").joinpath("luigi.cfg").read_text(encoding="utf-8"))
    for option in ("scheduler_host", "scheduler_port"):  # the user's file may have their former names
        packaged.remove_option("core", option)
    for choose in (choose_parser, None):  # the exit code of its error is a packaged one
        configuration = luigi.configuration.get_config()
        for section in ("core", "worker", "execution_summary", "retcode"):
            for option, value in packaged.items(section):
                if not configuration.has_option(section, option):
                    configuration.set(section, option, value)
        if choose is not None:
            choose()
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
    if typed("take_lock"):
        hint = "Stop the other run with SIGTERM; another run of a batch waits, or is refused."
        raise SettingsError("--take-lock would do nothing: the lock of a batch is in the database.", hint)
    if luigi.interface.core().logging_conf_file and configuration.getboolean("core", "no_configure_logging"):
        hint = "Leave it out; or set `no_configure_logging = false` in [core], and redact keys and passwords yourself."
        raise SettingsError("The file of logging_conf_file would not be used: the pipeline configures logging.", hint)


def typed(option: str) -> Any:
    """Return the value of an option of Luigi's section [core] on the command line of Luigi's command, else None."""
    parser = CmdlineParser.get_instance()
    return getattr(parser.known_args, f"core_{option}", None) if parser is not None else None


def scheduler_url() -> str:
    """Return the address of luigid: of the command line, where it names one, else of Luigi's configuration."""
    core = luigi.interface.core()
    by_host = typed("scheduler_host") or typed("scheduler_port")  # Luigi prefers a URL of its file
    url = typed("scheduler_url") if by_host else core.scheduler_url
    return url or f"http://{core.scheduler_host}:{core.scheduler_port}/"


class LuigidUnavailable(Exception):
    """luigid does not answer, or the server at its address is not a luigid."""


def answers(url: str) -> bool:
    """Return whether a luigid answers at the URL within a second."""
    try:
        call(url, "is_paused", 1.0, _MOST_PROOF_BYTES)
    except LuigidUnavailable:
        return False
    return True


def call(url: str, function: str, timeout: float = _CALL_SECONDS, most: int = _MOST_BYTES, **arguments: Any) -> Any:
    """Call a function of luigid's HTTP API (luigi.server) and return its response; raises LuigidUnavailable.

    The response ends before the timeout, and has so many bytes at most.
    """
    body = urllib.parse.urlencode({"data": json.dumps(arguments)}).encode()
    try:
        with open_url(f"{url.rstrip('/')}/api/{function}", body, timeout) as response:
            reply = response.read(most + 1)
        if len(reply) > most:
            raise ValueError(f"more than {size(most)}")
        return json.loads(reply)["response"]
    except _FAILURES as exc:
        raise LuigidUnavailable(f"{url}: {exc or type(exc).__name__}") from exc


class SharedScheduler(RemoteScheduler):
    """luigid; a call is repeated for a minute at most, a ping is not."""

    def __init__(self, url: str) -> None:
        super().__init__(url)  # type: ignore[no-untyped-call]
        self._address = url.rstrip("/")
        attempts, wait, self._timeout, _ = (parameter.task_value("core", name) for name, parameter in _RPC.items())
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts) | tenacity.stop_before_delay(_SILENT_SECONDS),
            wait=tenacity.wait_fixed(wait),
            retry=tenacity.retry_if_exception_type(LuigidUnavailable),
            before_sleep=tenacity.before_sleep_log(logger, logging.INFO),
            reraise=True,
        )

    def _request(self, url: Any, data: Any, attempts: int = 1, allow_null: bool = True) -> Any:
        """Call a function in place of Luigi, which counts its attempts, whatever time each takes."""
        began = time.monotonic()
        try:
            return self._retrying(call, self._address, url.rpartition("/")[2], self._timeout, **data)
        except LuigidUnavailable as exc:
            message = f"{self._address} has not responded for {time.monotonic() - began:.0f} s ({exc.__cause__})"
            raise RPCError(message, exc) from exc

    def ping(self, **arguments: Any) -> Any:
        """Report that the worker is alive; a retry would block every fork meanwhile."""
        try:
            return call(self._address, "ping", **arguments)
        except LuigidUnavailable as exc:
            logger.info("luigid did not take a ping: %s", exc)
            return None


def join(url: str, project: str) -> SharedScheduler:
    """Return the luigid at an address, and say that the run uses it."""
    announce(url, project)
    return SharedScheduler(url)


def announce(url: str, project: str) -> None:
    """Say which luigid a run uses, and what it calls the project."""
    say(f"Scheduler: luigid at {url}, where this project is {project}", logging.INFO)


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

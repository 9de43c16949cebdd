"""Luigi's configuration, and calls of luigid whose loss does no harm: one attempt each, with a short timeout.

luigid takes a POST of `data`, a JSON object of arguments, at `/api/<function>`, and returns a JSON object with
`response` (https://luigi.readthedocs.io, luigi.rpc and luigi.server).
"""

from __future__ import annotations

import configparser
import http.client
import json
import urllib.parse
import urllib.request
from importlib import resources
from typing import Any

import luigi.interface

#: Sections of the packaged luigi.cfg that concern a worker.
_SECTIONS = ("core", "worker", "execution_summary", "retcode")


class LuigidUnavailable(Exception):
    """luigid does not answer, or the server at its address is not a luigid."""


def use_packaged_settings() -> None:
    """Let Luigi use the settings of the packaged luigi.cfg where the user's configuration has none.

    Without them Luigi reports most failures with exit code 0, and takes a task without its marker for done.
    """
    packaged = configparser.ConfigParser(interpolation=None)
    packaged.read_string(resources.files("pipeline.graph").joinpath("luigi.cfg").read_text(encoding="utf-8"))
    packaged.remove_option("core", "scheduler_url")  # it would win over a `scheduler_host` of the user
    configuration = luigi.configuration.get_config()
    for section in _SECTIONS:
        for option, value in packaged.items(section):
            if not configuration.has_option(section, option):
                configuration.set(section, option, value)
    # Luigi reads these two past its own parameters, and would warn that nobody does.
    luigi.interface.core.ignore_unconsumed |= {"rpc_retry_attempts", "rpc_retry_wait"}


def scheduler_url() -> str:
    """Return the address of luigid, as Luigi's configuration has it."""
    core = luigi.interface.core()
    return core.scheduler_url or f"http://{core.scheduler_host}:{core.scheduler_port}/"


def answers(url: str) -> bool:
    """Return whether a luigid answers at the URL within a second."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=1) as response:
            return bool(response.status < 400)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def call(url: str, function: str, timeout: float, **arguments: Any) -> Any:
    """Call a function of luigid and return its response.

    Raises:
        LuigidUnavailable: it does not answer within the timeout, or not with JSON.
    """
    body = urllib.parse.urlencode({"data": json.dumps(arguments)}).encode()
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/{function}", body, timeout) as response:
            return json.load(response)["response"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as exc:
        raise LuigidUnavailable(f"{url}: {exc}") from exc

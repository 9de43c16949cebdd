"""Calls of luigid whose loss does no harm: one attempt each, with a short timeout.

luigid takes a POST of `data`, a JSON object of arguments, at `/api/<function>`, and returns a JSON object with
`response` (https://luigi.readthedocs.io, luigi.rpc and luigi.server).
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
import urllib.request
import warnings
from typing import Any

import luigi.interface
import luigi.parameter


class LuigidUnavailable(Exception):
    """luigid does not answer, or the server at its address is not a luigid."""


def scheduler_url() -> str:
    """Return the address of luigid, as Luigi's configuration has it."""
    with warnings.catch_warnings():
        # The section has settings that luigi.rpc reads past this class.
        warnings.simplefilter("ignore", luigi.parameter.UnconsumedParameterWarning)
        core = luigi.interface.core()
    return core.scheduler_url or f"http://{core.scheduler_host}:{core.scheduler_port}/"


def answers(url: str, timeout: float = 1.0) -> bool:
    """Return whether a luigid answers at the URL."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as response:
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

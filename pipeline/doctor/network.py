"""The network to a service: its name, its addresses of both families, and its connection times."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.config import command_line
from pipeline.doctor.finding import Finding, ok, problem, warning
from pipeline.errors import AccessDenied, TransientError

SAMPLES = 5
CONNECT_SECONDS = 3.0
#: Median response time in milliseconds above which the network bounds a load.
SLOW_MS = 200.0
_TRIED = 2  # addresses of a family

_CHECK = "Check that it runs there, and that no firewall blocks the connection."
_POOLER = (
    "Use the session pooler's address from Connect in the Supabase dashboard (…pooler.supabase.com:5432), which has an "
    "IPv4 address, or buy the IPv4 add-on."
)


@dataclass(frozen=True)
class Route:
    """The connections to a service over one address family.

    Attributes:
        family: `IPv4`, `IPv6` or `Unix socket`.
        seconds: connection times; empty if there was no connection.
        error: why a connection failed.
        silent: the connection timed out without a response.
    """

    family: str
    seconds: tuple[float, ...] = ()
    error: str = ""
    silent: bool = False


_FAMILIES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6", socket.AF_UNIX: "Unix socket"}


def examine_route(service: str, host: str, port: int, embedded: bool = False) -> Iterator[Finding]:
    """Look a host up, connect to it over each family, and yield findings; a problem is the only finding."""
    where = f"{service} at {host}, port {port},"
    if not host or host.startswith("/"):
        path = f"{host or '/tmp'}/.s.PGSQL.{port}"
        addresses: Sequence[tuple[Any, ...]] = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", path)]
        where = f"{service} at {path}"
    else:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as exc:
            yield _unknown(service, host, exc)
            return
    routes = []
    for family, name in _FAMILIES.items():
        of_family = [address for address in addresses if address[0] == family][:_TRIED]
        if of_family:
            routes.append(_try(name, of_family))
    remedy = f"Start it with `{command_line('up')}`." if embedded else _CHECK
    yield from route_findings(where[0].upper() + where[1:], routes, remedy, pooled="database" in service)


def _unknown(service: str, host: str, error: Exception) -> Finding:
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return problem(
            "network",
            f"The host of {service}, {host}, cannot be looked up now: no name server answers.",
            "Check that this machine is online, and its name servers (/etc/resolv.conf).",
            TransientError,
        )
    return problem(
        "network",
        f"The host of {service}, {host}, has no address.",
        "Check the setting for a typing error; a paused Supabase project has no address: resume it.",
        AccessDenied,
    )


def _try(family: str, addresses: Sequence[tuple[Any, ...]]) -> Route:
    route = Route(family)
    for address in addresses:
        route = _connect(family, address)
        if route.seconds:
            break
    return route


def _connect(family: str, address: tuple[Any, ...]) -> Route:
    """Connect several times, up to the first failure."""
    seconds: list[float] = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        try:
            with socket.socket(*address[:3]) as probe:
                probe.settimeout(CONNECT_SECONDS)
                probe.connect(address[4])
        except OSError as exc:
            silent = isinstance(exc, TimeoutError)
            why = f"no answer in {CONNECT_SECONDS:.0f} s" if silent else (exc.strerror or type(exc).__name__).lower()
            return Route(family, tuple(seconds), why, silent)
        seconds.append(time.perf_counter() - started)
    return Route(family, tuple(seconds))


def route_findings(where: str, routes: Sequence[Route], remedy: str, *, pooled: bool) -> Iterator[Finding]:
    """Yield findings about the connections to a service.

    Arguments:
        where: the service and its address, the start of a sentence.
        remedy: for an unreachable service.
        pooled: a pooler may have an address of the other family.
    """
    reached = [route for route in routes if route.seconds]
    if not reached:
        why = ", ".join(f"{route.family}: {route.error}" for route in routes) or "no address of a known family"
        only_ipv6 = bool(routes) and all(route.family == "IPv6" for route in routes)
        message = f"{where} cannot be reached ({why})."
        if only_ipv6:
            message += " It has only an IPv6 address, which this network cannot reach."
            remedy = _POOLER if pooled else "Use a network with IPv6."
        yield problem("network", message, remedy, TransientError)
        return
    for route in routes:
        if route.silent and not route.seconds:
            yield warning(
                "network",
                f"{where} is not reached over {route.family} ({route.error}), and only then tried over "
                f"{reached[0].family}: each new connection may wait that long.",
                f"Repair {route.family} on this machine, or disable it.",
            )
    times = ", ".join(f"{route.family} in {_ms(route.seconds):.1f} ms" for route in reached)
    missed = ", ".join(f"not over {route.family}: {route.error}" for route in routes if not route.seconds)
    only = "; it has no other address" if len(routes) == 1 and routes[0].family == "IPv6" else ""
    yield ok("network", f"{where} is reached over {times}{f' ({missed})' if missed else ''}{only}.")


def latency_finding(service: str, seconds: Sequence[float]) -> Finding:
    """Return a finding about the median response time."""
    ms = _ms(seconds)
    message = f"{service[0].upper()}{service[1:]} answers in {ms:.1f} ms (median of {len(seconds)})."
    if ms > SLOW_MS:
        return warning(
            "latency", message, "Load from a machine in the region of the project: each request waits that long."
        )
    return ok("latency", message)


def _ms(seconds: Sequence[float]) -> float:
    return median(seconds) * 1000

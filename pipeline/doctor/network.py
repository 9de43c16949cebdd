"""The way to a service: its name, its addresses of both families, and how long a connection takes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.doctor.finding import Finding, ok, problem, warning
from pipeline.errors import AccessDenied, TransientError

SAMPLES = 5
CONNECT_SECONDS = 3.0
#: Milliseconds, beyond which the distance is what bounds a load.
SLOW_MS = 200.0
_TRIED = 2  # addresses of a family

_CHECK = "Check that it runs there, and that a firewall lets you through."
_POOLER = (
    "Use the session pooler's address from Connect in the Supabase dashboard (…pooler.supabase.com:5432), which has an "
    "IPv4 address, or buy the IPv4 add-on."
)


@dataclass(frozen=True)
class Way:
    """A family of addresses to a service.

    Attributes:
        family: `IPv4`, `IPv6` or `Unix socket`.
        seconds: that connections took; none when none came about.
        error: why none did.
        silent: nothing answered, not even a refusal.
    """

    family: str
    seconds: tuple[float, ...] = ()
    error: str = ""
    silent: bool = False


_FAMILIES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6", socket.AF_UNIX: "Unix socket"}


def examine_way(service: str, host: str, port: int, embedded: bool = False) -> Iterator[Finding]:
    """Look a host up, connect to it over each family, and yield what was found; a problem comes alone."""
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
    ways = []
    for family, name in _FAMILIES.items():
        of_family = [address for address in addresses if address[0] == family][:_TRIED]
        if of_family:
            ways.append(_try(name, of_family))
    remedy = "Start it with `python -m pipeline up`." if embedded else _CHECK
    yield from way_findings(where[0].upper() + where[1:], ways, remedy, pooled="database" in service)


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
        "Check the setting for a typing error; a paused Supabase project loses its name as well: wake it.",
        AccessDenied,
    )


def _try(family: str, addresses: Sequence[tuple[Any, ...]]) -> Way:
    way = Way(family)
    for address in addresses:
        way = _connect(family, address)
        if way.seconds:
            break
    return way


def _connect(family: str, address: tuple[Any, ...]) -> Way:
    """Connect some times, and no more once it failed."""
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
            return Way(family, tuple(seconds), why, silent)
        seconds.append(time.perf_counter() - started)
    return Way(family, tuple(seconds))


def way_findings(where: str, ways: Sequence[Way], remedy: str, *, pooled: bool) -> Iterator[Finding]:
    """Yield what the attempts to connect to a service amount to.

    Arguments:
        where: the service and its address, the begin of a sentence.
        remedy: for one that is not reached at all.
        pooled: there may be a pooler with an address of the other family.
    """
    reached = [way for way in ways if way.seconds]
    if not reached:
        why = ", ".join(f"{way.family}: {way.error}" for way in ways) or "no address of a known family"
        only_ipv6 = bool(ways) and all(way.family == "IPv6" for way in ways)
        message = f"{where} cannot be reached ({why})."
        if only_ipv6:
            message += " It has only an IPv6 address, and this network does not get there."
            remedy = _POOLER if pooled else "Use a network with IPv6."
        yield problem("network", message, remedy, TransientError)
        return
    for way in ways:
        if way.silent and not way.seconds:
            yield warning(
                "network",
                f"{where} is not reached over {way.family} ({way.error}), and only then tried over "
                f"{reached[0].family}: each new connection may wait that long.",
                f"Mend {way.family} on this machine, or switch it off.",
            )
    told = ", ".join(f"{way.family} in {_ms(way.seconds):.1f} ms" for way in reached)
    missed = ", ".join(f"not over {way.family}: {way.error}" for way in ways if not way.seconds)
    only = "; it has no other address" if len(ways) == 1 and ways[0].family == "IPv6" else ""
    yield ok("network", f"{where} is reached over {told}{f' ({missed})' if missed else ''}{only}.")


def latency_finding(service: str, seconds: Sequence[float]) -> Finding:
    """Return what is to be said of the time that answers take: the median of several."""
    ms = _ms(seconds)
    message = f"{service[0].upper()}{service[1:]} answers in {ms:.1f} ms (median of {len(seconds)})."
    if ms > SLOW_MS:
        return warning(
            "latency", message, "Load from a machine in the region of the project: each request waits that long."
        )
    return ok("latency", message)


def _ms(seconds: Sequence[float]) -> float:
    return median(seconds) * 1000

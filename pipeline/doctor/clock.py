"""Compare the clocks of this machine, the database and Storage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from pipeline.doctor.finding import Finding, ok, warning

#: Seconds by which clocks may differ without a warning.
TOLERANCE = 5.0
_DATE_HEADER_SECONDS = 1.0  # it has no fractions

_REMEDY = (
    "Set the clock of this machine by NTP (`timedatectl set-ntp true`); the service checks tokens by its own clock."
)


@dataclass(frozen=True)
class Offset:
    """Seconds that another clock is ahead of ours, and the uncertainty."""

    seconds: float
    uncertainty: float


def offset_of(theirs: float, sent: float, received: float, resolution: float = 0.0) -> Offset:
    """Return the offset of a clock that was read between two times of ours."""
    middle = (sent + received) / 2
    return Offset(theirs + resolution / 2 - middle, (received - sent) / 2 + resolution / 2)


def offset_of_header(date: str, sent: float, received: float) -> Offset | None:
    """Return the offset of a server's clock by its Date header (RFC 9110), None if there is no valid one."""
    try:
        theirs = parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return None
    return offset_of(
        theirs.replace(tzinfo=theirs.tzinfo or timezone.utc).timestamp(), sent, received, _DATE_HEADER_SECONDS
    )


def clock_findings(offsets: Mapping[str, Offset]) -> Iterator[Finding]:
    """Yield a finding for each service's clock."""
    for service, offset in offsets.items():
        surely = abs(offset.seconds) - offset.uncertainty
        if surely > TOLERANCE:
            way = "ahead of" if offset.seconds > 0 else "behind"
            message = f"The clock of {service} is {abs(offset.seconds):.0f} s {way} this machine's."
            yield warning("clock", message, _REMEDY)
        else:
            bound = max(abs(offset.seconds) + offset.uncertainty, 0.1)
            yield ok("clock", f"The clock of {service} agrees with this machine's within {bound:.1f} s.")


def service_time(offsets: Mapping[str, Offset]) -> float:
    """Return the time for token checks: Storage's, else the database's, else ours; seconds since 1970."""
    offset = offsets.get("Storage") or offsets.get("the database")
    return time.time() + (offset.seconds if offset is not None else 0.0)


def moment(seconds: float) -> str:
    """Return a time as text, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")

"""The day in the name of a photo."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import date, datetime, timedelta, timezone

from pipeline.dataset.names import last
from pipeline.dataset.records import Deviation

_FIRST_DAY = date(2000, 1, 1)

#: 2025-10-11; 20251011, also with a time; 11.10.2025, where the day always comes before the month.
_DATE = re.compile(
    r"(?<![0-9])(?:(?P<y1>[0-9]{4})(?P<s1>[-_.])(?P<m1>[0-9]{1,2})(?P=s1)(?P<d1>[0-9]{1,2})"
    r"|(?P<y2>(?:19|20)[0-9]{2})(?P<m2>[0-9]{2})(?P<d2>[0-9]{2})(?:[0-9]{4}|[0-9]{6})?"
    r"|(?P<d3>[0-9]{1,2})(?P<s3>[-_.])(?P<m3>[0-9]{1,2})(?P=s3)(?P<y3>[0-9]{4}))(?![0-9])"
)
#: What looks like a date or a time: three numbers, a year, or six digits and more.
_NUMBERS = re.compile(r"(?<![0-9])(?:[0-9]{1,4}[-_.][0-9]{1,2}[-_.][0-9]{1,4}|(?:19|20)[0-9]{2}|[0-9]{6,})(?![0-9])")


def captured_on(path: str, recognition_id: int) -> date | None:
    """Return the first date in the name of a photo, None if there is none."""
    for match in (match for name in _names(path, recognition_id) for match in _DATE.finditer(name)):
        found = {key[0]: int(value) for key, value in match.groupdict().items() if value and key[0] != "s"}
        with suppress(ValueError):
            return date(found["y"], found["m"], found["d"])
    return None


def check_date(path: str, recognition_id: int) -> tuple[Deviation, ...]:
    """Return what is unusual about the date in the name of a photo; a name without one is not unusual."""
    found = captured_on(path, recognition_id)
    if found is None:
        numbers = _NUMBERS.search(min(_names(path, recognition_id), key=len))
        if numbers is not None:
            return (Deviation("date_unknown", f"the name has {numbers[0]}, which is no known form of a date"),)
    elif not _FIRST_DAY <= found <= datetime.now(timezone.utc).date() + timedelta(days=1):
        return (Deviation("date_unlikely", f"the date in the name, {found}, is before 2000 or in the future"),)
    return ()


def _names(path: str, recognition_id: int) -> list[str]:
    """Return the name of a photo without the number of its recognition, and as it is: what has the date comes first."""
    name = last(path)
    own = next((one for one in re.finditer("[0-9]+", name) if int(one[0]) == recognition_id), None)
    if own is None:
        return [name]
    rest = name[: own.start()] + name[own.end() :]
    if len(own[0]) >= len("20251011"):
        return [rest]
    return [rest, name] if len(own[0]) >= len("2025") else [name, rest]

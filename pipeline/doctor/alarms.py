"""Whether silence would be heard: how old the last look at a source is, and where alarms go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.config import Alarms
from pipeline.doctor.finding import Finding, ok, problem, warning
from pipeline.errors import UnfinishedError
from pipeline.observe.notify import is_installed, read_services
from pipeline.observe.ping import is_usable
from pipeline.units import counted, duration

_SOURCES = {"load": "a dataset", "qwen": "an annotations file"}


def look_finding(looks: Sequence[Any], max_age: float | None) -> Finding:
    """Return how old the last look is, by the rows of list_looks: a problem if it is older than so many hours."""
    if not looks:
        message = "No source was looked at yet."
    else:
        ages = (f"{_SOURCES[row.kind]} {duration(row.age_seconds)} ago" for row in looks)
        message = f"Last looked at: {', '.join(ages)}."
        if newest := [row.newest for row in looks if row.newest]:
            message += f" The newest data is of {max(newest)}."
    if max_age is None or (looks and min(row.age_seconds for row in looks) <= max_age * 3600):
        return ok("look", message)
    message += f" That is more than {max_age:g} h ago." if looks else ""
    return problem("look", message, "Read the log of the last load, and check cron or the timer.", UnfinishedError)


def alarm_findings(alarms: Alarms) -> Iterator[Finding]:
    """Yield whether PING_URL and NOTIFY_URLS can be used; nothing is sent."""
    if alarms.ping_url is None:
        yield ok("alarms", "PING_URL is not set: no monitor hears of a load that does not run.")
    elif is_usable(alarms.ping_url):
        yield ok("alarms", "PING_URL is set: load, load-qwen and verify report to a monitor.")
    else:
        yield warning("alarms", "PING_URL is not an http or https URL.", "Copy the URL of the check again.")
    if alarms.notify_urls is None:
        return
    if not is_installed():
        message = "NOTIFY_URLS is set, and apprise, which sends notifications, is not installed."
        yield warning("alarms", message, "Run `pip install '.[notify]'` in the folder of the project.")
        return
    services, unknown = read_services(alarms.notify_urls)
    if unknown:
        message = f"{counted(unknown, 'entry', 'entries')} of NOTIFY_URLS cannot be used by apprise."
        yield warning("alarms", message, "Try each with `apprise --body=test URL`; separate them by spaces.")
    if services:
        yield ok("alarms", f"NOTIFY_URLS names {counted(len(services), 'service')}.")

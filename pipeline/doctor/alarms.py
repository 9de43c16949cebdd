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

#: What is looked at, and the command that does it, by kind.
_SOURCES = {"load": ("a dataset", "load"), "qwen": ("an annotations file", "load-qwen")}


def look_finding(looks: Sequence[Any], max_age: float | None) -> Finding:
    """Return how old the last looks are, by the rows of list_looks: a problem if one is older than so many hours.

    A kind of source at which nobody looks regularly is not expected again while there are younger looks at another one.
    Looks are regular if the last ones came at most so many hours apart on average, and not all within so many.
    """
    message, old = "No source was looked at yet.", list[str]()
    if looks:
        ages = (f"{_SOURCES[row.kind][0]} {duration(row.age_seconds)} ago" for row in looks)
        message = f"Last looked at: {', '.join(ages)}."
        if newest := [row.newest for row in looks if row.newest]:
            message += f" The newest data is of {max(newest)}."
    if max_age is not None:
        seconds = max_age * 3600
        late = [row for row in looks if row.age_seconds > seconds]
        regular = [row.kind for row in late if row.span_seconds and row.interval_seconds <= seconds < row.span_seconds]
        old = regular or [row.kind for row in late if len(late) == len(looks)] or ([] if looks else ["load"])
    if not old:
        return ok("look", message)
    if looks:
        message += f" More than {max_age:g} h ago: {' and '.join(_SOURCES[kind][0] for kind in old)}."
    commands = " and ".join(f"`{_SOURCES[kind][1]}`" for kind in old)
    remedy = f"Read the log of the last {commands}, and check cron or the timer."
    return problem("look", message, remedy, UnfinishedError)


def alarm_findings(alarms: Alarms) -> Iterator[Finding]:
    """Yield whether PING_URL and NOTIFY_URLS can be used; nothing is sent."""
    if alarms.ping_url is None:
        yield ok("alarms", "PING_URL is not set: no monitor hears of a load that does not run.")
    elif is_usable(alarms.ping_url):
        yield ok("alarms", "PING_URL is set: load, load-qwen, finish and verify report to a monitor.")
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

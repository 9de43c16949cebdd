"""A year of nights by a fake clock: what each kind of night leaves behind, and who hears of it when.

The decisions are the product's own (`news`, `look_finding`); the monitor is a model of one check of healthchecks.io.
`tests/test_nights.py` runs the commands of each kind, and compares their outcomes with those here.
`python -m tests.nights` writes the table of docs/guides/alerts.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from pipeline.batches.alarm import Memory, news
from pipeline.doctor.alarms import look_finding
from pipeline.doctor.finding import PROBLEM

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "alerts.md"
MARKS = "<!-- nights: `make docs` writes this table -->\n\n", "\n<!-- end of nights -->"

#: Hours: a load at 2:15, a look at its age at 9:00, and what the guide says to set for the monitor and for --max-age.
LOAD_AT, CHECK_AT, DAY = 2.25, 9.0, 24.0
GRACE, MAX_AGE = 3.0, 36.0
_LASTS = 0.5


@dataclass(frozen=True)
class Outcome:
    """What the load of a night comes to.

    Attributes:
        code: its exit code, None if it was killed.
        problem: how `problem_of` names it, or how that begins.
        looked: whether a look at the source is on record.
        holds: whether it leaves a batch that is held.
    """

    code: int | None
    problem: str = ""
    looked: bool = False
    holds: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of night: what happens, what the load comes to (None if it is not run), and how late it is, in hours."""

    what: str
    outcome: Outcome | None
    late: float = 0.0

    @property
    def is_good(self) -> bool:
        """Say whether nobody has to hear of it."""
        return self.outcome is not None and self.outcome.code == 0 and not self.late


GOOD = Outcome(0, looked=True)
KINDS = {
    "good": Kind("everything is loaded", GOOD),
    "empty": Kind("there is nothing new", GOOD),
    "some rejected": Kind("a few trays are rejected; the ping and the summary name them", GOOD),
    "missed": Kind("the machine is off, or cron does not run", None),
    "late": Kind("the load begins six hours late", GOOD, late=6.0),
    "half": Kind("Storage fails in the middle", Outcome(3, "UnfinishedError StorageUnavailable", looked=True)),
    "rejected": Kind("one tray is rejected, with `--strict`", Outcome(4, "RefusedError")),
    "held": Kind("too much is rejected", Outcome(6, "HeldError", looked=True, holds=True)),
    "unmounted": Kind("the dataset's disk is not mounted", Outcome(2, "UsageError The dataset")),
    "wrong key": Kind("the service role key is refused", Outcome(2, "AccessDenied")),
    "no database": Kind("the database is away", Outcome(3, "DatabaseUnavailable")),
    "full database": Kind(
        "the disk of the database is full", Outcome(3, "UnfinishedError DatabaseUnavailable", looked=True)
    ),
    "full disk": Kind("no temporary file can be written: the command ends as it begins", None),
    "killed": Kind("`kill -9`, or the power fails", Outcome(None, looked=True)),
    "stopped": Kind("SIGTERM: the machine is shut down", Outcome(130, "exit code 130", looked=True)),
}


@dataclass
class Monitor:
    """A check of healthchecks.io with a cron schedule: down after a failure, without an end, and without a run."""

    due: float = LOAD_AT + GRACE
    down_at: list[float] = field(default_factory=list)
    is_down: bool = False
    started_at: float | None = None

    def ping(self, at: float, suffix: str) -> None:
        """Take a ping."""
        self.advance(at)
        if suffix == "/start":
            self.started_at = at
            return
        self.started_at = None
        if suffix in ("", "/0"):
            self.is_down, self.due = False, ((at - LOAD_AT) // DAY + 1) * DAY + LOAD_AT + GRACE
        else:
            self._fall(at)

    def advance(self, now: float) -> None:
        """Notice until now what did not come."""
        deadlines = [self.due, *([self.started_at + GRACE] if self.started_at is not None else [])]
        if min(deadlines) <= now:
            self._fall(min(deadlines))

    def _fall(self, at: float) -> None:
        if not self.is_down:
            self.down_at.append(at)
        self.is_down = True


@dataclass(frozen=True)
class Night:
    """What was heard of a night, each in hours after 2:15 or None, and whether it was told of as over."""

    kind: str
    is_first: bool  # of several of its kind in a row
    monitor: float | None
    people: float | None
    max_age: float | None
    was_down: bool  # the monitor, since an earlier night
    is_down: bool  # the monitor, a day after
    recovered: bool

    @property
    def heard(self) -> float | None:
        """Return when it was first heard of."""
        return min((one for one in (self.monitor, self.people, self.max_age) if one is not None), default=None)


def nights(seed: int = 0, count: int = 365) -> list[str]:
    """Return the kinds of a year: mostly good ones, each bad kind alone, in a row of three, and at random."""
    chance = random.Random(seed)
    bad = [name for name, kind in KINDS.items() if not kind.is_good]
    good = [name for name, kind in KINDS.items() if kind.is_good]
    found = ["good"]
    for name in bad:
        found += ["good", name, *chance.choices(good, k=2), name, name, name, "good"]
    while len(found) < count:
        found += [chance.choice(bad)] if chance.random() < 0.15 else [chance.choice(good)]
    return found[:count]


def year(kinds: list[str]) -> Iterator[Night]:
    """Live through the nights; a held batch is published at noon."""
    monitor, told, held = Monitor(), frozenset[str](), frozenset[str]()
    looked_at = 0.0
    for number, name in enumerate(kinds):
        kind, planned = KINDS[name], number * DAY + LOAD_AT
        at, fallen, was_down = planned + kind.late, len(monitor.down_at), monitor.is_down
        new = over = frozenset[str]()
        if kind.outcome is not None:
            monitor.ping(at, "/start")
            looked_at = at if kind.outcome.looked else looked_at
            held |= {f"batch_{number}"} if kind.outcome.holds else frozenset()
            if kind.outcome.code is not None:
                monitor.ping(at + _LASTS, f"/{kind.outcome.code}" if kind.outcome.code else "")
                new, over = news(kind.outcome.problem, Memory(told, held))
                told = (told | new) - over
        alert = None
        checked_at = number * DAY + CHECK_AT
        age = (checked_at - looked_at) * 3600
        every = {"interval_seconds": DAY * 3600, "span_seconds": 4 * DAY * 3600}
        looks = [SimpleNamespace(kind="load", age_seconds=age, newest=None, **every)]
        if look_finding(looks, MAX_AGE).level == PROBLEM:
            alert = checked_at
        held = frozenset()
        monitor.advance(planned + DAY - 0.01)
        downs = monitor.down_at[fallen:]
        yield Night(
            name,
            not number or kinds[number - 1] != name,
            downs[0] - planned if downs else None,
            at + _LASTS - planned if new else None,
            alert - planned if alert is not None else None,
            was_down,
            monitor.is_down,
            bool(over),
        )


def table(lived: list[Night]) -> str:
    """Return a row for each kind: how often it was, and after how many hours at most each alarm was raised."""
    lines = [
        "| night | what happens | nights | monitor | people | `--max-age 36` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        same = [night for night in lived if night.kind == name]
        alone = [night for night in same if night.is_first]
        cells = [_latest([getattr(one, channel) for one in alone]) for channel in ("monitor", "people")]
        in_row = [night.max_age for night in same]
        lines.append(f"| {name} | {kind.what} | {len(same)} | {' | '.join(cells)} | {_latest(in_row, rare=True)} |")
    return "\n".join(lines) + "\n"


def _latest(hours: list[float | None], *, rare: bool = False) -> str:
    found = [one for one in hours if one is not None]
    if not found:
        return "—"
    return "after two in a row" if rare else f"within {max(found):.1f} h"


def page(text: str) -> str:
    """Return the guide with the table of this year."""
    before, after = MARKS
    return re.sub(
        f"({re.escape(before)}).*?({re.escape(after)})",
        lambda match: f"{match[1]}{table(list(year(nights())))}{match[2]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    GUIDE.write_text(page(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")

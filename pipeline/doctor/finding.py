"""What the doctor finds: a level, a sentence, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.config import redact
from pipeline.errors import PipelineError, SettingsError, UsageError

OK = "ok"
WARNING = "warning"
PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        check: what was looked at, such as `pooler`.
        level: `ok`, `warning` or `problem`.
        message: one sentence or two, free of secrets.
        remedy: what to do; empty when there is nothing to do.
        kind: of a problem, the error that a load would meet; it decides the exit code.
    """

    check: str
    level: str
    message: str
    remedy: str = ""
    kind: type[PipelineError] = PipelineError

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON takes it."""
        return {"check": self.check, "level": self.level, "message": self.message, "remedy": self.remedy}


def ok(check: str, message: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(check, OK, redact(message))


def warning(check: str, message: str, remedy: str) -> Finding:
    """Return a finding that no load fails of, and that somebody should know of."""
    return Finding(check, WARNING, redact(message), redact(remedy))


def problem(check: str, message: str, remedy: str, kind: type[PipelineError] = SettingsError) -> Finding:
    """Return a finding that a load fails of."""
    return Finding(check, PROBLEM, redact(message), redact(remedy), kind)


def of_error(check: str, error: PipelineError) -> Finding:
    """Return an error as a finding."""
    return problem(check, error.message, error.hint, type(error))


def verdict(findings: Iterable[Finding]) -> PipelineError | None:
    """Return the error that the problems amount to: of the settings, where one is, since time does not mend these."""
    problems = [one for one in findings if one.level == PROBLEM]
    worst = next((one for one in problems if issubclass(one.kind, UsageError)), problems[0] if problems else None)
    return worst.kind(worst.message, worst.remedy) if worst is not None else None

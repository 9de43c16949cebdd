"""Findings of the doctor: a level, a message and a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.config import redact
from pipeline.errors import PipelineError, RefusedError, SettingsError, UsageError

OK = "ok"
WARNING = "warning"
PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        check: the subject, such as `pooler`.
        level: `ok`, `warning` or `problem`.
        message: one sentence or two, free of secrets.
        remedy: what to do; may be empty.
        kind: the error that a load would raise for a problem; it decides the exit code.
    """

    check: str
    level: str
    message: str
    remedy: str = ""
    kind: type[PipelineError] = PipelineError

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {"check": self.check, "level": self.level, "message": self.message, "remedy": self.remedy}


def ok(check: str, message: str) -> Finding:
    """Return a finding without a remedy."""
    return Finding(check, OK, redact(message))


def warning(check: str, message: str, remedy: str) -> Finding:
    """Return a finding that does not make a load fail."""
    return Finding(check, WARNING, redact(message), redact(remedy))


def problem(check: str, message: str, remedy: str, kind: type[PipelineError] = SettingsError) -> Finding:
    """Return a finding that makes a load fail."""
    return Finding(check, PROBLEM, redact(message), redact(remedy), kind)


def of_error(check: str, error: PipelineError) -> Finding:
    """Return an error as a finding."""
    return problem(check, error.message, error.hint, type(error))


def verdict(findings: Iterable[Finding]) -> PipelineError | None:
    """Return the most important problem as an error: one that retrying does not solve first."""
    problems = [one for one in findings if one.level == PROBLEM]
    lasting = [one for one in problems if issubclass(one.kind, (UsageError, RefusedError))]
    worst = next(iter(lasting or problems), None)
    return worst.kind(worst.message, worst.remedy) if worst is not None else None

"""The doctor, `status --check`: check all prerequisites of a load, with a remedy for each problem.

Each part yields findings in its own thread with a time limit. An unavailable service yields one problem, and its
further checks are skipped.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.database import address_of
from pipeline.dataset.layout import find_source, usual_sources
from pipeline.doctor import bucket, machine, postgres
from pipeline.doctor.alarms import alarm_findings
from pipeline.doctor.clock import clock_findings, service_time
from pipeline.doctor.facts import Facts
from pipeline.doctor.finding import PROBLEM, WARNING, Finding, of_error, problem, verdict
from pipeline.doctor.machine import Dataset
from pipeline.errors import PermanentError, PipelineError, TransientError
from pipeline.units import counted

__all__ = ["Finding", "alarm_findings", "as_dict", "as_text", "examine", "verdict"]

#: Time limits for all services together, then for a photo to adopt, and for listing the dataset.
SERVICE_SECONDS = 25.0
ADOPTION_SECONDS = 10.0
DATASET_SECONDS = 15.0


def examine(
    settings: Settings | PipelineError, scheduler_url: str, source: str | None, max_age: float | None = None
) -> list[Finding]:
    """Return all findings, the settings first; takes less than a minute, whichever services are unavailable.

    Arguments:
        settings: the settings or, for the checks that need none, the error of reading them.
        scheduler_url: the address of a possible luigid.
        source: the dataset's folder; the default is that of a load.
        max_age: hours after which the last look at a source is a problem.
    """
    luigi = machine.luigi_finding(Path.cwd(), os.environ)
    luigid = machine.examine_luigid(scheduler_url)
    if isinstance(settings, PipelineError):
        others = gather({"luigid": luigid}, SERVICE_SECONDS)
        return [of_error("settings", settings), luigi, *others, *machine.examine_disks(None, None)]
    findings = [*machine.settings_findings(settings), luigi]
    facts = Facts(settings.tuning.connection_pool_size, max_age)
    parts = {
        "The database": postgres.examine_database(settings, facts),
        "Storage": bucket.examine_storage(settings, facts),
        "luigid": luigid,
    }
    findings += gather(parts, SERVICE_SECONDS)
    findings += _examine_key(settings, facts)
    if facts.older_photo:
        findings += gather({"Adoption": bucket.examine_adoption(settings, facts.older_photo)}, ADOPTION_SECONDS)
    dataset = None
    try:
        dataset = _dataset(settings, source, facts)
    except PipelineError as exc:
        findings.append(of_error("dataset", exc))
    if dataset is not None:
        findings.append(machine.dataset_finding(dataset))
    findings += bucket.bucket_findings(settings.bucket, facts, dataset)
    findings += machine.examine_disks(settings, dataset)
    return findings


def _examine_key(settings: Settings, facts: Facts) -> Iterator[Finding]:
    yield from clock_findings(facts.offsets)
    key = settings.key.reveal()
    yield from bucket.key_findings(key, service_time(facts.offsets))
    try:
        host, _, user = address_of(settings.database_url.reveal())
    except PipelineError:
        return  # reported by examine_database
    finding = bucket.project_finding(settings.url, key, host, user)
    if finding is not None:
        yield finding


def _dataset(settings: Settings, source: str | None, facts: Facts) -> Dataset | None:
    """Return the sizes of the dataset that a load would use; None if none is named and none is found."""
    if not source and not settings.dataset_dir and next(usual_sources(), None) is None:
        return None
    limit = (facts.bucket or {}).get("file_size_limit")
    folder = find_source(source, settings.dataset_dir)
    return machine.look_at_dataset(folder, limit if isinstance(limit, int) else None, DATASET_SECONDS)


def gather(parts: Mapping[str, Iterator[Finding]], seconds: float) -> list[Finding]:
    """Run the parts concurrently and return their findings within a time limit, part by part."""
    started = []
    for name, part in parts.items():
        found: list[Finding] = []
        complete = threading.Event()
        # A daemon thread that still waits at the time limit does not delay the end of the process.
        thread = threading.Thread(target=_drain, args=(part, found, complete), name=name, daemon=True)
        thread.start()
        started.append((name, thread, found, complete))
    deadline = time.monotonic() + seconds
    findings: list[Finding] = []
    for name, thread, found, complete in started:
        thread.join(max(0.0, deadline - time.monotonic()))
        findings += list(found)
        if not complete.is_set():
            findings.append(_incomplete(name, thread.is_alive(), seconds))
    return findings


def _drain(part: Iterator[Finding], found: list[Finding], complete: threading.Event) -> None:
    for finding in part:
        found.append(finding)
    complete.set()


def _incomplete(name: str, alive: bool, seconds: float) -> Finding:
    if alive:
        return problem(
            name.lower(),
            f"{name} did not complete all checks within {seconds:.0f} s.",
            "Check its log, its load and the network.",
            TransientError,
        )
    return problem(name.lower(), f"{name} could not be examined.", "This is a defect of the pipeline.", PermanentError)


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as JSON values."""
    return {"findings": [one.as_dict() for one in findings], **_totals(findings)}


def as_text(findings: list[Finding]) -> str:
    """Return the findings as text, each with its remedy below it."""
    lines = []
    for one in findings:
        lines.append(f"{one.level:<8} {one.check}: {one.message}")
        if one.remedy:
            lines.append(f"         → {one.remedy}")
    totals = _totals(findings)
    worse = ", ".join(counted(totals[f"{level}s"], level) for level in (PROBLEM, WARNING))
    lines.append(f"{counted(len(findings), 'finding')}: {worse}.")
    return "\n".join(lines)


def _totals(findings: list[Finding]) -> dict[str, int]:
    return {name: sum(one.level == level for one in findings) for name, level in _LEVELS}


_LEVELS = (("problems", PROBLEM), ("warnings", WARNING))

"""Storage: its network, the key, and the limits of the bucket compared with the dataset."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from pipeline.batches.bucket import check_bucket, find_bucket_of
from pipeline.config import Settings
from pipeline.dataset.layout import MAXIMUM_PHOTO_BYTES
from pipeline.doctor.clock import moment, offset_of_header
from pipeline.doctor.facts import Facts
from pipeline.doctor.finding import PROBLEM, Finding, of_error, ok, problem, warning
from pipeline.doctor.machine import Dataset
from pipeline.doctor.network import SAMPLES, examine_route, latency_finding
from pipeline.errors import AccessDenied, ObjectNotFound, PipelineError
from pipeline.storage import Storage
from pipeline.storage.key import SERVICE, claims_of
from pipeline.units import counted, size

_PHOTO_TYPE = "image/jpeg"
#: Seconds before the expiry of a key from which the doctor warns.
_SOON = 30 * 86400
_COPY_KEY = "Copy the service role key of this project again, from Project Settings, API keys."


def examine_storage(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Yield findings about Storage; only one problem if it does not respond."""
    with closing(Storage(settings)) as storage:
        parts = urlsplit(settings.url)
        if storage.proxied:
            yield ok("network", f"Storage at {parts.hostname} is reached through a proxy of the environment.")
        else:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            for finding in examine_route("Storage", parts.hostname or "", port, settings.environment == "embedded"):
                yield finding
                if finding.level == PROBLEM:
                    return
        try:
            yield from _ask(storage, facts)
        except PipelineError as exc:
            yield of_error("storage", exc)


def _ask(storage: Storage, facts: Facts) -> Iterator[Finding]:
    seconds: list[float] = []
    for nth in range(SAMPLES + 1):
        sent, started = time.time(), time.perf_counter()
        answer, date = storage.ask_for_bucket()
        taken = time.perf_counter() - started
        offset = offset_of_header(date, sent, sent + taken)
        if offset is not None:
            facts.offsets["Storage"] = offset
        if isinstance(answer, ObjectNotFound):
            facts.bucket_missing = True
        elif isinstance(answer, PipelineError):
            yield of_error("storage", answer)
            return
        else:
            facts.bucket = answer
        if nth:  # the first one opened the connection
            seconds.append(taken)
    yield latency_finding("Storage", seconds)


# The key


def key_findings(key: str, now: float) -> Iterator[Finding]:
    """Yield findings about a key's format, role and validity at a time; its signature is not verified."""
    if key.startswith("sb_secret_"):
        yield ok("key", "The key is a secret key of the new kind, which has no expiry.")
        return
    if key.startswith("sb_publishable_"):
        yield problem("key", "The key is a publishable key, which may not write.", _COPY_KEY, AccessDenied)
        return
    claims = claims_of(key)
    if claims is None:
        yield warning("key", "The key is neither a JSON Web Token nor a key that begins with sb_secret_.", _COPY_KEY)
        return
    found = list(_time_findings(claims, now))
    role = claims.get("role")
    if role != SERVICE:
        named = f"the key of the role {str(role)[:30]}" if role else "a key without a role"
        found.append(problem("key", f"The key is {named}, not of service_role.", _COPY_KEY, AccessDenied))
    yield from found or [ok("key", f"The key has the role service_role and {_validity(claims)}.")]


def _time_findings(claims: Mapping[str, Any], now: float) -> Iterator[Finding]:
    expiry, begin, issued = (_number(claims.get(name)) for name in ("exp", "nbf", "iat"))
    if expiry is not None and expiry <= now:
        yield problem("key", f"The key has expired, at {moment(expiry)}.", _COPY_KEY, AccessDenied)
    elif expiry is not None and expiry - now < _SOON:
        yield warning("key", f"The key expires at {moment(expiry)}.", "Make a new key before that.")
    for value, name in ((begin, "is not valid before"), (issued, "was issued at")):
        if value is not None and value > now + 1:
            message = f"The key {name} {moment(value)}, which is in the future by the clock of the service."
            remedy = "Correct the clock of the key's issuer or of the service, or wait until then."
            yield problem("key", message, remedy, AccessDenied) if value == begin else warning("key", message, remedy)
            return


def _number(value: object) -> float | None:
    """Return the time in a claim, seconds since 1970, clamped to the years that datetime supports."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(min(max(value, 0), 253_402_300_799))


def _validity(claims: Mapping[str, Any]) -> str:
    expiry = _number(claims.get("exp"))
    return f"is valid until {moment(expiry)}" if expiry is not None else "does not expire"


def project_finding(url: str, key: str, host: str, user: str) -> Finding | None:
    """Return whether URL, key and database belong to one Supabase project; None if fewer than two name one."""
    claims = claims_of(key) or {}
    api, direct = (urlsplit(url).hostname or "").split("."), host.split(".")
    named = {
        "NEXT_PUBLIC_SUPABASE_URL": api[0] if api[1:] == ["supabase", "co"] else "",
        "SUPABASE_SERVICE_ROLE_KEY": str(claims.get("ref") or ""),
        "DATABASE_URL": direct[1] if direct[0] == "db" and direct[2:] == ["supabase", "co"] else user.partition(".")[2],
    }
    projects = {variable: project[:40] for variable, project in named.items() if project}
    if len(set(filter(None, named.values()))) > 1:
        listed = ", ".join(f"{variable} {project}" for variable, project in projects.items())
        return problem("project", f"The settings are of different projects: {listed}.", "Copy all from one project.")
    return (
        ok("project", f"The settings are of one project, {next(iter(projects.values()))}.")
        if len(projects) > 1
        else None
    )


# The bucket


def bucket_findings(name: str, facts: Facts, dataset: Dataset | None) -> Iterator[Finding]:
    """Yield findings about the bucket, compared with that of the batches on record and with the dataset."""
    if facts.bucket is None and not facts.bucket_missing:
        return
    try:
        check_bucket(name, facts.bucket, facts.recorded)
    except PipelineError as exc:
        yield of_error("bucket", exc)
        return
    if facts.bucket is None:
        remedy = "Nothing if the name is right: the first load creates it, private. Else correct STORAGE_BUCKET."
        yield warning("bucket", f"There is no bucket {name} yet.", remedy)
        return
    if facts.bucket.get("public"):
        message = f"The bucket {name} is public: anyone with the path of a photo can read it without a key."
        yield warning("bucket", message, "Make it private in the dashboard, unless this is intended.")
    else:
        yield ok("bucket", f"The bucket {name} is private.")
    yield types_finding(facts.bucket.get("allowed_mime_types"))
    yield limit_finding(facts.bucket.get("file_size_limit"), dataset)


def examine_adoption(settings: Settings, key: str) -> Iterator[Finding]:
    """Yield a finding about photos that another tool stored, of which `key` is one: where they are."""
    try:
        with closing(Storage(settings)) as storage:
            name = find_bucket_of(storage, settings, key)
    except PipelineError as exc:
        yield of_error("adopt", exc)
        return
    if name is None:
        yield warning("adopt", f"The app has photos that no bucket has, for example {key}.", "Check the project's URL.")
    elif name == settings.bucket:
        message = f"Photos that another tool stored in the bucket {name} are not on record, for example {key}."
        yield warning("adopt", message, f"Look at `{settings.command('adopt --dry-run')}`.")
    else:
        message = f"The photos that the app has already are in the bucket {name}, for example {key}."
        yield problem("adopt", message, f"Set STORAGE_BUCKET={name}, so that new ones go there too.")


def types_finding(allowed: object) -> Finding:
    """Return whether the bucket accepts photos."""
    types = [str(one) for one in allowed] if isinstance(allowed, list) else []
    if not types or any(one in (_PHOTO_TYPE, "image/*") for one in types):
        return ok("bucket types", f"The bucket takes {_PHOTO_TYPE}.")
    return problem(
        "bucket types",
        f"The bucket takes only {', '.join(types)[:100]}.",
        f"Add {_PHOTO_TYPE} to its allowed MIME types.",
    )


def limit_finding(limit: object, dataset: Dataset | None) -> Finding:
    """Return whether the bucket accepts the photos of the dataset, or any that a load accepts."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit >= MAXIMUM_PHOTO_BYTES:
        return ok(
            "bucket limit", f"The bucket has no size limit below {size(MAXIMUM_PHOTO_BYTES)}, the most of a photo."
        )
    if dataset is None or not dataset.photos:
        return ok("bucket limit", f"The bucket takes photos of up to {size(limit)}; no dataset is there to compare.")
    if dataset.too_large:
        photos = counted(dataset.photos, "photo")
        return problem(
            "bucket limit",
            f"Larger than the {size(limit)} that the bucket takes: {dataset.too_large} of {photos}; "
            f"the largest, {dataset.largest_path}, has {size(dataset.largest)}.",
            f"Raise the bucket's size limit to {size(MAXIMUM_PHOTO_BYTES)}, or these recognitions are rejected.",
        )
    return ok("bucket limit", f"The bucket takes {size(limit)}; the largest photo has {size(dataset.largest)}.")

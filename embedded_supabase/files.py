"""Files, locks and processes of the embedded services: private modes, atomic writes, safe under concurrent use."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embedded_supabase.disk import DURABLE, Disk
from embedded_supabase.errors import SetupError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on a file during the block; the kernel releases it when the holder is killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_home(home: Path, name: str) -> Iterator[None]:
    """Hold a lock file of a home during the block.

    Raises:
        SetupError: the home is not private, or an operation on its files failed, here or in the block.
    """
    try:
        check_home(home)
        with locked(home / name):
            yield
    except OSError as exc:
        why = " ".join(str(part) for part in (exc.filename, exc.strerror) if part) or exc
        raise SetupError(
            f"{home} cannot be used: {why}.",
            "Check its owner, its modes and the free space of its disk, or set PIPELINE_HOME to another folder.",
        ) from exc


def make_home(home: Path, disk: Disk = DURABLE) -> None:
    """Create the folder of the embedded services, mode 0700, for root 0711; its name is durable.

    Raises:
        SetupError: it cannot be created, or it exists and is not private.
    """
    try:
        make_parents(home, disk)
        # PostgreSQL does not run as root, and its user must be able to traverse the folder. Secret files are 0600.
        make_folder(home, 0o711 if os.geteuid() == 0 else 0o700, disk=disk)
        check_home(home)
        # Also for an existing home, which a killed process may have created. A folder of others may not be readable.
        with suppress(PermissionError):
            disk.sync_folder(home.parent)
    except (FileExistsError, NotADirectoryError):
        raise SetupError(f"{home} is not a folder.", "Set PIPELINE_HOME to another path.") from None
    except OSError as exc:
        raise SetupError(
            f"The folder {home} cannot be created: {exc.strerror}.", "Set PIPELINE_HOME to a folder of yours."
        ) from exc


def make_parents(path: Path, disk: Disk = DURABLE) -> None:
    """Create the missing folders above a path; their names are durable."""
    for folder in reversed(path.parents):
        if not folder.is_dir():
            disk.make_folder(folder, 0o777)
            disk.sync_folder(folder.parent)


def check_home(home: Path) -> None:
    """Raise SetupError if a home belongs to another user, also for root, or other users can write to it.

    A symlink is followed.
    """
    found = home.stat()
    _require_owner(home, found)
    if found.st_mode & 0o022:
        raise SetupError(
            f"Other users can write to {home}.",
            f"Run `chmod go-w {shlex.quote(str(home))}`, or set PIPELINE_HOME to another folder.",
        )


def _require_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise SetupError(f"{path} belongs to another user.", "Set PIPELINE_HOME to a folder of yours.")


def read_secret(path: Path) -> str:
    """Return the content of a file that only the current user can read.

    Raises:
        SetupError: the file belongs to another user, or other users can read it.
        OSError: the file cannot be read.
    """
    with open(path, encoding="ascii") as file:
        found = os.fstat(file.fileno())
        _require_owner(path, found)
        if found.st_mode & 0o077:
            raise SetupError(
                f"Other users can read the secret in {path}.",
                f"Delete the file to create a new secret, or run `chmod 600 {shlex.quote(str(path))}` to keep it.",
            )
        return file.read().strip()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds; return False on timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; a zombie counts as ended."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return True
    except PermissionError:  # the pid was reused by another user's process
        return True
    except FileNotFoundError:
        return os.path.isdir("/proc/self")
    return status.rsplit(")", 1)[1].split()[0] == "Z"


def end_process(process: subprocess.Popen[Any], seconds: float) -> None:
    """Terminate a child process, kill it after a timeout, and reap it."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_atomically(path: Path, text: str, disk: Disk = DURABLE) -> None:
    """Write a file of mode 0600, durably; a concurrent reader sees either the old or the new content."""
    fresh = _fresh_name(path)
    try:
        with disk.create(fresh) as file:
            file.write(text.encode())
            disk.sync(file)  # otherwise a power failure may leave it empty
        disk.rename(fresh, path)
    except BaseException:
        disk.unlink(fresh)
        raise
    disk.sync_folder(path.parent)


def make_folder(path: Path, mode: int, owner: tuple[int, int] | None = None, disk: Disk = DURABLE) -> None:
    """Create a folder with this mode and owner (uid, gid), regardless of the umask; keep an existing folder.

    The folder is created under a temporary name and renamed, so that a crash cannot leave one with the wrong owner. The
    caller makes its name durable, also that of an existing folder, which a killed process may have created.

    Raises:
        FileExistsError: the name is taken by something other than a folder.
    """
    if path.is_dir():
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    fresh = _fresh_name(path)
    disk.make_folder(fresh)
    disk.set_access(fresh, mode, owner)
    disk.sync_folder(fresh)  # mode and owner
    try:
        disk.rename(fresh, path)
    except OSError:
        os.rmdir(fresh)
        if not path.is_dir():  # another process created it meanwhile
            raise


def _fresh_name(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def is_private(path: Path, owner: int) -> bool:
    """Return whether a path is a folder, not a symlink, that only its owner can enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077


def error_line(text: str) -> str:
    """Return the last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        for word in ("PANIC:", "FATAL:", "error:", "Error:"):
            if word in line:
                return line[line.index(word) :]
    return lines[-1] if lines else ""

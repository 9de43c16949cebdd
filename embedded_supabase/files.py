"""Files and locks of the embedded services: private, whole, and safe beside another process that does the same."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedded_supabase.errors import SetupError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on a file for the block, waiting for whoever holds it; a killed holder lets go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_home(home: Path) -> None:
    """Create the folder of the embedded services for its owner alone; as root others may pass through, not look.

    Raises:
        SetupError: it cannot be created.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        # As root others may pass through, for the server's user has to; what is secret in it has a mode of its own.
        make_folder(home, 0o711 if os.geteuid() == 0 else 0o700)
    except (FileExistsError, NotADirectoryError):
        raise SetupError(f"{home} is not a folder.", "Set PIPELINE_HOME to another path.") from None
    except OSError as exc:
        raise SetupError(
            f"The folder {home} cannot be created: {exc.strerror}.", "Set PIPELINE_HOME to a folder of yours."
        ) from exc


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again until the condition holds, and say whether it did before the time was up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def has_ended(pid: int) -> bool:
    """Say whether a process has ended, be it that its parent has not noticed yet."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, and so not the process that was asked about
        return True
    except FileNotFoundError:
        return os.path.isdir("/proc/self")
    return status.rsplit(")", 1)[1].split()[0] == "Z"


def end_process(process: subprocess.Popen[Any], seconds: float) -> None:
    """Ask a process of ours to end, and kill it when it has not after so many seconds; it is reaped."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_atomically(path: Path, text: str) -> None:
    """Put a text in the place of a file, mode 0600; a reader sees the former or the new one, whole."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600 from its first moment
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)  # or a power cut may leave it empty
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def make_folder(path: Path, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Create a folder of exactly this mode and owner (uid, gid), whatever the umask, unless it is there.

    It appears finished, or a kill in between would leave one that the owner cannot use.

    Raises:
        FileExistsError: something else has that name.
    """
    if path.is_dir():
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    fresh = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
    os.chmod(fresh, mode)
    if owner is not None:
        os.chown(fresh, *owner, follow_symlinks=False)
    try:
        os.rename(fresh, path)
    except OSError:
        os.rmdir(fresh)
        if not path.is_dir():  # another process was faster
            raise


def is_private(path: Path, owner: int) -> bool:
    """Say whether a path is a folder, not a link to one, that its owner alone can enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077


def complaint(text: str) -> str:
    """Return the line of a log's end that says why: the last that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        for word in ("PANIC:", "FATAL:", "error:", "Error:"):
            if word in line:
                return line[line.index(word) :]
    return lines[-1] if lines else ""

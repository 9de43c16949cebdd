"""Processes of PostgreSQL on this machine, from /proc."""

from __future__ import annotations

import subprocess
from pathlib import Path

from embedded_supabase.postgres.installation import User, run_as


def postgres_processes(data: Path, user: User | None) -> set[int]:
    """Return the pids of the PostgreSQL processes of a data directory, which is their working directory.

    The check runs as the server's user, because in a container root may not read `/proc/<pid>/cwd` of other users.
    """
    script = 'for process in /proc/[0-9]*; do [ "$process/cwd" -ef "$1" ] && echo "${process#/proc/}"; done'
    command = ["/bin/sh", "-c", script, "sh", str(data)]
    done = run_as(user, command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return {int(pid) for pid in done.stdout.split() if _is_postgres(int(pid))}


def _is_postgres(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace") == "postgres\n"
    except OSError:
        return False  # it has ended

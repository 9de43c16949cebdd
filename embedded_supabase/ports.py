"""TCP ports for the Storage server."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
#: Below the ephemeral range, so that no outgoing connection takes the port between a stop and the next start.
_PORTS = range(20000, 30000)


def remembered_port(home: Path) -> int | None:
    """Return the port that the previous server of a home listened on, None if unknown."""
    try:
        port = int((home / "storage.port").read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None
    return port if 0 < port < 65536 else None


def is_free(port: int) -> bool:
    """Return whether a port can be bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def free_port() -> int:
    """Return a free port."""
    for port in random.sample(_PORTS, 100):
        if is_free(port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

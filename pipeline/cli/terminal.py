"""Input from a terminal."""

from __future__ import annotations

import select
import signal
import socket
import sys


def ask(question: str) -> str:
    """Print a question, and return the line typed in response without its newline; empty at the end of input.

    Raises:
        KeyboardInterrupt: on Ctrl-C. `input` would miss a signal between printing and reading, and block; here the
            signal wakes `select` through a file descriptor.
    """
    print(question, end="", file=sys.stderr, flush=True)  # stdout may be redirected
    wakes, woken = socket.socketpair()
    with wakes, woken:
        woken.setblocking(False)
        former = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        try:
            while True:
                ready, _, _ = select.select([sys.stdin, wakes], [], [])
                if sys.stdin in ready:
                    return sys.stdin.readline().rstrip("\n")
                wakes.recv(16)  # another signal, whose handler did not raise
        finally:
            signal.set_wakeup_fd(former)

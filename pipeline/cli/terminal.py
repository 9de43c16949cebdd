"""What a person types at a terminal."""

from __future__ import annotations

import select
import signal
import socket
import sys


def ask(question: str) -> str:
    """Return the line that is typed in answer to a question, without its end; empty at the end of the input.

    Raises:
        KeyboardInterrupt: Ctrl-C was typed. `input` misses one that comes between the question and its read, and waits
            for ever; here the signal itself wakes the wait.
    """
    print(question, end="", file=sys.stderr, flush=True)  # stdout may be a file
    wakes, woken = socket.socketpair()
    with wakes, woken:
        woken.setblocking(False)
        former = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        try:
            while True:
                ready, _, _ = select.select([sys.stdin, wakes], [], [])
                if sys.stdin in ready:
                    return sys.stdin.readline().rstrip("\n")
                wakes.recv(16)  # of another signal, whose handler has run and raised nothing
        finally:
            signal.set_wakeup_fd(former)

"""The prompt returns the typed line, and signals interrupt it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from pipeline.cli.output import ask

#: Ctrl-D, the end-of-file character of a terminal.
END = b"\x04"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Replace stdin by a terminal; writing to the returned descriptor types there."""
    ours, theirs = os.openpty()
    with open(theirs, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield ours
    os.close(ours)


@pytest.mark.parametrize(("typed", "heard"), [(b"b1\n", "b1"), (b"\n", ""), (END, "")])
def test_the_typed_line_is_returned(keys: int, typed: bytes, heard: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.write(keys, typed)
    assert ask("Which? ") == heard
    assert capsys.readouterr().err == "Which? "


def test_sigint_ends_the_wait_and_the_wakeup_descriptor_is_restored(keys: int) -> None:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    former_wakeup = signal.set_wakeup_fd(woken.fileno())
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ask("Which? ")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, former)
        left = signal.set_wakeup_fd(former_wakeup)
        wakes.close()
        woken.close()
    assert left not in (-1, former_wakeup)


def test_a_handled_signal_does_not_end_the_wait(keys: int) -> None:
    def answer(*_: object) -> None:
        came.set()
        os.write(keys, b"b1\n")

    came = threading.Event()
    former = signal.signal(signal.SIGUSR1, answer)
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        assert ask("Which? ") == "b1"
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert came.is_set()

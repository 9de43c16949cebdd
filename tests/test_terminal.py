"""On a terminal: the prompt returns the typed line, signals interrupt it, and a load shows its progress."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli.output import ask
from pipeline.config import Settings
from tests import world
from tests.services import MakeDataset, RunPipeline, subprocess_environment

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


@pytest.mark.slow
def test_a_resumed_load_says_so_and_a_terminal_shows_each_phase(
    workdir: Path, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn, load = settings.database_url.reveal(), ("load", "--source", str(small_dataset(6)), "--batch-id", "b1")
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 2)")
    assert run_pipeline(*load, env={"PIPELINE_BATCH_SIZE": "2"}).returncode == 3
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "pipeline", *load]
    done = subprocess.run(command, env=subprocess_environment(), stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        shown = b""
        while more := terminal.read(1 << 16):
            shown += more
    text = shown.decode()
    assert "\r\nResuming batch b1: 2 of 6 recognitions were uploaded before.\r\n" in text
    assert re.search(r"Processing █+ 100% \| 6/6 \| \d+/s \| ETA: 0s \| upload, recognitions", text)
    assert re.search(r"\rupload: 4 recognitions in [\d.]+ s, \d+/s; 2 by earlier runs", text)
    assert re.search(r"\rtransform: 6 recognitions in [\d.]+ s, \d+/s", text)
    assert "discover" not in text
    assert done.stdout.decode().startswith("Batch b1 is done: 6 recognitions")

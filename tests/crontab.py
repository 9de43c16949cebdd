"""What cron makes of crontab.example: its variables, its lines, and the little that it gives to their commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from embedded_supabase.ports import free_port
from pipeline.config import Settings
from tests.services import REPOSITORY, environment_file

EXAMPLE = REPOSITORY / "crontab.example"
#: What cron itself gives to a command, besides HOME and LOGNAME.
GIVEN = {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
#: Where the example's luigid listens, and where luigi.cfg looks for it.
PORT = "8082"

_SETTING = re.compile(r"(\w+)\s*=\s*(.*)")
_SCHEDULED = re.compile(r"(@reboot|\S+ \S+ \S+ \S+ \S+)\s+(.*)")


@dataclass(frozen=True)
class Line:
    """A line of a crontab: when, and what as it is written there."""

    when: str
    written: str

    @property
    def command(self) -> str:
        """Return what is given to the shell: a percent sign with a backslash is one, without it begins the input."""
        assert not re.search(r"(?<!\\)%", self.written), self.written
        return self.written.replace(r"\%", "%")


@dataclass(frozen=True)
class Table:
    """A crontab."""

    settings: Mapping[str, str]
    lines: tuple[Line, ...]

    def line(self, *words: str) -> list[Line]:
        """Return the lines that have all of some words in them."""
        return [line for line in self.lines if all(word in line.written for word in words)]


def read(text: str) -> Table:
    """Read a crontab as cron does; a comment takes a line of its own."""
    settings: dict[str, str] = {}
    lines: list[Line] = []
    for row in text.splitlines():
        if not row.strip() or row.startswith("#"):
            continue
        if setting := _SETTING.fullmatch(row):
            settings[setting[1]] = setting[2]
        else:
            scheduled = _SCHEDULED.fullmatch(row)
            assert scheduled, row
            lines.append(Line(scheduled[1], scheduled[2]))
    return Table(settings, tuple(lines))


def changed(pipeline: Path, dataset: Path, port: int) -> str:
    """Return the example with its two paths changed, and luigid at a port that is free."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for name, path in (("PIPELINE", pipeline), ("DATASET_DIR", dataset)):
        text, count = re.subn(rf"^{name}=.*$", f"{name}={path}", text, flags=re.MULTILINE)
        assert count == 1
    return text.replace(f"--port {PORT}", f"--port {port}")


def furnish(folder: Path, settings: Settings) -> int:
    """Make a folder as the example expects it, and return the port of its luigid."""
    folder.mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    secrets = folder / ".env.production"
    secrets.touch(mode=0o600)
    secrets.write_text(environment_file(settings), encoding="utf-8")
    port = free_port()
    configuration = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    assert f"scheduler_port = {PORT}\n" in configuration
    changed = configuration.replace(f"scheduler_port = {PORT}\n", f"scheduler_port = {port}\n")
    (folder / "luigi.cfg").write_text(changed, encoding="utf-8")
    return port

"""crontab.example under Debian's cron: installed with `crontab`, run every minute, its mail caught.

cron gets namespaces of its own, with empty folders over those where crontabs are: it sees no other table, nobody else
sees this one, and whatever it started ends with it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from pipeline.graph.luigid import answers
from tests import crontab, world
from tests.services import MakeDataset, subprocess_environment
from tests.system.conftest import require, require_root

pytestmark = pytest.mark.system

#: A minute until cron looks again, and as much again for what it then starts.
SECONDS = 150.0

_ISOLATED = """
set -eu
for folder in /run /etc/cron.d /var/spool/cron/crontabs; do mount -t tmpfs tmpfs "$folder"; done
chgrp crontab /var/spool/cron/crontabs
chmod 1730 /var/spool/cron/crontabs
mount --bind /dev/null /etc/crontab
mount -t overlay overlay -o lowerdir="$1":/usr/sbin /usr/sbin
crontab "$2"
exec cron -f
"""


class Mails:
    """The mails that cron sent, by a stand-in for sendmail."""

    def __init__(self, folder: Path) -> None:
        self.programs, self._mails = folder / "sbin", folder / "mails"
        self.programs.mkdir()
        self._mails.mkdir()
        program = self.programs / "sendmail"
        target = shlex.quote(str(self._mails))
        # Whole or not at all, as with a real one.
        script = f'mail=$(mktemp -p {target} new.XXXXXX) && cat >"$mail" && mv "$mail" "$mail.eml"'
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)

    def read(self) -> list[str]:
        """Return all mails."""
        return [path.read_text(encoding="utf-8") for path in self._mails.glob("*.eml")]


@contextmanager
def cron(folder: Path, table: str, mails: Mails) -> Iterator[subprocess.Popen[bytes]]:
    """Run a cron that knows one table; at the end it is gone, and all that it started."""
    file = folder / "table"
    file.write_text(table, encoding="utf-8")
    isolated = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = [*isolated, "sh", "-c", _ISOLATED, "sh", str(mails.programs), str(file)]
    with open(folder / "cron.log", "wb") as log:
        process = subprocess.Popen(
            command, env=subprocess_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()  # unshare heeds no SIGTERM
        process.wait()


def every_minute(table: str) -> str:
    """Return a table whose lines run each minute, but for those at boot."""
    often, count = re.subn(r"^\d+ \d+ \* \* [*\d]+", "* * * * *", table, flags=re.MULTILINE)
    assert count == 4
    return often


def batches(settings: Settings) -> list[str]:
    return [state for (state,) in world.query(settings.database_url.reveal(), "SELECT state FROM ingest.batches")]


@pytest.mark.slow
def test_the_example_loads_at_night_and_mails_only_what_failed(
    tmp_path: Path, settings: Settings, small_dataset: MakeDataset
) -> None:
    require_root()
    require("cron", "crontab", "unshare", "flock")
    dataset = small_dataset(6)
    folder = tmp_path / "pipeline"
    port = crontab.furnish(folder, settings)
    mails = Mails(tmp_path)
    table = every_minute(crontab.changed(folder, dataset, port))
    logs = folder / "logs"

    def log(name: str) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in logs.glob(f"{name}-*.log"))

    with cron(tmp_path, table, mails) as running:
        # Both loads begin in the same minute, and one waits for the other.
        ended = wait_until(
            lambda: (
                (
                    "Performance Metrics:" in log("load")
                    and "Nothing to load" in log("load")
                    and "Read " in log("verify")
                )
                or running.poll() is not None
            ),
            SECONDS,
        )
        told = (tmp_path / "cron.log").read_text(encoding="utf-8")
        assert running.poll() is None, told
        assert ended, [told, log("load"), log("verify"), *mails.read()]
        assert answers(f"http://127.0.0.1:{port}"), "luigid of @reboot"
    assert mails.read() == []
    assert set(batches(settings)) == {"done"}
    loaded = world.query(settings.database_url.reveal(), "SELECT id FROM ingest.batches WHERE recognitions > 0")
    [(batch_id,)] = loaded
    world.check(settings, (dataset, batch_id, None))
    assert not answers(f"http://127.0.0.1:{port}"), "something outlives cron"

    world.query(settings.database_url.reveal(), "ALTER TABLE ingest.batches RENAME TO elsewhere")
    try:
        with cron(tmp_path, table, mails):
            assert wait_until(lambda: any("pipeline load" in mail for mail in mails.read()), SECONDS)
    finally:
        world.query(settings.database_url.reveal(), "ALTER TABLE ingest.elsewhere RENAME TO batches")
    mail = next(mail for mail in mails.read() if "pipeline load" in mail)
    head, _, body = mail.partition("\n\n")
    assert "Subject: Cron <" in head
    assert re.search(r"^Error: .*ingest\.batches.*\n(Hint: .*\n)?\Z", body, re.MULTILINE), body
    assert "Traceback" not in body
    assert not re.search("[\r\x1b]", body)
    for secret in (settings.key.reveal(), settings.database_url.reveal()):
        assert secret not in mail

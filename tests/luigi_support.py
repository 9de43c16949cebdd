"""One luigid for all tests about Luigi's habits: with history, metrics, resources, and mails to a mailbox of ours."""

from __future__ import annotations

import email
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from embedded_supabase.postgres.server import EmbeddedPostgres
from tests.services import REPOSITORY, fresh_database, running_luigid


class _Session(socketserver.StreamRequestHandler):
    """As much of SMTP as smtplib needs to hand in a mail."""

    server: Mailbox

    def handle(self) -> None:
        self.wfile.write(b"220 mailbox\r\n")
        while line := self.rfile.readline():
            if line[:4].upper() == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                self.server.keep(b"".join(lines))
            self.wfile.write(b"250 done\r\n")


class Mailbox(socketserver.ThreadingTCPServer):
    """A mail server on loopback that keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.mails: list[str] = []

    @property
    def settings(self) -> str:
        """The sections of Luigi's configuration that send mails here."""
        return (
            "[email]\nreceiver = ops@example.org\nforce_send = true\n"
            f"[smtp]\nhost = 127.0.0.1\nport = {self.server_address[1]}\nno_tls = true\n"
        )

    def keep(self, mail: bytes) -> None:
        """Keep subject and text of a mail."""
        message = email.message_from_bytes(mail)
        parts = [part.get_payload(decode=True) for part in message.walk() if not part.is_multipart()]
        text = "\n".join(part.decode() for part in parts if isinstance(part, bytes))
        self.mails.append(f"{message['Subject']}\n{text}")


@contextmanager
def mailbox() -> Iterator[Mailbox]:
    """Run a mail server."""
    with Mailbox() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class SharedLuigid:
    """A luigid, its mails, and the database of its history."""

    url: str
    box: Mailbox
    history: str

    @property
    def options(self) -> tuple[str, str]:
        """The options of `luigi` that name it."""
        return "--scheduler-url", self.url

    @property
    def port(self) -> str:
        """Its port."""
        return str(urlsplit(self.url).port)


@contextmanager
def shared_luigid(folder: Path, postgres: EmbeddedPostgres) -> Iterator[SharedLuigid]:
    """Start it."""
    with mailbox() as box, fresh_database(postgres.dsn, f"history_{folder.name}") as history:
        text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
        text = text.replace(
            "record_task_history = false",
            "record_task_history = true\nmetrics_collector = prometheus\nbatch_emails = true",
        )
        connection = history.replace("postgresql:", "postgresql+psycopg2:").replace("%", "%%")
        text += f"[task_history]\ndb_connection = {connection}\n[batch_email]\nemail_interval = 0\n"
        text += f"{box.settings}[resources]\nscarce = 0\nplenty = 2\n"
        (folder / "luigid.cfg").write_text(text, encoding="utf-8")
        with running_luigid(folder, configuration=folder / "luigid.cfg") as url:
            yield SharedLuigid(url, box, history)

"""What DATABASE_URL says: the address of the database, and which of its parameters are for libpq."""

from __future__ import annotations

import errno
import os
import socket
from typing import NamedTuple
from urllib.parse import unquote

import psycopg2
from psycopg2.extensions import parse_dsn

from pipeline.config import Settings, redact
from pipeline.errors import SettingsError


class Address(NamedTuple):
    """Where a database is; the host, of several the first, is empty or a path for a socket."""

    host: str
    port: int
    user: str
    database: str


def connection_string(url: str) -> str:
    """Return a DATABASE_URL for libpq, without the parameters of other tools."""
    if not url.startswith("postgresql://"):
        return url
    # urlunsplit would drop an empty host, and parse_qsl would decode a plus sign, which libpq does not.
    address, mark, query = url.partition("?")
    return address + mark + "&".join(part for part in query.split("&") if _is_for_libpq(part))


def foreign_parameters(url: str) -> list[str]:
    """Return the names of the parameters that `connection_string` leaves out."""
    query = url.partition("?")[2] if url.startswith("postgresql://") else ""
    return sorted({unquote(part.partition("=")[0]) for part in query.split("&") if not _is_for_libpq(part)})


def _is_for_libpq(part: str) -> bool:
    """Return whether libpq knows the name of a parameter; a malformed value is left for libpq to refuse."""
    # `ssl` is known only with the value `true`.
    return not part or any(_parses(f"postgresql:///?{one}") for one in (part, f"{part.partition('=')[0]}="))


def _parses(url: str) -> bool:
    try:
        parse_dsn(url)
    except psycopg2.ProgrammingError:
        return False
    return True


def address_of(url: str) -> Address:
    """Return the address in a URL; raise SettingsError if it is malformed."""
    try:
        parameters = parse_dsn(connection_string(url))
        port = int((parameters.get("port") or os.environ.get("PGPORT") or "5432").split(",")[0])
    except (psycopg2.ProgrammingError, ValueError) as exc:
        raise malformed_url(exc) from exc
    host = parameters.get("host") or parameters.get("hostaddr") or os.environ.get("PGHOST") or ""
    user = parameters.get("user") or os.environ.get("PGUSER") or ""
    return Address(host.split(",")[0], port, user, parameters.get("dbname") or os.environ.get("PGDATABASE") or user)


def check_parameters(dsn: str) -> None:
    """Raise SettingsError if libpq refuses the value of a parameter, which it tells from an outage by its text alone.

    Therefore libpq connects to a port of this machine at which nothing listens: it checks the values before that.
    """
    with socket.socket() as nothing:
        nothing.bind(("127.0.0.1", 0))
        try:
            parameters = {**parse_dsn(dsn), "host": "127.0.0.1", "port": nothing.getsockname()[1]}
            parameters.pop("hostaddr", None)
            psycopg2.connect(**parameters).close()
        except psycopg2.ProgrammingError as exc:
            raise malformed_url(exc) from exc
        except psycopg2.OperationalError as exc:
            if os.strerror(errno.ECONNREFUSED) in str(exc):
                return
            text = sentence_of(exc).rpartition(" failed: ")[2]
            hint = "Correct it in DATABASE_URL, or remove it. sslmode=require encrypts without checking a certificate."
            raise SettingsError(f"libpq refuses a parameter of DATABASE_URL: {text}", hint) from exc


def malformed_url(exc: Exception) -> SettingsError:
    """Return the error for a DATABASE_URL that libpq does not parse."""
    hint = "Copy it again from Connect in the dashboard."
    return SettingsError(f"DATABASE_URL is not understood: {sentence_of(exc)}", hint)


def sentence_of(exc: BaseException) -> str:
    """Return the text of an error as one sentence without secrets."""
    text = redact(" ".join(str(exc).split())).split(" Is the server running")[0]
    return text if text.endswith((".", "?")) else f"{text}."


def target_of(settings: Settings) -> str:
    """Return what a command reads or writes: environment, project and database, without user and password."""
    try:
        address = address_of(settings.database_url.reveal())
    except SettingsError:  # which the first connection raises
        return f"{settings.environment}, {settings.url}"
    where = f"database {address.database} at {address.host or 'the local socket'}"
    return f"{settings.environment}, {settings.url}, {where}"


def override_remark(settings: Settings) -> str:
    """Return which variables of the process environment override the file, empty for none."""
    names = ", ".join(settings.overridden)
    return f"The process environment overrides {names} of {settings.file}." if names else ""


def foreign_remark(settings: Settings) -> str:
    """Return which parameters of DATABASE_URL are left out, empty for none."""
    names = ", ".join(foreign_parameters(settings.database_url.reveal()))
    return f"Parameters of DATABASE_URL that libpq does not know are left out: {names}." if names else ""

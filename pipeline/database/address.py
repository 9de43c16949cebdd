"""What DATABASE_URL says: the address of the database, and which of its parameters are for libpq."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

import psycopg2
from psycopg2.extensions import parse_dsn

from pipeline.config import Settings, redact
from pipeline.errors import SettingsError

_VARIABLES = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}

#: In the keyword form: a password, with what follows it up to the next name.
_PASSWORD = re.compile(r"password\s*=(.*?)(?=\s[a-z_]+\s*=|$)", re.IGNORECASE | re.DOTALL)


def split_parameters(url: str) -> tuple[str, list[str]]:
    """Return a DATABASE_URL for libpq, and the names of the parameters that it does not know, which are left out."""
    # urlunsplit would drop an empty host, and parse_qsl would decode a plus sign, which libpq does not.
    address, mark, query = url.partition("?")
    if not mark or not url.startswith("postgresql://"):
        return url, []
    known, foreign = [], set()
    for part in filter(None, query.split("&")):
        name = unquote(part.partition("=")[0])
        try:
            # libpq refuses `SSLMODE=require` and `ssl=no-verify` (it knows `ssl=true`): no demand for TLS is dropped.
            if name != "ssl" or part in ("ssl=false", "ssl=0"):
                parse_dsn(f"postgresql:///?{name.lower()}=")
            known.append(part)
        except psycopg2.ProgrammingError:
            foreign.add(name)
    return f"{address}?{'&'.join(known)}", sorted(foreign)


def _parameters(url: str) -> tuple[dict[str, str], str]:
    """Return what URL and environment say, and the name of the service that says the rest."""
    try:
        given = parse_dsn(split_parameters(url)[0])
    except psycopg2.ProgrammingError as exc:
        raise malformed_url(exc, url) from None
    service = given.get("service") or os.environ.get("PGSERVICE") or ""
    environ = {} if service else os.environ  # a service takes precedence over the environment
    return {name: given.get(name) or environ.get(one) or "" for name, one in _VARIABLES.items()}, service


def address_of(url: str) -> tuple[str, int, str]:
    """Return host, port and user of a URL; raise SettingsError if it is malformed.

    The host, of several the first, is empty or a path for a socket, or empty for a service.
    """
    found, _ = _parameters(url)
    port = found["port"].split(",")[0] or "5432"
    if not port.isdecimal():
        raise SettingsError(f"The port of the database, {port}, is not a number.", "Correct DATABASE_URL or PGPORT.")
    return (found["host"] or found["hostaddr"]).split(",")[0], int(port), found["user"]


def malformed_url(exc: Exception, url: str) -> SettingsError:
    """Return the error for a DATABASE_URL that libpq does not parse; raise it without its cause.

    In the keyword form, where a password with spaces needs quotes, libpq may quote a word of the password.
    """
    text, password = str(exc).replace('"="', "="), _PASSWORD.search(url)
    if password is not None and not url.startswith("postgresql://"):
        text = re.sub('"(.*)"', lambda word: '"***"' if word[1] in password[1] else word[0], text)
    hint = (
        "Copy it again from Connect in the dashboard. Parameters are in small letters, TLS is sslmode and not ssl, "
        "what libpq does not know is left out of a URL only, and without a URL a value with spaces needs quotes."
    )
    return SettingsError(f"DATABASE_URL is not understood: {sentence_of(text)}", hint)


def sentence_of(exc: BaseException | str) -> str:
    """Return the text of an error as one sentence without secrets."""
    text = redact(" ".join(str(exc).split())).split(" Is the server running")[0]
    return text if text.endswith((".", "?")) else f"{text}."


def target_of(settings: Settings) -> str:
    """Return what a command reads or writes: environment, project and database, without user and password."""
    target = f"{settings.environment}, {settings.url}"
    try:
        found, service = _parameters(settings.database_url.reveal())
    except SettingsError:  # which the first connection raises
        return target
    hosts = ", ".join(filter(None, (found["host"], found["hostaddr"])))
    where = f"at {hosts or 'the local socket'}" if hosts or not service else f"of the service {service}"
    return " ".join(filter(None, (f"{target}, database", found["dbname"] or found["user"], where)))


def override_remark(settings: Settings) -> str:
    """Return which variables of the process environment override the file, empty for none."""
    names = ", ".join(settings.overridden)
    return f"The process environment overrides {names} of {settings.file}." if names else ""


def foreign_remark(settings: Settings) -> str:
    """Return which parameters of DATABASE_URL are left out, empty for none."""
    names = ", ".join(split_parameters(settings.database_url.reveal())[1])
    return f"Parameters of DATABASE_URL that libpq does not know are left out: {names}." if names else ""

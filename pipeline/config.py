"""Settings of the three environments, and the redaction of secrets.

`.env.local` holds those of the environment `local`, `PIPELINE_HOME/env` (written by `up`) those of `embedded`, which
is chosen without `.env.local`, and `.env.production` those of `production`, chosen by `--production`. A variable of the
process environment overrides the file; `process` is the environment without any file, or with services of others.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values

from pipeline.errors import SettingsError

REQUIRED = URL, KEY, DATABASE = "NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL"
_OPTIONAL = ("STORAGE_BUCKET", "DATASET_DIR", "QWEN_ANNOTATIONS", "PING_URL", "NOTIFY_URLS")
_PREFIX = "PIPELINE_"
#: Tasks of Luigi by the command that does the same.
_TASKS = {"load": "LoadBatch", "load-qwen": "LoadQwen", "reset": "ResetBatch"}

#: Text that is shaped like a secret, and what replaces it.
_SHAPES = (
    (re.compile(r"(?<=://)([^\s/@:]*):[^\s/@]*@"), r"\1:***@"),
    (re.compile(r"(?i)\b(password|sslpassword)=('[^']*'|[^\s&'\"]+)"), r"\1=***"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), "***"),  # a JWT
    (re.compile(r"\bsb_secret_[A-Za-z0-9_-]+"), "***"),
)


@cache
def known_secrets() -> set[str]:
    """Return the secrets of this process, to which each Secret adds: any text may show the secret of any run."""
    return set()


def redact(text: str) -> str:
    """Replace every secret of this process, and text shaped like one, by `***`.

    Bytes of file names that are not UTF-8 are escaped, so that the text can be sent and recorded.
    """
    for secret in sorted(known_secrets(), key=len, reverse=True):  # a secret may contain another one
        text = text.replace(secret, "***")
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Secret:
    """Hold a text that only `reveal()` shows, and that `redact` replaces from now on."""

    _text: str

    def __post_init__(self) -> None:
        if len(self._text) >= 6:  # replacing a shorter one would garble unrelated text
            known_secrets().add(self._text)

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)"

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return (Secret, (self._text,))  # so that the process that unpickles it redacts it, too


_Number = TypeVar("_Number", int, float)


def _between(low: float, high: float, default: _Number) -> _Number:
    """Return the dataclass field of a number with these bounds."""
    return field(default=default, metadata={"bounds": (low, high)})


@dataclass(frozen=True)
class Tuning:
    """Values of the section `[pipeline]` in luigi.cfg; the variable `PIPELINE_<NAME>` overrides each."""

    thread_count: int = _between(1, 512, 16)  # upload threads per worker process
    batch_size: int = _between(1, 1_000_000, 100)  # recognitions per shard; more if the batch had over 1,000 tasks
    retry_max_attempts: int = _between(0, 100, 3)  # retries after a transient error
    retry_backoff_factor: float = _between(1, 60, 2.0)  # retry n waits up to factor ** n seconds, with full jitter
    connection_pool_size: int = _between(1, 200, 10)  # most database connections per process


@dataclass(frozen=True)
class Settings:
    """The settings of one environment; `overridden` are the variables of its file that the process environment sets."""

    environment: str
    url: str
    key: Secret
    database_url: Secret
    bucket: str
    home: Path
    dataset_dir: str | None
    qwen_annotations: str | None
    tuning: Tuning
    file: Path | None = None
    overridden: tuple[str, ...] = ()

    @property
    def is_production(self) -> bool:
        """Return whether `--production` chose the environment."""
        return self.environment == "production"

    def command(self, arguments: str) -> str:
        """Return the command line of ours that works with this environment."""
        return command_line(arguments, self.is_production)

    @property
    def storage_url(self) -> str:
        """Return the base URL of the Storage API, without a trailing slash."""
        return f"{self.url}/storage/v1"


def command_line(arguments: str, production: bool = False) -> str:
    """Return a command line of ours, in the form of the one that started this process."""
    started, (name, *options) = Path(sys.argv[0]), arguments.split(" ")
    by_luigi = started.name == "luigi" or started.parts[-2:] == ("luigi", "__main__.py")
    form = "pipeline" if started.name == "pipeline" else "python -m pipeline"
    if by_luigi and name in _TASKS and (name != "reset" or "--confirm" in options):  # ResetBatch has no prompt
        form, name = "luigi --module pipeline", _TASKS[name]
    return " ".join([form, name, *options, *(["--production"] if production else [])])


def home_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the absolute path of the folder of the embedded services: `PIPELINE_HOME` or `.pipeline`."""
    return expanded("PIPELINE_HOME", environ.get("PIPELINE_HOME") or ".pipeline").absolute()


def expanded(name: str, path: str) -> Path:
    """Return the path that an argument or a variable names, `~` expanded; raise SettingsError where that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as exc:
        raise SettingsError(f"{name} is {path}, in an unknown home directory.", "Write the path without `~`.") from exc


@dataclass(frozen=True)
class Alarms:
    """Where to say how a command ended: a check of healthchecks.io or the like, and what apprise notifies."""

    ping_url: Secret | None
    notify_urls: Secret | None
    home: Path


def read_alarms(production: bool) -> Alarms:
    """Read PING_URL and NOTIFY_URLS, of the process environment alone where the file of the environment is unusable."""
    values: dict[str, str] = {}
    with suppress(SettingsError):  # `load_settings` reports it
        _, path = _choose(production, os.environ, Path.cwd())
        values = _read(path) if path is not None else {}
    values |= {name: value for name, value in os.environ.items() if value}
    ping, notify = (values.get("PING_URL") or "").strip(), (values.get("NOTIFY_URLS") or "").strip()
    # A part of them may be in the message of a library.
    for url in (ping, *re.split(r"[\s,]+", notify)):
        address, _, query = url.partition("?")
        below = address.partition("://")[2].partition("/")[2].rstrip("/")
        for secret in (url, address, query, f"/{below}"):
            Secret(secret)
    home = home_directory({})
    with suppress(SettingsError):
        home = home_directory(values)
    return Alarms(Secret(ping) if ping else None, Secret(notify) if notify else None, home)


def load_settings(
    production: bool = False,
    tuning: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    directory: Path | None = None,
) -> Settings:
    """Read the settings of an environment; `tuning` is the section `[pipeline]` of luigi.cfg.

    The files are in the directory, by default the working directory. Raises SettingsError if a file or a variable is
    missing or malformed, or PIPELINE_HOME is not private.
    """
    directory = directory or Path.cwd()
    environment, path = _choose(production, environ, directory)
    of_file = _read(path) if path is not None else {}
    values = {**of_file, **{name: value for name, value in environ.items() if value}}

    if missing := ", ".join(name for name in REQUIRED if not values.get(name)):
        hint = f"Add to {path}: {missing}; .env.example shows every variable."
        raise SettingsError(f"Not set in {path} or the process environment: {missing}.", hint)
    overridden = tuple(name for name, value in of_file.items() if _is_ours(name) and values[name] != value)
    if environment == "embedded" and {URL, DATABASE} & set(overridden):
        environment = "process"  # its services are not those that `up` started
    return Settings(
        environment=environment,
        url=_project_url(values[URL]),
        key=_key(values[KEY]),
        database_url=_database_url(values[DATABASE]),
        bucket=_bucket(values.get("STORAGE_BUCKET") or "recognitions"),
        home=home_directory(values),
        dataset_dir=values.get("DATASET_DIR") or None,
        qwen_annotations=values.get("QWEN_ANNOTATIONS") or None,
        tuning=_tuning(tuning or {}, values),
        file=path,
        overridden=overridden,
    )


def _is_ours(variable: str) -> bool:
    return variable in REQUIRED + _OPTIONAL or variable.startswith(_PREFIX)


def _choose(production: bool, environ: Mapping[str, str], directory: Path) -> tuple[str, Path | None]:
    if production:
        path = directory / ".env.production"
        if os.path.isfile(path):
            return "production", path
        hint = f"`{command_line('init', production)}` writes it; an empty one will do if the environment has all."
        raise SettingsError(f"--production needs the file {path}, which does not exist.", hint)
    local, home = directory / ".env.local", home_directory(environ)
    if os.path.isfile(local):
        return "local", local
    _check_private(home, 0o022, "write to", "go-w")
    path = home / "env"
    _check_private(path, 0o077, "read", "600")
    if os.path.isfile(path):
        return "embedded", path
    if all(environ.get(name) for name in REQUIRED):
        return "process", None
    hint = f"Start the services with `{command_line('up')}`, or let `{command_line('init')}` write .env.local."
    if os.path.isfile(local.with_name(".env.production")):
        hint = "Add --production, so that .env.production is used."
    raise SettingsError(f"There is neither {local} nor {path}, so no environment to work with.", hint)


def _check_private(path: Path, others: int, problem: str, remedy: str) -> None:
    """Raise SettingsError if another user owns an existing path, also for root, or has one of the modes `others`."""
    hint = "Set PIPELINE_HOME to a folder of yours."
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read: {exc.strerror}.", hint) from exc
    if found.st_uid != os.geteuid():
        raise SettingsError(f"{path} belongs to another user.", hint)
    if found.st_mode & others:
        raise SettingsError(f"Other users can {problem} {path}.", f"Run `chmod {remedy} {shlex.quote(str(path))}`.")


def _read(path: Path) -> dict[str, str]:
    try:
        read = dotenv_values(path, encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{path} is not UTF-8 text.", "Save it as UTF-8.") from exc
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read: {exc.strerror}.", "Check its owner and permissions.") from exc
    return {name: value for name, value in read.items() if value}


def _project_url(text: str) -> str:
    address = text.strip()
    with suppress(ValueError):  # for example an invalid port
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.username)
        if usable and parts.port != 0:
            return address.rstrip("/").removesuffix("/storage/v1")
    example = "https://<project>.supabase.co"
    raise SettingsError(f"{URL} is not a URL such as {example}.", "Copy it from Project Settings, API.")


def _key(text: str) -> Secret:
    if text.isascii() and len(text.split()) == 1:
        return Secret(text.strip())
    raise SettingsError(f"{KEY} is blank, or contains spaces or non-ASCII characters.", "Copy it again, on one line.")


def _database_url(text: str) -> Secret:
    url = re.sub("^postgres://", "postgresql://", text.strip())
    if url.startswith("postgresql://"):
        try:
            password = _password_of(url)
        except ValueError as exc:
            hint = "Percent-encode special characters in the password, such as @ / ? # and [."
            raise SettingsError(f"{DATABASE} is not a valid URL.", hint) from exc
        for secret in (password, unquote(password)):
            Secret(secret)
    elif "=" not in url.partition("://")[0]:  # libpq's keyword form has a parameter before any "://"
        message = f"{DATABASE} is not a URL such as postgresql://user:password@host:port/database."
        raise SettingsError(message, "Copy it from Connect in the Supabase dashboard.")
    return Secret(url)


def _password_of(url: str) -> str:
    """Return the password in a URL, still percent-encoded; raise ValueError if the URL is invalid."""
    parts = urlsplit(url)
    login, at, _ = url.removeprefix("postgresql://").rpartition("@")
    if at and any(character in login for character in "@/?"):  # where libpq ends the password too early
        raise ValueError("a separator in user or password")
    for host in parts.netloc.rpartition("@")[2].split(","):
        port = host.rpartition("]")[2].partition(":")[2]
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("an invalid port")
    return parts.password or ""


def check_required(name: str, text: str) -> None:
    """Raise SettingsError if the text is no value of this required variable."""
    {URL: _project_url, KEY: _key, DATABASE: _database_url}[name](text)


def _bucket(name: str) -> str:
    safe = r"-A-Za-z0-9_!.*'()&$@=;:+,?"
    if not re.fullmatch(f"[{safe}]([{safe} ]{{0,98}}[{safe}])?", name) or name in (".", ".."):
        raise SettingsError(f"STORAGE_BUCKET {name!r} is not a valid bucket name.", "Use letters and digits.")
    return name


def _tuning(section: Mapping[str, str], values: Mapping[str, str]) -> Tuning:
    names = [one.name for one in fields(Tuning)]
    for name in section:
        _check_known(name, names, "The section [pipeline] of Luigi's configuration has an unknown name")
    variables = [_PREFIX + name.upper() for name in ("home", *names)]
    for name in values:
        if name.startswith(_PREFIX):
            _check_known(name, variables, "An unknown variable is set")
    read: dict[str, int | float] = {}
    for one in fields(Tuning):
        variable = _PREFIX + one.name.upper()
        source, text = (variable, values[variable]) if values.get(variable) else (one.name, section.get(one.name))
        if text is None:
            continue
        low, high = one.metadata["bounds"]
        hint = f"Use a number from {low} to {high}."
        is_float = isinstance(one.default, float)
        try:
            number = float(text) if is_float else int(text)
        except ValueError as exc:
            kind = "a number" if is_float else "a whole number"
            raise SettingsError(f"{source} is {text!r}, not {kind}.", hint) from exc
        if not low <= number <= high:
            raise SettingsError(f"{source} is {text}, out of range.", hint)
        read[one.name] = number
    return Tuning(**read)  # type: ignore[arg-type]


def _check_known(name: str, known: Sequence[str], problem: str) -> None:
    if name not in known:
        parts = {one.removeprefix(_PREFIX).lower(): one for one in known}
        nearest = difflib.get_close_matches(name.removeprefix(_PREFIX).lower(), parts, 1)
        hint = f"The nearest is {parts[nearest[0]]}." if nearest else f"The names are {', '.join(known)}."
        raise SettingsError(f"{problem}: {name}.", hint)

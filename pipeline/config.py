"""Settings of the three environments, and the redaction of secrets.

| environment | chosen by                            | settings from                             |
| ----------- | ------------------------------------ | ----------------------------------------- |
| local       | default, when `.env.local` exists    | `.env.local`                              |
| embedded    | default, when it does not            | `PIPELINE_HOME/env`, written by `up`      |
| production  | `--production`                       | `.env.production`                         |

A variable of the process environment overrides the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values

from pipeline.errors import SettingsError

URL = "NEXT_PUBLIC_SUPABASE_URL"
KEY = "SUPABASE_SERVICE_ROLE_KEY"
DATABASE = "DATABASE_URL"
REQUIRED = (URL, KEY, DATABASE)

_USERINFO = re.compile(r"(?<=://)([^\s/@:]*):[^\s/@]*@")
_JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_SUPABASE_KEY = re.compile(r"\bsb_secret_[A-Za-z0-9_-]+")
_PASSWORD = re.compile(r"(?i)\b(password|sslpassword)=('[^']*'|[^\s&'\"]+)")


class Redactor:
    """Replace known secrets, and text shaped like one, by `***`."""

    #: Shorter texts are not added: replacing them would garble unrelated text.
    _MIN_LENGTH = 6

    def __init__(self) -> None:
        self._secrets: set[str] = set()

    def add(self, text: str) -> None:
        """Make a secret known."""
        if len(text) >= self._MIN_LENGTH:
            self._secrets.add(text)

    def redact(self, text: str) -> str:
        """Return the text without secrets."""
        for secret in sorted(self._secrets, key=len, reverse=True):  # a secret may contain another one
            text = text.replace(secret, "***")
        text = _USERINFO.sub(r"\1:***@", text)
        text = _PASSWORD.sub(r"\1=***", text)
        text = _JWT.sub("***", text)
        return _SUPABASE_KEY.sub("***", text)


@cache
def process_redactor() -> Redactor:
    """Return the redactor that every Secret of this process is added to.

    It is one for the process, not for a run: a log line, an error or a task parameter may show the secret of any of
    the process's runs.
    """
    return Redactor()


def redact(text: str) -> str:
    """Return the text without any secret of this process, or anything shaped like one."""
    return process_redactor().redact(text)


class Secret:
    """Hold a text that only `reveal()` shows, and make it known to the redactor of the process."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text
        process_redactor().add(text)

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return (Secret, (self._text,))  # so that the process that unpickles it redacts it, too


@dataclass(frozen=True)
class Tuning:
    """Values of the section `[pipeline]` in luigi.cfg; the variable `PIPELINE_<NAME>` overrides each.

    Attributes:
        thread_count: upload threads per worker process.
        batch_size: recognitions per shard; more where the batch would have over 1,000 tasks.
        retry_max_attempts: retries after a transient error.
        retry_backoff_factor: retry n waits up to factor ** n seconds, with full jitter.
        connection_pool_size: most database connections per process.
    """

    thread_count: int = 16
    batch_size: int = 100
    retry_max_attempts: int = 3
    retry_backoff_factor: float = 2.0
    connection_pool_size: int = 10


_BOUNDS: dict[str, tuple[float, float]] = {
    "thread_count": (1, 512),
    "batch_size": (1, 1_000_000),
    "retry_max_attempts": (0, 100),
    "retry_backoff_factor": (1, 60),
    "connection_pool_size": (1, 200),
}


@dataclass(frozen=True)
class Settings:
    """The settings of one environment."""

    environment: str
    url: str
    key: Secret
    database_url: Secret
    bucket: str
    home: Path
    dataset_dir: str | None
    qwen_annotations: str | None
    tuning: Tuning

    @property
    def storage_url(self) -> str:
        """Return the base URL of the Storage API, without a trailing slash."""
        return f"{self.url}/storage/v1"


def home_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the absolute path of the folder of the embedded services: `PIPELINE_HOME` or `.pipeline`."""
    return Path(environ.get("PIPELINE_HOME") or ".pipeline").expanduser().absolute()


def load_settings(
    production: bool = False,
    tuning: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    directory: Path | None = None,
) -> Settings:
    """Read the settings of an environment.

    Arguments:
        production: require `.env.production`.
        tuning: the section `[pipeline]` of luigi.cfg.
        environ: the process environment, which overrides the file.
        directory: contains the files; by default the working directory.

    Raises:
        SettingsError: a file or a variable is missing or malformed.
    """
    directory = directory or Path.cwd()
    environment, path = _choose(production, environ, directory)
    values = _read(path) if path is not None else {}
    values.update({name: value for name, value in environ.items() if value})

    missing = [name for name in REQUIRED if not values.get(name)]
    if missing:
        raise SettingsError(
            f"Not set in {path} or the process environment: {', '.join(missing)}.",
            f"Add to {path}: {', '.join(missing)}; .env.example shows every variable.",
        )
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
    )


def _choose(production: bool, environ: Mapping[str, str], directory: Path) -> tuple[str, Path | None]:
    if production:
        path = directory / ".env.production"
        if not path.is_file():
            raise SettingsError(
                f"--production needs the file {path}, which does not exist.",
                "Copy .env.example to .env.production and fill it in. It may be empty if the process environment "
                "has the variables.",
            )
        return "production", path
    path = directory / ".env.local"
    if path.is_file():
        return "local", path
    path = home_directory(environ) / "env"
    if path.is_file():
        return "embedded", path
    if all(environ.get(name) for name in REQUIRED):
        return "embedded", None
    raise SettingsError(
        f"There is neither {directory / '.env.local'} nor {path}, so no environment to work with.",
        "Start the embedded services with `python -m pipeline up`, or copy .env.example to .env.local and fill it in.",
    )


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
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username
        usable = usable and parts.port != 0
    except ValueError:  # for example an invalid port
        usable = False
    if not usable:
        raise SettingsError(
            f"{URL} is not a URL such as https://<project>.supabase.co.", "Copy it from Project Settings, API."
        )
    return address.rstrip("/").removesuffix("/storage/v1")


def _key(text: str) -> Secret:
    key = text.strip()
    if not key or not key.isascii() or any(character.isspace() for character in key):
        raise SettingsError(
            f"{KEY} is blank, or contains spaces or non-ASCII characters.", "Copy it again, on one line."
        )
    return Secret(key)


def _database_url(text: str) -> Secret:
    url = text.strip()
    if url.startswith("postgres://"):
        url = "postgresql://" + url[len("postgres://") :]
    if not url.startswith("postgresql://") and "=" not in url:
        raise SettingsError(
            f"{DATABASE} is not a URL such as postgresql://user:password@host:port/database.",
            "Copy it from Connect in the Supabase dashboard.",
        )
    if url.startswith("postgresql://"):
        try:
            password = _password_of(url)
        except ValueError as exc:
            raise SettingsError(
                f"{DATABASE} is not a valid URL.",
                "Percent-encode special characters in the password, such as @ / ? and [.",
            ) from exc
        if password:
            Secret(password)
            Secret(unquote(password))
    return Secret(url)


def _password_of(url: str) -> str | None:
    """Return the password in a URL, still percent-encoded.

    Raises:
        ValueError: the URL is invalid, or libpq would end the password at another character than its author.
    """
    parts = urlsplit(url)
    login, at, _ = url.removeprefix("postgresql://").rpartition("@")
    if at and any(character in login for character in "@/?"):
        raise ValueError("a separator in user or password")
    for host in parts.netloc.rpartition("@")[2].split(","):
        port = host.rpartition("]")[2].partition(":")[2]
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("an invalid port")
    return parts.password


def _bucket(name: str) -> str:
    if (
        not re.fullmatch(r"[A-Za-z0-9_!.*'()&$@=;:+,?-][A-Za-z0-9_!.*'()&$@=;:+,? -]{0,99}", name)
        or name.endswith(" ")
        or name in (".", "..")
    ):
        raise SettingsError(f"STORAGE_BUCKET {name!r} is not a valid bucket name.", "Use letters and digits.")
    return name


def _tuning(section: Mapping[str, str], values: Mapping[str, str]) -> Tuning:
    read: dict[str, int | float] = {}
    for field in fields(Tuning):
        variable = f"PIPELINE_{field.name.upper()}"
        source, text = (variable, values[variable]) if values.get(variable) else (field.name, section.get(field.name))
        if text is None:
            continue
        low, high = _BOUNDS[field.name]
        try:
            number = float(text) if isinstance(field.default, float) else int(text)
        except ValueError as exc:
            raise SettingsError(f"{source} is {text!r}, not a number.", f"Use a number from {low} to {high}.") from exc
        if not low <= number <= high:
            raise SettingsError(f"{source} is {text}, out of range.", f"Use a number from {low} to {high}.")
        read[field.name] = number
    return Tuning(**read)  # type: ignore[arg-type]

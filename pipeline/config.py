"""Settings: which environment, from which file, and never a secret in plain sight.

| environment | chosen by                            | settings from                             |
| ----------- | ------------------------------------ | ----------------------------------------- |
| local       | default, when `.env.local` exists    | `.env.local`                              |
| embedded    | default, when it does not            | `PIPELINE_HOME/env`, written by `up`      |
| production  | `--production`                       | `.env.production`                         |

The process environment wins over the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
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
    """Remove secrets from texts: those that this process knows, and everything that has the form of one."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()

    def add(self, secret: str) -> None:
        """Learn a secret; one of fewer than six characters could be a part of any word."""
        if len(secret) >= 6:
            self._secrets.add(secret)

    def redact(self, text: str) -> str:
        """Return the text with `***` in place of each secret."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        text = _USERINFO.sub(r"\1:***@", text)
        text = _PASSWORD.sub(r"\1=***", text)
        text = _JWT.sub("***", text)
        return _SUPABASE_KEY.sub("***", text)


#: The secrets of this process. Log handlers and excepthooks belong to the process as well, and need all of them.
_redactor = Redactor()


def redact(text: str) -> str:
    """Return the text without any key or password that this process knows, nor anything that has the form of one."""
    return _redactor.redact(text)


class Secret:
    """A text that is shown only by `reveal()`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text
        _redactor.add(text)

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


@dataclass(frozen=True)
class Tuning:
    """Values of `[pipeline]` in luigi.cfg, each overridable by `PIPELINE_<NAME>`.

    Attributes:
        thread_count: upload threads of a worker process.
        batch_size: recognitions of a shard, until a batch would have 1,000 tasks.
        retry_max_attempts: further tries after the first, for a transient error.
        retry_backoff_factor: base of the wait between tries: factor ** try seconds, with full jitter.
        connection_pool_size: database connections that one process keeps at most.
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
    """Everything a run needs to know of the outside."""

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
        """Return the base address of the Storage API, without a trailing slash."""
        return f"{self.url}/storage/v1"


def home_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the embedded services, `PIPELINE_HOME` or `.pipeline`, as an absolute path."""
    return Path(environ.get("PIPELINE_HOME") or ".pipeline").expanduser().absolute()


def load_settings(
    production: bool = False,
    tuning: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    directory: Path | None = None,
) -> Settings:
    """Read the settings of the environment that is asked for.

    Arguments:
        production: read `.env.production`, and nothing else in its place.
        tuning: the section `[pipeline]` of luigi.cfg.
        environ: the process environment; what it has wins over the file.
        directory: where the files are looked for, the working directory by default.

    Raises:
        SettingsError: a file or a variable is missing or malformed.
    """
    directory = directory or Path.cwd()
    environment, path = _choose(production, environ, directory)
    values = _read(path) if path is not None else {}
    values.update({name: value for name, value in environ.items() if value})

    where = str(path) if path is not None else "the process environment"
    missing = [name for name in REQUIRED if not values.get(name)]
    if missing:
        raise SettingsError(
            f"Not set in {where} nor in the environment: {', '.join(missing)}.",
            f"Add to {where}: {', '.join(missing)}; .env.example shows every variable.",
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
                "Copy .env.example to .env.production and fill it in; it may stay empty when the process "
                "environment has the variables.",
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
        raise SettingsError(f"{path} cannot be read: {exc.strerror}.", "Check its owner and mode.") from exc
    return {name: value for name, value in read.items() if value}


def _project_url(text: str) -> str:
    address = text.strip()
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username
        usable = usable and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        usable = False
    if not usable:
        raise SettingsError(
            f"{URL} is not an address of the form https://<project>.supabase.co.", "Copy it from Project Settings, API."
        )
    return address.rstrip("/").removesuffix("/storage/v1")


def _key(text: str) -> Secret:
    key = text.strip()
    if not key or not key.isascii() or any(character.isspace() for character in key):
        raise SettingsError(
            f"{KEY} is blank, or contains spaces or non-ASCII characters.", "Copy it again, in one line."
        )
    return Secret(key)


def _database_url(text: str) -> Secret:
    url = text.strip()
    if url.startswith("postgres://"):
        url = "postgresql://" + url[len("postgres://") :]
    if not url.startswith("postgresql://") and "=" not in url:
        raise SettingsError(
            f"{DATABASE} is not of the form postgresql://user:password@host:port/database.",
            "Copy it from Connect in the Supabase dashboard.",
        )
    if url.startswith("postgresql://"):
        try:
            password = _split_address(url)
        except ValueError as exc:
            raise SettingsError(
                f"{DATABASE} is not a valid address.",
                "Percent-encode special characters of the password, such as @ / ? and [.",
            ) from exc
        if password:
            Secret(password)
            Secret(unquote(password))
    return Secret(url)


def _split_address(url: str) -> str | None:
    """Return the password of an address, still encoded.

    Raises:
        ValueError: libpq would cut it elsewhere than meant, and take a part of the password for something else.
    """
    parts = urlsplit(url)
    login, at, _ = url.removeprefix("postgresql://").rpartition("@")
    if at and any(character in login for character in "@/?"):
        raise ValueError("a separator within the login")
    for host in parts.netloc.rpartition("@")[2].split(","):
        port = host.rpartition("]")[2].partition(":")[2]
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("a port that is none")
    return parts.password


def _bucket(name: str) -> str:
    if (
        not re.fullmatch(r"[A-Za-z0-9_!.*'()&$@=;:+,?-][A-Za-z0-9_!.*'()&$@=;:+,? -]{0,99}", name)
        or name.endswith(" ")
        or name in (".", "..")
    ):
        raise SettingsError(f"STORAGE_BUCKET {name!r} is not a name that Supabase accepts.", "Use letters and digits.")
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
            raise SettingsError(f"{source} is {text}, out of bounds.", f"Use a number from {low} to {high}.")
        read[field.name] = number
    return Tuning(**read)  # type: ignore[arg-type]

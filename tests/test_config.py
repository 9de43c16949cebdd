"""config.py: precedence and validation of settings, and redaction of secrets."""

from __future__ import annotations

import pickle
import string
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import (
    DATABASE,
    KEY,
    REQUIRED,
    URL,
    Secret,
    Settings,
    Tuning,
    known_secrets,
    load_settings,
    redact,
)
from pipeline.errors import SettingsError

PASSWORD = "correct-horse-battery"
GOOD = {
    URL: "https://abc.supabase.co",
    KEY: "sb_secret_0123456789abcdef",
    DATABASE: f"postgresql://postgres:{PASSWORD}@db.abc.supabase.co:5432/postgres",
}
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJlLW9mLXRoZS1rZXk"


def dotenv(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def load(directory: Path, /, **environ: str) -> Settings:
    return load_settings(environ=environ, directory=directory)


def load_production(directory: Path, /, **environ: str) -> Settings:
    return load_settings(production=True, environ=environ, directory=directory)


def refused(directory: Path, /, **changed: str) -> SettingsError:
    return refused_with({}, directory, **changed)


def refused_with(tuning: Mapping[str, str], directory: Path, /, **changed: str) -> SettingsError:
    """Return the error that good settings with one bad value give, after a look at its form."""
    environ = {**GOOD, "PIPELINE_HOME": str(directory), **changed}
    with pytest.raises(SettingsError) as caught:
        load_settings(tuning=tuning, environ=environ, directory=directory)
    error = caught.value
    assert error.message.endswith(".")
    assert "\n" not in error.message
    assert error.hint.endswith(".")
    return error


# Which file, and who wins


def test_local_takes_precedence_over_running_embedded_services(tmp_path: Path) -> None:
    (tmp_path / ".env.local").write_text(dotenv(GOOD))
    (tmp_path / ".pipeline").mkdir()
    (tmp_path / ".pipeline" / "env").write_text(dotenv({**GOOD, URL: "http://127.0.0.1:20000"}))
    settings = load(tmp_path, PIPELINE_HOME=str(tmp_path / ".pipeline"))
    assert settings.environment == "local"
    assert settings.url == GOOD[URL]
    assert settings.storage_url == "https://abc.supabase.co/storage/v1"


def test_embedded_is_chosen_without_env_local(tmp_path: Path) -> None:
    home = tmp_path / "a home with spaces"
    home.mkdir()
    (home / "env").touch(mode=0o600)
    (home / "env").write_text(dotenv({name: f"'{value}'" for name, value in GOOD.items()}))
    settings = load(tmp_path, PIPELINE_HOME=str(home))
    assert settings.environment == "embedded"
    assert settings.database_url == Secret(GOOD[DATABASE])
    assert settings.home == home


@pytest.mark.parametrize(
    ("changed", "environment"),
    [
        ({URL: "https://other.supabase.co"}, "process"),
        ({DATABASE: "postgresql://u@elsewhere/db"}, "process"),
        ({URL: "https://other.supabase.co", KEY: "k2", DATABASE: "postgresql://u@elsewhere/db"}, "process"),
        ({KEY: "k2"}, "embedded"),
        ({"STORAGE_BUCKET": "other"}, "embedded"),
        (GOOD, "embedded"),
    ],
)
def test_services_that_up_did_not_start_are_not_called_embedded(
    tmp_path: Path, changed: dict[str, str], environment: str
) -> None:
    (tmp_path / "env").touch(mode=0o600)
    (tmp_path / "env").write_text(dotenv({**GOOD, "STORAGE_BUCKET": "ours"}))
    settings = load(tmp_path, PIPELINE_HOME=str(tmp_path), **changed)
    assert settings.environment == environment
    assert settings.file == tmp_path / "env"
    (tmp_path / "env").rename(tmp_path / ".env.production")
    assert load_settings(True, None, {**changed, "PIPELINE_HOME": str(tmp_path)}, tmp_path).is_production


def test_the_process_environment_alone_is_enough(tmp_path: Path) -> None:
    settings = load(tmp_path, PIPELINE_HOME=str(tmp_path), **GOOD)
    assert settings.key.reveal() == GOOD[KEY]


def test_the_error_without_settings_names_both_remedies(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, PIPELINE_HOME=str(tmp_path / "home"))
    assert ".env.local" in caught.value.message
    assert str(tmp_path / "home" / "env") in caught.value.message
    assert "python -m pipeline up" in caught.value.hint


def test_production_reads_its_own_file(tmp_path: Path) -> None:
    (tmp_path / ".env.local").write_text(dotenv({**GOOD, URL: "http://127.0.0.1:54321"}))
    (tmp_path / ".env.production").write_text(dotenv(GOOD))
    settings = load_production(tmp_path)
    assert (settings.environment, settings.url) == ("production", GOOD[URL])
    assert load(tmp_path).url == "http://127.0.0.1:54321"


def test_production_never_falls_back_to_another_file(tmp_path: Path) -> None:
    (tmp_path / ".env.local").write_text(dotenv(GOOD))
    (tmp_path / "env").write_text(dotenv(GOOD))
    with pytest.raises(SettingsError, match=r"\.env\.production"):
        load_production(tmp_path, PIPELINE_HOME=str(tmp_path))
    (tmp_path / ".env.production").write_text("")
    with pytest.raises(SettingsError) as caught:
        load_production(tmp_path, PIPELINE_HOME=str(tmp_path))
    assert all(name in caught.value.message for name in REQUIRED)


def test_local_never_falls_back_to_production(tmp_path: Path) -> None:
    (tmp_path / ".env.production").write_text(dotenv(GOOD))
    with pytest.raises(SettingsError):
        load(tmp_path, PIPELINE_HOME=str(tmp_path))
    (tmp_path / ".env.local").write_text(dotenv({URL: GOOD[URL]}))
    with pytest.raises(SettingsError, match=f"{KEY}, {DATABASE}"):
        load(tmp_path, PIPELINE_HOME=str(tmp_path))


def test_a_variable_overrides_the_file_unless_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".env.local").write_text(dotenv({**GOOD, "STORAGE_BUCKET": "of-file", "DATASET_DIR": "/of/file"}))
    settings = load(tmp_path, STORAGE_BUCKET="of-environment", DATASET_DIR="")
    assert (settings.bucket, settings.dataset_dir) == ("of-environment", "/of/file")
    assert (settings.overridden, settings.file) == (("STORAGE_BUCKET",), tmp_path / ".env.local")
    assert load(tmp_path).bucket == "of-file"


def test_an_unset_setting_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env.local").write_text(dotenv(GOOD))
    settings = load(tmp_path)
    assert (settings.bucket, settings.dataset_dir, settings.qwen_annotations) == ("recognitions", None, None)
    assert settings.home == tmp_path / ".pipeline"
    assert settings.tuning == Tuning(16, 100, 3, 2.0, 10)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("file", [".env.local", ".env.production"])
def test_a_missing_variable_is_named_with_its_file(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).write_text(dotenv({**GOOD, name: ""}))
    with pytest.raises(SettingsError) as caught:
        (load_production if file == ".env.production" else load)(tmp_path)
    said = f"{caught.value.message} {caught.value.hint}"
    assert name in said
    assert str(tmp_path / file) in said
    assert not any(other in said for other in REQUIRED if other != name)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + dotenv(GOOD),
        dotenv(GOOD).replace("\n", "\r\n"),
        "\ufeff" + dotenv({name: f'"{value}"' for name, value in GOOD.items()}).replace("\n", "\r\n"),
        dotenv({name: f"'{value}'" for name, value in GOOD.items()}),
        dotenv({f"export {name}": value for name, value in GOOD.items()}),
        dotenv({f"  {name} ": f" {value}  # a comment" for name, value in GOOD.items()}),
        "# Привет\n\n" + dotenv(GOOD).rstrip("\n"),
    ],
    ids=["BOM", "CRLF", "BOM, CRLF and quotes", "single quotes", "export", "spaces and comments", "Cyrillic"],
)
def test_every_common_dotenv_syntax_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / ".env.local").write_bytes(text.encode())
    settings = load(tmp_path)
    assert {URL: settings.url, KEY: settings.key.reveal(), DATABASE: settings.database_url.reveal()} == GOOD


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env.local").write_bytes("ПАРОЛЬ=да\n".encode("cp1251"))
    with pytest.raises(SettingsError, match=r"\.env\.local is not UTF-8"):
        load(tmp_path)


# Malformed values


@pytest.mark.parametrize(
    "value",
    ["abc.supabase.co", "ftp://abc.supabase.co", "https://", "https://u:hunter2hunter2@abc.co", "https://a.b?c=d"],
)
def test_a_malformed_project_url_is_reported_in_one_sentence(tmp_path: Path, value: str) -> None:
    assert URL in (error := refused(tmp_path, **{URL: value})).message
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("value", ["http://[::1", "https://abc.supabase.co:port", "https://abc.supabase.co:99999"])
def test_an_unparsable_project_url_is_reported_in_one_sentence(tmp_path: Path, value: str) -> None:
    assert URL in refused(tmp_path, **{URL: value}).message


@pytest.mark.parametrize(
    "value",
    [
        "https://abc.supabase.co/",
        "  https://abc.supabase.co\t",
        "https://abc.supabase.co/storage/v1",
        "https://abc.supabase.co/storage/v1/",
    ],
)
def test_common_variations_of_the_project_url_are_equivalent(tmp_path: Path, value: str) -> None:
    (tmp_path / ".env.local").write_text(dotenv(GOOD))
    assert load(tmp_path, **{URL: value}).storage_url == "https://abc.supabase.co/storage/v1"


@pytest.mark.parametrize("value", ["two words-of-a-key", "line\nbreak-of-a-key", "ключ-of-a-key", "tab\tof-a-key"])
def test_a_malformed_key_is_not_quoted(tmp_path: Path, value: str) -> None:
    error = refused(tmp_path, **{KEY: value})
    assert KEY in error.message
    assert "of-a-key" not in f"{error.message} {error.hint}"


def test_a_blank_key_is_refused(tmp_path: Path) -> None:
    assert KEY in refused(tmp_path, **{KEY: "   "}).message


@pytest.mark.parametrize(
    "value",
    [
        "db.abc.supabase.co",
        f"mysql://root:{PASSWORD}@db.abc.supabase.co/postgres",
        f"postgresql+psycopg2://postgres:{PASSWORD}@db.abc.supabase.co/postgres",
        f"postgresql+psycopg2://postgres:{PASSWORD}/x@db.abc.supabase.co/postgres?sslmode=require",
        f'"postgresql://postgres:{PASSWORD}@db.abc.supabase.co/postgres?sslmode=require"',
        f"postgresql://postgres:[{PASSWORD}@db.abc.supabase.co/postgres",
    ],
)
def test_a_malformed_database_url_is_not_quoted(tmp_path: Path, value: str) -> None:
    error = refused(tmp_path, **{DATABASE: value})
    assert DATABASE in error.message
    assert PASSWORD not in f"{error.message} {error.hint}"
    assert "db.abc" not in f"{error.message} {error.hint}"


@pytest.mark.parametrize("character", "@/?")
def test_a_password_without_percent_encoding_is_refused_and_not_shown(tmp_path: Path, character: str) -> None:
    url = f"postgresql://postgres:correct{character}horse@db.abc.supabase.co:5432/postgres"
    error = refused(tmp_path, **{DATABASE: url})
    assert DATABASE in error.message
    assert "ercent-encode" in error.hint
    assert "horse" not in f"{error.message} {error.hint}"


@pytest.mark.parametrize("port", ["port", "5432x", "99999"])
def test_an_invalid_database_port_is_refused(tmp_path: Path, port: str) -> None:
    assert DATABASE in refused(tmp_path, **{DATABASE: f"postgresql://u:p@host:{port}/db"}).message


def test_the_short_scheme_and_the_keyword_form_of_libpq_are_accepted(tmp_path: Path) -> None:
    (tmp_path / ".env.local").write_text(dotenv(GOOD))
    short = GOOD[DATABASE].replace("postgresql://", "postgres://")
    assert load(tmp_path, **{DATABASE: short}).database_url.reveal() == GOOD[DATABASE]
    words = f"host=db.abc.supabase.co user=postgres password={PASSWORD}"
    assert load(tmp_path, **{DATABASE: words}).database_url.reveal() == words


@pytest.mark.parametrize("name", ["a/b", " a", "a ", "бакет", "a\nb", "ab\n", 'a"b', "x" * 101])
def test_an_invalid_bucket_name_is_refused(tmp_path: Path, name: str) -> None:
    assert "STORAGE_BUCKET" in refused(tmp_path, STORAGE_BUCKET=name).message


@pytest.mark.parametrize(
    "name",
    [
        "recognitions",
        "a",
        "Of photos (2025)!",
        "x" * 100,
    ],
)
def test_a_valid_bucket_name_is_accepted(tmp_path: Path, name: str) -> None:
    assert load(tmp_path, PIPELINE_HOME=str(tmp_path), STORAGE_BUCKET=name, **GOOD).bucket == name


@pytest.mark.parametrize("name", [".", ".."])
def test_a_bucket_name_that_a_url_path_normalises_away_is_refused(tmp_path: Path, name: str) -> None:
    assert "STORAGE_BUCKET" in refused(tmp_path, STORAGE_BUCKET=name).message


def test_the_environment_overrides_the_tuning_of_luigi_cfg(tmp_path: Path) -> None:
    section = {
        "thread_count": "1",
        "batch_size": "7",
        "retry_max_attempts": "0",
        "retry_backoff_factor": "1.5",
        "connection_pool_size": "2",
    }
    variables = {**GOOD, "PIPELINE_HOME": str(tmp_path)}
    assert load_settings(False, section, variables, tmp_path).tuning == Tuning(1, 7, 0, 1.5, 2)
    variables |= {"PIPELINE_THREAD_COUNT": "512", "PIPELINE_RETRY_BACKOFF_FACTOR": "3", "PIPELINE_BATCH_SIZE": ""}
    assert load_settings(False, section, variables, tmp_path).tuning == Tuning(512, 7, 0, 3.0, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thread_count", "0"),
        ("thread_count", "513"),
        ("thread_count", "many"),
        ("thread_count", "1.5"),
        ("batch_size", "-1"),
        ("batch_size", "1000001"),
        ("retry_max_attempts", "-1"),
        ("retry_max_attempts", "101"),
        ("retry_backoff_factor", "0.9"),
        ("retry_backoff_factor", "61"),
        ("retry_backoff_factor", "nan"),
        ("retry_backoff_factor", "inf"),
        ("connection_pool_size", "0"),
        ("connection_pool_size", "201"),
    ],
)
def test_an_invalid_tuning_value_is_named_with_its_source(tmp_path: Path, name: str, value: str) -> None:
    variable = f"PIPELINE_{name.upper()}"
    error = refused(tmp_path, **{variable: value})
    assert error.message.startswith(f"{variable} is ")
    assert "from" in error.hint
    error = refused_with({name: value}, tmp_path)
    assert error.message.startswith(f"{name} is ")
    assert value in error.message


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("thread_counts", "thread_count"), ("batchsize", "batch_size"), ("Thread_Count", "thread_count"), ("colour", "")],
)
def test_an_unknown_name_in_luigi_cfg_is_refused_with_the_nearest(tmp_path: Path, name: str, nearest: str) -> None:
    error = refused_with({name: "3"}, tmp_path)
    assert name in error.message
    assert error.hint == f"The nearest is {nearest}." if nearest else "thread_count, batch_size" in error.hint


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PIPELINE_THREAD_COUNTS", "PIPELINE_THREAD_COUNT"),
        ("PIPELINE_BATCHSIZE", "PIPELINE_BATCH_SIZE"),
        ("PIPELINE_thread_count", "PIPELINE_THREAD_COUNT"),
        ("PIPELINE_HOM", "PIPELINE_HOME"),
        ("PIPELINE_NONSENSE", ""),
    ],
)
def test_an_unknown_variable_of_ours_is_refused_with_the_nearest(tmp_path: Path, name: str, nearest: str) -> None:
    error = refused(tmp_path, **{name: "3"})
    assert error.message == f"An unknown variable is set: {name}."
    assert error.hint == f"The nearest is {nearest}." if nearest else "PIPELINE_HOME, " in error.hint


# Secrets


secrets = st.text(st.sampled_from(string.ascii_letters + string.digits + "-_.~!$&'()*+,;=%"), min_size=6, max_size=60)


@given(secrets)
def test_only_reveal_shows_a_secret(text: str) -> None:
    # A text that is part of the placeholder, such as "Secret", would prove nothing.
    text = f"0{text}0"
    secret = Secret(text)
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret!r:>80}", "%s" % secret, repr([secret])):  # noqa: UP031
        assert text not in shown
    assert secret.reveal() == text
    assert secret == Secret(text)
    assert hash(secret) == hash(Secret(text))
    assert secret != Secret(f"{text}0")


@given(secrets, st.text(max_size=40), st.text(max_size=40))
def test_a_known_secret_is_redacted_in_any_text(text: str, before: str, after: str) -> None:
    text = f"0{text}0"
    Secret(text)
    assert text not in redact(before + text + after)


@given(st.text(min_size=6, max_size=40).filter(lambda text: text.isprintable()))
def test_a_password_is_redacted_decoded_and_encoded(password: str) -> None:
    password = f"01{password}10"
    url = f"postgresql://postgres:{quote(password, safe='')}@db.abc.supabase.co/postgres"
    settings = load_settings(environ={**GOOD, DATABASE: url, "PIPELINE_HOME": "/nonexistent"}, directory=Path("/"))
    for shown in (repr(settings), redact(f"could not log in with {password}"), redact(f"dsn {url}")):
        assert password not in shown
        assert quote(password, safe="") not in shown


def test_settings_do_not_show_their_secrets(tmp_path: Path) -> None:
    settings = load(tmp_path, PIPELINE_HOME=str(tmp_path), **GOOD)
    shown = f"{settings} {settings!r}"
    assert PASSWORD not in shown
    assert GOOD[KEY] not in shown
    assert GOOD[URL] in shown


def test_an_unpickled_secret_is_equal_and_redacted() -> None:
    secret = Secret("0123456789")
    pickled = pickle.dumps(secret)
    known_secrets.cache_clear()  # as in another process
    assert pickle.loads(pickled) == secret
    assert redact("as 0123456789") == "as ***"
    assert secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://postgres:pa55@db.co:5432/x", "postgresql://postgres:***@db.co:5432/x"),
        ("http://u:p%40ss%2Fword@proxy:3128 failed", "http://u:***@proxy:3128 failed"),
        ("see https://abc.supabase.co:443/a and a@b.co", "see https://abc.supabase.co:443/a and a@b.co"),
        (f"Bearer {JWT} refused", "Bearer *** refused"),
        ("eyJhbGciOiJ.eyJ.", "***"),
        ("key=sb_secret_abc-DEF_123, sb_publishable_x", "key=***, sb_publishable_x"),
        ("host=h password=pa55 user=u", "host=h password=*** user=u"),
        ("host=h PASSWORD='two words' user=u", "host=h PASSWORD=*** user=u"),
        ("postgresql://h/d?sslpassword=pa55&user=u", "postgresql://h/d?sslpassword=***&user=u"),
        ("nothing to hide: 12345", "nothing to hide: 12345"),
    ],
)
def test_an_unknown_text_shaped_like_a_secret_is_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_secret_too_short_to_be_distinctive_is_not_redacted() -> None:
    Secret("abc")
    assert redact("abc and abcd") == "abc and abcd"


def test_a_secret_that_contains_another_is_redacted_whole() -> None:
    Secret("secret-one")
    Secret("secret-one-and-more")
    assert redact("secret-one-and-more, secret-one") == "***, ***"

"""`PIPELINE_HOME` and the secrets in it must belong to the current user, and to nobody else."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from embedded_supabase import EmbeddedPostgres, EmbeddedStorage, SetupError, services
from embedded_supabase.files import make_home, read_secret, write_atomically
from pipeline.config import load_settings
from pipeline.errors import SettingsError
from tests.services import RunPipeline
from tests.test_config import GOOD, dotenv

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
OTHER = 1

#: The operations that open a home; none may start or read anything in a home that is not private.
OPERATIONS: dict[str, Callable[[Path], object]] = {
    "up": services.up,
    "down": services.down,
    "state": services.services_state,
    "postgres": lambda home: EmbeddedPostgres(home).start(),
    "stop-postgres": lambda home: EmbeddedPostgres(home).stop(),
    "dsn": lambda home: EmbeddedPostgres(home).dsn,
    "storage": lambda home: EmbeddedStorage(home).start(),
    "stop-storage": lambda home: EmbeddedStorage(home).stop(),
    "key": lambda home: EmbeddedStorage(home).key,
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A private home with the files of services that were stopped."""
    home = tmp_path / "a home"
    make_home(home)
    (home / "storage").mkdir()
    for name, text in (
        ("env", dotenv(GOOD)),
        ("jwt-secret", uuid.uuid4().hex),
        ("lock", ""),
        ("postgres.json", f'{{"home": "{home}", "base": "{home}/postgres", "socket": "{home}/postgres/socket"}}'),
    ):
        write_atomically(home / name, text)
    return home


def settings_error(home: Path) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home.parent)
    return caught.value


def test_a_private_home_is_read(home: Path) -> None:
    assert load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home.parent).environment == "embedded"
    assert EmbeddedStorage(home).key.startswith("eyJ")
    assert services.down(home).seconds >= 0


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_home_that_others_can_write_to_is_refused(home: Path, operation: str, mode: int) -> None:
    home.chmod(mode)
    before = sorted(home.iterdir())
    with pytest.raises(SetupError) as caught:
        OPERATIONS[operation](home)
    assert caught.value.message == f"Other users can write to {home}."
    assert caught.value.hint == f"Run `chmod go-w '{home}'`, or set PIPELINE_HOME to another folder."
    assert sorted(home.iterdir()) == before
    error = settings_error(home)
    assert (error.message, error.hint) == (caught.value.message, f"Run `chmod go-w '{home}'`.")


@as_root
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_home_of_another_user_is_refused(home: Path, operation: str) -> None:
    os.chown(home, OTHER, -1)
    before = sorted(home.iterdir())
    with pytest.raises(SetupError) as caught:
        OPERATIONS[operation](home)
    assert caught.value.message == f"{home} belongs to another user."
    assert caught.value.hint == "Set PIPELINE_HOME to a folder of yours."
    assert sorted(home.iterdir()) == before
    assert settings_error(home).message == caught.value.message


@pytest.mark.parametrize("mode", [0o700, 0o711, 0o755])
def test_a_home_that_others_can_only_enter_or_list_is_used(home: Path, mode: int) -> None:
    home.chmod(mode)
    make_home(home)
    assert load_settings(environ={"PIPELINE_HOME": str(home)}, directory=home.parent).environment == "embedded"


def test_a_symlink_to_a_private_home_is_used_and_to_another_refused(home: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(home)
    make_home(link)
    assert EmbeddedStorage(link).key == EmbeddedStorage(home).key
    assert load_settings(environ={"PIPELINE_HOME": str(link)}, directory=tmp_path).environment == "embedded"
    home.chmod(0o777)
    with pytest.raises(SetupError, match="Other users can write to"):
        make_home(link)
    assert settings_error(link).message == f"Other users can write to {link}."


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_open_is_not_read(home: Path, mode: int) -> None:
    for name in ("env", "jwt-secret"):
        (home / name).chmod(mode)
    for operation in ("key", "storage"):
        with pytest.raises(SetupError) as caught:
            OPERATIONS[operation](home)
        assert caught.value.message == f"Other users can read the secret in {home / 'jwt-secret'}."
        assert f"chmod 600 '{home / 'jwt-secret'}'" in caught.value.hint
    assert not EmbeddedStorage(home).is_running()
    error = settings_error(home)
    assert (error.message, error.hint) == (f"Other users can read {home}/env.", f"Run `chmod 600 '{home}/env'`.")


@as_root
def test_a_secret_of_another_user_is_not_read(home: Path) -> None:
    for name in ("env", "jwt-secret"):
        os.chown(home / name, OTHER, -1)
    with pytest.raises(SetupError, match="jwt-secret belongs to another user"):
        read_secret(home / "jwt-secret")
    assert settings_error(home).message == f"{home}/env belongs to another user."


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_the_commands_refuse_a_home_that_is_not_private(home: Path, run_pipeline: RunPipeline, command: str) -> None:
    home.chmod(0o777)
    done = run_pipeline(command, cwd=home.parent, env={"PIPELINE_HOME": str(home)})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Other users can write to {home}." in done.stderr
    assert "chmod go-w" in done.stderr
    assert "Traceback" not in done.stderr

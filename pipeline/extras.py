"""Commands whose libraries a core installation does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import SettingsError

#: The name on the package index.
DISTRIBUTION = "canteen-tray-loader"


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import an extra's modules in the block; raise SettingsError, with the install command, if one is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] in ("pipeline", "embedded_supabase"):
            raise  # part of every installation
        hint = f"Run `pip install '.[{name}]'` in the folder of the project, or `pip install '{DISTRIBUTION}[{name}]'`."
        raise SettingsError(f"This command needs {exc.name}, which is not installed.", hint) from exc

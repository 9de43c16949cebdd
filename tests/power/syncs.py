"""The syncs of the embedded services: what each is for, and whether the check notices that it is missing."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from tests.power.log import PACKAGE, site
from tests.power.states import Count, Found, Recording, violations

_FILES, _STORAGE = "embedded_supabase/files.py", "embedded_supabase/storage"
#: What a power failure can take without the sync.
SYNCS = {
    f"{_STORAGE}/files.py: disk.sync(file)": "the content of an uploaded or copied object",
    f"{_STORAGE}/files.py: disk.sync_folder(target.parent)": "the name of its file",
    "SQLite: index.sqlite-wal": "the row of an object or a bucket, or a deletion",
    "SQLite: index.sqlite": "rows that were moved from the log to the index",
    "SQLite: index.sqlite-journal": "the index, while it is created",
    "SQLite: the folder of index.sqlite": "the names of the index, of its log and of the folders beside them",
    f"{_STORAGE}/store.py: disk.sync_folder(self._objects)": "one of the 256 folders of objects",
    f"{_STORAGE}/store.py: disk.sync_folder(root.parent)": "the folder of the store",
    f"{_FILES}: disk.sync(file)": "the content of the secret, or of `storage.port`",
    f"{_FILES}: disk.sync_folder(path.parent)": "the name of such a file",
    f"{_FILES}: disk.sync_folder(fresh)": "the mode of a new folder, so that PostgreSQL cannot enter it",
    f"{_FILES}: disk.sync_folder(home.parent)": "the home",
    f"{_FILES}: disk.sync_folder(folder.parent)": "a folder that was created above the home",
}
#: Those of a start of PostgreSQL, which `postgres.py` records.
POSTGRES_SYNC = "embedded_supabase/postgres/server.py: self._disk.sync_folder(folder)"
#: Not recorded: only for root, if the user of PostgreSQL cannot reach the home; the folder is below /var.
NOT_RECORDED = "embedded_supabase/postgres/server.py: self._disk.sync_folder(parent)"

GUIDE = PACKAGE.parent / "docs" / "explanation" / "power-loss.md"
MARKS = "<!-- syncs: `make docs` writes this table -->\n\n", "\n<!-- end of syncs -->"
#: A missing sync that so many states do not show counts as superfluous.
LIMIT = 1000


def in_code() -> set[str]:
    """Return every line of the package that syncs through a disk."""
    return {
        site(file, line)
        for file in PACKAGE.rglob("*.py")
        if file.name != "disk.py"
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"disk\.sync(_folder)?\(", line)
    }


def first_violation(
    recordings: Sequence[Recording], without: str, folder: Path, seed: int, count: Count
) -> Found | None:
    """Return a violation that a missing sync causes, None if no state of any recording shows one."""
    for one in recordings:
        if without in one.sites():
            for found in violations(one, folder, LIMIT, random.Random(seed), count, without):
                return found
    return None


def table() -> str:
    """Return the table of the guide."""
    rows = [f"| `{name}` | {loss} |" for name, loss in SYNCS.items()]
    return "\n".join(["| sync | without it, a power failure can take |", "| --- | --- |", *rows]) + "\n"


def main() -> int:
    """Write the table into the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    GUIDE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Commands, fixtures and comparisons for tests of reset, and of what is run after a load."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import Settings
from pipeline.errors import StorageError
from pipeline.sample.writer import ANNOTATIONS
from pipeline.storage import Storage
from tests import world
from tests.services import after_target

COMMAND = (sys.executable, "-m", "pipeline", "reset")


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, where stdin is no terminal."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, after_target(err))

    return run


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.database_url.reveal()


@pytest.fixture
def load(command: Command) -> Callable[..., None]:
    """Load a dataset, or with `qwen` its annotations, to the end, whatever is rejected."""

    def run(source: Path, batch_id: str, *options: str, qwen: bool = False) -> None:
        arguments = ("load-qwen", "--file", source / ANNOTATIONS) if qwen else ("load", "--source", source)
        done = command(*arguments, "--batch-id", batch_id, "--local-scheduler", "--max-rejects", "100%", *options)
        told = [line for line in done.err.splitlines() if not line.startswith(f"Resuming batch {batch_id}: ")]
        assert (done.code, told) == (0, [])

    return run


LoadBatch = Callable[..., None]


def rows(dsn: str, **statements: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of several statements by their names."""
    return dict(zip(statements, world.queries(dsn, statements.values()), strict=True))


def state(settings: Settings) -> dict[str, Any]:
    """Return all that a reset has to leave as it found it: what readers see, the bucket, the others' rows."""
    dsn = settings.database_url.reveal()
    others = [name for name in world.OURS if not name.startswith("public.") and name != "ingest.batches"]
    return {
        "domain": vars(world.domain(dsn)),
        "objects": world.objects(settings),
        **rows(
            dsn,
            menus="SELECT content_sha256, (SELECT count(*) FROM public.menu_items i WHERE i.menu_id = m.id)"
            " FROM public.menus m ORDER BY 1",
            batches="SELECT id, state FROM ingest.batches WHERE state <> 'reset' ORDER BY 1",
            **{name: f"SELECT t::text FROM {name} t ORDER BY 1" for name in others},
        ),
    }


def everything(settings: Settings) -> tuple[object, ...]:
    """Return all rows with their ids and the bucket, for `nothing was changed`."""
    texts = {name: f"SELECT t::text FROM {name} t ORDER BY 1" for name in world.OURS}
    return rows(settings.database_url.reveal(), **texts), world.objects(settings)


def planned(out: str) -> tuple[dict[str, int], int]:
    """Return what a plan says: the rows by table, and the objects."""
    rows = {
        name: int(count) for name, count in re.findall(r"^  (\S+): (\d+) rows? (?:is|are) deleted$", out, re.MULTILINE)
    }
    objects = re.findall(r"^  bucket \S+: (\d+) objects are deleted, ", out, re.MULTILINE)
    return rows, int(objects[0]) if objects else 0


def batch_states(dsn: str) -> dict[str, str]:
    return dict(world.query(dsn, "SELECT id, state FROM ingest.batches"))


def fail_at(dsn: str, step: str) -> None:
    """Let no marker of a step be written."""
    world.query(
        dsn,
        "CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'on purpose'; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON ingest.batch_state FOR EACH ROW"
        f" WHEN (NEW.step = '{step}') EXECUTE FUNCTION public.fail()",
    )


def stop_failing(dsn: str) -> None:
    world.query(dsn, "DROP FUNCTION public.fail CASCADE")


def receipts(dataset: Path) -> list[Path]:
    return sorted(dataset.rglob("*_correct_dishes.json"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of a file in place."""
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def vary(dataset: Path, turn: int = 0) -> None:
    """Make another version of a dataset: photos, menus and receipts differ in part, and other lines are there."""
    folders = [folder for _, folder in sorted(world.folders(dataset).items())]
    photos = [next(folder.rglob("*_Main.jpg")) for folder in folders]
    shutil.copyfile(photos[-1 - turn], photos[turn])
    edit(next(folders[turn].rglob("*_AM.json")), lambda menu: menu[0].update(Name=f"of version {turn}"))
    found = receipts(dataset)
    found[turn].unlink()
    edit(found[turn + 1], lambda lines: lines.append({"Count": 3, "Dishes": [{"Name": "x", "ExternalId": "7"}]}))
    edit(found[turn + 2], lambda lines: lines.__delitem__(slice(1, None)))
    edit(found[turn + 2], lambda lines: lines[0].update(Count=lines[0]["Count"] + 1))


@dataclass(frozen=True)
class App:
    """A table of the app: what makes it, how many of its rows reference something of a recognition, and what."""

    table: str
    create: str
    rows: int
    target: str

    def told(self, recognitions: int) -> str:
        """Return the pattern of how a refusal tells of it."""
        name = re.escape(self.table.removeprefix("public.")).replace('"', '"?')  # quoted or not
        return rf"\b(public\.)?{name} \({self.rows * recognitions} rows, to (public\.)?{self.target}\)"


NOTES = App(
    "public.app_notes",
    "CREATE TABLE public.app_notes (recognition bigint REFERENCES public.recognitions);"
    "INSERT INTO public.app_notes SELECT id FROM public.recognitions",
    1,
    "recognitions",
)


def stop_in_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first call remove two objects, and no other call any."""
    remove, first = Storage.remove, iter([True])

    def refuse(self: Storage, keys: Sequence[str]) -> list[str]:
        if next(first, False):
            return remove(self, keys)
        raise StorageError("Storage refuses, on purpose.")

    monkeypatch.setattr("pipeline.steps.reset.PAGE", 2)
    monkeypatch.setattr(Storage, "remove", refuse)


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

"""Random trees of files: the classes of files add up, all that is usable is loaded, and nothing else is.

The model in tests/trees.py shares no code with the loader. TREES_SEED and TREES choose other trees, and more of them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from tests import trees, world
from tests.runner import ForkServer, Runner, placed_runner
from tests.services import StorageServer
from tests.trees import EXPORTS, Outcome, Planted, Tree

Place = Callable[[], AbstractContextManager[tuple[Settings, Runner]]]
#: Added after the first load, for the second to find.
LATE = Planted(91, EXPORTS[-1])


def photo_content(folder: Path, one: Planted, camera: str) -> str:
    [path] = [path for path in (folder / one.path).rglob(f"*{camera}{one.ending}") if not path.name.startswith(".")]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_rows(found: world.Domain, folder: Path, loaded: dict[int, Planted]) -> None:
    """Compare recognitions, photos, menus and receipts with those of the folders."""
    assert [row[0] for row in found.recognitions] == sorted(loaded)
    photos, menus, lines = [], set(), set()
    for number, one in sorted(loaded.items()):
        for camera, word in ((1, "Main"), (2, "Qualifying")):
            photos.append((number, camera, photo_content(folder, one, word)))
        menus |= {(number, entry["ExternalId"], entry["Name"]) for entry in trees.entries(one.menu, "menu") or []}
        for line in trees.entries(one.receipt, "receipt") or []:
            lines.add((number, line["Count"], tuple(dish["Name"] for dish in line["Dishes"])))
    assert [(row[0], row[1], row[6]) for row in found.images] == photos
    assert {row[:3] for row in found.menus} == menus
    assert {(row[0], row[2], tuple(row[6])) for row in found.lines} == lines


def check_files(classes: dict[str, int], outcome: Outcome, folder: Path, unchanged: int = 0) -> None:
    """Compare the classes of files with the model's; it does not tell rejected files from those passed over."""
    assert sum(classes.values()) == sum(path.is_file() for path in folder.rglob("*"))
    rest = classes.get("rejected", 0) + classes.get("passed_over", 0)
    found = (classes.get("used", 0), classes.get("not_taken", 0), classes.get("clutter", 0), rest)
    assert found == (len(outcome.used) - unchanged, len(outcome.older), len(outcome.clutter), len(outcome.others))


def check_load(place: Place, tree: Tree) -> None:
    """Load a tree, then again with one more recognition, and compare with the model each time."""
    with place() as (found, run), tempfile.TemporaryDirectory(prefix="pipeline-trees-") as name:
        folder, dsn = Path(name), found.database_url.reveal()
        outcome = trees.plant(tree, folder)
        ended = run("load", "--source", folder, "--batch-id", "b1", "--local-scheduler")
        assert ended.code == 0, ended
        check_rows(world.domain(dsn), folder, outcome.loaded)
        [(classes,)] = world.query(dsn, "SELECT files FROM ingest.batches WHERE id = 'b1'")
        check_files(classes, outcome, folder)
        rejects = world.query(dsn, "SELECT path, code FROM ingest.rejects")
        notices = world.query(dsn, "SELECT path, code FROM ingest.notices")
        named = {path for path, _ in (*rejects, *notices)}
        assert [path for path in sorted(outcome.others) if not trees.is_named(path, named, tree.planted)] == []
        assert {(code, path) for path, code in notices if code in trees.SHOWN.values()} == outcome.notices
        assert world.dangling(found) == []
        assert world.inconsistencies(found) == []

        before = len(outcome.used)
        outcome = trees.plant(Tree((*tree.planted, LATE), tree.bins, tree.strays, tree.clutter), folder)
        ended = run("load", "--source", folder, "--batch-id", "b2", "--local-scheduler")
        assert ended.code == 0, ended
        check_rows(world.domain(dsn), folder, outcome.loaded)
        [(classes,)] = world.query(dsn, "SELECT files FROM ingest.batches WHERE id = 'b2'")
        assert classes["unchanged"] >= before
        assert classes["used"] == len(outcome.used) - before
        assert sum(classes.values()) == sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize("count", [4, pytest.param(int(os.environ.get("TREES", "20")), marks=pytest.mark.slow)])
def test_the_files_of_any_tree_add_up_and_what_is_usable_is_loaded(
    count: int,
    postgres_server: EmbeddedPostgres,
    template_database: str,
    storage_server: StorageServer,
    fork_server: ForkServer,
) -> None:
    place = partial(placed_runner, postgres_server, template_database, storage_server, fork_server)
    number = int(os.environ.get("TREES_SEED", "0"))
    print(f"TREES_SEED={number}")

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        # A few trees are for a quick look: the smallest tree that fails is found by the sweep.
        phases=(Phase.generate, Phase.shrink) if count > 10 else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(trees.trees())
    def check(tree: Tree) -> None:
        check_load(place, tree)

    check()

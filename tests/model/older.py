"""Trays that an older script loaded in the project of an app: they are adopted, loaded over, and given back."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from pipeline.storage import Storage
from tests import older_script, world
from tests.model.array import Array
from tests.model.batches import Batch
from tests.model.dataset import FIRST, OLDER, Boxes, Dataset, Tray
from tests.model.disturbances import Disturbances

#: One that a dataset has as well, and one that none has.
NUMBERS = (FIRST + 4, FIRST + 5)
NAME = "manual_load"
#: What the older script writes to.
TABLES = (
    *("public.recognitions", "public.images", "public.recipes", "public.recipe_lines", "public.recipe_line_options"),
    *("public.initial_tray_items", "public.recognition_active_menu_items"),
)


class Older(Array, Disturbances):
    """The same with trays of an older script."""

    def __init__(self) -> None:
        super().__init__()
        self._sql("TRUNCATE public.recognitions, public.recipes CASCADE")
        dataset = Dataset(self.editions, self.runner.folder / "older", 0, NUMBERS)
        older_script.load(self.settings, dataset.folder, NUMBERS, NAME)
        #: What is there of each tray, until it is reset as a batch.
        self.older = {number: self._domain_of(number) for number in NUMBERS}
        self.older_objects = world.objects(self.settings)
        self.older_rows = self._rows()
        self.unadopted = {*NUMBERS}
        self.kept_photos = {*NUMBERS}

    def _domain_of(self, number: int) -> world.Domain:
        parts = vars(super()._found()).values()
        found = world.Domain(*([row for row in part if row[0] == number] for part in parts))
        return replace(found, items=sorted(found.items, key=repr))

    def _rows(self) -> list[list[tuple[Any, ...]]]:
        texts = [
            f"SELECT t::text FROM {name} t WHERE {world.recognition_of(name)} IN {NUMBERS} ORDER BY 1"
            for name in TABLES
        ]
        return world.queries(self.settings.database_url.reveal(), texts)

    @rule(kill_after=st.one_of(st.none(), st.integers(0, 12)))
    def adopt(self, kill_after: int | None) -> None:
        self._changes_nothing({0}, "adopt", "--dry-run")
        self._changes_nothing({4 if self.unadopted else 0}, "adopt")
        self._to_its_end(kill_after, "adopt", "--confirm")
        if self.unadopted:
            self.model.batches[NAME] = Batch("load", "", "", dict.fromkeys(self.unadopted, OLDER))
            self.model.finish(NAME)
            self.unadopted = set()

    @precondition(lambda self: NAME in self.model.batches)
    @rule(kill_after=st.one_of(st.none(), st.integers(0, 6)))
    def adopt_undo(self, kill_after: int | None) -> None:
        adopted = self.model.batches[NAME].numbers
        over = [one for name, one in self.model.batches.items() if name != NAME and one.numbers & adopted]
        command = ("adopt", "--undo", "--confirm")
        if over:
            self._changes_nothing({4}, *command, kill_after=kill_after)
            return
        self._to_its_end(kill_after, *command)
        del self.model.batches[NAME]
        self.unadopted = adopted
        assert self._rows() == self.older_rows

    def _code(self, name: str) -> int:
        batch, left = (
            self.model.batches[name],
            "SELECT 1 FROM ingest.notices WHERE batch_id = %s AND code = 'not_adopted'",
        )
        could_be_used = not batch.is_held and not batch.is_doubted and self._sql(left, name)
        return 0 if could_be_used else super()._code(name)

    def _trays(self) -> dict[int, tuple[Tray, str, Boxes]]:
        return {**super()._trays(), **dict.fromkeys(self.unadopted, (OLDER, NAME, (None, None)))}

    def _part(self, number: int, tray: Tray, name: str, boxes: Boxes) -> world.Domain:
        if tray == OLDER:
            # Annotations share items with those of the older script: the model has no opinion on these.
            older, is_shared = self.older[number], boxes != (None, None)
            return replace(older, items=[] if is_shared else older.items)
        part = super()._part(number, tray, name, boxes)
        return replace(part, items=sorted(part.items, key=repr))

    def _found(self) -> world.Domain:
        """Items are in an order of their own: those of the older script have no line."""
        found = super()._found()
        shared = {n for n, (tray, _, boxes) in self._trays().items() if tray == OLDER and boxes != (None, None)}
        found.items = sorted((row for row in found.items if row[0] not in shared), key=repr)
        found.annotations = [row for row in found.annotations if row[0] not in shared]
        return found

    def _objects(self, *, unfinished: bool = False) -> dict[str, str]:
        adopted = set() if unfinished else self.model.adopted(NAME)
        return {**super()._objects(unfinished=unfinished), **self._older_objects(adopted)}

    def _stored(self) -> dict[str, str]:
        stored, others = super()._stored(), self._older_objects(self.unadopted)
        assert others.items() <= stored.items()
        return {key: digest for key, digest in stored.items() if key not in others}

    def _older_objects(self, numbers: set[int]) -> dict[str, str]:
        return {key: digest for key, digest in self.older_objects.items() if int(key.split("/")[1]) in numbers}

    def _end_all_work(self) -> None:
        """Give back what was adopted, and remove it."""
        for name in [name for name in self.model.batches if name != NAME]:
            assert self.runner("reset", "--batch-id", name, "--confirm").code == 0
            del self.model.batches[name]
        if NAME in self.model.batches:
            self.adopt_undo(kill_after=None)
        if self.unadopted:
            assert self._rows() == self.older_rows
            self._sql("TRUNCATE public.recognitions, public.recipes CASCADE")
            with closing(Storage(self.settings)) as storage:
                assert storage.remove([*self.older_objects]) == []

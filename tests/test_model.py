"""Random sequences of commands against a small model: what readers see, what the bucket holds, and what is refused.

The model knows batches and nothing else: of each recognition readers see the newest finished batch that holds it, with
the annotations of the newest finished annotations batch that is for its photos. Commands are really run, and some are
really killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS, EXPORT
from pipeline.units import counted
from tests import world
from tests.meanings import MEANINGS, meanings
from tests.runner import ForkServer, Runner, placed_runner
from tests.services import MakeDataset, StorageServer

FIRST = 100_024
#: Datasets that overlap: which of the recognitions from FIRST on, with the photos and papers of which seed.
DATASETS = {"early": (0, range(0, 3)), "late": (0, range(2, 5)), "other": (1, range(1, 4))}


@dataclass
class Batch:
    """A batch of the model: what it holds, and when it was finished; None while it is not."""

    kind: str
    dataset: str
    option: str  # of the load: --force, --changed or none
    held: dict[int, int] = field(default_factory=dict)  # recognition -> seed
    version: int | None = None
    photos: dict[int, int] = field(default_factory=dict)  # of annotations: recognition -> seed of its photos
    rejects: set[int] = field(default_factory=set)
    is_doubted: bool = False  # a check recorded a reason to hold it
    is_held: bool = False
    aside: set[int] = field(default_factory=set)  # left as they are, since people work on them


class Batches:
    """The model."""

    def __init__(self) -> None:
        self.batches: dict[str, Batch] = {}
        self._versions = 0

    def done(self, kind: str) -> list[tuple[str, Batch]]:
        found = [(name, one) for name, one in self.batches.items() if one.kind == kind and one.version is not None]
        return sorted(found, key=lambda item: item[1].version or 0)

    def loaded(self) -> dict[int, int]:
        """Recognition -> the seed of what readers see of it."""
        return {number: seed for _, batch in self.done("load") for number, seed in batch.held.items()}

    def shown(self, kind: str) -> dict[int, str]:
        """Recognition -> the batch whose version of it counts; of annotations those of the photos that readers see."""
        loaded = self.loaded()
        return {
            number: name
            for name, batch in self.done(kind)
            for number in batch.held
            if kind == "load" or batch.photos[number] == loaded.get(number)
        }

    def was_for_another(self, number: int, seed: int) -> bool:
        """Say whether annotations of a recognition were loaded, and never for the photos that readers see."""
        photos = {batch.photos[number] for _, batch in self.done("qwen") if batch.held.get(number) == seed}
        return bool(photos) and self.loaded()[number] not in photos

    def once_done(self, batch: Batch) -> Batches:
        """Return what there is once a batch is finished."""
        after = Batches()
        after.batches = {name: one for name, one in self.batches.items() if one is not batch}
        after.batches[""] = replace(batch, version=self._versions + 1)
        return after

    def finish(self, name: str) -> None:
        self._versions += 1
        self.batches[name].version = self._versions


class Machine(RuleBasedStateMachine):
    """The commands, the model beside them, and what must hold after each."""

    datasets: ClassVar[dict[str, Path]]
    #: Gives every sequence a database, a bucket and a working directory of its own.
    place: ClassVar[Callable[[], AbstractContextManager[tuple[Settings, Runner]]]]

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self.settings, self.runner = self._stack.enter_context(type(self).place())
        self.model = Batches()
        self.notes: set[int] = set()
        self._names = 0

    @initialize()
    def an_app_has_a_table_that_references_ours(self) -> None:
        self._sql(
            "CREATE TABLE public.notes (recognition_id bigint PRIMARY KEY REFERENCES public.recognitions (id),"
            " item_id bigint REFERENCES public.initial_tray_items (id))"
        )

    def _sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return world.query(self.settings.database_url.reveal(), statement, values)

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    # What there is to load

    def _recognitions(self, dataset: str) -> dict[int, int]:
        seed, numbers = DATASETS[dataset]
        return {FIRST + number: seed for number in numbers}

    def _candidates(self, batch: Batch) -> dict[int, int]:
        """What a discovery chooses, were it made now."""
        wanted, shown, loaded = (
            self._recognitions(batch.dataset),
            self.model.shown(batch.kind),
            self.model.shown("load"),
        )
        return {
            number: seed
            for number, seed in wanted.items()
            if (batch.kind == "load" or number in loaded)
            and (
                batch.option == "--force"
                or (
                    (
                        number not in shown
                        or (batch.option == "--changed" and self.model.batches[shown[number]].held[number] != seed)
                    )
                    and not (batch.kind == "qwen" and self.model.was_for_another(number, seed))
                )
            )
        }

    def _command(self, name: str) -> list[str]:
        batch = self.model.batches[name]
        folder = self.datasets[batch.dataset]
        if batch.kind == "load":
            command = ["load", "--source", str(folder)]
        else:
            command = ["load-qwen", "--file", str(folder / ANNOTATIONS)]
        return [*command, "--batch-id", name, "--local-scheduler", *filter(None, [batch.option])]

    def _unfinished(self) -> list[str]:
        return [name for name, batch in self.model.batches.items() if batch.version is None]

    # Commands

    @rule(
        kind=st.sampled_from(["load", "load", "qwen"]),
        dataset=st.sampled_from(sorted(DATASETS)),
        option=st.sampled_from(["", "--force", "--changed"]),
        kill_after=st.one_of(st.none(), st.integers(0, 70)),
    )
    def load(self, kind: str, dataset: str, option: str, kill_after: int | None) -> None:
        # A new version whose receipts lack an item that the app references would be refused; the app lets go first.
        if option:
            self._sql("UPDATE public.notes SET item_id = NULL")
        batch = Batch(kind, dataset, option)
        batch.held = self._candidates(batch)
        if kind == "qwen":
            batch.photos = self.model.loaded()
            batch.rejects = set(self._recognitions(dataset)) - set(self.model.shown("load"))
        chosen = len(batch.held)
        for other in self._unfinished():  # what an unfinished batch holds is not for another
            if self.model.batches[other].kind == kind:
                for number in {*self.model.batches[other].held, *self.model.batches[other].aside}:
                    batch.held.pop(number, None)
        is_claimed = not batch.held and chosen > 0
        name = self._name(kind)
        self.model.batches[name] = batch
        code = 3 if is_claimed and not self._fresh(name) else self._code(name)
        ended = self.runner(*self._command(name), kill_after=kill_after)
        assert ended.code in ((code,) if kill_after is None else (code, -9)), ended
        self._settle(name)

    def _settle(self, name: str) -> None:
        """Take over what became of a killed command: not begun, begun, or finished; nothing else may be."""
        states = dict(self._sql("SELECT id, state FROM ingest.batches WHERE id = %s", name))
        state = states.get(name)
        if state is None:
            del self.model.batches[name]
        elif state == "done":
            self._leave_aside(name)
            self.model.finish(name)
        else:
            assert state in ("loading", "held")
            self.model.batches[name].is_held = state == "held"
            self._leave_aside(name, self._listed(name))

    def _listed(self, name: str) -> set[int]:
        found = self._sql("SELECT recognition_id FROM ingest.manifest WHERE batch_id = %s AND NOT rejected", name)
        return {number for (number,) in found}

    def _leave_aside(self, name: str, listed: set[int] | None = None) -> None:
        """Take out of a batch what is in use: all of it, or what a killed command got to."""
        batch = self.model.batches[name]
        used = {number for number in batch.held if self._is_in_use(number, batch)}
        if listed is not None:
            assert batch.held.keys() - used <= listed <= batch.held.keys()
            used = batch.held.keys() - listed
        batch.aside |= used
        for number in used:
            del batch.held[number]

    def _is_in_use(self, number: int, batch: Batch) -> bool:
        """Say whether a batch that is finished now would delete rows on which people work."""
        return False

    def _is_refused(self, without: Batches) -> bool:
        """Say whether a reset that leaves these batches would."""
        return False

    def _fresh(self, name: str) -> set[int]:
        """What a batch rejected, and no batch before it from the same file."""
        batch, names = self.model.batches[name], list(self.model.batches)
        earlier = [self.model.batches[other] for other in names[: names.index(name)]]
        known = [one.rejects for one in earlier if (one.kind, one.dataset) == (batch.kind, batch.dataset)]
        return batch.rejects.difference(*known)

    def _code(self, name: str) -> int:
        """The exit code of a load that runs to its end."""
        batch = self.model.batches[name]
        is_usable = batch.held or batch.aside
        is_unusable = not is_usable and self._fresh(name)
        return 6 if batch.is_held or batch.is_doubted or is_unusable else 0

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._unfinished()))
        if self.model.batches[name].option:
            self._sql("UPDATE public.notes SET item_id = NULL")
        ended = self.runner(*self._command(name))
        assert ended.code == self._code(name), ended
        self._settle(name)
        assert name not in self.model.batches or (self.model.batches[name].version is None) == (ended.code == 6)

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data())
    def a_check_speaks_against_a_batch(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._unfinished()))
        self._sql("UPDATE ingest.batches SET held_reason = 'It is doubted.' WHERE id = %s AND state = 'loading'", name)
        self.model.batches[name].is_doubted = True

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data(), kill_after=st.one_of(st.none(), st.integers(0, 14)))
    def publish(self, data: st.DataObject, kill_after: int | None) -> None:
        name = data.draw(st.sampled_from(self._unfinished()))
        batch = self.model.batches[name]
        command = ["publish", "--batch-id", name]
        if not batch.is_held:
            before = self._before()
            assert self.runner(*command).code == 4
            assert self._before() == before
            return
        if batch.option:
            self._sql("UPDATE public.notes SET item_id = NULL")
        if kill_after is not None:
            first = self.runner(*command, kill_after=kill_after)
            assert first.code in (0, -9), first
        ended = self.runner(*command)
        assert ended.code == 0, ended
        self._leave_aside(name)
        self.model.finish(name)

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data(), kill_after=st.one_of(st.none(), st.none(), st.integers(0, 14)))
    def reset(self, data: st.DataObject, kill_after: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.batches)))
        batch = self.model.batches[name]
        command = ["reset", "--batch-id", name, "--confirm"]
        without = Batches()
        without.batches = {other: one for other, one in self.model.batches.items() if other != name}
        vanishing = set(self.model.shown("load")) - set(without.shown("load"))
        referenced = vanishing & self.notes
        if batch.kind == "load" and not referenced:
            # Items that go with a change of version are the app's to let go of, too.
            self._sql("UPDATE public.notes SET item_id = NULL")
        if batch.kind == "qwen":
            self._sql("UPDATE public.notes SET item_id = NULL")
        before = self._before()
        if referenced:
            ended = self.runner(*command)
            assert ended.code == 4, ended
            assert f"public.notes ({counted(len(referenced), 'row')}, to public.recognitions)" in ended.stderr
            assert self._before() == before
            return
        if self._is_refused(without):
            ended = self.runner(*command, kill_after=kill_after)
            assert ended.code in (4, -9), ended
            assert self._before() == before
            return
        if kill_after is not None:
            first = self.runner(*command, kill_after=kill_after)
            assert first.code in (0, -9), first
        ended = self.runner(*command)
        assert ended.code == 0, ended
        del self.model.batches[name]

    def _before(self) -> object:
        dsn = self.settings.database_url.reveal()
        return world.dump(dsn), world.objects(self.settings)

    @precondition(lambda self: self.model.done("load"))
    @rule(data=st.data())
    def run_a_finished_batch_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, _ in self.model.done("load")]))
        before = self._before()
        assert self.runner(*self._command(name)).code == 0
        assert self._before() == before

    # The app

    @precondition(lambda self: set(self.model.shown("load")) - self.notes)
    @rule(data=st.data())
    def the_app_writes_a_note(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(set(self.model.shown("load")) - self.notes)))
        self._sql(
            "INSERT INTO public.notes SELECT %s, (SELECT min(id) FROM public.initial_tray_items"
            " WHERE recognition_id = %s)",
            number,
            number,
        )
        self.notes.add(number)

    @precondition(lambda self: self.notes)
    @rule()
    def the_app_removes_its_notes(self) -> None:
        self._sql("DELETE FROM public.notes")
        self.notes.clear()

    # What holds after each

    @invariant()
    def readers_see_the_newest_versions(self) -> None:
        shown, annotated = self.model.shown("load"), self.model.shown("qwen")
        parts = []
        for number in sorted(shown):
            seed = self.model.batches[shown[number]].held[number]
            file = None
            if number in annotated:
                file = self.datasets[self.model.batches[annotated[number]].dataset] / ANNOTATIONS
            parts.append(world.wanted((self._folder(seed), shown[number], [number]), qwen=file).domain)
        found = self._found()
        for name in vars(found):
            assert getattr(found, name) == [row for part in parts for row in getattr(part, name)], name

    def _found(self) -> world.Domain:
        """What readers see, without what people changed."""
        return world.domain(self.settings.database_url.reveal())

    def _folder(self, seed: int) -> Path:
        return self.datasets["all-0" if seed == 0 else "all-1"]

    @invariant()
    def the_bucket_holds_the_finished_batches_and_at_most_the_unfinished_ones(self) -> None:
        stored = world.objects(self.settings)
        sure: dict[str, str] = {}
        perhaps: dict[str, str] = {}
        for name, batch in self.model.batches.items():
            if batch.kind != "load":
                continue
            into = sure if batch.version is not None else perhaps
            for number, seed in batch.held.items():
                into.update(world.wanted((self._folder(seed), name, [number])).objects)
        assert {key: digest for key, digest in stored.items() if key not in perhaps} == sure
        assert {key: digest for key, digest in stored.items() if key in perhaps}.items() <= perhaps.items()

    @invariant()
    def the_database_does_not_contradict_itself(self) -> None:
        assert world.inconsistencies(self.settings) == []

    def teardown(self) -> None:
        """At the end all is finished, then all is reset, and nothing is left."""
        with self._stack:
            self._sql("DROP TABLE IF EXISTS public.notes")
            self._end_all_work()
            for name in self.model.batches:
                ended = self.runner("reset", "--batch-id", name, "--confirm")
                assert ended.code == 0, ended
            world.nothing(self.settings)

    def _end_all_work(self) -> None:
        """Let people end what they do."""


#: What people set on rows, each with how to choose another value.
SET_BY_PEOPLE = {
    ("initial_annotations", "is_occluded"): "NOT is_occluded",
    ("initial_tray_items", "bottle_orientation"): "'vertical'",
    ("recipe_line_options", "model_score"): "coalesce(model_score, 0) + 0.5",
    ("recipe_line_options", "is_selected"): "NOT is_selected",
}
ROWS_OF_PEOPLE = (
    *("validation_work_log", "work_items", "work_annotations", "test_split_log", "split_items", "split_annotations"),
)
_HUMAN = "SELECT t::text FROM public.initial_annotations t WHERE t.source = 'HUMAN' ORDER BY t.id"
_BOX = """
    INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox, source)
    SELECT i.id, t.id, jsonb_build_object('x', %s, 'y', 1, 'w', 2, 'h', 2), 'HUMAN'
    FROM public.images i JOIN public.initial_tray_items t USING (recognition_id)
    WHERE recognition_id = %s AND t.source = 'RECIPE_LINE_OPTION' ORDER BY i.id, t.id LIMIT 1 RETURNING id
"""
_CHOOSE = """
    UPDATE public.initial_tray_items t
    SET recipe_line_option_id = o.id, menu_item_external_id = m.external_id
    FROM public.recipe_lines l
    JOIN public.recipe_line_options o ON o.recipe_line_id = l.id
    LEFT JOIN public.recipes p ON p.id = l.recipe_id
    LEFT JOIN public.recognition_active_menu_items m
        ON m.recognition_id = p.recognition_id AND m.external_id = o.external_id
    WHERE t.recipe_line_id = l.id AND l.has_ambiguity AND t.recognition_id = %s
        AND o.id = (SELECT max(other.id) FROM public.recipe_line_options other WHERE other.recipe_line_id = l.id)
    RETURNING t.id
"""
_UNDO = """
    UPDATE public.initial_tray_items SET recipe_line_option_id = NULL, menu_item_external_id = NULL WHERE id = ANY (%s)
"""


class People(Machine):
    """The same in the project of an app whose people work between any two commands."""

    def __init__(self) -> None:
        super().__init__()
        #: Recognition -> what people's rows reference: the seeds of its receipt, and of its annotations.
        self.receipts: dict[int, set[int]] = {}
        self.boxes: dict[int, set[int]] = {}
        self.chosen: dict[int, list[int]] = {}
        self.drawn = 0
        self.set: dict[tuple[str, str], dict[int, Any]] = {pair: {} for pair in SET_BY_PEOPLE}
        self.meanings: dict[str, dict[int, tuple[object, ...]]] = {kind: {} for kind in MEANINGS}
        self.ids: Mapping[int, tuple[object, object]] = {}
        self.others = world.others(self.settings.database_url.reveal())
        self.rows_of_people = self._rows_of_people()

    # What people do

    def _rows_of_people(self) -> list[list[tuple[Any, ...]]]:
        texts = [f"SELECT t::text FROM public.{name} t ORDER BY t.id" for name in ROWS_OF_PEOPLE]
        return world.queries(self.settings.database_url.reveal(), [*texts, _HUMAN])

    def _versions(self, batches: Batches) -> dict[int, tuple[int, int | None]]:
        """Recognition -> the seeds of its receipt and of its annotations that readers see."""
        annotated = batches.shown("qwen")
        found = {}
        for number, name in batches.shown("load").items():
            marked = DATASETS[batches.batches[annotated[number]].dataset][0] if number in annotated else None
            found[number] = (batches.batches[name].held[number], marked)
        return found

    def _refer(self, number: int, *, boxes: bool) -> None:
        receipt, marked = self._versions(self.model)[number]
        self.receipts.setdefault(number, set()).add(receipt)
        if boxes and marked is not None:
            self.boxes.setdefault(number, set()).add(marked)

    @initialize()
    def trays_are_loaded(self) -> None:
        for kind in ("load", "qwen"):
            self.load(kind=kind, dataset="early", option="", kill_after=None)

    @rule(
        data=st.data(),
        kinds=st.permutations(["load", "qwen"]),
        dataset=st.sampled_from(["late", "other", "other"]),
        option=st.sampled_from(["--force", "--changed"]),
        kill_after=st.one_of(st.none(), st.none(), st.integers(0, 70)),
    )
    def people_work_and_versions_come(
        self, data: st.DataObject, kinds: list[str], dataset: str, option: str, kill_after: int | None
    ) -> None:
        for kind in kinds:
            self._work(data)
            self.load(kind=kind, dataset=dataset, option=option, kill_after=kill_after)

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data())
    def people_work_and_a_batch_goes(self, data: st.DataObject) -> None:
        self._work(data)
        self.reset(data=data, kill_after=None)

    def _work(self, data: st.DataObject) -> None:
        """Let people do some things, each on one recognition."""
        for _ in range(data.draw(st.integers(1, 4))):
            shown = sorted(self._versions(self.model))
            if shown:
                number = data.draw(st.sampled_from(shown))
                work = (self._begin, self._begin, self._draw_box, self._choose, self._set, self._end)
                data.draw(st.sampled_from(work))(number)
        self.rows_of_people = self._rows_of_people()

    def _begin(self, number: int) -> None:
        for name in ("validation_work_log", "test_split_log"):
            self._sql(f"INSERT INTO public.{name} (recognition_id) VALUES (%s)", number)
        self._refer(number, boxes=True)

    def _draw_box(self, number: int) -> None:
        self.drawn += 1
        if self._sql(_BOX, self.drawn, number):  # it has an item of a receipt line
            self._refer(number, boxes=False)

    def _choose(self, number: int) -> None:
        if items := [one for (one,) in self._sql(_CHOOSE, number)]:
            self.chosen[number] = items
            self._refer(number, boxes=False)

    def _set(self, number: int) -> None:
        for (table, column), value in SET_BY_PEOPLE.items():
            of = world.recognition_of(f"public.{table}")
            changed = f"UPDATE public.{table} SET {column} = {value} WHERE {of} = %s RETURNING id, {column}"
            self.set[table, column].update(dict(self._sql(changed, number)))

    def _end(self, number: int) -> None:
        for name in ("validation_work_log", "test_split_log"):
            self._sql(f"DELETE FROM public.{name} WHERE recognition_id = %s", number)
        image = "(SELECT id FROM public.images WHERE recognition_id = %s)"
        self._sql(f"DELETE FROM public.initial_annotations WHERE source = 'HUMAN' AND image_id IN {image}", number)
        self._sql(_UNDO, self.chosen.pop(number, []))
        self.receipts.pop(number, None)
        self.boxes.pop(number, None)

    def _end_all_work(self) -> None:
        for number in sorted(self.receipts):
            self._end(number)
        self.rows_of_people = self._rows_of_people()

    # What the model says of it

    def _lines(self, number: int, seed: int) -> list[tuple[Any, ...]]:
        found = world.expected(self._folder(seed), "", [number]).lines
        return [(line[2], *zip(line[5], line[6], strict=True)) for line in found]

    def _labels(self, number: int, seed: int) -> set[int]:
        """The receipt lines that the labels of its annotations name."""
        file = self.datasets[f"all-{seed}"] / ANNOTATIONS
        found = world.expected(self._folder(seed), "", [number], file).annotations
        return {row[7] for row in found if row[5] == "FOOD"}

    def _deletes(self, number: int, before: tuple[int, int | None], after: tuple[int, int | None] | None) -> bool:
        """Say whether a change of version deletes rows that people's rows reference."""
        receipts, boxes = self.receipts.get(number, set()), self.boxes.get(number, set())
        if after is None:
            return bool(receipts)
        (receipt, marked), (next_receipt, next_marked) = before, after
        lines, left = self._lines(number, receipt), self._lines(number, next_receipt)
        if receipt in receipts and any(lines.count(line) > left.count(line) for line in lines):
            return True
        if marked in boxes:
            # Where a line is new, annotations move to its items, and what only the model saw goes.
            is_moved = any(len(lines) < at <= len(left) for at in self._labels(number, marked or 0))
            return marked != next_marked or is_moved
        return False

    def _is_in_use(self, number: int, batch: Batch) -> bool:
        before = self._versions(self.model).get(number)
        return before is not None and self._deletes(number, before, self._versions(self.model.once_done(batch))[number])

    def _is_refused(self, without: Batches) -> bool:
        before, after = self._versions(self.model), self._versions(without)
        return any(self._deletes(number, before[number], after.get(number)) for number in before)

    # What holds after each command

    def _found(self) -> world.Domain:
        found = super()._found()
        found.annotations = [row for row in found.annotations if row[4] == "MODEL"]
        chosen = {one for items in self.chosen.values() for one in items}
        place = "SELECT recognition_id, item_type::text, source::text, line_number, ordinal"
        rows = self._sql(f"{place} FROM public.initial_tray_items WHERE id = ANY (%s)", [*chosen])
        found.items = [(*row[:5], None, None) if row[:5] in rows else row for row in found.items]
        return found

    @invariant()
    def what_people_and_others_have_is_unchanged(self) -> None:
        assert self._rows_of_people() == self.rows_of_people
        assert world.others(self.settings.database_url.reveal()) == self.others
        for (table, column), values in self.set.items():
            found = dict(self._sql(f"SELECT id, {column} FROM public.{table} WHERE id = ANY (%s)", [*values]))
            assert found == {one: value for one, value in values.items() if one in found}
        for items in self.chosen.values():
            text = "SELECT count(recipe_line_option_id) FROM public.initial_tray_items WHERE id = ANY (%s)"
            assert self._sql(text, items) == [(len(items),)]

    @invariant()
    def no_id_comes_to_mean_another_thing(self) -> None:
        for kind, found in meanings(self.settings.database_url.reveal()).items():
            if kind == "pairing":
                continue
            known = self.meanings[kind]
            assert {one: meaning for one, meaning in found.items() if known.get(one, meaning) != meaning} == {}
            known.update(found)

    @invariant()
    def the_rows_of_a_version_keep_their_ids(self) -> None:
        versions = self._versions(self.model)
        now = {number: (version, self._ids(number)) for number, version in versions.items()}
        for number, (version, ids) in now.items():
            if number in self.ids and self.ids[number][0] == version:
                assert self.ids[number][1] == ids
        self.ids = now

    def _ids(self, number: int) -> list[list[tuple[Any, ...]]]:
        tables = ("images", "recipes", "recipe_lines", "recipe_line_options", "initial_tray_items")
        texts = [
            f"SELECT id FROM public.{name} WHERE {world.recognition_of(f'public.{name}')} = {number} ORDER BY id"
            for name in tables
        ]
        boxes = f"{world.recognition_of('public.initial_annotations')} = {number} AND source = 'MODEL'"
        texts.append(f"SELECT id FROM public.initial_annotations WHERE {boxes} ORDER BY id")
        return world.queries(self.settings.database_url.reveal(), texts)


@pytest.fixture(scope="module")
def datasets(small_dataset: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The overlapping datasets, each with the annotations of its recognitions."""
    whole = {seed: small_dataset(5, seed=seed, first_id=FIRST) for seed in (0, 1)}
    made: dict[str, Path] = {f"all-{seed}": folder for seed, folder in whole.items()}
    for name, (seed, numbers) in DATASETS.items():
        folder = tmp_path_factory.mktemp(name)
        annotations = json.loads((whole[seed] / ANNOTATIONS).read_text(encoding="utf-8"))
        kept = {}
        for number in numbers:
            one = f"recognition_{FIRST + number}"
            shutil.copytree(whole[seed] / EXPORT / one, folder / EXPORT / one)
            kept.update({key: value for key, value in annotations.items() if f"{one}/" in key})
        (folder / ANNOTATIONS).write_text(json.dumps(kept), encoding="utf-8")
        made[name] = folder
    return made


@pytest.mark.slow
def test_any_sequence_of_commands_does_what_the_model_says(
    postgres_server: EmbeddedPostgres,
    template_database: str,
    storage_server: StorageServer,
    fork_server: ForkServer,
    datasets: dict[str, Path],
    is_app: bool,
) -> None:
    class Placed(People if is_app else Machine):  # type: ignore[misc]
        place = partial(placed_runner, postgres_server, template_database, storage_server, fork_server)

    Placed.datasets = datasets
    run_state_machine_as_test(
        Placed,
        settings=settings(
            max_examples=8 if is_app else 12,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )

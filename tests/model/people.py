"""The same in the project of an app whose people work between any two commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests import world
from tests.meanings import MEANINGS, meanings
from tests.model.array import Array
from tests.model.batches import Batch, Batches
from tests.model.dataset import Boxes, Tray
from tests.model.disturbances import Disturbances

#: What people set on rows, each with how to choose another value.
SET_BY_PEOPLE = {
    ("initial_annotations", "is_occluded"): "NOT is_occluded",
    ("initial_tray_items", "bottle_orientation"): "'vertical'",
    ("recipe_line_options", "model_score"): "coalesce(model_score, 0) + 0.5",
    ("recipe_line_options", "is_selected"): "NOT is_selected",
    ("recipe_lines", "has_ambiguity"): "NOT has_ambiguity",
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
    WHERE t.recipe_line_id = l.id AND t.recognition_id = %s AND o.id = (
        SELECT max(other.id) FROM public.recipe_line_options other
        WHERE other.recipe_line_id = l.id HAVING count(*) > 1)
    RETURNING t.id
"""
_UNDO = """
    UPDATE public.initial_tray_items SET recipe_line_option_id = NULL, menu_item_external_id = NULL WHERE id = ANY (%s)
"""


class People(Array, Disturbances):
    """The same with people, who reference rows, set columns and choose."""

    def __init__(self) -> None:
        super().__init__()
        #: Recognition -> what people's rows reference: editions of its receipt, and of the boxes of each photo.
        self.receipts: dict[int, set[int | None]] = {}
        self.boxes: dict[int, set[tuple[int, int | None]]] = {}
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

    def _versions(self, batches: Batches) -> dict[int, tuple[Tray, Boxes]]:
        """Recognition -> the files and the boxes that readers see."""
        annotated = batches.annotated()
        return {number: (tray, annotated[number]) for number, tray in batches.loaded().items()}

    def _refer(self, number: int, *, boxes: bool) -> None:
        tray, marked = self._versions(self.model)[number]
        self.receipts.setdefault(number, set()).add(tray.receipt)
        if boxes:
            shown = {(camera, edition) for camera, edition in enumerate(marked) if edition is not None}
            self.boxes.setdefault(number, set()).update(shown)

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

    def _lines(self, number: int, receipt: int | None) -> list[tuple[Any, ...]]:
        found = self.editions.expected(number, Tray(0, 0, receipt, None), "", (None, None)).lines
        return [(line[2], *zip(line[5], line[6], strict=True)) for line in found]

    def _labels(self, number: int, camera: int, edition: int) -> set[int]:
        """The receipt lines that the labels of boxes of a photo name."""
        found = self.editions.expected(number, Tray(0, 0, None, None), "", (edition, edition)).annotations
        return {row[7] for row in found if (row[1], row[5]) == (camera + 1, "FOOD")}

    def _deletes(self, number: int, before: tuple[Tray, Boxes], after: tuple[Tray, Boxes] | None) -> bool:
        """Say whether a change of version deletes rows that people's rows reference."""
        receipts, boxes = self.receipts.get(number, set()), self.boxes.get(number, set())
        if after is None:
            return bool(receipts)
        receipt = before[0].receipt
        lines, left = self._lines(number, receipt), self._lines(number, after[0].receipt)
        if receipt in receipts and any(lines.count(line) > left.count(line) for line in lines):
            return True
        for camera, edition in boxes:
            if before[1][camera] == edition is not None:
                # Where a line is new, annotations move to its items, and what only the model saw goes.
                is_moved = any(len(lines) < at <= len(left) for at in self._labels(number, camera, edition))
                if is_moved or after[1][camera] != edition:
                    return True
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
        place = (
            "SELECT recognition_id, line_number FROM public.recipe_lines l JOIN public.recipes p ON p.id = recipe_id"
        )
        lines = self._sql(f"{place} WHERE l.id = ANY (%s)", [*self.set["recipe_lines", "has_ambiguity"]])
        found.lines = [(*row[:3], len(row[5]) > 1, *row[4:]) if row[:2] in lines else row for row in found.lines]
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

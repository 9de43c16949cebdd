"""`adopt` puts on record what the older script loaded, and a team can go back from every step."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from pipeline.database import Connection
from pipeline.errors import DatabaseUnavailable
from pipeline.storage import Storage
from tests import annotating, older_script, world
from tests.annotating import Run, give_menu, give_receipt, ids_of, key_of, value_of, write
from tests.random_trays import random_boxes, random_receipt
from tests.services import MakeDataset, Start, fresh_database
from tests.test_app_project import COLUMNS, rows_of

run = annotating.run
dsn = annotating.dsn

RECEIPT = [
    {"Count": 2, "Dishes": [{"Name": "soup", "ExternalId": "1"}]},
    {"Count": 1, "Dishes": [{"Name": "tea", "ExternalId": "2"}, {"Name": "juice", "ExternalId": "3"}]},
    {"Count": 1, "Dishes": [{"Name": "bread", "ExternalId": "4"}]},
]
ENTRIES = "public.recognition_active_menu_items"
#: What the older script kept of the model's boxes, of camera 1.
BOXES = (("dish_0", 10, 20.5, 50, 40), ("dish_1", 60.125, 20, 30, 30), ("dish_7", 5, 5, 9, 9), ("plate", 1, 1, 99, 88))


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, app_template: str) -> Iterator[str]:
    """The address of a database as the app has it, without rows, not migrated yet."""
    with fresh_database(postgres_server.dsn, f"app_{uuid.uuid4().hex}", app_template) as url:
        world.query(url, "TRUNCATE public.recognitions, public.recipes CASCADE")
        yield url


class Project:
    """The app's project, with recognitions that the older script loaded; `then` is what it was like."""

    def __init__(self, settings: Settings, dataset: Path) -> None:
        self.settings, self.dataset, self.numbers = settings, dataset, ids_of(dataset)
        self.dsn = settings.database_url.reveal()
        for number in self.numbers:
            give_receipt(dataset, number, RECEIPT)
        boxes = {(number, 1): BOXES for number in self.numbers}
        for number, batch_id in zip(self.numbers, ["manual_load", "batch_20250601_021500", None, "a b"], strict=True):
            older_script.load(settings, dataset, [number], batch_id, boxes)
        self.columns = world.query(self.dsn, COLUMNS)
        self.then = self.now()

    def now(self) -> tuple[dict[str, list[tuple[object, ...]]], dict[str, str]]:
        return rows_of(self.dsn, self.columns), world.objects(self.settings)

    def added(self) -> list[list[tuple[object, ...]]]:
        """Return what is in the columns that the loader added, of rows that the older script wrote."""
        return world.queries(
            self.dsn,
            (
                "SELECT menu_id, captured_on FROM public.recognitions",
                "SELECT byte_size, sha256, orientation FROM public.images",
                "SELECT line_number, ordinal FROM public.initial_tray_items",
                "SELECT detection, label FROM public.initial_annotations",
            ),
        )

    def check(self) -> None:
        """Raise AssertionError unless all is as it was."""
        (rows, objects), (former_rows, former_objects) = self.now(), self.then
        for name, former in former_rows.items():
            assert rows[name] == former, name
        assert objects == former_objects
        assert {value for rows in self.added() for row in rows for value in row} == {None}
        assert world.query(self.dsn, "SELECT * FROM ingest.adopted_rows") == []


@pytest.fixture
def project(settings: Settings, own_dataset: MakeDataset) -> Project:
    return Project(settings, own_dataset(4))


def test_an_afternoon_and_the_way_back(run: Run, project: Project, tmp_path: Path, dsn: str) -> None:
    assert run("migrate").code == 0
    planned = run("adopt", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    assert [one["id"] for one in plan["batches"]] == ["adopted_1", "adopted_2", "batch_20250601_021500", "manual_load"]
    assert [one["former_id"] for one in plan["batches"]] == [None, "a b", "batch_20250601_021500", "manual_load"]
    assert (plan["recognitions"], plan["photos"], plan["photos_missing"], plan["objects_without_row"]) == (4, 8, 0, 0)
    assert world.query(dsn, "SELECT * FROM ingest.batches") == []
    refused = run("adopt")
    assert (refused.code, world.query(dsn, "SELECT * FROM ingest.batches")) == (4, [])
    assert "4 recognitions" in refused.out
    for _ in range(2):
        done = run("adopt", "--confirm")
        assert done.code == 0, done.err
    assert "Nothing to adopt" in done.out
    project.check()
    assert run("verify").code == 0
    assert world.inconsistencies(project.settings) == []
    # A load and an annotations file of the same dataset: nothing new but photos without boxes.
    done = run("load", "--source", project.dataset, "--batch-id", "b1")
    assert done.code == 0, done.err
    assert "Nothing to load" in done.out
    file = write(
        tmp_path / "1.json",
        {
            key_of(one, camera): value_of("dish_0", "dish_0", "plate", "plate", "dish_9")
            for one in project.numbers
            for camera in ("Main", "Qualifying")
        },
    )
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert done.code == 0, done.err
    assert "4 photos" in done.out
    assert world.inconsistencies(project.settings) == []
    assert run("verify").code == 0
    refused = run("adopt", "--undo", "--confirm")
    assert refused.code == 4
    assert "q1" in refused.err
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    project.check()
    done = run("adopt", "--undo", "--confirm")
    assert done.code == 0, done.err
    project.check()
    assert world.query(dsn, "SELECT * FROM ingest.manifest") == []
    assert run("verify").code == 0


CHANGED: list[list[Any] | None] = [
    RECEIPT,
    [{"Count": 1, "Dishes": [{"Name": "salad", "ExternalId": "9"}]}, *RECEIPT],
    RECEIPT[1:],
    [RECEIPT[2], RECEIPT[0]],
    [{**RECEIPT[0], "Count": 1}, *RECEIPT[1:]],
    None,
]


@pytest.mark.parametrize("receipt", [CHANGED[1], *(pytest.param(one, marks=pytest.mark.slow) for one in CHANGED)])
def test_a_forced_reload_over_an_adopted_tray_goes_back_row_by_row(
    run: Run, project: Project, receipt: list[object] | None, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    boxes = "SELECT id, image_id, bbox FROM public.initial_annotations ORDER BY id"
    before = world.query(dsn, boxes)
    for number in project.numbers:
        give_receipt(project.dataset, number, receipt)
    done = run("load", "--source", project.dataset, "--batch-id", "b1", "--force")
    assert done.code == 0, done.err
    assert world.inconsistencies(project.settings) == []
    assert run("verify").code == 0
    assert world.query(dsn, boxes) == before  # the photos have the same size
    keys = "SELECT DISTINCT split_part(storage_path, '/', 1) FROM public.images"
    assert world.query(dsn, keys) == [("b1",)]
    # Twice, and annotations over it.
    assert run("load", "--source", project.dataset, "--batch-id", "b2", "--force").code == 0
    values = {key_of(number): value_of("dish_0", "dish_1", "dish_2", "plate", "plate") for number in project.numbers}
    done = run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1", "--force")
    assert done.code == 0, done.err
    assert world.inconsistencies(project.settings) == []
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    assert world.inconsistencies(project.settings) == []
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    project.check()
    assert run("verify").code == 0


LINE_OF_THE_APP = """
    WITH l AS (
        INSERT INTO public.recipe_lines (recipe_id, line_number, quantity)
        SELECT id, 9, 1 FROM public.recipes RETURNING id, recipe_id
    ), o AS (
        INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name) SELECT id, '500', 'x' FROM l
    )
    INSERT INTO public.initial_tray_items (recognition_id, item_type, source, recipe_line_id, metadata)
    SELECT p.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', l.id, '{"qwen_label": "dish_8"}'
    FROM l JOIN public.recipes p ON p.id = l.recipe_id;
    UPDATE public.recipe_lines SET quantity = 3 WHERE line_number = 1
"""


def test_annotations_leave_a_line_that_the_app_added_to_an_adopted_tray(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0

    def annotate(name: str, left: float) -> None:
        values = {key_of(number): value_of("dish_0", "dish_8", "plate", left=left) for number in project.numbers}
        done = run("load-qwen", "--file", write(tmp_path / name, values), "--batch-id", name, "--force")
        assert done.code == 0, done.err

    def receipts() -> list[list[tuple[object, ...]]]:
        names = ("recipes x", "recipe_lines x", "recipe_line_options x", "initial_tray_items x WHERE source <> 'MODEL'")
        return world.queries(dsn, [f"SELECT x::text FROM public.{name} ORDER BY 1" for name in names])

    annotate("q1", 10)
    world.query(dsn, LINE_OF_THE_APP)
    before = receipts()
    annotate("q2", 30)
    assert receipts() == before
    shown = (
        "SELECT count(*) FROM public.initial_annotations a"
        " JOIN public.initial_tray_items i ON i.id = a.initial_tray_item_id"
        " JOIN public.recipe_lines l ON l.id = i.recipe_line_id AND l.line_number = 9"
    )
    assert world.query(dsn, shown) == [(len(project.numbers),)]
    for name in ("q2", "q1"):
        assert run("reset", "--batch-id", name, "--confirm").code == 0
        assert receipts() == before


def test_an_adopted_item_of_another_type_keeps_it_whatever_is_loaded(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    bottle = (
        "UPDATE public.initial_tray_items i SET item_type = 'BOTTLE' FROM public.recipe_line_options o"
        " WHERE o.id = i.recipe_line_option_id AND o.name = 'bread'"
    )
    world.query(dsn, bottle)
    project.then = project.now()
    items = "SELECT id, item_type::text, source::text FROM public.initial_tray_items ORDER BY id"
    before = world.query(dsn, items)
    values = {key_of(number): value_of("dish_0", "dish_2", "plate") for number in project.numbers}
    for command in (
        ("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1", "--force"),
        ("load", "--source", project.dataset, "--batch-id", "b1", "--force"),
        ("load", "--source", project.dataset, "--batch-id", "b2", "--force"),
    ):
        done = run(*command)
        assert done.code == 0, done.err
        assert "in_use" not in done.out
        found = world.query(dsn, items)
        assert [row for row in found if row[2] == "RECIPE_LINE_OPTION"] == [
            row for row in before if row[2] == "RECIPE_LINE_OPTION"
        ]
    for name in ("q1", "b1", "b2"):
        assert run("reset", "--batch-id", name, "--confirm").code == 0
    project.check()


def test_what_changed_since_another_tool_loaded_it_is_loaded_anew(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, second, third, fourth = project.numbers
    folders = world.folders(project.dataset)

    def changed(*options: str | Path) -> int:
        done = run(*options, "--changed", "--json")
        assert done.code == 0, done.err
        return int(json.loads(done.out)["changed_since_load"])

    load = ("load", "--source", project.dataset, "--batch-id")
    # The older script encoded photos anew, so none of them says anything at the first look.
    assert [changed(*load, name) for name in ("n1", "n2")] == [0, 0]
    give_receipt(project.dataset, first, [*reversed(RECEIPT[:2])])
    [menu] = folders[second].glob("*AM.json")
    menu.write_text(json.dumps([{"ExternalId": "1", "Name": "soup", "Category": "", "Price": 1}]), encoding="utf-8")
    [photo] = folders[third].rglob("*Main.jpg")
    photo.write_bytes(photo.read_bytes() + b"tail")
    give_receipt(project.dataset, fourth, [*reversed(RECEIPT)])  # the same lines in another order
    assert changed(*load, "b1") == 3
    shown = world.query(dsn, "SELECT id FROM public.recognitions WHERE batch_id = 'b1' ORDER BY id")
    assert [number for (number,) in shown] == [first, second, third]
    assert world.inconsistencies(project.settings) == []

    boxes = {label: [x, y, x + w, y + h] for label, x, y, w, h in BOXES}
    detections = [{"bbox_2d": box, "label": label} for label, box in boxes.items()]
    values = {
        key_of(number): {
            "dishes": {"qwen_detections": detections[:3]},
            "plates": {"qwen_detections": detections[3:]},
        }
        for number in (first, fourth)
    }
    file = tmp_path / "boxes.json"
    annotate = ("load-qwen", "--file", write(file, values), "--batch-id")
    assert changed(*annotate, "n3") == 0
    values[key_of(fourth)] = value_of("dish_0", "plate")
    write(file, values)
    assert [changed(*annotate, name) for name in ("q1", "n4")] == [1, 0]
    for batch in ("b1", "q1"):
        assert run("reset", "--batch-id", batch, "--confirm").code == 0
    project.check()


def test_forced_annotations_of_an_adopted_tray_go_back_row_by_row(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    for at, labels in enumerate((("dish_0", "plate"), ("plate", "dish_7", "dish_7", "dish_1"), ()), start=1):
        values = {key_of(number): value_of(*labels) for number in project.numbers}
        file = write(tmp_path / f"{at}.json", values)
        done = run("load-qwen", "--file", file, "--batch-id", f"q{at}", "--force", "--max-rejects", "100%")
        assert done.code == 0, done.err
        assert world.inconsistencies(project.settings) == []
    for batch in ("q2", "q1", "q3"):
        assert run("reset", "--batch-id", batch, "--confirm").code == 0
        assert world.inconsistencies(project.settings) == []
    project.check()


def test_plates_of_an_adopted_tray_come_first_in_each_annotation_of_it(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    number = project.numbers[0]
    items = "public.initial_tray_items WHERE recognition_id = %s AND item_type = 'PLATE'"
    plates = f"SELECT id, ordinal FROM {items} ORDER BY id"
    boxes = (
        "SELECT DISTINCT a.initial_tray_item_id FROM public.initial_annotations a"
        f" WHERE a.initial_tray_item_id IN (SELECT id FROM {items}) ORDER BY 1"
    )
    [(adopted, _)] = world.query(dsn, plates, (number,))
    rows = []
    for at in range(2):
        value = {
            "dishes": {"qwen_detections": []},
            "plates": {
                "qwen_detections": [{"label": "plate", "bbox_2d": [10 * n + at, 1, 10 * n + 9, 9]} for n in range(3)]
            },
        }
        file = write(tmp_path / f"{at}.json", {key_of(number): value})
        done = run("load-qwen", "--file", file, "--batch-id", f"q{at}", "--force")
        assert done.code == 0, done.err
        rows.append(world.query(dsn, plates, (number,)))
        assert rows[-1][0][0] == adopted
        assert world.query(dsn, boxes, (number,)) == [(one,) for one, _ in rows[-1]]
    assert len(rows[1]) == 3
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    assert world.query(dsn, plates, (number,)) == rows[0]
    assert run("reset", "--batch-id", "q0", "--confirm").code == 0
    project.check()


def test_what_people_set_on_rows_that_stay_survives_the_way_back(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    for number in project.numbers:
        give_receipt(project.dataset, number, [*RECEIPT[2:], *RECEIPT])
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    world.query(dsn, "UPDATE public.recipe_line_options SET is_selected = true, model_score = 0.5 WHERE name = 'juice'")
    world.query(dsn, "UPDATE public.initial_annotations SET is_occluded = true")
    world.query(dsn, "UPDATE public.initial_tray_items SET bottle_orientation = 'vertical' WHERE source = 'MODEL'")
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.query(
        dsn, "SELECT DISTINCT is_selected, model_score FROM public.recipe_line_options WHERE name = 'juice'"
    ) == [(True, 0.5)]
    assert world.query(dsn, "SELECT DISTINCT is_occluded FROM public.initial_annotations") == [(True,)]
    world.query(
        dsn, "UPDATE public.recipe_line_options SET is_selected = false, model_score = NULL WHERE name = 'juice'"
    )
    world.query(dsn, "UPDATE public.initial_annotations SET is_occluded = false")
    world.query(dsn, "UPDATE public.initial_tray_items SET bottle_orientation = NULL")
    project.check()


def test_a_reset_of_an_adopted_batch_removes_its_rows_and_objects_alone(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, *others = project.numbers
    world.query(dsn, "INSERT INTO public.validation_work_log (recognition_id) VALUES (%s)", (first,))
    refused = run("reset", "--batch-id", "manual_load", "--confirm")
    assert refused.code == 4
    assert "work_items" in refused.err
    assert world.objects(project.settings) == project.then[1]
    world.query(dsn, "TRUNCATE public.validation_work_log CASCADE")
    done = run("reset", "--batch-id", "manual_load", "--confirm")
    assert done.code == 0, done.err
    assert world.query(dsn, "SELECT id FROM public.recognitions ORDER BY id") == [(one,) for one in sorted(others)]
    left = {key: one for key, one in project.then[1].items() if f"/{first}/" not in key}
    assert world.objects(project.settings) == left
    assert run("verify").code == 0
    assert world.query(dsn, "SELECT count(*) FROM public.recipes") == [(3,)]
    # A version of ours over an adopted one stays without it, and the annotations of the older script go with theirs.
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    for batch in ("batch_20250601_021500", "adopted_1", "adopted_2"):
        assert run("reset", "--batch-id", batch, "--confirm").code == 0
    assert world.query(dsn, "SELECT * FROM public.initial_annotations") == []
    assert world.query(dsn, "SELECT * FROM ingest.adopted_rows") == []
    assert run("verify").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.objects(project.settings) == {}
    assert world.query(dsn, "SELECT * FROM public.recognitions") == []


def test_a_reset_of_an_adopted_batch_is_refused_over_work_on_its_entries(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, *_ = project.numbers
    reset = ("reset", "--batch-id", "manual_load", "--confirm")
    world.query(
        dsn,
        f"CREATE TABLE public.entry_work (entry bigint REFERENCES {ENTRIES} (id) ON DELETE CASCADE);"
        f"INSERT INTO public.entry_work SELECT id FROM {ENTRIES}",
    )
    refused = run(*reset)
    assert (refused.code, "public.entry_work (" in refused.err) == (4, True)
    project.check()
    world.query(dsn, "DROP TABLE public.entry_work")
    # Nor does an entry go that is newer than the adoption.
    world.query(dsn, f"INSERT INTO {ENTRIES} (recognition_id, external_id, name) VALUES (%s, '888', 'x')", (first,))
    refused = run(*reset)
    assert (refused.code, f"{ENTRIES} (1 row, to public.recognitions)" in refused.err) == (4, True)
    world.query(dsn, f"DELETE FROM {ENTRIES} WHERE external_id = '888'")
    project.check()
    assert run(*reset).code == 0
    assert world.query(dsn, f"SELECT id FROM {ENTRIES} WHERE recognition_id = {first}") == []


def test_entries_of_an_adopted_version_go_with_its_reset(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, *_ = project.numbers
    for path in project.dataset.rglob("*AM.json"):
        path.unlink()
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    assert run("reset", "--batch-id", "manual_load", "--confirm").code == 0
    assert world.query(dsn, f"SELECT id FROM {ENTRIES} WHERE recognition_id = {first}") == []
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.query(dsn, f"SELECT id FROM public.recognitions WHERE id = {first}") == []


def test_entries_that_people_changed_after_a_forced_load_stay(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, second, *_ = project.numbers
    row = f"SELECT e.*::text FROM {ENTRIES} e WHERE recognition_id = {second} ORDER BY id"
    before = world.query(dsn, row)
    [(edited,)] = world.query(dsn, f"SELECT min(external_id) FROM {ENTRIES} WHERE recognition_id = {first}")

    def prices(number: int) -> dict[str, int | None]:
        shown = f"SELECT external_id, price::integer FROM {ENTRIES} WHERE recognition_id = {number}"
        return dict(world.query(dsn, f"{shown} AND external_id IN ('777', '888', '{edited}')"))

    menus = {"b1": ["888", edited], "b2": ["888", edited], "b3": [edited], "b4": ["777"]}
    for batch_id, menu in menus.items():
        for number in project.numbers:
            give_menu(project.dataset, number, menu)
        done = run("load", "--source", project.dataset, "--batch-id", batch_id, "--force")
        assert done.code == 0, done.err
        assert prices(second) == {edited: None} | dict.fromkeys(menu, 10)
        if batch_id == "b1":
            assert prices(first) == prices(second)
            world.query(dsn, f"UPDATE {ENTRIES} SET price = 3 WHERE recognition_id = {first} AND price = 10")
        else:
            assert prices(first) == {"888": 3, edited: 3} | ({"777": 10} if "777" in menu else {})
    kept = "SELECT batch_id, right(message, 3) FROM ingest.notices WHERE code = 'menu_entry_kept' ORDER BY id"
    assert world.query(dsn, kept) == [("b2", ": 2"), ("b3", ": 1")]
    for batch_id in reversed(menus):
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0
    assert prices(first) == {"888": 3, edited: 3}
    assert world.query(dsn, row) == before


def test_entries_that_the_app_deleted_do_not_stop_the_way_back(run: Run, project: Project, dsn: str) -> None:
    world.query(
        dsn,
        f"INSERT INTO {ENTRIES} (recognition_id, external_id, name) SELECT id, n, 'x'"
        " FROM public.recognitions, unnest('{1,4}'::text[]) AS n ON CONFLICT DO NOTHING;"
        "UPDATE public.initial_tray_items i SET menu_item_external_id = o.external_id"
        " FROM public.recipe_line_options o WHERE o.id = i.recipe_line_option_id",
    )
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, *others = project.numbers
    # The line of 1 goes, that of 4 stays.
    for number in project.numbers:
        give_receipt(project.dataset, number, RECEIPT[1:])
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    world.query(
        dsn, f"UPDATE public.initial_tray_items SET menu_item_external_id = NULL WHERE recognition_id = {first}"
    )
    world.query(dsn, f"DELETE FROM {ENTRIES} WHERE recognition_id = {first} AND external_id IN ('1', '4')")
    done = run("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 0, done.err
    found = world.query(
        dsn,
        "SELECT recognition_id, menu_item_external_id FROM public.initial_tray_items"
        " WHERE recipe_line_option_id IS NOT NULL ORDER BY 1, 2",
    )
    assert found == sorted([(first, None)] * 3 + [(one, entry) for one in others for entry in "114"])


def test_an_entry_that_a_person_chose_or_cleared_survives_the_way_back(run: Run, project: Project, dsn: str) -> None:
    first, second, third, fourth = project.numbers
    bread = "public.initial_tray_items SET menu_item_external_id = %s WHERE metadata ->> 'name' = 'bread'"
    known = f"INSERT INTO {ENTRIES} (recognition_id, external_id, name) VALUES (%s, '4', 'x')"
    for number in (second, third):
        world.query(dsn, known, (number,))
        world.query(dsn, f"UPDATE {bread} AND recognition_id = %s", ("4", number))
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    for number in project.numbers:
        give_menu(project.dataset, number, ["1"] if number == fourth else ["1", "4"])
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    found = "SELECT recognition_id, menu_item_external_id FROM public.initial_tray_items"
    found += " WHERE metadata ->> 'name' = 'bread' ORDER BY 1"
    assert world.query(dsn, found) == [(first, "4"), (second, "4"), (third, "4"), (fourth, None)]
    world.query(dsn, f"UPDATE {bread} AND recognition_id = %s", (None, second))
    world.query(dsn, known, (fourth,))
    world.query(dsn, f"UPDATE {bread} AND recognition_id = %s", ("4", fourth))
    assert run("load", "--source", project.dataset, "--batch-id", "b2", "--force").code == 0
    assert world.query(dsn, found) == [(first, "4"), (second, None), (third, "4"), (fourth, "4")]
    for batch_id in ("b2", "b1"):
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0
    assert world.query(dsn, found) == [(first, None), (second, None), (third, "4"), (fourth, "4")]


def test_a_load_by_the_name_of_an_adopted_batch_that_was_reset_is_one_of_ours(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, *_ = project.numbers
    assert run("reset", "--batch-id", "manual_load", "--confirm").code == 0
    give_receipt(project.dataset, first, RECEIPT)
    assert run("load", "--source", project.dataset, "--batch-id", "manual_load").code == 0
    assert world.query(dsn, "SELECT batch_id FROM public.recognitions WHERE id = %s", (first,)) == [("manual_load",)]
    assert ", adopted" not in run("status", "--batch-id", "manual_load").out
    done = run("load-qwen", "--file", write(tmp_path / "1.json", {key_of(first): value_of("dish_0", "plate")}))
    assert done.code == 0, done.err
    assert run("verify", "--deep").code == 0
    assert run("adopt", "--undo", "--confirm").code == 0
    assert world.query(dsn, "SELECT id FROM ingest.batches WHERE kind = 'load'") == [("manual_load",)]
    assert run("reset", "--batch-id", "manual_load", "--confirm").code == 0
    assert world.query(dsn, "SELECT id FROM public.recognitions WHERE id = %s", (first,)) == []


def test_a_batch_that_is_adopted_again_has_no_numbers_of_its_reset(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    assert run("reset", "--batch-id", "manual_load", "--confirm").code == 0
    world.query(dsn, "INSERT INTO public.recognitions (id, batch_id) VALUES (7, 'manual_load')")
    assert run("adopt", "--confirm").code == 0
    assert world.query(dsn, "SELECT adopted, metrics FROM ingest.batches WHERE id = 'manual_load'") == [(True, {})]


def test_what_an_adopted_tray_lacks_is_noticed_and_no_difference(run: Run, project: Project, dsn: str) -> None:
    first, second, *_ = project.numbers
    with closing(Storage(project.settings)) as storage:
        storage.remove([f"recognitions/{first}/camera2.jpg"])
        storage.upload("recognitions/777/camera1.jpg", b"another")
    world.query(dsn, "DELETE FROM public.images WHERE recognition_id = %s AND camera_number = 1", (second,))
    assert run("migrate").code == 0
    done = run("adopt", "--confirm", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert (plan["photos"], plan["photos_missing"], plan["rows_without_photo"]) == (6, 1, 1)
    assert plan["objects_without_row"] == 2
    assert world.query(dsn, "SELECT recognition_id, code FROM ingest.notices ORDER BY 1") == sorted(
        [(first, "adopted_without_photo"), (second, "adopted_without_photo")]
    )
    assert run("verify").code == 0
    assert run("verify", "--deep").code == 0
    known = "SELECT count(*) FROM ingest.manifest CROSS JOIN unnest(sha256s) AS one WHERE one IS NOT NULL"
    assert world.query(dsn, known) == [(6,)]
    with closing(Storage(project.settings)) as storage:
        storage.upload(f"recognitions/{first}/camera1.jpg", b"damaged")
    assert run("verify").code == 5


def test_a_tray_that_was_deleted_and_loaded_anew_leaves_its_adopted_batch(run: Run, project: Project, dsn: str) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    first, second, *_ = project.numbers
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    found = "SELECT batch_id FROM ingest.manifest WHERE recognition_id = %s ORDER BY 1"
    kept = [first, second]
    world.query(dsn, "DELETE FROM public.recognitions WHERE id = ANY (%s)", (kept,))
    world.query(dsn, "DELETE FROM public.recipes WHERE recognition_id = ANY (%s)", (kept,))
    boxes = {(number, 1): BOXES[:2] for number in kept}
    older_script.load(project.settings, project.dataset, kept, "batch_20250601_021500", boxes)
    rows, objects = project.now()
    # Until it is adopted anew, no load compares it with the former version, and its photos are not those of the batch.
    give_receipt(project.dataset, first, RECEIPT[1:])
    looked = run("load", "--source", project.dataset, "--batch-id", "n1", "--changed", "--json")
    assert (looked.code, json.loads(looked.out)["changed_since_load"]) == (0, 0)
    refused = run("reset", "--batch-id", "manual_load", "--confirm")
    assert (refused.code, f"would be deleted: {first}." in refused.err) == (4, True)
    adopted = run("adopt", "--confirm", "--json")
    assert adopted.code == 0, adopted.err
    assert [(one["id"], one["recognitions"]) for one in json.loads(adopted.out)["batches"]] == [("adopted_3", 2)]
    assert [world.query(dsn, found, (number,)) for number in kept] == [[("adopted_3",), ("b1",)]] * 2
    counts = "SELECT id, recognitions, photos, bytes > 0 FROM ingest.batches WHERE adopted ORDER BY id"
    assert world.query(dsn, counts) == [
        ("adopted_1", 1, 2, True),
        ("adopted_2", 1, 2, True),
        ("adopted_3", 2, 4, True),
        ("batch_20250601_021500", 0, 0, False),
        ("manual_load", 0, 0, False),
    ]
    for name in ("manual_load", "b1"):
        done = run("reset", "--batch-id", name, "--confirm")
        assert done.code == 0, done.err
    now = project.now()
    assert [one for one in now[0]["public.images"] if one[1] in kept] == [
        one for one in rows["public.images"] if one[1] in kept
    ]
    assert {key: now[1].get(key) for key in objects if key.startswith("recognitions/")} == {
        key: value for key, value in objects.items() if key.startswith("recognitions/")
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_any_history_over_adopted_trays_can_be_undone(
    run: Run, project: Project, tmp_path: Path, dsn: str, seed: int
) -> None:
    chosen = random.Random(seed)
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    batches: list[str] = []
    for at in range(6):
        kind = chosen.choice(["load", "load", "qwen", "qwen", "reset"])
        some = chosen.sample(project.numbers, chosen.randint(1, 4))
        if kind == "reset" and batches:
            batch = batches.pop(chosen.randrange(len(batches)))
            done = run("reset", "--batch-id", batch, "--confirm")
            if not world.query(
                dsn, "SELECT id FROM ingest.batches WHERE id = %s", (batch,)
            ):  # there was nothing to load
                assert done.code == 2
                continue
        elif kind == "load":
            for number in some:
                give_receipt(project.dataset, number, random_receipt(chosen, RECEIPT))
            batches.append(f"b{at}")
            done = run("load", "--source", project.dataset, "--batch-id", f"b{at}", "--force")
        else:
            keys = [key_of(number, camera) for number in some for camera in ("Main", "Qualifying")]
            values = {key: random_boxes(chosen, BOXES) for key in chosen.sample(keys, chosen.randint(1, len(keys)))}
            batches.append(f"q{at}")
            force = ["--force"] if chosen.random() < 0.7 else []
            done = run("load-qwen", "--file", write(tmp_path / f"{at}.json", values), "--batch-id", f"q{at}", *force)
        assert done.code == 0, done.err
        assert world.inconsistencies(project.settings) == []
    chosen.shuffle(batches)
    made = {name for (name,) in world.query(dsn, "SELECT id FROM ingest.batches")}
    for batch in [batch for batch in batches if batch in made]:
        done = run("reset", "--batch-id", batch, "--confirm")
        assert done.code == 0, done.err
        assert world.inconsistencies(project.settings) == []
    project.check()


def test_the_doctor_names_the_bucket_of_the_older_script(
    run: Run, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def findings() -> list[dict[str, Any]]:
        return [
            one for one in json.loads(run("status", "--check", "--json").out)["findings"] if one["check"] == "adopt"
        ]

    # A key that no bucket of another test has.
    number = 10**9 + random.SystemRandom().randrange(10**9)
    key = f"recognitions/{number}/camera1.jpg"
    world.query(project.dsn, "DELETE FROM public.images")
    world.query(project.dsn, "INSERT INTO public.recognitions (id) VALUES (%s)", (number,))
    image = "INSERT INTO public.images (recognition_id, camera_number, storage_path) VALUES (%s, 1, %s)"
    world.query(project.dsn, image, (number, key))
    with closing(Storage(project.settings)) as storage:
        storage.upload(key, b"photo")
    monkeypatch.setenv("STORAGE_BUCKET", "recognitions")
    for _ in range(2):  # before our migrations and after them
        [found] = findings()
        assert (found["level"], found["remedy"]) == (
            "problem",
            f"Set STORAGE_BUCKET={project.settings.bucket}, so that new ones go there too.",
        )
        assert run("migrate").code == 0
    monkeypatch.setenv("STORAGE_BUCKET", project.settings.bucket)
    [found] = findings()
    assert (found["level"], "adopt --dry-run" in found["remedy"]) == ("warning", True)
    assert run("adopt", "--confirm").code == 0
    assert findings() == []


@pytest.mark.slow
def test_an_adoption_that_is_killed_anywhere_is_made_by_the_same_command(
    run: Run, project: Project, start: Start, dsn: str
) -> None:
    assert run("migrate").code == 0
    found = "SELECT recognition_id FROM ingest.manifest ORDER BY 1"
    for seconds in (0.3, 0.6, 0.9, 1.2):
        process = start(sys.executable, "-m", "pipeline", "adopt", "--confirm")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
        assert world.query(dsn, found) in ([], [(number,) for number in project.numbers])
    assert run("adopt", "--confirm").code == 0
    assert world.query(dsn, found) == [(number,) for number in project.numbers]
    assert run("verify").code == 0
    project.check()


def test_a_page_and_the_status_cover_an_adopted_batch(run: Run, project: Project, tmp_path: Path) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    done = run("status", "--batch-id", "manual_load")
    assert done.code == 0, done.err
    assert "1 recognition, 2 photos" in done.out
    assert "Adopted: another tool loaded it, as manual_load." in done.out
    [line] = [line for line in run("status").out.splitlines() if line.startswith("  manual_load ")]
    assert line.endswith(", adopted")
    done = run("report", "--batch-id", "manual_load", "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert str(project.numbers[0]) in (tmp_path / "page.html").read_text(encoding="utf-8")
    done = run("load", "--source", project.dataset, "--batch-id", "manual_load")
    assert done.code == 4
    for batch in ("manual_load", "adopted_1"):
        assert "nothing was loaded" in run("publish", "--batch-id", batch).out


def test_boxes_of_a_photo_without_a_size_are_rejected(run: Run, project: Project, tmp_path: Path, dsn: str) -> None:
    first, second, *_ = project.numbers
    world.query(dsn, "UPDATE public.images SET width = NULL WHERE recognition_id = %s", (first,))
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    assert world.query(dsn, "SELECT DISTINCT recognition_id, code FROM ingest.notices") == [
        (first, "adopted_without_size")
    ]
    values = {key_of(number, "Qualifying"): value_of("plate") for number in (first, second)}
    done = run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1")
    assert done.code == 0, done.err
    assert "1 photo, 1 detection" in done.out
    assert world.query(dsn, "SELECT recognition_id, code FROM ingest.rejects") == [(first, "photo_size_unknown")]


def test_annotations_over_adopted_trays_are_as_before_once_a_forced_load_is_reset(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    def rows() -> list[list[tuple[object, ...]]]:
        items = "SELECT t.*::text FROM public.initial_tray_items t ORDER BY 1"
        return world.queries(dsn, (items, "SELECT a.*::text FROM public.initial_annotations a ORDER BY 1"))

    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    values = {
        key_of(number, "Qualifying"): value_of("dish_0", "dish_3", "dish_3", "plate", "plate")
        for number in project.numbers
    }
    done = run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1")
    assert done.code == 0, done.err
    before = rows()
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert rows() == before
    refused = run("adopt", "--undo", "--confirm")
    assert (refused.code, "reset --batch-id q1" in refused.err) == (4, True)


def test_boxes_that_are_replaced_come_back_with_what_people_set(
    run: Run, project: Project, tmp_path: Path, dsn: str
) -> None:
    assert run("migrate").code == 0
    assert run("adopt", "--confirm").code == 0
    assert run("load", "--source", project.dataset, "--batch-id", "b1", "--force").code == 0
    world.query(dsn, "UPDATE public.initial_annotations SET is_occluded = true")
    world.query(dsn, "UPDATE public.initial_tray_items SET bottle_orientation = 'vertical' WHERE source = 'MODEL'")
    values = {key_of(number): value_of("dish_1") for number in project.numbers}
    file = write(tmp_path / "1.json", values)
    assert run("load-qwen", "--file", file, "--batch-id", "q1", "--force").code == 0
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.query(dsn, "SELECT DISTINCT is_occluded FROM public.initial_annotations") == [(True,)]
    chosen = "SELECT DISTINCT bottle_orientation FROM public.initial_tray_items WHERE source = 'MODEL'"
    assert world.query(dsn, chosen) == [("vertical",)]


def test_a_bucket_without_the_photos_is_refused(
    run: Run, project: Project, monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    assert run("migrate").code == 0
    other = f"{project.settings.bucket}-other"
    monkeypatch.setenv("STORAGE_BUCKET", other)
    with closing(Storage(project.settings, bucket=other)) as storage:
        storage.ensure_bucket()
    refused = run("adopt", "--confirm")
    assert (refused.code, "STORAGE_BUCKET" in refused.err) == (4, True)
    assert world.query(dsn, "SELECT * FROM ingest.batches") == []


def test_an_adoption_whose_commit_is_not_answered_is_told(
    run: Run, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("migrate").code == 0
    commit, lost = Connection.commit, list[str]()

    def unanswered(connection: Connection) -> None:
        commit(connection)
        if changes and not lost:
            lost.append("answer")
            raise DatabaseUnavailable("The connection was lost.", "")

    changes: list[str] = []
    execute = Connection.execute

    def noting(connection: Connection, name: str, /, **parameters: object) -> object:
        changes.extend([name] if name in ("insert_adopted", "forget_adopted") else [])
        return execute(connection, name, **parameters)

    monkeypatch.setattr(Connection, "commit", unanswered)
    monkeypatch.setattr(Connection, "execute", noting)
    monkeypatch.setenv("PIPELINE_RETRY_BACKOFF_FACTOR", "1.01")
    for options, kept in (((), 4), (("--undo",), 0)):
        changes.clear()
        lost.clear()
        done = run("adopt", *options, "--confirm", "--json")
        assert (done.code, lost) == (0, ["answer"]), done.err
        assert len(json.loads(done.out)["batches"]) == 4
        assert len(world.query(project.settings.database_url.reveal(), "SELECT id FROM ingest.batches")) == kept
